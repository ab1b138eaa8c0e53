"""Paths beneath a root: nothing leads out of it, nothing blocks, nothing is read that another user could have chosen."""

import os
import shutil
import socket
import stat
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scx_enroll.errors import HostError
from scx_enroll.rootfs import MAX_DEPTH, MAX_LINKS, Root, read_argument

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: files of another user")


@pytest.fixture
def tree(tmp_path):
    """A root with etc/secret in it, and a file of the same name outside."""
    (tmp_path / "secret").write_bytes(b"outside")
    base = tmp_path / "tree"
    (base / "etc").mkdir(parents=True)
    (base / "etc" / "secret").write_bytes(b"inside")
    (base / "etc" / "secret").chmod(0o600)
    return base


@pytest.fixture
def root(tree):
    return Root(str(tree))


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_absolute_links_are_followed_inside_the_root(tree, root):
    """An image's /etc/opt link names a path in the image, not on its builder."""
    (tree / "link").symlink_to("/etc/secret")
    assert root.read("/link", 100) == b"inside"
    assert root.resolve("/link").path == "/etc/secret"
    assert root.host_path("/link") == str(tree / "etc" / "secret")


@pytest.mark.parametrize("path", ["/../secret", "/etc/../../../secret", "/up", "/etc/up"])
def test_dot_dot_stops_at_the_root(tree, root, path):
    """As in a chroot: no number of them leads out of the tree."""
    (tree / "up").symlink_to("../../secret")
    (tree / "etc" / "up").symlink_to("../../../../secret")
    assert root.resolve(path).kind == "absent"
    with pytest.raises(FileNotFoundError):
        root.read(path, 100)


def test_a_link_on_the_way_leads_nowhere_else(tree, root, tmp_path):
    """A folder replaced by a link to the outside is looked for inside."""
    (tree / "opt").symlink_to(tmp_path)
    assert root.resolve("/opt/secret").kind == "absent"
    assert root.listdir("/opt") == ()


def test_the_last_name_is_not_followed_by_entry(tree, root):
    """The install swaps the name itself, so it must see the link; what is above it is resolved."""
    (tree / "alias").symlink_to("etc")
    (tree / "etc" / "omi.pem").symlink_to("secret")
    found = root.entry("/alias/omi.pem")
    assert (found.path, found.kind, found.text) == ("/etc/omi.pem", "link", "secret")
    assert root.resolve("/alias/omi.pem").path == "/etc/secret"


def test_what_stands_there_is_told(tree, root):
    """Mode, owner, size, identity and times are those of the file."""
    found, real = root.entry("/etc/secret"), os.lstat(tree / "etc" / "secret")
    assert (found.kind, found.mode, found.uid, found.gid, found.size) == ("file", 0o600, real.st_uid, real.st_gid, 6)
    assert (found.device, found.inode) == (real.st_dev, real.st_ino)
    assert (found.mtime_ns, found.ctime_ns) == (real.st_mtime_ns, real.st_ctime_ns)
    assert root.entry("/etc").kind == "dir"
    assert root.entry("/").path == "/"
    assert root.entry("/./etc//.").path == root.entry("/etc/").path == "/etc"
    assert root.entry("/etc/..").inode == root.entry("/").inode


def test_a_loop_of_links_is_an_error_not_a_hang(tree, root):
    """A link to itself ends after a bounded number of hops, with the path named."""
    (tree / "loop").symlink_to("/loop")
    with pytest.raises(HostError, match="/loop leads through more than 40 links"):
        root.resolve("/loop")


def test_as_many_links_as_the_kernel_follows(tree, root):
    """The agent follows 40 links, so must we; one more neither does."""
    (tree / "0").write_bytes(b"end")
    for number in range(MAX_LINKS + 1):
        (tree / str(number + 1)).symlink_to(str(number))
    assert root.read(f"/{MAX_LINKS}", 10) == b"end"
    assert (tree / str(MAX_LINKS)).read_bytes() == b"end"
    with pytest.raises(HostError):
        root.read(f"/{MAX_LINKS + 1}", 10)


def test_a_dangling_link_is_absent(tree, root):
    """What it would lead to is named, because that is what a package script would write through."""
    (tree / "omi.pem").symlink_to("/nowhere/host.pem")
    assert root.resolve("/omi.pem") == root.entry("/nowhere/host.pem")
    assert root.resolve("/omi.pem").path == "/nowhere/host.pem"
    with pytest.raises(FileNotFoundError):
        root.read("/omi.pem", 10)
    with pytest.raises(FileNotFoundError):
        root.open_dir("/omi.pem")


def test_below_a_file_nothing_is_there(root):
    """ENOTDIR is absence, as for every other program that looks."""
    assert root.resolve("/etc/secret/deeper/still").kind == "absent"
    assert root.listdir("/etc/secret/deeper") == ()


