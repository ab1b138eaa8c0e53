"""AD CS's web enrollment pages over HTTPS, in front of an `Authority`; a class for tests, a program for the demo.

In a test:

    with LabCA(directory=tmp_path) as ca:
        ...  # server = ca.server, server-trust = ca.server_trust, issuer-trust = ca.issuer_trust, ca.user, ca.password
        ca.switches.mode = "pending"
        ca.authority.approve(1)
        assert ca.authority.posts == 1

From a shell: `python -m tests.lab.ca --help` tells everything. `authority` is the CA, `switches` how it misbehaves, `messages` and
`texts` what it and the web server say, `pages` and `foreign` the pages, `wire` their way over the line, `server` all that together.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import signal
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .authority import YEAR, Template
from .server import LabCA
from .steering import CA_VERBS, ID_VERBS, Steering, Unfit, steer, wish, write
from .switches import LANGUAGES, described

__all__ = ["LabCA", "main"]

DESCRIPTION = """\
A stand-in for Active Directory Certificate Services with its web enrollment pages (/certsrv/), over HTTPS. It issues
real certificates from keys that it makes at each start, and misbehaves on demand. Started with --directory alone it serves until
Ctrl-C; with an option of the second group it steers the one that runs in that directory, and returns at once."""

FILES = """\
files in DIR:
  ready.json        address, account and paths, once it listens; gone when it has ended
  password          of the account, for Basic
  server-trust.pem  the root of the HTTPS certificate
  issuer-trust.pem  the CA's roots
  client-ca.pem     the root of client certificates, unless --client-ca names one that can issue some
  rows.json         the request table and the last requests, as --rows prints them

examples:
  python -m tests.lab.ca --directory DIR                              serve
  python -m tests.lab.ca --directory DIR --set mode=pending           requests wait from now on
  python -m tests.lab.ca --directory DIR --approve 1                  issue request 1
  python -m tests.lab.ca --directory DIR --set mode= --set lost=after --set lost_times=1
                                                                      issue, and lose the next reply
  python -m tests.lab.ca --directory DIR --reset                      behave again

switches, for --set NAME=VALUE (NAME= alone is the default again); numbers may be hexadecimal:
"""

# no argument of a template is a template as everybody has it
FLAGS: Dict[str, Dict[str, Any]] = {
    "approval": {"needs_approval": True},
    "directory": {"names": "directory"},
    "unpublished": {"published": False},
    "no-enroll": {"enroll": False},
}


def template(text: str) -> Template:
    """Return the template that NAME[:flag]... describes."""
    name, *flags = text.split(":")
    settings: Dict[str, Any] = {}
    for flag in flags:
        if flag not in FLAGS:
            raise argparse.ArgumentTypeError(f"{flag!r} is none of {', '.join(FLAGS)}")
        settings.update(FLAGS[flag])
    if not name:
        raise argparse.ArgumentTypeError("it needs a name")
    return Template(name, **settings)


def positive(text: str) -> float:
    """Return a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000 * YEAR:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 expected, not {text!r}")
    return value


