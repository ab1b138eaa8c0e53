"""A crash before and after every change, act and word with the outside: the next runs converge.

The crash is simulated in the process: from the chosen point on nothing of the run happens any more. What is counted is each
method of `Store` that changes something, each control command of the agent, each exchange with the CA, and each act.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from scx_enroll import enroll, records, service
from scx_enroll.enroll import ACTS
from scx_enroll.pace import COOL_DOWN_S, REPEAT_SPREAD_S
from scx_enroll.rootfs import Root
from scx_enroll.store import Store
from tests.lab.agent import LabHost
from tests.lab.authority import to_pem
from tests.lab.ca import LabCA
from tests.scene import BRISK, Outcome, Scene

CHANGES = (
    "save_journal", "save_budget", "add_generation", "prune", "save_original", "save_page", "make_copy", "swap",
    "set_marker", "sweep", "save_key", "drop_keys", "make_pair", "point", "own", "remove_pairs", "save_baked_in", "move_back",
)
HOUR_S = 3600
PARTS = 2  # of a scenario's points, for as many workers
MAX_POINTS = 80  # a guard against a run without end, well above what any scenario takes


class Crash(BaseException):
    """The power went."""


class Fuse:
    """Raises Crash at the chosen point, and ever after: a dead process does nothing more.

    `before`: points are those before a change alone, since the run changes nothing between one and the next.
    """

    def __init__(self, point: int, *, before: bool = False) -> None:
        self.left = point
        self.before = before
        self.names: List[str] = []
        self.blown = False

    def tick(self, name: str) -> None:
        """Count a point."""
        if self.before and not self.blown and not name.startswith("before "):
            return
        self.names.append(name)
        if self.blown or len(self.names) == self.left:
            self.blown = True
            raise Crash(name)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a point before and one after it."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.tick(f"before {name}")
            result = function(*arguments, **named)
            self.tick(f"after {name}")
            return result

        return wrapped

    def store(self, root: Root) -> Store:
        """Return a store whose changes are points."""
        store = Store(root)
        for name in CHANGES:
            owner = store if hasattr(store, name) else store.beside
            setattr(owner, name, self.around(name, getattr(owner, name)))
        return store

    def line(self) -> records.Line:
        """Return a line to the CA whose exchanges are points."""
        real = records.Line()

        def connect(root: Root, ca: Any) -> Any:
            conversation = real.connect(root, ca)
            for name in ("authority", "submit", "fetch"):
                setattr(conversation, name, self.around(name, getattr(conversation, name)))
            return conversation

        return replace(real, connect=connect)


def first_enrolment(scene: Scene) -> Dict[str, bool]:
    """Nothing was done before."""
    return {}


def renewal(scene: Scene) -> Dict[str, bool]:
    """A generation is in service, and another is wanted."""
    assert scene.run().status == 0
    scene.offset_s += 2 * HOUR_S
    scene.cas[0].switches.date_offset = scene.offset_s
    return {"renew": True}


def refused_by_the_agent(scene: Scene) -> Dict[str, bool]:
    """The agent dies of the new certificate: installed, rolled back."""
    scene.host.refuse_new()
    return {}


def refused_when_it_runs_again(scene: Scene) -> Dict[str, bool]:
    """Installed while the agent was stopped, and nothing proved; started, it dies of it."""
    scene.host.refuse_new()
    scene.host.stop()
    assert scene.run().status == 0
    scene.host.start()
    return {}


def brought_back(scene: Scene) -> Dict[str, bool]:
    """The link was moved back and the agent restarted by somebody else."""
    assert scene.run().status == 0
    scene.host.move_link_back()
    scene.host.restart()
    return {}


def stopped(scene: Scene) -> Dict[str, bool]:
    """The agent was stopped on purpose."""
    scene.host.stop()
    return {}


def serving_another(scene: Scene) -> Dict[str, bool]:
    """The files are ours again, but the agent serves what somebody else had put there."""
    assert scene.run().status == 0
    ours = next(name for name in scene.host.snapshot() if "scx-enroll-" in name).rpartition("/")[2]
    scene.host.move_link_back()
    scene.host.restart()
    scene.host.relink(ours)
    return {}


def rolled_back(scene: Scene) -> Dict[str, bool]:
    """The operator goes back from a renewal."""
    assert scene.run().status == 0
    assert scene.run(renew=True).status == 0
    scene.offset_s += 2 * HOUR_S
    scene.cas[0].switches.date_offset = scene.offset_s
    return {}


def brought_by_hand(scene: Scene) -> Dict[str, bool]:
    """A certificate comes in a file."""
    return {}


REFUSED = (refused_by_the_agent, refused_when_it_runs_again)
SCENARIOS: Tuple[Callable[[Scene], Dict[str, bool]], ...] = (
    first_enrolment, renewal, refused_by_the_agent, refused_when_it_runs_again, brought_back, stopped, serving_another, rolled_back, brought_by_hand,
)


def crashing_run(scene: Scene, scenario: Any, fuse: Fuse, monkeypatch: pytest.MonkeyPatch, wish: Dict[str, bool]) -> bool:
    """Run, or carry out the scenario's verb, with a fuse; says whether it blew."""
    with monkeypatch.context() as patch:
        patch.setattr(service, "control", fuse.around("control", service.control))
        patch.setattr(enroll, "ACTS", {name: fuse.around(name, act) for name, act in ACTS.items()})
        try:
            parts = {"store": fuse.store, "line": fuse.line()}
            if scenario is rolled_back:
                scene.do(enroll.roll_back, parts=parts)
            elif scenario is brought_by_hand:
                csr = enroll.make_csr(scene.root(), enroll.Options(), scene.tools())
                ca = scene.cas[0].authority
                scene.do(enroll.install, to_pem([ca.issue(csr), *ca.chain()]), "issued.pem", parts=parts)
            else:
                scene.run(parts=parts, **wish)
        except Crash:
            return True
    return False


