"""One host of the fleet: what it sees, and its runs. What it decides and records is the program's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, Optional, Tuple

from scx_enroll import activate, enroll, observe, pace, plan
from scx_enroll import journal as j
from scx_enroll.acquire import Acquisition, Want
from scx_enroll.activate import Site
from scx_enroll.case import Observed, Step, Wish
from scx_enroll.config import CA, Agent, Config, Renewal, Report
from scx_enroll.config import Host as Naming
from scx_enroll.journal import HOUR_S
from scx_enroll.records import Line
from scx_enroll.request import RequestSpec
from scx_enroll.store import KEPT_GENERATIONS, Generation, Store
from tests.fleet import paper
from tests.fleet.authority import Authority

NOWHERE: Any = None  # no root: paper.in_use() and Memory see to it that nobody looks
NEVER = 1 << 40


class Memory(Store):
    """A store that forgets when the process ends."""

    def __init__(self) -> None:
        super().__init__(NOWHERE)
        self.kept: Tuple[Generation, ...] = ()

    def save_journal(self, journal: j.Journal) -> None:
        self.journal = journal

    def save_budget(self, budget: j.Budget) -> None:
        self.budget = budget

    def generations(self) -> Tuple[Generation, ...]:
        return self.kept

    def add_generation(self, generation: Generation) -> None:
        number = max((other.origin.number for other in self.kept), default=0) + 1
        new = replace(generation, origin=replace(generation.origin, number=number))
        self.kept = (*self.kept, new)[-KEPT_GENERATIONS:]

    def check_state(self) -> None:
        pass


@dataclass(frozen=True)
class World:
    """What all hosts share: the clock, the CAs, what the name server says of a host, and who is told of each act."""

    clock: Callable[[], int]
    cas: Mapping[str, Authority]
    config: Config
    line: Line
    resolve: Callable[[str], str]
    acted: Callable[[Host, Step], None]


def world_of(clock: Callable[[], int], cas: Mapping[str, Authority], resolve: Callable[[str], str],
             acted: Callable[[Host, Step], None]) -> World:
    sections = tuple(CA(label=server, server=server, template="SCXAgent") for server in cas)
    config = Config(Naming("what `resolve` says"), sections, Renewal(), Agent(), Report())
    return World(clock, cas, config, Line(connect=lambda _root, ca: cas[ca.server]), resolve, acted)  # type: ignore[arg-type]  # a Conversation


class Host:
    """One host, first looked at when the timer ticks the first time; `offset` is its minute of the hour."""

    def __init__(self, number: int, offset: int, world: World) -> None:
        self.number = number
        self.offset = offset
        self.world = world
        self.store = Memory()
        self.name = ""
        self.key = f"key{number}"
        self.installed = "self-signed"
        self.changed_at = 0
        self.restarts = 0
        self.installs = 0
        self.seen = Observed()
        self.fresh_until = 0  # `seen` holds so long, where nothing is done
        self.spec = RequestSpec("")
        self.inputs = ""
        self.policy = pace.Policy(())

    # -- what happens to it ---------------------------------------------------------------------------------------------

    def replace_key(self, now: int) -> None:
        """A package upgrade made key and certificate anew, and restarted the agent."""
        self.key += "'"
        self.name = ""  # looked up, and hashed into the inputs, anew
        self.installed = "self-signed"
        self.changed_at = now
        self.fresh_until = 0

    def tick_at(self, at: int) -> int:
        """Return the first tick of its timer at that time or later."""
        return at + (self.offset - at) % HOUR_S

    # -- one run --------------------------------------------------------------------------------------------------------

    def run(self) -> Step:
        """Run once, as the timer does; returns the step that waits."""
        store, clock = self.store, self.world.clock
        acquisition: Optional[Acquisition] = None
        wish = Wish()
        for _ in range(enroll.MAX_STEPS + len(self.world.cas)):
            seen = self.look()
            step = plan.decide(seen, self.policy, store.journal, store.budget, clock(), wish)
            if step.action in plan.WAITING:
                return step
            if step.action in enroll.CA_ACTS:
                acquisition = acquisition or Acquisition(self._site(), self.world.config, self.world.line)
                wish = acquisition.carry_out(step, self._want(), wish, lambda: True)
                self.fresh_until = 0
            else:
                LOCAL_ACTS[step.action](self, step)
            self.world.acted(self, step)
        raise AssertionError(f"no end: {step}")

    def look(self) -> Observed:
        """What `observe.look` would find."""
        now = self.world.clock()
        latch = self.store.journal.latch
        name = latch.fqdn if latch else self.world.resolve(f"h{self.number}.fleet.example")
        if name != self.name:
            self.name, self.spec, self.fresh_until = name, RequestSpec(name), 0
            self.policy = observe.policy_of(self.world.config, name)
            self.inputs = observe.inputs_of(self.world.config, self.spec, self.key)
        if now < self.fresh_until:
            return self.seen
        journal = self.store.journal
        held = tuple(
            observe.held_as(generation, journal, lambda der, *_: paper.judge(der, name, now))
            for generation in self.store.kept if paper.facts(generation.certificate).spki == self.key
        )
        self.fresh_until = min((one.not_after for one in held if one.not_after > now), default=NEVER)
        self.seen = Observed(
            changed_at=self.changed_at,
            key=self.key,
            certificate=self.installed,
            held=held,
            listening=True,
            served=self.installed,
            inputs=self.inputs,
            names=self.spec.dns_names,
            share=observe.share_of(name),
        )
        return self.seen

    def _site(self) -> Site:
        return Site(NOWHERE, self.store, NOWHERE, self.world.clock, lambda _: None)

    def _want(self) -> Want:
        now, name = self.world.clock(), self.name
        return Want(
            self.spec, self.key, self.seen.inputs, self.seen.held, lambda: (f"csr {self.key} {name}".encode(), self.key),
            lambda _ca, leaf, _pool: paper.judge(leaf, name, now),
        )

    # -- the acts that need an agent: they succeed ------------------------------------------------------------------------

    def install(self, step: Step) -> None:
        """What is left of `transaction.install` where the agent does as it is told: a restart, counted."""
        budget = activate.within_budget(self._site(), 2)
        self.store.save_budget(replace(budget, restarts=(*budget.restarts, self.world.clock())))
        self.installed = next(held.leaf for held in self.seen.held if held.id == step.generation)
        self.changed_at = 0  # what we changed ourselves
        self.restarts += 1
        self.installs += 1
        self.fresh_until = 0


LOCAL_ACTS: Mapping[str, Callable[[Host, Step], None]] = {"install": Host.install}
