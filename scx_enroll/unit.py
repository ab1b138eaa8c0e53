"""Whether a restart reaches the agent: its process belongs to its unit, and is the server that the pid file means.

With a server outside its unit every restart is a no-op that ends with status 0. The sandbox of the timer's run hides processes, but not
the control groups, and not systemd.
"""

from contextlib import suppress
from typing import Optional, Set

from scx_enroll import agent as agents
from scx_enroll import systemd
from scx_enroll.agent import Agent
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root

MAX_PROCS_BYTES = 1 << 20  # the processes of one service: a number and a newline each
MAX_NAME_BYTES = 64  # of a process: 15 bytes (proc_pid_comm(5))
MAX_SOCKETS_BYTES = 16 << 20  # 150 bytes for each of a hundred thousand connections
LISTENS = "0A"  # TCP_LISTEN
GROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")  # version 2, both, version 1
KEPT = ("loaded", "masked")  # a unit of either is what a restart works on; one that is not found says nothing


def outside(root: Root, agent: Agent) -> int:
    """Return the process of an agent that runs outside its unit, 0 where it is inside, where it has none, or where nobody can tell."""
    pid = agents.pid(root.aside(), agent)
    if not pid or not systemd.manages(root.path) or agents.process(root.aside(), agent) != "running":
        return 0
    found = systemd.show(agent.unit, "LoadState", "ControlGroup")
    members = _members(found.get("ControlGroup", ""))
    return pid if found.get("LoadState") in KEPT and members is not None and pid not in members and is_server(pid) else 0


def _members(group: str) -> Optional[Set[int]]:
    """Return the processes of a control group ("" is that of a unit that does not run), None where they can't be read."""
    if not group:
        return set()
    for top in GROUPS:
        try:
            return set(map(int, Root("/").read(f"{top}{group}/cgroup.procs", MAX_PROCS_BYTES).split()))
        except (OSError, HostError, ValueError):
            continue
    return None


def is_server(pid: int) -> bool:
    """Say whether a process is an omiserver: a pid file may outlive its process, and its number be another's by now."""
    try:
        return Root("/").read(f"/proc/{pid}/comm", MAX_NAME_BYTES).strip() == agents.SERVER.encode()
    except (OSError, HostError):
        return systemd.manages("/") and systemd.is_called(pid, agents.SERVER)


def unreachable(root: Root, agent: Agent) -> str:
    """Return why the server can't be told to read its pair again, "" where it can: it is that server, and the port is its own.

    That signals whatever process the pid file names, and leaves omiserver.conf as it was read at the start.
    """
    aside = root.aside()
    pid, conf = agents.pid(aside, agent), aside.resolve(agent.conf) if agent.conf else None
    if not agent.server or conf is None or not pid or agents.process(aside, agent) != "running":
        return "its process is not known"
    if conf.ctime_ns > aside.entry(agent.pid_file).ctime_ns:
        return f"{agent.conf} changed since it was started"
    try:
        mine = Root("/").read(f"/proc/{pid}/comm", MAX_NAME_BYTES).strip() == agents.SERVER.encode() and _owns(pid, agent.port)
    except (OSError, HostError):  # in the sandbox
        found = systemd.show(agent.unit, "MainPID", "ControlGroup") if systemd.manages(root.path) else {}
        mine = found.get("MainPID") == str(pid) and pid in (_members(found.get("ControlGroup", "")) or ())
    return "" if mine else f"process {pid}, which {agent.pid_file} names, is not seen to own port {agent.port}"


def _owns(pid: int, port: int) -> bool:
    """Say whether a process, or a child of it, listens on a port (proc_pid_net(5), proc_pid_task(5)). Raises OSError, HostError."""
    here, listening = Root("/"), set()
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            rows = [line.split() for line in here.read(f"/proc/{pid}/net/{table}", MAX_SOCKETS_BYTES).decode().splitlines()[1:]]
            listening |= {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == LISTENS}
    children = here.read(f"/proc/{pid}/task/{pid}/children", MAX_PROCS_BYTES).decode().split()
    folders = [f"/proc/{one}/fd" for one in (pid, *children)]
    return any(here.entry(f"{folder}/{name}").text in listening for folder in folders for name in here.listdir(folder))


def said(root: Root, agent: Agent) -> str:
    """Return what systemd says of the agent's unit, for a person to read; "" where it does not keep it."""
    found = systemd.show(agent.unit, "LoadState", "ActiveState", "Result") if systemd.manages(root.path) else {}
    if found.get("LoadState") not in KEPT:
        return ""
    return f"{agent.unit}.service is {found.get('ActiveState')}, result {found.get('Result')}"
