"""The only writer: durable or not at all, nothing of others touched, and what was there before is readable after every failure."""

import ast
import errno
import fcntl
import inspect
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

import scx_enroll
from scx_enroll import beside, durable
from scx_enroll import journal as j
from scx_enroll import store as stores
from scx_enroll.errors import Busy, EnrollError, HostError
from scx_enroll.rootfs import Root
from scx_enroll.store import STATE, STATUS, Generation, Store

PACKAGE = os.path.dirname(os.path.abspath(scx_enroll.__file__))
NOBODY = 65534
REAL_RENAME = os.rename
SSL = "/etc/opt/omi/ssl"
NAME = f"{SSL}/omi.pem"
ID = "0123456789abcdef"
ME = (os.geteuid(), os.getegid())
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: files of another user")


def silent(_message):
    pass


def place(**changes):
    """A place that is ours, as installed by us."""
    return j.Place(**{"kind": "link", "uid": os.geteuid(), "gid": os.getegid(), "generation": ID, **changes})


def generation(number, **origin):
    return Generation(f"{number:016x}", b"leaf %d\n" % number, b"", j.Origin(**origin))


def ids(store):
    return [int(g.id, 16) for g in store.generations()]


@pytest.fixture
def tree(tmp_path):
    """A root with an agent's folder: omi.pem is a link to the host's own certificate."""
    base = tmp_path / "root"
    ssl = base / SSL[1:]
    ssl.mkdir(parents=True)
    (ssl / "omi-host-h.pem").write_bytes(b"own\n")
    (ssl / "omi.pem").symlink_to("omi-host-h.pem")
    return base


@pytest.fixture
def store(tree):
    """A store of that root, its lock held."""
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        yield store


def beneath(tree, path):
    return tree / path[1:]


def held_open(listdir=os.listdir):
    return len(listdir("/proc/self/fd"))


# -- the closed list of changes -------------------------------------------------------------------------------------

WRITES = {"open", "write", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "makedirs", "ftruncate", "truncate",
          "pwrite", "chmod", "fchmod", "chown", "fchown", "lchown", "utime", "mknod", "mkfifo", "removedirs", "renames", "sendfile"}
# Changes besides the table: the lock's own line, folders and leftovers (all told in the text of the page), and the preflight's trial.
BESIDES = {"lock", "check_folder", "check_state"}


@pytest.fixture
def documented(checkout):
    """The names in the table "What the program changes"."""
    with open(os.path.join(checkout, "docs", "state.md"), encoding="utf-8") as file:
        section = file.read().split("\n## What the program changes")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def functions(tree):
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def calls(node):
    """What a function calls: "os.rename", "self._save", "_write"."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield ast.unparse(call.func)


def method(name):
    return getattr(Store, name, None) or getattr(beside.Beside, name, None)


def writers():
    """The methods of Store and Beside that write, directly or through others."""
    every = {name: node for module in (durable, beside, stores) for name, node in functions(ast.parse(inspect.getsource(module))).items()}
    writing = {name for name, node in every.items() if any(c.startswith("os.") and c[3:] in WRITES - {"open"} for c in calls(node))}
    through = {"_folder"}  # it makes folders for those that read, too: not what makes a method a writer
    while True:
        more = writing | {
            name for name, node in every.items()
            if name not in through and {c.rpartition(".")[2] for c in calls(node) if "." not in c or c.startswith("self.")} & writing
        }
        if more == writing:
            return {name for name in writing if not name.startswith("_") and method(name)}
        writing = more


@pytest.mark.checkout
def test_a_change_that_the_page_does_not_list(documented):
    """One method of that name for each row, and no method that writes is missing from the page."""
    assert len(documented) == len(set(documented))
    assert all(inspect.getdoc(method(name)) for name in documented)
    through_the_journal = {"update", "proved", "request", "installation"}
    assert writers() - through_the_journal - BESIDES == set(documented)


@pytest.mark.checkout
def test_another_module_writes_files():
    """`store` and `beside`, with `durable`, are the only writers: no other module renames, removes, makes or opens for writing anything.

    Only the status for any user is replaced by `idle` as well, which can't pay for `store`.
    """
    found = []
    for name in sorted(os.listdir(PACKAGE)):
        if not name.endswith(".py") or name in ("store.py", "beside.py", "durable.py"):
            continue
        with open(os.path.join(PACKAGE, name), encoding="utf-8") as file:
            tree = ast.parse(file.read())
        if name == "idle.py":
            tree.body = [node for node in tree.body if getattr(node, "name", "") != "_publish"]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            what = ast.unparse(call.func)
            if call.args and ast.unparse(call.args[0]) == "os.devnull":
                continue
            flags = " ".join(ast.unparse(argument) for argument in call.args[1:])
            if what.startswith(("shutil.", "tempfile.")) or (what.startswith("os.") and what[3:] in WRITES - {"open", "write"}):
                found.append(f"{name}: {what}")
            if what in ("os.open", "open", "io.open") and "os.devnull" not in ast.unparse(call) and re.search(r"O_CREAT|O_WRONLY|O_RDWR|['\"][^'\"]*[wax+]", flags):
                found.append(f"{name}: {ast.unparse(call)}")
    assert found == []


# -- modes and owners -----------------------------------------------------------------------------------------------


def everything(store):
    """Make each change once."""
    store.save_journal(j.Journal(hold="x"))
    store.save_budget(j.Budget())
    store.add_generation(generation(1))
    store.save_original(b"own\n", "a" * 64)
    store.save_page("<html>", 7)
    store.publish('{"row": "C6"}\n')
    store.save_premises(b"{}")
    store.beside.make_copy(NAME, f"scx-enroll-{ID}-1.pem", b"leaf\n", place(mode=0o444))
    store.beside.swap(NAME, place(text=f"scx-enroll-{ID}-1.pem"))
    store.beside.set_marker(f"{SSL}/.omi_cert_marker", present=True)
    store.prune()


@pytest.mark.parametrize("umask", [0, 0o022, 0o027, 0o077])
def test_the_callers_umask_opens_or_closes_a_file(tree, umask):
    """Each file and folder has the mode of the page, whatever umask the operator's shell or the unit has."""
    before = os.umask(umask)
    try:
        store = Store(Root(str(tree)))
        with store.lock(0, silent):
            everything(store)
    finally:
        os.umask(before)
    folder = f"{STATE}/generations/{1:016x}"
    wanted = {
        STATE: 0o700, f"{STATE}/journal.json": 0o600, f"{STATE}/budget.json": 0o600, f"{STATE}/lock": 0o600, f"{STATE}/premises": 0o600,
        f"{STATE}/generations": 0o700, folder: 0o700, f"{folder}/cert.pem": 0o600, f"{folder}/chain.pem": 0o600,
        f"{folder}/meta.json": 0o600, f"{STATE}/original": 0o700, f"{STATE}/original/{'a' * 64}.pem": 0o600, f"{STATE}/pages": 0o700,
        f"{STATE}/pages/7.html": 0o600, STATUS: 0o644, f"{SSL}/scx-enroll-{ID}-1.pem": 0o444, f"{SSL}/.omi_cert_marker": 0o644,
    }
    found = {path: stat.S_IMODE(os.lstat(beneath(tree, path)).st_mode) for path in wanted}
    assert {path: oct(mode) for path, mode in found.items()} == {path: oct(mode) for path, mode in wanted.items()}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_folder_of_the_status_file_is_closed_to_its_readers(tree, umask):
    """Anyone may read status.json; under umask 077 (sudo on a hardened host) its folder must be passable all the same."""
    before = os.umask(umask)
    try:
        Store(Root(str(tree))).publish("{}\n")
    finally:
        os.umask(before)
    for folder in ("/run", "/run/scx-enroll"):
        assert stat.S_IMODE(os.stat(beneath(tree, folder)).st_mode) == 0o755, folder


