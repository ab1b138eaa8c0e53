"""The conversation with AD CS, against the lab's CA over real HTTPS: each outcome, and that a request is sent once.

What certsrv and the libraries beneath it do wrong stands in test_certsrv.
"""


import pytest

from scx_enroll import ca, pages, verify
from scx_enroll.errors import ConfigError, HostError

from .peers import CSR, FQDN, Site, clean

CONFIGURATION_WORDS = {"network", "server", "signin", "signin-password", "trust"}


@pytest.fixture
def site(tmp_path, monkeypatch):
    clean(monkeypatch)
    site = Site(tmp_path)
    with site.lab:
        yield site


def assert_actionable(outcome):
    assert isinstance(outcome, ca.Unavailable)
    assert outcome.kind in CONFIGURATION_WORDS
    assert outcome.hint
    assert not outcome.reason.endswith(".") or outcome.kind == "trust"  # OpenSSL's words


# -- issued


@pytest.mark.parametrize("language", ["en", "de", "fr", "zh"])
@pytest.mark.parametrize(
    "shape",
    [
        {"charset": True},
        {"sniff": False},
        {"sniff": False, "lower_case": True, "id_quote": '"'},
        {"cer_as": "bare"},
        {"cer_as": "der"},
        {"bag": "shuffled", "bag_extra": True},
    ],
    ids=str,
)
def test_issued_in_any_shape_brings_the_certificate(site, language, shape):
    """Content types, encodings and pages differ by server and language; certsrv alone takes one of them."""
    site.switches.update({"language": language, **shape})
    outcome = site.submit()
    assert isinstance(outcome, ca.Certificate)
    assert (site.ids, outcome.request_id) == ([1], 1)
    assert FQDN in verify.facts(outcome.leaf).names
    assert outcome.leaf not in outcome.bag
    assert verify.chain(outcome.leaf, outcome.bag)
    assert site.lab.count_post == 1


def test_the_request_carries_what_ad_cs_needs(site):
    """Exactly the template as attribute, the CSR unharmed, and a body that is not compressed on the way back."""
    site.submit()
    (post,) = [seen for seen in site.lab.log if seen.method == "POST"]
    assert post.status == 200
    assert site.authority.rows[1].template == "SCXAgent"


def test_the_id_is_told_before_the_certificate_is_asked_for(site):
    """The journal must hold the ID when the power fails in between."""
    told = []
    site.conversation().submit(CSR, lambda request_id: told.append((request_id, site.lab.count_get)))
    assert told == [(1, 0)]


def test_a_journal_that_can_not_be_written_stops_the_conversation(site):
    """Its error is the caller's, and nothing is fetched behind its back."""

    class Full(Exception):
        pass

    def full(_):
        raise Full

    with pytest.raises(Full):
        site.conversation().submit(CSR, full)
    assert site.lab.count_get == 0


@pytest.mark.parametrize("how", ["500", "html", "drop"])
def test_a_certificate_that_can_not_be_fetched_keeps_its_id(site, how):
    """Issued is issued: it is fetched later, never requested again."""
    site.switches.update({"cer_fails": 1, "cer_fails_as": how})
    outcome = site.submit()
    assert isinstance(outcome, ca.Unfetched)
    assert (outcome.request_id, site.ids) == (1, [1])
    assert outcome.reason
    assert outcome.hint
    assert isinstance(site.fetch(1), ca.Certificate)
    assert site.lab.count_post == 1


@pytest.mark.parametrize("bag", ["leaf", "empty"])
def test_a_bag_without_the_chain_does_not_cost_the_certificate(site, bag):
    """The chain can be had elsewhere; the certificate counts."""
    site.switches.bag = bag
    assert isinstance(site.submit(), ca.Certificate)


def test_certsrv_can_not_read_another_id_than_we_did(site, monkeypatch):
    """certsrv takes the first number that its own pattern finds, ours must be the only one: else a stranger's certificate comes."""
    monkeypatch.setattr(pages, "classify", lambda body: pages.Issued(41))
    outcome = site.conversation().submit(CSR, site.ids.append)
    assert site.ids == [41]
    assert outcome.request_id == 41


# -- pending and what becomes of it


def test_every_end_of_a_pending_request(site):
    """Approved, denied by a manager, deleted, revoked: each is told apart, with GETs alone."""
    site.switches.mode = "pending"
    for _ in range(4):
        site.submit()
    site.authority.approve(1)
    site.authority.deny(2)
    site.authority.delete(3)
    assert isinstance(site.fetch(1), ca.Certificate)
    denied = site.fetch(2)
    assert (denied.request_id, denied.hresult, denied.retry) == (2, 0x80094014, "final")
    assert site.fetch(3) == ca.Gone(3)
    assert site.fetch(4) == ca.Pending(4)
    assert site.lab.count_post == 4


# -- denied


