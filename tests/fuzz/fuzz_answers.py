"""Fuzz target: any bytes as the pages of a CA, read by a whole conversation. With atheris coverage-guided, without it a plain loop.

What is fed in is cut at CUT into the answers to certfnsh.asp, certnew.cer, certnew.p7b in either encoding, and certcarc.asp.

python -m tests.fuzz.fuzz_answers [SECONDS]
"""

import base64
import io
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import requests.adapters
import urllib3

from scx_enroll import ca, config, pages, signin, verify
from scx_enroll.rootfs import Root
from tests.lab.authority import Authority, pkcs7, to_pem

from . import loop
from .fuzz_certificate import RULES, SPEC
from .fuzz_pages import SEEDS as PAGES

CUT = b"\x1e\x1e\x1e\x1e"
NAMES = ("certfnsh.asp", "certnew.cer", "certnew.p7b b64", "certnew.p7b bin", "certcarc.asp")
CSR = b"-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----\n"
CHAIN = Authority().chain()
BAG = pkcs7(sorted(CHAIN))
ARMOURED = b"-----BEGIN CERTIFICATE-----\r\n" + base64.encodebytes(BAG).replace(b"\n", b"\r\n") + b"-----END CERTIFICATE-----\r\n"
BODIES = (*PAGES, *CHAIN, to_pem(CHAIN[:1]), to_pem(CHAIN), base64.b64encode(CHAIN[0]), BAG, ARMOURED, b"")
USUAL = (PAGES[2], to_pem(CHAIN[:1]), ARMOURED, BAG, PAGES[2])
MAX_SECONDS_PER_MIB = 5.0  # as fuzz_pages; a conversation reads each page at most twice


class Answers(requests.adapters.HTTPAdapter):
    """Answers each request from `bodies`, without a network; counts the POSTs."""

    def __init__(self):
        super().__init__()
        self.bodies, self.posts = {}, 0

    def send(self, request, **named):
        self.posts += request.method == "POST"
        name, _, query = request.url.rpartition("/")[2].partition("?")
        body = self.bodies[f"{name} {query[-3:]}" if name == "certnew.p7b" else name]
        raw = urllib3.HTTPResponse(io.BytesIO(body), {"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}, 200, preload_content=False)
        return self.build_response(request, raw)


def connect(folder: Path):
    """Return a conversation whose answers are fed to it, and what feeds them."""
    (folder / "trust.pem").write_bytes(to_pem(CHAIN[-1:]))
    (folder / "trust.pem").chmod(0o644)
    settings = config.CA(server="ca", template="T", auth="basic", user="u", server_trust="/trust.pem")
    conversation = ca.connect(Root(str(folder)), settings, signin.Basic("ca", "u", b"p"))
    answers = Answers()
    conversation.session.mount("https://", answers)
    return conversation, answers


def one(conversation, answers, data: bytes) -> None:
    """Talk three times: outcomes that fit what was told and sent, and can be judged, in time in proportion to the size."""
    parts = data.split(CUT)
    answers.bodies = {name: parts[number] if number < len(parts) else b"" for number, name in enumerate(NAMES)}
    answers.posts, started, told = 0, time.process_time(), []
    authority = conversation.authority()
    assert type(authority) in (ca.Authority, ca.Unavailable, ca.Unknown)
    submitted = conversation.submit(CSR, told.append)
    fetched = conversation.fetch(7)
    took = time.process_time() - started
    assert took < 0.5 + 6 * MAX_SECONDS_PER_MIB * len(data) / (1 << 20), f"{took} s for {len(data)} bytes"
    assert answers.posts == 1
    assert len(told) <= 1
    assert all(type(number) is int and 0 < number < 10**10 for number in told)
    if isinstance(submitted, (ca.Certificate, ca.Unfetched)):
        assert told == [submitted.request_id]
    if isinstance(submitted, (ca.Unavailable, ca.Doubtful, ca.Unknown)):
        assert told == []
    assert not isinstance(fetched, ca.Doubtful)
    assert getattr(fetched, "request_id", 7) == 7
    for outcome, doubtful in ((authority, False), (submitted, True), (fetched, False)):
        if isinstance(outcome, ca.Unknown):
            assert outcome.doubtful is doubtful
            assert len(outcome.skeleton) <= pages.MAX_SKELETON_CHARS
        if isinstance(outcome, ca.Unavailable):
            assert outcome.hint
        if isinstance(outcome, ca.Certificate):
            assert outcome.leaf not in outcome.bag
            verify.judge(outcome.leaf, SPEC, "", RULES, 0)
            verify.chain(outcome.leaf, outcome.bag)
        if isinstance(outcome, ca.Authority):
            assert outcome.chain[0] not in outcome.chain[1:]
            verify.leads_to(outcome.chain, CHAIN)


def mutated(chance: random.Random) -> bytes:
    """Return the usual answers with one or two replaced, and a few pieces changed, doubled, cut or joined with another seed's."""
    bodies = [bytearray(body) for body in USUAL]
    for _ in range(chance.randrange(3)):
        bodies[chance.randrange(len(bodies))] = bytearray(chance.choice(BODIES))
    for _ in range(chance.randrange(6)):
        data = chance.choice(bodies)
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 8, 400)))
        piece, other = bytes(data[at:end]), chance.choice(BODIES)[chance.randrange(40) :]
        data[at:end] = chance.choice((b"", piece * chance.choice((2, 2, 500)), other, chance.randbytes(len(piece)), piece.swapcase()))
        del data[1 << 20 :]
    return CUT.join(map(bytes, bodies))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        loop.run(partial(one, *connect(Path(folder))), mutated, "conversations held")