def test_a_file_is_open_to_others_for_an_instant(store, tree, monkeypatch):
    """Every file is born closed: its mode is widened on the descriptor, never afterwards by name."""
    seen = []
    real = os.write

    def write(fd, data):
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    before = os.umask(0)
    try:
        everything(store)
    finally:
        os.umask(before)
    assert set(seen) == {0o600}


@as_root
def test_a_copy_belongs_to_somebody_the_agent_can_not_read_as(store, tree):
    """Owner, group and mode are those of the place that was recorded."""
    store.beside.make_copy(NAME, f"scx-enroll-{ID}-1.pem", b"leaf\n", place(uid=NOBODY, gid=NOBODY, mode=0o440))
    found = os.lstat(tree / SSL[1:] / f"scx-enroll-{ID}-1.pem")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o440)
    store.beside.swap(NAME, place(kind="file", uid=NOBODY, gid=NOBODY, mode=0o400), b"own\n")
    found = os.lstat(tree / NAME[1:])
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o400)


# -- durable --------------------------------------------------------------------------------------------------------


class Recorder:
    """Notes the order of the calls that decide what a power failure leaves; descriptors are told by what they are."""

    NAMES = ("write", "fsync", "rename", "link", "symlink", "unlink", "mkdir", "rmdir", "fchmod", "fchown")

    def __init__(self, monkeypatch):
        self.calls = []
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.noting(name, getattr(os, name)))

    def noting(self, name, real):
        def call(*arguments, **options):
            what = name
            if name in ("fsync", "write", "fchmod", "fchown"):
                what += " folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else " file"
            self.calls.append(what)
            return real(*arguments, **options)

        return call


REPLACED = ["write file", "fchmod file", "fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda s: s.save_journal(j.Journal()), REPLACED),
        (lambda s: s.save_budget(j.Budget()), REPLACED),
        (lambda s: s.save_original(b"x", "a" * 64), REPLACED),
        (lambda s: s.add_generation(Generation(ID, b"x", b"y", j.Origin())), [*REPLACED, "mkdir", *REPLACED * 3, "rename", "fsync folder"]),
        (lambda s: s.beside.make_copy(NAME, "c.pem", b"x", place()),
         ["write file", "fchown file", "fchmod file", "fsync file", "link", "unlink", "fsync folder"]),
        (lambda s: s.beside.swap(NAME, place(text="x")), ["symlink", "rename", "fsync folder"]),
        (lambda s: s.beside.swap(NAME, place(kind="file"), b"x"),
         ["write file", "fchown file", "fchmod file", "fsync file", "rename", "fsync folder"]),
        (lambda s: s.beside.set_marker(f"{SSL}/m", present=True), ["fchmod file", "fsync file", "rename", "fsync folder"]),
        (lambda s: s.beside.set_marker(f"{SSL}/m", present=False), ["unlink", "fsync folder"]),
    ],
    ids=["journal", "budget", "original", "generation", "copy", "link", "file", "marker", "no-marker"],
)
def test_a_power_failure_between_two_calls(store, monkeypatch, change, wanted):
    """The data are on the disk before the name leads to them, and the name is before the method returns."""
    recorder = Recorder(monkeypatch)
    change(store)
    assert recorder.calls == wanted


