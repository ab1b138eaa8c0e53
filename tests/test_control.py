"""An agent that does not do what it is told: strays, start limits, units that failed. Nobody else's process is ever signalled."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from scx_enroll import activate, aside, cli, enroll, idle, observe, premises, report, sealing, service, systemd, transaction, unit
from scx_enroll import agent as agents
from scx_enroll.beside import Beside
from scx_enroll.enroll import Options
from scx_enroll.errors import HostError, NeedsPerson
from scx_enroll.journal import Budget, Installation
from scx_enroll.rootfs import Root
from scx_enroll.service import Served
from scx_enroll.store import Store
from tests import zones
from tests.lab import packagescripts
from tests.lab.agent import LabHost, fingerprint
from tests.lab.ca import LabCA
from tests.scene import BRISK, Outcome, Scene

SHORT = replace(BRISK, listener_s=1.0, gone_s=0.3)


@pytest.fixture(scope="module")
def shared_ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """One CA for all hosts here."""
    with LabCA(tmp_path_factory.mktemp("ca")) as ca:
        yield ca


@pytest.fixture
def scene(tmp_path: Path, shared_ca: LabCA) -> Iterator[Scene]:
    """A host whose agent serves its own certificate."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.knobs(poll=0.005)
        assert host.start()
        yield Scene(host, [shared_ca], patience=SHORT)


def told(host: LabHost) -> List[str]:
    """What scxadmin was asked for."""
    return [" ".join(call["arguments"]) for call in host.calls if call["tool"] == "scxadmin"]


def spent(scene: Scene) -> int:
    """How many restarts the budget counts."""
    return len(json.loads((scene.state / "budget.json").read_bytes())["restarts"])


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process of somebody else's; a signal would end it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        assert process.poll() is None, "it was signalled"
        process.send_signal(signal.SIGKILL)


# -- strays ------------------------------------------------------------------------------------------------------------


def test_a_restart_that_does_not_reach_the_agent(scene: Scene) -> None:
    """A server outside its unit makes every restart a no-op with status 0: it is ended by its own command, and started in its place."""
    scene.host.make_stray(poll=0.005)
    stray = scene.host.pid
    ended = scene.run()
    assert (ended.status, scene.is_enrolled()) == (0, True), ended
    assert scene.host.pid != stray
    assert told(scene.host)[-2:] == ["-restart", "-start"]
    assert spent(scene) == 2


