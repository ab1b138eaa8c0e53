"""Looks for secrets in whatever a program left behind, in every spelling in which they could show."""

import base64
import binascii
import html
import json
import os
import struct
from urllib.parse import quote, quote_plus

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

MIN_BYTES = 8  # what is shorter occurs by chance
PIECE_BYTES = 20  # of a key or a ticket: two of them side by side can't both be split by the line breaks of PEM


def spellings(secret):
    """Every way to write a secret (bytes), by its name; text is written as text, too."""
    text = secret.decode("utf-8", "ignore") if _is_text(secret) else None
    forms = {"raw": secret}
    if text is not None:
        forms.update({
            "utf-16le": text.encode("utf-16-le"), "utf-16be": text.encode("utf-16-be"), "latin-1": text.encode("latin-1", "replace"),
            "cp1252": text.encode("cp1252", "replace"), "lower": text.lower().encode(), "upper": text.upper().encode(),
            "repr": repr(text)[1:-1].encode(), "json": json.dumps(text)[1:-1].encode(), "json-utf8": json.dumps(text, ensure_ascii=False)[1:-1].encode(),
            "twice": json.dumps(json.dumps(text))[3:-3].encode(), "ascii": ascii(text)[1:-1].encode(), "html": html.escape(text).encode(),
            "backslashes": text.encode("ascii", "backslashreplace"), "characters-reversed": text[::-1].encode(),
        })  # fmt: skip
    found = dict(forms)
    for name in ("raw", "utf-16le", "latin-1"):
        if name in forms:
            data = forms[name]
            found.update({f"{name} {form}": spelled for form, spelled in _coded(data).items()})
    return {name: spelled for name, spelled in found.items() if len(spelled) >= MIN_BYTES}


def _is_text(secret):
    try:
        return secret.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _coded(data):
    hexed = binascii.hexlify(data)
    colons = b":".join(hexed[at : at + 2] for at in range(0, len(hexed), 2))
    forms = {
        "hex": hexed, "HEX": hexed.upper(), "hex with colons": colons, "HEX with colons": colons.upper(), "hex with blanks": colons.replace(b":", b" "),
        "\\x": b"".join(b"\\x%02x" % byte for byte in data), "repr": repr(data)[2:-1].encode(), "percent": quote(data).encode(), "plus": quote_plus(data).encode(),
        "percent, all": b"".join(b"%%%02X" % byte for byte in data), "reversed": data[::-1], "reversed hex": binascii.hexlify(data[::-1]),
    }  # fmt: skip
    forms["percent in lower case"] = b"".join(part.lower() if part.startswith(b"%") else part for part in _percents(forms["percent"]))
    for shift in range(3):  # what stands before it decides on which of three ways it is written
        whole = base64.b64encode(bytes(shift) + data)
        inner = whole[[0, 2, 3][shift] : len(whole) - [0, 3, 2][(shift + len(data)) % 3]]
        forms[f"base64 {shift}"] = inner
        forms[f"url-safe base64 {shift}"] = inner.translate(bytes.maketrans(b"+/", b"-_"))
        forms[f"percent of base64 {shift}"] = quote(inner, safe="").encode()
    return forms


def _percents(text):
    parts, at = [], 0
    while at < len(text):
        size = 3 if text[at : at + 1] == b"%" else 1
        parts.append(text[at : at + size])
        at += size
    return parts


