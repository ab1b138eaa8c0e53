"""What scx-enroll is for, in half a minute: `make demo`, or `python -m tests.demo` where it is installed.

With `make demo AUTH=kerberos`, or `python -m tests.demo kerberos`, in a Kerberos realm of its own: the hosts sign in with the keys of their
computer accounts, and the CA insists on a binding to the TLS channel. That takes Debian's packages for a KDC, and its Python.

A certification authority with AD CS's pages and two hosts with a stand-in for the SCOM agent run on loopback, beneath a
temporary folder, as whoever calls it. What is shown is real: the commands, their output, the TLS handshakes. Each step is
checked; the exit status is 1 where something is not as it should be.

Two processes: the one that plays, in a session of its own so that Ctrl-C does not reach its children half-way; and its
parent, to whom every orphan falls, which ends whatever is left and removes the folder, whichever way the play ended.
"""

import contextlib
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
WAYS = ("basic", "kerberos")
SERVICE, ACCOUNTS = "HTTP/localhost", ("HOST1$", "HOST2$")
# The distribution's Python has gssapi; the program itself and certsrv are those of this environment.
BY_THE_DISTRIBUTION = "import sys; sys.path.insert(0, sys.argv[1]); del sys.argv[1]; from scx_enroll.__main__ import main; sys.exit(main())"


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
    way = (sys.argv[1:] or ["basic"])[0]
    if way not in WAYS:
        print(f"demo: AUTH={way} is not known: {' or '.join(WAYS)}", file=sys.stderr)
        return 2
    lacks = lacking() if way == "kerberos" else ""
    if lacks:
        print(f"demo: AUTH=kerberos can't be shown here, this machine lacks {lacks}", file=sys.stderr)
        return 1
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
            _player(folder, caught, way)
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


def lacking():
    """Return what this machine lacks for Kerberos, with the packages that bring it; "" for nothing."""
    from tests.lab import kdc

    modules = {"cryptography": "python3-cryptography", "requests": "python3-requests"}
    packages = [package for module, package in modules.items() if not kdc.has(module)]
    return kdc.missing() or (f"{' '.join(packages)}: apt-get install {' '.join(packages)}" if packages else "")


def _player(folder, caught, way):
    """The other process, from here on; does not return."""
    status = 1
    try:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
        os.setsid()
        play(folder, way)
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
    return show(words, (*program(), *arguments, "--root", host.root, "--live"), status=status)


def program():
    """Return what starts the program: that of this environment, or with Kerberos its modules under the distribution's Python."""
    modules = os.path.join(os.path.dirname(os.environ.get("KRB5_CONFIG", "")), "modules")
    if not os.path.isdir(modules):
        return (PROGRAM,)
    from tests.lab import kdc

    return (kdc.PYTHON, "-I", "-c", BY_THE_DISTRIBUTION, modules)


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


@contextlib.contextmanager
def realm(folder):
    """Run a Kerberos realm with accounts for the CA's web server and the hosts; for everything that is started meanwhile."""
    import certsrv

    import scx_enroll
    from tests.lab.kdc import Kdc

    with Kdc(folder) as kdc:
        kdc.add(SERVICE, *ACCOUNTS)
        modules = os.path.join(folder, "modules")
        os.mkdir(modules)
        for path in (os.path.dirname(scx_enroll.__file__), certsrv.__file__):
            os.symlink(path, os.path.join(modules, os.path.basename(path)))
        os.environ["KRB5_CONFIG"] = os.fspath(kdc.config)
        yield kdc


def authority(folder, kdc=None):
    """Start the certification authority, a process of its own; returns what it says once it listens."""
    os.mkdir(folder)
    keytab = ("--kerberos-keytab", kdc.keytab(os.path.join(folder, "http.keytab"), SERVICE), "--begin", "auth=kerberos") if kdc else ()
    process = subprocess.Popen(
        (*PYTHON, "-m", "tests.lab.ca", "--directory", folder, "--template", "SCXAgent", *keytab), stdout=subprocess.DEVNULL
    )
    ready = os.path.join(folder, "ready.json")
    while not os.path.exists(ready):
        expect(process.poll() is None, "the lab's certification authority did not start")
        time.sleep(0.02)
    with open(ready, encoding="utf-8") as file:
        return json.load(file)


