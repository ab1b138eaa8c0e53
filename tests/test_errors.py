"""The exit statuses are a promise: code and docs/exit-status.md say the same."""

import os
import re

import pytest

from scx_enroll import errors, pace


def kinds():
    """Every failure that an operator can see."""
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EnrollError)]


@pytest.fixture
def documented(checkout):
    """Status -> the names of the failures that end with it, from the first table."""
    with open(os.path.join(checkout, "docs", "exit-status.md"), encoding="utf-8") as file:
        table = file.read().split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    assert len(rows) == len({status for status, *_ in rows}), "a status stands in two rows"
    return {int(status): set(re.findall(r"`(\w+)`", names)) for status, names, *_ in rows}


@pytest.mark.checkout
def test_a_status_that_operators_rely_on_has_changed(documented):
    """Every failure ends with the status that the page promises, and the page promises no other."""
    coded = {0: set()}
    for kind in kinds():
        coded.setdefault(kind.exit_status, set()).add(kind.__name__)
    assert coded == documented


@pytest.mark.checkout
def test_the_promised_statuses_are_0_to_13(documented):
    """No number is skipped, none lies where the shell or a signal would put it."""
    assert sorted(documented) == list(range(14))


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_a_failure_without_its_hint_or_message(kind):
    """A failure carries the fact, which is also its text, and the next act."""
    failure = kind("the fact", "the next act")
    assert (str(failure), failure.message, failure.hint) == ("the fact", "the fact", "the next act")
    assert kind("the fact").hint == ""


@pytest.mark.checkout
def test_an_unattended_run_fails_where_it_promised_to_wait(checkout):
    """The second table names the statuses that become 0: those of `plan`, two kinds of sign-in, and a host which is not configured."""
    with open(os.path.join(checkout, "docs", "exit-status.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| .+? \| (\d+) \| 0 \|$", file.read(), re.MULTILINE)
    assert sorted(map(int, rows)) == sorted((*pace.PATIENT_STATUSES, pace.SIGNIN_REFUSED, pace.SIGNIN_REFUSED, errors.Unconfigured.exit_status))
