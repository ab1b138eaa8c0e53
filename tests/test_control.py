"""An agent that does not do what it is told: strays, start limits, units that failed. Nobody else's process is ever signalled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from scx_enroll import agent as agents
from scx_enroll import cli, idle, premises, systemd, unit
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost, fingerprint
from tests.lab.ca import LabCA
from tests.scene import BRISK, Scene

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
