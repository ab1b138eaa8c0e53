"""Who we are to the web server: HTTP Basic, with a password that stands in a systemd credential or in a root-only file."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Iterator, Tuple

from scx_enroll.errors import ConfigError, HostError
from scx_enroll.rootfs import Root

if TYPE_CHECKING:
    from requests.auth import AuthBase

    from scx_enroll.config import CA

MAX_PASSWORD_BYTES = 4096  # far beyond Active Directory's 256 characters; a larger file is something else
DEFAULT_PASSWORD_FILE = "/etc/scx-enroll/password"  # noqa: S105 - a path
MARK_ROUNDS = 600_000  # PBKDF2-HMAC-SHA256, OWASP Password Storage Cheat Sheet 2023

# What makes a password unusable, told without showing any of it.
_PROBLEMS = (
    (lambda text: not text, "is empty"),
    (lambda text: "\n" in text or "\r" in text, "holds more than one line"),
    (lambda text: "\0" in text, "holds a NUL"),
    (lambda text: text.startswith("\ufeff"), "begins with a byte order mark"),
)


def authentication(root: Root, ca: CA) -> AuthBase:
    """Return what signs each request to `ca` in, as `requests` takes it.

    User and password go out as UTF-8 (requests would make them Latin-1 and fail on the rest). Raises ConfigError.
    """
    if ca.auth != "basic":
        raise ConfigError(f"auth = {ca.auth} is not available in this version", "set auth = basic in [ca]")
    if not ca.user or ":" in ca.user:
        raise ConfigError("auth = basic needs a user without a colon", "set user in [ca], e.g. CORP\\svc-scx-enroll")
    from requests.auth import HTTPBasicAuth

    return HTTPBasicAuth(ca.user.encode(), _password(root, ca))


def mark(root: Root, ca: CA, salt: bytes) -> str:
    """Return a slow salted hash of user and password (hex): it tells that they changed, and nothing else.

    Raises ConfigError.
    """
    return hashlib.pbkdf2_hmac("sha256", _password(root, ca), salt + ca.user.encode(), MARK_ROUNDS).hex()


def _password(root: Root, ca: CA) -> bytes:
    for tree, path in _places(root, ca):
        try:
            data = tree.read(path, MAX_PASSWORD_BYTES, private=True)
        except FileNotFoundError:
            continue
        except HostError as problem:
            raise ConfigError(problem.message, problem.hint) from problem
        return _checked(path, data)
    where = ca.password_file or DEFAULT_PASSWORD_FILE
    hint = f"write it there: install -m 600 /dev/stdin {where}"
    raise ConfigError(f"there is no password for user {ca.user}: {where} does not exist", hint)


def _places(root: Root, ca: CA) -> Iterator[Tuple[Root, str]]:
    """Yield the places a password may stand, the first that exists counts; credentials only where this host's agent is."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if root.live and credentials.startswith("/"):
        for name in (f"password-{ca.label}", "password") if ca.label else ("password",):
            yield Root("/"), f"{credentials}/{name}"
    yield root, ca.password_file or DEFAULT_PASSWORD_FILE


def _checked(path: str, data: bytes) -> bytes:
    hint = "it must hold the password alone, on one line, in UTF-8"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the password in {path} is not UTF-8", hint) from None
    text = text[:-1] if text[-1:] == "\n" else text
    for applies, problem in _PROBLEMS:
        if applies(text):
            raise ConfigError(f"the password file {path} {problem}", hint)
    return text.encode("utf-8")