class Hunter:
    """Knows secrets by name, and finds them."""

    def __init__(self):
        self.needles = {}

    def add(self, name, *secrets):
        """Know these, as bytes, too."""
        for secret in secrets:
            for form, spelled in spellings(secret).items():
                self.needles.setdefault(spelled, f"{name}, {form}")
        return self

    def add_pieces(self, name, data, count=4):
        """Know a long one by pairs of pieces side by side, spread over it."""
        pair = 2 * PIECE_BYTES
        if len(data) < 2 * pair:
            return self.add(name, *(data[at : at + PIECE_BYTES // 2] for at in range(0, len(data) - PIECE_BYTES // 2 + 1, PIECE_BYTES // 2)))
        step = max(1, (len(data) - pair) // max(1, count // 2))
        starts = list(range(step // 2, len(data) - pair + 1, step))[: count // 2]
        return self.add(name, *(data[at + half : at + half + PIECE_BYTES] for at in starts for half in (0, PIECE_BYTES)))

    def add_key(self, name, pem):
        """Know a private key by its numbers."""
        key = load_pem_private_key(pem, None)
        numbers = key.private_numbers()
        if isinstance(key, rsa.RSAPrivateKey):
            secret = {"d": numbers.d, "p": numbers.p, "q": numbers.q, "dmp1": numbers.dmp1}
        else:
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            secret = {"d": numbers.private_value}
        for part, number in secret.items():
            self.add_pieces(f"{name}, {part}", number.to_bytes((number.bit_length() + 7) // 8, "big"))
            self.add(f"{name}, {part} in decimal", str(number)[:60].encode())
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        inner = number_at(der, secret["d"])
        lines = [line for line in pem.splitlines() if not line.startswith(b"-----")]
        private = [line for at, line in enumerate(lines) if at * 48 <= inner[1] and (at + 1) * 48 > inner[0]]
        return self.add(f"{name}, a line of it", *private[1:3] or private[:1])

    def find(self, data):
        """Return the names of what is in these bytes."""
        return sorted({name for needle, name in self.needles.items() if needle in data})

    def find_in_files(self, *folders, but=()):
        """Return the same for every file below, names and targets of links with it, but for those that hold the secrets by right."""
        found = {}
        passed = {os.path.realpath(path) for path in but}
        for folder in folders:
            for where, names, files in os.walk(folder):
                names[:] = [name for name in names if os.path.realpath(os.path.join(where, name)) not in passed]
                for name in (*names, *files):
                    path = os.path.join(where, name)
                    shown = os.fsencode(name) + (os.fsencode(os.readlink(path)) if os.path.islink(path) else b"")
                    if os.path.isfile(path) and not os.path.islink(path) and os.path.realpath(path) not in passed:
                        with open(path, "rb") as file:
                            shown += b"\0" + file.read()
                    if self.find(shown):
                        found[path] = self.find(shown)
        return found


def number_at(der, number):
    """Where a number stands in DER."""
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    at = der.index(data)
    return at, at + len(data)


def keys_of(keytab):
    """The keys themselves of a keytab (MIT's version 2)."""
    at, keys = 2, []
    while at + 4 <= len(keytab):
        (size,) = struct.unpack_from(">i", keytab, at)
        record = keytab[at + 4 : at + 4 + size]
        at += 4 + abs(size)
        (count,), inner = struct.unpack_from(">H", record), 2
        for _ in range(count + 1):
            inner += 2 + struct.unpack_from(">H", record, inner)[0]
        inner += 4 + 4 + 1 + 2  # type of the name, time, version, type of the key
        (length,) = struct.unpack_from(">H", record, inner)
        keys.append(record[inner + 2 : inner + 2 + length])
    return keys


def md4(data):
    """RFC 1320, which OpenSSL 3 has no more."""

    def turn(value, count):
        value &= 0xFFFFFFFF
        return (value << count | value >> (32 - count)) & 0xFFFFFFFF

    rounds = (
        (lambda x, y, z: x & y | ~x & z, 0, list(range(16)), (3, 7, 11, 19)),
        (lambda x, y, z: x & y | x & z | y & z, 0x5A827999, [at % 4 * 4 + at // 4 for at in range(16)], (3, 5, 9, 13)),
        (lambda x, y, z: x ^ y ^ z, 0x6ED9EBA1, [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15], (3, 9, 11, 15)),
    )
    padded = data + b"\x80" + bytes((55 - len(data)) % 64) + struct.pack("<Q", 8 * len(data))
    state = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
    for block in range(0, len(padded), 64):
        words = struct.unpack_from("<16I", padded, block)
        a, b, c, d = state
        for mix, constant, order, shifts in rounds:
            for at, index in enumerate(order):
                a, b, c, d = d, turn(a + mix(b, c, d) + words[index] + constant, shifts[at % 4]), b, c
        state = tuple((old + new) & 0xFFFFFFFF for old, new in zip(state, (a, b, c, d)))
    return struct.pack("<4I", *state)
