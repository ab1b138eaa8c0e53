"""What scx-enroll is for, in half a minute: `make demo`, or `python -m tests.demo` where it is installed.

A certification authority with AD CS's pages and two hosts with a stand-in for the SCOM agent run on loopback, beneath a
temporary folder, as whoever calls it. What is shown is real: the commands, their output, the TLS handshakes. Each step is
checked; the exit status is 1 where something is not as it should be.

Two processes: the one that plays, in a session of its own so that Ctrl-C does not reach its children half-way; and its
parent, to whom every orphan falls, which ends whatever is left and removes the folder, whichever way the play ended.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

LIMIT_S = 120  # for a machine under load; 20 s are usual
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
PYTHON = (sys.executable, "-I")
PROGRAM = os.path.join(os.path.dirname(sys.executable), "scx-enroll")


class Unexpected(Exception):
    """A step did not do what it shows."""


# -- the parent: nothing outlives it --------------------------------------------------------------------------------


class Ended(BaseException):
    """A signal asks for the end."""


def _end(number, _frame):
    raise Ended(number)


def descendants():
    """Return the pids of every process that descends from this one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended meanwhile
    found = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} | found
        if more == found:
            return found - {os.getpid()}
        found = more


def sweep(folder):
    """End every descendant, then remove the folder."""
    while True:
        for pid in descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.01)
    shutil.rmtree(folder)


def main():
    """Play, and clean up; returns the exit status."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ended = 0
    folder = ""
    status = 1
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    signal.pthread_sigmask(signal.SIG_BLOCK, caught)  # nothing is made that sweep would not know of
    for number in caught:
        signal.signal(number, _end)
    try:
        folder = tempfile.mkdtemp(prefix="scx-demo-")
        player = os.fork()
        if not player:
            _player(folder, caught)
        signal.alarm(LIMIT_S)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
        while True:
            pid, how = os.wait()  # orphans, too
            if pid == player:
                status = os.WEXITSTATUS(how) if os.WIFEXITED(how) else 1
                break
    except Ended as end:
        ended = end.args[0]
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, caught)
        if folder:
            sweep(folder)
    if ended == signal.SIGALRM:
        print(f"\ndemo: not over after {LIMIT_S} s; everything was ended and removed", file=sys.stderr)
    elif ended:
        print("\ndemo: interrupted; everything was ended and removed", file=sys.stderr)
        signal.signal(ended, signal.SIG_DFL)
        os.kill(os.getpid(), ended)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
    return status


def _player(folder, caught):
    """The other process, from here on; does not return."""
    status = 1
    try:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
        os.setsid()
        play(folder)
        status = 0
    except Unexpected as problem:
        print(f"\ndemo: not as expected: {problem}", file=sys.stderr)
    except BrokenPipeError:
        pass  # nobody reads on
    except BaseException:  # noqa: BLE001 -- this process ends here, whatever it is
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            pass
        os._exit(status)


# -- what is shown --------------------------------------------------------------------------------------------------


def say(*lines):
    print(*lines, sep="\n", flush=True)


def step(title, why):
    say("", title, "-" * len(title), textwrap.fill(why, 100))


def show(words, command, *, status=0):
    """Run `command`, shown as `words`; returns its output and how long it took."""
    say("", f"$ {words}")
    began = time.monotonic()
    lines = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ran:
        for line in ran.stdout:
            lines.append(line)
            say("  " + line.rstrip("\n"))
    took = time.monotonic() - began
    if words.startswith("scx-enroll"):
        say(f"  [exit status {ran.returncode}, {took:.1f} s]")
    if ran.returncode != status:
        raise Unexpected(f"`{words}` ended with {ran.returncode}, not {status}")
    return "".join(lines), took


def enroll(host, *arguments, status=0):
    words = f"scx-enroll {' '.join(arguments)} --root {host.root} --live"
    return show(words, (PROGRAM, *arguments, "--root", host.root, "--live"), status=status)


def look(host):
    """Show what the host's port serves; returns the bytes."""
    from tests.look import served

    output, _ = show(f"python -m tests.look 127.0.0.1:{host.port}", (*PYTHON, "-m", "tests.look", f"127.0.0.1:{host.port}"))
    der = served(host.port)
    expect(der, f"{host.fqdn} serves nothing")
    return der, output


def expect(fact, otherwise):
    if not fact:
        raise Unexpected(otherwise)


# -- what is set up -------------------------------------------------------------------------------------------------


def authority(folder):
    """Start the certification authority, a process of its own; returns what it says once it listens."""
    process = subprocess.Popen(
        (*PYTHON, "-m", "tests.lab.ca", "--directory", folder, "--template", "SCXAgent"), stdout=subprocess.DEVNULL
    )
    ready = os.path.join(folder, "ready.json")
    while not os.path.exists(ready):
        expect(process.poll() is None, "the lab's certification authority did not start")
        time.sleep(0.02)
    with open(ready, encoding="utf-8") as file:
        return json.load(file)