def test_a_power_failure_while_a_key_changes_or_goes(store, tree, monkeypatch):
    """A pair stands before a name leads to it; what is removed is gone for good, above all a key, before anything rests on that."""
    beside, key, ssl = store.beside, f"{SSL}/omikey.pem", tree / SSL[1:]
    (ssl / "m.pem_temp").write_bytes(b"moved aside")
    (ssl / f"scx-enroll-{ID}-1.pem").write_bytes(b"a copy")
    recorder, owned = Recorder(monkeypatch), ["write file", "fchown file", *REPLACED[1:]]

    def calls(change, *arguments):
        recorder.calls.clear()
        change(*arguments)
        return recorder.calls

    put, gone = ["symlink", "rename", "fsync folder"], ["unlink", "fsync folder"]
    assert calls(beside.make_pair, NAME, b"leaf", b"key", ME) == ["mkdir", *REPLACED, *owned, "fchmod folder", "rename", "fsync folder"]
    assert calls(beside.point, NAME, "scx-enroll-pair-1") == put
    rights = [f"{call} {what}" for what in ("file", "folder") for call in ("fchown", "fchmod", "fsync")]
    assert calls(beside.own, NAME, "scx-enroll-pair-1", ME, b"key") == rights
    assert calls(beside.remove_pairs, NAME) == ["unlink", "unlink", "unlink", "rmdir", "fsync folder"]
    assert calls(beside.move_back, f"{SSL}/m.pem") == ["link", "fsync folder", *gone]
    assert calls(beside.sweep, NAME, ()) == gone
    assert calls(beside.save_baked_in, key, ("a",)) == REPLACED
    assert calls(beside.save_baked_in, key, ()) == gone
    (ssl / "omikey.pem").write_bytes(b"key")
    swept = ["fsync folder"] * 2  # the pairs, and our copies: there are none
    assert calls(beside.delete_pair, key, NAME) == [*gone, *gone, *swept, *gone, *swept, "fsync folder"]


def test_a_pair_of_a_killed_run_travels_with_an_image(store, tree):
    """The key in it is as good as the agent's: who has the agent's deleted has that one deleted, too; and there need be none. A file is no pair."""
    ssl = tree / SSL[1:]
    (ssl / "scx-enroll-pair-9").write_bytes(b"somebody's")
    for _ in range(2):
        (ssl / "omikey.pem").write_bytes(b"key")
        store.beside.point(NAME, store.beside.make_pair(NAME, b"leaf", b"key", ME))
        store.beside.delete_pair(f"{SSL}/omikey.pem", NAME)
        assert os.listdir(ssl) == ["scx-enroll-pair-9"]
    assert not store.beside.own(NAME, "scx-enroll-pair-1", ME, b"key")


@pytest.mark.parametrize(("name", "left"), [("", False), ("scx-enroll-pair", True), ("scx-enroll-pair-7", True), ("scx-enroll-pair-x", False)])
def test_what_a_killed_change_of_the_key_left_is_overlooked(store, tree, name, left):
    """A folder with a private key, or the link to it, is looked for by name among what is the agent's."""
    if name:
        (tree / SSL[1:] / name).symlink_to("nowhere")
    assert store.beside.has_pairs(NAME) is left


def test_what_is_in_the_way_of_our_link_is_replaced(store, tree):
    """A rename would end somebody's file: it is named, and stays."""
    theirs = tree / SSL[1:] / "scx-enroll-pair"
    theirs.write_bytes(b"somebody's")
    with pytest.raises(HostError, match="is in the way of a new key"):
        store.beside.point(NAME, "scx-enroll-pair-1")
    assert theirs.read_bytes() == b"somebody's"


def test_the_state_directory_itself_is_lost(tree, monkeypatch):
    """A new folder is made durable in its parent: else a journal that was fsynced would be nowhere."""
    recorder = Recorder(monkeypatch)
    with Store(Root(str(tree))).lock(0, silent):
        pass
    for index, call in enumerate(recorder.calls):
        if call == "mkdir":
            assert recorder.calls[index + 1] == "fsync folder"
    assert recorder.calls.count("mkdir") == 8  # var, lib, scx-enroll, and five in it


def test_a_copy_never_replaces_a_file(store, tree):
    """A name that exists, whoever made it, is refused and stays as it is; no temporary is left."""
    (tree / SSL[1:] / "c.pem").write_bytes(b"of a stranger")
    (tree / SSL[1:] / "d.pem").symlink_to("/etc/shadow")
    before = sorted(os.listdir(tree / SSL[1:]))
    for name in ("c.pem", "d.pem"):
        with pytest.raises(HostError, match="File exists"):
            store.beside.make_copy(NAME, name, b"x", place())
    assert (tree / SSL[1:] / "c.pem").read_bytes() == b"of a stranger"
    assert os.readlink(tree / SSL[1:] / "d.pem") == "/etc/shadow"
    assert sorted(os.listdir(tree / SSL[1:])) == before


def test_a_copy_gets_a_name_that_is_taken(store, tree):
    """The lowest number that is free, also of a dangling link; so whoever may write here can't use up the numbers."""
    ssl = tree / SSL[1:]
    assert store.beside.free_copy(NAME, ID) == f"scx-enroll-{ID}-1.pem"
    (ssl / f"scx-enroll-{ID}-1.pem").symlink_to("nowhere")
    (ssl / f"scx-enroll-{ID}-2.pem").write_bytes(b"")
    (ssl / f"scx-enroll-{ID}-999999999.pem").mkdir()
    (ssl / f"scx-enroll-{'f' * 16}-77.pem").write_bytes(b"")
    (ssl / f"scx-enroll-{ID}-88.pem.bak").write_bytes(b"")
    assert store.beside.free_copy(NAME, ID) == f"scx-enroll-{ID}-3.pem"


