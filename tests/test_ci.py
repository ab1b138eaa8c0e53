"""What a new machine needs to run every test is installed by .ci/run."""

import re
from pathlib import Path

import pytest

from tests import joined, packages
from tests.lab import domain, kdc, roots

NAMED = re.compile(r"apt-get install ([a-z0-9][a-z0-9 .+-]*)")  # in what a test says that it lacks
ESSENTIAL = {"dpkg", "util-linux"}  # in every Debian


@pytest.mark.checkout
def test_a_package_that_a_test_asks_for_is_not_installed_on_a_new_machine(checkout: str) -> None:
    """It would pass on the machines that happen to have it, and fail on the next one."""
    asked = {package for table in (domain.FILES, joined.TOOLS, kdc.TOOLS, packages.APT, roots.TOOLS) for package in table.values()}
    for file in Path(checkout, "tests").rglob("*.py"):
        asked.update(word for words in NAMED.findall(file.read_text("utf-8")) for word in words.split())
    installed = re.findall(r"^need (\S+)", Path(checkout, ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert {"faketime", "krb5-kdc", "openssl"} < asked, "there are some"
    assert asked - ESSENTIAL <= set(installed)
