"""What every file of the project must keep to, whatever it is about."""

import os
import re
import subprocess

import pytest

import scx_enroll

pytestmark = pytest.mark.checkout

# Patterns that don't match themselves: this file is looked at like any other.
MACHINE_PATHS = re.compile(r"(?<![\w.}>)\]$-])/(?:root|work|tmp[/]w)/\w")
REGISTRIES = re.compile(r"\.(?:debian|ubuntu)\.(?:org|com|net)|pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)", re.IGNORECASE)


def files(checkout):
    """Every file that is, or by a plain `git add` would be, in the repository: path and text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=checkout, stdout=subprocess.PIPE, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files to look at")
    for name in sorted(set(listed.stdout.decode().split("\0")) - {""}):
        path = os.path.join(checkout, name)
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb") as file:
                yield name, file.read()


def lines_with(pattern, checkout):
    """Where the pattern is found, as file:line: text."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, content in files(checkout)
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_tells_where_it_was_written(checkout):
    """No path of a developer's machine: the reader does not have it."""
    assert lines_with(MACHINE_PATHS, checkout) == []


def test_no_file_names_a_registry_host(checkout):
    """Packages come from wherever the machine is set up to get them."""
    assert lines_with(REGISTRIES, checkout) == []


def test_no_file_is_torn_or_in_another_encoding(checkout):
    """Every file is UTF-8 with LF, has no blanks at line ends, and ends with one line end."""
    wrong = []
    for name, content in files(checkout):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            wrong.append(f"{name}: not UTF-8")
        if b"\r" in content or (content and not content.endswith(b"\n")) or content.endswith(b"\n\n") or re.search(rb"[ \t]\n", content):
            wrong.append(f"{name}: CR, blanks at a line end, or not one line end at its end")
    assert wrong == []


def test_no_key_or_certificate_is_stored(checkout):
    """Fixtures are made when they are needed."""
    block = re.compile(r"-----BEGIN (?:[A-Z ]*PRIVATE KEY|CERTIFICATE)-----\n[A-Za-z0-9+/=]{40}".replace("\\n", "\n"))
    assert [name for name, content in files(checkout) if block.search(content.decode("utf-8", "replace"))] == []


def test_no_release_without_a_word_to_operators(checkout):
    """The changelog has a section for what comes next and one for this version."""
    with open(os.path.join(checkout, "CHANGELOG.md"), encoding="utf-8") as file:
        sections = re.findall(r"^## \[(.+?)\]", file.read(), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert scx_enroll.__version__ in sections
