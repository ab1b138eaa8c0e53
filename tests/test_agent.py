"""The agent is found by looking, and its configuration is read as it reads it: what it would do decides what we may do."""

import fcntl
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scx_enroll.agent import CONF_LINE_BYTES, find, packager, process, read_pair
from scx_enroll.errors import AgentNotReady, HostError
from scx_enroll.rootfs import Root

OMI, CLASSIC = "/etc/opt/omi/conf/omiserver.conf", "/etc/opt/microsoft/scx/conf/omiserver.conf"
SERVERS = {OMI: "/opt/omi/bin/omiserver", CLASSIC: "/opt/microsoft/scx/bin/omiserver"}
SSL = "/etc/opt/omi/ssl"
CLASSIC_SSL = "/etc/opt/microsoft/scx/ssl"
SHIPPED = (
    b"# omiserver configuration file\n\n##\n## httpport\n##\nhttpport=0\n\nhttpsport=0,1270\n\n#trace=(true|false)\nloglevel = WARNING\n"
)


class Host:
    """A host's tree, filled as a test needs it."""

    def __init__(self, base):
        self.base = base
        self.root = Root(str(base), live=True)

    def put(self, path, data=b""):
        real = self.base / path.lstrip("/")
        real.parent.mkdir(parents=True, exist_ok=True)
        real.write_bytes(data)
        real.chmod(0o644)
        return real

    def link(self, path, text):
        (self.base / path.lstrip("/")).symlink_to(text)

    def install(self, conf=OMI, text=SHIPPED):
        self.put(SERVERS[conf])
        self.put(conf, text)

    def find(self, *args):
        return find(self.root, *args)

    def refusal(self, *args):
        with pytest.raises(AgentNotReady) as refused:
            self.find(*args)
        assert refused.value.hint
        return refused.value.message


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_omi_is_found_with_its_defaults(host):
    """What every current agent looks like."""
    host.install()
    found = host.find()
    assert (found.layout, found.conf) == ("omi", OMI)
    assert (found.certificate, found.key) == (f"{SSL}/omi.pem", f"{SSL}/omikey.pem")
    assert (found.ports, found.port, found.account) == ((1270,), 1270, "omi")
    assert found.marker == f"{SSL}/.omi_cert_marker"
    assert found.pid_file == "/var/opt/omi/run/omiserver.pid"
    assert found.log == "/var/opt/omi/log/omiserver.log"
    assert found.scxadmin == "/opt/microsoft/scx/bin/tools/scxadmin"


def test_classic_omi_is_found(host):
    """scx 1.5 is OMI already, in the old place, all root's."""
    host.install(CLASSIC, b"httpsport=1270\npemfile=/etc/opt/microsoft/scx/ssl/scx.pem\nkeyfile=/etc/opt/microsoft/scx/ssl/scx-key.pem\n")
    found = host.find()
    assert (found.layout, found.account, found.marker) == ("classic-omi", "root", "")
    assert (found.certificate, found.key) == (f"{CLASSIC_SSL}/scx.pem", f"{CLASSIC_SSL}/scx-key.pem")


def test_pegasus_is_what_has_only_the_old_key(host):
    """Older agents leave nothing else to be known by; their port is not checked."""
    host.put(f"{CLASSIC_SSL}/scx-key.pem")
    assert (host.find().layout, host.find().ports, host.find().account) == ("pegasus", (1270,), "root")
    assert host.find("auto", 5989).port == 5989


def test_a_stale_old_key_proves_nothing(host):
    """It survives a skipped migration beside a current agent."""
    host.install()
    host.put(f"{CLASSIC_SSL}/scx-key.pem")
    assert host.find().layout == "omi"


def test_two_live_agents_and_none_chosen_is_refused(host):
    """A guess would exchange the certificate of the agent that SCOM doesn't talk to."""
    host.install()
    host.install(CLASSIC)
    message = host.refusal()
    assert OMI in message
    assert CLASSIC in message
    assert host.find("classic-omi").conf == CLASSIC
    assert host.find("omi").conf == OMI


@pytest.mark.parametrize("layout", ["auto", "omi", "classic-omi", "pegasus"])
def test_no_agent_says_what_was_seen(host, layout):
    """The operator learns which of the two files is missing."""
    host.put(SERVERS[OMI])
    message = host.refusal(layout)
    assert f"{SERVERS[OMI]} is there" in message
    assert f"{OMI} is missing" in message


