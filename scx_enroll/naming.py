"""What this host is called: as configured, or as its resolver says, once."""

import socket
from typing import Optional

from scx_enroll import journal as j
from scx_enroll import request, verify
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, ConfigError
from scx_enroll.rootfs import Root

MAX_HOSTNAME_BYTES = 4096


def short_name(root: Root) -> str:
    """Return the host name of the root: this host's, or what an image's /etc/hostname says."""
    if root.live:
        return socket.gethostname()
    try:
        return root.read("/etc/hostname", MAX_HOSTNAME_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""


def host_fqdn(root: Root, config: Config, latch: Optional[j.Latch], installed: Optional[verify.Facts]) -> str:
    """Return the FQDN that the certificate shall name.

    `auto` takes the resolver's canonical name, once: the name latched at the first success stays. Raises ConfigError for
    a name that can't be used, and where `auto` contradicts a certificate that SCOM or a CA signed.
    """
    if config.host.name != "auto":
        return request.expand(config.host.name, short_name(root))
    if latch:
        return latch.fqdn
    if not root.live:
        raise ConfigError("name = auto can't be told for another root", "set name in [host] to an FQDN or {hostname}.…")
    short = short_name(root)
    try:
        answers = socket.getaddrinfo(short, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except OSError as problem:
        if problem.errno == socket.EAI_AGAIN:  # early in a boot, say
            raise AgentNotReady(f"name = auto: the resolver can't tell {short}'s full name now: {problem}", "run again later") from problem
        raise ConfigError(
            f"name = auto: the resolver does not know this host's name {short}: {problem}",
            "set name in [host] to the FQDN that the Management Server connects to",
        ) from problem
    fqdn = request.check_fqdn(next((answer[3] for answer in answers if answer[3]), short), "name = auto")
    if installed and installed.issuer != installed.subject and fqdn not in installed.names:
        raise ConfigError(
            f"name = auto gives {fqdn}, but the agent's certificate names {', '.join(installed.names) or 'nothing'}",
            "set name in [host] to the one that the Management Server connects to",
        )
    return fqdn
