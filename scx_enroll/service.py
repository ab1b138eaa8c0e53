"""TLS and control: rehearses a pair, runs the agent's tools, and looks at what the port really serves.

The agent's tools say "started" and exit 0 when the server died on a bad pair, so their words and statuses are shown to
a person and never believed. Path validation is OpenSSL's: the rehearsal is a handshake in memory.
"""

import fcntl
import hashlib
import os
import re
import socket
import ssl
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Callable, Optional, Tuple

from scx_enroll import idle, systemd
from scx_enroll.errors import AgentNotReady, HostError
from scx_enroll.rootfs import Root

MAX_HANDSHAKE_ROUNDS = 20  # a TLS 1.2 handshake takes 4; a long chain needs no more, since the pipe is memory
MAX_RECORD_BYTES = 1 << 14  # of a TLS record: RFC 5246 section 6.2.1
MAX_OUTPUT_BYTES = 4096  # of a control command, shown to a person only
_FIRST = re.compile(rb"^-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----[^-]*-----END \1-----", re.MULTILINE)  # PEM_read_bio_X509
REPRIEVE_S = 15.0  # a unit that hangs is ended by us; by systemd only where we are gone


@dataclass(frozen=True)
class Patience:
    """How long to wait for the agent, in seconds.

    The command may take 60 s and the listener 30 s on a loaded host. A server that is gone for longer than systemd
    takes to start it again (RestartSec=5s in the agent's unit) is not waited for any longer.
    """

    command_s: float = 60.0
    listener_s: float = 30.0
    gone_s: float = 8.0
    poll_s: float = 0.1


@dataclass(frozen=True)
class Served:
    """What a port answers: whether somebody listens, the SHA-256 of the leaf served, or why there is none; and the leaf (DER)."""

    listening: bool
    leaf: str = ""
    problem: str = ""
    der: bytes = b""


class _Encrypted(Exception):
    """The key asks for a passphrase."""


def _no_passphrase() -> bytes:
    raise _Encrypted


def _server_context(root: Root, key_path: str, certificates: bytes, policy: str = "") -> ssl.SSLContext:
    """Load a pair as the agent would, the key through an open descriptor. Raises ssl.SSLError where it doesn't fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if policy:
        context.set_ciphers(policy)
    key = root.open_file(key_path)
    try:
        held = os.memfd_create("certificates", os.MFD_CLOEXEC)
        try:
            os.write(held, certificates)
            context.load_cert_chain(f"/proc/self/fd/{held}", f"/proc/self/fd/{key}", _no_passphrase)
        finally:
            os.close(held)
    except _Encrypted:
        raise AgentNotReady(
            f"the agent's key {key_path} is encrypted",
            "the agent can't read it either: store it without a passphrase",
        ) from None
    finally:
        os.close(key)
    return context


def fits(root: Root, key_path: str, certificates: bytes) -> bool:
    """Say whether OpenSSL takes the key at `key_path` and the first certificate (PEM) as a pair, as the agent will at its start."""
    first = _FIRST.search(certificates)
    try:  # what is too weak may be what is served now
        _server_context(root, key_path, first[0] if first else certificates, policy="ALL:@SECLEVEL=0")
    except (ssl.SSLError, FileNotFoundError):
        return False
    return True


def rehearse(
    root: Root, key_path: str, certificates: bytes, anchors: Tuple[bytes, ...], fqdn: str
) -> str:
    """Do a TLS handshake in memory, as a Management Server will do it with the agent.

    `certificates` is PEM, the leaf first and then the intermediates: the server sends them. `anchors` are DER: the
    client's store holds them and nothing else (whatever is in a client's store is trusted, an intermediate too), and it
    checks path, purpose, name and dates. Returns "" or what OpenSSL objects to.
    """
    if not anchors:
        return "issuer-trust holds no self-signed certificate"
    try:
        server_context = _server_context(root, key_path, certificates)
    except ssl.SSLError as problem:
        return f"OpenSSL refuses the pair: {_reason(problem)}"
    try:
        _handshake(server_context, _client_context(anchors), fqdn)
    except ssl.SSLCertVerificationError as problem:
        return f"{problem.verify_message} (OpenSSL verify code {problem.verify_code})"
    except ssl.SSLError as problem:
        return f"the rehearsed handshake failed: {_reason(problem)}"
    return ""


def check_path(ders: Tuple[bytes, ...], anchors: Tuple[bytes, ...], fqdn: str) -> str:
    """Check a path as `rehearse` does, where the leaf's key is on another host.

    The client is the same; the server's first flight is written by hand, up to the Certificate message (TLS 1.2, RFC 5246
    section 7.4). OpenSSL verifies what is in there before it reads on: then it waits for a proof of the key, or objects.
    `ders`: the leaf first, then intermediates. Returns "" or what OpenSSL objects to.
    """
    if not anchors:
        return "issuer-trust holds no self-signed certificate"
    if not _objection(ders, _client_context(()), fqdn):
        return "this OpenSSL does not verify a certificate before it has a proof of the key"  # never seen
    try:
        context = _client_context(anchors)
    except ssl.SSLError as problem:
        return f"OpenSSL refuses the anchors: {_reason(problem)}"
    return _objection(ders, context, fqdn)


def _objection(ders: Tuple[bytes, ...], context: ssl.SSLContext, fqdn: str) -> str:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    problem = ""
    for suite in (b"\xc0\x2f", b"\xc0\x2b"):  # ECDHE-RSA and ECDHE-ECDSA, AES128-GCM-SHA256: the leaf's key decides which one fits
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(to_client, to_server, server_hostname=fqdn)
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        to_client.write(_first_flight(suite, ders))
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            return ""
        except ssl.SSLCertVerificationError as refused:
            return f"{refused.verify_message} (OpenSSL verify code {refused.verify_code})"
        except ssl.SSLError as failed:
            problem = f"OpenSSL refuses the certificate: {_reason(failed)}"
    return problem


def _first_flight(suite: bytes, ders: Tuple[bytes, ...]) -> bytes:
    """Return the TLS records of a ServerHello for that suite (empty renegotiation_info, RFC 5746) and of a Certificate message."""
    hello = b"\x03\x03" + bytes(32) + b"\0" + suite + b"\0" + b"\x00\x05" + b"\xff\x01\x00\x01\x00"
    listed = b"".join(_vector(der) for der in ders)
    messages = b"\x02" + _vector(hello) + b"\x0b" + _vector(_vector(listed))
    parts = [messages[at : at + MAX_RECORD_BYTES] for at in range(0, len(messages), MAX_RECORD_BYTES)]
    return b"".join(b"\x16\x03\x03" + len(part).to_bytes(2, "big") + part for part in parts)


def _vector(data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + data


def _client_context(anchors: Tuple[bytes, ...]) -> ssl.SSLContext:
    """Return a client that trusts `anchors` and nothing else. Raises ssl.SSLError where OpenSSL does not take them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
    context.hostname_checks_common_name = True
    if anchors:
        context.load_verify_locations(cadata=b"".join(anchors))
    return context