def test_a_chosen_layout_that_is_not_there_is_refused(host):
    """Whoever sets layout does not want another one."""
    host.install()
    assert "no agent of layout classic-omi" in host.refusal("classic-omi")
    assert "no agent of layout pegasus" in host.refusal("pegasus")


def test_installations_behind_links_are_found(host):
    """/opt or /etc/opt on another file system, linked absolutely as seen from the host."""
    host.put("/srv/opt/omi/bin/omiserver")
    host.link("/opt", "/srv/opt")
    host.put(OMI, SHIPPED)
    assert host.find().layout == "omi"


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        (b"", {}),
        (b"pemfile=/a.pem\nkeyfile = /b.pem\n", {"certificate": "/a.pem", "key": "/b.pem"}),
        (b"  pemfile\t=\t/a b.pem  \r\n", {"certificate": "/a b.pem"}),
        (b"pemfile=/a.pem\npemfile=/b.pem\n", {"certificate": "/b.pem"}),
        (b'pemfile="/a.pem"\n', {"certificate": '/var/opt/omi/run/"/a.pem"'}),
        (b"pemfile=/a.pem # here\n", {"certificate": "/a.pem # here"}),
        (b"pemfile=a.pem\n", {"certificate": "/var/opt/omi/run/a.pem"}),
        (b"#pemfile=/a.pem\n", {}),
        (b"pemfile=/a.pem\0garbage\n", {"certificate": "/a.pem"}),
        (b"pemfile=/a=b.pem\n", {"certificate": "/a=b.pem"}),
        (b"certsdir=/elsewhere\n", {}),
        (b"nonroot=FALSE\n", {"account": "root"}),
        (b"NonRoot=false\n", {"account": "root"}),
        (b"nonroot=TRUE\nService=scom\n", {"account": "scom"}),
        (b"nonroot=false\nservice=scom\n", {"account": "root"}),
        (b"httpsport= 0,1270,1270,5986\n", {"ports": (1270, 5986)}),
        (b"httpsport=0, 1270, +5986\n", {"ports": (1270, 5986)}),
        (b"httpsport=,,1270,\n", {"ports": (1270,)}),
        (b"httpsport=5986\nhttpsport=1270\n", {"ports": (1270,)}),
        (b"pidfile=/run/omi.pid\nlogfile=/log\n", {"pid_file": "/run/omi.pid", "log": "/log"}),
        (b"authorizedgroups= wheel, omi\nNtlmCredsFile=/x\nKRB5CREDCACHE=x\nidletimeout=\nlivetime=90\nloglevel=4\nNoTLSv1_0=true\n", {}),
        (b"\n \t\r\n\x0b\n", {}),
        (b"pemfile=/\xff.pem", {"certificate": "/\udcff.pem"}),
    ],
)
def test_the_configuration_is_read_as_the_agent_reads_it(host, conf, expected):
    """Each line as OMI's own parser takes it: blanks, cases, repeats, no quotes and no comments behind values."""
    plain = b"" if b"httpsport" in conf else b"httpsport=0,1270\n"
    host.install(OMI, SHIPPED.replace(b"httpsport=0,1270\n", b"") + plain + conf)
    defaults = {"certificate": f"{SSL}/omi.pem", "key": f"{SSL}/omikey.pem", "account": "omi", "ports": (1270,)}
    found = host.find()
    for name, value in {**defaults, **expected}.items():
        assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b" # indented", "not of the form key=value"),
        (b"\xef\xbb\xbf# byte order mark", "not of the form key=value"),
        (b"pemfile", "not of the form key=value"),
        (b"pemfile: /a.pem", "not of the form key=value"),
        (b"[section]", "not of the form key=value"),
        (b"=x", "not of the form key=value"),
        (b"pem-file=/a.pem", "not of the form key=value"),
        (b"include=/etc/other.conf", "unknown key include"),
        (b"PemFile=/a.pem", "unknown key PemFile"),
        (b"HTTPSPORT=1270", "unknown key HTTPSPORT"),
        (b"destdir=/other", "unknown key destdir"),
        (b"httpsport=1270 ,5986", "bad value for httpsport"),
        (b"httpsport=0; 1270", "bad value for httpsport"),
        (b"httpsport=65536", "bad value for httpsport"),
        (b"httpsport=-1", "bad value for httpsport"),
        (b"httpsport=+", "bad value for httpsport"),
        (b"httpport=x", "bad value for httpport"),
        (b"nonroot=yes", "bad value for nonroot"),
        (b"trace=1", "bad value for trace"),
        (b"loglevel=LOUD", "bad value for loglevel"),
        (b"idletimeout=90s", "bad value for idletimeout"),
        (b"authorizedgroups=wheel,1x", "bad value for authorizedgroups"),
        (b"pemfile=", "bad value for pemfile"),
    ],
)
def test_a_line_the_agent_dies_of_is_named(host, line, why):
    """As a service the agent says nothing at all: this message is the only one the operator gets."""
    host.install(OMI, SHIPPED + line + b"\n" + b"idletimeout=1\n")
    message = host.refusal()
    assert message.startswith(f"{OMI} line {SHIPPED.count(10) + 1}: {why}")
    assert "would not start" in message


