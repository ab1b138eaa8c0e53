"""What is delivered beside the program: the configuration, the units, and the way to install them."""

import os
import re
import shutil
import subprocess

import pytest

import scx_enroll
from scx_enroll import config
from scx_enroll.errors import Unconfigured
from scx_enroll.rootfs import Root


def text_of(checkout, *names):
    with open(os.path.join(checkout, *names), encoding="utf-8") as file:
        return file.read()


@pytest.fixture
def delivered(checkout):
    return text_of(checkout, "packaging", "scx-enroll.conf")


def load(tmp_path, text):
    """What the program makes of this configuration."""
    folder = tmp_path / "etc" / "scx-enroll"
    folder.mkdir(parents=True)
    (folder / "scx-enroll.conf").write_text(text, encoding="utf-8")
    (folder / "scx-enroll.conf").chmod(0o644)
    return config.load(Root(str(tmp_path)))


def test_a_fresh_installation_is_taken_for_a_broken_one(tmp_path, delivered):
    """The configuration as delivered names no CA: that is unconfigured, which a timer passes over, and no error."""
    with pytest.raises(Unconfigured):
        load(tmp_path, delivered)


def test_the_delivered_configuration_is_not_the_default(tmp_path, delivered):
    """With its examples for server and template taken, everything else is as without the file."""
    text = re.sub(r"^#(server|template) =", r"\1 =", delivered, flags=re.MULTILINE)
    got = load(tmp_path, text)
    assert (got.host, got.renewal, got.agent, got.report) == (config.Host(), config.Renewal(), config.Agent(), config.Report())
    expected = config.CA(server=got.cas[0].server, template="SCXAgent")
    assert got.cas == (expected,)
    assert got.cas[0].server.startswith("ca01.corp.example")


def test_a_key_that_operators_can_not_find_out_about(delivered):
    """The file names every key that the program knows, set or commented out, in its section, and no other."""
    named, section = set(), ""
    for line in delivered.splitlines():
        if re.fullmatch(r"\[[a-z]+\]", line):
            section = line[1:-1]
        elif re.match(r"#?[a-z-]+ =", line):
            named.add((section, line.lstrip("#").partition(" =")[0]))
    assert named == {(section, key) for section, keys in config._KEYS.items() for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["scx-enroll.service", "scx-enroll.timer", "scx-enroll-soon.timer", "scx-enroll.path"])
def test_a_unit_that_systemd_does_not_understand(checkout, tmp_path, unit):
    """systemd reads every unit without a word."""
    if not shutil.which("systemd-analyze"):
        missing = "systemd-analyze is not here: apt-get install systemd"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    for name in os.listdir(os.path.join(checkout, "systemd")):
        text = text_of(checkout, "systemd", name).replace("/usr/sbin/scx-enroll", shutil.which("true"))  # has to exist
        (tmp_path / name).write_text(text, encoding="utf-8")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=one", unit], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.checkout
@pytest.mark.timeout(300)
def test_the_way_to_install_from_a_checkout_does_not_work(checkout, tmp_path):
    """The commands in packaging/README.md, beneath another root and without systemctl, end with a program that runs."""
    source, root = tmp_path / "checkout", tmp_path / "root"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(checkout, source, ignore=ignored)  # building leaves files
    root.mkdir()
    commands = re.search(r"```sh\n(.*?)```", text_of(checkout, "packaging", "README.md"), re.DOTALL)[1]
    beneath = re.sub(r"(?<![\w.])/(?=opt|usr|etc)", f"{root}/", re.sub(r"^systemctl .*\n", "", commands, flags=re.MULTILINE))
    for _ in range(2):  # again, as for an upgrade: the configuration stays
        subprocess.run(["sh", "-eux", "-c", beneath], cwd=source, check=True)
        with open(root / "etc/scx-enroll/scx-enroll.conf", "a", encoding="utf-8") as file:
            file.write("# mine\n")
    assert (root / "etc/scx-enroll/scx-enroll.conf").read_text(encoding="utf-8").endswith("# mine\n# mine\n")
    assert os.listdir(root / "etc/systemd/system") != []
    ran = subprocess.run([str(root / "usr/sbin/scx-enroll"), "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert scx_enroll.__version__ in ran.stdout
