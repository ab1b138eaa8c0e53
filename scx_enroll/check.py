"""Tries what can be tried without asking for anything: how one signs in at each CA, and whether we are let in."""

from dataclasses import dataclass
from typing import Optional, Tuple

from scx_enroll.acquire import Acquisition
from scx_enroll.config import CA
from scx_enroll.enroll import config_of, locked
from scx_enroll.errors import EnrollError
from scx_enroll.job import Options, Tools
from scx_enroll.outcomes import Greeting
from scx_enroll.rootfs import Root


@dataclass(frozen=True)
class Tried:
    """What came of one CA: how its web server greets, None where that was not seen, and why we were not let in."""

    ca: CA
    greeting: Optional[Greeting]
    problem: Optional[EnrollError]

    def told(self, *, alone: bool) -> EnrollError:
        """Return why, naming the CA where others were tried, too."""
        found = self.problem or EnrollError("")
        named = alone or self.ca.server in found.message
        return found if named else type(found)(f"{self.ca.server}: {found.message}", found.hint)


def check(root: Root, options: Options, tools: Tools, name: str, *, retry: bool) -> Tuple[Tried, ...]:
    """Try every CA, or the one called `name`; with `retry` also with a secret that it has refused.

    What is refused is recorded, so that no other command repeats it.
    """
    config = config_of(root, options)
    with locked(root, options, tools) as site:
        acquisition = Acquisition(site, config, tools.line)
        server = acquisition.server_of(name)
        return tuple(_tried(acquisition, ca, retry=retry) for ca in config.cas if server in ("", ca.server))


def _tried(acquisition: Acquisition, ca: CA, *, retry: bool) -> Tried:
    greeting = None
    try:
        greeting = acquisition.greeted(ca)
        acquisition.authority(ca, retry=retry)
    except EnrollError as problem:
        return Tried(ca, greeting, problem)
    return Tried(ca, greeting, None)
