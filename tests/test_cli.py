"""The command as an operator and a timer call it: exact words and statuses, whatever is typed and whoever reads.

A transcript in tests/transcripts is a list of commands with what they print and how they end, as in age's testscript:

    $ scx-enroll --root $ROOT run      the command; the words after it are split as a shell does
    > a line on standard output
    ! a line on standard error
    = 3                                the exit status, 0 is left out

`@ agent` puts an agent that does not run into the root, `@ huge` a file of 2 MB. Files that begin with `-- name --` are put there, too. What differs
from run to run is shown as $ROOT, $TIME, $SHA256, $ID and $PID. With UPDATE_TRANSCRIPTS=1 what is printed now is written down.
"""

import contextlib
import fcntl
import glob
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scx_enroll
from scx_enroll import arguments, case, cli, enroll, errors, pace, report, request
from scx_enroll import journal as j
from scx_enroll.behalf import Ended
from scx_enroll.observe import View
from scx_enroll.pace import Held, Policy
from scx_enroll.plan import Observed, Step
from scx_enroll.store import Generation
from scx_enroll.verbs import VERBS
from tests.lab import selfsigned

TRANSCRIPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "transcripts")
START = "import sys; from scx_enroll.cli import main; sys.exit(main())"
# The package is loaded before the identity is given up, since its folder may be closed to others.
START_AS_NOBODY = """
import os, pkgutil, importlib, sys, scx_enroll
for module in pkgutil.iter_modules(scx_enroll.__path__):
    importlib.import_module("scx_enroll." + module.name)
import requests, certsrv
from scx_enroll.cli import main
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main())
"""
NOW = 1_700_000_000


def environment(**more):
    """A plain one, in which the package is found that these tests have found."""
    path = os.path.dirname(os.path.dirname(os.path.abspath(scx_enroll.__file__)))
    given = os.environ.get("PYTHONPATH", "")
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path + (os.pathsep + given if given else ""), "LC_ALL": "C.UTF-8", **more}


def call(*words, start=START, stdin=b"", env=None, **options):
    """Run the command; ended process with what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", start, *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, input=stdin, env=env or environment(), cwd="/", timeout=60, **streams)


# -- transcripts ----------------------------------------------------------------------------------------------------


def put_agent(root):
    """An OMI agent as its packages leave it, which does not run."""
    for path, data, mode in (
        ("opt/omi/bin/omiserver", b"", 0o755),
        ("etc/opt/omi/conf/omiserver.conf", b"httpsport=0,1270\n", 0o644),
        ("etc/hostname", b"web17\n", 0o644),
    ):
        put(root, path, data, mode)
    key = selfsigned.make_key("ec:secp256r1")
    put(root, "etc/opt/omi/ssl/omikey.pem", selfsigned.key_pem(key), 0o600)
    put(root, "etc/opt/omi/ssl/omi-host-web17.pem", selfsigned.make_certificate(key, "web17", "corp.lab.test"), 0o444)
    os.symlink("omi-host-web17.pem", os.path.join(root, "etc/opt/omi/ssl/omi.pem"))
    put(root, "etc/scx-enroll/ca.pem", selfsigned.make_certificate(selfsigned.make_key("ec:secp256r1"), "root", "lab.test"), 0o644)


def put(root, path, data, mode=0o600):
    full = os.path.join(root, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "wb") as file:
        file.write(data)
    os.chmod(full, mode)


def same(text, root):
    """The text with everything replaced that differs between runs, and between versions of Python."""
    text = text.replace(root, "$ROOT").replace(scx_enroll.__version__, "$VERSION")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "$TIME", text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "$SHA256", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "$ID", text)
    text = re.sub(r"\bprocess \d+", "process $PID", text)
    text = text.replace("self signed", "self-signed")  # OpenSSL 1.1
    return re.sub(r"\(choose from .*\)", lambda found: found[0].replace("'", ""), text)


def shown(ended, root):
    """What a command printed and how it ended, as lines of a transcript."""
    for mark, data in ((">", ended.stdout), ("!", ended.stderr)):
        text = same(data.decode(), root)
        assert not text or text.endswith("\n"), "the last line is not ended"
        yield from (f"{mark} {line}".rstrip() for line in text.splitlines())
    if ended.returncode:
        yield f"= {ended.returncode}"


@pytest.mark.parametrize("path", sorted(glob.glob(f"{TRANSCRIPTS}/*.txt")), ids=os.path.basename)
def test_the_words_that_operators_know_have_changed(path, tmp_path):
    """Exact standard output, standard error and status: a change is a change of a transcript, seen in review."""
    root = os.path.realpath(tmp_path)
    with open(path, encoding="utf-8") as file:
        whole = file.read()
    script, *files = re.split(r"^-- (\S+) --\n", whole, flags=re.MULTILINE)
    for name, content in zip(files[::2], files[1::2]):
        put(root, name, content.encode())
    found = []
    for line in script.split("\n"):
        if line == "@ agent":
            put_agent(root)
        if line == "@ huge":
            put(root, "huge.pem", b"x" * (2 << 20))
        if not re.match("[>!=]( |$)", line):
            found.append(line)
        if line.startswith("$ scx-enroll"):
            words = [word.replace("$ROOT", root) for word in shlex.split(line)[2:]]
            found.extend(shown(call(*words), root))
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(found) + whole[len(script):])
        return
    assert found == script.split("\n")


def test_the_help_does_not_fit_on_a_screen():
    """Under 40 lines of at most 120 columns; every verb and every option of the parser is on it."""
    lines = arguments.HELP.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    parser = arguments.parser()
    verbs = next(action for action in parser._actions if action.choices)
    assert set(verbs.choices) == {*VERBS, "idle"}
    for verb, one in verbs.choices.items():
        assert re.search(rf"^  {verb}\b", arguments.HELP, re.MULTILINE)
        for action in one._actions:
            assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", arguments.HELP) for option in action.option_strings if option != "-h")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_asked_for_anywhere(verb):
    """After a verb, too: the same page, on standard output, status 0."""
    ended = call(*([verb] if verb else []), "--help") if verb in ("", "install") else in_process([verb, "--help"])
    printed = ended.stdout.decode() if hasattr(ended, "returncode") else ended[1]
    assert printed == arguments.HELP


# -- any arguments --------------------------------------------------------------------------------------------------


def in_process(words):
    """Call `main` in this process; status, standard output, standard error."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(words)
            except SystemExit as end:
                status = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, out.buffer.getvalue().decode("utf-8", "surrogateescape"), err.getvalue()


