"""What a page of AD CS means, in any language and shape; nothing is concluded from what is not recognised."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import pages
from scx_enroll.pages import Denied, Failed, Issued, Pending, Revoked, Unknown

MIB = 1 << 20

# What servers say around the parts that count: request ID and code are filled in.
LANGUAGES = {
    "en": ("Your Request Id is {id}.", 'Your Request Id is {id}. The disposition message is "Denied by Policy Module  {code}, text\r\n".'),
    "de": ("Anforderungs-ID: {id}.", "Anforderungs-ID: {id}. Die Meldung lautet „{code}, Text“."),
    "zh": ("你的申请 ID 为{id}。", "申请 ID {id}：“{code}，文本”"),
    "ja": ("要求 ID は {id} です。", "要求 ID は {id} です。ディスポジション メッセージ: {code}"),
    "ar": ("معرف الطلب هو {id}.", "معرف الطلب هو {id}. الرسالة {code}"),
    "tr": ("İstek kimliğiniz {id}'dur.", "İstek kimliğiniz {id}'dur. {code}"),
    "hu": ("A kérelem azonosítója ID-{id}.", "A kérelem azonosítója ID-{id}. {code}"),
}
SHAPES = {
    "asp": str,
    "lower": lambda page: page.replace("<P ID=", "<p id=").replace("</P>", "</p>").replace("<HTML>", "<html>").replace("</HTML>", "</html >"),
    "quoted": lambda page: page.replace("ID=locInfoReqID>", 'ID="locInfoReqID">').replace("ID=locDenied>", "ID='locDenied'>"),
    "spaced": lambda page: page.replace("<P ID=loc", '<P  Class="a b"\r\n\tID = loc'),
    "unclosed": lambda page: page.replace("</P>", ""),
    "nested": lambda page: page.replace("> ", "> <FONT SIZE=2><B>", 1),
    "divs": lambda page: page.replace("<P ", "<DIV ").replace("</P>", "</DIV>"),
    "bom": lambda page: "\ufeff" + page,
}
every_language = pytest.mark.parametrize("texts", LANGUAGES.values(), ids=list(LANGUAGES))
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def html(*lines):
    return "\r\n".join(["<HTML><Head><Meta HTTP-Equiv=Content-Type></Head><Body BgColor=#FFFFFF>", *lines, "</Body></HTML>"])


def read(page):
    return pages.classify(page.encode())


def pending(text="Your Request Id is 89."):
    return html("<P ID=locInfoNewReq> text 10 </P>", f"<P ID=locInfoReqID> {text}", "</P> <P ID=locTimeoutWarning> within 10 days </P>")


def denied(text, first="<P ID=locDenied> text 3 </P>"):
    return html(first, f"<P ID=locInfoReqIDandReason> {text}", "</P> <P ID=locContactAdmin> call 4711 </P>")


ISSUED_LINKS = html(
    "<P ID=locInfo> text</P>",
    '<A Href="certnew.cer?ReqID=83&amp;Enc=bin">d</A> <A Href="certnew.cer?ReqID=83&amp;Enc=b64">b</A>',
    '<A Href="certnew.p7b?ReqID=83&amp;Enc=b64">c</A> <A Href="certnew.cer?ReqID=CACert&amp;Renewal=0&amp;Enc=b64">i</A>',
)
ISSUED_SCRIPT = html('<Script><!-- \r\nfunction dl(){ if (a<b) location="certnew.cer?ReqID=83&"+getEncoding(); } //--></Script>')


@pytest.mark.parametrize("page", [ISSUED_LINKS, ISSUED_SCRIPT, ISSUED_LINKS.replace("certnew.cer", "CertNew.CER")], ids=["links", "script", "case"])
def test_issued_in_either_shape_gives_its_request_id(page):
    """Browsers get the ID in a script and others in links; the link to the CA's own certificate is no ID."""
    assert read(page) == Issued(83)


@every_language
@every_shape
def test_pending_in_any_language_and_shape_keeps_its_request_id(texts, shape):
    """Losing the ID of a pending request means a second request; only element IDs and numbers say it, never words."""
    assert read(shape(pending(texts[0].format(id=89)))) == Pending(89)


