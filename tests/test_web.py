"""One HTTPS exchange with a server or proxy that does what none should: each fault from raw bytes."""

import socket
import ssl
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scx_enroll import ca, pages, web

from .lab.ca import LabCA
from .peers import BODY, BRIEF, MARKED, PENDING, Net, clean, closed_port, page, replies, submit, tunnel


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return LabCA(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def net(lab, monkeypatch):
    clean(monkeypatch)
    net = Net(lab, lab.directory)
    yield net
    for peer in net.peers:
        peer.close()


def test_the_request_as_it_goes_out(net):
    """certnew.cer judges a browser by its name; + must be escaped; nothing is asked to be compressed; one Authorization."""
    server = net.server(replies(page(PENDING)))
    assert submit(net.conversation(server)) == ca.Pending(89)
    (sent,) = server.received
    head, _, body = sent.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /certsrv/certfnsh.asp HTTP/1.1"
    assert [line for line in lines if line.lower().startswith(b"accept-encoding")] == [b"Accept-Encoding: identity"]
    assert [line for line in lines if line.lower().startswith(b"user-agent: mozilla")]
    assert [line for line in lines if line.lower().startswith(b"authorization")] == [b"Authorization: Basic dTptYXJrZXItcGFzc3dvcmQ="]
    assert b"MARKER%2BCSR" in body
    assert b"CertAttrib=CertificateTemplate%3AT%0D%0A&" in body


# -- bodies


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (page(PENDING), ca.Pending),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PENDING), PENDING), ca.Pending),
        (b"HTTP/1.0 200 OK\r\n\r\n" + PENDING, ca.Pending),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + page(PENDING), ca.Pending),
        (page(PENDING).replace(b"Length: 4", b"Length: 94"), ca.Pending),  # cut, but the page's own end is there
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + PENDING[:20], ca.Doubtful),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + PENDING[:20], ca.Doubtful),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PENDING[:20], ca.Unknown),
        (page(PENDING, b"Content-Encoding: gzip"), ca.Doubtful),
        (page(PENDING, b"Content-Encoding: identity"), ca.Pending),
        (page(b"x" * (web.LIMITS.body_bytes + 1)), ca.Doubtful),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (web.LIMITS.body_bytes + 1), ca.Doubtful),
        (page(b""), ca.Unknown),
        (b"", ca.Doubtful),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ca.Doubtful),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", ca.Doubtful),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", ca.Doubtful),
        (b"HTTP/1.1 204 No Content\r\n\r\n", ca.Doubtful),
    ],
    ids=["length", "chunked", "http-1.0", "continue", "cut-after-the-end", "cut-chunked", "cut-length", "cut-http-1.0", "gzip", "identity",
         "huge", "huge-http-1.0", "empty", "nothing", "not-http", "headers", "long-header", "204"],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_never_taken_for_one(net, data, outcome):
    """urllib3 1.26 returns a cut body as if it were whole; nothing is unpacked; the cap holds with and without a length."""
    server = net.server(replies(data))
    assert type(submit(net.conversation(server))) is outcome
    assert len(server.received) == 1
    asked = net.conversation(server).fetch(7)
    assert isinstance(asked, (ca.Unavailable, ca.Unknown))
    assert not getattr(asked, "doubtful", False)


def test_an_issued_page_cut_off_by_the_network_keeps_its_id(net):
    """The certificate exists, and its ID arrived: it is fetched later instead of doubted."""
    cut = BODY.index(b"Enc=")

    def script(peer, connection):
        if peer.request(connection).startswith(b"POST"):
            connection.sendall(page()[: -len(BODY)] + BODY[:cut])
        else:
            connection.sendall(b"HTTP/1.1 500 x\r\n\r\n")

    outcome = submit(net.conversation(net.server(script)))
    assert isinstance(outcome, ca.Unfetched)
    assert outcome.request_id == 83


def test_a_link_in_capitals_is_one_for_certsrv_too(net):
    """certsrv's own pattern is narrower: it would raise a denial of its own after the ID was told."""
    server = net.server(replies(page(BODY.replace(b"certnew.cer", b"CertNew.CER"))))
    told = []
    outcome = net.conversation(server).submit(MARKED, told.append)
    assert isinstance(outcome, ca.Unfetched)
    assert (outcome.request_id, told) == (83, [83])


def test_a_page_about_another_request_concludes_nothing(net):
    """A cache in between, or a mix-up: request 7 is not what request 89 is."""
    assert isinstance(net.conversation(net.server(replies(page(PENDING)))).fetch(7), ca.Unknown)


def test_a_broken_header_is_not_logged(net, caplog):
    """urllib3 logs at WARNING what it can't parse: a server may send back what we sent, the password among it."""
    caplog.set_level("DEBUG")
    server = net.server(replies(page(PENDING, b"broken dTptYXJrZXItcGFzc3dvcmQ=", b"X: y")))
    assert isinstance(submit(net.conversation(server)), (ca.Pending, ca.Doubtful))
    assert "dTptYXJr" not in caplog.text


