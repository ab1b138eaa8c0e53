"""What the command line may say: its one page of help, and its parser."""

import argparse
import re
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from scx_enroll import __version__
from scx_enroll.errors import UsageError
from scx_enroll.idle import say

MAX_WAIT_S = 24 * 3600  # for the lock; a run takes minutes
MAX_HOLD_S = 366 * 24 * 3600  # certificates run out meanwhile
VERBS = ("run", "idle", "status", "csr", "install", "submit", "ca-cert", "check", "rollback", "hold", "release", "seal")

HELP = """usage: scx-enroll [options] VERB [options]

Gets the SCOM agent's certificate signed by AD CS, installs it, and proves that it is served.

  run              make this host match its configuration; with nothing to do, do nothing
    --dry-run      say what would be done, and why
    --now          wait for no poll interval, back-off or quiet files
    --renew        ask for a new certificate at once; --rekey: with a new key
    --adopt ID     take over the request with this ID, where its fate is doubtful
    --accept-name  this host was renamed: ask for a certificate for its new name
    --wait SECONDS wait for another run to end
    --unattended   for the timer: quiet, and status 0 while nothing needs a person
  idle             for the timer: 0 where the last answer of run stands, else 75
    --else-start   start scx-enroll.service instead, and end with 0
  status           what is installed, served, pending and due
    --json         print facts as JSON; also with run, check, install, rollback, submit, ca-cert
  check            try to sign in at each CA, without asking for anything; --retry: also where refused
  csr              print a certificate request for the agent's key
  install FILE     verify a certificate brought by hand, and put it in service
  submit FILE      get a certificate for another host's request; call it again while it waits
    --output FILE  write certificate and chain there; also --now, --renew, --adopt ID
  ca-cert          print the trust that the Management Servers need; --fetch asks the CA for it
    --ca NAME      one CA alone; also with check, submit and --adopt
  rollback         go back to what was installed before, prove it, and hold; --original: before all
  hold [REASON]    change nothing until release; --until TIME: 2h, 3d, 2026-12-24, 2026-12-24T06:00
  release          end a hold, or a truce
  seal             prepare an image: runs do nothing until a clone has it; --delete-key, --undo

options:
  --config FILE    instead of /etc/scx-enroll/scx-enroll.conf; conf.d is looked for beside it
  --root DIR       take the host's paths beneath DIR, FILE as given; nothing there is started or probed
  --live           the agent beneath --root runs here: restart and probe it
  --verbose        say why each step was taken, and what it waits for
  --version, --help

exit status: 0 done, 1 bug, 2 usage, 3 configuration, 4 agent, 5 CA unreachable, 6 CA refused, 7 pending,
8 certificate refused, 9 rolled back, 10 rollback failed, 11 busy, 12 this host, 13 sign-in refused
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "see: scx-enroll --help")

    def format_help(self) -> str:
        return HELP

    def _print_message(self, message: str, file: Any = None) -> None:
        say(file or sys.stdout, message)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong there is a UsageError."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    common.add_argument("--config")
    common.add_argument("--root")
    common.add_argument("--live", action="store_true")
    common.add_argument("--verbose", action="store_true")
    top = _Parser(prog="scx-enroll", parents=[common], allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"scx-enroll {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    made = {}
    for verb in VERBS:
        made[verb] = verbs.add_parser(verb, parents=[common], allow_abbrev=False)
    for option in ("--dry-run", "--unattended", "--accept-name", "--rekey"):
        made["run"].add_argument(option, action="store_true")
    for verb in ("run", "submit"):
        made[verb].add_argument("--now", action="store_true")
        made[verb].add_argument("--renew", action="store_true")
        made[verb].add_argument("--adopt", type=_request_id, metavar="ID")
    for verb in ("run", "submit", "ca-cert", "check"):
        made[verb].add_argument("--ca", metavar="NAME")
    for verb in ("run", "install", "submit", "ca-cert", "check", "rollback", "hold", "release", "seal"):
        made[verb].add_argument("--wait", type=_seconds, default=0.0, metavar="SECONDS")
    for verb in ("run", "status", "install", "submit", "ca-cert", "check", "rollback"):
        made[verb].add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    for verb in ("install", "submit"):
        made[verb].add_argument("file", metavar="FILE")
    made["submit"].add_argument("--output", metavar="FILE")
    made["ca-cert"].add_argument("--fetch", action="store_true")
    made["check"].add_argument("--retry", action="store_true")
    made["idle"].add_argument("--else-start", action="store_true")
    for option in ("--delete-key", "--undo"):
        made["seal"].add_argument(option, action="store_true")
    made["rollback"].add_argument("--original", action="store_true")
    made["hold"].add_argument("--until", metavar="TIME")
    made["hold"].add_argument("reason", nargs="?", default="", metavar="REASON")
    return top


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_WAIT_S}")
    return value


def moment(text: str, now: int) -> int:
    """Return the time that an operator named: so long from now, or local time; a date is its first second.

    Raises UsageError for what is no time, is past, or is so far away that it was hardly meant.
    """
    span = re.fullmatch("([0-9]{1,4})([mhd])", text, re.ASCII)
    at = now + int(span[1]) * {"m": 60, "h": 3600, "d": 24 * 3600}[span[2]] if span else 0
    for shape in () if span else ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        with suppress(ValueError, OverflowError):
            at = int(time.mktime(time.strptime(text, shape)))
    if not at:
        raise UsageError(f"--until: {text!r} is no time", "give one such as 2h, 3d, 2026-12-24 or 2026-12-24T06:00, in local time")
    if not now < at <= now + MAX_HOLD_S:
        what = "is past" if at <= now else "is more than a year away"
        raise UsageError(f"--until: {text} {what}", "without --until a hold lasts until release")
    return at


def _request_id(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a request ID, a number as the CA's operator sees it")
    return int(text)