@every_language
@every_shape
def test_denied_in_any_language_and_shape_gives_id_and_code(texts, shape):
    """The code decides whether trying again can help; it must not depend on the server's language."""
    assert read(shape(denied(texts[1].format(id=85, code="0x80094012")))) == Denied(85, 0x80094012)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (denied("Your Request Id is 85."), Denied(85, None)),
        (denied('The message is "0x80094800, text."'), Denied(None, 0x80094800)),
        (denied("The message is 0x80094014 (-2146877420)"), Denied(None, 0x80094014)),
        (denied("0X8009400F (-2146877425)"), Denied(None, 0x8009400F)),
        (html("<P ID=locDenied> text 12 </P>"), Denied(None, None)),
        (denied("Your Request Id is 85.", first=""), Denied(85, None)),
        (denied("&#35831;&#27714; 85 &quot;0x80094012&quot;"), Denied(85, 0x80094012)),
        (denied("Your Request Id is 12345678901. 0x80094012"), Denied(None, 0x80094012)),
        (denied("Your Request Id is 85. 0x800940120"), Denied(85, None)),
    ],
    ids=["no-code", "no-id", "decimal", "case", "bare", "no-locDenied", "entities", "id-too-long", "code-too-long"],
)
def test_a_denial_that_says_less(page, expected):
    """Old servers leave out ID or code; an HRESULT or an entity must not be mistaken for the ID."""
    assert read(page) == expected


@pytest.mark.parametrize("echo", ["certnew.cer?ReqID=7&", '<A Href="certnew.cer?ReqID=7&amp;Enc=b64">', "<P ID=locInfoReqID> 7 </P>"])
def test_a_denial_that_echoes_an_issued_link_is_a_denial(echo):
    """The message repeats the requester's text: nobody may get another's certificate fetched with it."""
    assert read(denied(f'Your Request Id is 85. "Denied 0x80094800, {echo}"')) == Denied(85, 0x80094800)


def test_an_id_that_only_begins_like_the_one_of_pending():
    """locInfoReqIDandReason is a denial and locInfoReqIDx is nothing, although both begin with locInfoReqID."""
    assert read(html("<P ID=locInfoReqIDandReason> 85 </P>")) == Denied(85, None)
    assert isinstance(read(html("<P ID=locInfoReqIDx> 85 </P>")), Unknown)
    assert isinstance(read(html("<P data-ID=locInfoReqID title='ID=locInfoReqID'> 85 </P>")), Unknown)


@pytest.mark.parametrize(
    "page",
    [
        ISSUED_LINKS.replace("ReqID=83&amp;Enc=b64\">b", "ReqID=84&amp;Enc=b64\">b"),
        html('<A Href="certnew.cer?ReqID=99999999999&amp;">'),
        html('<A Href="certnew.cer?ReqID=0&amp;">'),
        html('<A Href="certnew.cer?ReqID=٨٣&amp;">'),
        html("<P ID=locInfoReqID> 89 </P> <P ID=locInfoReqID> 90 </P>"),
        html("<P ID=locInfoReqIDandReason> 89 </P> <P ID=locInfoReqIDandReason> 90 </P>"),
    ],
    ids=["two-links", "huge", "zero", "not-ascii", "two-pending", "two-denied"],
)
def test_request_ids_that_disagree_or_make_no_sense_conclude_nothing(page):
    """The ID is what is fetched and installed later: a wrong one is worse than none."""
    assert isinstance(read(page), Unknown)


@pytest.mark.parametrize("text", ["text", "12345678901", "1.089", "1,089.", "1\u00a0089", "1\u2019089", "٨٩", "-89", "0x89"])
def test_a_pending_request_whose_id_is_illegible_is_pending_all_the_same(text):
    """The CA took it: whoever sends it again gets two certificates. A wrong ID would be somebody else's."""
    assert read(pending(text)) == Pending(None)


@pytest.mark.parametrize("page", [pending(), denied("Your Request Id is 89. 0x80094012")], ids=["pending", "denied"])
def test_a_page_cut_off_anywhere_never_shows_part_of_an_id(page):
    """A cut turns request ID 89 into 8; without its end a page concludes nothing."""
    assert {type(read(page[:length])) for length in range(page.index("</HTML>") + len("</HTML"))} == {Unknown}


def test_an_issued_page_cut_off_gives_the_whole_id_or_none():
    """An ID that is followed by & is complete, so the certificate can still be fetched."""
    whole = ISSUED_LINKS.index("ReqID=83&") + len("ReqID=83&")
    for length in range(len(ISSUED_LINKS)):
        outcome = read(ISSUED_LINKS[:length])
        assert outcome == Issued(83) if length >= whole else isinstance(outcome, Unknown)


def poll(disposition, last_status="text 0x0 (WIN32: 0)"):
    return html(
        f"{disposition}<LocID ID=locDispSpacer> - </LocID>" if disposition else "",
        "<B>Statut :</B>\t\tTaken Under Submission<BR>",
        f"<B>Letzter Status:</B>\t\t{last_status}",
    )