def _handshake(server_context: ssl.SSLContext, client_context: ssl.SSLContext, fqdn: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=fqdn)
    for _ in range(MAX_HANDSHAKE_ROUNDS):
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
            return
        with suppress(ssl.SSLWantReadError):
            server.do_handshake()
    raise ssl.SSLError("it did not end")


def _reason(problem: ssl.SSLError) -> str:
    return str(problem.reason or problem.args[-1])


def probe(port: int) -> Served:
    """Look at what this host's port serves."""
    listening, der, problem = idle.probe(port, _shake)
    return Served(listening, hashlib.sha256(der).hexdigest() if der else "", problem, der)


def _shake(plain: Any) -> Optional[bytes]:
    """Do a handshake and close it; return the leaf.

    Old protocols and ciphers are allowed, because it looks and does not trust. The server never answers close_notify, so the
    end of `unwrap` is an error that means nothing; without it the agent's log gets one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with suppress(ssl.SSLError, ValueError):
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.socket(plain.family, plain.type, fileno=plain.detach()) as held:
        held.settimeout(idle.CONNECT_S)
        with context.wrap_socket(held) as connection:
            der = connection.getpeercert(binary_form=True)
            with suppress(OSError, ValueError):
                connection.settimeout(idle.CLOSE_S)
                connection.unwrap()
    return der


def await_leaf(
    port: int,
    leaf: str,
    process: Callable[[], str],
    patience: Patience,
    waiting: Callable[[str], None],
    stale: Callable[[], bool] = lambda: False,
) -> Served:
    """Look until `leaf` (SHA-256) is served, or until waiting makes no sense any more; returns what was seen last.

    `process` tells the state of the agent's process. The end comes early where none ran for `gone_s`. `stale`: the process
    is the one that was to be restarted, and may be about to end: what it serves counts only if it goes on to the end; where it is
    something else, it has `gone_s` for that.
    """
    end = time.monotonic() + patience.listener_s
    alive_at = began = time.monotonic()
    while True:
        seen = probe(port)
        now = time.monotonic()
        if seen.listening or process() == "running":
            alive_at = now
        old = stale()
        if (seen.leaf == leaf and not old) or now >= min(end, (began if old and seen.leaf != leaf else alive_at) + patience.gone_s):
            return seen
        waiting(f"waiting for the agent to serve {leaf[:16]} on port {port}")
        time.sleep(patience.poll_s)


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot, 0 if it has ended (proc_pid_stat(5), fields 3 and 22)."""
    try:
        fields = Root("/").read(f"/proc/{pid}/stat", idle.MAX_STAT_BYTES).rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, HostError, ValueError, IndexError):
        return 0


