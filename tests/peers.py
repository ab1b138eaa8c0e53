"""Whom the conversation with AD CS is tested against: the lab's CA on a host's tree, and peers that send any bytes."""

import contextlib
import os
import socket
import threading

from cryptography.hazmat.primitives.asymmetric import ec

from scx_enroll import ca, config, request, signin, web
from scx_enroll.rootfs import Root

from .lab.ca import LabCA

FQDN = "host1.example.com"
CSR = request.build_csr(request.RequestSpec(FQDN), ec.generate_private_key(ec.SECP256R1()))
LIMITS = ca.Limits(connect_s=5, silence_s=1, total_s=3)
BRIEF = web.Limits(connect_s=2, silence_s=0.5, total_s=1)
BODY = b'<HTML><A Href="certnew.cer?ReqID=83&amp;Enc=b64">b</A></HTML>'
PENDING = b"<HTML><P ID=locInfoReqID> 89 </P></HTML>"
MARKED = b"-----BEGIN CERTIFICATE REQUEST-----\nMARKER+CSR\n-----END CERTIFICATE REQUEST-----\n"


def clean(monkeypatch):
    """Nothing that requests would take from the environment of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
            monkeypatch.delenv(name)


class Site:
    """A lab CA, a tree with the configuration's files, and what `on_id` was told."""

    def __init__(self, tmp_path, **options):
        self.lab = LabCA(tmp_path / "lab", **options)
        self.switches, self.authority = self.lab.switches, self.lab.authority
        self.root = Root(str(tmp_path))
        (tmp_path / "password").write_text(self.lab.password + "\n")
        (tmp_path / "password").chmod(0o600)
        self.ids = []

    def conversation(self, **changes):
        settings = dict(
            server=self.lab.server, template="SCXAgent", auth="basic", user=self.lab.user, password_file="/password",
            server_trust="/lab/server-trust.pem",
        )  # fmt: skip
        self.ca = config.CA(**{**settings, **changes})
        return ca.connect(self.root, self.ca, signin.authentication(self.root, self.ca), LIMITS)

    def submit(self, **changes):
        return self.conversation(**changes).submit(CSR, self.ids.append)

    def fetch(self, request_id):
        return self.conversation().fetch(request_id)


def page(body=BODY, *headers):
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body])


class Peer:
    """Listens; runs `script(connection)` for each connection, with TLS unless it is a proxy; keeps what was received."""

    def __init__(self, script, context=None):
        self.script, self.context = script, context
        self.received = []
        self.over = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection):
        with contextlib.suppress(OSError):
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection:
                self.script(self, connection)

    def request(self, connection):
        """Read one request, the body too."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.some(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line.split(b":")[1]):
                    body += self.some(connection)
        self.received.append(head + b"\r\n\r\n" + body)
        return self.received[-1]

    def some(self, connection):
        """A client that hangs up ends the script."""
        data = connection.recv(65536)
        if not data:
            raise ConnectionResetError
        return data

    def trickle(self, connection, data):
        """Send byte by byte, fast enough for every read time-out, until the test is over."""
        for byte in data:
            connection.sendall(bytes([byte]))
            if self.over.wait(0.1):
                return

    def close(self):
        """Nobody accepts any more: close(2) alone leaves the thread in accept(2), and the port open for somebody else's client."""
        self.over.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.socket.close()


class Net:
    """Makes peers with a certificate that is trusted, and conversations with them."""

    def __init__(self, lab, folder):
        self.lab, self.folder, self.peers = lab, folder, []

    def server(self, script):
        self.peers.append(Peer(script, self.lab.context()))
        return self.peers[-1]

    def proxy(self, script):
        self.peers.append(Peer(script))
        return self.peers[-1]

    def conversation(self, peer, proxy=None, limits=BRIEF):
        settings_ = config.CA(
            server=f"localhost:{peer if isinstance(peer, int) else peer.port}", template="T", auth="basic", user="u",
            server_trust="/server-trust.pem", proxy=f"http://127.0.0.1:{proxy.port}" if proxy else "",
        )  # fmt: skip
        return ca.connect(Root(str(self.folder)), settings_, signin.Basic(settings_.server, "u", b"marker-password"), limits)


def replies(data, *, linger=False):
    """A script: read a request, send bytes, hang up (or wait first)."""

    def script(peer, connection):
        peer.request(connection)
        connection.sendall(data)
        if linger:
            peer.over.wait(10)

    return script


def submit(conversation):
    return conversation.submit(MARKED, lambda request_id: None)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


def tunnel(peer, connection):
    """A proxy that lets everything through."""
    target = peer.request(connection).split()[1].decode()
    host, port = target.split(":")
    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    with socket.create_connection((host, int(port))) as onward:

        def pump(source, sink):
            with contextlib.suppress(OSError):
                while True:
                    data = source.recv(65536)
                    if not data:
                        break
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=pump, args=(onward, connection), daemon=True)
        back.start()
        pump(connection, onward)
        back.join(5)