def test_a_pair_can_not_be_renamed_to_its_name(store, tree, monkeypatch):
    """The disk fails at the last step: a folder on its way holds a key, and does not stay."""
    before = sorted(os.listdir(tree / SSL[1:]))

    def rename(old, new, **at):
        if new.startswith("scx-enroll-pair-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        REAL_RENAME(old, new, **at)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(HostError, match="Input/output error"):
        store.beside.make_pair(NAME, b"leaf\n", b"key\n", (os.geteuid(), os.getegid()))
    assert sorted(os.listdir(tree / SSL[1:])) == before


@as_root
def test_a_folder_of_somebody_elses_bears_the_name_of_one_on_its_way(store, tree):
    """The agent's account may make it, and what it leads to; ours of a killed run goes, with the key in it."""
    ssl = tree / SSL[1:]
    ours, theirs = (ssl / f".scx-enroll.{letter * 16}" for letter in "ab")
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "key.pem").write_bytes(b"secret\n")
    os.chown(theirs, NOBODY, NOBODY)
    store.beside.sweep(f"{SSL}/omi.pem", ())
    assert not ours.exists()
    assert (theirs / "key.pem").read_bytes() == b"secret\n"


def test_somebody_uses_up_the_names_of_pairs(store, tree):
    """The agent's account may write here: the lowest free number is taken, whatever it made."""
    for name in ("scx-enroll-pair-999999999", "scx-enroll-pair-1"):
        (tree / SSL[1:] / name).mkdir()
    assert store.beside.make_pair(NAME, b"leaf\n", b"key\n", (os.geteuid(), os.getegid())) == "scx-enroll-pair-2"


@as_root
def test_a_certificate_with_a_key_in_its_file_is_readable_by_all(store, tree):
    """A pair's certificate is for everybody, unless the agent's file held the key besides."""
    pairs = [store.beside.make_pair(NAME, data, b"key\n", (NOBODY, NOBODY)) for data in (b"leaf\n", b"leaf\n-----BEGIN PRIVATE KEY-----\n")]
    found = [os.stat(tree / SSL[1:] / pair / "cert.pem") for pair in pairs]
    assert [(one.st_mode & 0o777, one.st_uid) for one in found] == [(0o444, os.geteuid()), (0o400, NOBODY)]


@as_root
@pytest.mark.parametrize("how", ["hard link", "other bytes", "link", "fifo", "gone"])
def test_a_file_of_root_in_place_of_a_key(store, tree, how):
    """Whoever owns the folder may put another file under the key's name: it is not given to the agent's account."""
    secret = tree / "secret"
    secret.write_bytes(b"key\n" if how == "hard link" else b"other\n")
    secret.chmod(0o600)
    pair = store.beside.make_pair(NAME, b"leaf\n", b"key\n", (NOBODY, NOBODY))
    key = tree / SSL[1:] / pair / "key.pem"
    assert store.beside.own(NAME, pair, (NOBODY, NOBODY), b"key\n")
    key.unlink()
    if how in ("hard link", "other bytes"):
        (os.link if how == "hard link" else os.rename)(secret, key)
        secret = key
    elif how == "link":
        key.symlink_to(secret)
    elif how == "fifo":
        os.mkfifo(key)
    assert not store.beside.own(NAME, pair, (NOBODY, NOBODY), b"key\n")
    found = os.stat(secret)
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)


@as_root
def test_a_package_script_gives_a_pair_to_others(store, tree):
    """It changes what links lead to: before each rename the key is its account's alone again, and the folder ours, and open to that account."""
    folder = tree / SSL[1:] / store.beside.make_pair(NAME, b"leaf\n", b"key\n", (NOBODY, NOBODY))
    for path, owner, mode in ((folder, NOBODY, 0o700), (folder / "key.pem", 0, 0o644)):
        os.chown(path, owner, owner)
        path.chmod(mode)
    assert store.beside.own(NAME, folder.name, (NOBODY, NOBODY), b"key\n")
    found = [os.stat(path) for path in (folder, folder / "key.pem")]
    assert [(one.st_uid, one.st_gid, stat.S_IMODE(one.st_mode)) for one in found] == [(0, 0, 0o755), (NOBODY, NOBODY, 0o400)]


def test_a_folder_that_takes_no_file_is_found_out_when_it_is_too_late(store, tree):
    """Before anything is asked for, a file is really made beside the agent's name; and none is left."""
    before = sorted(os.listdir(tree / SSL[1:]))
    with Failing("write", 0, errno.EROFS), pytest.raises(HostError, match="Read-only file system"):
        store.beside.check_folder(NAME)
    store.beside.check_folder(NAME)
    assert sorted(os.listdir(tree / SSL[1:])) == before


def test_folders_deeper_than_any_of_ours(store, tree):
    """A thousand of them in one another must not end in a fault of the program: they are named, and stay."""
    pair = tree / SSL[1:] / "scx-enroll-pair-1"
    (pair / ("a/" * 200)).mkdir(parents=True)
    with pytest.raises(HostError, match="scx-enroll-pair-1: it holds folders deeper"):
        store.beside.remove_pairs(NAME)
    assert held_open() < 50


def test_the_name_is_absent_for_an_instant(store, tree):
    """The agent's packages overwrite the key when the name dangles or is gone: at no instant of 500 swaps it is."""
    for name in ("a", "b"):
        store.beside.make_copy(NAME, name, b"leaf\n", place())
    path, stop, missing, looked = str(tree / NAME[1:]), threading.Event(), [], [0]

    def look():
        while not stop.is_set():
            try:
                os.stat(path)
                looked[0] += 1
            except OSError as problem:
                missing.append(problem)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for turn in range(500):
            if turn % 5 == 4:
                store.beside.swap(NAME, place(kind="file"), b"leaf\n")
            else:
                store.beside.swap(NAME, place(text="ab"[turn % 2]))
    finally:
        stop.set()
        thread.join()
    assert missing == []
    assert looked[0] > 100


def test_a_swap_writes_through_the_link(store, tree):
    """What the link led to is somebody else's file and stays as it was."""
    store.beside.swap(NAME, place(kind="file"), b"new\n")
    assert (tree / SSL[1:] / "omi-host-h.pem").read_bytes() == b"own\n"
    assert (tree / NAME[1:]).read_bytes() == b"new\n"
    assert not (tree / NAME[1:]).is_symlink()