@pytest.mark.parametrize("language", ["en", "de", "fr", "zh"])
@pytest.mark.parametrize("page", ["full", "no-code", "no-id", "bare", "echo"])
def test_denied_is_denied_whatever_its_page_leaves_out(site, page, language):
    """A denial has an ID, too, and repeats what the requester wrote; where only the code is missing, one GET tells it."""
    site.authority.rows.clear()
    site.switches.update({"mode": "deny", "deny_hresult": 0x80094012, "deny_page": page, "language": language})
    outcome = site.submit()
    assert isinstance(outcome, ca.Denied)
    assert outcome.request_id == (None if page in ("no-id", "bare") else 1)
    assert outcome.hresult == (None if page == "bare" else 0x80094012)
    assert outcome.retry == "configuration"
    assert outcome.hint
    assert site.ids == []
    assert site.lab.count_get == (1 if page == "no-code" else 0)


def test_a_refusal_about_the_template_names_it(site):
    """The operator sees which one, and what to set."""
    site.switches.update({"mode": "deny", "deny_hresult": 0x80094800})
    outcome = site.submit()
    assert outcome.reason == "the template is unknown to the CA or not published on it (0x80094800), template SCXAgent"
    assert "template=" in outcome.hint


def test_a_transient_denial_may_be_tried_again(site):
    """A CRL that was offline: nothing was issued."""
    site.switches.update({"mode": "deny", "deny_hresult": 0x80092013})
    assert site.submit().retry == "transient"


# -- the CA is not well


def test_a_stopped_ca_is_surely_not_stored(site):
    """The web server works and the CA behind it does not: 800706ba, in no ID and no known words."""
    site.switches.unavailable = "post"
    outcome = site.submit()
    assert_actionable(outcome)
    assert (outcome.kind, site.authority.issued, site.lab.count_post) == ("server", 0, 1)
    assert "0x800706ba" in outcome.reason


def test_a_ca_stopped_before_the_fetch_keeps_the_id(site):
    """Issued, then 800706ba: fetch again later."""
    site.switches.unavailable = "get"
    outcome = site.submit()
    assert isinstance(outcome, ca.Unfetched)
    assert isinstance(site.fetch(1), ca.Unavailable)
    assert isinstance(site.conversation().authority(), ca.Unavailable)


@pytest.mark.parametrize(
    ("status", "kind"),
    [("401", "signin"), ("403", "signin"), ("404", "server"), ("413", "server"), ("503", "server"), ("302", "server")],
)
def test_a_status_that_rules_a_stored_request_out(site, status, kind):
    """Nobody passed the request on: it may be sent again."""
    site.switches.update({"answer": status, "answer_on": "post"})
    outcome = site.submit()
    assert_actionable(outcome)
    assert outcome.kind == kind
    assert site.lab.server in outcome.reason
    assert f"HTTP {status}" in outcome.reason


@pytest.mark.parametrize("status", ["500", "502", "504"])
def test_a_status_that_leaves_it_open_is_doubtful(site, status):
    """ASP may have failed after the CA stored the request: another POST could issue a second certificate."""
    site.switches.update({"answer": status, "answer_on": "post", "answer_after": True})
    outcome = site.submit()
    assert isinstance(outcome, ca.Doubtful)
    assert f"HTTP {status}" in outcome.reason
    assert site.lab.count_post == site.authority.issued == 1


@pytest.mark.parametrize("lost", ["after", "truncated", "truncated-quiet"])
def test_an_answer_lost_after_the_request_was_stored_is_never_repeated(site, lost):
    """The certificate exists: a silent second POST would issue another."""
    site.switches.lost = lost
    outcome = site.submit()
    assert isinstance(outcome, (ca.Doubtful, ca.Unknown))
    assert isinstance(outcome, ca.Doubtful) or outcome.doubtful
    assert site.lab.count_post == site.authority.issued == 1


@pytest.mark.parametrize("kept", range(0, 4000, 250))
def test_a_truncated_page_shows_the_whole_id_or_none(site, kept):
    """A cut turns ID 1234567 into 123: the fetch would then install, or complain about, a stranger's certificate."""
    site.authority.rows.clear()
    site.switches.update({"lost": "truncated", "truncate_at": kept})
    outcome = site.submit()
    assert isinstance(outcome, (ca.Doubtful, ca.Unknown, ca.Certificate))
    assert site.ids in ([], [1])
    assert (site.ids == [1]) == isinstance(outcome, ca.Certificate)


@pytest.mark.slow
def test_a_silent_server_ends_at_the_time_out(site):
    """The request is stored and no byte comes back."""
    site.switches.update({"slow": 2.0, "slow_on": "post"})
    assert isinstance(site.submit(), ca.Doubtful)
    assert site.authority.posts == 1


def test_a_kept_connection_that_the_server_closed_does_not_make_a_request_doubtful(site):
    """authority() leaves a connection; the POST goes out on its own, so a server that closes idle ones is no trouble."""
    conversation = site.conversation()
    assert isinstance(conversation.authority(), ca.Authority)
    site.lab.stop()
    site.lab.start()
    assert isinstance(conversation.submit(CSR, site.ids.append), ca.Certificate)


