"""One host, its CA and their time, for the model: a Scene whose clock, files' times and faults the actors move.

Two kinds with the same interface: `RealWorld` is the lab's processes and its HTTPS server; in `MemoryWorld` (module `memory`) agent
and CA are plain objects, waits cost nothing, and a sequence takes milliseconds. The program runs in this process in both.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union
from unittest.mock import patch

from scx_enroll import agent as agents
from scx_enroll import beside, durable, enroll, rootfs, service
from scx_enroll.enroll import Tools
from scx_enroll.rootfs import Root
from scx_enroll.store import Store
from tests.lab.agent import SSL_FOLDERS, LabHost
from tests.lab.ca import LabCA
from tests.scene import NO_CHECK_TIME, Outcome, Scene
from tests.test_crash import Crash, Fuse

BEGIN = 1_800_000_000  # where time is simulated, each sequence begins at the same moment
HOUR_S, DAY_S = 3600, 86400
NEVER = 1 << 30  # a fuse that does not blow
LEAF_S = 60 * DAY_S  # how long certificates live


CONTROL, CLIENT, TEMPORARY_FILE, ENTRY = service.control, service._client_context, durable.temporary_file, rootfs._entry


class Clock:
    """The true time, which is the CA's; `skew` is what this host's clock is ahead of it."""

    def __init__(self, *, real: bool) -> None:
        self.real = real
        self.ahead: float = 0 if real else BEGIN
        self.skew = 0

    def now(self) -> float:
        return self.ahead + (time.time() if self.real else 0)

    def host(self) -> int:
        return int(self.now()) + self.skew

    def sleep(self, seconds: float) -> None:
        """Wait as the program does: in memory that costs nothing."""
        if self.real:
            time.sleep(seconds)
        else:
            self.ahead += seconds


class WatchedFuse(Fuse):
    """Looks, at each point of a run, at what must hold at every instant. `point`: its number, or the first of that name."""

    def __init__(self, point: Union[int, str], watch: Callable[[str], None]) -> None:
        super().__init__(point if isinstance(point, int) else NEVER)
        self.point, self.watch = point, watch

    def tick(self, name: str) -> None:
        if not self.blown:
            self.watch(name)
        if name == self.point:
            self.left = len(self.names) + 1
        super().tick(name)
WATCHED = (*SSL_FOLDERS, "/etc/scx-enroll")  # decisions rest on when something changed there


class World(Scene):
    """`restarts`: when the program had the agent restarted or started, by the host's clock; the other marks are the model's."""

    clock: Clock
    account = ""  # as whom this host asks the CA, where it is not the only one

    def begin(self, clock: Clock) -> None:
        """Take the time; nothing is changed yet that an actor could see."""
        self.clock = clock
        self.restarts: List[int] = []
        self.failed: List[int] = []  # those whose start failed by itself
        self.packager = ""
        self.writes_left: Optional[int] = None  # until the disk is full
        self.known_times: Dict[Tuple[int, int, int], int] = {}
        self.order = itertools.count()
        with self.entered():
            self.stamp(self.clock.host() - DAY_S)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While this lasts, the program is under this world's time and faults; of several hosts, the one entered last."""
        with ExitStack() as stack:
            for target, name, value in self.parts():
                stack.enter_context(patch.object(target, name, value))
            yield

    def parts(self) -> Iterator[Tuple[Any, str, Any]]:
        """What stands in for parts of the program."""
        control = self.control

        def counted(root: Root, command: Tuple[str, ...], *rest: Any) -> str:
            if command[1:] and command[1] in ("-restart", "-start"):
                self.restarts.append(self.clock.host())
                said = control(root, command, *rest)
                if 0 < self.host.starts <= int(self.host.knobs().get("fails_until") or 0):
                    self.failed.append(self.restarts[-1])
                return said
            return control(root, command, *rest)

        def bounded(*arguments: Any) -> str:
            if self.writes_left is not None:
                self.writes_left -= 1
                if self.writes_left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return TEMPORARY_FILE(*arguments)

        def timeless(anchors: Tuple[bytes, ...]) -> Any:
            context = CLIENT(anchors)
            context.verify_flags |= NO_CHECK_TIME
            return context

        def timed(path: str, parent: int, name: str, found: os.stat_result) -> rootfs.Entry:
            seen = ENTRY(path, parent, name, found)
            if not path.startswith(WATCHED):
                return seen
            return replace(seen, ctime_ns=self.when(found, found.st_ctime_ns), mtime_ns=self.when(found, found.st_mtime_ns))

        yield service, "control", counted
        yield service, "_client_context", timeless
        yield durable, "temporary_file", bounded
        yield beside, "temporary_file", bounded
        yield rootfs, "_entry", timed
        yield agents, "packager", lambda _root: self.packager

    control = staticmethod(CONTROL)

    # -- time -----------------------------------------------------------------------------------------------------

    def when(self, found: os.stat_result, kernels_ns: int, at: Optional[int] = None) -> int:
        """Return the simulated time of a change that the kernel dates otherwise: that of the first look since."""
        mark = (found.st_dev, found.st_ino, kernels_ns)
        if mark not in self.known_times:
            self.known_times[mark] = (self.clock.host() if at is None else at) * 10**9 + next(self.order)
        return self.known_times[mark]

    def stamp(self, at: Optional[int] = None) -> None:
        """Date what an actor has changed just now."""
        for top in WATCHED:
            folder = self.host.path(top)
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                found = os.lstat(f"{folder}/{name}")
                for kernels_ns in (found.st_ctime_ns, found.st_mtime_ns):
                    self.when(found, kernels_ns, at)

    def passes(self, seconds: float) -> None:
        self.clock.ahead += seconds

    # -- the program ----------------------------------------------------------------------------------------------

    def tools(self, **parts: Any) -> Tools:
        base = Tools(clock=self.clock.host, patience=self.patience, acted=lambda step: self.acted.append(step.row))
        return replace(base, **parts)

    def try_verb(self, verb: Callable[..., Any], *arguments: Any, fuse: Fuse, **wish: bool) -> Optional[Outcome]:
        """Carry out a verb of `enroll`; None where the fuse blew."""
        acts = {name: fuse.around(name, act) for name, act in enroll.ACTS.items()}
        with patch.object(service, "control", fuse.around("control", service.control)), patch.object(enroll, "ACTS", acts):
            try:
                return self.do(verb, *arguments, parts={"store": fuse.store, "line": self.line(fuse)}, **wish)
            except Crash:
                return None

    def line(self, fuse: Fuse) -> Any:
        return fuse.line()

    def look(self) -> Outcome:
        return self.do(enroll.inspect, parts={"line": self.line(Fuse(0))})

    def state_reads(self) -> None:
        """Raise HostError where the state directory does not read."""
        store = Store(Root(self.host.root))
        store.load()
        store.generations()

    @property
    def disk_is_full(self) -> bool:
        """Whether a write has failed since the disk began to fill."""
        return self.writes_left is not None and self.writes_left < 0

    @property
    def changes(self) -> bool:
        """Whether an installation is open."""
        store = Store(Root(self.host.root))
        store.load()
        return store.journal.installation.state != "settled"

    @property
    def proven(self) -> str:
        """The leaf that the program installed and saw served, "" for none."""
        store = Store(Root(self.host.root))
        store.load()
        known = store.journal
        return known.installed.leaf if known.installed and known.proven else ""

    @property
    def spent_in_vain(self) -> bool:
        """Whether a restart is in the books that was not made, since the run was killed between the two, or whose start failed by itself."""
        store = Store(Root(self.host.root))
        store.load()
        now = self.clock.host()
        made = sum(at > now - DAY_S for at in self.restarts) - sum(at > now - DAY_S for at in self.failed)
        return len(store.budget.current(now).restarts) > made

    @property
    def dangles(self) -> bool:
        """Whether the name that the agent reads is there and leads nowhere, or is gone."""
        return not os.path.exists(self.host.resolve(self.host.certificate))


class RealWorld(World):
    """The lab's processes, and its CA behind HTTPS."""


@contextlib.contextmanager
def real_world(folder: Path, ca: LabCA, number: int) -> Iterator[RealWorld]:
    """Make a world of processes; `ca` serves several, one after the other."""
    clock = Clock(real=True)
    ca.switches.reset()
    ca.authority.rows.clear()
    ca.authority.clock, ca.authority.lifetime = clock.now, LEAF_S
    host = LabHost(folder / f"host{number}", key="ec:secp256r1")
    world = RealWorld(host, [ca])
    world.begin(clock)
    try:
        with world.entered():
            yield world
    finally:
        host.close()