def test_a_redirect_with_an_endless_body(net):
    """requests reads the body of a redirect whole, even when told not to follow it."""

    def script(peer, connection):
        peer.request(connection)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://sso.example.com:444/login?user=secret\r\n\r\n")
        while not peer.over.is_set():
            connection.sendall(b"x" * 65536)

    started = time.monotonic()
    outcome = submit(net.conversation(net.server(script)))
    assert outcome.reason.endswith("to another host")
    assert time.monotonic() - started < 0.9


@pytest.mark.parametrize("location", [b"/login", b"//", b"https://[", b"\xff\xfe", b"https://evil host\x1b[2J/", b"https://" + b"a" * 999])
def test_a_redirect_to_an_address_that_makes_no_sense(net, location):
    """The message shows nothing of it."""
    data = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n" % location
    outcome = submit(net.conversation(net.server(replies(data))))
    assert outcome.reason.endswith(("to a page of its own", "to another host"))


@pytest.mark.parametrize(
    ("offered", "kind"),
    [
        (b"", "signin-password"),
        (b'WWW-Authenticate: Basic realm="x"\r\n', "signin-password"),
        (b'WWW-Authenticate: Negotiate\r\nWWW-Authenticate: NTLM\r\nWWW-Authenticate: basic realm="x"\r\n', "signin-password"),
        (b'WWW-Authenticate: Digest realm="no Basic, here"\r\n', "signin"),
        (b"WWW-Authenticate: NTLM\r\n", "signin"),
    ],
)
def test_a_401_blames_the_password_only_where_basic_was_offered(net, offered, kind):
    """A password that was refused is not tried again; one that nobody looked at may be."""
    data = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n" + offered + b"\r\n"
    server = net.server(replies(data))
    outcome = submit(net.conversation(server))
    assert isinstance(outcome, ca.Unavailable)
    assert outcome.kind == kind
    assert len(server.received) == 1


# -- time


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 999,
        page(b"x" * 999),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 99,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 99,
    ],
    ids=["headers", "body", "chunks", "continue"],
)
def test_a_byte_now_and_then_does_not_outlast_the_deadline(net, data):
    """Each byte resets a read time-out; without a deadline this takes days, with the lock held."""

    def script(peer, connection):
        peer.request(connection)
        peer.trickle(connection, data)

    for ask in (submit, lambda conversation: conversation.fetch(7), lambda conversation: conversation.authority()):
        server = net.server(script)
        started = time.monotonic()
        outcome = ask(net.conversation(server))
        assert BRIEF.total_s - 0.1 < time.monotonic() - started < BRIEF.total_s + 1
        assert "did not answer in time" in outcome.reason
        assert len(server.received) == 1


@pytest.mark.slow
def test_the_deadline_holds_outside_the_main_thread(net):
    """No signal is involved, so the conversation can run anywhere."""

    def script(peer, connection):
        peer.request(connection)
        peer.trickle(connection, page(b"x" * 999))

    outcomes = []
    conversation = net.conversation(net.server(script))
    thread = threading.Thread(target=lambda: outcomes.append(submit(conversation)))
    thread.start()
    thread.join(BRIEF.total_s + 2)
    assert isinstance(outcomes[0], ca.Doubtful)


@pytest.mark.slow
@pytest.mark.parametrize("hello", [b"", b"\x16\x03"], ids=["silent", "trickled"])
def test_a_server_that_never_finishes_its_handshake(net, hello):
    """A port that accepts and says nothing: nothing was sent, so nothing is stored."""

    def script(peer, connection):
        peer.trickle(connection, hello)
        peer.over.wait(10)

    outcome = submit(net.conversation(net.proxy(script)))
    assert isinstance(outcome, ca.Unavailable)
    assert outcome.kind == "network"


# -- surely not sent


