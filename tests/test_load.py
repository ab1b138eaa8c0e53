"""`make load`: many hosts at one CA at once, with fewer of them, since a test machine does other things too."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOSTS = 60


def test_many_hosts_at_once_lose_a_request_or_ask_twice():
    """Every host ends with one certificate of its own; a CA that behaves gets one POST from each, one that loses answers few more."""
    done = subprocess.run(
        (sys.executable, "-I", "-m", "tests.load", "--hosts", str(HOSTS), "--json"), capture_output=True, text=True, cwd="/", timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = map(json.loads, done.stdout.splitlines())
    assert good["statuses"] == [{"0": HOSTS}]
    assert good["posts"] == good["issued"] == HOSTS
    assert good["dropped"] == good["refused"] == 0
    assert bad["dropped"] and bad["refused"], "the CA answered everything"
    assert len(bad["statuses"]) > 1, "no host had to run again"
    assert bad["issued"] <= HOSTS + bad["dropped"]
    assert good["problems"] == bad["problems"] == []