# -- failures of the disk -------------------------------------------------------------------------------------------

CHANGES = {
    "save_journal": lambda s: s.save_journal(j.Journal(hold="new")),
    "save_budget": lambda s: s.save_budget(j.Budget(restarts=(1,))),
    "add_generation": lambda s: s.add_generation(generation(2)),
    "save_original": lambda s: s.save_original(b"x", "b" * 64),
    "save_page": lambda s: s.save_page("<html>", 8),
    "save_premises": lambda s: s.save_premises(b"{}"),
    "publish": lambda s: s.publish('{"new": 1}\n'),
    "make_copy": lambda s: s.beside.make_copy(NAME, s.beside.free_copy(NAME, ID), b"x", place()),
    "swap": lambda s: s.beside.swap(NAME, place(text="omi-host-h.pem")),
    "swap_file": lambda s: s.beside.swap(NAME, place(kind="file"), b"own\n"),
    "set_marker": lambda s: s.beside.set_marker(f"{SSL}/.omi_cert_marker", present=True),
    "no_marker": lambda s: s.beside.set_marker(f"{SSL}/.omi_cert_marker", present=False),
    "prune": lambda s: s.prune(),
    "sweep": lambda s: s.beside.sweep(NAME, ()),
    "check_folder": lambda s: s.beside.check_folder(NAME),
    "make_pair": lambda s: s.beside.make_pair(NAME, b"leaf", b"key", ME),
    "point": lambda s: s.beside.point(NAME, "scx-enroll-pair-1"),
    "own": lambda s: s.beside.own(NAME, s.beside.make_pair(NAME, b"leaf", b"key", ME), ME, b"key"),
    "remove_pairs": lambda s: s.beside.remove_pairs(NAME),
    "save_baked_in": lambda s: s.beside.save_baked_in(f"{SSL}/omikey.pem", ("a",)),
    "none_baked_in": lambda s: s.beside.save_baked_in(f"{SSL}/omikey.pem", ()),
}
FAULTS = ["write", "fsync", "rename", "link", "symlink", "mkdir", "unlink", "rmdir", "open", "fchmod", "fchown", "listdir"]


@pytest.mark.parametrize(
    ("change", "code"), [*((change, errno.ENOSPC) for change in CHANGES), ("save_journal", errno.EIO), ("swap", errno.EROFS)]
)
def test_a_disk_that_fails_at_any_call(tree, change, code):
    """HostError with a hint, the previous journal readable, the agent's name never dangling, no descriptor left open."""
    root = Root(str(tree))
    store = Store(root)
    with store.lock(0, silent):
        everything(store)
        for number in range(9):
            store.add_generation(generation(100 + number))
        (tree / SSL[1:] / f"scx-enroll-{'e' * 16}-1.pem").write_bytes(b"")
        failed = 0
        for name in FAULTS:
            for count in range(12):
                with Failing(name, count, code) as hit:
                    opened = held_open()
                    try:
                        CHANGES[change](store)
                    except HostError as problem:
                        assert problem.hint
                        failed += 1
                    assert held_open() == opened, f"{name} {count}"
                if not hit:
                    break
                again = Store(root)
                again.load()
                assert again.journal.hold in ("x", "new")
                assert again.journal.hold == "x" or change == "save_journal"
                assert (tree / NAME[1:]).exists(), f"{name} {count}"
                for one in os.listdir(tree / SSL[1:]):
                    if one.startswith(stores.TEMPORARY):
                        assert name == "unlink", f"{name} {count}: nobody clears the agent's folder until the next installation"
                        os.unlink(tree / SSL[1:] / one)
        assert failed > 0
        assert len(store.generations()) >= 8
        CHANGES[change](store)
    with Store(root).lock(0, silent):
        pass
    left = [name for folder in os.walk(tree / STATE[1:]) for name in (*folder[1], *folder[2]) if name.startswith(stores.TEMPORARY)]
    assert left == [], "what a failure left is gone after the next run has begun"


