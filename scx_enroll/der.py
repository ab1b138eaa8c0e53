"""DER, as far as certificates' envelopes, channel bindings and tokens need it: nested elements with one-byte tags."""

from typing import Iterator, NamedTuple, Tuple

SEQUENCE, OCTETS, OID = 0x30, 0x04, 0x06


class Element(NamedTuple):
    """Where an element stands: its tag at `at`, its content from `start`, and what follows it at `end`."""

    tag: int
    at: int
    start: int
    end: int


def element(der: bytes, at: int, end: int) -> Element:
    """Return the DER element at `at`; ValueError if it does not fit before `end`."""
    head = der[at : min(at + 6, end)]  # lengths of up to 4 bytes
    long = len(head) > 1 and head[1] >= 0x80
    width = head[1] & 0x7F if long else 0
    start = at + 2 + width
    size = int.from_bytes(head[2 : 2 + width] if long else head[1:2], "big")
    if len(head) < 2 + width or (long and not width) or start + size > end:
        raise ValueError("cut off, or not DER")
    return Element(head[0], at, start, start + size)


def elements(der: bytes, at: int, end: int) -> Iterator[Element]:
    """Yield one element after the other; ValueError as above."""
    while at < end:
        one = element(der, at, end)
        yield one
        at = one.end


def contents(der: bytes) -> Iterator[Tuple[int, bytes]]:
    """Yield tag and content of each element in `der`; ValueError as above."""
    for one in elements(der, 0, len(der)):
        yield one.tag, der[one.start : one.end]


def encoded(tag: int, *parts: bytes) -> bytes:
    """Return one element that holds `parts`."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    long = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 + len(long))) + long + content