@pytest.mark.parametrize("ask", [submit, lambda conversation: conversation.authority()], ids=["submit", "authority"])
def test_what_fails_before_the_request_is_surely_not_stored(net, monkeypatch, ask):
    """Refused, unresolvable, not TLS, hung up in the handshake: another CA, or another try, is safe."""
    cases = {
        "refused the connection": closed_port(),
        "failed in TLS": net.proxy(lambda peer, connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        "closed the connection": net.proxy(lambda peer, connection: None),
    }
    for words, peer in cases.items():
        outcome = ask(net.conversation(peer))
        assert isinstance(outcome, ca.Unavailable), words
        assert outcome.kind == "network"
        assert outcome.hint
    refused = ask(net.conversation(cases["refused the connection"]))
    assert refused.reason.endswith("refused the connection")

    def no_address(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    outcome = ask(net.conversation(443))
    assert (type(outcome), outcome.reason) == (ca.Unavailable, "localhost:443 has no address that can be found")


def test_a_server_that_speaks_no_tls_1_2(net):
    """Its alert (protocol_version, RFC 8446 section 6) comes before anything is sent."""
    peer = net.proxy(lambda peer, connection: connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46" + connection.recv(65536)[:0]))
    outcome = submit(net.conversation(peer))
    assert isinstance(outcome, ca.Unavailable)
    assert "TLS 1.2" in outcome.hint


def test_the_settings_of_tls_are_the_same_everywhere(net):
    """Python 3.13 and urllib3 2 have other defaults than their predecessors: nothing is left to them."""
    context = net.conversation(1).session.get_adapter("https://localhost/")._context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.hostname_checks_common_name
    assert context.verify_flags == ssl.VERIFY_X509_TRUSTED_FIRST
    assert len(context.get_ca_certs()) == 1


def test_plain_http_is_impossible(net):
    """There is no adapter for it, whatever a URL says."""
    assert list(net.conversation(1).session.adapters) == ["https://"]


# -- sent, and then


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_dropped_request_is_sent_once_and_doubtful(net, reset):
    """The server may have stored it; neither urllib3 nor requests may try again."""

    def script(peer, connection):
        peer.request(connection)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    server = net.server(script)
    outcome = submit(net.conversation(server))
    assert isinstance(outcome, ca.Doubtful)
    time.sleep(0.2)
    assert len(server.received) == 1


def test_a_broken_tls_record_in_the_answer_is_doubtful(net):
    """The same class of exception as a failed handshake, and another meaning."""

    def script(peer, connection):
        peer.request(connection)
        raw = socket.socket(fileno=socket.dup(connection.fileno()))
        raw.sendall(b"\x17\x03\x03\x00\x20" + b"\0" * 32)
        peer.over.wait(2)
        raw.close()

    assert isinstance(submit(net.conversation(net.server(script))), ca.Doubtful)


# -- proxies


@pytest.mark.parametrize("status", [b"407 Proxy Authentication Required", b"502 Bad Gateway", b"403 Forbidden"])
def test_a_proxy_that_refuses_is_named(net, status):
    """The operator must see that it was the proxy, and that nothing was stored."""
    proxy = net.proxy(replies(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status))
    outcome = submit(net.conversation(1, proxy))
    assert isinstance(outcome, ca.Unavailable)
    assert outcome.reason == f"the proxy http://127.0.0.1:{proxy.port} refused to connect to localhost:1: HTTP {status[:3].decode()}"


def test_a_proxy_that_is_down_is_named(net):
    """Not the server is to be looked at."""
    proxy = net.proxy(tunnel)
    proxy.close()
    proxy.port = closed_port()
    outcome = submit(net.conversation(1, proxy))
    assert isinstance(outcome, ca.Unavailable)
    assert outcome.reason == f"the proxy http://127.0.0.1:{proxy.port} refused the connection"


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_request_dropped_behind_a_proxy_is_doubtful(net, reset):
    """urllib3 1.26 calls this "Cannot connect to proxy"; believed, it would be sent again and issued twice."""

    def script(peer, connection):
        peer.request(connection)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    server = net.server(script)
    outcome = submit(net.conversation(server, net.proxy(tunnel)))
    assert isinstance(outcome, ca.Doubtful)
    assert server.port == int(outcome.reason.split()[0].split(":")[1])
    assert len(server.received) == 1


@pytest.mark.slow
def test_a_proxy_that_trickles_does_not_outlast_the_deadline(net):
    """There is no TLS yet when a proxy answers: the plain socket keeps the deadline as well."""

    def script(peer, connection):
        peer.request(connection)
        peer.trickle(connection, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 999)

    started = time.monotonic()
    outcome = submit(net.conversation(1, net.proxy(script)))
    assert isinstance(outcome, ca.Unavailable)
    assert time.monotonic() - started < BRIEF.total_s + 1


# -- anything


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(lambda head, body: b"HTTP/1.1 " + head + b"\r\n\r\n" + body, st.binary(max_size=80), st.binary(max_size=80)),
        st.builds(
            lambda name, value, body: b"HTTP/1.1 200 OK\r\n" + name + b": " + value + b"\r\n\r\n" + body,
            st.sampled_from([b"Date", b"Content-Length", b"Content-Encoding", b"Transfer-Encoding", b"Set-Cookie", b"Location", b"Connection"]),
            st.one_of(st.binary(max_size=40), st.text("0123456789", max_size=5000).map(str.encode), st.just(b"chunked"), st.just(b"-1")),
            st.one_of(st.binary(max_size=80), st.just(PENDING), st.just(BODY)),
        ),
    )
)
def test_any_answer_gives_an_outcome(net, data):
    """Whatever comes back, the outcome says whether it may have been stored; no exception, no second request."""
    server = net.server(replies(data))
    outcome = submit(net.conversation(server))
    assert isinstance(outcome, (ca.Pending, ca.Unfetched, ca.Doubtful, ca.Unavailable, ca.Unknown, ca.Denied))
    if isinstance(outcome, ca.Unknown):
        assert outcome.doubtful
        assert len(outcome.skeleton) <= pages.MAX_SKELETON_CHARS
    if isinstance(outcome, ca.Unavailable):
        assert outcome.kind != "network"
    assert sum(sent.startswith(b"POST") for sent in server.received) == 1
    server.close()
    assert isinstance(net.conversation(net.server(replies(data))).authority(), (ca.Unavailable, ca.Unknown))
