"""Places whose clocks are put forward or back when a test needs it: as POSIX has them (tzset(3)), and as /etc/localtime (RFC 8536)."""

import struct
import time

DAY_MIN = 24 * 60


def place(jump: int, wall: int, by: int = 60) -> str:
    """Return the TZ of a place where it is `wall` (minutes of the day) at `jump`, and the clock is put forward then; back where `by` is negative."""
    if jump % 60 or abs(by) != 60:
        raise ValueError((jump, by))
    before = (wall - jump // 60 + DAY_MIN // 2) % DAY_MIN - DAY_MIN // 2
    standard = before if by > 0 else before - 60
    day = time.gmtime(jump + before * 60).tm_yday - 1
    there, back = f"{day}/{wall // 60}:{wall % 60:02}", f"{(day + 90) % 365}/2"
    start, end = (there, back) if by > 0 else (f"{(day + 275) % 365}/2", there)
    return f"LAB{'-' if standard > 0 else '+'}{abs(standard) // 60}:{abs(standard) % 60:02}LAD,{start},{end}"


def localtime(rule: str) -> bytes:
    """Return the file of a place that keeps to `rule`; its one transition is of 1970, since the C library takes the rule only after one."""
    parts = []
    for form in ">l", ">q":
        header = b"TZif2" + bytes(15) + struct.pack(">6l", 0, 0, 0, 1, 1, 4)
        parts.append(header + struct.pack(form, 0) + b"\0" + struct.pack(">lBB", 0, 0, 0) + b"LAB\0")
    return b"".join(parts) + f"\n{rule}\n".encode()
