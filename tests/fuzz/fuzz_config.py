"""Fuzz target: any bytes as our configuration and as the agent's. With atheris coverage-guided, without it a loop of mutations.

python -m tests.fuzz.fuzz_config [SECONDS]
"""

import contextlib
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable

from scx_enroll import agent, config
from scx_enroll.errors import AgentNotReady, ConfigError, HostError
from scx_enroll.rootfs import Root

from . import loop

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
    """Return a seed with a few pieces changed."""
    return loop.spliced(chance, SEEDS, 1 << 18, head=60)


def prepared(base: Path) -> Callable[[bytes], None]:
    """Return `one` for a folder in which there is an agent."""
    server = base / "opt/omi/bin/omiserver"
    server.parent.mkdir(parents=True)
    server.touch()
    return partial(one, base)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        loop.run(prepared(Path(folder)), mutated, "files read")