@pytest.mark.parametrize("path", ["etc/secret", "", "/etc/\0secret"])
def test_a_path_that_is_not_absolute_is_refused(root, path):
    """A relative path would mean the working directory, which is nobody's choice."""
    with pytest.raises(HostError, match="not an absolute path"):
        root.resolve(path)


def test_a_very_deep_path_is_refused(tree, root):
    """Open folders are counted, so that descriptors don't run out in the middle of something."""
    deep = "/".join(["d"] * (MAX_DEPTH + 2))
    os.makedirs(tree / deep)
    with pytest.raises(HostError, match="folders deep"):
        root.resolve(f"/{deep}")
    assert root.resolve("/" + "etc/../" * 200 + "etc/secret").kind == "file"


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_only_regular_files_are_opened(tree, root, kind, monkeypatch):
    """A pipe would hold root up for ever, a device might do worse; they are refused without being opened."""
    if kind == "pipe":
        os.mkfifo(tree / "x")
    elif kind == "socket":
        monkeypatch.chdir(tree)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    else:
        (tree / "x").mkdir()
    with pytest.raises(HostError, match="/x is not a regular file"):
        root.read("/x", 10)


def test_a_file_that_becomes_a_pipe_is_refused(tree, root, monkeypatch):
    """Between look and open anything may happen; the open descriptor is looked at again, and was opened without waiting."""
    real = os.open

    def swap(path, flags, *args, **kwargs):
        if path == "secret":
            (tree / "etc" / "secret").unlink()
            os.mkfifo(tree / "etc" / "secret")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(HostError, match="was replaced while it was opened"):
        root.read("/etc/secret", 100)


@pytest.mark.parametrize("place", ["etc", "secret"])
def test_a_name_that_becomes_a_link_is_not_followed(tree, root, tmp_path, monkeypatch, place):
    """The agent's user may swap names in its folder while root walks; O_NOFOLLOW makes that a refusal or an absence."""
    real = os.open

    def swap(path, flags, *args, **kwargs):
        if path == place and kwargs.get("dir_fd") is not None:
            target = tree / "etc" / "secret" if place == "secret" else tree / "etc"
            target.rename(tmp_path / "moved")
            target.symlink_to(tmp_path / ("secret" if place == "secret" else ""))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises((HostError, FileNotFoundError)):
        root.read("/etc/secret", 100)


def test_more_than_the_limit_is_refused_never_truncated(root):
    """Half a certificate or half a configuration must not be taken for a whole one."""
    assert root.read("/etc/secret", 6) == b"inside"
    with pytest.raises(HostError, match="longer than 5 bytes"):
        root.read("/etc/secret", 5)


@pytest.mark.parametrize(
    ("mode", "private", "trusted", "hint"),
    [
        (0o620, False, True, "chmod go-w /etc/secret"),
        (0o602, False, True, "chmod go-w /etc/secret"),
        (0o644, False, True, ""),
        (0o640, True, False, "chmod 600 /etc/secret"),
        (0o604, True, False, "chmod 600 /etc/secret"),
        (0o600, True, True, ""),
        (0o666, False, False, ""),
    ],
)
def test_who_else_may_touch_a_file_decides(tree, root, mode, private, trusted, hint):
    """A configuration others can write, or a password others can read, is refused with the command that mends it."""
    (tree / "etc" / "secret").chmod(mode)
    if not hint:
        assert root.read("/etc/secret", 10, private=private, trusted=trusted) == b"inside"
        return
    with pytest.raises(HostError) as refused:
        root.read("/etc/secret", 10, private=private, trusted=trusted)
    assert refused.value.hint == hint


@as_root
def test_another_users_file_is_not_trusted(tree, root):
    """Its owner could change it at any time, whatever its mode says."""
    os.chown(tree / "etc" / "secret", NOBODY, NOBODY)
    assert root.read("/etc/secret", 10) == b"inside"
    with pytest.raises(HostError, match="belongs to user 65534") as refused:
        root.read("/etc/secret", 10, trusted=True)
    assert refused.value.hint == "chown root /etc/secret"


