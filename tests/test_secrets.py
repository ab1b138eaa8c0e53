"""No secret is left in anything that the program writes, prints, sends elsewhere or hands on: markers are planted, and hunted in every spelling."""

import base64
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from scx_enroll.arguments import VERBS
from tests import packages, peers
from tests.hunter import Hunter, keys_of, md4, spellings
from tests.lab import kdc as kdcs
from tests.lab import server as servers
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.lab.webcerts import ClientCA

METHODS = ("kerberos", "ntlm", "basic", "certificate")
PART = "Zwirbeldrache"  # of the password, that a page would take for a tag
PASSWORD = f"M4rk3r pä%\"+<{PART}>&amp;\\x7q ß'9"
PYTHON = kdcs.PYTHON
LIMIT_S = 60

# One interpreter with everything loaded, as an operator's worst day has it: each logger at DEBUG, http.client printing what it does,
# warnings shown. It runs the command line in a child for each line of its input, and tells the child's number before it begins.
DRIVER = r"""
import sys
sys.path.insert(0, sys.argv[1])
import contextlib, faulthandler, http.client, json, logging, os, ssl, warnings
faulthandler.enable()
warnings.simplefilter("always")
http.client.HTTPConnection.debuglevel = 2
import certsrv, requests, urllib3, urllib3.connection, urllib3.response
with contextlib.suppress(ImportError):
    import gssapi
with contextlib.suppress(ImportError):
    import requests_ntlm, spnego
from scx_enroll import acquire, activate, ca, check, cli, enroll, kerberos, observe, pages, report, request, service, signin, store, unattended, verify, web


def debug():
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, force=True, format="%(name)s %(message)s %(args)r")
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.DEBUG)


def note_tokens(path):
    made = kerberos.Kerberos.authorization

    def noted(self, certificate):
        token = made(self, certificate)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(token + "\n")
        return token

    kerberos.Kerberos.authorization = noted


def broken(what, known):
    def fails(*given, **named):
        raise known(f"unexpected {given[1:]!r} {named!r}")
    owner, _, name = what.rpartition(".")
    places = {"pages": pages, "verify": verify, "urllib3": urllib3.connection.HTTPSConnection, "client": web.Client, "certsrv": certsrv.Certsrv,
              "http": http.client.HTTPConnection, "requests": requests.adapters.HTTPAdapter, "socket": ssl.SSLSocket, "context": ssl.SSLContext,
              "signin": signin, "store": store.Store, "report": report}
    if owner == "ntlm":
        places["ntlm"] = requests_ntlm.HttpNtlmAuth
    if owner == "gssapi":
        places["gssapi"] = gssapi.SecurityContext
    setattr(places[owner], name, fails)


for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        debug()
        note_tokens(order["tokens"])
        if order["broken"]:
            broken(order["broken"], {"type": TypeError, "os": OSError, "value": ValueError}[order["how"]])
        status = 1
        try:
            status = cli.main(order["arguments"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status or 0)
    print(json.dumps({"pid": child}), flush=True)
    print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""


def need(what):
    """What is missing skips a test; under CI, it fails it."""
    if what:
        told = f"not everything is here: {what}"
        pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)


def lacks(method):
    if method == "kerberos":
        return kdcs.missing()
    wanted = {"ntlm": ("requests_ntlm", "python3-requests-ntlm")}.get(method, ("requests", "python3-requests"))
    return "" if kdcs.has(wanted[0]) and kdcs.has("cryptography") else f"{PYTHON} has no {wanted[0]}: apt-get install {wanted[1]} python3-cryptography"


# -- a server that tells what it hears ---------------------------------------------------------------------------


class _Telltale(servers._Handler):
    body = b""

    def _serve(self, method, body):
        self.body = body
        super()._serve(method, body)

    def _send(self, method, reply, *, authenticated, lost=""):
        lab = self.lab
        given = self.headers.get("Authorization", "") or (lab.tokens[-1] if lab.tokens and method == "post" else "")
        if not lab.telling or method != lab.telling_on or not is_last(given, lab.switches.auth):
            super()._send(method, reply, authenticated=authenticated, lost=lost)
            return
        lab.told += 1
        self.seen.status = 1
        whole = f"{self.requestline}\r\n{self.headers}\r\n".encode("latin-1") + self.body
        self.wfile.write(TELLING[lab.telling](lab, given.encode("latin-1"), whole, reply))
        self.wfile.flush()
        self._hang_up(reset=False)


def is_last(header, way):
    """Whether this is all that a server will hear: NTLM takes three messages, of which the last holds what matters."""
    if way == "certificate":
        return True
    scheme, _, token = header.partition(" ")
    return bool(token) and (scheme != "NTLM" or base64.b64decode(token)[8:9] == b"\3")


class Telltale(LabCA):
    """The lab's CA; with `telling`, it answers with what was sent to it."""

    telling, telling_on, told, elsewhere = "", "get", 0, 0

    def start(self):
        super().start()
        self._httpd.RequestHandlerClass = type("Handler", (_Telltale,), {"lab": self})

    def words(self, given):
        """What of a header could stand where a name is expected: runs of letters and digits, of it and of what it decodes to."""
        token = given.partition(b" ")[2]
        with contextlib.suppress(ValueError):
            token += b" " + base64.b64decode(token)
        runs = [run for run in re.findall(rb"[A-Za-z][A-Za-z0-9]{11,30}", token) if not run.startswith((b"YI", b"TlRM"))]
        return [*runs[-2:], PART.encode()]


