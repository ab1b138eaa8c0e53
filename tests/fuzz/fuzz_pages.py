"""Fuzz target: any bytes as a page. With atheris coverage-guided, without it a plain loop of mutations.

python -m tests.fuzz.fuzz_pages [SECONDS]
"""

import random
import time

from scx_enroll import pages

from . import loop

SEEDS = (
    b"<HTML><P ID=locInfoReqID>\r\nYour Request Id is 89.\r\n</P> <P ID=locTimeoutWarning> 10 days </P></HTML>",
    b'<HTML><P ID=locDenied></P><P ID=locInfoReqIDandReason>Your Request Id is 85. "0x80094012, text" </P></HTML>',
    b'<HTML><A Href="certnew.cer?ReqID=83&amp;Enc=b64">b</A><Script>var nRenewals=3;</Script></HTML>',
    b"<HTML>Disposition:\t\t5<LocID ID=locDispSpacer> - </LocID>LastStatus:</B>\t\ttext 0x0 (WIN32: 0)</HTML>",
)
MAX_SECONDS_PER_MIB = 5.0  # a linear reading takes about one


def one(data: bytes) -> None:
    """Read one page: no exception, a bounded skeleton, time in proportion to the size."""
    started = time.process_time()
    outcome = pages.classify(data)
    pages.renewals(data)
    took = time.process_time() - started
    assert took < 0.5 + MAX_SECONDS_PER_MIB * len(data) / (1 << 20), f"{took} s for {len(data)} bytes"
    if isinstance(outcome, pages.Unknown):
        assert len(outcome.skeleton) <= pages.MAX_SKELETON_CHARS


def mutated(chance: random.Random) -> bytes:
    """Return a seed with a few pieces changed."""
    return loop.spliced(chance, SEEDS, 1 << 20, times=500)


if __name__ == "__main__":
    loop.run(one, mutated, "pages read")
