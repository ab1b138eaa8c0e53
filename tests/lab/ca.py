"""AD CS's web enrollment pages over HTTPS, in front of an `Authority`; a class for tests, a program for the demo.

In a test:

    with LabCA(directory=tmp_path) as ca:
        ...  # server = ca.server, server-trust = ca.server_trust, issuer-trust = ca.issuer_trust, ca.user, ca.password
        ca.switches.mode = "pending"
        ca.authority.approve(1)
        assert ca.authority.posts == 1

From a shell: `python -m tests.lab.ca --directory DIR` serves until SIGTERM and writes DIR/ready.json once it listens;
`python -m tests.lab.ca --directory DIR --set mode=pending` and `--approve ID` steer it while it runs.

Pages have the shapes of the facts page on AD CS, sections 1 and 2: CRLF, unquoted attributes, mixed case, unclosed elements.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email.utils
import hmac
import html
import ipaddress
import json
import os
import random
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .authority import (
    DAY,
    MESSAGES,
    NO_SUCH_REQUEST,
    RPC_UNAVAILABLE,
    YEAR,
    Authority,
    Row,
    Switches,
    Template,
    make_ca,
    moment,
    pkcs7,
    to_der,
    to_pem,
)

if TYPE_CHECKING:
    from types import TracebackType

MAX_DRAINED_BYTES = 8 << 20  # of a form that is refused
MAX_FORM_BYTES = 200_000  # ASP's AspMaxRequestEntityAllowed, by default

TEXTS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "issued-title": "Certificate Issued",
        "issued": "The certificate you requested was issued to you.",
        "pending-title": "Certificate Pending",
        "pending": "Your certificate request has been received. However, you must wait for an administrator to issue the "
        "certificate you requested.",
        "id": "Your Request Id is {id}.",
        "timeout": "Please return to this web site in a day or two. Note: You must return with this web browser within 10 days "
        "to retrieve your certificate",
        "denied-title": "Certificate Request Denied",
        "denied": "Your certificate request was denied.",
        "reason": 'Your Request Id is {id}. The disposition message is "{message}".',
        "reason-no-id": 'The disposition message is "{message}".',
        "contact": "Contact your administrator for further information.",
        "error": "Error",
        "unexpected": "An unexpected error has occurred:",
        "not-started": "The Certification Authority Service has not been started.",
        "disposition": "Disposition:",
        "message": "Disposition message:",
        "status": "LastStatus:",
        "ok": "The operation completed successfully.",
    },
    "de": {
        "issued-title": "Zertifikat wurde ausgestellt",
        "issued": "Das angeforderte Zertifikat wurde ausgestellt.",
        "pending-title": "Zertifikat ausstehend",
        "pending": "Ihre Zertifikatanforderung wurde erhalten. Warten Sie, bis ein Administrator es ausstellt.",
        "id": "Anforderungs-ID: {id}.",
        "timeout": "Kehren Sie innerhalb von 10 Tagen mit diesem Browser zurück",
        "denied-title": "Zertifikatanforderung verweigert",
        "denied": "Ihre Zertifikatanforderung wurde verweigert.",
        "reason": "Anforderungs-ID: {id}. Die Meldung lautet „{message}“.",
        "reason-no-id": "Die Meldung lautet „{message}“.",
        "contact": "Wenden Sie sich an den Administrator, um weitere Informationen zu erhalten.",
        "error": "Fehler",
        "unexpected": "Unerwarteter Fehler:",
        "not-started": "Der Zertifizierungsstellendienst wurde nicht gestartet.",
        "disposition": "Disposition:",
        "message": "Dispositionsmeldung:",
        "status": "Letzter Status:",
        "ok": "Der Vorgang wurde erfolgreich beendet.",
    },
    "fr": {
        "issued-title": "Certificat émis",
        "issued": "Le certificat que vous avez demandé a été émis.",
        "pending-title": "Certificat en attente",
        "pending": "Votre demande de certificat a été reçue. Vous devez attendre qu'un administrateur émette le certificat.",
        "id": "Identificateur de la demande : {id}.",
        "timeout": "Revenez avec ce navigateur dans les 10 jours",
        "denied-title": "Demande de certificat refusée",
        "denied": "Votre demande de certificat a été refusée.",
        "reason": "Identificateur de la demande : {id}. Le message est « {message} ».",
        "reason-no-id": "Le message est « {message} ».",
        "contact": "Contactez votre administrateur.",
        "error": "Erreur",
        "unexpected": "Erreur inattendue :",
        "not-started": "Le service de l'autorité de certification n'a pas démarré.",
        "disposition": "Disposition :",
        "message": "Message de disposition :",
        "status": "Dernier état :",
        "ok": "L'opération a réussi.",
    },
    "zh": {
        "issued-title": "证书已颁发",
        "issued": "你申请的证书已颁发给你。",
        "pending-title": "证书挂起",
        "pending": "你的证书申请已经收到。但是，你必须等待管理员颁发你申请的证书。",
        "id": "你的申请 ID 为 {id}。",
        "timeout": "请在 10 天之内用此浏览器返回",
        "denied-title": "证书申请被拒绝",
        "denied": "申请被拒。",
        "reason": '申请 ID {id}："{message}"',
        "reason-no-id": '"{message}"',
        "contact": "有关详细信息，请与管理员联系。",
        "error": "错误",
        "unexpected": "发生意外错误:",
        "not-started": "证书颁发机构服务尚未启动。",
        "disposition": "处置:",
        "message": "处置消息:",
        "status": "上一状态:",
        "ok": "操作成功完成。",
    },
}

IIS = {
    401: ("Unauthorized", "Unauthorized: Access is denied due to invalid credentials."),
    403: ("Forbidden", "Forbidden: Access is denied."),
    404: ("Not Found", "File or directory not found."),
    413: ("Request Entity Too Large", "The page was not displayed because the request entity is too large."),
    500: ("Internal Server Error", "Internal server error."),
    502: ("Bad Gateway", "Web server received an invalid response while acting as a gateway or proxy server."),
    504: ("Gateway Timeout", "Gateway timeout."),
}
REDIRECTS = {301: "Moved Permanently", 302: "Found", 303: "See Other", 307: "Temporary Redirect", 308: "Permanent Redirect"}

# disposition numbers, MS-WCCE 3.2.1.4.2.1.3
DISPOSITIONS = {"failed": 0x80094800, "denied": 2, "issued": 3, "pending": 5, "revoked": 6}


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it, without secrets; `status` is 0 where the connection was dropped without an answer."""

    method: str
    path: str  # as sent, with the query
    authenticated: bool
    status: int
    agent: str
    scheme: str = ""  # the first word of Authorization