def answer(status, body, *headers):
    return b"\r\n".join([b"HTTP/1.1 " + status, b"Content-Type: text/html", b"Content-Length: %d" % len(body), *headers, b"", body])


def page_of(lab, given, whole):
    words = lab.words(given)
    parts = [b"<HTML><HEAD><TITLE>", given, b"</TITLE></HEAD><BODY>", whole, b"<!-- ", given, b" -->", PASSWORD.encode()]
    parts += [b"<%b ID=loc%b Name='%b'><p ID=loc%b>x</p><td ID=%b>" % (word, word, given, word, word) for word in words]
    return b"".join([*parts, b"</BODY></HTML>"])


def proofs(reply):
    return [f"{name}: {value}".encode() for name, value in reply.headers]


def redirect(host):
    return lambda lab, given, whole, reply: answer(b"302 Found", b"", b"Location: " + host(lab, given))


TELLING = {
    "a page": lambda lab, given, whole, reply: answer(b"200 OK", page_of(lab, given, whole), *proofs(reply)),
    "a page cut off": lambda lab, given, whole, reply: answer(b"200 OK", page_of(lab, given, whole), *proofs(reply))[:-40],
    "a page with odd headers": lambda lab, given, whole, reply: answer(
        b"200 OK", page_of(lab, given, whole), *proofs(reply), b"Set-Cookie: a=" + given, b"Date: " + given, b"X-Echo: " + given, given.replace(b" ", b"")
    ),
    "an encoding": lambda lab, given, whole, reply: answer(b"200 OK", page_of(lab, given, whole), *proofs(reply), b"Content-Encoding: " + given),
    "a length": lambda lab, given, whole, reply: b"HTTP/1.1 200 OK\r\nContent-Length: " + given + b"\r\n" + b"\r\n".join([*proofs(reply), b"", whole]),
    "a chunk": lambda lab, given, whole, reply: b"\r\n".join([b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", *proofs(reply), b"", given, whole]),
    "an error": lambda lab, given, whole, reply: answer(b"500 Internal Server Error", page_of(lab, given, whole), b"X-Echo: " + given),
    "forbidden": lambda lab, given, whole, reply: answer(b"403 Forbidden", page_of(lab, given, whole)),
    "a reason": lambda lab, given, whole, reply: answer(b"500 " + given, b""),
    "a status": lambda lab, given, whole, reply: b"HTTP/1.1 " + given + b"\r\n\r\n",
    "no HTTP": lambda lab, given, whole, reply: whole,
    "a challenge": lambda lab, given, whole, reply: answer(b"401 Unauthorized", page_of(lab, given, whole), b"WWW-Authenticate: " + given),
    "a scheme": lambda lab, given, whole, reply: answer(
        b"401 Unauthorized", b"", *(b"WWW-Authenticate: " + word for word in (*lab.words(given), b'Odd realm="' + given + b'"'))
    ),
    "a host to go to": redirect(lambda lab, given: b"https://" + b".".join(lab.words(given)) + b".example/"),
    "a user to go with": redirect(lambda lab, given: b"https://" + given.replace(b" ", b":") + b"@localhost:%d/?%b" % (lab.elsewhere, given)),
}  # fmt: skip


# -- what the kernel saw ------------------------------------------------------------------------------------------

WRITES = "write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg,sendmmsg"
STRACE = ["strace", "-D", "-f", "-q", "-yy", "-xx", "-v", "-s", "65536", "-e", f"trace={WRITES},execve,openat,connect,prctl,renameat,renameat2,symlinkat,linkat"]


@dataclass(frozen=True)
class Call:
    """A system call as strace tells it: process, name, its arguments with strings as they were."""

    pid: int
    name: str
    text: bytes

    @classmethod
    def read(cls, line):
        pid, _, rest = line.partition(b" ")
        name = re.match(rb"[a-z0-9_]*", rest.lstrip())[0].decode()
        return cls(int(pid), name, re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), rest.lstrip()))

    @property
    def goes_to_memory(self):
        """Whether it is written where no name leads, and what ends with the process; the pair is the agent's own doing."""
        return self.name == "write" and re.match(rb"write\(\d+</memfd:(?:pair|keytab|certificate|key)[ >]", self.text)

    @property
    def ports(self):
        return {int(port) for port in re.findall(rb"sin6?_port=htons\((\d+)\)", self.text)} if self.name == "connect" else set()

    @property
    def made(self):
        """The path that was opened to be written."""
        if self.name == "openat" and re.search(rb"O_(?:WRONLY|RDWR|CREAT|TMPFILE)", self.text) and b" = -1 " not in self.text:
            where, name = re.match(rb'openat\([^<]*<([^>]*)>, "([^"]*)"', self.text).groups()
            return os.path.join(where, name).decode()
        return ""