# -- signing in


def test_a_wrong_password_is_told_apart_and_tried_once(site, tmp_path):
    """Accounts lock: one attempt, and a kind of its own so that it is never repeated by itself."""
    (tmp_path / "password").write_text("wrong")
    outcome = site.submit()
    assert_actionable(outcome)
    assert outcome.kind == "signin-password"
    assert site.lab.user in outcome.reason
    assert site.lab.bad_passwords == 1


def test_a_server_that_does_not_offer_basic(site):
    """Default IIS offers Negotiate and NTLM only: the password is not at fault, and the message must not say so."""
    site.switches.auth = "negotiate"
    outcome = site.conversation().authority()
    assert_actionable(outcome)
    assert outcome.kind == "signin"
    assert outcome.reason.endswith("does not offer to sign in by Basic, but by Negotiate and NTLM (HTTP 401)")


# -- trust


@pytest.mark.parametrize(
    ("https", "words"), [("unknown-ca", "server-trust"), ("wrong-name", "server="), ("expired", "clock")]
)
def test_a_server_that_is_not_trusted_gets_nothing(site, https, words):
    """Neither password nor request leave; the message names the cause and the setting."""
    site.switches.https = https
    for outcome in (site.conversation().authority(), site.submit()):
        assert_actionable(outcome)
        assert outcome.kind == "trust"
        assert words in outcome.hint
    assert site.lab.log == []


def test_certifi_is_no_source_of_trust(site, tmp_path, monkeypatch):
    """requests adds certifi's roots by default: server-trust alone counts."""
    import certifi
    import requests.adapters

    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(tmp_path / "lab" / "server-trust.pem"))
    monkeypatch.setattr(certifi, "where", lambda: str(tmp_path / "lab" / "server-trust.pem"))
    assert site.submit(server_trust="/lab/issuer-trust.pem").kind == "trust"
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", "/does/not/exist")
    assert isinstance(site.submit(), ca.Certificate)


@pytest.mark.parametrize("path", ca.BUNDLES)
def test_the_systems_bundle_is_read_beneath_the_root(site, tmp_path, path):
    """An image's tree has its own; distributions keep it in different places."""
    with pytest.raises(ConfigError, match="no bundle of roots"):
        site.conversation(server_trust="system")
    bundle = tmp_path / path.lstrip("/")
    bundle.parent.mkdir(parents=True)
    bundle.write_bytes("# Főtanúsítvány\n".encode() + (tmp_path / "lab" / "server-trust.pem").read_bytes())
    assert isinstance(site.submit(server_trust="system"), ca.Certificate)


@pytest.mark.parametrize("data", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nMIIB\n", b"0\x03\x02\x01\x01"])
def test_a_server_trust_without_certificates_is_a_mistake_in_the_configuration(site, tmp_path, data):
    """Never a TLS error later on, and never an empty store that trusts somebody else."""
    (tmp_path / "trust.pem").write_bytes(data)
    with pytest.raises(ConfigError, match=r"trust\.pem"):
        site.conversation(server_trust="/trust.pem")
    with pytest.raises(ConfigError, match=r"there is no /other\.pem"):
        site.conversation(server_trust="/other.pem")


def test_a_server_trust_that_others_can_write_is_not_used(site, tmp_path):
    """Whoever writes it decides which server gets the password."""
    (tmp_path / "lab" / "server-trust.pem").chmod(0o666)
    with pytest.raises(HostError) as failure:
        site.conversation()
    assert failure.value.hint.startswith("chmod go-w ")


# -- the authority itself


def test_the_newest_ca_certificate_comes_first_after_renewals(site):
    """Bags come in any order and hold old and cross certificates; `plan` judges the first one."""
    site.authority.renew()
    site.authority.renew(new_key=True)
    site.switches.update({"bag": "reversed", "bag_extra": True})
    found = site.conversation().authority()
    assert found.chain[0] == site.authority.chain()[0]
    assert set(found.chain) >= set(site.authority.chain())
    assert len(set(found.chain)) == len(found.chain)
    assert site.lab.count_post == 0


def test_the_clock_of_the_ca(site):
    """A clock that is off by more than five minutes breaks what comes later; it is told, not judged, here."""
    before = site.conversation().authority().date
    site.switches.date_offset = 7200
    assert 7190 < site.conversation().authority().date - before < 7230


def test_a_row_that_failed_is_told_by_its_disposition_whatever_its_code(site):
    """A code that nobody knows beside a disposition is the request's own; without one it may be the CA's trouble of the moment."""
    site.switches.update({"mode": "fail", "deny_hresult": 0x8000FFFF})
    site.submit()
    outcome = site.fetch(1)
    assert isinstance(outcome, ca.Denied)
    assert (outcome.request_id, outcome.hresult) == (1, 0x8000FFFF)
    assert "0x8000ffff" in outcome.reason
    site.switches.spacer = False
    assert isinstance(site.fetch(1), ca.Unavailable)
