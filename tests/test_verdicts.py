"""No wrong verdict: every outcome of the lab's CA in every language, page and fault, and what the client may conclude from it.

The expectations are those of the facts page about AD CS, and the truth is the lab's request table: a verdict may be withheld
where a fault destroyed what it rests on, and it may never be false.
"""

import itertools
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scx_enroll import ca, config, request, signin
from scx_enroll.rootfs import Root
from tests.lab.authority import Row, Template
from tests.lab.ca import LabCA
from tests.lab.pages import Pages
from tests.lab.switches import LANGUAGES

pytestmark = pytest.mark.slow

CSR = request.build_csr(request.RequestSpec("host1.example.com"), ec.generate_private_key(ec.SECP256R1()))
PATIENT = ca.Limits(connect_s=10, silence_s=10, total_s=30)
BRISK = ca.Limits(connect_s=5, silence_s=1, total_s=1.5)
PAGE_LIMIT_BYTES = 1 << 20  # facts 3: what a client should read at most


@dataclass
class Run:
    """One call of the client and what the CA saw of it."""

    outcome: Any
    told: List[Tuple[int, int]]  # IDs, and how many GETs had arrived when each was told
    posts: int
    fetched: List[str]  # ReqID= of each GET that had one
    rows: List[Row]
    switches: dict
    seconds: float
    asked: Optional[int] = None  # of a fetch
    problems: List[str] = field(default_factory=list)

    @property
    def row(self):
        return self.rows[0] if self.rows else None


class Site:
    """A lab CA and a tree with the configuration's files; each call starts from default switches and an empty request table."""

    def __init__(self, folder, **options):
        self.lab = LabCA(folder / "lab", **options)
        self.switches, self.authority = self.lab.switches, self.lab.authority
        self.root = Root(str(folder))
        (folder / "password").write_text(self.lab.password + "\n")
        (folder / "password").chmod(0o600)

    def conversation(self, limits=PATIENT):
        settings = dict(
            server=self.lab.server, template="SCXAgent", auth="basic", user=self.lab.user, password_file="/password",
            server_trust="/lab/server-trust.pem",
        )  # fmt: skip
        chosen = config.CA(**settings)
        return ca.connect(self.root, chosen, signin.authentication(self.root, chosen), limits)

    def clean(self):
        self.switches.reset()
        self.authority.rows.clear()
        self.authority.request_right = True
        self.authority.templates = {"SCXAgent": Template("SCXAgent")}
        self.lab.twist = None
        del self.lab.log[:]

    def submit(self, limits=PATIENT, **switches):
        """One submission under these switches, beginning with an empty table."""
        self.clean()
        self.switches.update(switches)
        told: List[Tuple[int, int]] = []
        conversation = self.conversation(limits)
        start = time.monotonic()
        outcome = conversation.submit(CSR, lambda request_id: told.append((request_id, self.lab.count_get)))
        return self._run(outcome, told, switches, start)

    def fetch(self, prepare, limits=PATIENT, **switches):
        """One GET of the request that `prepare` leaves in the table."""
        self.clean()
        asked = prepare(self, switches)
        self.switches.reset()
        self.switches.update(switches)
        conversation = self.conversation(limits)
        start = time.monotonic()
        run = self._run(conversation.fetch(asked), [], switches, start)
        run.asked = asked
        return run

    def _run(self, outcome, told, switches, start):
        seconds = time.monotonic() - start
        log = list(self.lab.log)
        wanted = [re.search(r"(?i)ReqID=([^&]*)", seen.path) for seen in log if seen.method == "GET"]
        rows = list(self.authority.rows.values())
        return Run(outcome, told, self.lab.count_post, [item.group(1) for item in wanted if item], rows, dict(switches), seconds)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    # numbers in the header of each page, which are no ID
    site = Site(tmp_path_factory.mktemp("site"), name="Lab Issuing CA 7", first_id=9)
    with site.lab:
        yield site


# -- what may be said


def is_reserved(outcome, row):
    """Nothing is concluded, and another POST is not taken for harmless."""
    if isinstance(outcome, ca.Unknown):
        return outcome.doubtful and outcome.request_id in (None, row and row.id)
    return isinstance(outcome, ca.Doubtful) and outcome.request_id in (None, row and row.id)


def falsehoods(run):
    """What is false about a submission's verdict, whatever the switches were."""
    outcome, row = run.outcome, run.row
    number, state = (row.id, row.state) if row else (None, "nothing")
    if run.posts != 1:
        yield f"{run.posts} POSTs"
    if len(run.rows) > 1:
        yield f"{len(run.rows)} rows"
    for told, gets in run.told:
        if told != number:
            yield f"on_id was told {told}, true is {number}"
        if gets:
            yield f"on_id was told after {gets} GETs"
    if len(run.told) > 1:
        yield f"on_id was told {len(run.told)} times"
    strange = [wanted for wanted in run.fetched if wanted not in (str(number), "CACert")]
    if strange:
        yield f"fetched {strange}"
    truths = {
        ca.Certificate: state == "issued" and outcome == ca.Certificate(number, row.certificate, getattr(outcome, "bag", ())),
        ca.Pending: state == "pending" and outcome == ca.Pending(number),
        ca.Denied: state in ("denied", "failed")
        and getattr(outcome, "request_id", 0) in (None, number)
        and getattr(outcome, "hresult", 0) in (None, row.hresult),
        ca.Unfetched: state == "issued" and getattr(outcome, "request_id", 0) == number,
        ca.Unavailable: state in ("nothing", "denied", "failed"),
        ca.Doubtful: is_reserved(outcome, row),
        ca.Unknown: is_reserved(outcome, row),
        ca.Gone: False,
        ca.Revoked: False,
    }
    if not truths.get(type(outcome), False):
        yield f"the row is {state} {number}"
    if isinstance(outcome, (ca.Certificate, ca.Pending, ca.Unfetched)) and not run.told:
        yield "on_id was told nothing"