class Failing:
    """The call `os.name` fails the `count`th time; entering gives a list that is filled when it did."""

    def __init__(self, name, count, code):
        self.name, self.count, self.code, self.hit = name, count, code, []

    def __enter__(self):
        self.real = real = getattr(os, self.name)
        left = [self.count]

        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == -1:
                self.hit.append(self.name)
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        setattr(os, self.name, call)
        return self.hit

    def __exit__(self, *_):
        setattr(os, self.name, self.real)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "ReadWritePaths="), (errno.EACCES, "root"),
        (errno.EPERM, "lsattr"), (errno.EIO, "kernel's log"), (errno.EMFILE, "mend the cause"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_failure_of_the_disk_without_the_next_act(store, code, word):
    """What the operator can do about each of them, with the path and the system's own words."""
    with Failing("fsync", 0, code), pytest.raises(HostError) as caught:
        store.save_journal(j.Journal())
    assert caught.value.message == f"can't write {STATE}/journal.json: {os.strerror(code)}"
    assert word in caught.value.hint


def test_a_disk_that_takes_a_part_of_a_write(store, tree, monkeypatch):
    """A short write is gone on with: a truncated journal would be refused at the next run."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    store.save_journal(j.Journal(hold="x" * 1000))
    monkeypatch.undo()
    again = Store(Root(str(tree)))
    again.load()
    assert again.journal.hold == "x" * 1000


def test_a_full_disk_is_noticed_before_anything_is_sent(store, monkeypatch):
    """Preflight: no certificate is asked for that could not be stored."""
    free = os.fstatvfs(0)

    def full(fd):
        return os.statvfs_result((*free[:4], 10, *free[5:]))

    monkeypatch.setattr(os, "fstatvfs", full)
    for check in (store.check_state, lambda: store.beside.check_folder(NAME)):
        with pytest.raises(HostError, match="No space left") as caught:
            check()
        assert "free some space" in caught.value.hint


def test_a_preflight_that_leaves_something_behind(store, tree):
    """The file that was tried is removed again."""
    before = sorted(os.listdir(tree / SSL[1:])), sorted(os.listdir(tree / STATE[1:]))
    store.beside.check_folder(NAME)
    store.check_state()
    assert (sorted(os.listdir(tree / SSL[1:])), sorted(os.listdir(tree / STATE[1:]))) == before


def test_the_journal_in_memory_is_another_than_on_the_disk(store, tree, monkeypatch):
    """A change that failed before its rename is not remembered as done."""
    store.save_journal(j.Journal(hold="old"))
    with Failing("fsync", 0, errno.EIO), pytest.raises(HostError, match=r"journal\.json.*"):
        store.save_journal(j.Journal(hold="new"))
    assert store.journal.hold == "old"
    again = Store(Root(str(tree)))
    again.load()
    assert again.journal.hold == "old"


def test_an_illegal_event_changes_the_disk(store, tree):
    """A defect of the driver is refused before anything is written."""
    before = beneath(tree, f"{STATE}/journal.json").exists()
    with pytest.raises(EnrollError, match="illegal transition: obtained in state none"):
        store.request("obtained")
    with pytest.raises(EnrollError, match="illegal transition: proved in state settled"):
        store.installation("proved")
    assert beneath(tree, f"{STATE}/journal.json").exists() == before


def test_a_state_at_rest_remembers_what_it_should_forget(store, tree):
    """Back in `none` and `settled` nothing of the request or the installation is left; other fields go with the same write."""
    store.request("submit", ca="ca01", csr="x", tries=1)
    store.request("identified", id=7)
    store.request("abandoned")
    store.installation("install", target=place(), previous=place(), hold="h")
    assert store.journal.installation.hold == "h"
    store.installation("undone", also={"hold": "why"})
    again = Store(Root(str(tree)))
    again.load()
    assert again.journal == store.journal == j.Journal(hold="why")


# -- what a killed run left -----------------------------------------------------------------------------------------


def test_temporaries_of_a_killed_run_stay_for_ever(tree):
    """In the state directory the next run's lock removes them, folders too; in the agent's folder `sweep` does."""
    with Store(Root(str(tree))).lock(0, silent):
        pass
    state = tree / STATE[1:]
    for sub in ("", "generations", "original", "pages"):
        (state / sub / f"{stores.TEMPORARY}aa").write_bytes(b"half")
    (state / "generations" / f"{stores.TEMPORARY}bb").mkdir()
    (state / "generations" / f"{stores.TEMPORARY}bb" / "cert.pem").write_bytes(b"half")
    (tree / SSL[1:] / f"{stores.TEMPORARY}cc").symlink_to("x")
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        store.beside.sweep(NAME, ())
    left = [name for folder in os.walk(tree) for name in (*folder[1], *folder[2]) if name.startswith(stores.TEMPORARY)]
    assert left == []


def test_a_temporary_of_the_status_file_stays_for_ever(tree):
    """docs/state.md: one that a killed run left is removed by the next; /run is no exception."""
    folder = beneath(tree, STATUS).parent
    folder.mkdir(parents=True)
    (folder / f"{stores.TEMPORARY}aa").write_bytes(b"half")
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        store.publish("{}\n")
    assert os.listdir(folder) == ["status.json"]


@pytest.mark.parametrize("missing", ["cert.pem", "chain.pem", "meta.json"])
def test_a_generation_that_lost_a_file_is_never_whole_again(store, tree, missing):
    """The hint for a damaged meta.json is to move it away; then the same certificate, adopted or obtained, must be kept anew."""
    store.add_generation(generation(5))
    beneath(tree, f"{STATE}/generations/{5:016x}/{missing}").unlink()
    assert store.generations() == ()
    store.add_generation(generation(5))
    assert [(g.id, g.certificate) for g in store.generations()] == [(f"{5:016x}", b"leaf 5\n")]


def test_a_generation_whose_run_is_killed_at_once_is_taken_for_a_backups(store, tree):
    """The journal knows its number before it stands there: what is newer than the journal is another time's."""
    store.add_generation(generation(5))
    again = Store(store.root)
    again.load()
    assert again.journal.newest == max(one.origin.number for one in again.generations())


def test_a_generation_is_changed_once_it_is_there(store):
    """The certificate of record stays, and where it came from."""
    store.add_generation(generation(5))
    before = store.generations()
    store.add_generation(Generation(f"{5:016x}", b"other", b"other", j.Origin(how="adopted")))
    assert store.generations() == before
    assert before[0].certificate == b"leaf 5\n"


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100])
def test_a_damaged_generation_is_told_with_its_path(store, tree, content):
    """HostError naming the file, as for the journal."""
    store.add_generation(generation(5))
    beneath(tree, f"{STATE}/generations/{5:016x}/meta.json").write_bytes(content)
    with pytest.raises(HostError, match=f"{5:016x}/meta.json is not understood"):
        store.generations()


# -- nobody leads us elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [STATE, f"{STATE}/generations", f"{STATE}/original", f"{STATE}/pages"])
@as_root
def test_a_link_planted_by_another_user_in_place_of_a_folder(tree, tmp_path, victim):
    """Nothing is written where it leads, inside the root or outside."""
    with Store(Root(str(tree))).lock(0, silent):
        pass
    inside = tree / "elsewhere"
    inside.mkdir(mode=0o700)
    path = beneath(tree, victim)
    path.rename(tmp_path / "away")
    path.symlink_to("/elsewhere")
    os.lchown(path, NOBODY, NOBODY)
    with pytest.raises(HostError) as caught, Store(Root(str(tree))).lock(0, silent):
        pass
    assert caught.value.hint
    assert os.listdir(inside) == []


