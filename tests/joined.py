"""A host that has joined a domain, with the program as the deb installs it: run by the distribution's Python, as a process of its own."""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from tests import packages
from tests.lab.agent import LabHost
from tests.lab.kdc import PYTHON

INSTALLED = '"/usr/share/scx-enroll"'  # in the launcher
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
WRAPPER = "libnss_wrapper.so"
TOOLS = {  # and their packages
    "faketime": "faketime",
    "strace": "strace",
    "dpkg-deb": "dpkg",
    f"/usr/lib/*/{WRAPPER}": "libnss-wrapper",
}
OURS = ("var/lib/scx-enroll", "run/scx-enroll")

# What most clients do: Kerberos as it should be, and no channel binding. An order in JSON a line, and the status of the answer.
# The distribution's own libraries, and none of our code.
UNBOUND = """
import base64, http.client, itertools, json, os, ssl, sys
import gssapi
for number, line in enumerate(sys.stdin):
    order = json.loads(line)
    os.environ["KRB5_CONFIG"] = order["config"]
    name = gssapi.Name(order["account"], gssapi.NameType.kerberos_principal)
    store = {"client_keytab": "FILE:" + order["keytab"], "ccache": "MEMORY:unbound%d" % number}
    context = gssapi.SecurityContext(name=gssapi.Name("HTTP@" + order["server"].partition(":")[0], gssapi.NameType.hostbased_service),
        creds=gssapi.Credentials(name=name, usage="initiate", store=store), mech=gssapi.OID.from_int_seq("1.2.840.113554.1.2.2"), usage="initiate")
    connection = http.client.HTTPSConnection(order["server"], context=ssl.create_default_context(cafile=order["trust"]), timeout=20)
    headers = {"Authorization": "Negotiate " + base64.b64encode(context.step()).decode(), "User-Agent": "unbound"}
    connection.request("GET", "/certsrv/", headers=headers)
    print(connection.getresponse().status, flush=True)
    connection.close()
"""


class Program:
    """What the deb installs, in a folder of its own; nothing of it is changed but the path that the launcher looks at."""

    def __init__(self, folder: Path) -> None:
        packages.output_of("dpkg-deb", "-x", packages.current().deb, folder)
        share = folder / "usr/share/scx-enroll"
        packages.output_of(PYTHON, "-m", "compileall", "-q", share)  # as postinst does
        launcher = (folder / "usr/sbin/scx-enroll").read_text(encoding="utf-8")
        assert launcher.startswith(f"#!{PYTHON} -IS\n")
        assert launcher.count(INSTALLED) == 1
        self.folder = str(share)
        self.path = folder / "scx-enroll"
        self.path.write_text(launcher.replace(INSTALLED, repr(str(share))), encoding="utf-8")


class Joined:
    """A host's tree with an agent that does not run, configured for one or more CAs, of which nothing but name, template and roots is said.

    `settings`: of the environment of each command, beside PATH.
    """

    def __init__(self, folder: Path, program: Program, cas: Sequence[Any], settings: Mapping[str, str]) -> None:
        self.host = LabHost(folder, key="ec:secp256r1")
        self.root = Path(self.host.root)
        self.program = program
        self.cas = cas
        self.settings = dict(settings)
        self.keytab = self.root / "etc/krb5.keytab"
        (self.root / "etc/scx-enroll").mkdir(parents=True)
        for number, ca in enumerate(cas):
            self.write(f"web{number}.pem", Path(ca.server_trust).read_bytes())
            self.write(f"ca{number}.pem", Path(ca.issuer_trust).read_bytes())
        self.configure()

    def close(self) -> None:
        """The agent does not run any more."""
        self.host.close()

    def write(self, name: str, data: bytes, mode: int = 0o644) -> Path:
        """Write a file of the configuration's folder."""
        path = self.root / "etc/scx-enroll" / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def configure(self, *lines: str, servers: Sequence[str] = ()) -> None:
        """Write the configuration anew; `lines` go to each CA's section."""
        text = f"[host]\nname = {self.host.fqdn}\n[agent]\nport = {self.host.port}\nsettle = 0s\n"
        for number, server in enumerate(servers or [ca.server for ca in self.cas]):
            text += f"[ca c{number}]\n" if len(self.cas) > 1 else "[ca]\n"
            text += f"server = {server}\ntemplate = SCXAgent\n"
            text += f"server-trust = /etc/scx-enroll/web{number}.pem\nissuer-trust = /etc/scx-enroll/ca{number}.pem\n"
            text += "".join(f"{line}\n" for line in lines)
        self.write("scx-enroll.conf", text.encode())

    # running it

    def run(
        self, *words: str, live: bool = False, later_s: int = 0, interpreter: str = PYTHON, before: Sequence[str] = (), **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the program; `later_s`: with a clock that is ahead by so much; `before`: the words of a command that runs it."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **self.settings, **settings}
        if later_s:
            preloaded = " ".join(filter(None, (environment.get("LD_PRELOAD"), FAKETIME)))
            environment.update({"LD_PRELOAD": preloaded, "FAKETIME": f"{later_s:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
        where = ["--root", str(self.root), *(["--live"] if live else [])]
        command = [*before, interpreter, "-IS", str(self.program.path), words[0], *where, *words[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd="/")

    def check(self, **more: Any) -> Dict[str, Any]:
        """Return what `check` tells of the first CA, as facts; its exit status is that of the facts."""
        ran = self.run("check", "--json", **more)
        assert ran.stdout, ran.stderr
        facts: List[Dict[str, Any]] = json.loads(ran.stdout)
        assert ran.returncode == max(one["exit_status"] for one in facts), ran.stderr
        assert "Traceback" not in ran.stderr
        return facts[0]

    def waits_s(self, *words: str, later_s: int = 0) -> Tuple[int, Optional[int]]:
        """Run it; return its status and how long from its own now it waits, in seconds to the nearest ten, None for no time."""
        ran = self.run(*(words or ("run",)), "--json", later_s=later_s)
        facts = json.loads(ran.stdout)
        return ran.returncode, facts["until"] and round((facts["until"] - facts["time"]) / 10) * 10

    # looking at it

    def snapshot(self) -> Dict[str, Tuple[int, int, bytes]]:
        """Return every file of the host's that is not the program's own record: mode, owner, content."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if name.startswith(OURS) or path.is_dir():
                continue
            status = path.lstat()
            found[name] = (status.st_mode, status.st_uid, os.readlink(path).encode() if path.is_symlink() else path.read_bytes())
        return found


class Judge:
    """The client that binds nothing, as a process that lives as long as the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([PYTHON, "-I", "-c", UNBOUND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def status(self, server: str, trust: str, account: str, keytab: str, config: str) -> str:
        """Return the status that the server answers with."""
        assert self._process.stdin and self._process.stdout
        order = {"server": server, "trust": trust, "account": account, "keytab": keytab, "config": config}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """It has ended."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def missing() -> str:
    """Return what lacks for a clock that is ahead and for names of the lab's own; "" for nothing."""
    found = sorted(package for tool, package in TOOLS.items() if not (glob.glob(tool) if tool.startswith("/") else shutil.which(tool)))
    return f"apt-get install {' '.join(found)}" if found else ""
