"""What one child costs: CPU time and peak memory of it alone, and of the children that it waits for.

The kernel's peak of a process is kept over exec, and a child begins with what its parent has: whoever starts a child from a large
process finds the large one's size in the child's ru_maxrss. So a shell of one MiB starts it, in a subshell, which then becomes the
interpreter that tells RUSAGE_CHILDREN: what was waited for is kept over exec as well, and there was only the one child.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Sequence, Tuple

LIMIT_S = 120  # for one child
REPORT = (
    "import resource; u = resource.getrusage(resource.RUSAGE_CHILDREN);"
    " print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
)
# More follows the subshell, or it would not be one. What the child says goes to a file; standard output is the report's.
LAUNCH = (
    'exec 3>&1 >"$1" 2>&1; shift;'
    ' (reporter=$1; report=$2; shift 2; "$@" 3>&-; echo $? >&3; exec "$reporter" -I -S -c "$report" >&3); exit 0'
)
# What a service manager would give: no variable of the caller's session makes one contender faster, or trust another CA.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}


@dataclass(frozen=True)
class Sample:
    """One run: user + system, the largest process of it, and how long it took."""

    status: int
    cpu_ms: float
    peak_mib: float
    wall_ms: float
    output: str


def measure(command: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT) -> Sample:
    """Run a command to its end."""
    with tempfile.NamedTemporaryFile() as output:
        began = time.monotonic()
        with subprocess.Popen(
            ["/bin/sh", "-c", LAUNCH, "sh", output.name, sys.executable, REPORT, *command], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True, cwd="/", env=dict(environment),
        ) as launcher:
            status = int(launcher.stdout.readline())
            wall_s = time.monotonic() - began
            cpu_s, peak_kib = launcher.stdout.readline().split()
            launcher.wait(LIMIT_S)
        said = output.read().decode("utf-8", "replace")
    return Sample(status, float(cpu_s) * 1000, int(peak_kib) / 1024, wall_s * 1000, said)


@dataclass(frozen=True)
class Contender:
    """Something that is run again and again; `before` makes ready for it and is not measured, `check` sees that it did its work."""

    name: str
    command: Sequence[str]
    before: Callable[[], None] = lambda: None
    check: Callable[[Sample], None] = lambda _sample: None


@dataclass
class Series:
    """All runs of one contender."""

    samples: List[Sample] = field(default_factory=list)

    @property
    def cpu_ms(self) -> float:
        return statistics.median(sample.cpu_ms for sample in self.samples)

    @property
    def peak_mib(self) -> float:
        return statistics.median(sample.peak_mib for sample in self.samples)

    @property
    def wall_ms(self) -> float:
        return statistics.median(sample.wall_ms for sample in self.samples)


class Wrong(Exception):
    """A contender did not do what its row says."""


def expect(fact: object, otherwise: str) -> None:
    if not fact:
        raise Wrong(otherwise)


def interleave(contenders: Sequence[Contender], rounds: int, told: Callable[[str], None] = lambda _text: None) -> Dict[str, Series]:
    """Each round runs each once, and begins with another one: what else the machine does hits all alike."""
    found = {contender.name: Series() for contender in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            contender.before()
            sample = measure(contender.command)
            try:
                contender.check(sample)
            except Wrong as wrong:
                raise Wrong(f"{contender.name}: {wrong}\nexit status {sample.status}\n{sample.output}") from None
            found[contender.name].samples.append(sample)
        told(f"round {number + 1} of {rounds}")
    return found


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of how many times the other one: what slowed a whole round down is not in it."""
    return statistics.median(mine / theirs for mine, theirs in zip(one, other))


def cpu_ratio(one: Series, other: Series, less: Sequence[Series] = ()) -> float:
    """As `ratio`, of CPU time; `less` is taken off both, in each round."""
    off = [sum(series.samples[number].cpu_ms for series in less) for number in range(len(one.samples))]
    pairs: List[Tuple[float, float]] = [
        (mine.cpu_ms - share, theirs.cpu_ms - share) for mine, theirs, share in zip(one.samples, other.samples, off)
    ]
    return ratio([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
