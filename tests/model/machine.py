"""The model: who does what to one host, and what must hold after each act and whenever everybody has rested for a while.

A new actor or fault is a rule: a method that changes the world. Where it is a fault that ends, `mend` ends it. What the agent may
lack afterwards, because nobody could give it, is a row of `EXCUSES`.
"""

from __future__ import annotations

import itertools
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple, Type, Union

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from scx_enroll import enroll, plan, request, verify
from scx_enroll.beside import BAKED_IN, COPY, PAIR, PAIR_LINK
from scx_enroll.durable import TEMPORARY
from scx_enroll.errors import EnrollError
from scx_enroll.journal import RESTARTS_PER_DAY, RESTARTS_PER_HOUR
from tests.lab import standin
from tests.lab.agent import SSL_FOLDERS, Entry, fingerprint
from tests.lab.authority import Row, to_pem
from tests.lab.ca import LabCA
from tests.lab.packagescripts import SCRIPTS, scom_sign
from tests.model.memory import memory_world
from tests.model.world import DAY_S, HOUR_S, NEVER, WatchedFuse, World, real_world
from tests.scene import Outcome

CERTIFICATES_PER_DAY, SUBMISSIONS_PER_DAY = 3, 24
MAX_RUNS = 60  # of a quiet period; each goes on to when the program says that something else will be decided
LONG_S = 5 * DAY_S  # who waits longer than this has come to rest: the longest back-off is four days
MINUTE_S = 60
ACT_S = 5

OURS = re.compile(rf"/(({COPY.pattern})|{re.escape(TEMPORARY)}[^/]*|{BAKED_IN}|{PAIR_LINK}|{PAIR.pattern}/[^/]+)$")
REKEY = {"renew": True, "rekey": True}
SETTINGS: Tuple[Dict[str, str], ...] = ({}, {"alternative_names": "alias.lab.test"}, {"minimum_key": "rsa:3072"}, {"at": "1/2"}, {"require_revocation": "yes"}, {"key": "new"}, {"activation": "reload"}, {"restart_window": "02:00-05:00"})


def most_in(times: List[float], window_s: int) -> int:
    """Return the most of these times that lie within one window."""
    return max((sum(at <= other < at + window_s for other in times) for at in times), default=0)


def shown(ended: Optional[Outcome]) -> str:
    """Return the end of a run in a line."""
    return f"{ended.status} {ended.message} after {' '.join(ended.rows) or 'nothing'}" if ended else "killed"


@dataclass
class Excuse:
    """Why the agent may come to rest without a valid certificate: when that is so, and what must be said then."""

    why: str
    holds: Callable[[Machine, Outcome], bool]
    status: Tuple[int, ...]
    says: str  # a pattern


