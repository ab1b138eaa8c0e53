"""Reads a Kerberos keytab: whose keys it holds, and which of them is this machine's.

The format is MIT's version 2, as its documentation "Keytab file format" gives it; sssd, adcli, realmd and Samba write it, too.
libkrb5 says "No credentials cache found" for a missing file, an unreadable one and a wrong principal alike (facts/auth.md section 4).
"""

import re
import struct
from dataclasses import dataclass, field
from typing import Dict, Iterator, Tuple

MAX_BYTES = 1 << 20  # a joined host's has 2 kB; one of a server with many services and old keys some ten
VERSION = b"\x05\x02"
AGAIN = "name another file (keytab= in [ca]), or move this one away and have the join make it anew"
MAX_SHOWN = 4  # principals in a message


class Unusable(Exception):
    """The keytab does not serve; why, in words that follow its name, and what to do where joining the domain is not it."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(frozen=True)
class Entry:
    """One key: its principal with the realm, the key version number; the key itself is never shown, and told apart only."""

    principal: str
    kvno: int
    key: bytes = field(default=b"", repr=False)

    @property
    def realm(self) -> str:
        """The realm of the principal."""
        return self.principal.rpartition("@")[2]


def parse(data: bytes) -> Tuple[Entry, ...]:
    """Return what the keytab holds. Raises Unusable for what is no keytab."""
    if data[:2] != VERSION:
        raise Unusable("is no keytab" if data else "is empty", AGAIN)
    try:
        return tuple(_entry(record) for record in _records(data[2:]))
    except (struct.error, UnicodeDecodeError, IndexError):
        raise Unusable("is a damaged keytab", AGAIN) from None


def newest(entries: Tuple[Entry, ...], chosen: Entry) -> bytes:
    """Return what libkrb5 takes the account's key from: its newest keys, of each type of encryption."""
    return b"".join(sorted(one.key for one in entries if (one.principal, one.kvno) == (chosen.principal, chosen.kvno)))


def machine(entries: Tuple[Entry, ...], wanted: str, host: str) -> Entry:
    """Return the newest key of the machine's account: that of `wanted`, with or without realm, or of the one that ends with $.

    Where there are several, that of this host's short name. Raises Unusable.
    """
    latest: Dict[str, Entry] = {}
    for entry in entries:
        if entry.kvno >= latest.get(entry.principal, entry).kvno:
            latest[entry.principal] = entry
    named = [name for name in latest if wanted in (name, name.rpartition("@")[0])]
    machines = [name for name in latest if re.fullmatch(r"[^/@]+\$@[^@]+", name)]
    own = [name for name in machines if name.rpartition("@")[0].lower() == f"{host.partition('.')[0].lower()}$"]
    fit = named if wanted else own or machines
    if len(fit) == 1:
        return latest[fit[0]]
    if fit:
        raise Unusable(f"holds keys of several accounts: {_listed(fit)}", "name the one to use: principal= in [ca]")
    if f"{wanted}$" in (name.rpartition("@")[0] for name in latest):
        raise Unusable(f"holds no key of {wanted}, but of {wanted}$", f"the name of a computer account ends with $: principal = {wanted}$")
    what = f"key of {wanted}" if wanted else "key of a computer account, whose name ends with $"
    raise Unusable(f"holds no {what}, only of {_listed(list(latest))}" if latest else "holds no keys")


def _listed(names: "list[str]") -> str:
    shown = ", ".join("".join(letter if letter.isprintable() else "?" for letter in name[:80]) for name in sorted(names)[:MAX_SHOWN])
    return shown + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")


def _records(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from(">i", data, at)
        if not size:  # what follows the last one is undefined
            return
        at += 4
        if size > 0:  # else a hole, where an entry was removed
            if at + size > len(data):
                raise struct.error
            yield data[at : at + size]
        at += abs(size)


def _entry(record: bytes) -> Entry:
    (count,) = struct.unpack_from(">H", record)
    at, texts = 2, []
    for _ in range(count + 1):  # the realm, then the components of the name
        text, at = _counted(record, at)
        texts.append(re.sub(r"([/@\\])", r"\\\1", text.decode()))
    _name_type, _timestamp, kvno, key_type = struct.unpack_from(">IIBH", record, at)
    key, at = _counted(record, at + 11)
    if len(record) - at >= 4:
        kvno = struct.unpack_from(">I", record, at)[0] or kvno
    realm, *names = texts
    return Entry(f"{'/'.join(names)}@{realm}", kvno, struct.pack(">H", key_type) + key)


def _counted(record: bytes, at: int) -> Tuple[bytes, int]:
    (size,) = struct.unpack_from(">H", record, at)
    end = at + 2 + size
    if end > len(record):
        raise struct.error
    return record[at + 2 : end], end