words = st.one_of(
    st.sampled_from([
        *VERBS, "--dry-run", "--now", "--renew", "--unattended", "--wait", "0", "-1", "nan", "1e9", "inf", "x", "--json", "--verbose", "--live",
        "--config", "--root", "--", "-", "", "--version", "--help", "-h", "--wait=0", "--wait=", "--js", "/nowhere", "no such file",
    ]),
    st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=6),
    st.binary(min_size=1, max_size=4).filter(lambda data: b"\0" not in data).map(os.fsdecode),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, max_size=6))
def test_an_argument_that_nobody_thought_of(tmp_path, monkeypatch, argv):
    """No traceback, no defect: a documented status, and every failure with its words and on standard error."""
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path / "root")
    os.makedirs(root, exist_ok=True)
    # The last --root wins: nothing outside is looked at or changed, whatever the words mean.
    status, out, err = in_process(["--root", root, *argv, "--root", root])
    if "idle" in argv and status == 75:
        assert out + err == ""
        return
    assert status in {0, *(kind.exit_status for kind in vars(errors).values() if isinstance(kind, type))} - {1}
    assert "Traceback" not in out + err
    if status:
        assert re.match(r"scx-enroll: error: \S", err)
        assert all(line.startswith("scx-enroll: ") for line in err.splitlines()[:1])


@pytest.mark.parametrize("argv", [["run", "--dry"], ["--ver"], ["run", "--un"], ["status", "--js"]])
def test_an_abbreviation_means_something_else_tomorrow(argv, tmp_path):
    """Options are written out: a script must not change its meaning with a new option."""
    assert in_process(["--root", str(tmp_path), *argv])[0] == 2


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "86401", "soon", "", "1h"])
def test_a_wait_that_is_no_time(seconds, tmp_path):
    """A usage error in the operator's words, without a name from the source."""
    status, _, err = in_process(["--root", str(tmp_path), "run", "--wait", seconds])
    assert status == 2
    assert "--wait" in err
    assert "_seconds" not in err


@pytest.mark.parametrize("seconds", ["0", "0.5", "86400", "1e3"])
def test_a_wait_that_is_a_time(seconds, tmp_path):
    """From nothing to a day, as a number of seconds."""
    assert in_process(["--root", str(tmp_path), "run", "--wait", seconds])[0] == errors.Unconfigured.exit_status


def test_an_empty_root_is_the_current_folder(tmp_path, monkeypatch):
    """--root "$UNSET" must not take wherever the shell stands for a tree to work on."""
    monkeypatch.chdir(tmp_path)
    assert in_process(["--root", "", "hold"])[0] == 2
    assert os.listdir(tmp_path) == []


# -- holding --------------------------------------------------------------------------------------------------------

CONF = """[host]
name = web17.corp.lab.test
[ca]
server = ca01.corp.lab.test
template = SCXAgent
auth = basic
user = x
"""


@pytest.fixture
def host(tmp_path):
    """A root with an agent and a configuration."""
    root = str(tmp_path / "root")
    put_agent(root)
    put(root, "etc/scx-enroll/scx-enroll.conf", CONF.encode(), 0o644)
    return root


def hold_of(root):
    with open(f"{root}/var/lib/scx-enroll/journal.json", encoding="utf-8") as file:
        return json.load(file)["hold"]


def test_a_hold_without_a_reason_releases(host):
    """hold "$REASON" with nothing in it holds all the same: the opposite would be a restart in a change freeze."""
    assert in_process(["--root", host, "hold", "freeze"])[0] == 0
    in_process(["--root", host, "hold", ""])
    assert hold_of(host)
    assert in_process(["--root", host, "run"])[0] == 0
    assert in_process(["--root", host, "release"])[0] is not None
    assert hold_of(host) == ""


def test_a_clock_that_was_set_back_spends_the_budget_for_years(host):
    """Times in the future count for a day from when they were noticed, and are noted once."""
    ahead = int(time.time()) + 5 * 365 * 86400
    put(host, "var/lib/scx-enroll/budget.json", j.to_json(j.Budget(submissions=(j.Submission(ahead, counts=True),) * 3, restarts=(ahead,))))
    os.chmod(f"{host}/var/lib/scx-enroll", 0o700)
    in_process(["--root", host, "hold", "freeze"])
    assert in_process(["--root", host, "run"])[0] == 0
    with open(f"{host}/var/lib/scx-enroll/budget.json", encoding="utf-8") as file:
        budget = json.load(file)
    assert len(budget["submissions"]) == 3
    assert 0 < budget["ahead"] <= time.time()