@pytest.mark.parametrize(
    ("disposition", "last_status", "expected"),
    [
        ("Disposition:\t\t5", "text 0x0 (WIN32: 0)", Pending(None)),
        ("Statut :</B> 5 ", "texte 0x0 (WIN32: 0)", Pending(None)),
        ("2", "text 0x80094012 (-2146877422)", Denied(None, 0x80094012)),
        ("2", "text 0x0 (WIN32: 0)", Denied(None, None)),
        ("3", "text 0x0 (WIN32: 0)", Issued(None)),
        ("6", "text 0x0 (WIN32: 0)", Revoked()),
        ("1", "text 0x80094800", Failed(0x80094800, own=True)),
        ("1", "text", Failed(None, own=True)),
        ("-2146877436", "text", Failed(0x80094004, own=True)),
        ("-2146877420", "text", Denied(None, 0x80094014)),
        ("15", "text 0x80094004", Failed(0x80094004, own=True)),
        ("", "text 0x80094004 (-2146877436)", Failed(0x80094004)),
        ("", "text 0x80094014 (-2146877420)", Denied(None, 0x80094014)),
        ("", "text 0x800706ba (WIN32: 1722)", Failed(0x800706BA)),
    ],
)
def test_a_poll_without_a_certificate(disposition, last_status, expected):
    """Labels are localised; the number before locDispSpacer and the codes are not."""
    assert read(poll(disposition, last_status)) == expected


def test_a_poll_that_tells_neither_disposition_nor_error_concludes_nothing():
    """Pending, revoked and denied without a code look alike where only labels differ: a wrong guess would end or prolong the wait."""
    outcome = read(poll("", "texte 0x0 (WIN32: 0)"))
    assert isinstance(outcome, Unknown)
    assert "no disposition" in outcome.why


def test_a_poll_of_a_foreign_certificate_concludes_nothing():
    """Disposition 0 is a certificate that this CA did not issue: it can't be ours."""
    assert isinstance(read(poll("0")), Unknown)


def test_a_code_in_a_script_is_no_outcome():
    """Pages carry scripts with error constants of their own; only the text is the CA's word."""
    assert isinstance(read(html("<Script> if (e == 0x80094800) retry(); </Script> text")), Unknown)


def test_an_error_page_with_two_errors_concludes_nothing():
    """"Not reached" and "broke off midway" differ in whether a request was stored: the first one named must not win."""
    outcome = read(html("The RPC server is unavailable. 0x800706ba", "The remote procedure call failed. 0x800706BE"))
    assert isinstance(outcome, Unknown)
    assert "more than one error" in outcome.why
    assert read(html("0x800706ba (WIN32: 1722)", "0x800706BA")) == Failed(0x800706BA), "the same one twice is one"


def test_what_stands_in_a_comment_is_no_outcome():
    """Web pages carry old markup in comments; only what a person sees is the CA's word. A link in a script's comment is one, though."""
    hidden = "<!-- <P ID=locDenied> text </P> <P ID=locInfoReqIDandReason> 85 0x80094012 </P> -->"
    assert read(pending().replace("<P ID=locInfoNewReq>", hidden + "<P ID=locInfoNewReq>")) == Pending(89)
    assert isinstance(read(html("<!-- <P ID=locInfoReqID> 89 </P>")), Unknown), "one that never ends"
    assert read(html('<Script><!-- location="certnew.cer?ReqID=83&"; //--></Script>')) == Issued(83)


@pytest.mark.parametrize("secret", ["<jane.doe@corp.example>", "<CORP\\svc-enroll>", "<td id=jane.doe@corp>", "<td id='lin01'>", "<td id=loclin01.corp>", "<td id=locLin>"])
def test_a_skeleton_shows_nothing_that_stands_in_brackets(secret):
    """Whatever a message puts between < and > may be somebody's name: only HTML's own tags and AD CS's own IDs are shown."""
    shown = pages.skeleton(f"<html><p ID=locInfo>{secret}</p></html>")
    assert not re.search("jane|doe|corp|svc|lin", shown)
    assert shown.startswith("<html><p ID=locInfo>")


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("", "empty"),
        (" \r\n", "empty"),
        ("<HTML>Your Req", "cut off"),
        (html("<form action=/login><input name=p TYPE=Password></form>"), "sign-in form"),
        (html("<title>403 - Forbidden</title> <h1>Server Error</h1> <h2>403 - Verboten</h2>"), "nothing"),
        (html("Your certificate request was denied. Certificate Pending. Your Request Id is 89."), "nothing"),
    ],
)
def test_what_is_not_from_ad_cs_concludes_nothing(page, why):
    """A login page, an empty body, a proxy's page: never "denied", and English words alone say nothing."""
    outcome = read(page)
    assert isinstance(outcome, Unknown)
    assert why in outcome.why


