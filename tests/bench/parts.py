"""Runs the program with its parts timed: CPU of this process and of the children it waited for, each part without those inside it.

    python -I parts.py FOLDER OUTPUT ARGUMENTS...
"""

import functools
import json
import resource
import sys

folder, output, *arguments = sys.argv[1:]
sys.path.insert(0, folder)


def cpu_ms():
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return 1000 * (own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)


# Everything at once, so that no part pays for being the first one to need a library.
from cryptography.hazmat.primitives.asymmetric import padding  # noqa: E402, F401 - signing takes it

from scx_enroll import acquire, ca, cli, enroll, report, request, service, store, transaction, verify  # noqa: E402 - from that folder

STARTED = "interpreter and imports"
REST = "the rest: arguments, the lock, the plan"
PARTS = (
    ("looking at the host", enroll.Run, "look"),
    ("looking at the agent's port", service, "probe"),
    ("loading the key", request, "load_key"),
    ("judging certificates", verify, "judge"),
    ("rehearsing the handshake", service, "rehearse"),
    ("preflight: the CA's own certificates", acquire.Acquisition, "_preflight"),
    ("making the CSR", request, "build_csr"),
    ("POST and fetching the certificate", ca._Certsrv, "submit"),
    ("writing the state", store.Store, "save_journal"),
    ("writing the state", store.Store, "save_budget"),
    ("writing the state", store.Store, "add_generation"),
    ("installing", transaction, "install"),
    ("the agent's restart", service, "control"),
    ("waiting for the proof", service, "await_leaf"),
    ("what is shown and published", report, "document"),
    ("what is shown and published", store.Store, "publish"),
)

spent = {STARTED: 0.0, **{name: 0.0 for name, _, _ in PARTS}, REST: 0.0}
inside = []


def timed(name, function):
    @functools.wraps(function)
    def wrapped(*given, **named):
        began = cpu_ms()
        inside.append(0.0)
        try:
            return function(*given, **named)
        finally:
            took = cpu_ms() - began
            spent[name] += took - inside.pop()
            if inside:
                inside[-1] += took

    return wrapped


for name, owner, attribute in PARTS:
    setattr(owner, attribute, timed(name, getattr(owner, attribute)))
spent[STARTED] = cpu_ms()
inside.append(0.0)
status = cli.main(arguments)
spent[REST] = cpu_ms() - spent[STARTED] - inside.pop()
with open(output, "w", encoding="utf-8") as file:
    json.dump(spent, file)
sys.exit(status)