@pytest.mark.parametrize("broken", [b"", b"[ca\n", CONF.replace("basic", "none").encode()])
def test_a_hold_needs_no_configuration(host, broken):
    """Whoever wants everything to stop has no time to correct a file first."""
    put(host, "etc/scx-enroll/scx-enroll.conf", broken, 0o644)
    in_process(["--root", host, "hold", "freeze"])
    assert hold_of(host) == "freeze"


def test_a_hold_that_holds_ends_with_a_failure(tmp_path, host):
    """It did what was asked for: 0, also where there is no agent yet."""
    os.unlink(f"{host}/opt/omi/bin/omiserver")
    assert in_process(["--root", host, "hold", "freeze"])[0] == 0
    assert hold_of(host) == "freeze"


def test_a_request_is_printed_for_a_ca_that_can_not_be_reached(host):
    """`csr`: a PEM request on standard output and nothing else, for the name configured; nothing is changed."""
    before = sorted(os.walk(host))
    status, out, err = in_process(["--root", host, "csr"])
    assert (status, err) == (0, "")
    csr = x509.load_pem_x509_csr(out.encode())
    assert csr.subject.get_attributes_for_oid(x509.oid.NameOID.COMMON_NAME)[0].value == "web17.corp.lab.test"
    assert sorted(os.walk(host)) == before


def test_a_look_changes_something(host):
    """`status` and `run --dry-run` write nothing, not even a folder; so they may be run by a monitor."""
    before = sorted(os.walk(host))
    for argv in (["status"], ["status", "--json"]):
        assert in_process(["--root", host, *argv])[0] == 0
    for argv in (["run", "--dry-run"], ["run", "--dry-run", "--json"]):
        assert in_process(["--root", host, *argv])[0] == 3, "there is no password, which the step would find out"
    assert sorted(os.walk(host)) == before


@pytest.mark.parametrize("certificate", [b"", b"garbage\n"])
def test_a_generation_whose_certificate_is_damaged(host, certificate):
    """What a disk made of it is this host's trouble (12), with the file named; it is no defect of the program."""
    folder = "var/lib/scx-enroll/generations/0123456789abcdef"
    for name, data in (("cert.pem", certificate), ("chain.pem", b""), ("meta.json", j.to_json(j.Origin()))):
        put(host, f"{folder}/{name}", data)
    for path in ("var/lib/scx-enroll", "var/lib/scx-enroll/generations", folder):
        os.chmod(f"{host}/{path}", 0o700)
    status, _, err = in_process(["--root", host, "run", "--dry-run"])
    assert status == 12
    assert f"{folder}/cert.pem" in err


@pytest.mark.parametrize(
    "journal",
    [
        j.Journal(backoffs=(j.Backoff("", "i", 10**30, 1, "soon", 5, "m", "h"),)),
        j.Journal(request=j.Request("submitted", "ca01.corp.lab.test", "csr", "spki", 7, 10**30, 1, 10**30)),
    ],
    ids=["back-off", "request"],
)
def test_a_time_that_no_calendar_holds(host, journal):
    """A number in the journal that is no time is shown or refused; it is no defect of the program."""
    put(host, "var/lib/scx-enroll/journal.json", j.to_json(journal))
    os.chmod(f"{host}/var/lib/scx-enroll", 0o700)
    for argv in (["status"], ["run", "--dry-run"]):
        assert in_process(["--root", host, *argv])[0] in (0, 12)


# -- unattended -----------------------------------------------------------------------------------------------------


def result(step, *held, **seen):
    """The end of a run as the driver returns it."""
    view = View(Observed(held=held, **seen), Policy(("ca01",)), None)
    return enroll.Result(step, view, j.Journal(), j.Budget(), ())


WAIT = Step("C4", "wait", "the CA does not answer", until=NOW + 60, status=5, hint="see to it")
HELD = Held("g", "leaf", NOW - 100 * 86400, NOW + 100 * 86400)


def ended(monkeypatch, tmp_path, outcome, *argv, tools=None):
    """`run` with a driver that ends like that, at the time NOW."""
    monkeypatch.setattr(enroll, "run", lambda _root, _options, _tools: outcome)
    monkeypatch.setattr(enroll.Tools, "clock", staticmethod(lambda: NOW), raising=False)
    real = enroll.Tools.__init__

    def init(self, *arguments, **options):
        real(self, *arguments, **{**options, "clock": lambda: NOW})

    monkeypatch.setattr(enroll.Tools, "__init__", init)
    return in_process(["--root", str(tmp_path), "run", *argv])


def test_a_timer_that_only_waits_is_quiet(monkeypatch, tmp_path):
    """Status 0 and nothing printed while time remains; by hand the status and its words are shown."""
    assert ended(monkeypatch, tmp_path, result(WAIT, HELD), "--unattended") == (0, "", "")
    status, out, err = ended(monkeypatch, tmp_path, result(WAIT, HELD))
    assert (status, out) == (5, "")
    assert err.splitlines()[0] == "scx-enroll: waiting: the CA does not answer"


def test_time_runs_out_while_a_timer_waits(monkeypatch, tmp_path):
    """A tenth of the lifetime is left: a unit in state failed."""
    ending = replace(HELD, not_after=NOW + 5 * 86400)
    assert ended(monkeypatch, tmp_path, result(WAIT, ending), "--unattended")[0] == 5