CHECKED = ("a scheme", "a challenge", "a reason")
AFTER_THE_REQUEST = ("a page", "a page cut off", "an error", "a challenge", "a scheme", "a host to go to")


# -- a host with secrets, and the program -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def share(tmp_path_factory):
    """The program as its package installs it, elsewhere: the command, and the folder that it finds itself in."""
    packages.need("dpkg-deb")
    place = tmp_path_factory.mktemp("installed")
    subprocess.run(["dpkg-deb", "-x", packages.current().deb, place], check=True)
    command = place / "usr/sbin/scx-enroll"
    text = command.read_text(encoding="utf-8")
    assert text.count('"/usr/share/scx-enroll"') == 1
    command.write_text(text.replace('"/usr/share/scx-enroll"', repr(str(place / "usr/share/scx-enroll"))), encoding="utf-8")
    subprocess.run([PYTHON, "-I", "-m", "compileall", "-q", place / "usr/share/scx-enroll"], check=True)
    return place / "usr/share/scx-enroll"


class Stage:
    """A host, a CA, where Kerberos is spoken a KDC, and the secrets between them. `hunter` knows them all."""

    def __init__(self, folder, method, share):
        self.folder, self.method, self.share = folder, method, share
        self.hunter = Hunter()
        self.open = contextlib.ExitStack()
        self.tokens = folder / "out/tokens"  # of Kerberos, also those that never arrived
        self.holders = []  # files that hold a secret by right
        self.kdc = None
        self.host = self.open.enter_context(LabHost(folder / "host", key="rsa:2048"))
        self.etc = folder / "host/etc/scx-enroll"
        self.state = folder / "host/var/lib/scx-enroll"
        self.etc.mkdir()
        for name in ("tmp", "cwd", "out"):
            (folder / name).mkdir()
        self.settings = dict(getattr(self, f"_{method}")())
        for name in ("server-trust", "issuer-trust"):
            shutil.copy(folder / f"ca/{name}.pem", self.etc)
        self.configure()
        self.holders += [self.host.path(self.host.key), folder / "ca", folder / "kdc", folder / "out/trace", folder / "out/strace", self.tokens]
        self.hunter.add_key("the agent's key", Path(self.host.path(self.host.key)).read_bytes())
        self.driver = None

    def _ca(self, way, **more):
        self.ca = self.open.enter_context(Telltale(self.folder / "ca", password=PASSWORD, **more))
        self.ca.switches.auth = way

    def secret(self, path, data, mode=0o600):
        """A file of the host's that holds a secret."""
        path = self.folder / "host" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(mode)
        self.holders.append(path)
        return path

    def _kerberos(self):
        self.kdc = self.open.enter_context(kdcs.Kdc(self.folder / "kdc"))
        self.kdc.add("HOST1$", "HTTP/localhost")
        self._ca("kerberos", keytab=self.kdc.keytab(self.folder / "kdc/http.keytab", "HTTP/localhost"))
        self.take_keytab()
        return {}

    def take_keytab(self):
        path = self.secret("etc/krb5.keytab", b"")
        self.kdc.keytab(path, "HOST1$")
        keys = keys_of(path.read_bytes())
        assert [len(key) for key in keys] == [32, 16]
        self.hunter.add("a key of the keytab", *keys)

    def _password(self):
        self.secret("etc/scx-enroll/password", PASSWORD.encode() + b"\n")
        self.hunter.add("the password", PASSWORD.encode()).add("a part of the password", PART.encode())
        return {"user": self.ca.user}

    def _basic(self):
        self._ca("basic")
        return self._password()

    def _ntlm(self):
        self._ca("ntlm")
        self.hunter.add("the NT hash", md4(PASSWORD.encode("utf-16-le")))
        return self._password()

    def _certificate(self):
        self._ca("certificate")
        return self.take_certificate(self.ca.clients)

    def take_certificate(self, issuer):
        certificate, key = (Path(path) for path in issuer.issue("host1.lab.test"))
        shutil.copy(certificate, self.etc / "client.pem")
        self.secret("etc/scx-enroll/client.key", key.read_bytes())
        self.hunter.add_key("the client's key", key.read_bytes())
        return {"client-certificate": "/etc/scx-enroll/client.pem", "client-key": "/etc/scx-enroll/client.key"}

    def configure(self, **more):
        """Write the configuration anew; `more` are keys of [ca], with `_` for `-`."""
        ca = {"server": self.ca.server, "auth": self.method, "template": "SCXAgent", **self.settings}
        ca.update({f"{name}-trust": f"/etc/scx-enroll/{name}-trust.pem" for name in ("server", "issuer")})
        ca.update({name.replace("_", "-"): value for name, value in more.items()})
        lines = "".join(f"{name} = {value}\n" for name, value in ca.items() if value)
        text = f"[host]\nname = {self.host.fqdn}\n[agent]\nport = {self.host.port}\nsettle = 0s\n[ca]\n{lines}"
        (self.etc / "scx-enroll.conf").write_text(text, encoding="utf-8")

    def close(self):
        if self.driver:
            self.driver.stdin.close()
            self.driver.wait(LIMIT_S)
            self.driver.stdout.close()
        self.open.close()

    # running

    @property
    def environment(self):
        return {
            "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TMPDIR": str(self.folder / "tmp"), "HOME": str(self.folder / "cwd"),
            "PYTHONDEVMODE": "1", "PYTHONDUMPREFS": "1", "PYTHONFAULTHANDLER": "1", **(self.kdc.environment if self.kdc else {}),
        }  # fmt: skip

    def arguments(self, verb, *options, live=False):
        return [verb, "--root", self.host.root, *(["--live"] if live else []), *options]

    def afresh(self):
        """Nothing is remembered of earlier runs."""
        shutil.rmtree(self.state, ignore_errors=True)
        for path in (self.folder / "out").glob("std*"):
            path.unlink()
        self.tokens.unlink(missing_ok=True)
        self.ca.tokens.clear()
        self.ca.log.clear()

    def do(self, verb, *options, live=False, broken="", how="type", kill=0, when=None, **environment):
        """Run a verb in a child of the driver; returns its status. `kill` it at the first request that is `when`."""
        if self.driver is None:
            self.driver = subprocess.Popen(
                [PYTHON, "-I", "-c", DRIVER, str(self.share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment, cwd="/",
            )  # fmt: skip
        order = {
            "arguments": self.arguments(verb, *options, live=live), "environment": environment, "broken": broken, "how": how,
            "folder": str(self.folder / "cwd"), "tokens": str(self.tokens), "out": str(self.folder / "out/stdout"), "err": str(self.folder / "out/stderr"),
        }  # fmt: skip
        known = threading.Event()
        pids = []

        def strike():
            if kill and when(self.ca.log[-1]):
                known.wait(LIMIT_S)
                os.kill(pids[0], kill)
                if kill != signal.SIGTERM:
                    raise ConnectionAbortedError  # there is nobody to answer

        self.ca.on_request = strike
        self.driver.stdin.write(json.dumps(order) + "\n")
        self.driver.stdin.flush()
        pids.append(json.loads(self.driver.stdout.readline())["pid"])
        known.set()
        status = json.loads(self.driver.stdout.readline())["status"]
        self.ca.on_request = None
        return status

    def popen(self, verb, *options, live=False, before=(), **more):
        """Start the command that the package installs, its output in files."""
        with open(self.folder / "out/stdout", "ab") as out, open(self.folder / "out/stderr", "ab") as err:
            return subprocess.Popen(
                [*before, str(self.command), *self.arguments(verb, *options, live=live)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=self.environment, cwd=self.folder / "cwd", **more,
            )  # fmt: skip

    @property
    def command(self):
        return self.share.parent.parent / "sbin/scx-enroll"

    def trace(self, verb, *options, live=False):
        """Run the command under strace; returns its status, and each call that it and its children made, bytes as they were."""
        log = self.folder / "out/strace"
        log.unlink(missing_ok=True)
        running = self.popen(verb, *options, live=live, before=[*STRACE, "-o", str(log)])
        seen = []

        def look():
            seen.extend(Path(f"/proc/{running.pid}/{name}").read_bytes() for name in ("environ", "cmdline"))

        self.ca.on_request = look
        status = running.wait(LIMIT_S)
        self.ca.on_request = None
        ended = re.compile(rb"^%d +\+\+\+ " % running.pid, re.MULTILINE)
        deadline = time.monotonic() + LIMIT_S
        while not ended.search(log.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = log.read_bytes().splitlines(keepends=True)
        calls = [Call.read(line) for line in lines if line.endswith(b"\n")]  # the agent goes on
        assert status >= 0, self.told()
        return status, calls, seen

    # looking

    def told(self):
        return b"".join(path.read_bytes() for path in sorted((self.folder / "out").glob("std*")))

    def knows_tokens(self):
        """What was sent to the server is secret, too."""
        made = self.tokens.read_text(encoding="latin-1").splitlines() if self.tokens.exists() else []
        for token in {*self.ca.tokens, *made}:
            scheme, _, text = token.partition(" ")
            data = base64.b64decode(text)
            if scheme == "Basic":
                self.hunter.add("the Basic token", text.encode()).add("user and password", data)
            elif scheme == "NTLM" and data[8:9] == b"\3":
                length, _, at = struct.unpack_from("<HHI", data, 20)
                self.hunter.add("NTLM's proof", data[at : at + 16]).add_pieces("NTLM's response", data[at + 44 : at + length])
            elif scheme == "Negotiate":
                self.hunter.add_pieces("a Kerberos token", data[len(data) // 3 :])
            self.hunter.add("a word of a token", *(word for word in self.ca.words(token.encode()) if scheme != "NTLM" or data[8:9] == b"\3"))
        return self.hunter

    def finds(self):
        """What is found of the secrets in all that was printed and in all that stands anywhere."""
        hunter = self.knows_tokens()
        return hunter.find(self.told()), hunter.find_in_files(self.folder, but=self.holders)


NOTHING = ([], {})


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def make(tmp_path, share):
    made = []

    def make(method):
        need(lacks(method))
        made.append(Stage(tmp_path / method, method, share))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def stage(make, method):
    return make(method)


# -- the hunter ---------------------------------------------------------------------------------------------------


def example_secrets(tmp_path):
    key = Path(ClientCA(tmp_path).issue("host")[1]).read_bytes()
    hunter = Hunter().add("password", PASSWORD.encode()).add("part", PART.encode()).add("hash", md4(PASSWORD.encode("utf-16-le")))
    return hunter.add("keytab", bytes(range(100, 132))).add_pieces("token", os.urandom(900)).add_key("key", key), key


def test_hunter_finds_every_secret_in_every_spelling(tmp_path):
    """A hunter that finds nothing proves nothing: each needle is planted alone, and amid other bytes, in a file."""
    hunter, _ = example_secrets(tmp_path)
    assert len(hunter.needles) > 300
    for number, (needle, name) in enumerate(hunter.needles.items()):
        place = tmp_path / "planted" / str(number)
        place.mkdir(parents=True)
        (place / "file").write_bytes(b"\x00\xffsome text, " + needle + b"\nmore")
        assert name in hunter.find_in_files(place)[str(place / "file")]
        shutil.rmtree(place)
    assert hunter.find(b"some text " * 1000) == []


def test_hunter_finds_what_others_encode(tmp_path):
    """The spellings are those of the standard library, whatever stands before a secret and after it."""
    hunter, key = example_secrets(tmp_path)
    secret = PASSWORD.encode()
    for before in range(6):
        for after in range(4):
            data = bytes(range(65, 65 + before)) + secret + b"x" * after
            for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes, bytes.hex, repr, lambda data: data[::-1]):
                coded = encode(data)
                assert hunter.find(coded if isinstance(coded, bytes) else coded.encode()), encode
    text = f"user:{PASSWORD}"
    for shown in (repr(text), repr({"a": [text]}), json.dumps(text), json.dumps({"a": json.dumps(text)}), f"{text!a}", text.upper(), text.lower()):
        assert hunter.find(shown.encode()), shown
    for coding in ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"):
        assert hunter.find(text.encode(coding)), coding
    assert hunter.find(key)
    assert hunter.find(key.replace(b"\n", b""))
    assert hunter.find(base64.b64encode(key))
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / PART).touch()
    (folder / "link").symlink_to(PART)
    assert len(hunter.find_in_files(folder)) == 2


def test_hunter_knows_the_hash_and_the_keys():
    """The NT hash of RFC 1320's and Microsoft's examples, so that what is hunted is what NTLM takes."""
    assert md4(b"message digest").hex() == "d9130a8164549fe818874806e1c7014b"
    assert md4("Password".encode("utf-16-le")).hex() == "a4f49c406510bdcab6824ee7c30fd852"  # [MS-NLMP] 4.2.2.1.2
    assert md4(b"1234567890" * 8).hex() == "e33b4ddc9c38f2199c3e7b164fcc0536"
    assert set(spellings(b"\x00" * 16)) >= {"raw", "raw hex", "raw base64 0", "raw base64 1", "raw base64 2", "raw reversed"}


# -- what is written and printed ----------------------------------------------------------------------------------


def well(stage):
    return {}


def unfound(stage):
    stage.ca.switches.answer = "404"


def refused(stage):
    """The password is another one, the keytab's key is out of date, the certificate another CA's."""
    if stage.kdc:
        stage.kdc.change_key("HOST1$")
    elif stage.method == "certificate":
        (stage.folder / "stranger").mkdir()
        stage.take_certificate(ClientCA(stage.folder / "stranger"))
        shutil.rmtree(stage.folder / "stranger")
    else:
        other = PASSWORD.replace("7q", "8r")
        stage.secret("etc/scx-enroll/password", other.encode())
        stage.hunter.add("the wrong password", other.encode())


def wrong_service_key(stage):
    if stage.kdc:
        stage.kdc.change_key("HTTP/localhost")
    else:
        stage.ca.switches.bound_to = "other"


def gone(stage):
    if stage.kdc:
        stage.kdc.delete("HOST1$")
    else:
        stage.ca.switches.enroll = "denied"


def no_kdc(stage):
    if stage.kdc:
        stage.kdc.stop()
    else:
        stage.ca.switches.unavailable = "all"


def switched(**switches):
    return lambda stage: stage.ca.switches.update(switches)


FAULTS = {
    "nothing": well,
    "a refused secret": refused,
    "another service key": wrong_service_key,
    "no such account": gone,
    "nobody to ask": no_kdc,
    "another scheme": lambda stage: stage.ca.switches.update({"auth": "basic" if stage.method != "basic" else "negotiate"}),
    "an untrusted server": switched(https="unknown-ca"),
    "another name": switched(https="wrong-name"),
    "an unknown page": switched(answer="login"),
    "an answer lost": switched(lost="after"),
    "an answer reset": switched(lost="reset", lost_on="all"),
    "an answer cut": switched(lost="truncated"),
    "a denial": switched(mode="deny"),
    "a wait": switched(mode="pending"),
    "a certificate for another name": switched(wrong="name"),
}


@pytest.mark.slow
def test_nothing_shows_in_any_failure_with_every_logger_at_debug(stage):
    """An operator who looks for the cause switches on all there is, and sends it to whoever helps."""
    for name, fault in FAULTS.items():
        stage.afresh()
        fault(stage)
        statuses = [stage.do("run", "--verbose", "--now"), stage.do("check", "--verbose", "--json")]
        assert 1 not in statuses, (name, stage.told().decode(errors="replace"))
        assert stage.finds() == NOTHING, name
        assert b"scx-enroll: " in stage.told(), name
        if fault is refused and stage.kdc:
            stage.take_keytab()
        if fault is refused and stage.method == "certificate":
            stage.take_certificate(stage.ca.clients)
        if fault is refused and stage.method in ("basic", "ntlm"):
            stage.secret("etc/scx-enroll/password", PASSWORD.encode())
        if stage.kdc and fault is wrong_service_key:
            stage.kdc.keytab(stage.ca.gate.keytab, "HTTP/localhost")
        if stage.kdc and fault is gone:
            stage.kdc.add("HOST1$")
            stage.take_keytab()
        if stage.kdc and fault is no_kdc:
            stage.kdc.start()
        stage.ca.switches.reset()
        stage.ca.switches.auth = stage.method


@pytest.mark.slow
@pytest.mark.parametrize("on", ["get", "post"])
def test_a_server_that_tells_what_it_was_sent_is_not_believed(stage, on):
    """A debugging page, a proxy or an enemy returns the request with its headers: as page, status, reason, challenge, host to go to."""
    elsewhere = peers.Peer(lambda peer, connection: peer.request(connection))
    stage.open.callback(elsewhere.close)
    stage.ca.elsewhere = elsewhere.port
    found = {}
    for name in AFTER_THE_REQUEST if on == "post" or stage.method == "certificate" else TELLING:  # a certificate's owner sends no secret
        stage.afresh()
        stage.ca.telling, stage.ca.telling_on = name, on
        before = stage.ca.told
        status = stage.do("check" if name in CHECKED and on == "get" else "run", "--verbose")
        assert stage.ca.told > before, name
        assert status != 1, (name, stage.told().decode(errors="replace"))
        if stage.finds() != NOTHING:
            found[name] = stage.finds()
        if name == "a page":
            assert list(stage.state.glob("pages/*")), "a skeleton was kept, in which nothing was found"
    assert found == {}
    assert elsewhere.received == [], "nobody else was asked"


# -- calls, children, other servers -------------------------------------------------------------------------------


def is_shown_nowhere(stage, calls, seen):
    """Nothing is written but to memory, handed to a child or sent in the clear; nobody is asked but those who should be."""
    hunter = stage.knows_tokens()
    told = [call for call in calls if not call.goes_to_memory]
    if hunter.find(b"\n".join(call.text for call in told)):
        return [(call.text[:300], hunter.find(call.text)) for call in told if hunter.find(call.text)]
    known = {stage.ca.port, stage.host.port, stage.kdc.port if stage.kdc else 0, 0}
    asked = set().union(*(call.ports for call in calls))
    assert asked <= known, asked - known
    places = (str(stage.folder), "/dev/null", "/dev/tty")
    strays = {call.made for call in calls if call.made and not call.made.startswith(places)}
    assert strays <= {f"/proc/{call.pid}/oom_score_adj" for call in calls}, strays
    return hunter.find(b"\n".join(seen))


@pytest.mark.slow
def test_no_call_of_the_command_and_its_children_shows_a_secret(stage):
    """The strictest: whatever is written, opened, started, connected to or sent, as the kernel saw it, over a whole life of a host."""
    need("" if shutil.which("strace") else "apt-get install strace")
    stage.host.start()
    status, calls, seen = stage.trace("run", "--verbose", live=True)
    assert status == 0, stage.told().decode(errors="replace")
    assert stage.ca.authority.issued == 1
    assert seen, "looked at while requests were under way"
    assert sum(call.name == "execve" for call in calls) > 1, "the agent's command was started"
    memory = stage.hunter.find(b"".join(call.text for call in calls if call.goes_to_memory))
    whose = {"kerberos": "a key of the keytab", "certificate": "the client's key"}.get(stage.method, "the agent's key")
    assert any(name.startswith(whose) for name in memory), "so strace shows what is written"
    assert is_shown_nowhere(stage, calls, seen) == []
    stage.ca.telling = "a page"
    status, calls, seen = stage.trace("run", "--verbose", "--renew", "--now", live=True)
    assert status == 5, stage.told().decode(errors="replace")
    assert is_shown_nowhere(stage, calls, seen) == []
    stage.ca.telling = ""
    refused(stage)
    status, calls, seen = stage.trace("check", "--verbose")
    assert status in (5, 13), stage.told().decode(errors="replace")
    assert is_shown_nowhere(stage, calls, seen) == []
    assert stage.finds() == NOTHING


@pytest.mark.slow
def test_a_proxy_hears_the_name_of_the_server_and_nothing_else(stage):
    """What stands before the CA is another party: it sees where to, and bytes that it can't read."""
    heard = []

    def listen(peer, connection):
        host, port = peer.request(connection).split()[1].decode().split(":")
        heard.append(peer.received[-1])
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection((host, int(port))) as onward:

            def pump(source, sink):
                with contextlib.suppress(OSError):
                    while data := source.recv(65536):
                        heard.append(data)
                        sink.sendall(data)
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(onward, connection))
            back.start()
            pump(connection, onward)
            back.join(LIMIT_S)

    proxy = peers.Peer(listen)
    rude = peers.Peer(lambda peer, connection: connection.sendall(b"HTTP/1.1 407 " + peer.request(connection).replace(b"\r\n", b" ") + b"\r\n\r\n"))
    stage.open.callback(proxy.close)
    stage.open.callback(rude.close)
    stage.configure(proxy=f"http://127.0.0.1:{proxy.port}")
    assert stage.do("run", "--verbose") == 0, stage.told().decode(errors="replace")
    stage.configure(proxy=f"http://127.0.0.1:{rude.port}")
    assert stage.do("check", "--verbose") == 5
    hunter = stage.knows_tokens()
    assert len(heard) > 4
    assert hunter.find(b"\n".join([*heard, *rude.received])) == []
    assert all(sent.startswith(b"CONNECT localhost:") and b"uthorization" not in sent for sent in (*proxy.received, *rude.received))
    assert stage.finds() == NOTHING


# -- defects, and ends in the middle ------------------------------------------------------------------------------

DEFECTS = {
    "pages.classify": "type", "urllib3.request": "type", "http.putheader": "type", "http.send": "type", "http.endheaders": "os", "http.putrequest": "value",
    "socket.sendall": "type", "client.read": "type", "requests.build_response": "type", "certsrv.get_cert": "type", "signin.mark": "type",
}  # fmt: skip
OWN = {"kerberos": {"gssapi.step": "type"}, "ntlm": {"ntlm.response_hook": "type", "ntlm.retry_using_http_NTLM_auth": "type"}, "certificate": {"context.load_cert_chain": "type"}}


@pytest.mark.slow
def test_a_defect_tells_no_secret(stage):
    """A library of tomorrow raises what nobody expects, with what it was given in its words: a traceback shows where, and nothing of it."""
    found, defects = {}, 0
    for broken, how in {**DEFECTS, **OWN.get(stage.method, {})}.items():
        stage.afresh()
        defect = stage.do("run", "--verbose", broken=broken, how=how) == 1
        if defect:
            defects += 1
            assert b"Traceback" in stage.told()
            shutil.rmtree(stage.state, ignore_errors=True)
            assert stage.do("run", broken=broken, how=how) == 1
            assert b"a defect of scx-enroll" in stage.told()
        if stage.finds() != NOTHING:
            found[broken] = stage.finds()
    assert defects > 5
    assert found == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT], ids=lambda number: number.name)
def test_a_run_that_is_killed_leaves_no_secret(stage, number):
    """Whatever the moment: files that were on their way stay, and so does what a crash prints."""
    for method in ("GET", "POST") if number == signal.SIGKILL else ("POST",):
        stage.afresh()
        status = stage.do("run", "--verbose", kill=number, when=lambda seen, method=method: seen.method == method)
        if number != signal.SIGTERM:  # whose run may finish the step in hand
            assert status == -number
            assert (b"Fatal Python error: Aborted" in stage.told()) == (number == signal.SIGABRT)
        assert stage.finds() == NOTHING


def dumps_cores(folder):
    """Whether a process that crashes in this folder leaves its memory there."""
    ran = subprocess.run([PYTHON, "-IS", "-c", "import os; os.abort()"], cwd=folder, preexec_fn=unlimited, stderr=subprocess.DEVNULL)
    cores = list(folder.glob("core*"))
    for core in cores:
        core.unlink()
    return ran.returncode == -signal.SIGABRT and bool(cores)


def unlimited():
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_crash_leaves_no_core(stage):
    """A core file is a process's memory, password, keys and tickets with it, and somebody mails it to a developer."""
    folder = stage.folder / "cwd"
    if not dumps_cores(folder):
        pytest.skip("this kernel writes cores elsewhere, if at all")
    running = None
    begun = threading.Event()

    def strike():
        begun.wait(LIMIT_S)
        running.send_signal(signal.SIGABRT)
        raise ConnectionAbortedError

    stage.ca.on_request = strike
    running = stage.popen("run", "--verbose", preexec_fn=unlimited)
    begun.set()
    assert running.wait(LIMIT_S) == -signal.SIGABRT
    stage.ca.on_request = None
    assert list(folder.iterdir()) == []
    assert stage.finds() == NOTHING


@pytest.mark.slow
def test_each_verb_is_shut_before_it_reads_a_key(make):
    """Whoever adds a verb need not think of it: the memory is nobody's from the beginning, before a key, a password or the state is opened."""
    need("" if shutil.which("strace") else "apt-get install strace")
    stage = make("basic")
    (stage.folder / "cwd/file").write_bytes(b"no certificate")
    read = 0
    for verb in VERBS:
        if verb == "idle":  # it reads no secret
            continue
        _, calls, _ = stage.trace(verb, *(["file"] if verb in ("install", "submit") else []))
        shut = [number for number, call in enumerate(calls) if b"PR_SET_DUMPABLE, SUID_DUMP_DISABLE" in call.text and b" = 0" in call.text]
        keys = [number for number, call in enumerate(calls) if call.name == "openat" and re.search(rb"omikey|password|journal", call.text)]
        assert shut, verb
        assert all(number > shut[0] for number in keys), verb
        read += bool(keys)
    assert read > 5


# -- Kerberos' own file -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trace_of_kerberos_holds_no_key_and_no_ticket(make):
    """KRB5_TRACE= is what a hint of ours proposes: libkrb5 writes names, types of encryption and addresses there, and keys by a checksum."""
    stage = make("kerberos")
    trace = stage.folder / "out/trace"
    for fault in (well, refused):
        fault(stage)
        status = stage.do("check", "--verbose", KRB5_TRACE=str(trace))
        assert status == (0 if fault is well else 13)
    told = trace.read_bytes()
    assert b"HOST1$@LAB.TEST" in told
    assert b"HTTP/localhost@LAB.TEST" in told
    assert stage.knows_tokens().find(told) == []
    assert stage.finds() == NOTHING


# -- files that hold secrets ----------------------------------------------------------------------------------------

SECRETS = {"kerberos": ("keytab", "etc/krb5.keytab"), "basic": ("password", "etc/scx-enroll/password"), "ntlm": ("password", "etc/scx-enroll/password"),
           "certificate": ("client-key", "etc/scx-enroll/client.key")}  # fmt: skip
STRANGER = 65534


def moded(mode):
    return lambda path: path.chmod(mode)


def linked(path):
    path.rename(f"{path}.real")
    path.symlink_to(f"{path.name}.real")
    os.lchown(path, STRANGER, STRANGER)


def piped(path):
    path.unlink()
    os.mkfifo(path, 0o600)


def foldered(path):
    path.rename(f"{path}.real")
    path.mkdir(0o700)


def filled(path):
    with path.open("ab") as file:
        file.write(b"\n" + PART.encode() * (1 << 17))


LOOSE = {
    **{f"{mode:o}": (moded(mode), "chmod 600 {path}") for mode in (0o640, 0o604, 0o644, 0o660, 0o602, 0o666, 0o610)},
    "another's": (lambda path: os.chown(path, STRANGER, 0), "chown root {path}"),
    "another's link": (linked, "chown -h root"),
    "a pipe": (piped, "move it away"),
    "a folder": (foldered, "move it away"),
    "too large": (filled, "see what stands there"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["default", "configured"])
def test_a_secret_that_others_can_reach_is_refused_with_the_command_that_mends_it(stage, place):
    """It is out already, or somebody else's: nothing is sent with it, nobody is asked, and the message is what to type."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another")
    setting, usual = SECRETS[stage.method]
    at = Path(stage.host.root, usual)
    if place == "configured":
        at = at.rename(stage.secret("etc/other/secret", b""))
        stage.configure(**{"password_file" if setting == "password" else setting.replace("-", "_"): "/etc/other/secret"})
    data = at.read_bytes()
    stage.holders += [f"{at}.real", at.parent / f"{at.name}.kept"]
    assert stage.do("check") == 0, stage.told().decode(errors="replace")
    for name, (loosen, hint) in LOOSE.items() if place == "default" else ((name, LOOSE[name]) for name in ("640", "another's")):
        stage.afresh()
        before = (stage.kdc.log() if stage.kdc else "", len(stage.ca.log))
        loosen(at)
        for verb in ("check", "run") if name == "640" else ("check",):
            assert stage.do(verb, "--verbose", "--json") == 3, (name, stage.told().decode(errors="replace"))
            assert hint.format(path=f"/{at.relative_to(stage.host.root)}").encode() in stage.told(), (name, stage.told())
        assert (stage.kdc.log() if stage.kdc else "", len(stage.ca.log)) == before, name
        assert stage.finds() == NOTHING, name
        for path in (at, Path(f"{at}.real")):
            if path.is_dir():
                path.rmdir()
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        stage.secret(at.relative_to(stage.host.root), data)
    assert stage.do("check", "--verbose") == 0


@pytest.mark.slow
def test_a_credential_of_systemd_is_taken_and_as_closed_as_a_file(stage):
    """LoadCredential= hands it over as 0400; a folder that somebody else made in its place is no credential."""
    setting, usual = SECRETS[stage.method]
    stage.host.start()
    data = Path(stage.host.root, usual).read_bytes()
    Path(stage.host.root, usual).unlink()
    credential = stage.secret(f"credentials/{setting}", data, 0o400)
    where = {"CREDENTIALS_DIRECTORY": str(credential.parent)}
    assert stage.do("run", "--verbose", live=True, **where) == 0, stage.told().decode(errors="replace")
    credential.chmod(0o444)
    count = len(stage.ca.log)
    assert stage.do("check", "--verbose", live=True, **where) == 3
    assert f"chmod 600 {credential}".encode() in stage.told()
    assert len(stage.ca.log) == count
    assert stage.finds() == NOTHING