def is_truth(run):
    """The whole truth: the outcome of the row, with ID and code as far as the page tells them."""
    outcome, row = run.outcome, run.row
    if row.state == "issued":
        return isinstance(outcome, ca.Certificate)
    if row.state == "pending":
        return isinstance(outcome, ca.Pending)
    page = run.switches.get("deny_page", "full")
    number = None if page in ("no-id", "bare") else row.id
    # where the code alone is missing, one GET tells it (facts 2.1)
    hresult = None if page == "bare" or not row.hresult else row.hresult
    return isinstance(outcome, ca.Denied) and (outcome.request_id, outcome.hresult) == (number, hresult)


def shown(run, problem):
    switches = " ".join(f"{name}={value if not name.endswith('hresult') else value and hex(value)}" for name, value in run.switches.items())
    came = repr(run.outcome)
    return f"{switches}: {problem}; came {came[:240]}{'...' * (len(came) > 240)}"


def judge(run, allowed):
    """Return complaints about a submission: falsehoods, and verdicts that `allowed` has no place for."""
    found = [shown(run, problem) for problem in falsehoods(run)]
    kinds = {
        "truth": lambda: run.row is not None and is_truth(run),
        "reserved": lambda: is_reserved(run.outcome, run.row),
        "unfetched": lambda: isinstance(run.outcome, ca.Unfetched),
        "unavailable": lambda: isinstance(run.outcome, ca.Unavailable),
        "denied": lambda: isinstance(run.outcome, ca.Denied),
    }
    if not any(kinds[kind]() for kind in allowed):
        found.append(shown(run, f"expected {' or '.join(allowed)}"))
    return found


def agree(complaints):
    if complaints:
        pytest.fail("\n".join([f"{len(complaints)} disagreements", *complaints[:12]]), pytrace=False)


# -- outcomes of a submission

OUTCOMES = {
    "issued": {},
    "pending": {"mode": "pending"},
    "failed": {"mode": "fail", "deny_hresult": 0x80094001},
    "denied": {"mode": "deny"},
    "denied-no-code": {"mode": "deny", "deny_page": "no-code"},
    "denied-no-id": {"mode": "deny", "deny_page": "no-id"},
    "denied-bare": {"mode": "deny", "deny_page": "bare"},
    "denied-echo": {"mode": "deny", "deny_page": "echo"},
    "denied-codeless": {"mode": "deny", "deny_hresult": None},
    "denied-numbers": {"mode": "deny", "deny_message": "At least 2048 bits, see certnew.cer?ReqID=7&Enc=b64 and 0x8009480f."},
}
every_outcome = pytest.mark.parametrize("outcome", OUTCOMES)
every_language = pytest.mark.parametrize("language", LANGUAGES)
SHAPES = [
    dict(zip(("id_quote", "id_shape", "lower_case", "sniff", "charset", "escape"), values))
    for values in itertools.product(("", "'", '"'), ("", "spaced", "among", "wrapped"), *[(False, True)] * 4)
]
# what the facts call no reason to doubt: Content-Type (1) and framing that is in order
ORDERLY = (
    {"content_type": "application/pkix-cert; charset=UTF-8"},
    {"content_type": "text/plain; charset=utf-16"},
    {"chunked": True},
    {"chunked": True, "content_type": "application/octet-stream"},
    {"content_length": "missing"},
    {"body_bytes": 300_000},
    {"body_bytes": 300_000, "chunked": True},
    {"bom": True},
)


@every_language
@every_outcome
def test_verdicts_do_not_depend_on_anybodys_language(site, outcome, language):
    """Texts follow the server, messages the CA, and shapes the version; element IDs are the same (facts 2)."""
    complaints = []
    for number, ca_language in enumerate(LANGUAGES):
        shape = SHAPES[(number * 37 + len(outcome) * 11 + LANGUAGES.index(language) * 53) % len(SHAPES)]
        run = site.submit(**OUTCOMES[outcome], **shape, language=language, ca_language=ca_language)
        complaints += judge(run, ["truth"])
    agree(complaints)


@every_outcome
def test_verdicts_do_not_depend_on_how_tags_are_written(site, outcome):
    """Quotes, blanks, cases, other attributes, other pages for browsers, escaped messages: all of them at once, too."""
    complaints = []
    for number, shape in enumerate(SHAPES if outcome in ("issued", "pending", "denied") else SHAPES[::5]):
        language = LANGUAGES[number % len(LANGUAGES)]
        complaints += judge(site.submit(**OUTCOMES[outcome], **shape, language=language), ["truth"])
    agree(complaints)


@every_outcome
@pytest.mark.parametrize("way", ORDERLY, ids=str)
def test_verdicts_do_not_depend_on_how_a_whole_page_travels(site, outcome, way):
    """The body is judged, not its type; chunks and a connection's end are ways to send a whole body."""
    complaints = []
    for language in ("en", "de", "zh", "ar"):
        complaints += judge(site.submit(**OUTCOMES[outcome], **way, language=language), ["truth"])
    agree(complaints)


@every_outcome
def test_without_a_content_type_nothing_is_wrong(site, outcome):
    """The old library fails there; to say unknown is allowed, to be wrong is not (facts 3)."""
    agree(judge(site.submit(**OUTCOMES[outcome], content_type="none"), ["truth", "reserved", "unfetched"]))


@every_outcome
@pytest.mark.parametrize(
    ("charset", "languages"),
    [
        ("utf-16", ("en", "zh")),
        ("iso-8859-1", ("de", "es", "ru")),
        ("cp1252", ("fr", "tr")),
        ("gb2312", ("zh", "en")),
        ("shift_jis", ("ja", "de")),
        ("windows-1251", ("ru", "en")),
    ],
)
def test_other_encodings_are_read_right_or_not_at_all(site, outcome, charset, languages):
    """Pages are UTF-8 (facts 2), and what is not may be called unknown (facts 9); a part of it is no denial and no ID."""
    complaints = []
    for language, bom, named in itertools.product(languages, (False, True), (False, True)):
        run = site.submit(**OUTCOMES[outcome], page_charset=charset, language=language, bom=bom, charset=named, shape_on="post")
        # such a page may be pure ASCII, and then it is UTF-8 as well
        complaints += judge(run, ["truth", "reserved"])
    agree(complaints)