def configure(host, ca):
    """Do what the operator does once on each host: the configuration, the roots, the password."""
    etc = os.path.join(host.root, "etc", "scx-enroll")
    os.makedirs(etc, mode=0o755)
    shutil.copy(ca["issuer_trust"], os.path.join(etc, "ca.pem"))
    shutil.copy(ca["server_trust"], os.path.join(etc, "web-server-ca.pem"))
    shutil.copy(ca["password_file"], os.path.join(etc, "password"))  # and its mode, 0600
    with open(os.open(os.path.join(etc, "scx-enroll.conf"), os.O_WRONLY | os.O_CREAT, 0o644), "w", encoding="utf-8") as file:
        file.write(
            textwrap.dedent(f"""\
                [host]
                name = {host.fqdn}
                [ca]
                server = {ca['server']}
                template = SCXAgent
                auth = basic
                user = {ca['user']}
                server-trust = /etc/scx-enroll/web-server-ca.pem
                issuer-trust = /etc/scx-enroll/ca.pem
                [agent]
                port = {host.port}    # 1270 on a real host
                settle = 0s     # the stand-in was installed a second ago
                """)
        )


# -- the play -------------------------------------------------------------------------------------------------------


def play(folder):
    from tests.lab.agent import LabHost

    expect(os.access(PROGRAM, os.X_OK), f"there is no {PROGRAM}: install the package into this environment, or run `make demo`")
    say(
        "scx-enroll gets the SCOM agent's TLS certificate signed by AD CS and proves that the agent serves it.",
        f"A certification authority and two hosts with a stand-in agent are now made beneath {folder},",
        "on loopback. Everything below is real output.",
    )
    ca = authority(os.path.join(folder, "ca"))
    with LabHost(os.path.join(folder, "host1"), host="host1", key="rsa:3072") as host:
        configure(host, ca)
        expect(host.start(), "the stand-in agent did not start")
        took, idle = _enrolment(host), _nothing_to_do(host)
        _renewal(host)
    with LabHost(os.path.join(folder, "host2"), host="host2", key="rsa:3072") as host:
        configure(host, ca)
        expect(host.start(), "the stand-in agent did not start")
        rolled_back = _refusal(host)
    say(
        "",
        f"host1: its self-signed certificate was replaced by one of the CA in {took:.1f} s; with nothing to do, a run took {idle:.1f} s.",
        f"host2: its agent refused a new certificate, and after {rolled_back:.1f} s it served what it had served before.",
        "Everything is ended and removed now. To do this on a host of yours: README.md.",
    )


def _enrolment(host):
    step(
        "1. Before",
        "A fresh agent serves a certificate that it signed itself. A Management Server does not trust it, and would have to "
        "sign it over ssh.",
    )
    before, text = look(host)
    key = host.read(host.key)
    expect("self-signed" in text, "the fresh agent's certificate is not self-signed")
    step("2. Enrolment", "The configuration names the CA, the template and the account. One command does the rest.")
    conf = f"{host.root}/etc/scx-enroll/scx-enroll.conf"
    show(f"cat {conf}", ("cat", conf))
    _, took = enroll(host, "run")
    step("3. After", "The same key, and a certificate of the organisation's CA: seen from outside, on the agent's port.")
    after, text = look(host)
    expect(after != before, "the agent serves what it served before")
    expect(host.read(host.key) == key, "the agent's key is not the one it had")
    expect("Lab Issuing CA" in text and host.fqdn in text, "the certificate served is not the CA's, or not for this host")
    return took


def _nothing_to_do(host):
    step("4. Again", "The timer calls it every hour. With nothing to do it asks no CA and restarts nothing: it looks and ends.")
    restarts = host.restarts
    output, took = enroll(host, "run")
    expect("nothing to do" in output, "the second run found something to do")
    expect(host.restarts == restarts, "the second run restarted the agent")
    return took


def _renewal(host):
    step("5. Renewal", "It comes by itself before two thirds of the lifetime are over, at the host's own time. Here the operator asks for it now.")
    before = host.served()
    enroll(host, "run", "--renew")
    after, _ = look(host)
    expect(after != before, "the agent serves what it served before")


def _refusal(host):
    step("6. An agent that refuses the new certificate", "Another host is enrolled, all is well.")
    enroll(host, "run")
    before, _ = look(host)
    host.refuse_new()
    say(
        "",
        "Now this agent dies of every new certificate, while its own tools go on saying that it was started and exit with 0.",
        "The program does not believe them: it looks at the port, and puts back what was there.",
    )
    _, took = enroll(host, "run", "--renew", status=9)
    after, _ = look(host)
    expect(after == before, "after the rollback the agent does not serve what it served before")
    say("  [the same certificate as before, byte for byte]")
    return took


if __name__ == "__main__":
    sys.exit(main())