@as_root
@pytest.mark.parametrize("shape", ["file", "folder"])
def test_a_strangers_link_does_not_lead_root_to_what_is_not_the_strangers(tree, root, shape):
    """The agent's user must not be able to point root at /etc/shadow, or at a folder to write into."""
    (tree / "run").mkdir()
    (tree / "run" / "link").symlink_to("/etc/secret" if shape == "file" else "/etc")
    os.chown(tree / "run" / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(HostError, match="link of user 65534"):
        root.read("/run/link", 10) if shape == "file" else root.open_dir("/run/link")
    assert root.entry("/run/link").kind == "link"  # so that it can be swapped for a better one


@as_root
def test_a_strangers_link_to_the_strangers_own_file_is_followed(tree, root):
    """After `chown -R omi` link and target are the agent user's; that harms nobody."""
    (tree / "etc" / "link").symlink_to("secret")
    for name in ("link", "secret"):
        os.chown(tree / "etc" / name, NOBODY, NOBODY, follow_symlinks=False)
    assert root.read("/etc/link", 10) == b"inside"


@as_root
def test_the_trees_owner_may_make_links(tree, root):
    """An image's tree unpacked by its builder's account is as trusted as that account."""
    (tree / "link").symlink_to("/etc/secret")
    for path in (tree, tree / "link"):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    assert root.read("/link", 10) == b"inside"


def test_listing_is_sorted_and_absence_is_empty(tree, root):
    """conf.d is read in name order; a host without it is the normal case."""
    for name in ("b", "a", "C"):
        (tree / "etc" / name).touch()
    assert root.listdir("/etc") == ("C", "a", "b", "secret")
    assert root.listdir("/none/at/all") == ()
    with pytest.raises(HostError, match="not a folder"):
        root.listdir("/etc/secret")


def test_a_folders_descriptor_can_be_synced(root):
    """The store makes names durable through it."""
    fd = root.open_dir("/etc")
    try:
        os.fsync(fd)
        assert stat.S_ISDIR(os.fstat(fd).st_mode)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_no_descriptor_is_left_open(tree, root):
    """A run that waits for hours looks at the same files again and again."""
    (tree / "loop").symlink_to("/loop")
    os.mkfifo(tree / "pipe")
    (tree / "etc" / "open").write_bytes(b"")
    (tree / "etc" / "open").chmod(0o666)
    before = open_files()
    for _ in range(3):
        for path in ("/etc/secret", "/loop", "/pipe", "/none", "/etc/secret/x", "/etc/open", "/etc/../etc/secret"):
            for limit in (1, 100):
                for call in (lambda: root.read(path, limit, trusted=True), lambda: root.resolve(path), lambda: root.listdir(path)):  # noqa: B023 - called at once
                    try:
                        call()
                    except (HostError, FileNotFoundError):
                        continue
    assert open_files() == before


def test_a_missing_root_is_named(tmp_path):
    """`--root` mistyped must not mean an empty tree in which nothing is to do."""
    with pytest.raises(HostError, match="can't open the root"):
        Root(str(tmp_path / "none")).resolve("/etc")


def test_only_the_real_root_is_live_by_itself(tmp_path):
    """An image's tree must not restart its builder's agent."""
    assert Root().live
    assert not Root(str(tmp_path)).live
    assert Root(str(tmp_path), live=True).live


def test_an_argument_is_an_ordinary_path(tmp_path, monkeypatch):
    """What the operator names is theirs, links and all; "-" is standard input; absence is an error with a hint."""
    (tmp_path / "csr").write_bytes(b"request")
    (tmp_path / "link").symlink_to(tmp_path / "csr")
    assert read_argument(str(tmp_path / "link"), 10) == b"request"
    with open(tmp_path / "csr", "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_argument("-", 10) == b"request"
    for path in (str(tmp_path / "none"), str(tmp_path), "a\0b"):
        with pytest.raises(HostError, match="can't read"):
            read_argument(path, 10)
    with pytest.raises(HostError, match="longer than 3"):
        read_argument(str(tmp_path / "csr"), 3)


# Against the kernel: what a process finds that has chrooted into the tree.

ORACLE = """
import os, sys
os.chroot(sys.argv[1]); os.chdir("/")
for line in sys.stdin:
    try:
        answer = str(os.stat(line.rstrip("\\n")).st_ino)
    except OSError as problem:
        answer = problem.strerror
    print(answer, flush=True)
"""
names = st.sampled_from(["a", "b", "c"])
paths = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=5).map("/".join)
nodes = st.one_of(st.just("file"), st.just("folder"), st.tuples(st.sampled_from(["", "/"]), paths).map("".join))


@pytest.fixture
def oracle(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    with subprocess.Popen([sys.executable, "-c", ORACLE, str(base)], stdin=-1, stdout=-1, text=True, bufsize=1) as process:

        def ask(path):
            process.stdin.write(path + "\n")
            return process.stdout.readline().rstrip("\n")

        yield base, ask
        process.stdin.close()


@as_root
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(tree=st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), nodes, max_size=8), asked=st.lists(paths, max_size=6))
def test_paths_lead_where_a_chroot_would_lead(oracle, tree, asked):
    """Whatever links there are, the file found is the one that the kernel finds with this root."""
    base, ask = oracle
    for old in os.listdir(base):
        path = base / old
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path, node in sorted(tree.items()):
        try:
            if node == "folder":
                (base / path).mkdir()
            elif node == "file":
                fd = os.open(base / path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                os.close(fd)
            elif not any(parent.is_symlink() for parent in (base / path).parents):
                (base / path).symlink_to(node)
        except OSError:
            continue
    for path in asked:
        expected = ask(f"/{path}")
        try:
            found = Root(str(base)).resolve(f"/{path}")
            answer = str(found.inode) if found.kind != "absent" else "absent"
        except HostError:
            answer = "Too many levels of symbolic links"
        if not expected.isdigit() and expected != "Too many levels of symbolic links":
            expected = "absent"
        assert answer == expected