class Machine(RuleBasedStateMachine):
    """One host and everybody around it."""

    world_of: Callable[[], ContextManager[World]] = staticmethod(memory_world)

    def __init__(self, world: Optional[World] = None, **settings: str) -> None:
        super().__init__()
        self.failed = False
        self.stack = ExitStack()
        self.world = world or self.stack.enter_context(self.world_of())
        self.host, self.ca = self.world.host, self.world.cas[0]
        self.switches, self.authority = self.ca.switches, self.ca.authority
        self.world.configure(settle="2m", new_key="ec:secp256r1", **settings)
        self.settings: Dict[str, str] = {}
        self.by_hand: set[str] = set()  # leaves that the operator was given
        self.ours = False  # the agent is down, and was up when a run began
        self.no_way_back = False  # what stood there when the open installation began is refused by the agent, too
        self.issued_wrongly = self.rolled_back = False
        self.revoked: set[str] = set()
        self.identity: set[str] = set()  # parts that were changed
        self.times_of_posts: List[float] = []
        self.mended: Dict[str, Any] = {}
        self.host.start()
        self.world.stamp()

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.quiet_period()
        finally:
            self.stack.close()

    # -- what the model knows ---------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self.host.served() is not None

    @property
    def has_tools(self) -> bool:
        return os.path.exists(self.host.path(self.host.scxadmin))

    @property
    def whole(self) -> bool:
        """Whether programs and conf of the agent are there, and SCOM's port in it."""
        needed = (f"{self.host.place.bin}/{self.host.place.server}", self.host.conf, self.host.scxadmin)
        return all(os.path.exists(self.host.path(path)) for path in needed) and self.host.port in self.host.listed

    @property
    def locked_out(self) -> bool:
        """Whether the agent's account can't read its key, as after a reinstallation with another uid that was not finished."""
        try:
            settings = standin.read_settings(self.host.root, self.host.place, self.host.knobs())
            standin.read_as(self.host.root, settings.key, settings.account)
        except PermissionError:
            return True
        except (OSError, standin.ConfError):
            pass
        return False

    def _has(self, act: Callable[[], Any]) -> None:
        """Have the agent's tools do something, where they are installed."""
        if self.has_tools:
            act()

    @property
    def stopped(self) -> bool:
        """Whether it is down as one that was stopped on purpose: a restart by others that ended with nothing running looks the same."""
        return not self.up and not self.ours and not os.path.exists(self.host.path(self.host.place.pid))

    @property
    def wanted(self) -> Tuple[str, ...]:
        return (self.host.fqdn, *self.settings.get("alternative_names", "").split())

    @property
    def rows(self) -> List[Row]:
        """What this host has asked of the CA."""
        return [row for row in self.authority.rows.values() if self.world.account in ("", row.requester)]

    @property
    def key_spki(self) -> str:
        try:
            return request.spki_of(request.load_key(self.host.read(self.host.key)))
        except (OSError, EnrollError):
            return ""

    def is_valid(self, der: Optional[bytes]) -> bool:
        """Whether a CA of ours gave this leaf for the agent's key and the names that are wanted, and it is in its dates."""
        if der is None:
            return False
        known = {row.certificate for row in self.rows if row.certificate}
        if der not in known and fingerprint(der) not in self.by_hand:
            return False
        facts = verify.facts(der)
        return (
            facts.spki == self.key_spki and set(self.wanted) <= set(facts.names)
            and facts.not_before <= self.world.clock.now() < facts.not_after
        )

    def act(self) -> None:
        """Whoever acted has left changed files, and took some seconds."""
        self.world.stamp()
        self.world.passes(ACT_S)

    @property
    def doomed(self) -> bool:
        """Whether the agent would die of what others put on its disk, so that any restart ends it, and a way back leads nowhere."""
        only = self.host.knobs().get("serve_only")
        return bool(only) and fingerprint(self.host.leaf()) not in only

    @property
    def is_served_by_us(self) -> bool:
        """Whether the agent serves what the program has proved, and would take it again: that leads back from whatever stands there."""
        der, only = self.host.served(), self.host.knobs().get("serve_only")
        if der is None or fingerprint(der) != self.world.proven or verify.facts(der).spki != self.key_spki:
            return False
        return not only or fingerprint(der) in only

    # -- the program ----------------------------------------------------------------------------------------------------

    def carry_out(self, verb: Callable[..., Any], *arguments: Any, point: Union[int, str] = NEVER, **wish: bool) -> Optional[Outcome]:
        """Carry out a verb and see that it harmed nobody; None where the power failed at `point`."""
        back = self.is_served_by_us
        self.no_way_back = self.no_way_back if self.world.changes else self.doomed and not back
        ends = self.locked_out or self.no_way_back  # with any restart
        before, up, dangled, spent = self.host.snapshot(), self.up, self.world.dangles, self.has_spent
        found = self.host.leaf() if self.is_others else None

        def watch(where: str) -> None:
            assert dangled or not self.world.dangles, f"the name that the agent reads dangles {where}"

        ended = self.world.try_verb(verb, *arguments, fuse=WatchedFuse(point, watch), **wish)
        self.world.stamp()
        watch("after the run")
        self.budgets_are_kept()
        self.world.state_reads()
        self._others_kept(before, made_key=ended is None or "L5" in ended.rows)
        owed, self.ours = self.ours, not self.up and (up or self.ours)
        # the way back from what the agent refuses is in a state that was set aside, if it was; what others put there meanwhile stays
        if ends or (ended and self.doomed and ("L0" in ended.rows or (found and found == self.host.leaf() and not back))):
            self.ours = False
        waits = ended and (("restart budget" in ended.message and self.world.spent_in_vain) or "must be quiet" in ended.message)
        helpless = self.world.disk_is_full or not self.has_tools  # a start that can't be counted is not made
        if ended and self.ours and not (self.faulty_agent or self.world.packager or waits or helpless):
            assert not up, f"it was up, and is down after {shown(ended)}"
            assert not owed or spent, f"a killed run left it down, and so did {shown(ended)}"
        return ended

    @property
    def is_others(self) -> bool:
        """Whether what stands on the agent's disk is none of ours."""
        leaf = fingerprint(self.host.leaf())
        return leaf not in self.by_hand and all(not row.certificate or fingerprint(row.certificate) != leaf for row in self.rows)

    @property
    def has_spent(self) -> bool:
        """Whether all restarts that the budget allows were made: what a killed run left down waits for the next one."""
        times = list(map(float, self.world.restarts))
        now = self.world.clock.host()
        return any(sum(at > now - window for at in times) >= most for window, most in ((HOUR_S, RESTARTS_PER_HOUR), (DAY_S, RESTARTS_PER_DAY)))

    @property
    def faulty_agent(self) -> bool:
        """Whether its starts or stops fail by themselves now."""
        knobs = self.host.knobs()
        return any(knobs.get(name) for name in ("stop_takes", "fails_until", "ignore_restart", "stray"))

    def _others_kept(self, before: Dict[str, Entry], *, made_key: bool) -> None:
        """Nobody else's file is changed or gone, but the name that the agent reads and the package's marker."""
        after = self.host.snapshot()
        ours = {self.host.certificate, self.host.key, f"{SSL_FOLDERS[0]}/.omi_cert_marker"}
        if made_key:  # or gave a pair that a script moved aside its names back
            ours |= {self.host.host_pem, f"{self.host.certificate}_temp", f"{self.host.key}_temp"}
        for path, entry in before.items():
            if entry.kind != "dir" and path not in ours and not OURS.search(path):
                assert after.get(path) == entry, f"{path} was {entry}, and is {after.get(path)}"

    # -- the operator ---------------------------------------------------------------------------------------------------

    @rule(wish=st.sampled_from(({}, {}, {"now": True}, {"renew": True}, REKEY)))
    def operator_runs(self, wish: Dict[str, bool]) -> None:
        self.carry_out(enroll.run, **wish)

    @rule(point=st.integers(1, 60), wish=st.sampled_from(({}, {"now": True}, {"renew": True}, REKEY)))
    def run_is_killed(self, point: Union[int, str], wish: Dict[str, bool]) -> None:
        self.carry_out(enroll.run, point=point, **wish)

    @rule(point=st.integers(1, 60), wish=st.sampled_from(({}, {"now": True}, {"renew": True}, REKEY)))
    def power_fails(self, point: int, wish: Dict[str, bool]) -> None:
        self.carry_out(enroll.run, point=point, **wish)
        self.host_reboots()

    @rule(hours=st.sampled_from((0, 0, 2, 50)))
    def operator_holds(self, hours: int) -> None:
        self._hold("by the model", hours and int(self.world.clock.host()) + hours * HOUR_S)

    @rule()
    def operator_releases(self) -> None:
        self._hold("")

    def _hold(self, reason: str, until: int = 0) -> None:
        try:
            enroll.hold(self.world.root(), enroll.Options(), self.world.tools(), reason, until)
        except EnrollError:
            pass
        self.act()

    @rule(point=st.sampled_from((NEVER, NEVER, 5, 11, 17, 23)), original=st.booleans())
    def operator_rolls_back(self, point: int, original: bool) -> None:
        self.rolled_back = True
        self.carry_out(partial(enroll.roll_back, original=original), point=point)

    @rule(wrong=st.sampled_from(("", "", "", "name", "key", "expired", "issuer")), point=st.sampled_from((NEVER, NEVER, 9, 15, 21)))
    def operator_installs_a_file(self, wrong: str, point: Union[int, str]) -> None:
        try:
            csr = enroll.make_csr(self.world.root(), enroll.Options(), self.world.tools(line=self.world.line(WatchedFuse(NEVER, lambda _: None))))
        except EnrollError:
            return
        der = self.authority.issue(csr, wrong=wrong)
        if not wrong:
            self.by_hand.add(fingerprint(der))
        self.carry_out(enroll.install, to_pem([der, *self.authority.chain()]), "issued.pem", point=point)

    @rule(settings=st.sampled_from(SETTINGS))
    def operator_configures(self, settings: Dict[str, str]) -> None:
        for name in self.settings:
            del self.world.settings[name]
        self.settings = dict(settings)
        self.world.configure(**settings)
        self.act()

    @rule()
    def operator_breaks_the_configuration(self) -> None:
        self.world.write("scx-enroll.conf", b"[host\nname = x\n")
        self.act()

    @rule()
    def operator_loses_the_root(self) -> None:
        self.world.write("ca0.pem", b"")
        self.act()

    @rule()
    def operator_mends_the_configuration(self) -> None:
        self._mend_configuration()
        self.act()

    def _mend_configuration(self) -> None:
        self.world.write("ca0.pem", to_pem(self.authority.roots))
        self.world.configure()

    @rule(name=st.sampled_from(("notes.txt", "scx-enroll-mine.pem", "omi.pem.bak", "scx-enroll")), folder=st.sampled_from(SSL_FOLDERS))
    def operator_leaves_a_file(self, name: str, folder: str) -> None:
        self.host.make_file(f"{folder}/{name}", "mine\n")
        self.act()

    # -- the host -------------------------------------------------------------------------------------------------------

    @rule()
    def agent_crashes(self) -> None:
        self.host.kill()
        self.act()

    @rule()
    def agent_is_stopped(self) -> None:
        self._has(self.host.stop)
        self.ours = False
        self.act()

    @rule()
    def agent_is_started(self) -> None:
        self._has(self.host.start)
        self.act()

    @rule()
    def host_reboots(self) -> None:
        self.host.kill()
        self._has(self.host.start)
        self.world.packager = ""
        self.act()

    @rule(writes=st.integers(0, 12))
    def disk_fills(self, writes: int) -> None:
        self.world.writes_left = writes

    @rule()
    def disk_is_freed(self) -> None:
        self.world.writes_left = None

    @rule()
    def agent_refuses_what_is_new(self) -> None:
        self.host.refuse_new()

    @rule()
    def agent_stops_slowly(self) -> None:
        self.host.slow_stop()

    @rule()
    def agent_fails_to_start(self) -> None:
        self.host.fail_starts(1)

    @rule()
    def agent_behaves(self) -> None:
        self._mend_agent()

    def _mend_agent(self) -> None:
        self.host.accept_all()
        self.host.knobs(stop_takes=None, poll=None, ignore_restart=None, fails_until=None, fails_with=None)

    @rule(part=st.sampled_from(("/etc/machine-id", "/sys/class/dmi/id/product_uuid", "/etc/hostname")), text=st.sampled_from("abc"))
    def identity_changes(self, part: str, text: str) -> None:
        """One part of what tells machines apart: alone it says nothing, two within a week are another machine's."""
        self.identity.add(part)
        self.host.make_file(part, {"/etc/hostname": f"host{text}"}.get(part, "0123456789abcde" + text * 17) + "\n")
        self.act()

    # -- the packages ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(sorted(SCRIPTS)), steps=st.sampled_from((NEVER, NEVER, NEVER, 1, 2, 3, 5, 8)), restart=st.booleans())
    def package_script_runs(self, name: str, steps: int, restart: bool) -> None:
        """Run one of the packages' scripts, or so many of its steps; an agent that is left running goes on with what it has read."""
        left = iter(range(steps))

        def between(_done: str) -> None:
            if next(left, None) is None:
                raise InterruptedError

        with suppress(InterruptedError):
            SCRIPTS[name](self.host, between=between)
        if restart and self.has_tools:
            self._has(self.host.restart)
        elif restart:
            self.host.kill()
        self.act()

    @rule()
    def link_is_moved_back(self) -> None:
        if os.path.isdir(os.path.dirname(self.host.path(self.host.certificate))):
            self.host.move_link_back()
        self.act()

    @rule(name=st.sampled_from(("dpkg", "")))
    def package_manager_works(self, name: str) -> None:
        self.world.packager = name

    # -- SCOM -----------------------------------------------------------------------------------------------------------

    @rule(restart=st.booleans())
    def scom_signs(self, restart: bool) -> None:
        scom_sign(self.host, restart=restart and self.has_tools)
        self.act()

    @rule()
    def scom_restarts_the_agent(self) -> None:
        self._has(self.host.restart)
        self.act()

    # -- the CA ---------------------------------------------------------------------------------------------------------

    @rule(mode=st.sampled_from(("issue", "issue", "pending", "deny")))
    def ca_changes_its_mind(self, mode: str) -> None:
        self.switches.mode = mode

    @rule(wrong=st.sampled_from(("", "", "name", "eku", "key", "expired", "issuer")))
    def ca_issues_wrongly(self, wrong: str) -> None:
        self.switches.wrong = wrong
        self.issued_wrongly = self.issued_wrongly or bool(wrong)

    @rule(deny=st.booleans())
    def ca_settles_what_is_pending(self, deny: bool) -> None:
        for row in self.rows:
            if row.state == "pending":
                (self.authority.deny if deny else self.authority.approve)(row.id)

    @rule(lost=st.sampled_from(("before", "after")), times=st.integers(1, 3))
    def ca_loses_answers(self, lost: str, times: int) -> None:
        self.switches.update({"lost": lost, "lost_times": times})

    @rule(away=st.sampled_from(("all", "post", "get", "")))
    def ca_goes_away(self, away: str) -> None:
        self.switches.unavailable = away

    @rule()
    def ca_revokes(self) -> None:
        newest = max((row.id for row in self.rows if row.state == "issued"), default=0)
        if newest:
            self.revoked.add(fingerprint(self.authority.revoke(newest).certificate))

    @rule(seconds=st.sampled_from((0, 0, 200, 4000, -4000)))
    def ca_has_another_time(self, seconds: int) -> None:
        self.switches.date_offset = float(seconds)

    # -- time -----------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((30, 5 * MINUTE_S, HOUR_S, 5 * HOUR_S, DAY_S, 9 * DAY_S, 45 * DAY_S)))
    def time_passes(self, seconds: int) -> None:
        self.world.passes(seconds)

    @rule(skew=st.sampled_from((0, 0, HOUR_S, -HOUR_S, 3 * DAY_S, -3 * DAY_S, 400 * DAY_S, -9000 * DAY_S)))
    def clock_is_set(self, skew: int) -> None:
        self._set_clock(skew)

    def _set_clock(self, skew: int) -> None:
        if skew > self.world.clock.skew:  # what was counted by a clock that was behind, or is skipped now, is not known any more
            self.world.restarts.clear()
            self.world.failed.clear()
            self.forget_posts = self.world.clock.now()
        self.world.clock.skew = skew

    forget_posts = 0.0

    # -- what must hold -------------------------------------------------------------------------------------------------

    def budgets_are_kept(self) -> None:
        restarts = list(map(float, self.world.restarts))
        assert most_in(restarts, HOUR_S) <= RESTARTS_PER_HOUR, f"restarts in an hour: {restarts}"
        assert most_in(restarts, DAY_S) <= RESTARTS_PER_DAY, f"restarts in a day: {restarts}"
        rows = [row for row in self.rows if row.at >= self.forget_posts]
        issued = [row.at for row in rows if row.certificate]
        assert most_in(issued, DAY_S) <= CERTIFICATES_PER_DAY, f"certificates in a day: {issued}"
        assert most_in([row.at for row in rows], DAY_S) <= SUBMISSIONS_PER_DAY

    @rule()
    def quiet_period(self) -> None:
        """Everybody rests, faults are mended, the timer ticks: then the agent serves a valid certificate, or it is said why not."""
        self.mend()
        ended, until = None, 0
        for _ in range(MAX_RUNS):
            ended = self.carry_out(enroll.run)
            assert ended
            now = self.world.clock.host()
            until = (ended.result.step.until if ended.result else None) or NEVER * 10
            if not ended.rows and until > now + LONG_S and ended.result:
                break
            if not ended.rows and not ended.result and self._is_stuck(ended):
                break
            self.world.passes(max(min(until - now, LONG_S), HOUR_S) if ended.result and not ended.rows else HOUR_S)
        else:
            raise AssertionError(f"no rest after {MAX_RUNS} runs: {shown(ended)}")
        self._judge(ended)

    def _is_stuck(self, ended: Outcome) -> bool:
        """Whether the same failure came several times in a row, hours apart."""
        again = [self.carry_out(enroll.run) for _ in range(3) if self.world.passes(DAY_S) is None]
        return all(one and (one.status, one.message) == (ended.status, ended.message) for one in again)

    def _judge(self, ended: Outcome) -> None:
        if self.is_valid(self.host.served()):
            return
        looked = self.world.look()  # `status` must tell it as well, where it does not tell what the next run will try
        waits = looked.result is None or looked.result.step.action in plan.WAITING
        for told in (ended, looked) if waits else (ended,):
            found = [excuse for excuse in EXCUSES if excuse.holds(self, told)]
            said = [e for e in found if told.status in e.status and re.search(e.says, told.message)]
            assert said, f"no valid certificate is served; known reasons: {[e.why for e in found]}; said: {told.status} {told.message}"

    def mend(self) -> None:
        """End every fault. What people decided stays: a hold, an agent that was stopped, a certificate that was revoked."""
        self.world.writes_left = None
        self.world.packager = ""
        self._mend_agent()
        self._mend_configuration()
        self._set_clock(0)
        self.switches.reset()
        for row in self.rows:
            if row.state == "pending":
                self.authority.approve(row.id)
        self.act()


