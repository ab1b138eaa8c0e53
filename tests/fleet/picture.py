"""Draws requests per hour over time, one small panel for each scenario, as SVG: text, so that it is the same each time."""

from __future__ import annotations

from html import escape
from typing import Iterator, List, Sequence

from scx_enroll.journal import DAY_S, HOUR_S
from tests.fleet.figures import MOST_IN_RECOVERY, contacts, figures, submissions
from tests.fleet.simulation import Record

WIDTH, HEIGHT = 440, 96  # of a panel's field
LEFT, TOP, GAP, COLUMNS = 30, 34, 44, 2
HIGHEST = 6  # means an hour; what is beyond is cut off, and told
STYLE = (
    "text{font:10px sans-serif;fill:#333}.t{font-weight:bold;font-size:12px}.r{text-anchor:end}.o{fill:#eee}.d{fill:#e8604c;fill-opacity:.35}"
    ".c{fill:#c9c9c9}.s{fill:#1f5fa8}.m{stroke:#888;stroke-width:.6;stroke-dasharray:2 3}.f{fill:none;stroke:#999;stroke-width:.6}"
)


def drawn(records: Sequence[Record]) -> str:
    """Return the picture."""
    rows = -(-len(records) // COLUMNS)
    wide, high = COLUMNS * (WIDTH + GAP) + LEFT, rows * (HEIGHT + TOP + GAP // 2) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">',
        f"<style>{STYLE}</style>", f'<rect width="{wide}" height="{high}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16">Requests an hour at the CA, in terms of the mean rate of renewals, over days; the fullest hour of each pixel.</text>',
        f'<text x="{LEFT}" y="30">Blue: submissions. Grey: with polls, questions and what was turned away. Shaded: roll-out, disturbance.</text>',
    ]
    for number, record in enumerate(records):
        x, y = LEFT + number % COLUMNS * (WIDTH + GAP), 46 + number // COLUMNS * (HEIGHT + TOP + GAP // 2) + TOP - 14
        parts += [f'<g transform="translate({x} {y})">', *_panel(record), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(record: Record) -> Iterator[str]:
    scenario, mean = record.scenario, figures(record).mean
    hours = scenario.ends // HOUR_S

    def across(at_s: float) -> str:
        return f"{at_s / HOUR_S / hours * WIDTH:.1f}"

    yield f'<text class="t" y="-5">{escape(scenario.name)}</text>'
    highest = max(contacts(record)) / mean
    yield f'<text class="r" x="{WIDTH}" y="-5">{mean:.0f} an hour on average' + (f", highest {highest:.0f} times that" if highest > HIGHEST else "") + "</text>"
    yield f'<rect class="o" width="{across(record.rolled_out)}" height="{HEIGHT}"/>'
    yield f'<path class="c" d="{_area(contacts(record)[:hours], mean)}"/>'
    yield f'<path class="s" d="{_area(submissions(record)[:hours], mean)}"/>'
    begins, ends = scenario.disturbed
    if ends:
        yield f'<rect class="d" x="{across(begins)}" width="{max(float(across(ends - begins)), 1)}" height="{HEIGHT}"/>'
    for level in (1, int(MOST_IN_RECOVERY)):
        y = HEIGHT - HEIGHT * level // HIGHEST
        yield f'<line class="m" x2="{WIDTH}" y1="{y}" y2="{y}"/><text class="r" x="-4" y="{y + 3}">{level}</text>'
    days = scenario.ends // DAY_S
    every = 10 if days < 100 else 50
    for day in range(0, days + 1, every):
        yield f'<text x="{across(day * DAY_S)}" y="{HEIGHT + 11}">{day}</text>'
    yield f'<rect class="f" width="{WIDTH}" height="{HEIGHT}"/>'


def _area(counts: List[int], mean: float) -> str:
    path, last = [f"M0 {HEIGHT}"], -1
    for x in range(WIDTH):
        block = counts[x * len(counts) // WIDTH:max((x + 1) * len(counts) // WIDTH, x * len(counts) // WIDTH + 1)]
        y = HEIGHT - min(round(HEIGHT * max(block) / mean / HIGHEST), HEIGHT)
        if y != last:
            path.append(f"H{x}V{y}")
            last = y
    return "".join([*path, f"H{WIDTH}V{HEIGHT}Z"])
