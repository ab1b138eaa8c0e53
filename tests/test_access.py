"""The way to the pair: root writes what the agent's account must be able to read, through every folder of every link."""

from __future__ import annotations

import os
import pwd
import struct
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import pytest

from scx_enroll import access
from scx_enroll import agent as agents
from scx_enroll.agent import Agent
from scx_enroll.errors import AgentNotReady
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


def account(host: LabHost) -> access.Account | None:
    """Who reads the pair."""
    root = Root(host.root)
    return access.account_of(root, agents.find(root, port=None))


def test_the_groups_of_the_agents_account(host: LabHost) -> None:
    """A folder that is open to one of them is open to the agent; a line that is no group's, or holds no number, is nobody's."""
    uid, gid = host.account
    groups = Path(host.path("/etc/group"))
    groups.write_text(f"root:x:0:\n# by hand\n\n+\nodd:x:many:omi\nomi:x:{gid}:\nweb:x:7001:other,omi\ndb:x:7002:omi2\n")
    assert account(host) == (uid, {gid, 7001})
    os.chown(host.path("/opt/keys"), 0, 7001)
    os.chmod(host.path("/opt/keys"), 0o710)
    assert locked(host) == ""
    groups.unlink()
    assert account(host) == (uid, {gid})
    assert locked(host) == "/opt/keys"


def test_this_hosts_own_account_rests_on_its_files(host: LabHost) -> None:
    """The C library tells it, so what an idle run has to look at again must be noted here; / is a folder on the way like any other."""
    agent = replace(agents.find(Root(host.root), port=None), account="nobody", certificate="/etc/passwd", key="/etc/passwd")
    entry, root = pwd.getpwnam("nobody"), Root("/")
    assert access.account_of(root, agent) == (entry.pw_uid, frozenset(os.getgrouplist("nobody", entry.pw_gid)))
    assert {"/etc/passwd", "/etc/group"} <= set(root.notes.looked)
    assert access.locked(root, agent) == ""
    real = root.resolve
    root.resolve = lambda path: replace(real(path), mode=0o700) if path == "/" else real(path)  # type: ignore[method-assign]
    assert access.locked(root, agent) == "/"


def test_the_folder_above_a_tree_is_not_the_agents_matter(host: LabHost) -> None:
    """An image is built in a folder that only its builder may enter; the agent will have its own /."""
    os.chmod(host.root, 0o700)
    assert locked(host) == ""


@pytest.mark.parametrize(
    ("what", "shut", "readable"),
    [
        ("nothing", "", True),
        ("certificate closed", "", False),
        ("key closed", "key", True),
        ("no certificate", "", True),
        ("no key", "", True),
        ("no such account", "", True),
        ("root reads it", "", True),
    ],
)
def test_what_keeps_the_agent_from_its_pair(tmp_path: Path, what: str, shut: str, readable: bool) -> None:
    """What is absent or not known here is closed to nobody: another rule says what is missing, and has another remedy."""
    with LabHost(tmp_path / "host", "omi-root" if what == "root reads it" else "omi-regular", key="ec:secp256r1") as made:
        root, certificate, key = Root(made.root), Path(made.path(made.certificate)), Path(made.path(made.key))
        if what in ("certificate closed", "no such account", "root reads it"):
            Path(made.resolve(made.certificate)).chmod(0o600)
        if what in ("key closed", "no such account", "root reads it"):
            os.chown(key, 0, 0)
        if what.startswith("no "):
            {"no key": key, "no certificate": certificate, "no such account": Path(made.path("/etc/passwd"))}[what].unlink()
        agent = agents.find(root, port=None)
        assert access.locked(root, agent) == (made.key if shut else "")
        assert access.readable(root, agent) is readable


def test_the_command_that_opens_a_path() -> None:
    """The key stays its owner's alone; a folder need only be gone through."""
    agent = Agent("omi", "/ssl/omi.pem", "/ssl/omikey.pem", "", (), 0, "omi", "", "", "", "", "")
    assert access.cure(agent, "/ssl/omikey.pem") == "chown omi /ssl/omikey.pem && chmod 0400 /ssl/omikey.pem"
    assert access.cure(agent, "/ssl") == "chmod a+x /ssl"


@pytest.mark.parametrize(
    ("links", "hint"),
    [
        ({"{key}": "/etc/opt/omi/ssl/mine.pem"}, ""),
        ({"{key}": "omi.pem"}, "cp -p --remove-destination"),
        ({"{key}": "../ssl/k.pem", "/etc/opt/omi/ssl/k.pem": "omi.pem"}, "cp -p --remove-destination"),
        ({"{key}": "/k.pem", "/k.pem": "etc/opt/omi/ssl/omi.pem"}, "cp -p --remove-destination"),
    ],
    ids=["a file of its own", "one link", "two links", "a link in the root's own folder"],
)
def test_a_key_that_is_read_through_the_certificates_name(host: LabHost, links: dict[str, str], hint: str) -> None:
    """By whatever links: a new certificate at that name would take the key away."""
    os.unlink(host.path(host.key))
    for name, text in links.items():
        os.symlink(text, host.path(name.replace("{key}", host.key)))
    root = Root(host.root)
    agent = agents.find(root, port=None)
    if not hint:
        access.demand_two(root, agent)
        return
    with pytest.raises(AgentNotReady) as refused:
        access.demand_two(root, agent)
    assert hint in refused.value.hint
