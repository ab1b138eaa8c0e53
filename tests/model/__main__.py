"""Plays thousands of random sequences in memory, on every core; or, with --real, some with the lab's processes and its CA.

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
from pathlib import Path
from typing import List, Tuple

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.lab.ca import LabCA
from tests.model.machine import MemoryMachine, real_machine


def play(task: Tuple[int, int, int, bool]) -> Tuple[int, float, str]:
    """Play so many sequences of so many steps; returns how many, the CPU time, and what failed."""
    number, count, steps, real = task
    gc.disable()  # processes end soon, and there is hardly a cycle
    begun, problem = time.process_time(), ""
    options = settings(
        max_examples=count, stateful_step_count=steps, deadline=None, database=None, derandomize=False, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )
    with tempfile.TemporaryDirectory() as folder, LabCA(Path(folder) / "ca") as ca:
        machine = real_machine(Path(folder), ca) if real else MemoryMachine
        try:
            run_state_machine_as_test(seed(number)(machine), settings=options)  # type: ignore[no-untyped-call]  # hypothesis
        except Exception as failure:  # noqa: BLE001 - whatever it is, its sequence is what is wanted
            problem = "\n".join([*getattr(failure, "__notes__", ()), f"{type(failure).__name__}: {failure}"])
    return count, time.process_time() - begun, problem


def main() -> int:
    """Play; returns 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--sequences", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--real", action="store_true", help="with the lab's processes and its CA")
    options = parser.parse_args()
    cores, portion = os.cpu_count() or 1, 10 if options.real else 250
    tasks: List[Tuple[int, int, int, bool]] = []
    left = options.sequences
    while left > 0:
        tasks.append((options.seed + len(tasks), min(portion, left), options.steps, options.real))
        left -= portion
    begun, done, spent, failed = time.monotonic(), 0, 0.0, 0
    with multiprocessing.get_context("spawn").Pool(cores, maxtasksperchild=4) as pool:
        for count, seconds, problem in pool.imap_unordered(play, tasks):
            done, spent, failed = done + count, spent + seconds, failed + bool(problem)
            if problem:
                print(problem, flush=True)
            sys.stderr.write(f"{done} of {options.sequences} sequences, {done / (time.monotonic() - begun):.1f} a second, {spent / done:.3f} s of CPU each\n")
    print(f"{done} sequences from seed {options.seed}: {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