def test_the_unit_is_green_again_once_the_certificate_has_expired(monkeypatch, tmp_path):
    """An expired certificate has a mismatch (its dates), so it is not valid any more: that must not end the alarm."""
    expired = replace(HELD, not_after=NOW - 1, mismatches=("dates: expired",))
    assert ended(monkeypatch, tmp_path, result(WAIT, expired), "--unattended")[0] == 5


@pytest.mark.parametrize("status", [3, 6, 8, 9, 10, 12, 13])
def test_a_failure_that_a_timer_hides(monkeypatch, tmp_path, status):
    """What waits for no time needs a person, with --unattended as by hand."""
    assert ended(monkeypatch, tmp_path, result(replace(WAIT, status=status), HELD), "--unattended")[0] == status


def test_json_of_a_run_is_one_document(monkeypatch, tmp_path):
    """For configuration management: facts on standard output, the same that anyone may read in /run."""
    status, out, err = ended(monkeypatch, tmp_path, result(WAIT, HELD), "--json")
    facts = json.loads(out)
    assert (status, err, facts["exit_status"], facts["row"]) == (5, "", 5, "C4")
    with open(tmp_path / "run" / "scx-enroll" / "status.json", encoding="utf-8") as file:
        assert json.load(file) == facts


@pytest.mark.parametrize("kind", [errors.HostError, errors.RolledBack, errors.AgentNotReady, errors.ConfigError])
def test_the_published_status_says_all_is_well_after_a_failure(monkeypatch, tmp_path, kind):
    """status.json tells what the last run found: one that ended with an error leaves no older word standing."""
    ended(monkeypatch, tmp_path, result(Step("C6", "nothing", "all is well"), HELD))

    def run(_root, _options, _tools):
        raise kind("it went wrong", "see to it")

    monkeypatch.setattr(enroll, "run", run)
    assert in_process(["--root", str(tmp_path), "run"])[0] == kind.exit_status
    with open(tmp_path / "run" / "scx-enroll" / "status.json", encoding="utf-8") as file:
        assert json.load(file)["exit_status"] == kind.exit_status


def test_a_result_is_lost_because_it_could_not_be_published(monkeypatch, tmp_path):
    """/run is full or read-only: what was done is shown and keeps its status; the failure to publish is told beside it."""
    (tmp_path / "run").write_bytes(b"in the way")
    status, out, err = ended(monkeypatch, tmp_path, result(WAIT, HELD))
    assert "the CA does not answer" in out + err
    assert status == 5


# -- who reads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "--json"], ["csr"], ["status"]], ids=" ".join)
def test_a_reader_that_has_gone(host, argv):
    """`| head -0`: no traceback, no "Exception ignored", and the status of the work, not 120."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = call("--root", host, *argv, stdout=writer)
    finally:
        os.close(writer)
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr
    assert found.returncode == (3 if argv[0] == "run" else 0), "what the work ended with: there is no password"


def test_a_reader_that_goes_stops_the_work(monkeypatch, tmp_path):
    """`run | head -1`: between two steps nobody may stop it but a signal; the work goes on without being told of."""
    done = []

    def run(_root, _options, tools):
        for number in range(3):
            tools.acted(Step("C4", "submit", "x", ca="ca01"))
            done.append(number)
        return result(Step("C6", "nothing", "well"), HELD)

    monkeypatch.setattr(enroll, "run", run)
    reader, writer = os.pipe()
    os.close(reader)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = sys.stdout
    gone = open(writer, "w", encoding="utf-8")  # noqa: SIM115 -- closing it fails, too
    try:
        sys.stdout = gone
        assert cli.main(["--root", str(tmp_path), "run"]) == 0
    finally:
        sys.stdout = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(BrokenPipeError):
            gone.close()
    assert done == [0, 1, 2]


def test_a_terminal_that_knows_no_umlaut(host):
    """A name or a reason that the locale can't show is shown in another way; it is no defect."""
    found = call("--root", host, "hold", "Größe 证书", env=environment(PYTHONIOENCODING="ascii"))
    assert found.returncode == 0
    assert b"defect" not in found.stderr


def test_a_person_is_told_what_a_long_wait_is_for(host):
    """On a terminal, each thing once; a log is told nothing."""
    with locked(host):
        quiet = call("--root", host, "release", "--wait", "0.5")
        controller, terminal = pty.openpty()
        try:
            call("--root", host, "release", "--wait", "0.7", stderr=terminal)
        finally:
            os.close(terminal)
        told = b""
        with contextlib.suppress(OSError), open(controller, "rb", buffering=0) as file:
            while True:
                data = file.read(4096)
                told += data
                if not data:
                    break
    assert quiet.returncode == 11
    assert quiet.stderr.count(b"waiting") == 0
    assert told.decode().count("waiting for the lock, held by process 4711 …") == 1


