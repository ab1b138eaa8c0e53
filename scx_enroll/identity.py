"""Which machine this is, and which keys are not its own: read from the files that say so, beneath the root."""

import re
from contextlib import suppress
from typing import Tuple

from scx_enroll import journal as j
from scx_enroll import machine, naming
from scx_enroll.agent import Agent
from scx_enroll.beside import BAKED_IN
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root

MACHINE_ID = "/etc/machine-id"
PRODUCT_UUID = "/sys/class/dmi/id/product_uuid"
MAX_ID_BYTES = 256  # 33, and what an editor may add
MAX_RECORD_BYTES = 1 << 14  # 65 a line; it holds no more than `beside` keeps


def read(root: Root) -> j.Identity:
    """Return what is known of this machine; what can't be read is not known."""
    machine_id = product = ""
    with suppress(HostError, FileNotFoundError):
        machine_id = machine.machine_id(_machine_id(root))
    with suppress(HostError):
        product = machine.product_uuid(root.kernel_says(PRODUCT_UUID).decode("ascii", "replace"))
    return j.Identity(machine_id, product, machine.host_name(naming.short_name(root)))


def _machine_id(root: Root) -> str:
    """Return the machine-id that stays: while /etc can't be written, one of this boot lies over it, from /run (machine-id(5))."""
    found, run = root.resolve(MACHINE_ID), root.resolve("/run")
    if found.path.startswith("/run/") or found.device == run.device != root.resolve("/etc").device:
        return ""
    return root.read(MACHINE_ID, MAX_ID_BYTES).decode("ascii", "replace")


def record_of(agent: Agent) -> str:
    """Return the path of the list of baked-in keys, which travels with the agent's key."""
    return f"{agent.key.rpartition('/')[0]}/{BAKED_IN}"


def baked_in(root: Root, agent: Agent) -> Tuple[str, ...]:
    """Return the SHA-256 of each public key that the record beside the agent's key lists, oldest first. Raises HostError."""
    path = record_of(agent)
    try:
        lines = root.read(path, MAX_RECORD_BYTES, trusted=True).decode("ascii", "replace").split("\n")
    except FileNotFoundError:
        return ()
    listed = tuple(line for line in lines if line and not line.startswith("#"))
    for line in listed:
        if not re.fullmatch("[0-9a-f]{64}", line):
            raise HostError(
                f"{path} is not understood: {line[:70]!r} is no SHA-256",
                "it lists keys that came with an image, one a line: correct it, or, where this host's key is its own, remove it",
            )
    return listed


def foreign(root: Root, agent: Agent, journal: j.Journal, spki: str) -> str:
    """Say why the agent's key, whose SHA-256 is given, must not be used; "" where it is this machine's. Raises HostError."""
    listed = baked_in(root, agent)
    if spki not in (*listed, *journal.strangers):
        return ""
    where = f"listed in {record_of(agent)}" if spki in listed else "known from the state that was set aside"
    return f"the agent's key is an image's or another machine's ({where})"
