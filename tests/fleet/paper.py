"""Certificates of paper, in place of `verify`: one line of text says what the program wants to know of one.

Signing half a million certificates takes a day; nothing that is simulated depends on a signature.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Iterator, Tuple
from unittest.mock import patch

from scx_enroll import acquire, observe, places
from scx_enroll.verify import Facts, Mismatch

ROOT = b"root"


def made(serial: int, not_before: int, not_after: int, spki: str, name: str) -> bytes:
    """Return a certificate; `serial` is no other's of any CA, since it stands for the fingerprint too."""
    return f"{serial:016x} {not_before} {not_after} {spki} {name}".encode()


@lru_cache(maxsize=4096)
def facts(der: bytes) -> Facts:
    serial, not_before, not_after, spki, name = der.decode().split()
    return Facts(name, "ca", serial, int(not_before), int(not_after), serial, spki, (name,), "ec:secp256r1")


def read(data: bytes) -> Tuple[bytes, ...]:
    return (data,) if data else ()


def pem(der: bytes) -> bytes:
    return der


def chain(_leaf: bytes, _pool: Any) -> Tuple[bytes, ...]:
    return ()


def leads_to(_certificates: Any, _anchors: Any) -> bool:
    return True


def judge(der: bytes, name: str, now: int) -> Tuple[Mismatch, ...]:
    """What can be wrong with one: another name, or its dates."""
    found = facts(der)
    wrong = [Mismatch("san", f"it names {found.names[0]}", "")] if found.names != (name,) else []
    if not found.not_before <= now < found.not_after:
        wrong.append(Mismatch("dates", "it is not valid now", ""))
    return tuple(wrong)


@contextmanager
def in_use() -> Iterator[None]:
    """While this lasts, the program takes these for certificates."""
    stand_in = sys.modules[__name__]
    with patch.object(acquire, "verify", stand_in), patch.object(observe, "verify", stand_in), \
            patch.object(places, "verify", stand_in), patch.object(observe, "trust", lambda _root, _ca: ((ROOT,), ())):
        yield