# -- signals and identity -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(root):
    """Hold the lock of a root as another run would."""
    path = f"{root}/var/lib/scx-enroll"
    os.makedirs(path, mode=0o700, exist_ok=True)
    with open(f"{path}/lock", "w", encoding="ascii") as file:
        file.write("process 4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def opened(pid):
    """The files that a process has open; one that it closes meanwhile is left out."""
    found = []
    for fd in glob.glob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_the_lock(host, number):
    """Nothing is under way, so it ends at once, as killed by that signal, and does not wait an hour first."""
    command = [sys.executable, "-W", "ignore", "-c", START, "--root", host, "release", "--wait", "30"]
    with locked(host):
        child = subprocess.Popen(command, env=environment(), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            lock = os.path.realpath(f"{host}/var/lib/scx-enroll/lock")
            deadline = time.monotonic() + 20
            while lock not in opened(child.pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3)
            child.send_signal(number)
            _, said = child.communicate(timeout=4)
        finally:
            child.kill()
            child.communicate()
    assert child.returncode == -number
    assert b"stopped by a signal" in said


def test_a_busy_host_is_no_failure_of_the_timer(host):
    """11 by hand, naming the holder; the timer comes again."""
    with locked(host):
        assert in_process(["--root", host, "run", "--unattended"])[0] == 0
        status, _, err = in_process(["--root", host, "run"])
    assert status == 11
    assert "process 4711" in err


@pytest.mark.skipif(os.path.exists("/etc/scx-enroll") or os.path.exists("/run/scx-enroll"), reason="scx-enroll is in use on this machine")
@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["run"], 12, "only root may do this"),
        (["run", "--unattended"], 12, "only root may do this"),
        (["hold"], 12, "only root may do this"),
        (["release"], 12, "only root may do this"),
        (["rollback"], 12, "only root may do this"),
        (["status"], 12, "no run has left a status yet"),
        (["run", "--dry-run"], 3, "scx-enroll.conf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_somebody_who_is_not_root(argv, status, words):
    """On the host itself only root changes anything; the hint says how."""
    found = call(*argv, start=START_AS_NOBODY)
    assert (found.returncode, found.stdout) == (status, b"")
    assert words in found.stderr.decode()
    assert "scx-enroll: hint: " in found.stderr.decode()


def test_a_defect_tells_how_to_report_it(monkeypatch, tmp_path):
    """Status 1 and one line by default, the whole traceback with --verbose."""

    def run(_root, _options, _tools):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(enroll, "run", run)
    status, _, err = in_process(["--root", str(tmp_path), "run"])
    assert status == 1
    assert err.splitlines() == [
        "scx-enroll: error: a defect of scx-enroll: ZeroDivisionError: of a test", "scx-enroll: hint: run again with --verbose, and report it",
    ]
    with pytest.raises(ZeroDivisionError):
        in_process(["--root", str(tmp_path), "run", "--verbose"])


# -- the report -----------------------------------------------------------------------------------------------------


def test_an_act_without_words():
    """Every act that the driver knows has its line in the log."""
    assert set(report.ACTED) >= set(enroll.ACTS)
    for action in enroll.ACTS:
        step = Step("C4", action, "why {not} formatted", generation="g", ca="ca01")
        assert re.fullmatch(r"scx-enroll: [^{}]+ \(C4: why {not} formatted\)\n", report.acted(step, verbose=action not in report.TOLD))
        if action not in report.TOLD:  # those are told with their reason, which has a request ID, or what has changed
            assert re.fullmatch(r"scx-enroll: [^{}:]+\n", report.acted(step, verbose=False))


@pytest.mark.parametrize("outcome", [WAIT, Step("C6", "nothing", "all is well", until=NOW), Step("L2", "wait", "no agent", status=4)])
def test_a_document_that_can_not_be_shown(outcome):
    """As status and as the end of a run, with everything else empty."""
    facts = json.loads(report.as_json(report.document(result(outcome), NOW)))
    assert f"next:           {outcome.row} {outcome.action}: {outcome.reason}\n" in report.as_status(facts)
    end = report.as_end(facts, failed=False)
    assert outcome.reason in end
    assert all(line.startswith("scx-enroll: ") for line in end.splitlines())


ASKED = {"state": "submitted", "ca": "ca01", "id": 7, "since": 60, "next": 0, "pending": True}
FACTS = {
    "time": 0, "exit_status": 0, "row": "C6", "action": "nothing", "reason": "all is well", "hint": "an act", "until": 120, "acts": [], "name": "a.b",
    "agent": {"layout": "omi", "certificate": "/omi.pem", "port": 1270, "process": "running"},
    "installed": {
        "sha256": "5a", "subject": "CN=a.b", "issuer": "CN=CA", "names": ["a.b", "c.d"], "not_before": 0, "not_after": 60, "key": "rsa:3072",
    },
    "generation": "g1", "problems": ["it is old"], "listening": True, "live": True, "proven": True, "served": "5a", "renewal_due": 180,
    "request": ASKED, "new_key": "9c", "errands": [{"names": ["e.f", "g.h"], **ASKED, "pending": False, "id": None}],
    "cas": [{"server": "ca01", "time": 60, "message": "it answered"}],
    "waiting_for": [
        {"ca": "ca01", "message": "ca01 is down", "until": 60}, {"ca": "ca01", "message": "no", "until": None}, {"ca": None, "message": "so", "until": 60},
    ],
    "hold": "freeze", "hold_until": 240, "sealed": 60, "changed": ["host name", "machine-id"], "foreign_key": "it came with the image",
    "budget": {
        "submissions": 1, "submissions_per_day": 24, "certificates": 2, "certificates_per_day": 3, "restarts": 4, "restarts_per_hour": 3,
        "restarts_per_day": 6,
    },
    "changes": [{"time": 60, "cause": f"c{number}", "what": "it went", "done": "put back"} for number in range(7)], "notes": ["a note"],
}
SHOWN = """\
host name:      a.b
agent:          omi, /omi.pem, port 1270, running
installed:      5a
  subject:      CN=a.b
  issuer:       CN=CA
  names:        a.b, c.d
  valid:        AT:00 to AT:01
  key:          rsa:3072
  generation:   g1
  problem:      it is old
served:         the certificate installed
renewal due:    AT:03
request:        pending, ID 7, at ca01, since AT:01
new key:        made and not in service yet, SHA-256 of its SPKI 9c
for another:    e.f, g.h: submitted, no ID known, at ca01, since AT:01
CA:             ca01, AT:01: it answered
waiting:        ca01 is down; until AT:01
waiting:        ca01: no; until the configuration, the key or the password changes
waiting:        any CA: so; until AT:01
hold:           freeze, until AT:04
sealed:         as an image, AT:01
this machine:   host name, machine-id changed
key:            it came with the image
last 24 hours:  submissions 1 of 24, certificates issued or possibly issued 2 of 3, restarts 4 (of 3 an hour and 6 a day, the last one for the way back)
CHANGES
note:           a note
next:           C6 nothing: all is well
  not before:   AT:02
  hint:         an act
as of AT:00
"""
TOLD = [line for number in range(2, 7) for line in (f"changed:        AT:01 c{number}: it went", "  done:         put back")]
LESS = {
    "the name": ({"name": None}, "host name:      unknown"),
    "what the agent reads": ({"installed": None}, "installed:      no certificate that can be read"),
    "its generation": ({"generation": None}, "  generation:   not one of ours"),
    "that it is served": ({"proven": False}, "served:         5a"),
    "TLS": ({"proven": False, "served": None}, "served:         no TLS"),
    "a listener": ({"listening": False}, "served:         nothing listens"),
    "a live root": ({"listening": False, "live": False}, "served:         not probed: this root's agent does not run here"),
    "an end of the hold": ({"hold_until": None}, "hold:           freeze, until scx-enroll release"),
}


def timed(text):
    """With times as an operator reads them."""
    return re.sub(r"AT:(\d\d)", r"1970-01-01 00:\1:00 UTC", text)


def test_what_status_tells_is_lost():
    """Every fact of the document that a person needs has its line; of changes the newest five."""
    assert report.as_status(FACTS) == timed(SHOWN.replace("CHANGES", "\n".join(TOLD)))
    nothing = dict.fromkeys(("renewal_due", "request", "new_key", "hold", "sealed", "foreign_key", "agent", "installed", "until", "hint"))
    shown = report.as_status({**FACTS, **nothing, **{key: [] for key in ("errands", "cas", "waiting_for", "changed", "changes", "notes")}})
    assert [line.partition(":")[0] for line in shown.splitlines()[:-1]] == ["host name", "served", "last 24 hours", "next"]


@pytest.mark.parametrize(("facts", "line"), LESS.values(), ids=LESS)
def test_what_is_not_there_is_not_said_to_be_missing(facts, line):
    """A line that is left out reads as if all were well."""
    assert line in report.as_status({**FACTS, **facts}).splitlines()


@pytest.mark.parametrize(
    ("facts", "lines"),
    [
        ({"hold": None}, ["note: a note", "nothing to do: all is well", "renewal is due at AT:03"]),
        ({"hold": None, "renewal_due": None}, ["note: a note", "nothing to do: all is well"]),
        ({"action": "hold"}, ["note: a note", "all is well", "hint: scx-enroll release ends the hold"]),
        ({"hold": None, "renewal_due": None, "acts": [{"action": "install"}]},
         ["note: a note", "all is well", "CN=a.b, issued by CN=CA, until AT:01, SHA-256 5a"]),
        ({"hold": None, "renewal_due": None, "installed": None, "acts": [{"action": "submit"}, {"action": "relink"}], "proven": False},
         ["note: a note", "note: not proven: the agent was stopped, or does not run here; a later run looks again", "all is well"]),
        ({"hold": None, "renewal_due": None, "installed": None, "acts": [{"action": "submit"}], "proven": False}, ["note: a note", "all is well"]),
        ({"exit_status": 5, "acts": [{"action": "install"}], "proven": False, "row": "C4", "request": None},
         ["note: a note", "waiting: all is well", "next attempt not before AT:02", "hint: an act"]),
        ({"exit_status": 5, "until": None, "hint": ""}, ["note: a note", "error: all is well"]),
    ],
)  # fmt: skip
def test_how_a_run_ends_is_not_told(facts, lines):
    """What is in service and until when, or what it waits for and the next act; "not proven" only where something was changed."""
    assert report.as_end({**FACTS, **facts}, failed=False) == "".join(f"scx-enroll: {timed(line)}\n" for line in lines)
    if "waiting: all is well" in lines:
        assert "scx-enroll: error: all is well\n" in report.as_end({**FACTS, **facts}, failed=True)


@pytest.mark.parametrize(("status", "until"), [(0, None), (7, 60), (6, None)])
def test_how_a_request_for_another_host_ends_is_not_told(status, until):
    """The certificate that is held, and beside it what is waited for, with the next act."""
    said = report.as_errand({"facts": FACTS["installed"], "exit_status": status, "reason": "why", "until": until, "hint": "an act"})
    held, *more = said.splitlines()
    assert held == timed("scx-enroll: CN=a.b, issued by CN=CA, until AT:01, SHA-256 5a")
    waits = ["scx-enroll: waiting: why", timed("scx-enroll: next attempt not before AT:01: call it again then"), "scx-enroll: hint: an act"]
    assert more == ([] if not status else waits if until else ["scx-enroll: error: why", waits[-1]])


def test_a_document_tells_of_an_older_certificate_or_of_no_request():
    """Renewal is that of the newest valid one; a request that there is not is none, and one that there is is told with its ID."""
    older, broken = replace(HELD, not_before=NOW - 150 * 86400), replace(HELD, not_before=NOW, mismatches=("cn: x",))
    seen = result(WAIT, older, HELD, broken)
    facts = report.document(seen, NOW)
    assert (facts["renewal_due"], facts["request"]) == (pace.due(HELD, Policy(("ca01",)), 0), None)
    asked = report.document(replace(seen, journal=j.Journal(request=j.Request("submitted", "ca01", id=7))), NOW)["request"]
    assert (asked["state"], asked["ca"], asked["id"]) == ("submitted", "ca01", 7)


def test_a_document_says_other_than_what_was_seen():
    """What monitoring reads: proven is served and installed, a hold that is over is none, and a failure that was made good is not told."""
    refused = j.Backoff("ca01", "", NOW, 1, "soon", 5, "it is down", "")
    state = j.Journal(question=7, hold="freeze", hold_until=NOW + 60, backoffs=(refused, replace(refused, ca=j.NOWHERE)))
    seen = {"certificate": "leaf", "served": "leaf", "staged": "9c", "foreign_key": "it is shared"}
    keys = ("reason", "hint", "generation", "proven", "served", "question", "new_key", "foreign_key", "hold", "hold_until")

    def told(step, state, failure=None, **seen):
        facts = report.document(replace(result(step, HELD, **seen), journal=state, failure=failure), NOW)
        return [facts[key] for key in keys]

    ended, failed = Step("C6", "nothing", "well", hint="rest"), errors.HostError("it failed", "mend it")
    assert told(WAIT, state, failed, **seen) == [WAIT.reason, WAIT.hint, "g", True, "leaf", 7, "9c", "it is shared", "freeze", NOW + 60]
    assert told(ended, replace(state, hold_until=0), failed)[:4] == ["it failed", "mend it", None, False], "nothing is served, nothing installed"
    assert told(ended, replace(state, hold_until=0))[-2:] == ["freeze", None]
    assert told(ended, replace(state, hold_until=NOW), **{**seen, "served": "x"})[3:5] == [False, "x"]
    assert told(ended, j.Journal(hold="freeze", hold_until=NOW)) == ["well", "rest", None, False, None, None, None, None, None, None]
    met = (j.Contact("ca01", NOW, 0, "it answered", issuer="1c", ends=NOW + 9), j.Contact("ca02", NOW, 5, "it is down"))
    state = replace(state, contacts=met, backoffs=(*state.backoffs, replace(refused, ca="")))
    facts = report.document(replace(result(ended), journal=state, errands=(j.Request("submitted", "ca01", id=7, names=("e.f",)),)), NOW)
    assert [one["ca"] for one in facts["waiting_for"]] == ["ca01", None]
    assert [(ca["issuer"], ca["issuer_ends"]) for ca in facts["cas"]] == [("1c", NOW + 9), (None, None)]
    assert [(errand["names"], errand["state"], errand["id"]) for errand in facts["errands"]] == [(["e.f"], "submitted", 7)]


def test_a_document_of_a_request_for_another_host():
    """The failure where the step has none of its own; certificate and chain as PEM, where one is held."""
    spec, failed = request.RequestSpec("e.f"), errors.HostError("it failed", "scx-enroll run")
    ended = Ended(Step("C6", "nothing", "well", hint="rest"), spec, j.Journal(), j.Budget(), ())
    asked = Ended(Step("C1", "wait", "pending", status=7, hint="scx-enroll run --now"), spec, j.Journal(), j.Budget(), (), failure=failed)
    keys = ("reason", "hint", "facts", "certificate", "chain", "request")
    facts = [report.errand_document(one, "a b.csr", NOW) for one in (ended, replace(ended, failure=failed), asked)]
    assert [[one[key] for key in keys] for one in facts] == [
        ["a valid certificate for e.f is held", "rest", None, None, "", None],
        ["it failed", "scx-enroll submit 'a b.csr'", None, None, "", None],
        ["pending", "scx-enroll submit 'a b.csr' --now", None, None, "", None],
    ]
    pem = selfsigned.make_certificate(selfsigned.make_key("ec:secp256r1"), "e", "f")
    held = report.errand_document(replace(ended, generation=Generation("g", pem, b"chain", j.Origin())), "a.csr", NOW)
    assert (held["certificate"], held["chain"], held["facts"]["key"]) == (pem.decode(), "chain", "ec:secp256r1")


@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("trusted", [True, False])
def test_what_comes_from_a_web_server_is_taken_for_trusted(fetched, trusted):
    """Each block says whether it is trusted here; the warning comes where not all are, and the commands for both stores always."""
    facts = types.SimpleNamespace(subject="CN=CA", issuer="CN=Root", not_before=0, not_after=60, leaf="5a")
    found = [
        types.SimpleNamespace(store=store, file=f"{store}.cer", facts=facts, sha1="1a", trusted=trusted or store == "CA", der=b"x") for store in ("Root", "CA")
    ]
    said = report.as_trust(found, fetched=fetched)
    assert ("root, for the store Root: Root.cer" in said, "intermediate, for the store CA: CA.cer" in said) == (True, True)
    assert said.count("trusted here yes") == 1 + trusted
    assert said.count("trusted here NO, not by issuer-trust") == 1 - trusted
    assert ("This came from the CA's web server and proves nothing." in said) == (fetched and not trusted)
    assert ("scx-enroll ca-cert --fetch" in said) != fetched
    assert said.endswith("certutil -addstore -f Root Root.cer\ncertutil -addstore -f CA CA.cer\n")
    assert "Save each block under its name on every Management Server" in said


def test_a_failure_without_hint_is_one_line():
    """The last lines of a failure: the fact, then the next act."""
    assert report.failure(errors.HostError("fact", "act")) == "scx-enroll: error: fact\nscx-enroll: hint: act\n"
    assert report.failure(errors.HostError("fact")) == "scx-enroll: error: fact\n"


def test_a_hold_is_no_back_off():
    """C5, L4: a time that will never come is told as never."""
    assert report.when(None) == "never"
    assert report.when(0) == "1970-01-01 00:00:00 UTC"
    assert pace.until_of(j.Backoff("", "", NOW, 1, "changed", 8, "", "")) is None


@pytest.mark.parametrize(
    ("row", "request_known", "again"),
    [("C4", None, "scx-enroll run --rekey"), ("C1", {"id": 7}, "scx-enroll run --now"), ("L7", None, "scx-enroll run --now")],
    ids=["the CA does not answer", "a request is pending", "the restart window is closed"],
)
def test_a_wish_that_is_forgotten_is_said_to_be_tried_again(row, request_known, again):
    """--renew and --rekey count once; what a CA has, and what waits for the agent, comes by itself."""
    facts = {"notes": (), "acts": [], "exit_status": 5, "reason": "no", "until": NOW, "hint": "mend it; then: scx-enroll run --now", "proven": False}
    said = report.as_end({**facts, "row": row, "request": request_known}, failed=False, wished="--rekey")
    assert said.endswith(f"mend it; then: {again}\n")
    assert ("next attempt not before" in said) == (again == "scx-enroll run --now")


def test_a_wish_that_waits_for_the_restart_budget_is_told_until_when():
    """It is to be repeated then, by a person, who has to know the time."""
    facts = {"notes": (), "acts": [], "exit_status": 4, "reason": "no", "until": NOW, "hint": case.RESTARTS_AGAIN, "proven": False}
    said = report.as_end({**facts, "row": "C2", "request": None}, failed=False, wished="--renew")
    assert f"next attempt not before {report.when(NOW)}\nscx-enroll: hint: run it again then; " in said


# -- until ----------------------------------------------------------------------------------------------------------

NOON = int(time.mktime((2026, 6, 1, 12, 0, 0, 0, 0, -1)))  # local, as an operator means it


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("30m", NOON + 1800), ("2h", NOON + 7200), ("3d", NOON + 3 * 86400), ("2026-06-02", NOON + 12 * 3600), ("2026-06-01T18:30", NOON + 23400),
        ("2026-06-01T12:00:01", NOON + 1), ("366d", NOON + 366 * 86400),
    ],
)  # fmt: skip
def test_a_time_that_an_operator_names(text, at):
    """So long from now, a local time, or the first second of a day."""
    assert arguments.moment(text, NOON) == at


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2026-05-31", "is past"), ("2026-06-01T12:00", "is past"), ("0h", "is past"), ("367d", "more than a year"), ("2028-01-01", "more than a year"),
        ("9999d", "more than a year"), ("", "is no time"), ("2", "is no time"), ("2w", "is no time"), ("-2h", "is no time"), ("tomorrow", "is no time"),
        ("2026-13-01", "is no time"), ("2026-06-01 12:00", "is no time"), ("2026-06-31", "is no time"), ("2h2h", "is no time"), ("²h", "is no time"),
    ],
)  # fmt: skip
def test_a_time_that_is_none_or_past(text, why):
    """A hold that would end at once, or never, or whenever the parser thinks: refused, with the forms that are read."""
    with pytest.raises(errors.UsageError, match=why) as caught:
        arguments.moment(text, NOON)
    assert caught.value.hint