@dataclass
class _Reply:
    status: int
    body: bytes
    kind: str = "text/html"
    reason: str = ""
    headers: Tuple[Tuple[str, str], ...] = ()


class Pages:
    """Renders pages; `mozilla` tells whether the client calls itself a browser."""

    def __init__(self, authority: Authority, switches: Switches) -> None:
        """Take what the pages are about, and the switches that shape them."""
        self.authority = authority
        self.switches = switches

    def _text(self, name: str, **values: object) -> str:
        texts = TEXTS.get(self.switches.language, TEXTS["en"])
        return texts[name].format(**values)

    def _id(self, name: str) -> str:
        quote = self.switches.id_quote
        return f"ID={quote}{name}{quote}"

    def _page(self, title: str, *lines: str) -> bytes:
        head = [
            '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01 Transitional//EN">',
            "<HTML>",
            "<Head>",
            '\t<Meta HTTP-Equiv="Content-Type" Content="text/html; charset=UTF-8">',
            "\t<Title>Microsoft Active Directory Certificate Services</Title>",
            "</Head>",
            '<Body BgColor=#FFFFFF Link=#0000FF VLink=#0000FF ALink=#0000FF><Font ID=locPageFont Face="Arial">',
            "<Table Border=0 CellSpacing=0 CellPadding=4 Width=100% BgColor=#008080>",
            (
                '<TR><TD><Font Color=#FFFFFF><LocID ID=locMSCertSrv><Font Face="Arial" Size=-1><B><I>Microsoft</I></B> Active '
                f"Directory Certificate Services &nbsp;--&nbsp; {html.escape(self.authority.name)} 2016 &nbsp;</Font></LocID></Font>"
                '</TD><TD ID=locHomeAlign Align=Right><A Href="/certsrv"><Font Color=#FFFFFF><LocID ID=locHomeLink>Home</LocID>'
                "</Font></A></TD></TR>"
            ),
            "</Table>",
            "",
            f"<P {self._id('locPageTitle')}> <Font Color=#FF0000><B> {title} </B></Font>",
            "<!-- Green HR --><Table Border=0 CellSpacing=0 CellPadding=0 Width=100%><TR><TD BgColor=#008080></TD></TR></Table>",
            "",
        ]
        text = "\r\n".join([*head, *lines, "", "</Font>", "</Body>", "</HTML>", ""])
        if self.switches.lower_case:
            for tag in ("P", "LocID", "A", "B", "Font", "HTML"):
                text = text.replace(f"<{tag} ", f"<{tag.lower()} ").replace(f"</{tag}>", f"</{tag.lower()}>")
            text = text.replace("<HTML>", "<html>").replace(" ID=", " id=")
        return text.encode("utf-8")

    def issued(self, row: Row, *, mozilla: bool) -> bytes:
        """Return the page after a certificate was issued: numbered links, or for browsers a script holding the id."""
        number, renewal = row.id, self.authority.newest.index
        intro = f"<P {self._id('locInfo')}> {self._text('issued')}</P>"
        install = f"certnew.cer?ReqID=CACert&amp;Renewal={renewal}&amp;Mode=inst&amp;Enc=b64"
        if mozilla:
            return self._page(
                self._text("issued-title"),
                intro,
                '<Script Language="JavaScript">',
                '\tfunction getEncoding() { return document.UIForm.rbEncoding[0].checked ? "Enc=bin" : "Enc=b64"; }',
                f'\tfunction handleGetCert() {{ location="certnew.cer?ReqID={number}&"+getEncoding(); }}',
                f'\tfunction handleGetChain() {{ location="certnew.p7b?ReqID={number}&"+getEncoding(); }}',
                "</Script>",
                "<Form Name=UIForm>",
                "<Input Type=Radio Name=rbEncoding Checked><LocID ID=locDerEnc>DER</LocID>",
                "<Input Type=Radio Name=rbEncoding><LocID ID=locB64Enc>Base 64</LocID>",
                '<P><A Href="javascript:handleGetCert()" ID=locDownloadCert>Download certificate</A>',
                '<P><A Href="javascript:handleGetChain()" ID=locDownloadCertChain>Download certificate chain</A>',
                "</Form>",
            )
        return self._page(
            self._text("issued-title"),
            intro,
            f'<A Href="certnew.cer?ReqID={number}&amp;Enc=bin">DER</A> <A Href="certnew.cer?ReqID={number}&amp;Enc=b64">Base 64</A>',
            f'<P><A Href="certnew.p7b?ReqID={number}&amp;Enc=bin">DER</A>',
            f'<A Href="certnew.p7b?ReqID={number}&amp;Enc=b64">Base 64</A>',
            f'<P><A Href="{install}">CA</A>',
        )

    def pending(self, row: Row) -> bytes:
        """Return the page of a request that waits for a certificate manager."""
        return self._page(
            self._text("pending-title"),
            f"<P {self._id('locInfoNewReq')}> {self._text('pending')} </P>",
            f"<P {self._id('locInfoReqID')}>",
            self._text("id", id=row.id),
            "</P>",
            f"<P {self._id('locTimeoutWarning')}> {self._text('timeout')} </P>",
        )

    def denied(self, row: Row) -> bytes:
        """Return the denied page in the shape that `deny_page` asks for; the reason is not HTML-escaped."""
        kind = self.switches.deny_page
        code = f"0x{row.hresult:08x}, " if row.hresult and kind != "no-code" else ""
        message = row.message
        if kind == "echo":
            message = "certnew.cer?ReqID=7& " + message
        if not message.startswith("Denied by "):
            parsing = "Error Parsing Request  "
            if message.startswith(parsing):
                message = f"{parsing}{MESSAGES.get(row.hresult, '')} {code}".rstrip(", ")
            else:
                message = f"Denied by Policy Module  {code}{message}"
        lines = [f"<P {self._id('locDenied')}> {self._text('denied')} </P>"]
        if kind != "bare":
            name = "reason-no-id" if kind == "no-id" else "reason"
            lines += [
                f"<P {self._id('locInfoReqIDandReason')}>",
                self._text(name, id=row.id, message=message + "\r\n"),
                "</P>",
                f"<P {self._id('locContactAdmin')}> {self._text('contact')} </P>",
            ]
        return self._page(self._text("denied-title"), *lines)

    def no_certificate(self, row: Row) -> bytes:
        """Return what certnew.cer shows for a request without a certificate to hand out: disposition, message, last status."""
        disposition = DISPOSITIONS[row.state]
        label = "" if row.state == "failed" else row.message
        if row.state == "denied":
            label = f"Denied by LAB\\manager {hresult_text(row.hresult)}" if row.hresult else "Denied by LAB\\manager"
        status = f"{MESSAGES.get(row.hresult, self._text('ok'))} 0x{row.hresult:x} (WIN32: {row.hresult & 0xFFFF})"
        return self._page(
            self._text("error"),
            f"<P {self._id('locErrorMsg')}> {self._text('unexpected')}",
            "<P>",
            f"<B>{self._text('disposition')}</B>\t\t{disposition}<LocID ID=locDispSpacer> - </LocID>",
            f"<BR><B>{self._text('message')}</B>\t\t{label}",
            f"<BR><B>{self._text('status')}</B>\t\t{status}",
        )

    def failure(self, hresult: int, *more: str) -> bytes:
        """Return an error page that names an HRESULT and has none of the outcomes' element IDs."""
        return self._page(
            self._text("error"),
            self._text("unexpected"),
            *more,
            f"<P>{MESSAGES.get(hresult, '')} {hresult_text(hresult)}",
        )

    def stopped(self) -> bytes:
        """Return the page of a web role whose CertSvc does not run [the facts page marks it as reported only]."""
        return self._page(
            self._text("error"),
            self._text("unexpected"),
            self._text("not-started"),
            f"<P>{MESSAGES[RPC_UNAVAILABLE]} 0x{RPC_UNAVAILABLE:08x} (WIN32: 1722)",
        )

    def welcome(self) -> bytes:
        """Return the start page."""
        return self._page("Welcome", '<P><A Href="certrqus.asp">Request a certificate</A>', '<P><A Href="certckpn.asp">View</A>')

    def renewals(self) -> bytes:
        """Return certcarc.asp, which tells the index of the newest CA certificate in a script."""
        count = self.authority.newest.index
        lines = ['<Script Language="JavaScript">', f"\tvar nRenewals={count};", "</Script>"]
        if self.switches.certcarc == "missing":
            lines = []
        return self._page("Download a CA Certificate, Certificate Chain, or CRL", *lines)