def test_a_skeleton_shows_no_word_of_the_page():
    """Skeletons go into bug reports of organisations that name hosts, accounts and templates in these pages."""
    page = html(
        '<TD ID=locFoo42 Name=secret7 Href="https://secret.example/"> secret & <!-- secret --> 4711 </TD>',
        "<Script> secret(); </Script><Input Type=password Value='secret'>",
    )
    assert read(page).skeleton == (
        "<html><head><meta></head><body><td ID=#></td><script></script><input></body></html>"
    )


def test_a_skeleton_of_a_huge_page_is_small():
    """It is stored in the state directory, newest five."""
    assert len(pages.skeleton("<td id=x>" * MIB)) <= pages.MAX_SKELETON_CHARS
    assert len(pages.skeleton(f"<{'a' * MIB} id={'b' * MIB}>")) < 100


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<Script>\r\nvar nRenewals=3;\r\n</Script>", 3),
        ("var nRenewals = 0 ;", 0),
        ("text", None),
        ("var nRenewals=;", None),
        ("var nRenewals=1; var nRenewals=2;", None),
        ("var nRenewals=99999;", None),
    ],
)
def test_the_count_of_renewals(page, expected):
    """Without one the newest CA certificate is asked for in another way; certsrv dies with AttributeError."""
    assert pages.renewals(page.encode()) == expected


SLOW = [
    b"<", b"<a", b"<a ", b"<a<", b"<P ID=", b"<P ID=locDenied>", b"<P ID=locInfoReqID>", b"<P ID=locInfoReqIDandReason>1", b"<b ID=locDenied>",
    b'<a b="', b"<a b='\"", b"a=", b"a =", b"certnew.cer?ReqID=", b"certnew.cer?ReqID=1", b"1", b"-", b"0x", b"0x8", b"&#1", b"&", b"</html",
    b"</html ", b" ", b"nRenewals", b"nRenewals=1", b"<script>", b"</script>", b"\0", b"\xff", b"1<LocID ID=locDispSpacer>", "é".encode(),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [b"", b"<P ID=locInfoReqIDandReason>", b"<a "], ids=["bare", "denied", "tag"])
@pytest.mark.parametrize("piece", SLOW, ids=[piece.decode("latin-1") for piece in SLOW])
def test_a_hostile_page_costs_linear_time(piece, prefix):
    """A page may be 1 MiB: a pattern that backtracks would hold the run, as root, for hours."""
    body = prefix + piece * (MIB // 4 // len(piece))
    started = time.process_time()
    pages.classify(body)
    pages.classify(body + b"</html>")
    pages.renewals(body)
    assert time.process_time() - started < 10  # a fraction of a second; what is quadratic takes minutes


FRAGMENTS = st.sampled_from(
    [*SLOW, b"locDenied", b"locInfoReqID", b"ID=", b">", b"</P>", b"</HTML>", b"89", b"0x80094012", b"&amp;", b"\r\n", ISSUED_LINKS.encode(),
     pending().encode(), denied("85 0x80094012").encode(), poll("5").encode()]
)  # fmt: skip


@given(st.one_of(st.binary(), st.lists(FRAGMENTS | st.binary(max_size=4), max_size=40).map(b"".join)))
def test_any_bytes_give_an_outcome(body):
    """Whatever a server sends, there is an outcome with sound values, and no exception."""
    outcome = pages.classify(body)
    assert isinstance(outcome, (Issued, Pending, Denied, Revoked, Failed, Unknown))
    request_id = getattr(outcome, "request_id", None)
    assert request_id is None or (isinstance(request_id, int) and 0 < request_id < 10**10)
    hresult = getattr(outcome, "hresult", None)
    assert hresult is None or 0x80000000 <= hresult <= 0xFFFFFFFF
    assert pages.renewals(body) is None or b"nRenewals" in body


@given(st.sampled_from([pending(), denied("Your Request Id is 89. 0x80094012"), ISSUED_LINKS, poll("5")]), st.data())
def test_one_damaged_byte_never_makes_another_outcome_of_a_denial_or_a_pending_request(page, data):
    """A flipped byte may lose the outcome; it must not turn a refusal into an issued certificate or the reverse."""
    body = bytearray(page.encode())
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    before, after = pages.classify(page.encode()), pages.classify(bytes(body))
    assert type(after) in (type(before), Unknown, Failed)