@pytest.mark.parametrize("outcome", ["issued", "pending", "denied", "denied-no-id", "failed"])
def test_digits_that_nobody_has_seen_are_no_id(site, outcome):
    """Native digits in Arabic texts are unconfirmed (facts 11.4): no ID may be made from them or from the code beside them."""
    complaints = []
    for ca_language, shape in itertools.product(LANGUAGES, SHAPES[::37]):
        run = site.submit(**OUTCOMES[outcome], **shape, language="ar", ca_language=ca_language, digits="native")
        allowed = {"issued": ["truth"], "pending": ["reserved"]}.get(outcome, ["denied"])
        complaints += judge(run, allowed)
    agree(complaints)


T = "800706ba 800706bf 80080005 80092013 80092012 80094006 8009400f 80090020"
C = (
    "80094001 80094011 80094012 80094016 80094800 80094801 80094802 80094803 80094807 80094809 8009480a 8009480b 8009480d 8009480e "
    "8009480f 80094812 80094811 8009310b 80093102 80093005 80070005 80070057 800b0101 800b010a 800b0114"
)
F = "80094002 80094003 80094004 80094014"
CLASSES = {int(code, 16): kind for codes, kind in ((T, "transient"), (C, "configuration"), (F, "final")) for code in codes.split()}


@pytest.mark.parametrize("deny_page", ["full", "no-code", "no-id", "echo"])
@pytest.mark.parametrize("mode", ["deny", "fail"])
def test_every_code_is_a_denial_of_its_class(site, mode, deny_page):
    """The page is a denial (facts 2.1), whatever the code means elsewhere; section 6 tells what to do about it."""
    complaints = []
    for number, code in enumerate([*CLASSES, 0x80004005, 0x8000FFFF, 0x800706BE, 0x8009ABCD]):
        language = LANGUAGES[number % len(LANGUAGES)]
        for ca_language in {"en", "de", language}:
            run = site.submit(mode=mode, deny_hresult=code, deny_page=deny_page, language=language, ca_language=ca_language)
            complaints += judge(run, ["truth"])
            if code in CLASSES and getattr(run.outcome, "retry", None) != CLASSES[code]:
                complaints.append(shown(run, f"expected class {CLASSES[code]}"))
    agree(complaints)


def test_what_templates_and_the_ca_forbid_is_denied(site):
    """Real policies instead of a switch."""
    complaints = []
    for language, template in itertools.product(
        LANGUAGES,
        [
            Template("SCXAgent", published=False),
            Template("SCXAgent", enroll=False),
            Template("SCXAgent", agent_signatures=1),
            Template("SCXAgent", directory_attribute="dns"),
            Template("SCXAgent", directory_attribute="mail"),
        ],
    ):
        clean = site.clean

        def with_template(clean=clean, template=template):
            clean()
            site.authority.templates["SCXAgent"] = template

        site.clean = with_template
        try:
            run = site.submit(language=language)
        finally:
            del site.clean
        complaints += judge(run, ["truth"])
        if run.row.state != "denied":
            complaints.append(f"the lab did not deny {template}")
    agree(complaints)


# -- the CA's service does not answer


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        (0x800706BA, ["unavailable"]),
        (0x800706BF, ["unavailable"]),
        (0x80080005, ["unavailable", "reserved"]),
        (0x80070005, ["unavailable", "reserved"]),
        (0x800706BE, ["reserved"]),
    ],
    ids=["800706ba", "800706bf", "80080005", "80070005", "800706be"],
)
def test_a_service_that_does_not_answer_stored_nothing_unless_the_call_broke(site, code, allowed):
    """800706ba and bf are surely not stored (facts 5), be is ambiguous, and the row is there; no error page is a denial."""
    complaints = []
    for number, (language, ca_language) in enumerate(itertools.product(LANGUAGES, LANGUAGES)):
        outcome = ("issued", "pending", "denied")[number % 3]
        run = site.submit(
            **OUTCOMES[outcome], **SHAPES[number * 37 % len(SHAPES)], language=language, ca_language=ca_language,
            unavailable="post", unavailable_hresult=code,
        )  # fmt: skip
        complaints += judge(run, allowed)
        if bool(run.rows) != (code == 0x800706BE):
            complaints.append(shown(run, "the lab stored what it should not, or the other way round"))
    agree(complaints)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("code", [0x80004005, 0x8000FFFF, 0x80010108, 0x800706BE], ids="{:08x}".format)
def test_an_error_that_the_facts_give_no_class_rules_nothing_out(site, code, stored):
    """Neither a denial's element (facts 2.1) nor among the codes that are surely not stored (facts 5): a row may wait to be issued."""
    complaints = []
    for number, language in enumerate(LANGUAGES):
        outcome = ("issued", "pending", "denied")[number % 3]
        run = site.submit(
            **OUTCOMES[outcome], language=language, unavailable="post", unavailable_hresult=code, unavailable_stored=stored,
        )  # fmt: skip
        complaints += judge(run, ["reserved"])
    agree(complaints)


@pytest.mark.parametrize("code", [0x800706BA, 0x800706BF, 0x80080005, 0x80070005, 0x800706BE])
def test_a_service_that_stops_after_issuing_costs_no_id(site, code):
    """Issued, then gone: fetched later by ID, never requested again."""
    complaints = []
    for language in LANGUAGES:
        run = site.submit(unavailable="get", unavailable_hresult=code, language=language)
        complaints += judge(run, ["unfetched"])
    agree(complaints)


# -- answers that are not the CA's