def hresult_text(hresult: int) -> str:
    """Return an HRESULT as the pages show it: hexadecimal, then signed decimal in brackets."""
    return f"0x{hresult:08x} ({hresult - (1 << 32) if hresult >> 31 else hresult})"


def iis_page(status: int) -> bytes:
    """Return IIS's own small page for a status (facts 2.4): no element IDs."""
    if status == 503:
        return (
            b'<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN""http://www.w3.org/TR/html4/strict.dtd">\r\n'
            b"<HTML><HEAD><TITLE>Service Unavailable</TITLE>\r\n"
            b"<BODY><h2>Service Unavailable</h2>\r\n<hr><p>HTTP Error 503. The service is unavailable.</p>\r\n</BODY></HTML>\r\n"
        )
    reason, text = IIS.get(status, ("Error", "Error."))
    return (
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-strict.dtd">\r\n'
        '<html xmlns="http://www.w3.org/1999/xhtml">\r\n<head>\r\n'
        f'<title>{status} - {reason}</title>\r\n</head>\r\n<body>\r\n<div id="header"><h1>Server Error</h1></div>\r\n'
        f'<div id="content">\r\n <fieldset><h2>{status} - {text}</h2>\r\n'
        " <h3>You do not have permission to view this directory or page.</h3></fieldset>\r\n</div>\r\n</body>\r\n</html>\r\n"
    ).encode()


