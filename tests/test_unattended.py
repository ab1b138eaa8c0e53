"""The timer's run: it says a thing once, and leaves no short wait to the next hour. systemd itself is in tests/test_installed.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

import pytest

from scx_enroll import cli, systemd, unattended
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root

HOUR_S = 3600
YOUNG_S, OLD_S = 600.0, 50 * HOUR_S


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """The looks that systemd was asked for, in seconds from now, on a host that has been up for days."""
    asked: List[int] = []

    def ask(seconds: int) -> bool:
        asked.append(seconds)
        return True

    monkeypatch.setattr(systemd, "look_again", ask)
    monkeypatch.setattr(systemd, "age_s", lambda: OLD_S)
    return asked


@pytest.mark.parametrize(
    ("until", "seconds"), [(None, []), (HOUR_S, []), (HOUR_S - 1, [HOUR_S]), (90, [91]), (3, [10]), (0, [10]), (-5, [10]), (30 * HOUR_S, [])]
)
def test_a_wait_that_ends_within_the_hour_lasts_until_the_next_tick(arranged: List[int], until: Optional[int], seconds: List[int]) -> None:
    """A poll after a minute, a back-off of five: the look comes when it ends, once; longer ones are the timer's."""
    assert unattended.look_again(5, until and 1_000_000 + until if until is not None else None, 1_000_000) is False
    assert arranged == seconds


@pytest.mark.parametrize(("until", "seconds", "short"), [(None, 301, True), (30 * HOUR_S, 301, True), (90, 91, False), (300, 301, False)])
def test_a_boot_at_which_things_come_late(
    arranged: List[int], monkeypatch: pytest.MonkeyPatch, until: Optional[int], seconds: int, short: bool
) -> None:
    """In the first hour network, clock, agent and CA may still come: a host that is not done looks every five minutes."""
    monkeypatch.setattr(systemd, "age_s", lambda: YOUNG_S)
    assert unattended.look_again(4, 1_000_000 + until if until is not None else None, 1_000_000) is short
    assert arranged == [seconds]


def test_a_young_host_that_is_done_is_looked_at_for_nothing(arranged: List[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is to be done, the hour after the boot is like any other."""
    monkeypatch.setattr(systemd, "age_s", lambda: YOUNG_S)
    assert unattended.look_again(0, None, 1_000_000) is False
    assert arranged == []


def test_others_at_work_for_nobody_knows_how_long(arranged: List[int]) -> None:
    """A package manager tells no end: in half a minute, and the answer is not written down as one that stands."""
    assert unattended.look_again(4, None, 1_000_000, others=True) is True
    assert arranged == [31]


def test_a_manager_that_can_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next hour comes all the same, and the answer stands until then."""
    monkeypatch.setattr(systemd, "look_again", lambda _seconds: False)
    assert unattended.look_again(4, None, 1_000_000, others=True) is False


@pytest.mark.parametrize(
    ("groups", "ours"),
    [
        (b"0::/system.slice/scx-enroll.service\n", True),
        (b"12:cpu:/\n1:name=systemd:/system.slice/scx-enroll.service\n0::/\n", True),  # the older hierarchy
        (b"0::/user.slice/user-0.slice/session-1.scope\n", False),
        (b"0::/system.slice/cron.service\n", False),
        (b"0::/system.slice/not-scx-enroll.service\n", False),
        (b"0::/system.slice/scx-enroll.service/deeper\n", False),
        (b"", False),
        (b"\xff\xfe", False),
    ],
)
def test_a_person_is_taken_for_the_timer(groups: bytes, ours: bool) -> None:
    """`--unattended` on a terminal or from cron waits itself, as before."""
    assert systemd.is_ours(groups) is ours


def test_a_tree_that_is_not_this_host_is_managed(tmp_path: Path) -> None:
    """The service manager's agent is this host's; another root's is not touched through it."""
    assert systemd.manages(str(tmp_path)) is False
    assert unattended.is_timed(Root(str(tmp_path))) is False


def test_a_container_as_old_as_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container boots long after its kernel did; a clock that jumped forward since makes nobody older than the kernel."""
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(systemd, "SOCKET", str(tmp_path / "none"))
    assert systemd.age_s() == pytest.approx(uptime, abs=5)
    (tmp_path / "private").touch()
    monkeypatch.setattr(systemd, "SOCKET", str(tmp_path / "private"))
    assert 0 <= systemd.age_s() < 5
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * 365 * 24 * HOUR_S)
    assert systemd.age_s() == pytest.approx(uptime, abs=5)
    monkeypatch.setattr(time, "time", lambda: now - HOUR_S)
    assert systemd.age_s() == 0


def test_a_tick_without_systemd(tmp_path: Path, capsys: Any) -> None:
    """Another root has no service of this system's to be started; there the verb only tells."""
    line = ["idle", "--root", str(tmp_path)]
    assert (cli.main(line), *capsys.readouterr()) == (75, "", "")
    assert cli.main([*line, "--else-start"]) == 2
    assert "--else-start is for the timer" in capsys.readouterr().err


def test_a_service_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tick fails then, and says what to look at."""
    monkeypatch.setattr(systemd, "_run", lambda *_words: None)
    with pytest.raises(HostError) as caught:
        systemd.start_service()
    assert "systemctl status scx-enroll.service" in caught.value.hint


def test_the_managers_tools_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are missing nothing is asked for that could not be installed; what they say is bounded in time."""
    monkeypatch.setattr(systemd, "FOLDERS", ())
    with pytest.raises(HostError) as caught:
        systemd.check()
    assert "systemd-run is missing" in caught.value.message
    assert systemd.look_again(60) is False
    assert systemd.control_is_running() is False


def test_a_run_that_waits_while_its_own_package_is_changed() -> None:
    """What is loaded before the wait is not looked for after it: the modules of this version, and all of them."""
    code = (
        "import os, sys; from scx_enroll import unattended; unattended.load_everything(); "
        "there = {name[:-3] for name in os.listdir(os.path.dirname(unattended.__file__)) if name.endswith('.py')} - {'__init__'}; "
        "print(there - {name.partition('.')[2] for name in sys.modules if name.startswith('scx_enroll.')})"
    )
    assert subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("left", [b"", b"[]", b"{}", b'{"error": "another"}', b"\xff", b"[" * 100_000])
def test_what_the_last_run_left_is_damaged(tmp_path: Path, left: bytes) -> None:
    """The status file is in /run, and may be anything: then it is said again."""
    (tmp_path / "run" / "scx-enroll").mkdir(parents=True)
    (tmp_path / "run" / "scx-enroll" / "status.json").write_bytes(left)
    assert unattended.is_told(Root(str(tmp_path)), "one") is False


def test_another_reason_is_not_told(tmp_path: Path, capsys: Any) -> None:
    """Once is once for each reason: where the file goes away, that is news."""
    etc = tmp_path / "etc" / "scx-enroll"
    etc.mkdir(parents=True)
    (etc / "scx-enroll.conf").write_text("[host]\n", encoding="ascii")
    line = ["run", "--root", str(tmp_path), "--unattended"]
    assert (cli.main(line), cli.main(line), capsys.readouterr().out.count("not configured yet")) == (0, 0, 1)
    (etc / "scx-enroll.conf").unlink()
    assert (cli.main(line), cli.main(line), capsys.readouterr().out.count("there is no /etc")) == (0, 0, 1)
    assert "there is no" in json.loads((tmp_path / "run" / "scx-enroll" / "status.json").read_text())["error"]
