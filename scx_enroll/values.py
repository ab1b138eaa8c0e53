"""What one value of the configuration may be: each reader returns what it means, or raises ValueError saying what it is not."""

import re
from fractions import Fraction
from typing import Callable, Tuple

from scx_enroll.request import CURVES, SHORT_NAME, check_dns_name, check_fqdn

MAX_SETTLE_S = 30 * 60  # longer, and a busy host would never be served
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 16384  # what SCOM takes, and what OpenSSL does (OPENSSL_RSA_MAX_MODULUS_BITS)


def choice(*known: str) -> Callable[[str], str]:
    """Return the reader of one of these words."""
    return shaped("|".join(map(re.escape, known)), f"one of {', '.join(known)}")


def shaped(pattern: str, meaning: str) -> Callable[[str], str]:
    """Return the reader of what the pattern matches."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"is not {meaning}")
        return text

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """Return the reader of a number of that range."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"is not a number from {low} to {high}")
        return int(text)

    return parse


def fraction(text: str) -> Fraction:
    """Read a fraction of 1. Raises ValueError."""
    if not re.fullmatch("[0-9]{1,4}(/[1-9][0-9]{0,3}|[.][0-9]{1,4})?", text, re.ASCII) or Fraction(text) > 1:
        raise ValueError("is not a fraction of 1 such as 2/3")
    return Fraction(text)


def duration(text: str) -> int:
    """Read a time, in seconds. Raises ValueError."""
    shape = re.fullmatch("([0-9]{1,6})([smh])", text, re.ASCII)
    value = int(shape[1]) * {"s": 1, "m": 60, "h": 3600}[shape[2]] if shape else -1
    if not 0 <= value <= MAX_SETTLE_S:
        raise ValueError(f"is not a time such as 30s or 2m, of at most {MAX_SETTLE_S // 60}m")
    return value


def windows(text: str) -> Tuple[Tuple[int, int], ...]:
    """Read ranges of the day, separated by blanks or commas: from and to, in minutes; one may span midnight. Raises ValueError."""
    found = []
    for part in re.split("[ ,]+", text):
        shape = re.fullmatch("([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|24:00)", part, re.ASCII)
        start, end = (int(shape[1]) * 60 + int(shape[2]), int(shape[3] or 24) * 60 + int(shape[4] or 0)) if shape else (0, 0)
        if start == end:
            raise ValueError("is not a range of the day such as 02:00-05:00, or several such ranges")
        found.append((start, end))
    return tuple(found)


def flag(text: str) -> bool:
    """Read yes or no. Raises ValueError."""
    return choice("yes", "no")(text) == "yes"


def port(text: str) -> int:
    """Read a port, 0 for auto. Raises ValueError."""
    return 0 if text == "auto" else count(1, 65535)(text)


def host_name(text: str) -> str:
    """Read auto, an FQDN, or a pattern with {hostname}. Raises ValueError, or ConfigError with the reason."""
    if text == "auto":
        return text
    sample = text.replace(SHORT_NAME, "h", 1)
    checked = check_fqdn(sample, "it")  # with the real name it is checked again
    return checked if sample == text else text.lower()


def dns_names(text: str) -> Tuple[str, ...]:
    """Read DNS names, separated by blanks. Raises ValueError, or ConfigError with the reason."""
    return tuple(check_dns_name(name, "it") for name in text.split())


def server(text: str) -> str:
    """Read host or host:port. Raises ValueError."""
    shape = re.fullmatch("(?!-)[a-z0-9-]{1,63}(?:[.][a-z0-9-]{1,63}){0,126}(?::([0-9]{1,5}))?", text.lower(), re.ASCII)
    if not shape or not 1 <= int(shape[1] or 443) <= 65535:
        raise ValueError("is not host or host:port: give no scheme and no path, HTTPS is always used")
    return text.lower()


def key_kind(text: str) -> str:
    """Read a kind of key, such as rsa:3072. Raises ValueError."""
    kind, _, detail = text.partition(":")
    if kind == "rsa":
        if not re.fullmatch("[0-9]{1,5}", detail, re.ASCII) or not MIN_RSA_BITS <= int(detail) <= MAX_RSA_BITS:
            raise ValueError(f"is not rsa: and a number of bits from {MIN_RSA_BITS} to {MAX_RSA_BITS}")
    elif kind != "ec" or detail not in CURVES:
        raise ValueError(f"is not rsa:BITS or one of {', '.join(f'ec:{curve}' for curve in CURVES)}")
    return text


anything = shaped(r".{1,256}", "shorter than 257 characters")
path = shaped(r"/(?!.*(^|/)\.\.(/|$)).{1,1023}", "an absolute path without ..")