SURE = "401 403 403.4 403.6 403.7 403.13 403.16 403.17 404 404-html 413 503 301 302 303 307 308".split()
UNSURE = "500 500-asp 502 504 proxy-502 proxy-504 login captive json 204 empty nul bad-utf8 huge 100-then-close".split()
UNLISTED = "400 405 407 408 429".split()  # no word of the facts on them


@pytest.mark.parametrize("kind", SURE)
def test_an_answer_that_rules_storing_out_is_unavailable(site, kind):
    """Nobody passed the request on (facts 2.4 and 5), in whatever language IIS says so and however it is framed."""
    complaints = []
    for language, way in itertools.product(LANGUAGES, ({}, {"chunked": True}, {"content_type": "none"}, {"charset": True})):
        run = site.submit(answer=kind, answer_on="post", language=language, **way)
        complaints += judge(run, ["unavailable"])
        if len(site.lab.log) != 1:
            complaints.append(shown(run, "something else was asked for, or a redirect was followed"))
    agree(complaints)


@pytest.mark.parametrize("kind", UNSURE)
@pytest.mark.parametrize("stored", [False, True])
def test_an_answer_that_leaves_it_open_is_never_a_verdict(site, kind, stored):
    """Whether the CA stored a request behind it is not to be seen: neither denied, nor pending, nor free to be sent again."""
    complaints = []
    for language, outcome in itertools.product(LANGUAGES, ("issued", "pending", "denied")):
        if kind == "huge" and language not in ("en", "ar"):
            continue
        run = site.submit(**OUTCOMES[outcome], answer=kind, answer_on="post", answer_after=stored, language=language)
        complaints += judge(run, ["reserved"])
    agree(complaints)


@pytest.mark.parametrize("kind", UNLISTED)
def test_a_status_that_nobody_wrote_about_is_no_verdict_either(site, kind):
    """Unavailable or doubtful are both defensible where nothing was stored."""
    agree([complaint for language in LANGUAGES for complaint in judge(site.submit(answer=kind, language=language), ["unavailable", "reserved"])])


@pytest.mark.parametrize("kind", [*SURE, *UNSURE, *UNLISTED])
def test_an_answer_between_issuing_and_fetching_costs_no_id(site, kind):
    """The ID is known: a later GET brings the certificate."""
    complaints = []
    for language in ("en", "ru"):
        run = site.submit(answer=kind, answer_on="get", language=language)
        found = judge(run, ["unfetched", "reserved"])
        if run.told != [(run.row.id, 0)] or run.outcome.request_id != run.row.id:
            found.append(shown(run, f"the ID {run.row.id} is lost"))
        complaints += found
    agree(complaints)


# -- the way over the line


@every_outcome
@pytest.mark.parametrize("lost", ["before", "after", "reset"])
def test_a_reply_that_never_comes_is_doubtful(site, outcome, lost):
    """The client can not tell a request that was stored from one that was not."""
    agree(judge(site.submit(**OUTCOMES[outcome], lost=lost), ["reserved"]))