def await_end(pid: int, started: int, patience: Patience, waiting: Callable[[str], None], *, unit: bool = False) -> None:
    """Wait until a control command that an earlier run started has ended. Raises AgentNotReady if it does not.

    `unit`: it may have been started as a unit of its own, which goes on when the process that waits for it was killed.
    """
    end = time.monotonic() + patience.command_s
    name = f"process {pid}" if pid else systemd.CONTROL
    look = f"systemctl status '{systemd.CONTROL}'" if unit else f"ps -fp {pid}"
    while (pid and started and start_time(pid) == started) or (unit and systemd.control_is_running()):
        if time.monotonic() >= end:
            raise AgentNotReady(
                f"the control command of an earlier run still works after {patience.command_s:.0f} s, {name}",
                f"look at what it does ({look}), then run again",
            )
        waiting(f"waiting for the control command of an earlier run, {name}")
        time.sleep(patience.poll_s)


def check_tool(root: Root, path: str) -> None:
    """Raise AgentNotReady where one of the agent's tools is missing, or could have been changed by somebody else.

    Raises HostError where it could not be started as a unit of its own.
    """
    if systemd.manages(root.path):
        systemd.check()
    found = root.resolve(path)
    if found.kind != "file":
        raise AgentNotReady(f"the agent's control command {path} is missing", "repair the agent's installation (package scx)")
    if found.uid not in (0, os.geteuid()) or found.mode & 0o022:
        raise AgentNotReady(
            f"the agent's control command {path} may be written by others: mode {found.mode:04o}",
            f"look at who changed it, then: chown root {path} && chmod 0755 {path}",
        )


def control(root: Root, command: Tuple[str, ...], patience: Patience, started: Callable[[int, int], None]) -> str:
    """Run one of the agent's tools and wait for it, bounded; returns its output, for a person to read.

    `command[0]` is a path beneath the root. `started(pid, start time)` is called while it runs. Its exit status is part
    of the text only. Output goes to a file in memory, because the agent that it starts inherits it and would keep a
    pipe open for ever; where the command runs as a unit of its own, to the system's journal. Raises AgentNotReady where it
    can't be started or doesn't end.
    """
    check_tool(root, command[0])
    unit = systemd.new_unit() if systemd.manages(root.path) else ""
    line: Tuple[str, ...] = (root.host_path(command[0]), *command[1:])
    if unit:
        line = systemd.as_unit(unit, line, patience.command_s + REPRIEVE_S)
    output = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        try:
            child = subprocess.Popen(  # noqa: S603 -- the agent's own tool, its owner and mode checked above
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=systemd.ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as problem:
            raise AgentNotReady(
                f"the agent's control command {command[0]} can't be started: {problem.strerror}",
                "repair the agent's installation (package scx)",
            ) from problem
        try:
            started(child.pid, start_time(child.pid))
        except HostError:
            _wait(child, command, patience, unit)  # what could not be recorded must not run on
            raise
        status = _wait(child, command, patience, unit)
        fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)  # an agent that goes on writing there must not fill the memory
        raw = os.pread(output, MAX_OUTPUT_BYTES, 0).decode("utf-8", "replace")
        said = "".join(letter if letter.isprintable() else " " for letter in raw)
    finally:
        os.close(output)
    if unit:
        said += f" (journalctl -u {unit})"
    return "; ".join(filter(None, (f"{' '.join(command)}: exit status {status}", " ".join(said.split()))))


def _wait(child: "subprocess.Popen[bytes]", command: Tuple[str, ...], patience: Patience, unit: str) -> Optional[int]:
    """Only the command itself is killed when it hangs, not its session: the agent may be in there."""
    try:
        return child.wait(patience.command_s)
    except subprocess.TimeoutExpired:
        child.kill()
        if unit:
            systemd.end_control(unit)
        child.wait()
        raise AgentNotReady(
            f"{' '.join(command)} did not end within {patience.command_s:.0f} s",
            "look at the agent's processes and log, then run again",
        ) from None
