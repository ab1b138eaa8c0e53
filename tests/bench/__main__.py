"""`make bench`, or python -m tests.bench: measures, and writes docs/bench.md. The exit status is 1 where an aim is missed."""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

from . import handshakes, places, scenes
from .measure import Contender, Series, cpu_ratio, interleave

ROUNDS = 15
DEFAULT = os.path.join(places.CHECKOUT, "docs", "bench.md")
CERTBOTS = ("debian12", "new")
MADE = ", as the agent's own tool makes them"
FIGURES = ("CPU ms", "ratio", "peak MiB", "wall ms", "share", "found")  # columns
TICKS, HANDSHAKES, LOOKS = 24, 2, 1 / 7  # a day: scx-enroll.timer, idle.PROBED_S, plan.REST_S
CERTBOT_TICKS = 2  # certbot's own timer
IDLE_BARE, IDLE_CERTBOT, IDLE_MIB, ENROL_SCRIPT, FLAT = 4.0, 10.0, 18.0, 1.2, 1.1


@dataclass(frozen=True)
class Aim:
    """What is to be reached, what was measured, and whether that is it."""

    text: str
    found: str
    met: bool


@dataclass
class Results:
    """All that was measured."""

    machine: str
    versions: Dict[str, str]
    rounds: int
    key: str
    idle: Dict[str, Series]
    certbots: Sequence[str]  # their rows
    enrol: Dict[str, Series]
    renewal: Series
    parts: Dict[str, float]
    journal_bytes: Tuple[int, int]  # short, long
    shaken: Dict[str, handshakes.Tally]

    @property
    def day_ms(self) -> float:
        """CPU of a day's ticks: two of them do a handshake, one in a week looks at everything."""
        rest = TICKS - HANDSHAKES - LOOKS
        return rest * self.idle[scenes.IDLE].cpu_ms + HANDSHAKES * self.idle[scenes.HANDSHAKE].cpu_ms + LOOKS * self.idle[scenes.LOOK].cpu_ms

    @property
    def days(self) -> List[Tuple[str, float]]:
        """What part of a day of each certbot that is; the distribution's comes first."""
        return [(name.partition(" renew")[0], self.day_ms / (CERTBOT_TICKS * self.idle[name].cpu_ms)) for name in self.certbots]

    @property
    def aims(self) -> List[Aim]:
        idle, enrol = self.idle, self.enrol
        bare = cpu_ratio(idle[scenes.IDLE], idle[scenes.BARE])
        peak = idle[scenes.IDLE].peak_mib
        found = [Aim(f"idle: at most {IDLE_BARE:g} times a bare interpreter", f"{bare:.1f}", bare <= IDLE_BARE)]
        for name in self.certbots:
            times = cpu_ratio(idle[name], idle[scenes.IDLE])
            found.append(Aim(f"idle: at least {IDLE_CERTBOT:g} times below {name.partition(' renew')[0]}", f"{times:.1f}", times >= IDLE_CERTBOT))
        name, part = self.days[0]
        found.append(Aim(f"a day of idle ticks: less than {name}'s two", f"{part:.2f} of them", part < 1))
        found.append(Aim(f"idle: at most {IDLE_MIB:g} MiB", f"{peak:.1f} MiB", peak <= IDLE_MIB))
        for name in (scenes.MANY_GENERATIONS, scenes.LONG_JOURNAL, scenes.MANY_ERRANDS):
            times = cpu_ratio(idle[name], idle[scenes.IDLE])
            found.append(Aim(f"idle, flat: {name}, at most {FLAT:g} times the plain one", f"{times:.2f}", times <= FLAT))
        times = cpu_ratio(enrol[scenes.ENROL], enrol[scenes.SCRIPT])
        found.append(Aim(f"enrolment: at most {ENROL_SCRIPT:g} times the certsrv script", f"{times:.2f}", times <= ENROL_SCRIPT))
        return [*found, *(Aim(*aim) for aim in handshakes.aims(self.shaken))]


