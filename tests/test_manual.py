"""The manual page says what the program, its exit statuses and its units say, and no reader of manual pages complains."""

import argparse
import os
import re
import shutil
import subprocess

import pytest

import scx_enroll
from scx_enroll import arguments, errors, systemd

pytestmark = pytest.mark.checkout

PAGE = ("docs", "scx-enroll.8")
OTHERS = r"\b(?:systemctl|journalctl) .*"  # other programs' options are theirs
COMMON = {"--config", "--root", "--live", "--verbose"}


def sections(checkout, mark, text=None):
    """The page without its escapes, by its headings (mark SH); or one of its sections (SS)."""
    if text is None:
        with open(os.path.join(checkout, *PAGE), encoding="utf-8") as file:
            text = re.sub(r"\\f[A-Z]|\\", "", file.read())
    found = re.split(rf'^\.{mark} "?(.+?)"?$', text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2]))


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(OTHERS, "", text)))


def known():
    """The options of the parser, those of each verb beside it."""
    top = arguments.parser()
    verbs, = (action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return options_of(top), {verb: options_of(made) - COMMON - {"--help"} for verb, made in verbs.items()}


def options_of(parser):
    return {word for action in parser._actions for word in action.option_strings if word.startswith("--")}


def test_a_verb_or_an_option_without_a_word_in_the_manual(checkout):
    """Each verb of the parser has its part, with all its options and no others; what every verb takes stands under OPTIONS."""
    common, verbs = known()
    page = sections(checkout, "SH")
    parts = {title.split()[0]: text for title, text in sections(checkout, "SS", page["COMMANDS"]).items()}
    assert list(parts) == list(arguments.VERBS)
    assert {verb: options(text) for verb, text in parts.items()} == verbs
    assert options(page["OPTIONS"]) == common


def test_an_option_of_the_manual_does_not_exist(checkout):
    """Wherever the page names an option, the parser knows it; and whatever --help names, the page does."""
    common, verbs = known()
    text = "".join(sections(checkout, "SH").values())
    assert options(text) == common.union(*verbs.values())
    assert options(arguments.HELP) <= options(text)


def test_an_exit_status_without_a_word_in_the_manual(checkout):
    """The page lists each status of an error, those that are none, and no other, in order."""
    listed = re.findall(r"^\.TP\n\.B (\S+)$", sections(checkout, "SH")["EXIT STATUS"], re.MULTILINE)
    statuses = {kind.exit_status for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EnrollError)}
    assert listed == [str(status) for status in sorted({0, *statuses})] + ["128+n"]


def test_a_unit_without_a_word_in_the_manual(checkout):
    """The page explains every unit that is delivered or made, and no other."""
    listed = re.findall(r"^\.TP\n\.B (\S+)$", sections(checkout, "SH")["UNITS"], re.MULTILINE)
    delivered = {name for name in os.listdir(os.path.join(checkout, "systemd")) if not name.endswith(".preset")}
    assert set(listed) == delivered | {systemd.CONTROL, f"{systemd.AGAIN}.timer"}


def test_the_manual_is_that_of_another_version(checkout):
    """Its title names the program's version."""
    with open(os.path.join(checkout, *PAGE), encoding="utf-8") as file:
        assert f'"scx\\-enroll {scx_enroll.__version__}"' in file.readline()


@pytest.mark.parametrize("reader", ["man-db", "mandoc"])
def test_a_reader_of_the_manual_complains(checkout, reader):
    """The page is set without a warning."""
    command = {"man-db": ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"], "mandoc": ["mandoc", "-T", "lint"]}[reader]
    if not shutil.which(command[0]) or (reader == "man-db" and subprocess.run(["man", "--version"], capture_output=True).returncode):
        missing = f"{command[0]} is not here: apt-get install {reader}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    ran = subprocess.run([*command, os.path.join(checkout, *PAGE)], capture_output=True)
    said = ran.stderr if reader == "man-db" else ran.stdout + ran.stderr  # the page itself, or nothing but complaints
    assert (ran.returncode, said.decode()) == (0, "")
