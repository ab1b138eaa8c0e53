"""What the fuzz targets share: the loop, and how a seed is changed."""

import base64
import contextlib
import random
import sys
import time
from typing import Callable, Sequence


def run(one: Callable[[bytes], object], mutated: Callable[[random.Random], bytes], what: str, *, guided: bool = True) -> None:
    """Feed `one` for the given number of seconds (60), or as atheris is told; what makes it fail is printed in base64.

    `what`: the name of what was fed, for the count at the end. `guided`: bytes that atheris makes up are worth feeding, too.
    """
    with contextlib.suppress(ImportError):
        if guided:
            import atheris  # not in the requirements: who fuzzes installs it

            atheris.Setup(sys.argv, one)
            atheris.Fuzz()
    chance, until, count = random.Random(), time.monotonic() + float((sys.argv[1:] or ["60"])[0]), 0
    while time.monotonic() < until:
        data = mutated(chance)
        try:
            one(data)
        except BaseException:
            print(base64.b64encode(data).decode())
            raise
        count += 1
    print(f"{count} {what}")


def spliced(chance: random.Random, seeds: Sequence[bytes], limit: int, *, head: int = 40, times: int = 300) -> bytes:
    """Return a seed of at most `limit` bytes with a few pieces changed, doubled, cut or joined with another seed's.

    `head`: from how far into another seed a piece is taken; `times`: how often one is repeated at the most.
    """
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(8)):
        at, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        piece = bytes(data[at:end])
        other = chance.choice(seeds)[chance.randrange(head) :]
        noise = bytes(chance.randrange(256) for _ in piece)
        data[at:end] = chance.choice((b"", piece * chance.choice((2, 2, times)), other, noise, piece.swapcase()))
        del data[limit:]
    return bytes(data)
