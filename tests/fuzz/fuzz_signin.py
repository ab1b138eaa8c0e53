"""Fuzz target: any bytes as a server's certificate, challenge and token, and as a keytab. With atheris coverage-guided, without it a loop.

python -m tests.fuzz.fuzz_signin [SECONDS]
"""

import contextlib
import random
import struct
import time

from scx_enroll import binding, challenges, keytab, spnego

from . import loop

ENTRY = b"\0\1\0\1R\0\6HOST1$\0\0\0\1\0\0\0\0\2\0\x12\0\x20" + b"k" * 32 + b"\0\0\0\2"
SEEDS = (
    b"\x05\x02" + 2 * (struct.pack(">i", len(ENTRY)) + ENTRY) + struct.pack(">i", -4) + b"hole",
    bytes.fromhex("a1143012a0030a0100a10b06092a864886f712010202"),
    bytes.fromhex("30213003020101301506092a864886f70d01010a3008a0063004060006000303000000"),
    b'Negotiate oYG2MIGzoAMKAQ==, NTLM, Basic realm="ca, \\" x", Digest qop = "auth", charset=UTF-8',
)
MAX_SECONDS = 1.0  # for what fits into the headers of an answer, or into a keytab at its limit


def one(data: bytes) -> None:
    """Read it as everything: a result or a documented refusal, in bounded time."""
    started = time.process_time()
    with contextlib.suppress(binding.Unbindable):
        binding.end_point(data)
    spnego.answer(data)
    header = data.decode("latin-1")
    assert all(len(scheme) <= 32 for scheme in challenges.schemes(header))
    challenges.token(header, "Negotiate")
    try:
        keytab.machine(keytab.parse(data), "", "host1")
    except keytab.Unusable as problem:
        assert str(problem).isprintable()
        assert len(str(problem)) < 500
    assert time.process_time() - started < MAX_SECONDS


def mutated(chance: random.Random) -> bytes:
    """Return a seed with a few pieces changed."""
    return loop.spliced(chance, SEEDS, 1 << 16)


if __name__ == "__main__":
    loop.run(one, mutated, "inputs read")
