"""Fuzz target: any bytes as our configuration and as the agent's. With atheris coverage-guided, without it a loop of mutations.

python -m tests.fuzz.fuzz_config [SECONDS]
"""

import base64
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

from scx_enroll import agent, config
from scx_enroll.errors import AgentNotReady, ConfigError, HostError
from scx_enroll.rootfs import Root

SEEDS = (
    b"[host]\nname = {hostname}.corp.example\nalternative-names = a.b c # d\n[ca one]\nserver = ca01:443\ntemplate = T (x)\nauth = basic\n",
    b"[renewal]\nat = 2/3\nspread = 1/10\npending-days = 30\n[agent]\nlayout = auto\nport = 1270\nsettle = 2m\nminimum-key = rsa:3072\n",
    b"# conf\nhttpport=0\nhttpsport=0,1270\npemfile=/etc/opt/omi/ssl/omi.pem\nnonroot = true\nservice=omi\nloglevel=WARNING\n",
)
MAX_SECONDS = 2.0  # for a file at its limit, on a slow machine


def one(base: Path, data: bytes) -> None:
    """Load both: a result or a documented refusal, in bounded time."""
    root, started = Root(str(base)), time.process_time()
    for name, load, refusal in ((config.PATH, config.load, ConfigError), ("/etc/opt/omi/conf/omiserver.conf", agent.find, AgentNotReady)):
        path = base / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o644)
        with contextlib.suppress(refusal, HostError):
            load(root)
    assert time.process_time() - started < MAX_SECONDS


def mutated(chance: random.Random) -> bytes:
    """Return a seed with a few pieces changed, doubled, cut or joined with another seed's."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(8)):
        at, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        piece = bytes(data[at:end])
        other = chance.choice(SEEDS)[chance.randrange(60) :]
        data[at:end] = chance.choice(
            (b"", piece * chance.choice((2, 2, 300)), other, bytes(chance.randrange(256) for _ in piece), piece.swapcase())
        )
        del data[1 << 18 :]
    return bytes(data)


def main() -> None:
    """Fuzz for the given number of seconds (60), or as atheris is told."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        server = base / "opt/omi/bin/omiserver"
        server.parent.mkdir(parents=True)
        server.touch()
        with contextlib.suppress(ImportError):
            import atheris  # not in the requirements: who fuzzes installs it

            atheris.Setup(sys.argv, lambda data: one(base, data))
            atheris.Fuzz()
        chance, until, count = random.Random(), time.monotonic() + float((sys.argv[1:] or ["60"])[0]), 0
        while time.monotonic() < until:
            data = mutated(chance)
            try:
                one(base, data)
            except BaseException:
                print(base64.b64encode(data).decode())
                raise
            count += 1
    print(f"{count} files read")


if __name__ == "__main__":
    main()
