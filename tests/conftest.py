"""What holds for every test."""

import os

import hypothesis
import pytest

import scx_enroll

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# A deadline per example measures the machine. Under CI the examples are the same each time: new ones are for those who can look into them.
hypothesis.settings.register_profile("scx-enroll", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True)
hypothesis.settings.load_profile("scx-enroll")


def pytest_configure(config):
    """The installed package is under test: what packaging forgets must fail here."""
    if os.path.dirname(os.path.dirname(os.path.abspath(scx_enroll.__file__))) == CHECKOUT:
        raise pytest.UsageError("scx_enroll is imported from the checkout, not from where it is installed: run `make fast` or `make test`")


def pytest_collection_modifyitems(items):
    """What sleeps begins first."""
    items.sort(key=lambda item: item.get_closest_marker("asleep") is None)


@pytest.fixture(scope="session")
def checkout():
    """The folder that holds setup.py."""
    return CHECKOUT


@pytest.fixture
def ca(tmp_path):
    """A CA that issues at once, for one test alone; where many tests share one, their module has its own."""
    from tests.lab.ca import LabCA

    with LabCA(tmp_path / "ca") as lab:
        yield lab
