"""Tries what can be tried without asking for anything: how one signs in at each CA, and whether we are let in."""

import json
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple

from scx_enroll import binding, verify
from scx_enroll.acquire import Acquisition
from scx_enroll.begin import config_of, locked
from scx_enroll.config import CA
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


def as_text(tried: Sequence[Tried]) -> str:
    """Return for each CA what it offers, whether we were let in, by what and as whom, and whether the channel was bound."""
    lines = []
    for facts in map(_checked, tried):
        lines.append(f"{facts['server']}: {'signed in' if facts['signed_in'] else 'not signed in'}")
        if facts["offered"] is not None:
            offered = ", ".join(facts["offered"]) or "nothing: it lets anybody in, or asks for a client certificate"
            lines.append(f"  offers       {offered}")
            lines.append(f"  {'used  ' if facts['signed_in'] else 'wanted'}       {facts['auth']}, as {facts['account']}")
            lines += [f"  binding      {facts['binding'] or 'none, ' + facts['auth'] + ' has none'}"] if facts["signed_in"] else []
            lines.append(f"  certificate  {facts['certificate']}")
    return "".join(f"{line}\n" for line in lines)


def as_json(tried: Sequence[Tried]) -> str:
    """Return the same as JSON: a list."""
    return json.dumps(list(map(_checked, tried)), indent=1, ensure_ascii=False) + "\n"


def _checked(one: Tried) -> Dict[str, Any]:
    greeting, problem = one.greeting, one.problem
    return {
        "server": one.ca.server,
        "offered": list(greeting.offered) if greeting else None,
        "signed_in": problem is None,
        "auth": one.ca.auth,
        "binding": binding.named(greeting.certificate) if greeting and greeting.binds and not problem else None,
        "account": greeting.account if greeting else None,
        "certificate": verify.whose(greeting.certificate) if greeting else None,
        "exit_status": problem.exit_status if problem else 0,
        "error": problem.message if problem else None,
        "hint": problem.hint if problem else None,
    }