LOGIN_PAGE = (
    b"<!DOCTYPE html>\r\n<html><head><title>Sign in</title></head>\r\n<body><form action=/login method=post>"
    b"<input type=text name=user><input type=password name=password></form></body></html>\r\n"
)


class LabCA:
    """An `Authority` behind HTTPS on 127.0.0.1, in a thread of this process.

    `directory` gets server-trust.pem (the root of the HTTPS certificate, unrelated to the CA) and issuer-trust.pem (the CA's
    roots). `server` is "localhost:PORT". `authority.posts` counts the submissions that were let in, `count_post` all POSTs. Further
    keyword arguments go to `Authority`.
    """

    def __init__(
        self,
        directory: os.PathLike[str],
        *,
        port: int = 0,
        server_name: str = "ca.lab.test",
        user: str = "LAB\\svc-enroll",
        password: str = "",
        authority: Optional[Authority] = None,
        **options: Any,
    ) -> None:
        """Make keys, certificates and the trust files; nothing listens yet."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.user = user
        self.password = password or "lab-" + secrets.token_urlsafe(18)
        self.authority = authority or Authority(**options)
        self.switches = self.authority.switches
        self.pages = Pages(self.authority, self.switches)
        self.server_name = server_name
        self.bad_passwords = 0
        self.log: List[Seen] = []
        self.on_request: Optional[Callable[[], None]] = None
        self._lock = threading.RLock()
        self._port = port
        self._httpd: Optional[_Server] = None
        self._contexts = _web_contexts(self.directory, server_name)
        self.server_trust = str(self.directory / "server-trust.pem")
        self.issuer_trust = str(self.directory / "issuer-trust.pem")
        self.write_issuer_trust()

    def write_issuer_trust(self) -> None:
        """Write the CA's present roots to the issuer trust; again after `authority.renew_root()`, as an operator would."""
        Path(self.issuer_trust).write_bytes(to_pem(self.authority.roots))

    def __enter__(self) -> LabCA:
        """Listen."""
        self.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Stop listening."""
        self.stop()

    def start(self) -> None:
        """Bind and serve in a background thread; after `stop()`, on the same port again."""
        handler = type("Handler", (_Handler,), {"lab": self})
        self._httpd = _Server(("127.0.0.1", self._port), handler)
        self._port = int(self._httpd.server_address[1])
        threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every open connection: from here on connections are refused."""
        if self._httpd:
            self._httpd.shutdown()
            self._httpd.server_close()
            self._httpd.drop()
            self._httpd = None

    @property
    def port(self) -> int:
        """The port it listens on, or did last."""
        return self._port

    @property
    def server(self) -> str:
        """What to write after `server =`."""
        return f"localhost:{self._port}"

    @property
    def url(self) -> str:
        """The address of the pages."""
        return f"https://{self.server}/certsrv/"

    @property
    def count_get(self) -> int:
        """How many GETs arrived."""
        return self._count("GET")

    @property
    def count_post(self) -> int:
        """How many POSTs arrived, whether or not they were let in."""
        return self._count("POST")

    def _count(self, method: str) -> int:
        with self._lock:
            return sum(1 for seen in self.log if seen.method == method)

    # used by the handler, once for each connection or request

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for the next connection."""
        return self._contexts[self.switches.https if self.switches.https in self._contexts else ""]

    def record(self, seen: Seen) -> None:
        """Add to the log."""
        with self._lock:
            self.log.append(seen)

    def admit(self, header: str) -> Tuple[bool, int]:
        """Judge an Authorization header; returns whether it is let in, and the wrong passwords so far."""
        if self.switches.auth == "anonymous":
            return True, self.bad_passwords
        scheme, _, token = header.partition(" ")
        if self.switches.auth != "basic" or scheme.lower() != "basic":
            return False, self.bad_passwords
        try:
            given = base64.b64decode(token, validate=True)
        except ValueError:
            given = b""
        good = hmac.compare_digest(given, f"{self.user}:{self.password}".encode())
        if not good:
            with self._lock:
                self.bad_passwords += 1
        return good, self.bad_passwords

    def take(self, name: str) -> bool:
        """Use up one of a counted switch: True while it is -1 or above 0."""
        with self._lock:
            left = int(getattr(self.switches, name))
            if left > 0:
                setattr(self.switches, name, left - 1)
            return left != 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: Tuple[str, int], handler: Any) -> None:
        self.open: List[socket.socket] = []
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open = [*(item for item in self.open if item.fileno() >= 0), request]
        super().process_request(request, client_address)

    def drop(self) -> None:
        """Cut what is still open."""
        for item in self.open:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that hang up; anything else is a fault of the lab and is shown."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ValueError)):
            super().handle_error(request, client_address)


class _Drop(Exception):
    """Hang up without another byte."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Microsoft-IIS/10.0"
    sys_version = ""
    timeout = 120
    disable_nagle_algorithm = True
    lab: LabCA

    def setup(self) -> None:
        # the handshake happens here, in the connection's own thread, so that a silent client blocks nobody
        self.request.settimeout(self.timeout)
        plain = self.request
        self.request = self.lab.context().wrap_socket(plain, server_side=True)
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        with contextlib.suppress(OSError):
            self.request.close()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError, socket.timeout):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def date_time_string(self, timestamp: Optional[float] = None) -> str:
        now = self.lab.authority.clock() if timestamp is None else timestamp
        return email.utils.formatdate(now + self.lab.switches.date_offset, usegmt=True)

    def do_GET(self) -> None:
        self._serve("get", b"")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_FORM_BYTES:
            self.close_connection = True
            self.rfile.read(min(length, MAX_DRAINED_BYTES))  # else the close may overtake the answer, as a reset
            self._send(_Reply(413, iis_page(413)), authenticated=False)
            return
        self._serve("post", self.rfile.read(length))

    def _serve(self, method: str, body: bytes) -> None:
        lab = self.lab
        if lab.on_request:
            lab.on_request()
        switches = lab.switches
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        form = {name: values[-1] for name, values in parse_qs(body.decode("latin-1"), keep_blank_values=True).items()}
        scripted = bool(switches.answer) and switches.answer_on in ("all", method) and lab.take("answer_times")
        # a proxy or http.sys answers before anybody looks at credentials; so does IIS where credentials are the matter
        if scripted and not (switches.answer_after and method == "post"):
            self._send(self._scripted(switches.answer), authenticated=False)
            return
        allowed, _ = lab.admit(self.headers.get("Authorization", ""))
        if not allowed:
            offer = 'Basic realm="ca.lab.test"'
            offers = ("Negotiate", "NTLM") if switches.auth == "negotiate" else ("Negotiate", "NTLM", offer)
            headers = tuple(("WWW-Authenticate", offer) for offer in offers)
            self._send(_Reply(401, iis_page(401), headers=headers), authenticated=False)
            return
        try:
            reply = self._page(method, split.path.lower(), query, form)
            if switches.slow and switches.slow_on in ("all", method):
                time.sleep(switches.slow)
            if scripted:
                reply = self._scripted(switches.answer)
            self._send(reply, authenticated=True, submission=method == "post" and form.get("Mode") == "newreq")
        except _Drop:
            lab.record(self._seen(0, authenticated=True))
            self._hang_up()

    # what is asked for

    def _page(self, method: str, path: str, query: Mapping[str, str], form: Mapping[str, str]) -> _Reply:
        lab, pages = self.lab, self.lab.pages
        if path == "/certsrv":
            return _Reply(301, b"", headers=(("Location", "/certsrv/"),))
        name = path[len("/certsrv/") :] if path.startswith("/certsrv/") else "?"
        if method == "get" and name in ("", "default.asp"):
            return _Reply(200, pages.welcome())
        if method == "get" and name == "certcarc.asp":
            if lab.switches.unavailable in ("get", "all"):
                return _Reply(200, pages.stopped())
            return _Reply(200, pages.renewals())
        if method == "get" and name in ("certnew.cer", "certnew.p7b"):
            return self._download(name, {key.lower(): value for key, value in query.items()})
        if method == "post" and name == "certfnsh.asp":
            return self._finish(form)
        return _Reply(404, iis_page(404))

    def _finish(self, form: Mapping[str, str]) -> _Reply:
        lab, pages, switches = self.lab, self.lab.pages, self.lab.switches
        mode = form.get("Mode", "")
        if mode == "chkpnd":
            row = lab.authority.rows.get(_number(form.get("ReqID", "")))
            if row is None:
                return _Reply(200, pages.failure(NO_SUCH_REQUEST))
            return _Reply(200, self._outcome(row))
        if mode != "newreq":
            return _Reply(500, iis_page(500))
        if switches.lost == "before" and lab.take("lost_times"):
            lab.authority.count_post()
            raise _Drop
        if switches.unavailable in ("post", "all"):
            lab.authority.count_post()
            return _Reply(200, pages.stopped())
        attributes = _attributes(form.get("CertAttrib", ""))
        template = attributes.get("certificatetemplate", "")
        row = lab.authority.submit(form.get("CertRequest", "").encode("latin-1"), template, lab.user, attributes)
        return _Reply(200, self._outcome(row))

    def _outcome(self, row: Row) -> bytes:
        pages = self.lab.pages
        if row.state in ("issued", "revoked"):
            return pages.issued(row, mozilla=self._mozilla())
        return pages.pending(row) if row.state == "pending" else pages.denied(row)

    def _download(self, name: str, query: Mapping[str, str]) -> _Reply:
        lab, pages, switches = self.lab, self.lab.pages, self.lab.switches
        wanted = query.get("reqid", "")
        binary = query.get("enc", "b64").lower() == "bin"
        if switches.unavailable in ("get", "all"):
            return _Reply(200, pages.stopped())
        if wanted.lower() == "cacert":
            try:
                chain = lab.authority.chain(int(query.get("renewal", "-1")))
            except (IndexError, ValueError):
                return _Reply(200, pages.failure(NO_SUCH_REQUEST))
            return self._bag(list(chain), binary=binary) if name.endswith("p7b") else self._certificate(chain[0], binary=binary)
        if name == "certnew.cer" and switches.cer_fails > 0 and lab.take("cer_fails"):
            if switches.cer_fails_as == "drop":
                raise _Drop
            return _Reply(500, iis_page(500)) if switches.cer_fails_as == "500" else _Reply(200, pages.failure(0x80004005))
        row = lab.authority.rows.get(_number(wanted))
        if row is None:
            return _Reply(200, pages.failure(NO_SUCH_REQUEST))
        if row.certificate is None or row.state == "revoked":
            return _Reply(200, pages.no_certificate(row))
        if name.endswith("p7b"):
            return self._bag([row.certificate, *lab.authority.chain(row.generation)], binary=binary)
        return self._certificate(row.certificate, binary=binary)

    def _certificate(self, der: bytes, *, binary: bool) -> _Reply:
        shape = "der" if binary else self.lab.switches.cer_as
        body = der if shape == "der" else _armour(der, bare=shape == "bare")
        return _Reply(200, body, "application/pkix-cert" if self._mozilla() else "text/html")

    def _bag(self, ders: List[bytes], *, binary: bool) -> _Reply:
        switches = self.lab.switches
        if switches.bag_extra:
            ders.append(self.lab.authority.stranger().der)
        if switches.bag in ("leaf", "empty"):
            ders = ders[:1] if switches.bag == "leaf" else []
        if switches.bag == "sorted":
            ders.sort()
        if switches.bag == "reversed":
            ders.reverse()
        if switches.bag == "shuffled":
            random.shuffle(ders)
        bag = pkcs7(ders)
        # armoured as a certificate although it is PKCS#7 (facts 4)
        body = bag if binary else _armour(bag)
        return _Reply(200, body, "application/x-pkcs7-certificates" if self._mozilla() else "text/html")

    def _mozilla(self) -> bool:
        return self.lab.switches.sniff and self.headers.get("User-Agent", "").startswith("Mozilla")

    # the answer

    def _scripted(self, kind: str) -> _Reply:
        if kind == "login":
            return _Reply(200, LOGIN_PAGE)
        if kind == "empty":
            return _Reply(200, b"")
        if kind == "nul":
            return _Reply(200, b"<HTML>" + bytes(4096) + b"</HTML>")
        if kind == "bad-utf8":
            return _Reply(200, b"<HTML><P ID=locInfo> \xff\xfe\x80\xc3 </P></HTML>")
        if kind == "huge":
            return _Reply(200, b"<HTML>" + b" " * (8 << 20) + b"</HTML>")
        status = int(kind)
        if status in REDIRECTS:
            return _Reply(status, b"", headers=(("Location", f"https://{self.lab.server}/login"),))
        headers: Tuple[Tuple[str, str], ...] = ()
        if status == 401:
            headers = (("WWW-Authenticate", "Negotiate"), ("WWW-Authenticate", "NTLM"))
        return _Reply(status, iis_page(status), headers=headers)

    def _send(self, reply: _Reply, *, authenticated: bool, submission: bool = False) -> None:
        lab, switches = self.lab, self.lab.switches
        lost = switches.lost if submission and switches.lost not in ("", "before") else ""
        if lost and not lab.take("lost_times"):
            lost = ""
        if lost == "after":
            raise _Drop
        body = reply.body
        cut = switches.truncate_at if switches.truncate_at >= 0 else len(body) // 2
        if lost == "truncated-quiet":
            body = body[:cut]
        lab.record(self._seen(reply.status, authenticated=authenticated))
        self.send_response(reply.status, reply.reason or None)
        self.send_header("Cache-Control", "private")
        kind = reply.kind + ("; charset=UTF-8" if switches.charset and reply.kind == "text/html" else "")
        self.send_header("Content-Type", kind)
        self.send_header("X-Powered-By", "ASP.NET")
        self.send_header("Content-Length", str(len(body)))
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        if lost == "trickle":
            for number in range(len(body)):
                self.wfile.write(body[number : number + 1])
                time.sleep(0.05)
            return
        self.wfile.write(body[:cut] if lost == "truncated" else body)
        if lost == "truncated":
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)

    def _seen(self, status: int, *, authenticated: bool) -> Seen:
        scheme = self.headers.get("Authorization", "").partition(" ")[0]
        return Seen(self.command, self.path, authenticated, status, self.headers.get("User-Agent", ""), scheme)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def _attributes(text: str) -> Dict[str, str]:
    """Split `name:value` lines; bad ones are silently ignored (MS-WCCE 3.2.1.4.2.1.2). Names in lower case."""
    found: Dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.strip().partition(":")
        if colon and name.strip():
            found[name.strip().lower()] = value.strip()
    return found


