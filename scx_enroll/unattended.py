"""What the timer's run does and a person's does not: it says a thing once, and asks for another look instead of waiting."""

import importlib
import json
import os
import pkgutil
from typing import Any, Dict, Optional

import scx_enroll
from scx_enroll import systemd
from scx_enroll.errors import HostError, UsageError
from scx_enroll.idle import HAS_TO_LOOK
from scx_enroll.rootfs import Root
from scx_enroll.store import MAX_STATE_BYTES, STATUS

HOUR_S = 3600  # between two looks of the timer
SOON_S = 300  # until the next look in the hour after the boot, when network, clock, agent and CA may be late
QUIET_S = 30  # until the next look while others are at work
LEAST_S = 10  # whatever the reason: no host looks in a loop
MAX_CGROUP_BYTES = 1 << 16  # one line, or one for each of a dozen controllers


def is_timed(root: Root) -> bool:
    """Say whether this process is the timer's run, for which systemd can arrange another one."""
    try:
        groups = Root("/").read("/proc/self/cgroup", MAX_CGROUP_BYTES)
    except (OSError, HostError):
        return False
    return systemd.manages(root.path) and systemd.is_ours(groups)


def look_again(status: int, until: Optional[int], now: int, *, others: bool = False) -> bool:
    """Leave no wait that ends within the hour to the next hour; says whether it was cut short, because much may still come.

    `until`: when the run that ended with `status` would decide something else; `others`: they are at work, for nobody knows how long.
    """
    left = until - now if until is not None else HOUR_S
    early = status != 0 and systemd.age_s() < HOUR_S
    soon = min(left, QUIET_S) if others else min(left, SOON_S) if early else left
    return soon < HOUR_S and systemd.look_again(max(soon + 1, LEAST_S)) and soon != left


def is_told(root: Root, message: str) -> bool:
    """Say whether the last run left the very same failure, or one that began like that, for anybody to read."""
    try:
        known = json.loads(root.aside().read(STATUS, MAX_STATE_BYTES, trusted=True))
        return bool(known["error"] == message or known["error"].startswith(f"{message}: "))
    except (OSError, HostError, ValueError, KeyError, TypeError, RecursionError):
        return False


def load_everything() -> None:
    """Load all modules, since a package manager that is waited for may take this very program away, or bring another version."""
    for module in pkgutil.iter_modules(scx_enroll.__path__):
        importlib.import_module(f"scx_enroll.{module.name}")


def idle(given: Dict[str, Any]) -> int:
    """Say that there is something to look at, or have it looked at: else the program would not have come here.

    `given`: the options of the verb. Raises UsageError, HostError.
    """
    if not given.get("else_start"):
        return HAS_TO_LOOK
    if not systemd.manages(os.path.realpath(given.get("root", "/"))):
        raise UsageError("--else-start is for the timer of a system that systemd runs", "leave it out")
    systemd.start_service()
    return 0
