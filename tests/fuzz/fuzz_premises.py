"""Fuzz target: any bytes as the premises of an idle run, in a loop of mutations of some that hold.

python -m tests.fuzz.fuzz_premises [SECONDS]
"""

import contextlib
import io
import random
import tempfile
from functools import partial
from pathlib import Path

from scx_enroll import idle

from . import loop

STATUS = "run/scx-enroll"
WORDS = (b"\0", b"\n", b" ", b"looked ", b"listed ", b"unlocked ", b"port ", b"/", b"-1", b"9" * 5000, b"\xff", b"[]")


def good(base: Path) -> bytes:
    """Return premises that hold in the tree `base`, whose folders are made."""
    for folder in ("var/lib/scx-enroll", STATUS):
        (base / folder).mkdir(parents=True, exist_ok=True)
    folder = str(base / STATUS)
    parts = (
        idle.here(str(base), "", live=False), 0, 10**10, folder, 0, 0, f"looked {idle.stands(folder)} {folder}\nunlocked free {__file__}",
        "nothing to do\n", '{\n "time": ', "\n}\n",
    )
    return "\0".join(map(str, parts)).encode()


def one(base: Path, data: bytes) -> None:
    """Answer a run: a status or a miss, and the status file is whole; nothing beside it is written."""
    good(base)
    path = base / "var/lib/scx-enroll/premises"
    path.write_bytes(data)
    path.chmod(0o600)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        answer = idle.answer(["run", "--root", str(base)])
    assert answer is None or type(answer) is int
    assert {found.name for found in (base / "run/scx-enroll").iterdir()} <= {"status.json"}


def mutated(chance: random.Random, seed: bytes) -> bytes:
    """Return the seed with a few pieces changed, cut, doubled or replaced by a word of theirs."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(data) + 1)
        end = min(begin + chance.choice((0, 1, 4, 40)), len(data))
        data[begin:end] = chance.choice((b"", bytes([chance.randrange(256)]), bytes(data[begin:end]) * 2, chance.choice(WORDS)))
    return bytes(data)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        seed = good(base)
        loop.run(partial(one, base), lambda chance: mutated(chance, seed), "premises checked", guided=False)
