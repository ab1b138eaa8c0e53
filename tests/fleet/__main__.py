"""Simulates a fleet, and says whether the load on the CA stays within the aims: prints the figures, and writes them into docs/."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import sys
import time
from functools import partial
from typing import Iterator, Sequence

from scx_enroll.journal import HOUR_S
from tests.fleet.figures import figures
from tests.fleet.picture import drawn
from tests.fleet.scenarios import FLEET, TABLE
from tests.fleet.simulation import Record, Simulation

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "docs")
MARKED = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
HEADINGS = (
    "scenario", "hosts", "mean an hour", "peak an hour", "peak by hour of the day", "fullest hour", "of chance", "recovery", "forced",
    "all contacts", "hours without", "expired", "in vain", "restarts a host", "aims",
)


def simulated(name: str, hosts: int) -> Record:
    """Return what was counted in one scenario."""
    gc.disable()  # there are millions of objects and hardly a cycle
    begun = time.monotonic()
    record = Simulation(TABLE[name], hosts).run()
    sys.stderr.write(f"{name}: {record.runs} runs in {time.monotonic() - begun:.0f} s\n")
    return record


def table(records: Sequence[Record]) -> str:
    """Return the figures as a table in Markdown."""
    return "\n".join(_lines(records)) + "\n"


def _lines(records: Sequence[Record]) -> Iterator[str]:
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"
    for record in records:
        found = figures(record)
        cells = (
            record.scenario.name, f"{record.hosts:,}", f"{found.mean:.0f}", f"{found.peak:,}", f"{found.hour_of_day:.2f}", f"{found.hour:.2f}",
            f"{found.over_chance:.2f}", f"{found.recovery:.1f}" if record.scenario.disturbed[1] else "–", f"{found.forced:.0f}",
            f"{found.contacts:.0f}", f"{record.longest_without_s / HOUR_S:.1f}", f"{record.expired + record.unserved}", f"{record.in_vain:,}", f"{record.restarts / record.hosts:.1f}",
            f"missed: {', '.join(found.missed)}" if found.missed else "met",
        )
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("--hosts", type=int, default=FLEET)
    parser.add_argument("--scenario", nargs="+", choices=sorted(TABLE), metavar="NAME", help=", ".join(TABLE))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="the figures into docs/fleet.md, the picture beside it")
    given = parser.parse_args()
    names = given.scenario or list(TABLE)
    longest_first = sorted(names, key=lambda name: (TABLE[name].approval or TABLE[name].loses, TABLE[name].ends), reverse=True)
    with multiprocessing.Pool(given.jobs, maxtasksperchild=1) as pool:
        done = dict(zip(longest_first, pool.map(partial(simulated, hosts=given.hosts), longest_first, chunksize=1)))
    records = [done[name] for name in names]
    text = table(records)
    sys.stdout.write(text)
    if given.write:
        with open(os.path.join(DOCS, "fleet.md"), encoding="utf-8") as file:
            page = file.read()
        with open(os.path.join(DOCS, "fleet.md"), "w", encoding="utf-8") as file:
            file.write(MARKED.sub(lambda _: text, page))
        with open(os.path.join(DOCS, "fleet.svg"), "w", encoding="utf-8") as file:
            file.write(drawn(records))
    return int(any(figures(record).missed for record in records))


if __name__ == "__main__":
    sys.exit(main())