def test_a_long_line_is_several_lines_to_the_agent(host):
    """Its buffer holds 1023 bytes: the rest of a long comment is a setting, and line numbers count on."""
    text = b"#" + b"x" * (CONF_LINE_BYTES - 1) + b"httpsport=1270\nfoo\n"
    host.install(OMI, text)
    assert f"{OMI} line 3: " in host.refusal()
    host.install(OMI, text.replace(b"foo\n", b""))
    assert host.find().ports == (1270,)
    for length, number in ((CONF_LINE_BYTES - 1, 3), (CONF_LINE_BYTES, 4)):  # the line end that does not fit is a line
        host.install(OMI, b"#" * length + b"\nhttpsport=1270\nfoo\n")
        assert f"{OMI} line {number}: " in host.refusal()


@pytest.mark.parametrize(("conf", "listed"), [(b"httpsport=0\n", "no port"), (b"", "5986"), (b"httpsport=5986,5987\n", "5986, 5987")])
def test_an_agent_that_scom_can_not_reach_is_not_ready(host, conf, listed):
    """Installed without --enable-opsmgr: a certificate would change nothing, the port must be opened first."""
    host.install(OMI, conf)
    with pytest.raises(AgentNotReady) as refused:
        host.find()
    assert f"httpsport lists {listed}, not 1270" in refused.value.message
    assert "omiconfigeditor httpsport -a 1270" in refused.value.hint
    assert "--enable-opsmgr" in refused.value.hint


def test_a_configured_port_must_be_served(host):
    """The port that the operator names is the one that is probed."""
    host.install(OMI, b"httpsport=1270,5986\n")
    assert host.find("auto", 5986).port == 5986
    assert "not 443" in host.refusal("auto", 443)


def test_a_configuration_others_can_write_is_refused(host):
    """Its pemfile says which name root replaces: that must be nobody else's choice."""
    host.install()
    (host.base / OMI.lstrip("/")).chmod(0o666)
    with pytest.raises(HostError) as refused:
        host.find()
    assert refused.value.hint == f"chmod go-w {OMI}"


@pytest.mark.parametrize(
    ("shape", "kind", "target", "data"),
    [
        ("file", "file", f"{SSL}/omi.pem", b"pem"),
        ("absolute", "link", f"{SSL}/omi-host-h.pem", b"pem"),
        ("relative", "link", f"{SSL}/omi-host-h.pem", b"pem"),
        ("migrated", "link", f"{CLASSIC_SSL}/scx-host-h.pem", b"pem"),
        ("dangling", "link", f"{SSL}/gone.pem", None),
        ("absent", "absent", f"{SSL}/omi.pem", None),
    ],
)
def test_every_shape_of_the_certificates_name(host, shape, kind, target, data):
    """Packages, SCOM and administrators each leave it differently; name, target and bytes are told apart."""
    host.install()
    host.put(f"{SSL}/omikey.pem", b"key")
    name = f"{SSL}/omi.pem"
    if shape != "absent":
        host.put(target if shape != "dangling" else f"{SSL}/other.pem", b"pem")
    links = {"absolute": target, "relative": "omi-host-h.pem", "migrated": target, "dangling": target}
    if shape in links:
        host.link(name, links[shape])
    pair = read_pair(host.root, host.find())
    assert (pair.name.path, pair.name.kind) == (name, kind)
    assert (pair.target.path, pair.target.kind) == (target, "file" if data else "absent")
    assert (pair.certificate, pair.key, pair.key_target.path) == (data, b"key", f"{SSL}/omikey.pem")
    assert (pair.target.ctime_ns > 0) is (data is not None)


