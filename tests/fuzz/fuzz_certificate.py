"""Fuzz target: any bytes as certificates and certificate requests. With atheris coverage-guided, without it a plain loop of mutations.

python -m tests.fuzz.fuzz_certificate [SECONDS]
"""

import base64
import contextlib
import random
import ssl

from scx_enroll import request, service, verify
from scx_enroll.errors import CertificateRefused, ConfigError, UsageError
from scx_enroll.request import RequestSpec
from tests.lab import selfsigned
from tests.lab.authority import Authority

from . import loop

SPEC = RequestSpec("host1.corp.example")
RULES = verify.Rules(require_revocation=True, minimum_key="ec:secp384r1")
KEY = selfsigned.make_key("ec:secp256r1")
CHAIN = Authority().chain()
CSR = request.load_csr(request.build_csr(SPEC, KEY), "seed").pem
SEEDS = (*CHAIN, ssl.PEM_cert_to_DER_cert(CSR.decode().replace(" REQUEST", "")), *verify.read(selfsigned.make_certificate(KEY, "host1", "corp.example")))


def one(data: bytes) -> None:
    """Read, judge and sort: nothing but the documented refusals."""
    verify.judge(data, SPEC, "", RULES, 0)
    verify.warnings(data, SPEC, RULES)
    verify.chain(data, (data, *SEEDS))
    verify.leads_to((data, *SEEDS), CHAIN)
    verify.leads_to(SEEDS, (data,))
    for call in (verify.facts, verify.read):
        with contextlib.suppress(CertificateRefused):
            call(data)
    with contextlib.suppress(ConfigError):
        verify.split_trust(data)
    with contextlib.suppress(UsageError):
        request.load_csr(data, "data")
    service.check_path((data, *SEEDS[:2]), CHAIN[-1:], SPEC.fqdn)


def mutated(chance: random.Random) -> bytes:
    """Return a certificate with a few bytes changed, cut or doubled, in one of the wrappings."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(6)):
        at, size = chance.randrange(len(data)), chance.randrange(1, 9)
        piece = bytes(data[at : at + size])
        data[at : at + size] = chance.choice(
            (b"", piece * 2, bytes(chance.randrange(256) for _ in piece), bytes([piece[0] ^ 1]) + piece[1:])
        )
    return chance.choice((bytes, verify.pem, base64.b64encode))(bytes(data))


if __name__ == "__main__":
    loop.run(one, mutated, "certificates read")