def account_of(host):
    """Return the name of the host's computer account."""
    return f"{host.fqdn.partition('.')[0].upper()}$"


def configure(host, ca, kdc=None):
    """Do what the operator does once on each host: the configuration, the roots, the password or the join to the domain."""
    etc = os.path.join(host.root, "etc", "scx-enroll")
    os.makedirs(etc, mode=0o755)
    shutil.copy(ca["issuer_trust"], os.path.join(etc, "ca.pem"))
    shutil.copy(ca["server_trust"], os.path.join(etc, "web-server-ca.pem"))
    if kdc:
        kdc.keytab(os.path.join(host.root, "etc", "krb5.keytab"), account_of(host))
    else:
        shutil.copy(ca["password_file"], os.path.join(etc, "password"))  # and its mode, 0600
    account = "# auth = kerberos, the default" if kdc else f"auth = basic\nuser = {ca['user']}"
    with open(os.open(os.path.join(etc, "scx-enroll.conf"), os.O_WRONLY | os.O_CREAT, 0o644), "w", encoding="utf-8") as file:
        file.write(
            textwrap.dedent(f"""\
                [host]
                name = {host.fqdn}
                [ca]
                server = {ca['server']}
                template = SCXAgent
                ACCOUNT
                server-trust = /etc/scx-enroll/web-server-ca.pem
                issuer-trust = /etc/scx-enroll/ca.pem
                [agent]
                port = {host.port}    # 1270 on a real host
                settle = 0s     # the stand-in was installed a second ago
                """).replace("ACCOUNT", account)
        )


# -- the play -------------------------------------------------------------------------------------------------------


def play(folder, way):
    from tests.lab.agent import LabHost

    expect(os.access(PROGRAM, os.X_OK), f"there is no {PROGRAM}: install the package into this environment, or run `make demo`")
    say(
        "scx-enroll gets the SCOM agent's TLS certificate signed by AD CS and proves that the agent serves it.",
        f"A certification authority and two hosts with a stand-in agent are now made beneath {folder},",
        "on loopback. Everything below is real output.",
    )
    with realm(os.path.join(folder, "kerberos")) if way == "kerberos" else contextlib.nullcontext() as kdc:
        ca = authority(os.path.join(folder, "ca"), kdc)
        with LabHost(os.path.join(folder, "host1"), host="host1", key="rsa:3072") as host:
            configure(host, ca, kdc)
            expect(host.start(), "the stand-in agent did not start")
            took, idle = _enrolment(host, kdc), _nothing_to_do(host)
            _renewal(host)
        with LabHost(os.path.join(folder, "host2"), host="host2", key="rsa:3072") as host:
            configure(host, ca, kdc)
            expect(host.start(), "the stand-in agent did not start")
            rolled_back = _refusal(host)
    say(
        "",
        f"host1: its self-signed certificate was replaced by one of the CA in {took:.1f} s; with nothing to do, a run took {idle:.1f} s.",
        f"host2: its agent refused a new certificate, and after {rolled_back:.1f} s it served what it had served before.",
        "Everything is ended and removed now. To do this on a host of yours: README.md.",
    )


def _sign_in(host, kdc):
    say("", "No password is stored. The keytab came with the domain join, and the CA's web server insists on a sign-in that is bound to the TLS channel:")
    output, _ = enroll(host, "check")
    expect("tls-server-end-point" in output, "the sign-in was not bound to the TLS channel")
    expect(f"{account_of(host)}@{kdc.realm}" in output, "it was not the computer account that signed in")


def _enrolment(host, kdc):
    step(
        "1. Before",
        "A fresh agent serves a certificate that it signed itself. A Management Server does not trust it, and would have to "
        "sign it over ssh.",
    )
    before, text = look(host)
    key = host.read(host.key)
    expect("self-signed" in text, "the fresh agent's certificate is not self-signed")
    who = " and the template. The host signs in with the key of its own computer account" if kdc else ", the template and the account"
    step("2. Enrolment", f"The configuration names the CA{who}. One command does the rest.")
    conf = f"{host.root}/etc/scx-enroll/scx-enroll.conf"
    show(f"cat {conf}", ("cat", conf))
    if kdc:
        _sign_in(host, kdc)
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