EXCUSES = (
    Excuse("held by the operator", lambda m, e: bool(e.result and e.result.journal.hold), (0, 4), "^held: "),
    Excuse("stopped on purpose", lambda m, e: m.stopped, (0,), "not proven"),
    Excuse("killed or broken by others, with nothing valid to start it with", lambda m, e: not m.up and not m.ours, (4,), "does not answer on port"),
    Excuse("the agent is not wholly installed", lambda m, e: not m.whole, (4,), "^no agent was found|httpsport lists|is missing$"),
    Excuse("the agent's account can't read its key", lambda m, e: m.locked_out, (4, 9, 10), "does not serve|serves neither|does not answer|can't get at"),
    Excuse("a certificate came that does not fit, and nothing changed since", lambda m, e: m.issued_wrongly, (8,), "refused: "),
    Excuse("stopped on purpose, with one that the operator went back to", lambda m, e: m.stopped and m.rolled_back, (0,), "was rolled back by the operator"),
    Excuse("put aside by the operator", lambda m, e: m.rolled_back, (9,), "was rolled back by the operator"),
    Excuse("the CA revoked one and then its successor", lambda m, e: len(m.revoked) > 1, (6,), "revoked generation .* and then its successor"),
)


class MemoryMachine(Machine):
    """In memory."""



def real_machine(folder: Path, ca: LabCA) -> Type[Machine]:
    """Return a machine with the lab's processes and this CA; its trees are made in `folder`."""
    numbers = itertools.count()

    class RealMachine(Machine):
        world_of = staticmethod(lambda: real_world(folder, ca, next(numbers)))

    return RealMachine