def test_a_link_planted_in_place_of_the_state_directory_leads_out(tree, tmp_path):
    """An absolute link stays inside the root: the folder of the same name outside is not touched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    state = beneath(tree, STATE)
    state.parent.mkdir(parents=True)
    state.symlink_to(outside)
    with pytest.raises(HostError), Store(Root(str(tree))).lock(0, silent):
        pass
    assert os.listdir(outside) == []


@pytest.mark.parametrize("name", ["lock", "journal.json"])
def test_a_link_planted_in_place_of_a_file(tree, tmp_path, name):
    """The lock is not opened through it (O_NOFOLLOW), the journal is replaced and not written through."""
    with Store(Root(str(tree))).lock(0, silent):
        pass
    target = tree / "victim"
    target.write_bytes(b"untouched")
    path = beneath(tree, f"{STATE}/{name}")
    path.unlink(missing_ok=True)
    path.symlink_to("/victim" if name != "lock" else str(target))
    store = Store(Root(str(tree)))
    with pytest.raises(HostError), store.lock(0, silent):
        pass
    if name != "lock":
        store.save_journal(j.Journal())
        assert not path.is_symlink()
    assert target.read_bytes() == b"untouched"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_state_directory_that_others_may_write(tree, mode):
    """Refused with the command that mends it; nothing is read from it or made in it."""
    state = beneath(tree, STATE)
    state.mkdir(parents=True)
    state.chmod(mode)
    with pytest.raises(HostError, match="not ours alone") as caught, Store(Root(str(tree))).lock(0, silent):
        pass
    assert "chmod 0700" in caught.value.hint
    assert os.listdir(state) == []


@as_root
def test_a_state_directory_of_another_user(tree):
    """Its owner could replace every file in it."""
    state = beneath(tree, STATE)
    state.mkdir(parents=True)
    os.chown(state, NOBODY, NOBODY)
    with pytest.raises(HostError, match=f"owner {NOBODY}"), Store(Root(str(tree))).lock(0, silent):
        pass


@as_root
@pytest.mark.parametrize("change", [lambda p: os.chown(p, NOBODY, NOBODY), lambda p: os.chmod(p, 0o666)], ids=["owner", "mode"])
def test_a_journal_that_another_user_could_have_written(tree, change):
    """It says what to install and what to put back: only root's word is taken."""
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        store.save_journal(j.Journal())
    change(beneath(tree, f"{STATE}/journal.json"))
    with pytest.raises(HostError, match=r"journal\.json"):
        Store(Root(str(tree))).load()


@pytest.mark.parametrize("name", [f"{stores.TEMPORARY}evil", f"scx-enroll-{'a' * 16}-1.pem"])
def test_a_folder_planted_under_a_name_of_ours_stops_every_run(store, tree, name):
    """The agent's account may make folders beside its certificate: `sweep` passes over one, it is none of our copies."""
    (tree / SSL[1:] / name).mkdir()
    (tree / SSL[1:] / f"scx-enroll-{'b' * 16}-1.pem").write_bytes(b"")
    store.beside.sweep(NAME, ())
    assert (tree / SSL[1:] / name).is_dir()
    assert not (tree / SSL[1:] / f"scx-enroll-{'b' * 16}-1.pem").exists()


def test_what_is_damaged_is_kept(tree):
    """A journal that is not understood ends the run, before anything else is done, and stays for who looks into it."""
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        store.save_journal(j.Journal())
    beneath(tree, f"{STATE}/journal.json").write_bytes(b"{")
    with pytest.raises(HostError, match="not understood"), Store(Root(str(tree))).lock(0, silent):
        pytest.fail("the run went on")
    assert beneath(tree, f"{STATE}/journal.json").read_bytes() == b"{"


# -- the lock -------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from scx_enroll.rootfs import Root
from scx_enroll.store import Store
store = Store(Root(sys.argv[1]))
with store.lock(0, lambda message: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tree):
    """Another process that holds the lock until it is told or killed."""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(PACKAGE)}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tree)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/"
    )
    assert child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.communicate()


def test_two_runs_at_once(tree, holder):
    """The second ends at once with status 11 and names the first; nothing is read or written by it."""
    with pytest.raises(Busy, match=rf"process {holder.pid}\b") as caught, Store(Root(str(tree))).lock(0, silent):
        pass
    assert caught.value.exit_status == 11
    assert "--wait" in caught.value.hint
    holder.communicate(b"\n")
    with Store(Root(str(tree))).lock(0, silent):
        assert beneath(tree, f"{STATE}/lock").read_bytes() == b"process %d\n" % os.getpid()


def test_a_run_that_waits_gets_the_lock_when_it_is_free(tree, holder):
    """With --wait it goes on as soon as the first has ended, and tells a person what it waits for."""
    told = []

    def waiting(message):
        told.append(message)
        if holder.poll() is None:
            holder.communicate(b"\n")

    began = time.monotonic()
    with Store(Root(str(tree))).lock(30, waiting):
        assert time.monotonic() - began < 10
    assert told[0] == f"waiting for the lock, held by process {holder.pid}"


def test_a_run_that_waits_in_vain(tree, holder):
    """It ends as busy when its time is over, not before and not much later."""
    began = time.monotonic()
    with pytest.raises(Busy), Store(Root(str(tree))).lock(0.5, silent):
        pass
    assert 0.5 <= time.monotonic() - began < 5