def test_a_hold_of_a_host_that_is_not_configured_yet_is_shown(tmp_path):
    """README holds a host before its first run: `status` tells, beside what is missing; the JSON stays one document."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "var/lib").mkdir(parents=True)
    root = str(tmp_path)
    assert in_process(["--root", root, "status"])[:2] == (3, "")
    assert in_process(["--root", root, "hold", "not yet"])[0] == 0
    status, said, errors_said = in_process(["--root", root, "status"])
    assert (status, said) == (3, "held: not yet\n")
    assert "there is no /etc/scx-enroll/scx-enroll.conf" in errors_said
    assert set(json.loads(in_process(["--root", root, "status", "--json"])[1])) == {"error", "exit_status", "hint", "version"}


def test_a_hold_says_until_when_and_a_release_whether_it_held(host):
    """Both end with 0; a hold refused leaves the one before."""
    assert in_process(["--root", host, "release"])[:2] == (0, "scx-enroll: not held; nothing was changed\n")
    assert in_process(["--root", host, "hold", "freeze", "--until", "yesterday"])[0] == 2
    assert not os.path.exists(f"{host}/var/lib/scx-enroll/journal.json") or hold_of(host) == ""
    status, said, _ = in_process(["--root", host, "hold", "freeze", "--until", "2h"])
    assert status == 0
    assert re.fullmatch("scx-enroll: held: freeze; nothing is changed until [0-9-]+ [0-9:]+ UTC, or until: scx-enroll release\n", said)
    facts = json.loads(in_process(["--root", host, "status", "--json"])[1])
    assert facts["hold"] == "freeze"
    assert facts["until"] == facts["hold_until"] == pytest.approx(time.time() + 7200, abs=60)
    assert in_process(["--root", host, "release"])[:2] == (0, "scx-enroll: released; the next run goes on\n")