def quiet(scene: Scene) -> Outcome:
    """Run as the timer does until nothing changes any more; hours pass in between, so that budgets and pauses end."""
    for _ in range(6):
        ended = scene.run()
        if not ended.rows and ended.status in (0, 9) and scene.run().rows == ():
            return ended
        scene.offset_s += COOL_DOWN_S + REPEAT_SPREAD_S if ended.status == 5 else HOUR_S + 1
        scene.cas[0].switches.date_offset = scene.offset_s
    return ended


def comes_back(scene: Scene) -> bool:
    """Say whether the agent answers when a restart that was under way has ended: until then it may answer, and the next moment not."""
    deadline = time.monotonic() + 40  # other tests may load the machine
    while time.monotonic() < deadline:
        if not any(service.start_time(call["pid"]) for call in scene.host.calls) and scene.served:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """One CA for all, since its keys are what takes time."""
    with LabCA(tmp_path_factory.mktemp("ca")) as lab:
        yield lab


def one_crash(tmp_path: Path, ca: LabCA, scenario: Any, point: int, monkeypatch: pytest.MonkeyPatch) -> Tuple[bool, str]:
    """Play a scenario with a crash at one point and judge what becomes of it; says whether the point was reached."""
    ca.switches.reset()
    with LabHost(tmp_path / f"host{point}", key="ec:secp256r1", host=f"host{point}") as host:
        host.knobs(poll=0.25)  # twenty times: on a loaded machine a stop must not outlast it
        host.start()
        scene = Scene(host, [ca], patience=replace(BRISK, gone_s=1.5))  # the stand-in is up in a tenth of that, or not at all
        original, served = host.snapshot(), scene.served
        wish = scenario(scene)
        issued, before = scene.issued, scene.served
        fuse = Fuse(point, before=True)
        blew = crashing_run(scene, scenario, fuse, monkeypatch, wish)
        where = f"{scenario.__name__}, point {point}: {fuse.names[-1]}"
        if scenario not in (stopped, *REFUSED):  # those leave it down, for the next run to mend
            assert comes_back(scene), f"the agent is down beyond a restart: {where}"
        asked = b'"state": "submitting"' in (scene.state / "journal.json").read_bytes() if blew and (scene.state / "journal.json").exists() else False
        ended = quiet(scene)
        assert b'"state": "settled"' in (scene.state / "journal.json").read_bytes(), f"{where}: {ended}"
        most = 2 if asked else 1  # an answer that no record tells of is doubtful
        assert scene.issued - issued <= most, f"a certificate too many: {where}"
        if scenario in REFUSED:
            assert ended.status == 9, where
            assert scene.served == served, where
            assert host.snapshot() == original, where
        elif scenario is stopped:
            assert host.pid == 0, f"it was stopped on purpose: {where}"
            host.start()
            assert scene.is_enrolled(), where
        elif scenario is brought_by_hand:
            assert ended.status == 0, f"{where}: {ended}"
            assert scene.served == scene.installed != "", where
        else:
            assert ended.status == 0, f"{where}: {ended}"
            assert scene.is_enrolled(), where
            assert before, where
        copies = [name for name in host.snapshot() if "scx-enroll" in name]
        assert len(copies) <= 1, f"left behind: {copies} {where}"
        return blew, where


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a crash leaves its child unreaped
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_after_a_crash_at_any_point_the_next_runs_converge(
    tmp_path: Path, ca: LabCA, scenario: Any, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail between any two steps; the next run finishes or undoes the work."""
    reached = 0
    for point in range(1 + part, MAX_POINTS, PARTS):
        blew, _ = one_crash(tmp_path, ca, scenario, point, monkeypatch)
        if not blew:
            break
        reached += 1
    else:
        pytest.fail("no end of points")
    assert reached > 2, "the scenario has points"
    print(f"{scenario.__name__}: {reached} crash points")
