"""An image and three machines that are made of it, in random order: no two hosts end with one key."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Dict, List, Tuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from scx_enroll import enroll, sealing, verify
from scx_enroll.errors import EnrollError
from tests.model.machine import Machine
from tests.model.memory import MemoryWorld, laboratory
from tests.model.world import DAY_S, NEVER, WatchedFuse, World

CLONES = 3
PATIENCE_DAYS = 5
# An image of an agent whose key nobody noted is none of these: its clones can't be told apart by what they hold.
IMAGES = ((True, ""), (True, "keep"), (True, "delete"), (False, "keep"), (False, "delete"))
NAME = "{hostname}.lab.test"


class Clones(RuleBasedStateMachine):
    """`machines` are made of an image; each acts while its own world is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.machines: List[Machine] = []
        self.failed = False
        self.world_of = self.stack.enter_context(laboratory())

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.everybody_rests()
        finally:
            self.stack.close()

    @initialize(how=st.sampled_from(IMAGES), late_name=st.booleans())
    def image_is_copied(self, how: Tuple[bool, str], late_name: bool) -> None:
        """`how`: whether the program ran on the image's own host, and how that was sealed. A clone has another machine-id and product UUID; its name may come later."""
        (ran, sealed), world = how, self.world_of()
        with world.entered():
            self._identify(world, "image", 0)
            image = Machine(world, name=NAME)
            if ran:
                image.carry_out(enroll.run)
            image.host.stop()
            if sealed:
                enroll.seal(world.root(), enroll.Options(), world.tools(), lambda site: sealing.seal(site, "", delete_key=sealed == "delete"))
        for number in range(1, CLONES + 1):
            copy = self.world_of(world.host)
            with copy.entered():
                self._identify(copy, "image" if late_name else f"clone{number}", number)
                machine = Machine(copy, name=NAME)
                machine.by_hand = image.by_hand
                self.machines.append(machine)

    @staticmethod
    def _identify(world: MemoryWorld, name: str, number: int) -> None:
        world.host.make_file("/etc/machine-id", (f"{number + 1:x}" * 3 + "0123456789abcdef" * 2)[:32] + "\n")
        world.host.make_file("/sys/class/dmi/id/product_uuid", (f"{number + 8:x}" * 3 + "0123456789abcdef" * 2)[:32] + "\n")
        _call(world, name)

    def _each(self, which: int) -> Machine:
        return self.machines[which % len(self.machines)]

    @rule(which=st.integers(0, CLONES - 1))
    def clone_runs(self, which: int) -> None:
        with self._each(which).world.entered():
            self._each(which).operator_runs({})

    @rule(which=st.integers(0, CLONES - 1), point=st.integers(1, 70))
    def run_of_a_clone_is_killed(self, which: int, point: int) -> None:
        with self._each(which).world.entered():
            self._each(which).run_is_killed(point, {})

    @rule(which=st.integers(0, CLONES - 1))
    def clone_reboots(self, which: int) -> None:
        with self._each(which).world.entered():
            self._each(which).host_reboots()

    @rule(which=st.integers(0, CLONES - 1))
    def clone_gets_its_name(self, which: int) -> None:
        machine = self._each(which)
        with machine.world.entered():
            _call(machine.world, f"clone{which + 1}")  # type: ignore[arg-type]  # a MemoryWorld
            machine.act()

    @rule(seconds=st.sampled_from((60, 3600, 86400, 9 * 86400)))
    def time_passes(self, seconds: int) -> None:
        self.machines[0].world.passes(seconds)

    @rule()
    def everybody_rests(self) -> None:
        """Every machine has a name of its own then, and comes to rest; keys and certificates are each one's own."""
        for number, machine in enumerate(self.machines):
            self.clone_gets_its_name(number)
            with machine.world.entered():
                machine.identity.update(("machine-id", "product UUID"))
                self._accept_name(machine.world)
                machine.quiet_period()
        self._keys_are_apart()

    @staticmethod
    def _accept_name(world: World) -> None:
        """Its operator accepts the name, again each day until nothing is in the way."""
        for _ in range(PATIENCE_DAYS):
            with suppress(EnrollError):
                tools = world.tools(line=world.line(WatchedFuse(NEVER, lambda _: None)))
                enroll.run(world.root(), enroll.Options(accept_name=True), tools)
                return
            world.passes(DAY_S)

    def _keys_are_apart(self) -> None:
        asked: Dict[str, str] = {}
        for row in self.machines[0].authority.rows.values():
            if row.certificate:
                spki = verify.facts(row.certificate).spki
                assert asked.setdefault(spki, row.requester) == row.requester, "one key was certified for two hosts"
        served: List[Tuple[str, str]] = []
        for machine in self.machines:
            der = machine.host.served()
            if machine.is_valid(der):
                served.append((verify.facts(der or b"").spki, machine.host.fqdn))
        assert len({key for key, _ in served}) == len(served), f"two hosts serve with one key: {served}"


def _call(world: MemoryWorld, name: str) -> None:
    """Give a machine a name."""
    world.host.host = name
    world.host.make_file("/etc/hostname", f"{name}\n")
    world.host.knobs(host=name)