@every_outcome
@pytest.mark.parametrize(
    "way",
    [
        {"lost": "truncated"},
        {"lost": "truncated", "chunked": True},
        {"lost": "truncated", "content_length": "missing"},
        {"lost": "truncated-quiet"},
        {"lost": "truncated-quiet", "chunked": True},
        {"content_length": "wrong-less", "shape_on": "post"},
    ],
    ids=str,
)
def test_a_cut_page_tells_nothing_but_a_whole_link(site, outcome, way):
    """HTML without its end is unknown, since a cut makes 8 of 89; only the link of an issued page says where its ID ends (facts 2.1)."""
    whole = site.submit(**OUTCOMES[outcome])
    page = Pages(site.authority, site.switches).outcome(whole.row, mozilla=True).encode()
    end = page.lower().index(b"</html>")
    complaints = []
    marks = [match.end() for match in re.finditer(str(whole.row.id).encode(), page)]
    points = {0, 1, end, end + 3, *range(0, end, max(1, end // 12)), *marks, *(mark - 1 for mark in marks), *(mark + 1 for mark in marks)}
    for point, sniff in itertools.product(sorted(points), (True, False)):
        run = site.submit(**OUTCOMES[outcome], **way, truncate_at=point, sniff=sniff)
        allowed = ["truth", "unfetched", "reserved"] if run.row.state == "issued" else ["reserved"]
        complaints += judge(run, allowed)
    agree(complaints)


@every_outcome
def test_a_page_shorter_than_promised_is_not_taken_for_more_than_it_is(site, outcome):
    """The page is whole and Content-Length says more: nothing is lost, so the truth and doubt are both in order."""
    agree(judge(site.submit(**OUTCOMES[outcome], content_length="wrong-more", shape_on="post"), ["truth", "reserved", "unfetched"]))


@every_outcome
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", ["", "missing"])
def test_a_page_beyond_any_size_is_not_read(site, outcome, chunked, length):
    """1 MiB (facts 3), however its size is told, or not told; the request may well be stored."""
    run = site.submit(
        **OUTCOMES[outcome], body_bytes=PAGE_LIMIT_BYTES * 3, chunked=chunked, content_length=length, shape_on="post"
    )
    agree(judge(run, ["reserved"]))


@pytest.mark.parametrize("fails", ["500", "html", "drop"])
@pytest.mark.parametrize("cer_as", ["pem", "bare", "der"])
def test_a_certificate_that_fails_to_come_keeps_its_id(site, fails, cer_as):
    """Whatever is between, the next GET is for the same ID."""
    agree(judge(site.submit(cer_fails=1, cer_fails_as=fails, cer_as=cer_as), ["unfetched", "truth"]))


@pytest.mark.parametrize("cer_as", ["pem", "bare", "der"])
@pytest.mark.parametrize("way", [*ORDERLY, {"content_type": "none"}], ids=str)
def test_certificates_are_known_by_their_body(site, cer_as, way):
    """PEM, DER or bare base64 (facts 2.3), whatever the header calls it and however it is framed."""
    complaints = []
    for sniff, bag in itertools.product((True, False), ("sorted", "shuffled", "leaf", "empty")):
        run = site.submit(cer_as=cer_as, **way, shape_on="get", sniff=sniff, bag=bag)
        complaints += judge(run, ["truth"])
    agree(complaints)


@pytest.mark.parametrize("cer_as", ["pem", "bare", "der"])
@pytest.mark.parametrize(
    "way",
    [
        {"lost": "before"}, {"lost": "after"}, {"lost": "reset"}, {"lost": "truncated"}, {"lost": "truncated-quiet"},
        {"lost": "truncated", "chunked": True}, {"lost": "truncated-quiet", "chunked": True}, {"lost": "truncated", "content_length": "missing"},
        {"content_length": "wrong-less"}, {"content_length": "wrong-more"},
    ],
    ids=str,
)  # fmt: skip
def test_a_certificate_that_comes_in_part_is_fetched_again(site, cer_as, way):
    """The true one or none; its ID stays known."""
    complaints = []
    for cut in (-1, 0, 30, 60, 64, 66, 400, 800, 1000):
        run = site.submit(cer_as=cer_as, **way, lost_on="get", shape_on="get", truncate_at=cut)
        complaints += judge(run, ["truth", "unfetched", "reserved"])
        if getattr(run.outcome, "request_id", None) != run.row.id:
            complaints.append(shown(run, f"the ID {run.row.id} is lost"))
    agree(complaints)


SLOW = [
    {"slow": 3.0},
    {"slow_headers": 0.05},
    {"slow_body": 0.02},
    {"slow_body": 0.02, "chunked": True},
    {"slow_body": 0.02, "content_length": "missing"},
    {"slow_headers": 1.5},
]


@pytest.mark.parametrize(
    ("outcome", "way"), [(outcome, way) for number, way in enumerate(SLOW) for outcome in list(OUTCOMES)[number % 2 : 6 : 2]], ids=str
)
def test_a_reply_that_creeps_ends_at_the_deadline(site, outcome, way):
    """Each byte is in time and the whole is not: the request is stored, the verdict is withheld, and the lock is let go."""
    run = site.submit(BRISK, **OUTCOMES[outcome], **way, slow_on="post")
    complaints = judge(run, ["reserved"])
    if run.seconds > 5:
        complaints.append(shown(run, f"took {run.seconds:.1f} s"))
    agree(complaints)


@pytest.mark.parametrize("way", SLOW, ids=str)
def test_a_certificate_that_creeps_is_fetched_later(site, way):
    """The ID is known before."""
    run = site.submit(BRISK, **way, slow_on="get")
    complaints = judge(run, ["unfetched", "truth"])
    if run.seconds > 8:
        complaints.append(shown(run, f"took {run.seconds:.1f} s"))
    agree(complaints)


FAULTS_OF_A_GET = [
    {"cer_fails": 9, "cer_fails_as": "500"}, {"cer_fails": 9, "cer_fails_as": "html"}, {"cer_fails": 9, "cer_fails_as": "drop"},
    {"lost": "after", "lost_on": "get"}, {"lost": "truncated", "lost_on": "get"}, {"lost": "truncated-quiet", "lost_on": "get"},
    *({"unavailable": "get", "unavailable_hresult": code} for code in (0x800706BA, 0x800706BE, 0x80070005, 0x80080005)),
    *({"answer": kind, "answer_on": "get"} for kind in (*SURE, *UNSURE, *UNLISTED)),
    {"foreign": "zero"}, {"spacer": False},
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS_OF_A_GET, ids=str)
def test_a_denial_whose_code_can_not_be_asked_for_stays_one(site, fault):
    """The page said denied; the GET that asks for the code changes nothing about that, and brings no code of something else."""
    complaints = []
    for language, mode in (("en", "deny"), ("de", "deny"), ("ar", "fail")):
        run = site.submit(mode=mode, deny_page="no-code", deny_hresult=0x8009480F, language=language, **fault)
        complaints += judge(run, ["denied"])
        if run.outcome.request_id != run.row.id:
            complaints.append(shown(run, f"the ID {run.row.id} is lost"))
    agree(complaints)


# -- signing in


@pytest.mark.parametrize("auth", ["negotiate", "epa", "kerberos", "refused"])
def test_whoever_is_not_let_in_has_stored_nothing(site, auth):
    """401, in any language."""
    agree([complaint for language in LANGUAGES for complaint in judge(site.submit(auth=auth, language=language), ["unavailable"])])


def test_anonymous_is_denied(site):
    """Nobody asked who it is, so nobody has the right (facts 8)."""
    agree([complaint for language in LANGUAGES for complaint in judge(site.submit(auth="anonymous", language=language), ["truth"])])


# -- what becomes of a request


def _stored(site, **switches):
    site.switches.update(switches)
    return site.authority.submit(CSR, "SCXAgent", site.lab.user, {}).id


def _pending(site, switches):
    return _stored(site, mode="pending", **_said(switches))


def _said(switches):
    return {name: switches[name] for name in ("language", "ca_language") if name in switches}


def _approved(site, switches):
    return site.authority.approve(_pending(site, switches)).id


def _denied(site, switches):
    return site.authority.deny(_pending(site, switches)).id


def _refused(site, switches):
    return _stored(site, mode="deny", deny_hresult=0x8009480F, **_said(switches))


def _codeless(site, switches):
    return _stored(site, mode="deny", deny_hresult=None, **_said(switches))


def _failed(site, switches):
    return _stored(site, mode="fail", deny_hresult=0x80094001, **_said(switches))


def _deleted(site, switches):
    number = _pending(site, switches)
    site.authority.delete(number)
    return number


def _revoked(site, switches):
    return site.authority.revoke(_stored(site, **_said(switches))).id


def _rebuilt(site, switches):
    number = _pending(site, switches) + 100
    site.authority.rows.clear()
    return number


def _foreign(site, switches):
    site.switches.update(_said(switches))
    return site.authority.submit(CSR, "SCXAgent", "LAB\\other$", {}).id


def fetch_falsehoods(run):
    """What is false about a fetch's verdict."""
    outcome, row, asked = run.outcome, run.row, run.asked
    state = row.state if row else "nothing"
    hidden = run.switches.get("foreign", "readable") != "readable" and row is not None and row.requester.endswith("other$")
    if run.posts:
        yield f"{run.posts} POSTs"
    strange = [wanted for wanted in run.fetched if wanted not in (str(asked), "CACert")]
    if strange:
        yield f"fetched {strange}"
    if getattr(outcome, "request_id", None) not in (None, asked):
        yield f"another ID than {asked}"
    truths = {
        ca.Certificate: state == "issued" and outcome == ca.Certificate(asked, row.certificate, getattr(outcome, "bag", ())),
        ca.Pending: state == "pending",
        ca.Denied: state in ("denied", "failed") and getattr(outcome, "hresult", 0) in (None, row.hresult),
        ca.Revoked: state == "revoked",
        ca.Gone: state == "nothing" or hidden,
        ca.Unfetched: state == "issued",
        ca.Unavailable: True,
        ca.Doubtful: True,
        ca.Unknown: True,
    }
    if not truths[type(outcome)]:
        yield f"the row is {state} {asked}"
    if isinstance(outcome, ca.Unknown) and outcome.doubtful:
        yield "a GET stores nothing"


def judge_fetch(run, *allowed):
    found = [shown(run, problem) for problem in fetch_falsehoods(run)]
    if not isinstance(run.outcome, allowed):
        found.append(shown(run, f"expected {' or '.join(kind.__name__ for kind in allowed)}"))
    return found


# how it was left, what a GET tells with the disposition's number, and what may be told without it
ENDS = {
    "pending": (_pending, (ca.Pending,), (ca.Pending, ca.Unknown)),
    "approved": (_approved, (ca.Certificate,), (ca.Certificate,)),
    "denied by a manager": (_denied, (ca.Denied,), (ca.Denied,)),
    "denied by policy": (_refused, (ca.Denied,), (ca.Denied, ca.Unknown, ca.Unavailable)),
    "denied without a code": (_codeless, (ca.Denied,), (ca.Denied, ca.Unknown)),
    "failed": (_failed, (ca.Denied,), (ca.Denied, ca.Unknown, ca.Unavailable)),
    "deleted": (_deleted, (ca.Gone,), (ca.Gone,)),
    "never there": (_rebuilt, (ca.Gone,), (ca.Gone,)),
    "revoked": (_revoked, (ca.Revoked,), (ca.Revoked, ca.Unknown)),
}


def ends(site, end, language, allowed, **switches):
    complaints = []
    for number, ca_language in enumerate(LANGUAGES):
        shape = SHAPES[(number * 37 + len(end) * 11 + LANGUAGES.index(language) * 53) % len(SHAPES)]
        run = site.fetch(ENDS[end][0], **shape, **switches, language=language, ca_language=ca_language)
        complaints += judge_fetch(run, *allowed)
        if end.startswith("denied") and isinstance(run.outcome, ca.Denied) and (run.outcome.hresult or 0) != run.row.hresult:
            complaints.append(shown(run, f"the code is {run.row.hresult:x}"))
    agree(complaints)


@every_language
@pytest.mark.parametrize("end", ENDS)
def test_each_end_of_a_request_is_told_apart(site, end, language):
    """Facts 2.3 and 2.1, rules 4 and 5: by number and code, in any two languages and any shape."""
    ends(site, end, language, ENDS[end][1])


@every_language
@pytest.mark.parametrize("end", ENDS)
def test_without_the_unconfirmed_number_nothing_is_guessed(site, end, language):
    """Then only a code tells (facts 2.1, rules 5 and 6): a LastStatus of 0 is that of a request that waits, and of others, too."""
    ends(site, end, language, ENDS[end][2], spacer=False)


def test_a_revoked_certificate_whose_status_is_unconfirmed(site):
    """With the number it is revoked; without, its status may say anything (facts 11.1), but not that it was denied or is gone."""
    complaints = []
    for language, spacer in itertools.product(LANGUAGES, (True, False)):
        run = site.fetch(_revoked, language=language, spacer=spacer, revoked_status=0x80094003)
        complaints += judge_fetch(run, *((ca.Revoked,) if spacer else (ca.Revoked, ca.Unknown, ca.Unavailable)))
    agree(complaints)


@pytest.mark.parametrize(
    ("foreign", "allowed"),
    [("readable", (ca.Certificate,)), ("empty", (ca.Gone,)), ("zero", (ca.Gone, ca.Unknown, ca.Unavailable))],
)
def test_somebody_elses_request_is_nobodys_denial(site, foreign, allowed):
    """Disposition 0 and the empty property mean that it is not ours (facts 2.1)."""
    agree([
        complaint
        for language in LANGUAGES
        for complaint in judge_fetch(site.fetch(_foreign, language=language, foreign=foreign), *allowed)
    ])  # fmt: skip


@pytest.mark.parametrize("end", ["pending", "approved", "denied by policy", "deleted", "revoked"])
@pytest.mark.parametrize("kind", [*SURE, *UNSURE, *UNLISTED])
def test_no_foreign_answer_ends_a_request(site, end, kind):
    """A request is ended by the CA's word alone; whatever else answers is asked again later."""
    complaints = []
    for language in ("en", "de", "ar"):
        if kind == "huge" and language != "en":
            continue
        run = site.fetch(ENDS[end][0], answer=kind, answer_on="get", language=language)
        complaints += judge_fetch(run, ca.Unavailable, ca.Unknown)
    agree(complaints)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "way",
    [
        {"lost": "before"}, {"lost": "after"}, {"lost": "reset"}, {"lost": "truncated"}, {"lost": "truncated", "chunked": True},
        {"lost": "truncated-quiet"}, {"content_length": "wrong-less"}, {"body_bytes": 3 * PAGE_LIMIT_BYTES},
        {"unavailable": "get"}, {"unavailable": "get", "unavailable_hresult": 0x800706BE},
        {"unavailable": "get", "unavailable_hresult": 0x80070005}, {"unavailable": "get", "unavailable_hresult": 0x80080005},
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_answer_ends_no_request(site, end, way):
    """Half a page tells neither an end nor an ID."""
    complaints = []
    for cut, language in itertools.product((-1, 0, 300, 700), ("en", "de")):
        if "body_bytes" in way and cut != -1:
            continue
        run = site.fetch(ENDS[end][0], **way, lost_on="get", truncate_at=cut, language=language)
        whole = (ca.Certificate, ca.Unfetched) if end == "approved" else ()
        complaints += judge_fetch(run, ca.Unavailable, ca.Unknown, *whole)
    agree(complaints)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", ORDERLY, ids=str)
def test_an_orderly_answer_ends_it_as_ever(site, end, way):
    """The same ways to send a whole page as for submissions."""
    agree(judge_fetch(site.fetch(ENDS[end][0], **way), *ENDS[end][1]))


# -- the CA itself


@pytest.mark.parametrize("tiers", [1, 2, 3])
@pytest.mark.parametrize("aki", [True, False])
def test_the_newest_ca_certificate_is_told_through_a_life(tmp_path, tiers, aki):
    """First comes the one that signs, whatever the order of the bag, what was renewed, and how often (facts 1 and 10)."""
    site = Site(tmp_path, tiers=tiers, aki=aki)
    complaints = []
    with site.lab:
        for step in (
            lambda: None, site.authority.renew, lambda: site.authority.renew(new_key=True), site.authority.renew_root,
            site.authority.rebuild, site.authority.expire,
        ):  # fmt: skip
            step()
            newest, chain = site.authority.newest.der, set(site.authority.chain())
            for bag, extra, sniff in itertools.product(("sorted", "ordered", "reversed", "shuffled"), (False, True), (False, True)):
                site.clean()
                site.switches.update({"bag": bag, "bag_extra": extra, "sniff": sniff})
                found = site.conversation().authority()
                if not isinstance(found, ca.Authority) or found.chain[0] != newest or not set(found.chain) >= chain:
                    complaints.append(f"{bag} {extra} {sniff}: {str(found)[:200]}")
                if site.lab.count_post:
                    complaints.append("a POST")
            if step != site.authority.expire:
                complaints += judge(site.submit(), ["truth"])
    agree(complaints)


@pytest.mark.parametrize(
    "switches",
    [
        {"certcarc": "missing"}, {"nrenewals": 3}, {"nrenewals": 0}, {"bag": "empty"}, {"bag": "leaf"}, {"content_type": "none"},
        {"chunked": True}, {"content_length": "missing"}, {"content_length": "wrong-less"}, {"lost": "truncated", "lost_on": "get"},
        {"lost": "truncated-quiet", "lost_on": "get"}, {"lost": "reset", "lost_on": "get"}, {"unavailable": "all"},
        {"body_bytes": 3 * PAGE_LIMIT_BYTES}, {"auth": "negotiate"}, *({"answer": kind} for kind in (*SURE, *UNSURE, *UNLISTED)),
    ],
    ids=str,
)  # fmt: skip
def test_a_ca_that_can_not_be_read_is_not_made_up(tmp_path_factory, site, switches):
    """Its certificate or nothing: never a stranger's, never a certificate that was not asked for."""
    if not site.authority.generations[1:]:
        site.authority.renew(new_key=True)
    site.clean()
    site.switches.update(switches)
    found = site.conversation().authority()
    assert isinstance(found, (ca.Authority, ca.Unavailable, ca.Unknown))
    if isinstance(found, ca.Authority):
        # a server that tells of no renewal is believed
        assert found.chain[0] == site.authority.generations[0 if "nrenewals" in switches and switches["nrenewals"] == 0 else -1].der
        assert "answer" not in switches
    if isinstance(found, ca.Unknown):
        assert not found.doubtful
    if set(switches) <= {"certcarc", "content_type", "chunked"} or switches.get("content_length") == "missing":
        assert isinstance(found, ca.Authority)


# -- pages that no CA wrote

TAGS = re.compile(rb"<[^>]*>")
PIECES = [
    b"certnew.cer?ReqID=7&", b"<P ID=locInfoReqID> 7 </P>", b"<P ID=locDenied> no </P>", b"</HTML>", b"0x80094012", b"7", b"\x00", b"\xff",
    b"<!--", b"-->", b"<LocID ID=locDispSpacer>", b"<script>", b"ReqID=", b"&#56;", "٨".encode(), b"\t\t3<LocID ID=locDispSpacer>",
]  # fmt: skip
KINDS = ("issued", "pending", "denied", "denied-echo", "denied-no-id", "failed", "poll-pending", "poll-denied", "poll-revoked", "stopped")


def page_of(site, kind, language, mozilla):
    """Return one of the CA's own pages, about a row that stays in the table."""
    site.switches.reset()
    site.switches.update({**OUTCOMES.get(kind, {}), "language": language})
    pages = Pages(site.authority, site.switches)
    if kind == "stopped":
        return pages.stopped().encode()
    state = kind.partition("-")[2] if kind.startswith("poll") else ""
    if state:
        site.switches.mode = {"pending": "pending", "denied": "deny", "revoked": "issue"}[state]
    row = site.authority.submit(CSR, "SCXAgent", site.lab.user, {})
    if state == "revoked":
        site.authority.revoke(row.id)
    return (pages.no_certificate(row) if state else pages.outcome(row, mozilla=mozilla)).encode()


def mutate(draw, page, other):
    for _ in range(draw(st.integers(1, 4))):
        size = max(1, len(page))
        at, to = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        how = draw(st.sampled_from(("flip", "cut", "drop", "repeat", "splice", "insert", "shuffle", "digit", "swap")))
        if how == "flip":
            page = page[:at] + bytes([draw(st.integers(0, 255))]) + page[at + 1 :]
        elif how == "cut":
            page = page[:to]
        elif how == "drop":
            page = page[:at] + page[min(to, at + 200) :]
        elif how == "repeat":
            page = page[:to] + page[at:]
        elif how == "splice":
            page = page[:at] + other[draw(st.integers(0, len(other))) :]
        elif how == "insert":
            page = page[:at] + draw(st.sampled_from(PIECES)) + page[at:]
        elif how == "shuffle":
            tags = TAGS.findall(page)
            draw(st.randoms(use_true_random=False)).shuffle(tags)
            shuffled = iter(tags)
            page = TAGS.sub(lambda _, shuffled=shuffled: next(shuffled), page)
        elif how == "digit":
            digits = [match.start() for match in re.finditer(rb"[0-9]", page)] or [0]
            place = draw(st.sampled_from(digits))
            page = page[:place] + draw(st.sampled_from([b"", b"0", b"9", b" ", b"&", b"77"])) + page[place + 1 :]
        else:
            page = page[to:] + page[:at]
    return page


@st.composite
def forged(draw):
    """Two kinds of page in a language each, and what is done to them: the pages themselves are made when the site is at hand."""
    kinds = [draw(st.sampled_from(KINDS)) for _ in range(2)]
    languages = [draw(st.sampled_from(LANGUAGES)) for _ in range(2)]
    return kinds, languages, draw(st.booleans()), draw(st.data())


def tag_of(*names):
    """The pattern of the facts page (2.1) for a tag with exactly one of these IDs."""
    return re.compile(rb"(?i)<[a-z][^>]*\bID\s*=\s*[\"']?(?:" + "|".join(names).encode() + rb")(?=[\"'\s/>])[^>]*>")


PENDING_TAG, DENIED_TAG = tag_of("locInfoReqID"), tag_of("locDenied", "locInfoReqIDandReason")


def numbers_in(page):
    return {int(digits) for digits in re.findall(rb"[0-9]{1,18}", page)}


def forged_page(site, forgery):
    kinds, languages, mozilla, data = forgery
    one, other = (page_of(site, kind, language, mozilla) for kind, language in zip(kinds, languages))
    return mutate(data.draw, one, other)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(forged())
def test_a_damaged_page_after_a_submission_is_never_misread(site, forgery):
    """Bytes flipped, pages cut, doubled and mixed: a certificate only for the one ID of its links, other verdicts only with what stands there."""
    site.clean()
    site.authority._ids = itertools.count(83)  # the same page for the same example
    page = forged_page(site, forgery)
    for _ in range(2):  # certificates that a wrong ID would find
        site.authority.submit(CSR, "SCXAgent", site.lab.user, {})
    site.switches.reset()
    del site.lab.log[:]
    site.lab.twist = lambda method, body: page if method == "post" else body
    told = []
    start = time.monotonic()
    outcome = site.conversation().submit(CSR, told.append)
    assert time.monotonic() - start < 5
    assert site.lab.count_post == 1
    known = numbers_in(page)
    linked = {int(digits) for digits in re.findall(rb"(?i)certnew\.cer\?ReqID=([0-9]+)&", page)}
    assert set(told) <= known
    assert getattr(outcome, "request_id", None) in {None, *known}
    assert not isinstance(outcome, ca.Unavailable) or b"0x8" in page.lower()
    if isinstance(outcome, (ca.Certificate, ca.Unfetched)):
        assert linked == {outcome.request_id}
        assert told == [outcome.request_id]
        assert not DENIED_TAG.search(page) or b"</html>" not in page.lower()
    if isinstance(outcome, ca.Certificate):
        assert outcome.leaf == site.authority.rows[outcome.request_id].certificate
    if isinstance(outcome, ca.Pending):
        firsts = [re.search(rb"[0-9]+", page[tag.end() :]) for tag in PENDING_TAG.finditer(page)]
        assert outcome.request_id in {int(first.group()) for first in firsts if first}
        assert not DENIED_TAG.search(page)
        assert b"</html>" in page.lower()
        assert told == [outcome.request_id]
    if isinstance(outcome, ca.Denied):
        assert re.search(rb"(?i)loc(Denied|InfoReqIDandReason|DispSpacer)|0x8[0-9a-f]{7}", page)
        assert b"</html>" in page.lower()


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(forged())
def test_a_damaged_page_of_a_poll_is_never_misread(site, forgery):
    """A page is no certificate, and the ID that was asked for is the only one that anything is said about."""
    site.clean()
    site.authority._ids = itertools.count(83)  # the same page for the same example
    page = forged_page(site, forgery)
    asked = site.authority.submit(CSR, "SCXAgent", site.lab.user, {}).id
    site.authority.rows[asked].state, site.authority.rows[asked].certificate = "pending", None
    site.switches.reset()
    del site.lab.log[:]
    site.lab.twist = lambda method, body: page
    start = time.monotonic()
    outcome = site.conversation().fetch(asked)
    assert time.monotonic() - start < 5
    assert site.lab.count_post == 0
    assert not isinstance(outcome, (ca.Certificate, ca.Doubtful))
    assert getattr(outcome, "request_id", asked) in (None, asked)
    if isinstance(outcome, (ca.Pending, ca.Denied, ca.Revoked, ca.Gone)):
        assert b"</html>" in page.lower()
        # for the last one see test_without_the_unconfirmed_number_nothing_is_guessed
        assert re.search(rb"(?i)loc(DispSpacer|Denied|InfoReqID)|0x8[0-9a-f]{7}|0x0 \(WIN32: 0\)", page)