def measured(rounds: int, folder: str, certbots: Sequence[str], key: str) -> Results:
    """Measure everything, `rounds` times each."""

    def told(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    place = places.ours()
    rows = []
    versions = {"scx-enroll and the certsrv script": f"{place.libraries}: {place.versions}", "openssl and curl": places.cli_versions()}
    for which in certbots:
        program = places.certbot(which)
        python = os.path.join(os.path.dirname(program), "python")
        name = " ".join(places.run(program, "--version").split()[-2:])
        rows.append((f"{name} renew, nothing due", program))
        versions[name] = f"the same python3, libraries from PyPI: {places.run(python, '-I', '-c', places.VERSIONS).strip()}"
    with scenes.lab(place, folder, key) as made:
        told("making the hosts")
        contenders = scenes.idle_contenders(made, rows)
        short, _, long, _ = (host.journal_bytes() for host in made.hosts[:4])
        told("nothing to do")
        idle = interleave(contenders, rounds, told)
        told("enrolment")
        enrol = interleave(scenes.enrol_contenders(made), rounds, told)
        told("renewal")
        renewal, parts = renewals(made, rounds, told)
        told("handshakes")
        shaken = handshakes.measured(made, rounds, told)
    names = [name for name, _ in rows]
    return Results(places.machine(), versions, rounds, key, idle, names, enrol, renewal, parts, (short, long), shaken)


def renewals(made: scenes.Lab, rounds: int, told) -> Tuple[Series, Dict[str, float]]:
    """A renewal as a whole, and in a process that times its parts."""
    host = made.host("renew")
    output = os.path.join(made.folder, "parts.json")
    spent: List[Dict[str, float]] = []

    def ready() -> None:
        host.enrol()
        host.count()

    def keep(sample) -> None:
        host.enrolled(sample)
        with open(output, encoding="utf-8") as file:
            spent.append(json.load(file))

    command = host.ours("--renew")
    program = command.index("run")
    timed = [made.place.python, "-I", os.path.join(places.HERE, "parts.py"), made.place.folder, output, *command[program:]]
    found = interleave(
        [Contender("renewal", command, ready, host.enrolled), Contender("parts", timed, ready, keep)], rounds, told
    )
    return found["renewal"], {name: statistics.median(one[name] for one in spent) for name in spent[0]}


# -- the page ---------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["-:" if head in FIGURES else "-" for head in heads]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (heads, marks, *rows))


def costs(series: Dict[str, Series], names: Sequence[str], other: str) -> str:
    """One row for each name; the ratio is to the row called `other`."""
    return table(
        ("", "CPU ms", "ratio", "peak MiB", "wall ms"),
        [
            (name, f"{series[name].cpu_ms:.1f}", f"{cpu_ratio(series[name], series[other]):.2f}", f"{series[name].peak_mib:.1f}",
             f"{series[name].wall_ms:.0f}")
            for name in names
        ],
    )  # fmt: skip


def page(found: Results) -> str:
    """Return docs/bench.md."""
    idle, enrol = found.idle, found.enrol
    apart = [
        (name, f"{enrol[name].cpu_ms - enrol[scenes.RESTART].cpu_ms:.1f}",
         f"{cpu_ratio(enrol[name], enrol[scenes.SCRIPT], [enrol[scenes.RESTART]]):.2f}")
        for name in (scenes.ENROL, scenes.SCRIPT, scenes.CURL)
    ]  # fmt: skip
    short, long = found.journal_bytes
    whole = sum(found.parts.values())
    parts = [(name, f"{spent:.1f}", f"{100 * spent / whole:.0f} %") for name, spent in found.parts.items()]
    return f"""\
# What a run costs

`make bench` measures and writes this page anew.

Machine: {found.machine}.

{table(("", "runs on"), [(name, versions) for name, versions in found.versions.items()])}
Every figure is the median of {found.rounds} runs. The runs of one table take turns, each round beginning with another one. CPU is user + system of
the whole process and of the children it waited for; the peak is that of the largest process among them, measured of the child alone. A ratio
is the median over the rounds, CPU to CPU. Wall time is for information: it depends on what else the machine does. The CA is the lab's on the
same machine, its work is not counted; nor is the agent's, which nobody waits for. Keys are {found.key}{MADE if found.key == scenes.KEY else ''}.

## The aims

{table(("aim", "found", "met"), [(aim.text, aim.found, "yes" if aim.met else "**no**") for aim in found.aims])}
## Nothing to do

What a timer calls all day. The agent is up and serves a valid certificate; certbot finds one certificate of 90 days, not due, and
no plug-ins but its own. The ratio is to the bare interpreter.

{costs(idle, [scenes.BARE, scenes.IDLE, scenes.HANDSHAKE, scenes.LOOK, *found.certbots], scenes.BARE)}
A day of {TICKS} ticks, two of which do a handshake and a seventh of one looks at everything, takes {found.day_ms:.0f} ms. Certbot's timer has {CERTBOT_TICKS} a day; that is
{" and ".join(f"{part:.2f} of what {name} takes" for name, part in found.days)}.

## Nothing to do, with more to remember

The first row has one generation and a journal of {short:,} bytes; the long journal has {long:,}. The ratio is to the first row.

{costs(idle, [scenes.IDLE, scenes.MANY_GENERATIONS, scenes.LONG_JOURNAL, scenes.MANY_ERRANDS], scenes.IDLE)}
## A whole enrolment

From the agent's self-signed certificate to one of the CA, served. The two scripts make a CSR from the agent's key, POST it, fetch the
certificate, swap the link and restart the agent. They verify nothing, record nothing, prove nothing, and leave a dead agent dead. The ratio is
to the certsrv script.

{costs(enrol, [scenes.ENROL, scenes.SCRIPT, scenes.CURL, scenes.RESTART], scenes.SCRIPT)}
The agent's restart apart, its last row above taken off each:

{table(("", "CPU ms", "ratio"), apart)}
In a tree whose agent does not run, where nothing is restarted and nothing is proven:

{costs(enrol, [scenes.ENROL_DEAD, scenes.SCRIPT_DEAD, scenes.CURL_DEAD], scenes.SCRIPT_DEAD)}
## A renewal, and its parts

`run --renew` as a whole: {found.renewal.cpu_ms:.1f} ms CPU, {found.renewal.peak_mib:.1f} MiB. Its parts were timed in further runs, each without those
inside it; all modules are imported first there, and the clocks cost a little themselves: the sum is not the whole.

{table(("part", "CPU ms", "share"), [*parts, ("all", f"{whole:.1f}", "100 %")])}
{handshakes.section(found.shaken)}"""


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each (default: %(default)s; fewer are no result)")
    parser.add_argument("--output", default=DEFAULT, help="the page (default: docs/bench.md)")
    parser.add_argument("--certbot", action="append", choices=CERTBOTS, help="these only (default: all)")
    parser.add_argument("--key", default=scenes.KEY, help="the agents' (default: %(default)s); what checking it costs depends on its size")
    given = parser.parse_args(arguments or None)
    with tempfile.TemporaryDirectory(prefix="scx-bench-") as folder:
        found = measured(given.rounds, folder, given.certbot or CERTBOTS, given.key)
    with open(given.output, "w", encoding="utf-8") as file:
        file.write(page(found).rstrip("\n") + "\n")
    for aim in found.aims:
        print(f"{'met   ' if aim.met else 'MISSED'}  {aim.text}: {aim.found}")
    return 0 if all(aim.met for aim in found.aims) else 1


if __name__ == "__main__":
    sys.exit(main())
