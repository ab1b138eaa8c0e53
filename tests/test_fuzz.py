"""The fuzz targets still fit what they feed: each is run for a moment, with the same inputs every time."""

import random

import pytest

from .fuzz import fuzz_answers, fuzz_certificate, fuzz_config, fuzz_pages, fuzz_premises, fuzz_signin, fuzz_state


def answers(folder):
    conversation, fed = fuzz_answers.connect(folder)
    return lambda data: fuzz_answers.one(conversation, fed, data)


def resting(folder):
    folder = folder.resolve()
    return lambda data: fuzz_premises.one(folder, data or fuzz_premises.good(folder))


TARGETS = {
    "answers": (answers, fuzz_answers.mutated),
    "certificate": (lambda folder: fuzz_certificate.one, fuzz_certificate.mutated),
    "config": (fuzz_config.prepared, fuzz_config.mutated),
    "premises": (resting, lambda chance: b"" if chance.random() < 0.1 else chance.randbytes(30)),
    "signin": (lambda folder: fuzz_signin.one, fuzz_signin.mutated),
    "state": (fuzz_state.prepared, fuzz_state.mutated),
    "pages": (lambda folder: fuzz_pages.one, fuzz_pages.mutated),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_fuzz_target_runs(tmp_path, name):
    """A target that no longer starts, or that fails at once, finds nothing on the day somebody runs it for hours."""
    prepare, mutated = TARGETS[name]
    feed, chance = prepare(tmp_path), random.Random(1)
    for _ in range(40):
        feed(mutated(chance))