def request_id(text: str) -> int:
    """Return a request ID."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"a request ID expected, not {text!r}")
    return int(text)


def port(text: str) -> int:
    """Return a TCP port, 0 for any."""
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"a port from 0 to 65535 expected, not {text!r}")
    return int(text)


def address(text: str) -> str:
    """Return an IPv4 address."""
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"an IPv4 address expected, not {text!r}") from None


def epilog() -> str:
    """Return what stands below the options: files, examples, and every switch with its default, choices and meaning."""
    lines: List[str] = []
    for heading, group in described():
        lines.append(f"\n {heading}")
        for switch in group:
            told = "; ".join(filter(None, (switch.choices, switch.meaning)))
            lines.append(f"  {switch.name}={switch.default}")
            lines += [f"      {line}" for line in textwrap.wrap(told, 110, break_on_hyphens=False)]
            lines += [f"        {choice:<18}{meaning}" for choice, meaning in switch.each.items()]
    return FILES + "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(
        prog="python -m tests.lab.ca",
        description=DESCRIPTION,
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--directory", required=True, type=Path, metavar="DIR", help="where its files are; made if it is missing")
    serve = found.add_argument_group("serving")
    serve.add_argument("--port", type=port, default=0, help="where it listens; 0: any free one (default)")
    serve.add_argument(
        "--address", type=address, default="127.0.0.1", help="what it listens on, in the HTTPS certificate too (default: %(default)s)"
    )
    serve.add_argument(
        "--server-name", default="ca.lab.test", metavar="NAME",
        help="its host name in the HTTPS certificate, with localhost (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument("--name", default="Lab Issuing CA", help="the CA's name (default: %(default)s)")
    serve.add_argument("--user", default="LAB\\svc-enroll", help="the account that is let in by Basic and NTLM (default: %(default)s)")
    serve.add_argument("--password", default="", help="its password (default: made up, in DIR/password)")
    serve.add_argument(
        "--kerberos-keytab", default="", metavar="FILE",
        help="the web server's keytab, read anew for each token: with auth=kerberos or negotiate every principal of its realm is let in",
    )  # fmt: skip
    serve.add_argument("--client-ca", default="", metavar="FILE", help="the roots of client certificates, PEM (default: DIR/client-ca.pem)")
    serve.add_argument(
        "--tokens", type=Path, metavar="FILE", help="write each Authorization header that comes to FILE, mode 0600, to look for it elsewhere"
    )
    serve.add_argument(
        "--begin", action="append", default=[], metavar="NAME=VALUE", help="a switch to begin with, as --set later; may be repeated"
    )
    serve.add_argument(
        "--lifetime", type=positive, default=2 * YEAR, metavar="SECONDS", help="how long certificates live (default: two years)"
    )
    serve.add_argument(
        "--ca-lifetime", type=positive, default=5 * YEAR, metavar="SECONDS",
        help="how long the CA's own certificate lives from now on, which ends all others (default: five years)",
    )  # fmt: skip
    serve.add_argument(
        "--tiers", type=int, choices=(1, 2, 3), default=2, help="1: the root issues; 2 (default); 3: root, policy CA, issuing CA"
    )
    serve.add_argument("--no-aki", action="store_true", help="certificates without key identifiers (SKI, AKI)")
    serve.add_argument("--first-id", type=request_id, default=1, metavar="ID", help="of the first request (default: 1)")
    serve.add_argument(
        "--template", action="append", default=[], type=template, metavar="NAME[:FLAG]...",
        help=f"a template, beside or instead of SCXAgent; flags: {', '.join(FLAGS)}; may be repeated",
    )  # fmt: skip
    serve.add_argument("--language", choices=LANGUAGES, default="en", help="of the web server, as the switch (default: en)")
    serve.add_argument(
        "--ca-language", choices=LANGUAGES, default="", help="of the CA, as the switch (default: the web server's)"
    )
    group = found.add_argument_group("steering one that runs")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes", help="set a switch; may be repeated"
    )
    group.add_argument("--reset", action="store_true", help="all switches back to their defaults, before --set")
    for verb, meaning in ID_VERBS.items():
        group.add_argument(f"--{verb}", action="append", type=request_id, default=[], metavar="ID", help=meaning)
    for verb, meaning in CA_VERBS.items():
        group.add_argument(f"--{verb}", action="store_true", help=meaning)
    group.add_argument("--rows", action="store_true", help="print the request table")
    return found


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or steer one that runs; returns the exit status, 2 for what can not be done."""
    command = parser()
    options = command.parse_args(arguments)
    directory: Path = options.directory
    acts: List[Tuple[str, int]] = [(verb, number) for verb in ID_VERBS for number in getattr(options, verb)]
    acts += [(verb, 0) for verb in CA_VERBS if getattr(options, verb.replace("-", "_"))]
    try:
        if options.changes or acts or options.rows or options.reset:
            steer(directory, wish(options.changes), acts, reset=options.reset)
            if options.rows:
                path = directory / "rows.json"
                print(path.read_text(encoding="utf-8") if path.exists() else "no request yet")
            return 0
        return serve(options)
    except Unfit as error:
        command.error(str(error))
    except (OSError, OverflowError) as error:
        command.error(f"{directory}: {error}")


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the directory is gone."""
    directory: Path = options.directory
    switches = wish(options.begin)
    lab = LabCA(
        directory,
        port=options.port,
        address=options.address,
        server_name=options.server_name,
        user=options.user,
        password=options.password,
        keytab=options.kerberos_keytab,
        client_ca=options.client_ca,
        tokens=options.tokens,
        name=options.name,
        lifetime=options.lifetime,
        ca_lifetime=options.ca_lifetime,
        tiers=options.tiers,
        aki=not options.no_aki,
        first_id=options.first_id,
    )
    lab.authority.templates.update({item.name: item for item in options.template})
    lab.switches.update({"language": options.language, "ca_language": options.ca_language, **switches})
    with contextlib.suppress(FileNotFoundError):
        (directory / "acts.jsonl").unlink()
    steering = Steering(lab)
    lab.on_request, lab.on_reply = steering.apply, steering.publish
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    password = directory / "password"
    with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(lab.password + "\n")
    steering.publish()
    with lab:
        ready = {
            "server": lab.server,
            "server_trust": lab.server_trust,
            "issuer_trust": lab.issuer_trust,
            "user": lab.user,
            "password_file": str(password),
            "client_ca": lab.client_ca,
            "pid": os.getpid(),
        }
        write(directory / "ready.json", json.dumps(ready, indent=1) + "\n")
        print(f"listening on {lab.server}", flush=True)
        while not done.wait(1.0):
            if not directory.is_dir():
                break
            steering.apply()
    with contextlib.suppress(FileNotFoundError):
        (directory / "ready.json").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
