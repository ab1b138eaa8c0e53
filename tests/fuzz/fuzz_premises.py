"""Fuzz target: any bytes as the premises of an idle run, in a loop of mutations of some that hold.

python -m tests.fuzz.fuzz_premises [SECONDS]
"""

import base64
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from scx_enroll import idle

STATUS = "run/scx-enroll"
WORDS = (b"null", b"true", b"-1", b"1e999", b"[]", b"{}", b'""', b'"/"', b'"\\udc80"', b"[[[[", b"99999999999999999999", b"NaN")


def good(base: Path) -> bytes:
    """Return premises that hold in the tree `base`, whose folders are made."""
    for folder in ("var/lib/scx-enroll", "run/scx-enroll"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    return json.dumps({
        "here": idle.here(str(base), "", live=False), "at": 0, "until": 10**10, "looked": {str(base / STATUS): idle.stands(str(base / STATUS))},
        "listed": {}, "locks": [], "port": 0, "listening": False, "served": "", "folder": str(base / STATUS), "exit_status": 0,
        "quiet_status": 0, "text": "nothing to do\n", "document": ['{\n "time": ', "\n}\n"],
    }).encode()


def one(base: Path, data: bytes) -> None:
    """Answer a run: a status or a miss, and the status file is whole; nothing beside it is written."""
    good(base)
    path = base / "var/lib/scx-enroll/premises.json"
    path.write_bytes(data)
    path.chmod(0o600)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        answer = idle.answer(["run", "--root", str(base)])
    assert answer is None or type(answer) is int
    assert {found.name for found in (base / "run/scx-enroll").iterdir()} <= {"status.json"}


def mutated(chance: random.Random, seed: bytes) -> bytes:
    """Return the seed with a few pieces changed, cut, doubled or replaced by a word of JSON."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(data) + 1)
        end = min(begin + chance.choice((0, 1, 4, 40)), len(data))
        data[begin:end] = chance.choice((b"", bytes([chance.randrange(256)]), bytes(data[begin:end]) * 2, chance.choice(WORDS)))
    return bytes(data)


def main() -> None:
    """Fuzz for the given number of seconds (60)."""
    chance, until, count = random.Random(), time.monotonic() + float((sys.argv[1:] or ["60"])[0]), 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        seed = good(base)
        while time.monotonic() < until:
            data = mutated(chance, seed)
            try:
                one(base, data)
            except BaseException:
                print(base64.b64encode(data).decode())
                raise
            count += 1
    print(f"{count} premises checked")


if __name__ == "__main__":
    main()
