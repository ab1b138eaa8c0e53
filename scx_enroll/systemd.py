"""What the system's service manager does for the program: another unit for the agent's tools, and a look before the next hour.

Spoken to through its own commands, which need no message bus for this. Where it does not run, nothing here is used.
"""

import os
import subprocess
import time
from typing import Dict, Optional, Tuple

from scx_enroll.errors import HostError

RUNNING = "/run/systemd/system"  # sd_booted(3)
SOCKET = "/run/systemd/private"  # of the manager, for its own commands
SERVICE, TIMER = "scx-enroll.service", "scx-enroll.timer"
CONTROL = "scx-enroll-control-*.service"  # one for each command: an agent that was started by hand lives on in its unit
AGAIN = "scx-enroll-again"
COMMAND_S = 30.0  # a manager that answers at all answers in milliseconds
FOLDERS = ("/usr/bin", "/bin")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/"}


def manages(root: str) -> bool:
    """Say whether the agent of the tree at this path is a service of this system's manager."""
    return root == "/" and os.path.isdir(RUNNING)


def is_ours(groups: bytes) -> bool:
    """Say whether a process runs in the unit of the timer, and so in its sandbox, and not on somebody's terminal.

    `groups`: what /proc/PID/cgroup says (cgroups(7)).
    """
    return any(line.endswith(b"/" + SERVICE.encode()) for line in groups.splitlines())


def age_s() -> float:
    """Return how long ago the host was started: what the kernel says, or the manager's socket, which is younger in a container.

    The lesser one, since a clock may have been set meanwhile. (Process 1 can't be asked: the sandbox hides it.)
    """
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        return max(min(uptime, time.time() - os.stat(SOCKET).st_ctime), 0.0)
    except OSError:
        return uptime


def new_unit() -> str:
    """Return a name for a control command's unit that no other has had since the boot."""
    return CONTROL.replace("*", str(time.monotonic_ns()))


def as_unit(unit: str, command: Tuple[str, ...], limit_s: float) -> Tuple[str, ...]:
    """Return the command line that runs a command as a unit of its own, and ends when that does.

    The unit ends nothing but the command itself, so that an agent which it starts by hand lives on, outside any sandbox.
    Raises HostError where the manager's tool is missing.
    """
    settings = ("Type=oneshot", "KillMode=process", f"TimeoutStartSec={limit_s:.0f}")
    environment = (f"{name}={value}" for name, value in ENVIRONMENT.items())
    return (
        _tool("systemd-run"), "--quiet", "--collect", f"--unit={unit}", "--description=Control command of the SCOM agent",
        *(f"--property={setting}" for setting in settings), *(f"--setenv={word}" for word in environment), "--", *command,
    )


def check() -> None:
    """Raise HostError where the manager's tools are missing."""
    for name in ("systemd-run", "systemctl"):
        _tool(name)


def _tool(name: str) -> str:
    for folder in FOLDERS:
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    raise HostError(f"systemd runs here, but {name} is missing", "install the distribution's systemd package again")


def _ask(*words: str) -> str:
    """Ask the manager; returns what it said, "" where it can't be asked."""
    done = _run(*words)
    return done.stdout.decode("utf-8", "replace").strip() if done else ""


def _run(*words: str) -> "Optional[subprocess.CompletedProcess[bytes]]":
    """Run one of the manager's tools; None where it fails."""
    try:
        done = subprocess.run(  # noqa: S603 -- the manager's own tools, from root's folders
            [_tool(words[0]), *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=ENVIRONMENT, cwd="/", timeout=COMMAND_S, check=False,
        )
    except (OSError, HostError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done


def control_is_running() -> bool:
    """Say whether a control command, which an earlier run may have started, is still at work."""
    return _ask("systemctl", "list-units", "--plain", "--no-legend", "--state=activating,deactivating", CONTROL) != ""


def show(unit: str, *names: str) -> Dict[str, str]:
    """Return these properties of a unit, a service, as the manager has them now; none where it can't be asked."""
    said = _ask("systemctl", "show", f"--property={','.join(names)}", f"{unit}.service")
    return {name: value for name, equals, value in (line.partition("=") for line in said.splitlines()) if equals}


def forget_failures(unit: str) -> None:
    """Have a unit's failure forgotten, and its starts so far: the next ones count from nought (systemctl(1), reset-failed)."""
    _ask("systemctl", "reset-failed", f"{unit}.service")


def is_called(pid: int, name: str) -> bool:
    """Say whether a process has this name, looked at from outside the sandbox, which hides it."""
    return _run("systemd-run", "--quiet", "--collect", "--wait", "--", "grep", "-qxF", name, f"/proc/{pid}/comm") is not None


def is_going_down() -> bool:
    """Say whether the whole system is being shut down."""
    return _ask("systemctl", "show", "--property=SystemState") == "SystemState=stopping"


def end_control(unit: str) -> None:
    """End a control command that does not end by itself; what it has started stays."""
    _ask("systemctl", "stop", unit)


def start_service() -> None:
    """Have the service started. Raises HostError where it can't be."""
    if not _run("systemctl", "--no-block", "start", SERVICE):
        raise HostError(f"{SERVICE} can't be started", f"see: systemctl status {SERVICE}")


def look_again(seconds: int) -> bool:
    """Have the service started once more, after so many seconds, instead of what was arranged before; says whether it will be.

    Not where the timer has been stopped; who stops it later stops this, too.
    """
    _ask("systemctl", "stop", f"{AGAIN}.timer")
    if not _is_active(TIMER):
        return False
    bound = ("--timer-property=AccuracySec=1s", f"--timer-property=PartOf={TIMER}")
    timer = (f"--on-active={seconds}", *bound, "--description=Another look at the certificate of the SCOM agent")
    _ask("systemd-run", "--quiet", "--collect", f"--unit={AGAIN}", *timer, "--", "systemctl", "--no-block", "start", SERVICE)
    return _is_active(f"{AGAIN}.timer")


def _is_active(unit: str) -> bool:
    return _ask("systemctl", "show", "--property=ActiveState", unit) == "ActiveState=active"
