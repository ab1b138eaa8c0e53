"""Host, operator, packages, SCOM, CA and clock in random order: short sequences of every kind, and those that once went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.lab.ca import LabCA
from tests.model.clones import Clones
from tests.model.machine import MemoryMachine, real_machine
from tests.model.world import NEVER

IN_MEMORY, STEPS = 100, 14  # `make model` plays thousands of longer ones
REAL, REAL_STEPS = 3, 8
COPIED, COPIED_STEPS = 8, 6


def play(machine: Any, sequences: int, steps: int) -> None:
    """Play random sequences; one that fails is shortened and printed as a program."""
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=sequences, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)),
    )


@pytest.fixture
def state() -> Iterator[MemoryMachine]:
    """A host on which an exact sequence is played; what must hold does so in the end, too."""
    machine = MemoryMachine()
    try:
        yield machine
    except BaseException:
        machine.failed = True
        raise
    finally:
        machine.teardown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_whatever_order_everybody_acts_the_agent_ends_well_or_it_is_said_why_not() -> None:
    """After each quiet period a valid certificate is served, or the status names what keeps it; budgets and other people's files are kept."""
    play(MemoryMachine, IN_MEMORY, STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_holds_for_real_processes(tmp_path: Path) -> None:
    """What is a plain object in the other test is a process here: agent, tools, CA."""
    with LabCA(tmp_path / "ca") as ca:
        play(real_machine(tmp_path, ca), REAL, REAL_STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_two_machines_made_of_one_image_end_with_one_key() -> None:
    """Sealed or not, with its key or without, whenever each gets its name, and wherever their first runs are killed."""
    play(Clones, COPIED, COPIED_STEPS)


# -- sequences that once went wrong ---------------------------------------------------------------------------------


def test_an_installation_that_was_killed_leaves_a_restart_for_the_way_back(state: MemoryMachine) -> None:
    """Else the agent is down, with a certificate that it dies of, until the budget has room again."""
    state.operator_runs({})
    state.agent_refuses_what_is_new()
    state.operator_installs_a_file("", "after control")
    assert not state.up, "the run was killed after it had restarted the agent"
    state.operator_installs_a_file("", NEVER)
    assert state.up


def test_a_key_that_changed_under_an_open_installation_does_not_end_the_agent(state: MemoryMachine) -> None:
    """Neither certificate fits that key: a restart would end an agent that still serves what it has read."""
    state.run_is_killed("after control", {})
    state.package_script_runs("scxsslconfig -f", 2, restart=False)
    state.operator_runs({})
    assert state.up
    state.world.passes(600)
    state.operator_runs({})
    assert state.is_valid(state.host.served())


def test_a_clone_of_a_host_that_ran_gets_a_key_of_its_own_though_the_certificate_of_the_image_is_in_no_record() -> None:
    """Its state was set aside, and the copy that the agent reads with it: what cannot be put back was taken for changed by others, for ever."""
    state = Clones()
    try:
        state.image_is_copied((True, ""), late_name=False)
        state.everybody_rests()
        assert all(machine.is_valid(machine.host.served()) for machine in state.machines)
    finally:
        state.failed = True
        state.teardown()
