"""Which machine this is, as its files say beneath any root; and the list of keys that no host may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scx_enroll import agent as agents
from scx_enroll import identity, machine
from scx_enroll import journal as j
from scx_enroll.beside import BAKED_IN, KEPT_BAKED_IN, Beside
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost

ID = "0123456789abcdef0123456789abcdee"
UUID = "564d1234-5678-9abc-def0-123456789abc"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: mounts, files of another user")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with all three parts."""
    for path, text in (("etc/machine-id", ID), ("etc/hostname", "lin01"), ("sys/class/dmi/id/product_uuid", UUID.upper())):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
    return tmp_path


def read(tree: Path) -> j.Identity:
    """What the program knows of it."""
    return identity.read(Root(str(tree)))


def test_the_parts_of_a_tree(tree: Path) -> None:
    """Beneath a root its own files count, not those of the host on which the program runs."""
    assert read(tree) == j.Identity(machine.machine_id(ID), machine.product_uuid(UUID), "lin01")


def test_a_tree_without_any_part_is_known_by_none(tmp_path: Path) -> None:
    """A container has no DMI, an image neither machine-id nor name: not known is no failure."""
    assert read(tmp_path) == j.Identity()


@pytest.mark.parametrize("spoil", [
    lambda tree: (tree / "etc/machine-id").write_text(""),
    lambda tree: (tree / "etc/machine-id").write_text("uninitialized\n"),
    lambda tree: (tree / "etc/machine-id").write_text("0" * 5000),
    lambda tree: ((tree / "etc/machine-id").unlink(), (tree / "etc/machine-id").mkdir()),
    lambda tree: ((tree / "run").mkdir(), (tree / "etc/machine-id").rename(tree / "run/machine-id"), (tree / "etc/machine-id").symlink_to("/run/machine-id")),
    lambda tree: ((tree / "etc/machine-id").unlink(), (tree / "etc/machine-id").symlink_to("machine-id")),
], ids=["empty", "not initialised", "endless", "a folder", "in /run", "a loop"])
def test_a_machine_id_that_is_not_to_be_relied_on(tree: Path, spoil: Any) -> None:
    """It is not known then, and the other parts are."""
    spoil(tree)
    assert read(tree) == j.Identity("", machine.product_uuid(UUID), "lin01")


@as_root
def test_a_transient_machine_id_does_not_count(tree: Path) -> None:
    """While /etc can't be written systemd lays one of this boot over it, from /run: the next boot has another, and is no other machine."""
    (tree / "run").mkdir()
    look = f"from scx_enroll import identity; from scx_enroll.rootfs import Root; print(repr(identity.read(Root({str(tree)!r})).machine))"
    script = (
        'set -e; mount -t tmpfs none "$1/run"; echo 77770123456789abcdef0123456789ab > "$1/run/machine-id"; '
        'mount --bind "$1/run/machine-id" "$1/etc/machine-id"; exec "$2" -I -c "$3"'
    )
    ran = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", str(tree), sys.executable, look], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "''\n"), ran.stderr


def test_a_name_that_only_the_running_host_has(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At / it is the kernel's, which DHCP may have given; a tree has its file."""
    monkeypatch.setattr("socket.gethostname", lambda: "this.lab.test")
    assert identity.read(Root("/")).name == "this.lab.test"
    (tree / "etc/hostname").unlink()
    assert read(tree).name == ""
    assert identity.read(Root(str(tree), live=True)).name == "this.lab.test"


# -- the list of baked-in keys ------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Any:
    """A tree with an agent, which does not run."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as made:
        yield made


def parts(host: LabHost) -> Any:
    """Root, agent, and the path of the list."""
    root = Root(host.root)
    agent = agents.find(root, port=host.port)
    return root, agent, Path(host.root + identity.record_of(agent))


def test_what_is_written_is_read_back_and_the_newest_stay(host: LabHost) -> None:
    """It says itself what it is, and is readable by all; an empty list is no file."""
    root, agent, path = parts(host)
    assert identity.baked_in(root, agent) == ()
    keys = tuple(f"{number:064x}" for number in range(KEPT_BAKED_IN + 5))
    Beside(root).save_baked_in(agent.key, keys)
    assert identity.baked_in(root, agent) == keys[5:]
    assert (path.name, path.parent, path.stat().st_mode & 0o777) == (BAKED_IN, Path(host.path(host.key)).parent, 0o644)
    assert path.read_text().startswith("# ")
    assert identity.foreign(root, agent, j.Journal(), keys[7])
    assert identity.foreign(root, agent, j.Journal(), keys[0]) == ""
    assert identity.foreign(root, agent, j.Journal(strangers=(keys[0],)), keys[0])
    assert identity.foreign(root, agent, j.Journal(), "") == ""
    Beside(root).save_baked_in(agent.key, ())
    assert not path.exists()


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_text("x\n"),
    lambda path: path.write_text("A" * 64 + "\n"),
    lambda path: path.write_bytes(b"\xff" * 64),
    lambda path: path.write_text("a" * 64 + "\n" * 20000),
    lambda path: (path.touch(), path.chmod(0o666)),
    pytest.param(lambda path: (path.touch(), os.chown(path, 990, 990)), marks=as_root),
    lambda path: path.mkdir(),
], ids=["no SHA-256", "capitals", "bytes", "endless", "open to others", "another's", "a folder"])
def test_a_list_that_is_not_understood_is_refused_by_its_name(host: LabHost, spoil: Any) -> None:
    """The agent's account may be able to write there: what it says is not believed, and not passed over."""
    root, agent, path = parts(host)
    spoil(path)
    with pytest.raises(HostError) as caught:
        identity.foreign(root, agent, j.Journal(), "b" * 64)
    assert identity.record_of(agent) in caught.value.message
    assert caught.value.hint