def test_no_key_is_no_error(host):
    """The agent's own tool makes one; that is a step of the plan."""
    host.install()
    pair = read_pair(host.root, host.find())
    assert (pair.key, pair.key_target.kind) == (None, "absent")


def test_a_loop_of_links_is_reported(host):
    """The agent can't read it either."""
    host.install()
    host.put(f"{SSL}/omikey.pem")
    host.link(f"{SSL}/omi.pem", f"{SSL}/omi.pem")
    with pytest.raises(HostError, match="40 links"):
        read_pair(host.root, host.find())


def dead_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (None, "stopped"),
        (os.getpid, "running"),
        (lambda: f" {os.getpid()}\n", "running"),
        (lambda: 1, "running"),
        (dead_pid, "died"),
        (lambda: "", "died"),
        (lambda: "0", "died"),
        (lambda: "-1", "died"),
        (lambda: "99999999999", "died"),
        (lambda: "999999999", "died"),
        (lambda: "omiserver", "died"),
        (lambda: f"{os.getpid()} {os.getpid()}", "died"),
    ],
)
def test_a_stopped_agent_is_told_from_a_dead_one(host, content, state):
    """Stopped on purpose it stays so; dead it is started. A damaged pid file never means "every process" to kill(2)."""
    host.install()
    if content:
        host.put("/var/opt/omi/run/omiserver.pid", str(content()).encode())
    assert process(host.root, host.find()) == state


def test_another_users_process_is_running(host, monkeypatch):
    """EPERM means that it is there."""
    host.install()
    host.put("/var/opt/omi/run/omiserver.pid", b"77")

    def refuse(_pid, _signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert process(host.root, host.find()) == "running"


def test_nothing_runs_in_an_images_tree(host):
    """A pid in an image's file is the number of some process of its builder."""
    host.install()
    host.put("/var/opt/omi/run/omiserver.pid", str(os.getpid()).encode())
    assert process(Root(str(host.base)), host.find()) == "stopped"


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_SH if sys.argv[2] == "read" else fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("path", "how", "name"),
    [
        ("/var/lib/dpkg/lock-frontend", "write", "dpkg"),
        ("/var/lib/dpkg/lock", "write", "dpkg"),
        ("/usr/lib/sysimage/rpm/.rpm.lock", "write", "rpm"),
        ("/var/lib/rpm/.rpm.lock", "write", "rpm"),
        ("/var/lib/rpm/.rpm.lock", "read", ""),
    ],
)
def test_a_package_manager_at_work_is_seen(host, path, how, name):
    """It is about to rewrite the pair and restart the agent; one that only queries is not."""
    real = host.put(path)
    assert packager(host.root) == ""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(real), how], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert packager(host.root) == name
        holder.stdin.close()
    assert packager(host.root) == ""


def test_looking_takes_no_lock(host, monkeypatch):
    """A package manager must never find its lock taken by us."""
    host.put("/var/lib/dpkg/lock")
    asked = []
    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command, *rest: asked.append(command) or real(fd, command, *rest))
    assert packager(host.root) == ""
    assert asked == [fcntl.F_GETLK]


def test_zypper_is_known_by_its_pid_file(host):
    """It holds no lock between transactions; in an image's tree the number means nothing."""
    host.put("/run/zypp.pid", f"{os.getpid()}\n".encode())
    assert packager(host.root) == "zypp"
    assert packager(Root(str(host.base))) == ""
    host.put("/run/zypp.pid", str(dead_pid()).encode())
    assert packager(host.root) == ""


pieces = st.sampled_from(
    [
        b"httpsport",
        b"pemfile",
        b"nonroot",
        b"service",
        b"=",
        b" ",
        b"\n",
        b"\r\n",
        b"#",
        b"1270",
        b",",
        b"true",
        b"\0",
        b"/a",
        b"\xef\xbb\xbf",
        b"x" * 1022,
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.lists(pieces, max_size=20).map(b"".join), st.binary(max_size=80)))
def test_any_configuration_is_read_or_refused(host, data):
    """Whatever is in the file: an agent with absolute paths and its port among the ports, or AgentNotReady."""
    host.install(OMI, b"httpsport=1270\n" + data)
    try:
        found = host.find()
    except AgentNotReady as refused:
        assert refused.message.startswith(OMI)
        return
    assert found.port in found.ports
    assert all(0 < port <= 0xFFFF for port in found.ports)
    assert found.certificate.startswith("/")
    assert found.account