def _armour(der: bytes, *, bare: bool = False) -> bytes:
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    if not bare:
        lines = [b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----"]
    return b"\r\n".join([*lines, b""])


# the HTTPS certificate


def _web_contexts(directory: Path, name: str) -> Dict[str, ssl.SSLContext]:
    """Make a web root and server certificates: the good one under "", the bad ones under the names of the switch."""
    now = time.time()
    key, root_key, unknown_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = make_ca("Lab Web Root", root_key, now - YEAR, now + 10 * YEAR)
    unknown = make_ca("Unknown Web Root", unknown_key, now - YEAR, now + 10 * YEAR)
    (directory / "server-trust.pem").write_bytes(to_pem([to_der(root)]))
    names = [name, "localhost"]
    span = (now - DAY, now + YEAR)
    leaves = {
        "": (names, span, root, root_key),
        "unknown-ca": (names, span, unknown, unknown_key),
        "wrong-name": (["elsewhere.lab.test"], span, root, root_key),
        "expired": (names, (now - YEAR / 2, now - DAY), root, root_key),
    }
    found = {}
    for switch, (dns, (start, end), issuer, issuer_key) in leaves.items():
        leaf = _web_leaf(dns, key, (start, end), issuer, issuer_key, addresses=switch != "wrong-name")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        path = directory / f".web{'-' + switch if switch else ''}.pem"
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(leaf + secret)
        context.load_cert_chain(path)
        path.unlink()
        found[switch] = context
    return found


def _web_leaf(
    names: Sequence[str],
    key: ec.EllipticCurvePrivateKey,
    span: Tuple[float, float],
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    addresses: bool,
) -> bytes:
    alternatives: List[x509.GeneralName] = [x509.DNSName(name) for name in names]
    if addresses:
        alternatives += [x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(span[0]))
        .not_valid_after(moment(span[1]))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


# the program


class _Steering:
    """Files through which another process steers a running CA: switches.json is the wish, acts.jsonl a queue of deeds.

    Both are read before each request; rows.json tells what the request table holds.
    """

    def __init__(self, lab: LabCA) -> None:
        self.lab = lab
        self.switches = lab.directory / "switches.json"
        self.acts = lab.directory / "acts.jsonl"
        self._stamp = (0, 0)
        self._wish: Dict[str, Any] = {}
        self._done = 0
        self._lock = threading.Lock()

    def apply(self) -> None:
        """Take over what changed; a wish that does not read is printed and left out."""
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                state = self.switches.stat()
                if (state.st_mtime_ns, state.st_ino) != self._stamp:
                    self._stamp = (state.st_mtime_ns, state.st_ino)
                    self._set(json.loads(self.switches.read_text()))
            with contextlib.suppress(FileNotFoundError):
                lines = self.acts.read_text().splitlines()
                for line in lines[self._done :]:
                    self._act(json.loads(line))
                self._done = len(lines)
            self._publish()

    def _set(self, wish: Mapping[str, Any]) -> None:
        """Take over what differs from the last wish only: switches that count down are not wound up again by another's change."""
        default = Switches().values()
        changes = {name: default[name] for name in self._wish if name not in wish}
        changes.update({name: value for name, value in wish.items() if name not in self._wish or self._wish[name] != value})
        try:
            self.lab.switches.update(changes)
        except (KeyError, TypeError) as error:
            print(f"switches.json: {error!r}", file=sys.stderr, flush=True)
            return
        self._wish = dict(wish)

    def _act(self, act: Mapping[str, Any]) -> None:
        authority = self.lab.authority
        number = int(act.get("id", 0))
        deeds: Dict[str, Callable[[], object]] = {
            "approve": lambda: authority.approve(number),
            "deny": lambda: authority.deny(number),
            "delete": lambda: authority.delete(number),
            "revoke": lambda: authority.revoke(number),
            "renew": authority.renew,
            "renew-key": lambda: authority.renew(new_key=True),
            "renew-root": authority.renew_root,
        }
        try:
            deeds[str(act["do"])]()
        except KeyError as error:
            print(f"acts.jsonl: {act}: no {error}", file=sys.stderr, flush=True)

    def _publish(self) -> None:
        rows = [
            {"id": row.id, "state": row.state, "template": row.template, "hresult": f"0x{row.hresult:08x}", "message": row.message}
            for row in list(self.lab.authority.rows.values())
        ]
        _write(self.lab.directory / "rows.json", json.dumps({"posts": self.lab.authority.posts, "rows": rows}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    fresh.write_text(text)
    fresh.replace(path)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _steer(directory: Path, changes: Sequence[str], acts: Sequence[Tuple[str, int]], *, reset: bool) -> None:
    wish: Dict[str, Any] = {}
    path = directory / "switches.json"
    if not reset and path.exists():
        wish = json.loads(path.read_text())
    probe = Switches()
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            sys.exit(f"--set: NAME=VALUE expected, got {change!r}")
        value = _value(text)
        if name != "deny_hresult" and isinstance(getattr(probe, name, None), str):
            value = text  # answer=503 is a text
        if isinstance(getattr(probe, name, None), bool) and value in (0, 1):
            value = bool(value)
        if name == "deny_hresult" and isinstance(value, str):
            value = int(value, 16)
        try:
            probe.update({name: value})
        except (KeyError, TypeError) as error:
            sys.exit(f"--set {change}: {error!r}; switches: {', '.join(sorted(probe.values()))}")
        wish[name] = value
    if changes or reset:
        _write(path, json.dumps(wish, indent=1) + "\n")
    if acts:
        with (directory / "acts.jsonl").open("a") as file:
            file.writelines(json.dumps({"do": do, "id": number}) + "\n" for do, number in acts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.ca", description="A lab CA with AD CS's web enrollment pages.")
    parser.add_argument("--directory", required=True, type=Path, help="where its files are; ready.json once it listens")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")
    parser.add_argument("--name", default="Lab Issuing CA")
    parser.add_argument("--user", default="LAB\\svc-enroll")
    parser.add_argument("--password", default="", help="default: made up, in DIR/password")
    parser.add_argument("--lifetime", type=float, default=2 * YEAR, help="seconds a certificate lives")
    parser.add_argument("--first-id", type=int, default=1)
    parser.add_argument("--template", action="append", default=[], help="a further template's name")
    steer = parser.add_argument_group("steering one that runs")
    steer.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes", help="set a switch")
    steer.add_argument("--reset", action="store_true", help="all switches back to their defaults, before --set")
    for verb in ("approve", "deny", "delete", "revoke"):
        steer.add_argument(f"--{verb}", action="append", type=int, default=[], metavar="ID")
    for verb in ("renew", "renew-key", "renew-root"):
        steer.add_argument(f"--{verb}", action="store_true", help="renew the CA's certificate")
    steer.add_argument("--rows", action="store_true", help="print the request table as of the last request")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or steer one that runs; returns the exit status."""
    options = _parser().parse_args(arguments)
    directory: Path = options.directory
    acts = [(verb, number) for verb in ("approve", "deny", "delete", "revoke") for number in getattr(options, verb)]
    acts += [(verb, 0) for verb in ("renew", "renew-key", "renew-root") if getattr(options, verb.replace("-", "_"))]
    if options.changes or acts or options.rows or options.reset:
        _steer(directory, options.changes, acts, reset=options.reset)
        if options.rows:
            path = directory / "rows.json"
            print(path.read_text() if path.exists() else "no request yet")
        return 0
    lab = LabCA(
        directory,
        port=options.port,
        user=options.user,
        password=options.password,
        name=options.name,
        lifetime=options.lifetime,
        first_id=options.first_id,
    )
    for name in options.template:
        lab.authority.templates[name] = Template(name)
    with contextlib.suppress(FileNotFoundError):
        (directory / "acts.jsonl").unlink()
    steering = _Steering(lab)
    lab.on_request = steering.apply
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    password = directory / "password"
    with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(lab.password + "\n")
    with lab:
        ready = {
            "server": lab.server,
            "server_trust": lab.server_trust,
            "issuer_trust": lab.issuer_trust,
            "user": lab.user,
            "password_file": str(password),
            "pid": os.getpid(),
        }
        _write(directory / "ready.json", json.dumps(ready, indent=1) + "\n")
        print(f"listening on {lab.server}", flush=True)
        while not done.wait(1.0):
            steering.apply()
            if not directory.is_dir():
                break
    with contextlib.suppress(FileNotFoundError):
        (directory / "ready.json").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
