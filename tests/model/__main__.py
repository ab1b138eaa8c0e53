"""Plays thousands of random sequences in memory, on every core; with --kind real, some with the lab's processes; with clones, copied machines.

A sequence that fails is shortened and printed as a program. It can be played again in a test (tests/test_model.py has some), and
there with the other kind of machine.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Tuple

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.lab.ca import LabCA
from tests.model.clones import Clones
from tests.model.machine import MemoryMachine, real_machine

KINDS: Dict[str, Any] = {"memory": MemoryMachine, "clones": Clones}


def play(task: Tuple[int, int, int, str]) -> Tuple[int, float, str]:
    """Play so many sequences of so many steps; returns how many, the CPU time, and what failed."""
    number, count, steps, kind = task
    gc.disable()  # processes end soon, and there is hardly a cycle
    begun, problem = time.process_time(), ""
    options = settings(
        max_examples=count, stateful_step_count=steps, deadline=None, database=None, derandomize=False, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )
    with ExitStack() as stack:
        machine = KINDS.get(kind) or _real(stack)
        try:
            run_state_machine_as_test(seed(number)(machine), settings=options)  # type: ignore[no-untyped-call]  # hypothesis
        except Exception as failure:  # noqa: BLE001 - whatever it is, its sequence is what is wanted
            problem = "\n".join([*getattr(failure, "__notes__", ()), f"{type(failure).__name__}: {failure}"])
    return count, time.process_time() - begun, problem


def _real(stack: ExitStack) -> Any:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return real_machine(folder, stack.enter_context(LabCA(folder / "ca")))


def main() -> int:
    """Play; returns 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--sequences", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", choices=("memory", "clones", "real"), default="memory", help="real: with the lab's processes and its CA")
    options = parser.parse_args()
    cores, portion = os.cpu_count() or 1, {"memory": 250, "clones": 50, "real": 10}[options.kind]
    tasks: List[Tuple[int, int, int, str]] = []
    left = options.sequences
    while left > 0:
        tasks.append((options.seed + len(tasks), min(portion, left), options.steps, options.kind))
        left -= portion
    begun, done, spent, failed = time.monotonic(), 0, 0.0, 0
    with multiprocessing.get_context("fork").Pool(cores, maxtasksperchild=4) as pool:
        for count, seconds, problem in pool.imap_unordered(play, tasks):
            done, spent, failed = done + count, spent + seconds, failed + bool(problem)
            if problem:
                print(problem, flush=True)
            sys.stderr.write(f"{done} of {options.sequences} sequences, {done / (time.monotonic() - begun):.1f} a second, {spent / done:.3f} s of CPU each\n")
    print(f"{done} sequences from seed {options.seed}: {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