def test_a_run_that_is_killed_between_the_end_of_a_stray_and_the_start(scene: Scene) -> None:
    """The agent is down because of us, and the journal says so: the next run brings it up, and the budget's last restart is for the way back."""
    scene.host.make_stray(poll=0.005)
    served = scene.served

    def killed(message: str) -> None:
        if message.endswith("scxadmin -start"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.run(parts={"waiting": killed})
    assert (scene.host.pid, scene.served) == (0, "")
    assert (scene.run().status, scene.served) == (9, served)
    scene.offset_s = 3660
    assert scene.run().status == 0
    assert scene.is_enrolled()


def kill(*_: object) -> None:
    raise KeyboardInterrupt


def killed_in_its_restart(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the agent was restarted, in vain, and die."""
    scene.host.fail_starts()
    with monkeypatch.context() as patch:
        patch.setattr(activate, "_await", kill)
        with pytest.raises(KeyboardInterrupt):
            scene.run()
    assert scene.host.pid == 0


def unlist(scene: Scene) -> bytes:
    """Take SCOM's port out of the agent's conf; returns what that was."""
    conf = Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf"))
    before = conf.read_bytes()
    conf.write_bytes(re.sub(rb"(?m)^httpsport=.*$", b"httpsport=0", before))
    return before


def strange(scene: Scene) -> None:
    """Have somebody else's link stand at the certificate's name."""
    scene.host.make_file("/etc/opt/omi/ssl/omi-other.pem", scene.host.read(scene.host.host_pem))
    scene.host.relink("omi-other.pem")


def test_a_run_is_killed_in_its_restart_and_a_script_takes_the_port_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be proved where the agent lists no port; but we have stopped it, and what it does beside that goes on."""
    served = scene.served
    killed_in_its_restart(scene, monkeypatch)
    before = unlist(scene)
    for _ in range(2):
        ended = scene.run()
        assert (ended.status, "httpsport lists no port" in ended.message) == (4, True), ended
        assert scene.host.pid != 0
        assert spent(scene) == 2, "started once"
    assert b'"state": "installing"' in (scene.state / "journal.json").read_bytes(), "to be gone on with"
    Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf")).write_bytes(before)
    assert (scene.run(hasty=True).status, scene.served) == (9, served), "the last restart is for the way back"
    scene.offset_s = 3660
    assert scene.run(hasty=True).status == 0
    assert scene.is_enrolled()


def test_the_pair_is_made_anew_when_a_failed_renewal_is_to_go_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither certificate is for that key, so there is no way back; the agent that we stopped is started with what is there."""
    backward = transaction._backward

    def late(site: activate.Site, agent: agents.Agent) -> None:
        scene.host.scxsslconfig_f()
        scene.host.accept_all()
        backward(site, agent)

    scene.host.refuse_new()
    monkeypatch.setattr(transaction, "_backward", late)
    ended = scene.run()
    assert (ended.status, ended.hint) == (4, "run again: it starts from what is there")
    assert scene.served == fingerprint(scene.host.leaf())
    assert spent(scene) <= 3


def test_an_agent_that_lists_no_port_stays_down_where_no_installation_is_open(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed restart of an enrolled agent leaves it down, too; once it was seen up, who stops it has a purpose; so has a hold."""
    assert scene.run().status == 0
    scene.offset_s = 3700
    scene.host.kill()
    killed_in_its_restart(scene, monkeypatch)
    unlist(scene)
    enroll.hold(scene.root(), Options(), scene.tools(), "mine")
    assert (scene.run().status, scene.host.pid) == (4, 0)
    enroll.hold(scene.root(), Options(), scene.tools(), "")
    assert scene.run().status == 4
    assert scene.host.pid != 0
    starts = spent(scene)
    scene.host.stop()
    enroll.hold(scene.root(), Options(), scene.tools(), "mine")
    enroll.hold(scene.root(), Options(), scene.tools(), "")
    assert (scene.run().status, scene.host.pid, spent(scene)) == (4, 0, starts)


def test_of_two_agents_the_other_one_is_started(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """`layout` says which one is meant, and goes on saying so when that one lists no port any more."""
    for path in ("/opt/microsoft/scx/bin/omiserver", "/etc/opt/microsoft/scx/conf/omiserver.conf"):
        scene.host.make_file(path, b"")
    scene.configure(layout="omi")
    killed_in_its_restart(scene, monkeypatch)
    unlist(scene)
    ended = scene.run()
    assert (ended.status, "httpsport lists no port" in ended.message, scene.host.pid != 0) == (4, True, True), ended


def test_an_agent_that_is_locked_out_is_started_in_vain(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its account can't get at the key: the day's restarts are for when somebody has mended that."""
    assert scene.run().status == 0
    scene.offset_s = 3700
    scene.host.kill()
    killed_in_its_restart(scene, monkeypatch)
    starts = spent(scene)
    folder = Path(scene.host.path("/etc/opt/omi/ssl"))
    folder.chmod(0o700)
    ended = scene.run(hasty=True)
    assert (ended.status, spent(scene), scene.host.pid) == (4, starts, 0), ended
    conf = unlist(scene)
    assert (scene.run(hasty=True).status, spent(scene), scene.host.pid) == (4, starts, 0), "nor where SCOM's port is not listed"
    Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf")).write_bytes(conf)
    folder.chmod(0o755)
    scene.offset_s = 7400
    assert scene.run(hasty=True).status == 0
    assert scene.is_enrolled()


def test_an_agent_that_we_left_down_is_forgotten_with_a_state_that_is_set_aside(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was renamed and given another id while our restart had failed: it is another one, and its agent is down because of us."""
    scene.run()
    scene.offset_s = 3700
    scene.host.kill()
    killed_in_its_restart(scene, monkeypatch)
    scene.host.make_file("/etc/hostname", "host9\n")
    scene.host.make_file("/etc/machine-id", "0123456789abcdef" * 2 + "\n")
    ended = scene.run(hasty=True)
    assert ended.rows[:2] == ("L0", "L9"), ended
    assert scene.host.pid != 0


def test_an_agent_that_was_stopped_in_an_image_is_started_in_its_clone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the image of a sealed host decided that."""
    scene.run()
    scene.offset_s = 3700
    scene.host.kill()
    killed_in_its_restart(scene, monkeypatch)
    scene.host.stop()
    enroll.seal(scene.root(), Options(), scene.tools(), lambda site: sealing.seal(site, "", delete_key=False))
    scene.host.make_file("/etc/hostname", "host9\n")
    scene.host.make_file("/etc/machine-id", "0123456789abcdef" * 2 + "\n")
    scene.run(hasty=True)
    assert scene.host.pid == 0


def test_a_start_that_fails_is_told_as_one_that_worked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scxadmin says counts for nothing; and the last restart of the hour is for the way back."""
    notes: List[str] = []
    killed_in_its_restart(scene, monkeypatch)
    unlist(scene)
    scene.host.fail_starts()
    for scene.offset_s in (0, 0, 3700):
        scene.run(hasty=True, parts={"noted": notes.append})
    assert [note.partition(", was ")[2].partition(" (")[0] for note in notes] == ["not brought up", "started"]
    assert scene.host.pid != 0


def test_an_agent_that_was_stopped_is_started_when_others_end_an_installation(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No restart of ours left it down."""
    assert scene.run().status == 0
    scene.host.stop()
    scene.host.move_link_back()
    with monkeypatch.context() as patch:
        patch.setattr(transaction, "_forward", kill)
        with pytest.raises(KeyboardInterrupt):
            scene.run(hasty=True)
    strange(scene)
    calls = told(scene.host)
    scene.run(hasty=True)
    assert (scene.host.pid, told(scene.host)) == (0, calls)


@pytest.mark.parametrize("left", ["no pair", "a tree", "a lock"])
def test_a_start_that_would_be_in_vain_costs_a_restart(scene: Scene, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """What others left can't be loaded, nothing runs in that tree, or they are not done yet."""
    killed_in_its_restart(scene, monkeypatch)
    calls = told(scene.host)
    if left == "no pair":
        unlist(scene)
        scene.host.install(scene.host.new_pair()[0])
    else:
        strange(scene)
    if left == "a lock":
        proceed, at_work = transaction._close, []

        def close(site: activate.Site, agent: agents.Agent) -> None:
            at_work.append("dpkg")
            proceed(site, agent)

        monkeypatch.setattr(transaction, "_close", close)
        monkeypatch.setattr(agents, "packager", lambda _root: "".join(at_work))
    scene.run(live=left != "a tree")
    assert (told(scene.host), spent(scene), scene.host.pid) == (calls, 1, 0)


@pytest.mark.parametrize("change", [unlist, strange])
def test_an_agent_that_came_up_after_all_is_started_once_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, change: Callable[[Scene], object]
) -> None:
    """What others did to its port or its pair meanwhile is no reason for a start."""
    with monkeypatch.context() as patch:
        patch.setattr(activate, "_await", kill)
        with pytest.raises(KeyboardInterrupt):
            scene.run()
    assert scene.host.wait()
    change(scene)
    begun: List[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(activate, "_control", lambda *_: begun.append("-start"))
        patch.setattr(activate, "restart", kill)
        with suppress(KeyboardInterrupt):
            scene.run()
    assert begun == []


def test_a_missing_control_command_costs_restarts(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was started, so nothing counts."""
    killed_in_its_restart(scene, monkeypatch)
    unlist(scene)
    tool = Path(scene.host.path(scene.host.scxadmin))
    tool.rename(tool.with_suffix(".away"))
    ended = scene.run()
    assert (ended.status, spent(scene)) == (4, 1), ended


def test_a_dead_agent_that_nobody_reaps_counts_as_running() -> None:
    """In a container whose first process reaps nobody: its number is taken, and nothing will ever listen there."""
    with subprocess.Popen(["true"]) as process:
        while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
            time.sleep(0.01)
        assert not agents._is_running(str(process.pid).encode())
        assert agents._is_running(str(os.getpid()).encode())


@pytest.mark.slow
def test_a_stray_that_the_budget_has_no_room_for(scene: Scene) -> None:
    """The last restart is for the way back: the process is named, with what ends it, and the host is as it was."""
    scene.host.make_stray(poll=0.005)
    scene.state.mkdir(parents=True, mode=0o700)
    (scene.state / "budget.json").write_text(json.dumps({"version": 1, "restarts": [int(os.path.getmtime(scene.etc))]}))
    before, served, pid = scene.host.snapshot(), scene.served, scene.host.pid
    ended = scene.run()
    assert ended.status == 9
    assert f"omiserver, process {pid}, goes on through a restart (/opt/omi/bin/omiserver -s ends it)" in ended.message
    assert (scene.host.snapshot(), scene.served, scene.host.pid) == (before, served, pid)


@pytest.mark.slow
def test_a_stray_that_does_not_end(scene: Scene) -> None:
    """It is waited for, not for ever, and never killed; nothing is started beside it."""
    scene.host.make_stray(poll=0.005)
    scene.host.knobs(stop_takes=30)
    served, pid = scene.served, scene.host.pid
    ended = scene.run()
    assert ended.status == 9
    assert f"omiserver, process {pid}, does not end" in ended.message
    assert (scene.served, scene.host.pid) == (served, pid)
    assert "-start" not in told(scene.host)[1:]


@pytest.mark.slow
def test_a_pid_file_that_names_somebody_elses_process(scene: Scene, sleeper: int) -> None:
    """Its number was given to another: that one must not be signalled; the file and what to look at are named."""
    scxadmin = Path(scene.host.path(scene.host.scxadmin))
    scxadmin.unlink()
    scxadmin.write_text("#!/bin/sh\nexit 0\n")
    scxadmin.chmod(0o755)
    pid_file = Path(scene.host.path("/var/opt/omi/run/omiserver.pid"))
    own = pid_file.read_text()
    pid_file.write_text(f"{sleeper}\n")
    served = scene.served
    ended = scene.run()
    pid_file.write_text(own)
    assert ended.status == 9
    assert f"/var/opt/omi/run/omiserver.pid names process {sleeper}, which is not omiserver" in ended.message
    assert scene.served == served


ONE, OTHER, NONE = (7, 1), (8, 2), (0, 0)  # starts of the agent
RIGHT, WRONG, SILENT = Served(listening=True, leaf="new"), Served(listening=True, leaf="old"), Served(listening=False)


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "process", "seen", "then"),
    [
        pytest.param(ONE, ONE, "running", WRONG, "replace", id="a stray"),
        pytest.param(ONE, ONE, "running", RIGHT, "", id="it took the new one up by itself"),
        pytest.param(ONE, OTHER, "running", WRONG, "", id="restarted, and it refuses"),
        pytest.param(ONE, ONE, "died", WRONG, "", id="it died, and another listens"),
        pytest.param(NONE, NONE, "running", WRONG, "", id="no pid file to go by"),
        pytest.param(NONE, NONE, "running", SILENT, "-start", id="no pid file, and nothing listens"),
        pytest.param(ONE, NONE, "stopped", SILENT, "-start", id="a slow stop"),
        pytest.param(ONE, NONE, "stopped", WRONG, "", id="stopped, and another listens"),
        pytest.param(ONE, OTHER, "died", SILENT, "", id="it died of the pair"),
        pytest.param(ONE, ONE, "died", SILENT, "-start", id="the start did not get as far as its pid file"),
    ],
)
def test_what_follows_a_restart(
    monkeypatch: pytest.MonkeyPatch, room: bool, before: Tuple[int, int], after: Tuple[int, int], process: str, seen: Served, then: str
) -> None:
    """What goes on is ended, what is down is started, and nothing else is touched; the way back keeps its restart."""
    done: List[str] = []
    instances = iter([before, after])
    agent: Any = SimpleNamespace(server="omiserver", scxadmin="scxadmin", pid_file="" if before == NONE else "omiserver.pid")
    for place, name, what in (
        (activate, "_instance", lambda *_: next(instances)), (agents, "process", lambda *_: process), (unit, "outside", lambda *_: 0),
        (activate, "_control", lambda _site, _agent, word, *_: done.append(word)), (activate, "_await", lambda *_: seen),
        (activate, "_replace", lambda *_: done.append("replace") or (RIGHT, "")), (activate, "has_room", lambda _site, needed: room and needed == 2),
    ):
        monkeypatch.setattr(place, name, what)
    site: Any = SimpleNamespace(root=None)
    if then == "replace" and not room:
        with pytest.raises(NeedsPerson, match="process 7, goes on through a restart"):
            activate._bring_up(site, agent, "new", reserve=1)
    else:
        assert activate._bring_up(site, agent, "new", reserve=1)[0] == (RIGHT if then == "replace" else seen)
    assert done == ["-restart", *([then] if then and room else [])]


# -- commands that others give, or that a killed run gave ----------------------------------------------------------------


def test_the_command_of_a_killed_run_is_still_at_work(scene: Scene, sleeper: int) -> None:
    """Two at once would fight over the agent: it is waited for, not for ever, and named; nothing is done meanwhile."""
    assert scene.run().status == 0
    store = Store(scene.root())
    store.load()
    store.update(installation=Installation(pid=sleeper, pid_start=service.start_time(sleeper)))
    before, calls, scene.patience = scene.host.snapshot(), told(scene.host), replace(SHORT, command_s=0.1)
    ended = scene.run(renew=True)
    assert ended.status == 4
    assert f"still works after 0 s, process {sleeper}" in ended.message
    assert (scene.host.snapshot(), told(scene.host)) == (before, calls)


@pytest.mark.parametrize("ours", [True, False])
def test_a_units_command_outlives_the_run_that_was_killed(scene: Scene, manager: Manager, monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """Its process is the manager's: where the journal says that one was begun, the manager is asked; an idle host asks nobody."""
    manager.procs.write_text(f"1\n{scene.host.pid}\n")
    assert scene.run().status == 0
    store = Store(scene.root())
    store.load()
    store.update(restarting=scene.served if ours else "")
    asked: List[bool] = []
    monkeypatch.setattr(systemd, "control_is_running", lambda: asked.append(True) or len(asked) < 3)
    assert scene.run().status == 0
    assert len(asked) == (3 if ours else 0)


def test_a_run_that_is_killed_while_the_agent_stops(scene: Scene) -> None:
    """L9: it is down by our own restart, as the journal says while the command works; else it would count as stopped on purpose."""
    assert scene.run().status == 0
    scene.host.kill()
    path, copy = Path(scene.host.path(scene.host.scxadmin)), scene.etc / "journal.json"
    real = path.rename(path.with_name("real"))
    pid_file = scene.host.path("/var/opt/omi/run/omiserver.pid")
    path.write_text(f'#!/bin/sh\nsleep 0.1; cp "{scene.state}/journal.json" "{copy}"\nrm "{pid_file}"\n')
    path.chmod(0o755)
    assert scene.run().status == 4
    real.replace(path)
    during, after = (json.loads(file.read_bytes()) for file in (copy, scene.state / "journal.json"))
    assert during["restarting"] == after["restarting"] == scene.installed
    assert (during["installation"]["pid"] > 1, after["installation"]["pid"]) == (True, 0)
    assert agents.process(scene.root(), agents.find(scene.root(), port=scene.host.port)) == "stopped"
    scene.offset_s = 3660
    assert scene.run().rows == ("L9",)
    assert scene.is_enrolled()


def test_an_agent_that_was_started_is_stopped_after_a_run_that_failed(scene: Scene) -> None:
    """L9: it was seen up, so our restart is over, however the run ended: who stops it then has a purpose."""
    assert scene.run().status == 0
    scene.offset_s = 3660
    scene.host.kill()
    password = scene.etc / "password0"
    kept = password.rename(password.with_name("kept"))
    ended = scene.run(renew=True)
    assert (ended.status, ended.rows) == (3, ("L9",)), ended
    kept.rename(password)
    scene.host.stop()
    assert (scene.run().rows, scene.served) == ((), "")


def test_a_package_manager_begins_between_look_and_restart(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scripts stop and start the agent themselves: the restart is left to a later run."""
    assert scene.run().status == 0
    scene.host.kill()
    calls, found = told(scene.host), iter([""])
    monkeypatch.setattr(agents, "packager", lambda _root: next(found, "dpkg, process 4711,"))
    ended = scene.run()
    assert (ended.status, ended.message) == (4, "dpkg, process 4711, is changing packages")
    assert told(scene.host) == calls


@pytest.mark.parametrize("how", ["a package manager", "a tool that others may write"])
def test_an_installation_that_can_not_be_finished_is_begun(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What keeps a restart from being made is seen before anything is written down, let alone changed; then it is done as if it had not been."""
    assert scene.run().status == 0
    scene.host.scom_sign()
    before, tool = scene.host.snapshot(), Path(scene.host.path(scene.host.scxadmin))
    with monkeypatch.context() as patch:
        if how == "a package manager":
            found = iter([""])
            patch.setattr(agents, "packager", lambda _root: next(found, "dpkg"))
        else:
            tool.chmod(0o777)
        ended = scene.run()
        assert (ended.status, ended.rows) == (4, ()), ended
    assert json.loads((scene.state / "journal.json").read_bytes())["installation"]["state"] == "settled"
    assert scene.host.snapshot() == before
    tool.chmod(0o755)
    assert (scene.run().rows, scene.is_enrolled()) == (("L7",), True)


def test_a_rollback_leaves_no_restart_for_its_own_way_back(scene: Scene) -> None:
    """A person's word, too, waits for two: the certificate of before may be refused by now."""
    assert scene.run().status == 0
    store = Store(scene.root())
    store.load()
    store.save_budget(replace(store.budget, restarts=store.budget.restarts * 2))
    before, calls = scene.host.snapshot(), told(scene.host)
    ended = scene.do(enroll.roll_back)
    assert ended.status == 4
    assert "no room for two: one to go and one to come back" in ended.message
    assert (scene.host.snapshot(), told(scene.host)) == (before, calls)


def test_a_stray_whose_program_others_may_write(scene: Scene, manager: Manager) -> None:
    """It would be run as root to end it: refused before a restart is spent."""
    Path(scene.host.path("/opt/omi/bin/omiserver")).chmod(0o777)
    served = scene.served
    ended = scene.run()
    assert "may be written by others" in ended.message
    assert (scene.served, spent(scene)) == (served, 0)


def test_a_stray_that_takes_its_time_to_end(scene: Scene, manager: Manager) -> None:
    """Started beside it, the service would find its port taken: it is waited for."""
    scene.host.make_stray(poll=0.005)
    scene.host.knobs(stop_takes=0.3)
    assert scene.run().status == 0
    assert scene.is_enrolled()


def test_the_very_second_in_which_the_budget_has_room(scene: Scene) -> None:
    """The plan says "not before" that time; a run that comes then must not be told to wait."""
    store, now = Store(scene.root()), 1_700_000_000
    with store.lock(0, str):
        store.save_budget(Budget(restarts=(now,) * 3))
        site = activate.Site(scene.root(), store, SHORT, lambda: now + 3600, str)
        assert activate.has_room(site, 1)
        assert activate.within_budget(site, 1).restarts == (now,) * 3
        early = replace(site, clock=lambda: now + 3599)
        assert not activate.has_room(early, 1)
        with pytest.raises(activate.Truce, match="no room for a restart"):
            activate.within_budget(early, 1)


# -- where systemd keeps the agent -------------------------------------------------------------------------------------


class Manager:
    """What systemd would say of the agent's unit; `asked` is what it was told to do."""

    def __init__(self, folder: Path) -> None:
        self.said: Dict[str, str] = {"LoadState": "loaded", "ActiveState": "active", "Result": "success", "ControlGroup": "/omid"}
        self.asked: List[str] = []
        self.procs = folder / "omid/cgroup.procs"
        self.procs.parent.mkdir(parents=True)
        self.procs.write_text("1\n")

    def show(self, name: str, *names: str) -> Dict[str, str]:
        """Answer as the manager does."""
        return {name: self.said[name] for name in names}


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """A manager of the tree's agent; the agent's tools are started as without one."""
    made = Manager(tmp_path / "groups")
    monkeypatch.setattr(unit, "GROUPS", (str(tmp_path / "none"), str(tmp_path / "groups")))
    for name, what in {
        "manages": lambda _root: True, "show": made.show, "forget_failures": lambda name: made.asked.append(f"reset-failed {name}"),
        "as_unit": lambda _unit, command, _limit: command, "check": lambda: None, "control_is_running": lambda: False,
        "is_going_down": lambda: False,
    }.items():
        monkeypatch.setattr(systemd, name, what)
    return made


def test_a_stray_is_restarted_in_vain(scene: Scene, manager: Manager) -> None:
    """Outside the control group of its unit it is known before: no restart is spent on it, and the unit's failures are forgotten."""
    stray = scene.host.pid
    ended = scene.run()
    assert (ended.status, scene.is_enrolled()) == (0, True), ended
    assert scene.host.pid != stray
    assert (told(scene.host)[1:], spent(scene), manager.asked) == (["-start"], 1, ["reset-failed omid"])


def test_a_stray_that_serves_the_right_certificate_is_told(scene: Scene, manager: Manager) -> None:
    """It does no harm until a restart is due, and then every restart is in vain: status names it before."""
    assert scene.run().status == 0

    def notes() -> List[str]:
        looked = scene.do(enroll.inspect).result
        assert looked
        return [note for note in looked.view.ready.notes if "outside" in note]

    manager.procs.write_text(f"1\n{scene.host.pid}\n")
    assert notes() == []
    manager.procs.write_text("1\n")
    assert len(notes()) == 1
    assert f"as process {scene.host.pid}, where no restart reaches it" in notes()[0]


@pytest.mark.parametrize("how", ["inside", "no such unit", "groups can't be read"])
def test_an_agent_that_a_restart_reaches_is_ended_by_hand(scene: Scene, manager: Manager, how: str) -> None:
    """In its unit, or where nobody can tell, it is restarted as its documentation says; the starts so far do not count."""
    manager.procs.write_text(f"1\n{scene.host.pid}\n")
    if how == "no such unit":
        manager.said.update(LoadState="not-found", ControlGroup="")
    elif how != "inside":
        manager.procs.unlink()
    assert scene.run().status == 0
    assert (told(scene.host)[1:], spent(scene), manager.asked) == (["-restart"], 1, ["reset-failed omid"])


def test_a_number_in_the_pid_file_makes_a_stray_of_another(scene: Scene, manager: Manager, sleeper: int) -> None:
    """Outside the unit, but not the server: not ended, and a plain restart is made."""
    agent = agents.find(Root(scene.host.root, live=True), port=scene.host.port)
    assert unit.outside(scene.root(), agent) == scene.host.pid
    Path(scene.host.path(agent.pid_file)).write_text(f"{sleeper}\n")
    assert unit.outside(scene.root(), agent) == 0


@pytest.mark.slow
def test_what_systemd_says_is_left_out(scene: Scene, manager: Manager) -> None:
    """A failure tells the state of the unit: a start limit is seen nowhere else."""
    manager.procs.write_text(f"1\n{scene.host.pid}\n")
    manager.said.update(ActiveState="failed", Result="start-limit-hit")
    scene.host.refuse_new()
    assert "omid.service is failed, result start-limit-hit" in scene.run().message


@pytest.mark.parametrize(("state", "process"), [("failed", "died"), ("activating", "died"), ("inactive", "stopped"), ("active", "stopped")])
def test_a_crash_looks_like_a_stop(scene: Scene, manager: Manager, state: str, process: str) -> None:
    """systemd takes the pid file of a service that failed away: its state tells, and is among what the decision rests on."""
    scene.host.stop()
    manager.said["ActiveState"] = state
    root = scene.root()
    assert agents.process(root, agents.find(root, port=scene.host.port)) == process
    assert root.notes.units == {"omid": state}


def test_an_agent_that_crashed_is_started_and_one_that_was_stopped_is_not(scene: Scene, manager: Manager) -> None:
    """L9, by the state of the unit alone."""
    scene.run()
    scene.host.stop()
    manager.said["ActiveState"] = "inactive"
    assert (scene.run().rows, scene.served) == ((), "")
    manager.said["ActiveState"] = "failed"
    assert scene.run().rows == ("L9",)
    assert scene.is_enrolled()


def test_a_unit_that_fails_later_is_not_noticed(
    scene: Scene, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer for an agent that is stopped rests on the state of its unit, too."""
    systemctl = tmp_path / "systemctl"
    monkeypatch.setattr(idle, "SYSTEMCTL", (str(tmp_path / "none"), str(systemctl)))

    def says(state: str) -> None:
        systemctl.write_text(f'#!/bin/sh\n[ "$*" = "show --property=ActiveState omid.service" ] && echo ActiveState={state}\n')
        systemctl.chmod(0o755)

    scene.run()
    scene.host.stop()
    manager.said["ActiveState"] = "inactive"
    monkeypatch.setattr(premises, "FRESH_NS", -(10**12))
    arguments = scene.argv("run")[1:]
    assert cli.main(arguments) == 0
    says("inactive")
    assert idle.answer(arguments) == 0
    says("failed")
    assert idle.answer(arguments) is None
    systemctl.unlink()
    assert idle.answer(arguments) is None


# -- a pair that can't be loaded ---------------------------------------------------------------------------------------


def test_an_agent_that_could_not_start_is_taken_for_stopped(scene: Scene, shared_ca: LabCA) -> None:
    """Its certificate is of another key, so nobody stopped it on purpose: it gets one that fits, and is started."""
    scene.host.stop()
    scene.host.install(scene.host.new_pair()[0])
    assert scene.run().status == 0
    assert scene.is_enrolled()


def test_an_agent_without_a_key_stays_down(scene: Scene) -> None:
    """L5: with the pair that its tool made it is started, before the CA is asked: else nothing could be proved."""
    scene.host.stop()
    for name in (scene.host.key, scene.host.certificate):
        Path(scene.host.path(name)).unlink()
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("L5", "L9", "C4", "L7"))
    assert scene.is_enrolled()


def test_an_agent_that_was_stopped_is_started_because_of_a_good_pair(scene: Scene) -> None:
    """It can start, and does not run: that was somebody's purpose."""
    scene.host.stop()
    assert scene.run().status == 0
    assert (scene.host.pid, scene.served) == (0, "")
    assert fingerprint(scene.host.leaf()) == scene.installed


# -- activation = reload -----------------------------------------------------------------------------------------------


@pytest.fixture
def notes(scene: Scene) -> List[str]:
    """What a run notes for the log; the agent is to be reloaded."""
    scene.configure(activation="reload")
    return []


def run(scene: Scene, notes: List[str], **wish: bool) -> Outcome:
    """Converge, and keep the notes."""
    return scene.run(parts={"noted": notes.append}, **wish)


def test_an_agent_is_restarted_where_a_reload_would_do(scene: Scene, notes: List[str]) -> None:
    """The same process serves the new certificate, and the budget counts it."""
    pid = scene.host.pid
    assert run(scene, notes).status == 0
    assert (scene.is_enrolled(), scene.host.pid, told(scene.host), spent(scene), notes) == (True, pid, ["-start"], 1, [])


def test_a_stray_need_not_be_ended_to_be_reloaded(scene: Scene, notes: List[str]) -> None:
    """The signal reaches it wherever it runs."""
    scene.host.make_stray()
    pid = scene.host.pid
    assert run(scene, notes).status == 0
    assert (scene.is_enrolled(), scene.host.pid) == (True, pid)


@pytest.mark.parametrize("how", ["conf", "pid", "port", "layout"])
def test_a_signal_goes_to_whatever_the_pid_file_names(scene: Scene, sleeper: int, how: str) -> None:
    """Only to that server, if the port is its own or its child's, and not where it would miss a change of omiserver.conf."""
    agent = agents.find(scene.root(), port=scene.host.port)
    assert unit.unreachable(scene.root(), agent) == ""
    if how == "conf":
        os.utime(scene.host.path(agent.conf))
    elif how == "port":
        agent = replace(agent, port=1)
    elif how == "pid":
        Path(scene.host.path(agent.pid_file)).write_text(f"{sleeper}\n")
        assert f"process {sleeper}, which /var/opt/omi/run/omiserver.pid names" in unit.unreachable(scene.root(), agent)
    else:
        agent = replace(agent, server="")
    assert unit.unreachable(scene.root(), agent) != ""


def test_a_port_that_a_child_holds_is_somebody_elses(scene: Scene) -> None:
    """The real server's engine listens, a child with an account of its own; a child's child is a stranger."""
    code = "import os, socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(os.getpid(), s.getsockname()[1], flush=True); time.sleep(60)"
    with subprocess.Popen(["sh", "-c", f'"$0" -ISc "{code}" & wait', sys.executable], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child, port = map(int, parent.stdout.readline().split())
        try:
            assert unit._owns(parent.pid, port)
            assert unit._owns(child, port)
            assert not unit._owns(parent.pid, 1)
            assert not unit._owns(scene.host.pid, port)
        finally:
            os.kill(child, signal.SIGTERM)


def test_a_reload_that_is_not_safe_is_no_restart_either(scene: Scene, notes: List[str]) -> None:
    """It is restarted, and the log says why."""
    os.utime(scene.host.path(scene.host.conf))
    assert run(scene, notes).status == 0
    assert (scene.is_enrolled(), told(scene.host)) == (True, ["-start", "-restart"])
    assert notes == ["the agent is restarted, not reloaded: /etc/opt/omi/conf/omiserver.conf changed since it was started"]


def test_a_reload_is_believed(scene: Scene, notes: List[str]) -> None:
    """Its own command says "refreshed server" whatever happens: what is not served within three seconds is restarted."""
    path = Path(scene.host.path("/opt/omi/bin/omiserver"))
    path.rename(path.with_name("real"))
    path.write_text('#!/bin/sh\n[ "$1" = -r ] || exec "${0%/*}/real" "$@"\n')
    path.chmod(0o755)
    assert run(scene, notes).status == 0
    assert (scene.is_enrolled(), told(scene.host)[-1], spent(scene)) == (True, "-restart", 2)
    assert "did not take up" in notes[0]


@pytest.mark.slow
def test_a_reload_kills_the_agent_and_nobody_brings_it_back(scene: Scene, notes: List[str]) -> None:
    """A bad pair kills here, too: a restart is tried, then the way back is a restart, all within the budget."""
    before, served = scene.host.snapshot(), scene.served
    scene.host.refuse_new()
    assert run(scene, notes).status == 9
    assert (scene.host.snapshot(), scene.served, spent(scene)) == (before, served, 3)


def test_a_reload_in_the_sandbox_signals_what_it_can_not_see(scene: Scene, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are hidden there: the main process of the agent's unit, in its control group, is that server."""
    agent, pid = agents.find(scene.root(), port=scene.host.port), scene.host.pid
    real = Root.read

    def hidden(self: Root, path: str, *rest: Any, **more: Any) -> bytes:
        if path.startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(self, path, *rest, **more)

    monkeypatch.setattr(Root, "read", hidden)
    manager.said["MainPID"] = str(pid)
    assert "is not seen to own" in unit.unreachable(scene.root(), agent)
    manager.procs.write_text(f"{pid}\n")
    assert unit.unreachable(scene.root(), agent) == ""
    manager.said["MainPID"] = "1"
    assert "is not seen to own" in unit.unreachable(scene.root(), agent)


# -- the restart window ------------------------------------------------------------------------------------------------


def window(scene: Scene, begins_s: int) -> str:
    """A range of half an hour that begins so many seconds from the scene's time."""
    at = time.time() + scene.offset_s + begins_s
    return "-".join(time.strftime("%H:%M", time.localtime(at + more)) for more in (0, 1800))


def test_an_agent_is_restarted_outside_its_window(scene: Scene, shared_ca: LabCA) -> None:
    """The certificate is obtained at once and installed when the window opens; nothing of the agent's changes before."""
    scene.host.scom_sign()
    calls = told(scene.host)
    scene.configure(restart_window=window(scene, 4 * 3600))
    before, served, posts = scene.host.snapshot(), scene.served, shared_ca.count_post
    ended = scene.run(now=True)
    assert (ended.status, ended.rows, shared_ca.count_post - posts) == (4, ("C4",), 1)
    assert ended.result is not None
    assert ended.result.step.until is not None
    assert 3 * 3600 < ended.result.step.until - time.time() <= 4 * 3600
    assert (scene.host.snapshot(), scene.served, told(scene.host)) == (before, served, calls)
    assert scene.command("run", "--unattended").returncode == 0, "waiting needs nobody"
    scene.offset_s = 4 * 3600
    assert scene.run().rows == ("L7",)
    assert scene.is_enrolled()


def test_a_rollback_waits_for_the_window(scene: Scene) -> None:
    """What a person asks for by name, and the way back, are done at any hour."""
    scene.run()
    scene.configure(restart_window=window(scene, 4 * 3600))
    assert scene.do(enroll.roll_back).status == 0
    assert not scene.is_enrolled()


def test_a_certificate_that_waited_for_the_window_is_installed_after_a_rollback(scene: Scene, shared_ca: LabCA) -> None:
    """The operator went back, and meant it: one that is newer and was not in service yet waits for a word, too."""
    scene.run()
    scene.configure(restart_window=window(scene, 4 * 3600))
    assert scene.run(renew=True).status == 4
    ours, posts = scene.installed, shared_ca.count_post
    assert scene.do(enroll.roll_back).status == 0
    assert scene.command("release").stdout.endswith("back until: scx-enroll run --now, or --renew\n")
    before, served = scene.host.snapshot(), scene.served
    for later in (0, 5 * 3600):
        scene.offset_s = later
        ended = scene.run()
        assert (ended.status, ended.rows, "was rolled back by the operator" in ended.message) == (9, (), True), ended
    assert (scene.host.snapshot(), scene.served, shared_ca.count_post) == (before, served, posts)
    scene.configure(restart_window="")
    assert scene.run(now=True).rows == ("L7",)
    assert scene.is_enrolled()
    assert scene.installed != ours


def test_a_broken_agent_waits_for_the_window(scene: Scene) -> None:
    """It serves nothing, so there is nothing to lose."""
    scene.run()
    scene.configure(restart_window=window(scene, 4 * 3600))
    scene.host.kill()
    assert scene.run().rows == ("L9",)
    assert scene.is_enrolled()


def test_the_time_of_the_host_is_no_premise(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall rests on /etc/localtime; one that only this shell has is none of the timer's run."""
    scene.configure(restart_window=window(scene, 4 * 3600))
    monkeypatch.delenv("TZ", raising=False)
    root = scene.root()
    observe.policy_of(enroll.config_of(root, Options()), "", root, int(time.time()))
    assert "/etc/localtime" in root.notes.looked
    assert None not in root.notes.looked.values()
    monkeypatch.setenv("TZ", "UTC")
    observe.policy_of(enroll.config_of(root, Options()), "", root, int(time.time()))
    assert None in root.notes.looked.values()


H = 60  # minutes
NIGHTS = {  # the clock on the wall at the jump, by how much; the window; when a renewal comes, and from when to when the window is open, in minutes from the jump
    "in the hour that is left out": (2 * H, H, "02:00-03:00", -30, ((23 * H, 24 * H),)),
    "half in the hour that is left out": (2 * H, H, "02:30-04:00", -30, ((0, H),)),
    "in the hour that comes twice": (3 * H, -H, "02:00-03:00", -90, ((-H, H), (24 * H, 25 * H))),
    "over a midnight that is left out": (0, H, "23:30-00:30", -105, ((-30, 0), (22 * H + 30, 23 * H + 30))),
    "over a midnight that comes twice": (0, -H, "23:30-00:30", -105, ((-30, 0), (30, 90))),
}
QUICKLY = ("half in the hour that is left out",)


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, shared_ca: LabCA) -> Iterator[int]:
    """The moment, two hours from now, at which this place's clock is put forward or back."""
    at = int(time.time()) // 60 * 60 + 7200
    monkeypatch.setenv("TZ", zones.place(at, *request.param))
    time.tzset()
    yield at
    shared_ca.switches.date_offset = 0
    monkeypatch.undo()
    time.tzset()


def at_time(scene: Scene, moment: int) -> None:
    """It is that time, for the CA too."""
    scene.offset_s = moment - int(time.time())
    for ca in scene.cas:
        ca.switches.date_offset = scene.offset_s


@pytest.mark.parametrize(
    ("jump", "window", "comes", "spans"),
    [pytest.param(night[:2], *night[2:], id=name, marks=() if name in QUICKLY else pytest.mark.slow) for name, night in NIGHTS.items()],
    indirect=["jump"],
)
def test_a_night_whose_hours_are_not_what_they_seem(scene: Scene, jump: int, window: str, comes: int, spans: Tuple[Tuple[int, int], ...]) -> None:
    """The agent is restarted once as soon as its clock on the wall says so; a window that a night does not have is the next one's."""
    at_time(scene, jump + comes * 60)
    assert scene.run().status == 0, "its own certificate waits for nothing"
    scene.configure(restart_window=window, certificates_per_day="9")
    for opens, closes in spans:
        assert scene.run(renew=True).rows == ("C4",)
        before = scene.host.snapshot(), scene.host.restarts, scene.posts, scene.served
        for moment in (jump + opens * 60 - 600, jump + opens * 60 - 5):
            at_time(scene, moment)
            ended = scene.run(now=True)
            assert (ended.status, ended.rows) == (4, ()), ended
            assert ended.result
            assert ended.result.step.until == jump + opens * 60
            told = report.as_status(report.document(ended.result, moment))
            assert f"\n  not before:   {report.when(jump + opens * 60)}\n" in told
        assert (scene.host.snapshot(), scene.host.restarts, scene.posts, scene.served) == before
        at_time(scene, jump + opens * 60)
        assert scene.run().rows == ("L7",)
        assert (scene.is_enrolled(), scene.host.restarts) == (True, before[1] + 1)
        at_time(scene, jump + closes * 60 - 5)
        assert (scene.run().rows, scene.host.restarts) == ((), before[1] + 1)
        at_time(scene, jump + closes * 60)


# -- a pair that was moved aside ---------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path, shared_ca: LabCA) -> Iterator[Scene]:
    """A host with a fresh OMI, whose scx script moved the pair aside and could make no other."""
    with LabHost(tmp_path / "host", "omi-regular", key="ec:secp256r1") as host:
        host.knobs(poll=0.005)
        assert host.start()
        assert packagescripts.scx_install(host, fails=True) == 1
        yield Scene(host, [shared_ca], patience=SHORT)


PAIR = ("/etc/opt/omi/ssl/omikey.pem", "/etc/opt/omi/ssl/omi.pem")


def files(host: LabHost) -> Dict[str, bytes]:
    """The agent's folder by names, but what is ours."""
    folder = Path(host.path("/etc/opt/omi/ssl"))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix.startswith(".pem") and "scx-enroll" not in path.name}


@pytest.mark.parametrize("down", ["still serves", "was restarted by the script"])
def test_a_pair_that_was_moved_aside_is_lost(moved: Scene, shared_ca: LabCA, down: str) -> None:
    """L5: the agent keeps its key; where it went down meanwhile, nobody stopped it on purpose."""
    before = files(moved.host)
    assert set(before) == {"omikey.pem_temp", "omi.pem_temp"}
    if down != "still serves":
        moved.host.stop()
    ended = moved.run()
    assert (ended.status, ended.rows) == (0, ("L5", "C4", "L7") if down == "still serves" else ("L5", "L9", "C4", "L7"))
    assert moved.is_enrolled()
    assert files(moved.host)["omikey.pem"] == before["omikey.pem_temp"]
    assert not [name for name in files(moved.host) if name.endswith("_temp")]


def test_our_own_certificate_that_was_moved_aside_is_asked_for_again(moved: Scene, shared_ca: LabCA) -> None:
    """Its link is given its name back as it was; nothing is asked for, and the agent, which served it all the time, is not restarted."""
    moved.run()
    link = os.readlink(moved.host.path(PAIR[1]))
    for name in PAIR:
        os.rename(moved.host.path(name), moved.host.path(f"{name}_temp"))
    posts, calls = shared_ca.count_post, told(moved.host)
    assert moved.run().rows == ("L5",)
    assert (os.readlink(moved.host.path(PAIR[1])), shared_ca.count_post, told(moved.host)) == (link, posts, calls)
    assert moved.is_enrolled()


@pytest.mark.parametrize("stage", ["key linked", "key back", "certificate linked"])
def test_a_run_that_was_killed_while_it_put_a_pair_back(moved: Scene, stage: str) -> None:
    """Each of the two changes of a name is done once, from wherever it stands."""
    key, certificate = (Path(moved.host.path(name)) for name in PAIR)
    os.link(f"{key}_temp", key)
    if stage != "key linked":
        os.unlink(f"{key}_temp")
    if stage == "certificate linked":
        os.link(f"{certificate}_temp", certificate)
    assert moved.run().status == 0
    assert moved.is_enrolled()
    assert not [name for name in files(moved.host) if name.endswith("_temp")]


def test_what_stands_aside_is_put_over_what_is_there(moved: Scene) -> None:
    """A key that is none stays where it is, and a new one is made; a name that is taken is never overwritten, what is left over is named."""
    key, certificate = (Path(moved.host.path(f"{name}_temp")) for name in PAIR)
    key.write_bytes(b"no key\n")
    kept = certificate.read_bytes()
    assert moved.run().rows[0] == "L5"
    assert moved.is_enrolled()
    assert (key.read_bytes(), certificate.read_bytes()) == (b"no key\n", kept)
    noted = "\n".join(aside.leftovers(moved.root(), agents.find(moved.root(), port=moved.host.port)))
    assert f"{PAIR[0]}_temp is left from a package script" in noted
    assert f"{PAIR[1]}_temp is left from a package script" in noted
    with pytest.raises(HostError, match="File exists"):
        Beside(moved.root()).move_back(PAIR[0])


def test_a_certificate_of_another_key_is_put_back_with_a_key(moved: Scene) -> None:
    """The pair that is aside is none: the key counts, and gets a certificate."""
    Path(moved.host.path(f"{PAIR[1]}_temp")).write_bytes(moved.host.new_pair()[0])
    agent = agents.find(moved.root(), port=moved.host.port)
    assert aside.names(moved.root(), agent) == (PAIR[0],)


def test_a_script_that_is_still_at_work(moved: Scene) -> None:
    """L3: what was moved a moment ago may be wanted a moment later."""
    moved.configure(settle="60s")
    before = moved.host.snapshot()
    assert (moved.run().status, moved.host.snapshot()) == (4, before)


# -- an agent older than scx 1.5, of which nothing tells the process ----------------------------------------------------


@pytest.fixture
def old(tmp_path: Path, shared_ca: LabCA) -> Iterator[Scene]:
    """A host with such an agent, which serves its own certificate."""
    with LabHost(tmp_path / "host", "pegasus", key="ec:secp256r1") as host:
        host.knobs(poll=0.005)
        assert host.start()
        yield Scene(host, [shared_ca], patience=SHORT)


def test_an_old_agent_that_no_restart_reaches_is_ended_by_a_guess(old: Scene) -> None:
    """No pid file tells which process to end: it is named what a person has to find, all is as it was, and it is not tried again."""
    old.host.make_stray(poll=0.005)
    old.patience = replace(SHORT, listener_s=0.3)
    before, served, pid = old.host.snapshot(), old.served, old.host.pid
    for _ in range(2):
        ended = old.run()
        assert ended.status == 9
        assert f"it goes on serving {served[:16]}: the restart did not reach its server; ss -ltnp tells that process" in ended.message
        assert (old.host.snapshot(), old.served, old.host.pid) == (before, served, pid)
        assert (told(old.host)[1:], spent(old)) == (["-restart"] * 2, 2)


@pytest.mark.parametrize("how", ["its start fails once", pytest.param("its stop outlasts the restart", marks=pytest.mark.slow)])
def test_an_old_agent_that_a_restart_leaves_down_is_rolled_back(old: Scene, how: str) -> None:
    """The port alone tells that nothing runs: it is started once more, and the certificate stays."""
    if how == "its start fails once":
        old.host.fail_starts(1, 1)
    else:
        old.host.slow_stop(0.5, 0.02)
        old.patience = replace(SHORT, listener_s=2.0)
    ended = old.run()
    assert (ended.status, old.is_enrolled()) == (0, True), ended
    assert (told(old.host)[1:], spent(old)) == (["-restart", "-start"], 2)


@pytest.mark.slow
def test_an_old_agent_that_dies_of_the_new_certificate(old: Scene, manager: Manager) -> None:
    """It is back within the budget, and the failure tells what is known of it: its unit and its start limit, which are forgotten before each start."""
    manager.said.update(ActiveState="failed", Result="start-limit-hit", ControlGroup="")
    old.host.refuse_new()
    before, served = old.host.snapshot(), old.served
    ended = old.run()
    assert ended.status == 9
    assert "nothing listens" in ended.message
    assert "scx-cimd.service is failed, result start-limit-hit" in ended.message
    assert ended.hint == "see the agent's own log, mend the cause, then: scx-enroll run --now"
    assert (old.host.snapshot(), old.served) == (before, served)
    assert (told(old.host)[1:], spent(old), set(manager.asked)) == (["-restart", "-start", "-restart"], 3, {"reset-failed scx-cimd"})


def test_an_old_agent_is_reloaded(old: Scene) -> None:
    """Whom the signal would reach is not known, so it is restarted, and the log says why."""
    notes: List[str] = []
    old.configure(activation="reload")
    assert run(old, notes).status == 0
    assert (old.is_enrolled(), told(old.host)[1:]) == (True, ["-restart"])
    assert notes == ["the agent is restarted, not reloaded: its process is not known"]


@pytest.mark.parametrize("how", ["deleted", "moved aside"])
def test_an_old_agent_without_its_key_is_no_agent(old: Scene, how: str) -> None:
    """It is known by that key alone, and no script of its time moved one aside: what is missing is named, and nothing is done."""
    key = Path(old.host.path(old.host.key))
    kept = key.rename(f"{key}_temp")
    if how == "deleted":
        kept = kept.rename(key.parent.parent / "kept")
    before, served = old.host.snapshot(), old.served
    ended = old.run()
    aside = f"; {old.host.key}_temp is there" if how != "deleted" else ""
    assert ended.status == 4
    assert ended.message.endswith(f"; {old.host.key}, by which an agent older than scx 1.5 is known, is missing{aside}")
    assert "where an old one is, give its key the name back, or have one made (/opt/microsoft/scx/bin/tools/scxsslconfig)" in ended.hint
    assert (old.host.snapshot(), old.served, told(old.host)[1:]) == (before, served, [])
    kept.rename(key)
    assert old.run().status == 0


def test_an_old_certificate_that_was_moved_aside_is_lost(old: Scene, shared_ca: LabCA) -> None:
    """L5: where the key stands the certificate gets its name back, whoever moved it; what is left over beside a name is named, and stays."""
    name = Path(old.host.path(old.host.certificate))
    assert old.run().status == 0
    link, served, calls, posts = os.readlink(name), old.served, told(old.host), shared_ca.count_post
    name.rename(f"{name}_temp")
    assert old.run().rows == ("L5",)
    assert (os.readlink(name), old.served, told(old.host), shared_ca.count_post) == (link, served, calls, posts)
    for left in (old.host.certificate, old.host.key):
        old.host.make_file(f"{left}_temp", b"left\n")
    before = old.host.snapshot()
    ended = old.run()
    assert ended.result
    noted = "\n".join(ended.result.view.ready.notes)
    assert all(f"{left}_temp is left from a package script" in noted for left in (old.host.certificate, old.host.key))
    assert (ended.rows, old.host.snapshot()) == ((), before)


def test_an_old_agent_that_was_stopped_is_started_while_it_is_held(old: Scene) -> None:
    """Nothing tells a stop from a crash, so it is started: README says so, and that a hold keeps it down."""
    assert old.run().status == 0
    old.host.stop()
    enroll.hold(old.root(), Options(), old.tools(), "stopped for good")
    assert (old.run().rows, old.served) == ((), "")
    enroll.hold(old.root(), Options(), old.tools(), "")
    old.host.fail_starts(2)
    old.patience = replace(SHORT, listener_s=0.1)
    assert "does not serve" in (ended := old.run()).message
    assert "goes on serving" not in ended.message
    old.patience, old.offset_s = SHORT, 3660
    assert (old.run().rows, old.is_enrolled()) == (("L9",), True)
