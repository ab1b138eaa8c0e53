"""What this host is called: as configured, or as the host itself says, once."""

import socket
from typing import Optional

from scx_enroll import journal as j
from scx_enroll import machine, request, verify
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, ConfigError, UsageError
from scx_enroll.rootfs import Root

MAX_HOSTNAME_BYTES = 4096


def short_name(root: Root) -> str:
    """Return the host name of the root: this host's, or what a tree's /etc/hostname says."""
    if root.path != "/":
        try:
            return root.read("/etc/hostname", MAX_HOSTNAME_BYTES).decode("ascii", "replace").strip()
        except FileNotFoundError:
            pass
    return socket.gethostname() if root.live else ""


def names_itself(config: Config) -> bool:
    """Say whether the host's own name is part of the name that the certificate shall have."""
    return config.host.name == "auto" or request.SHORT_NAME in config.host.name


def latched(config: Config, journal: j.Journal) -> Optional[j.Latch]:
    """Return the name that the host gave itself at the first success, by the same `name` in [host]."""
    return journal.latch if journal.latch and journal.latch.rule == config.host.name else None


def host_fqdn(root: Root, config: Config, journal: j.Journal, installed: Optional[verify.Facts]) -> str:
    """Return the FQDN that the certificate shall name.

    What the host says itself is asked once: the name latched at the first success stays, and the one in an open request. Raises
    ConfigError for a name that can't be used, and where `auto` contradicts a certificate that SCOM or a CA signed.
    """
    latch, rule = latched(config, journal), config.host.name
    if latch:
        return latch.fqdn
    if names_itself(config) and journal.request.rule == rule:
        return journal.request.names[0]
    fqdn = fresh(root, config).fqdn
    if rule == "auto" and installed and installed.issuer != installed.subject and fqdn not in installed.names:
        raise ConfigError(
            f"name = auto gives {fqdn}, but the agent's certificate names {', '.join(installed.names) or 'nothing'}",
            "set name in [host] to the one that the Management Server connects to",
        )
    return fqdn


def fresh(root: Root, config: Config) -> j.Latch:
    """Return the name that counts now, whatever was latched. Raises ConfigError, AgentNotReady."""
    short, rule = short_name(root), config.host.name
    if rule != "auto":
        return j.Latch(short, request.expand(rule, short), rule)
    if not root.live:
        raise ConfigError("name = auto can't be told for another root", "set name in [host] to an FQDN or {hostname}.…")
    said = sorted({_resolved(short) for _ in range(2)})  # servers that disagree answer in turn
    if len(said) > 1:
        hint = "see that it gives one answer, or set name in [host]"
        raise AgentNotReady(f"name = auto: the resolver calls {short} both {' and '.join(said)}", hint)
    return j.Latch(short, said[0], rule)


def _resolved(short: str) -> str:
    try:
        answers = socket.getaddrinfo(short, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except OSError as problem:
        if problem.errno == socket.EAI_AGAIN:  # early in a boot, say
            raise AgentNotReady(f"name = auto: the resolver can't tell {short}'s full name now: {problem}", "run again later") from problem
        raise ConfigError(
            f"name = auto: the resolver does not know this host's name {short}: {problem}",
            "set name in [host] to the FQDN that the Management Server connects to",
        ) from problem
    return request.check_fqdn(next((answer[3] for answer in answers if answer[3]), short), "name = auto")


def accepted(root: Root, config: Config) -> j.Latch:
    """Return the name that `--accept-name` takes. Raises UsageError where the host is told its name, and as `fresh`."""
    if not names_itself(config):
        raise UsageError(
            f"--accept-name is for hosts that name themselves, but [host] says name = {config.host.name}",
            "to change that name, change it there, then: scx-enroll run",
        )
    return fresh(root, config)


def renamed(root: Root, config: Config, journal: j.Journal) -> str:
    """Say that the host was renamed since its name was latched, and what to do; "" where it was not."""
    latch, short = latched(config, journal), short_name(root)
    if latch is None or machine.same_name(latch.host, short) or not machine.host_name(short):
        return ""
    return (
        f"this host was renamed from {latch.host} to {short}; its certificate goes on naming {latch.fqdn}, which SCOM asks for; "
        "once SCOM knows the new name: scx-enroll run --accept-name"
    )
