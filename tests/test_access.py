"""The way to the pair: root writes what the agent's account must be able to read, through every folder of every link."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Iterator

import pytest

from scx_enroll import access
from scx_enroll import agent as agents
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="without root the agent's account is ours, and may read everything")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LabHost]:
    """An agent whose key is a link, to a link in a second folder, to a file in a third."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as made:
        for folder in ("/opt/hidden", "/opt/keys/deep"):
            os.makedirs(made.path(folder))
        key = made.path(made.key)
        os.rename(key, made.path("/opt/keys/deep/k.pem"))
        os.symlink("../keys/deep/../deep/k.pem", made.path("/opt/hidden/link.pem"))
        os.symlink("/opt/hidden/link.pem", key)
        yield made


def locked(host: LabHost) -> str:
    """What the agent's account can't get at."""
    root = Root(host.root)
    return access.locked(root, agents.find(root, port=None))


@pytest.mark.parametrize("folder", ["/etc/opt/omi", "/etc/opt/omi/ssl", "/opt/hidden", "/opt/keys", "/opt/keys/deep"])
def test_a_folder_in_the_middle_of_a_chain_of_links(host: LabHost, folder: str) -> None:
    """The agent goes through each of them, and dies of the one that it can't enter; a certificate asked for is spent then."""
    assert locked(host) == ""
    assert host.would_start()
    os.chmod(host.path(folder), 0o700)
    os.chown(host.path(folder), 0, 0)
    assert locked(host) == folder
    if folder != "/opt/hidden":  # the stand-in finds its way beneath the root itself, as root, and opens what is at the end
        assert not host.would_start()


@pytest.mark.parametrize("given", [True, False])
def test_an_access_control_list_is_no_premise(host: LabHost, given: bool) -> None:
    """It comes and goes without a trace in what the idle run looks at, so an answer that rests on one is looked at anew each time."""
    assert None not in _looked(host), "else no host is ever idle"
    folder = host.path("/opt/keys")
    os.chmod(folder, 0o750)
    if given:
        entries = ((1, 7, -1), (2, 5, host.account[0]), (4, 5, -1), (0x10, 5, -1), (0x20, 0, -1))
        words = b"".join(struct.pack("<HHi", *entry) for entry in entries)
        try:
            os.setxattr(folder, "system.posix_acl_access", struct.pack("<I", 2) + words)
        except OSError:
            pytest.skip("this file system has no access control lists")
    assert locked(host) == ("" if given else "/opt/keys")
    assert None in _looked(host)


def _looked(host: LabHost) -> list[str | None]:
    root = Root(host.root)
    access.locked(root, agents.find(root, port=None))
    return list(root.notes.looked.values())