def test_a_killed_run_keeps_the_lock(tree, holder):
    """kill -9: the kernel releases it, the file stays, and the next run is not told of a holder that is dead."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Store(Root(str(tree))).lock(0, silent):
        pass
    assert beneath(tree, f"{STATE}/lock").exists()


def test_an_agent_that_was_started_holds_the_lock(tree):
    """The descriptor is not inherited: what a run starts may live for months."""
    store = Store(Root(str(tree)))
    with store.lock(0, silent):
        child = subprocess.Popen(["/bin/sh", "-c", "echo started; exec sleep 60"], stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout.readline()
    try:
        with Store(Root(str(tree))).lock(0, silent):
            pass
    finally:
        child.kill()
        child.communicate()


def test_the_lock_is_released_after_a_failure(tree):
    """An error in the run leaves neither the lock nor a descriptor."""
    opened = held_open()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Store(Root(str(tree))).lock(0, silent):
            raise ZeroDivisionError
    assert held_open() == opened


def test_a_flock_that_fails_otherwise_is_not_taken_for_a_holder(tree, monkeypatch):
    """ENOLCK from a network file system is this host's trouble, not a run that will end."""

    def flock(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(HostError, match="lock"), Store(Root(str(tree))).lock(0, silent):
        pass


# -- what is kept and what goes -------------------------------------------------------------------------------------


def test_prune_removes_what_a_rollback_needs(store):
    """The newest 8 stay and every one that a place of the journal or a failure refers to."""
    for number in range(1, 16):
        store.add_generation(generation(number))
    store.save_journal(
        j.Journal(
            installed=place(generation=f"{1:016x}"),
            before=place(generation=f"{2:016x}"),
            original=place(generation=f"{3:016x}"),
            installation=j.Installation("installing", target=place(generation=f"{4:016x}"), previous=place(generation=f"{5:016x}")),
            skipped=(j.Skip(f"{6:016x}", "i", 1, 1, "later", 9, "m"),),
        )
    )
    store.prune()
    assert ids(store) == [1, 2, 3, 4, 5, 6, *range(8, 16)]
    store.save_journal(j.Journal())
    store.prune()
    assert ids(store) == list(range(8, 16))


def test_prune_keeps_the_newest_by_order_not_by_name_or_clock(store):
    """The id is a hash: its order means nothing; a clock that was set back does not make a new certificate an old one."""
    for number in range(10, 0, -1):
        store.add_generation(generation(number, obtained=number))
    store.prune()
    assert ids(store) == list(range(8, 0, -1))


def test_prune_removes_original_bytes_that_are_referred_to(store, tree):
    """What an installation replaced can be put back for as long as the journal knows of it."""
    names = []
    for number in range(12):
        names.append(store.save_original(b"%d" % number, f"{number:064x}"))
        os.utime(beneath(tree, f"{STATE}/original/{names[-1]}"), (number, number))
    store.save_journal(j.Journal(original=place(kind="file", saved=names[0]), before=place(kind="file", saved=names[2])))
    store.prune()
    assert sorted(os.listdir(beneath(tree, f"{STATE}/original"))) == sorted([names[0], names[2], *names[4:]])
    assert store.original(names[0]) == b"0"


def test_pages_fill_the_disk(store, tree):
    """The newest five skeletons stay; the path told is the one there."""
    for number in range(9):
        path = store.save_page("<html>", 1000 + number)
        os.utime(beneath(tree, path), (number, number))
    assert sorted(os.listdir(beneath(tree, f"{STATE}/pages"))) == [f"{1000 + number}.html" for number in range(4, 9)]
    assert beneath(tree, path).read_bytes() == b"<html>"


def test_sweep_removes_a_copy_that_is_in_use(store, tree):
    """A copy that any link of the folder leads to stays, relative or absolute, and what the caller names."""
    ssl = tree / SSL[1:]
    copies = [f"scx-enroll-{ID}-{number}.pem" for number in range(1, 6)]
    for copy in copies:
        (ssl / copy).write_bytes(b"leaf\n")
    store.beside.swap(NAME, place(text=copies[0]))
    (ssl / "other.pem").symlink_to(f"{SSL}/{copies[1]}")
    store.beside.sweep(NAME, (copies[2],))
    assert [copy for copy in copies if (ssl / copy).exists()] == copies[:3]


@pytest.mark.parametrize(
    "name",
    [
        "omi-host-h.pem", "omikey.pem", f"scx-enroll-{ID}-1.pem.bak", f"scx-enroll-{ID.upper()}-1.pem", f"scx-enroll-{ID}-.pem",
        f"scx-enroll-{ID[:-1]}-1.pem", f"scx-enroll-{ID}-0123456789.pem", "scx-enroll.pem", ".omi_cert_marker", f"a scx-enroll-{ID}-1.pem",
        f"scx-enroll-{ID}-1.pem\n",
    ],
)
def test_sweep_removes_a_file_of_a_stranger(store, tree, name):
    """Only names that this program makes are its own."""
    (tree / SSL[1:] / name).write_bytes(b"a stranger's")
    store.beside.sweep(NAME, ())
    assert (tree / SSL[1:] / name).read_bytes() == b"a stranger's"


def test_the_marker_goes_and_comes_back(store, tree):
    """Removing one that is not there, and making one that is, change nothing."""
    marker = f"{SSL}/.omi_cert_marker"
    for present in (False, True, True, False, False):
        store.beside.set_marker(marker, present=present)
        assert beneath(tree, marker).exists() is present


def test_the_newest_generation_is_the_last(store):
    """In the order in which they were obtained, whatever the clock said; names that are none of ours are passed over."""
    for number, obtained in ((3, 10), (1, 30), (2, 20), (9, 5)):
        store.add_generation(generation(number, obtained=obtained))
    os.mkdir(f"{store.root.path}{STATE}/generations/lost+found")
    assert ids(store) == [3, 1, 2, 9]
    store.save_journal(j.Journal())
    store.prune()
    store.add_generation(generation(4, obtained=1))
    assert ids(store) == [3, 1, 2, 9, 4]
