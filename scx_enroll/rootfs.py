"""Files beneath the root, which nobody else opens.

A path is walked one component at a time, each opened with O_NOFOLLOW from its parent's descriptor, and links are followed
here, inside the root: absolute ones start at the root and ".." stops there, as in a chroot. So neither an image's tree nor
a folder that a less privileged user may write to leads root elsewhere. A link made by neither root nor ourselves (nor the
tree's owner) may only lead to what its maker owns, as in systemd's CHASE_SAFE.
"""

import errno
import os
import stat
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Set, Tuple

from scx_enroll import idle
from scx_enroll.errors import HostError

MAX_LINKS = 40  # hops, as the kernel's MAXSYMLINKS (path_resolution(7))
MAX_DEPTH = 128  # folders held open at once: far below RLIMIT_NOFILE's usual 1024

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # a pipe must not hold us up
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_HINTS = {
    errno.EACCES: "run it as root",
    errno.EPERM: "run it as root",
    errno.EIO: "the disk reported an error: see the kernel's log",
    errno.ELOOP: "somebody is changing this path now; run again once that has ended",
}


@dataclass(frozen=True)
class Entry:
    """What stands at one name; nothing followed.

    `path` is beneath the root with its parents resolved; `kind` is file, link, dir, other or absent; `text` is a link's;
    `mode` holds the permission bits; times are in nanoseconds.
    """

    path: str
    kind: str
    text: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    device: int = 0
    inode: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


@dataclass
class Notes:
    """What a run has looked at, by paths of this host: all that its decision can rest on, since nobody else opens files.

    The words are those of `idle`. `looked`: what stood there, None where two looks saw different things or where more than they
    see counts; `changed_ns`: when
    that, or the names in a folder that was read, changed last; `unlocked`: files whose locks were looked at; `ended`: processes
    that files name and that were gone; `units`: services and the states that systemd gave; `said`: what
    files of the kernel's held.
    """

    since_ns: int = field(default_factory=time.time_ns)
    looked: Dict[str, Optional[str]] = field(default_factory=dict)
    listed: Dict[str, str] = field(default_factory=dict)
    unlocked: Set[str] = field(default_factory=set)
    ended: Set[int] = field(default_factory=set)
    changed_ns: Dict[str, int] = field(default_factory=dict)
    units: Dict[str, str] = field(default_factory=dict)
    said: Dict[str, str] = field(default_factory=dict)

    def look(self, path: str, found: Optional[os.stat_result]) -> None:
        """Note what stands at a path, None for nothing."""
        word = idle.facts(found) if found else ""
        self.looked[path] = word if self.looked.get(path, word) == word else None
        if found and not stat.S_ISDIR(found.st_mode):
            self.changed_ns[path] = found.st_ctime_ns

    def read_names(self, path: str, found: os.stat_result) -> None:
        """Note that the names in a folder are read."""
        self.listed[path], self.changed_ns[path] = idle.listed(found), found.st_ctime_ns


@dataclass(frozen=True)
class _Place:
    """Where a walk ended: the last open folder, the name in it, what stands there ("absent" may lie deeper)."""

    parent: int
    name: str
    entry: Entry
    way: Tuple[str, ...]  # the folders in which a name was looked for


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise HostError for any OSError but the absence of `path`, which is FileNotFoundError."""
    try:
        yield
    except OSError as problem:
        if problem.errno in _ABSENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from problem
        why = problem.strerror or str(problem)
        hint = _HINTS.get(problem.errno or 0, "mend the cause and run again")
        raise HostError(f"can't read {path}: {why}", hint) from problem


def _entry(path: str, parent: int, name: str, found: os.stat_result) -> Entry:
    kinds = {stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFDIR: "dir"}
    kind = kinds.get(stat.S_IFMT(found.st_mode), "other")
    return Entry(
        path,
        kind,
        text=os.readlink(name, dir_fd=parent) if kind == "link" else "",
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        device=found.st_dev,
        inode=found.st_ino,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def _parts(path: str) -> List[str]:
    """Return the components of `path`, the last one first."""
    return [part for part in reversed(path.split("/")) if part]


def _bounded(fd: int, path: str, limit: int) -> bytes:
    """Read the whole of `fd`, and close it; HostError if there are more than `limit` bytes."""
    with open(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise HostError(f"{path} is longer than {limit} bytes", "see what stands there: this file should be small")
    return data


class _Folders:
    """The open folders from the root down to where a walk has come."""

    def __init__(self, base: int) -> None:
        self._fds = [base]
        self._names = [""]

    @property
    def fd(self) -> int:
        """The folder reached."""
        return self._fds[-1]

    def path(self, *names: str) -> str:
        """Return the path of the folder reached, and `names` below it."""
        return "/".join([*self._names, *names]) or "/"

    def enter(self, name: str) -> None:
        """Go down into `name`, which is not a link."""
        if len(self._fds) > MAX_DEPTH:
            raise HostError(f"{self.path()} is more than {MAX_DEPTH} folders deep", "give a shorter path")
        self._fds.append(os.open(name, _FOLDER, dir_fd=self.fd))
        self._names.append(name)

    def leave(self, count: int) -> None:
        """Go up `count` folders, at most to the root."""
        for _ in range(min(count, len(self._fds) - 1)):
            os.close(self._fds.pop())
            self._names.pop()

    def close(self) -> None:
        """Close all of them."""
        for fd in self._fds:
            os.close(fd)


class Root:
    """The tree that all paths are taken beneath.

    `live`: the agent of this tree runs here, so it may be probed and restarted; always so for "/".
    """

    def __init__(self, path: str = "/", live: bool = False, notes: Optional[Notes] = None) -> None:  # noqa: FBT001, FBT002 - as it is named
        self.path = os.path.realpath(path)
        self.live = live or self.path == "/"
        self.notes = notes or Notes()

    def aside(self) -> "Root":
        """Return the same tree, for looks that no decision rests on."""
        return Root(self.path, self.live)

    def _look(self, path: str, parent: int, name: str) -> Entry:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        self.notes.look(self._outside(path), found)
        return _entry(path, parent, name, found)

    def _outside(self, path: str) -> str:
        return self.path.rstrip("/") + path

    @contextmanager
    def _walk(self, path: str, *, follow: bool) -> Iterator[_Place]:
        """Walk to `path`; the last name is followed, too, if `follow`.

        Raises HostError for a loop, a folder that can't be read, and a link that its maker's rights don't cover.
        """
        if not path.startswith("/") or "\0" in path:
            raise HostError(f"{path!r} is not an absolute path", "give paths from the root of the tree")
        try:
            base = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as problem:
            raise HostError(f"can't open the root {self.path}: {problem.strerror}", "give an existing folder") from problem
        folders = _Folders(base)
        try:
            trusted = {0, os.geteuid(), os.fstat(base).st_uid}
            with _explained(path):
                place, makers = self._steps(path, folders, follow=follow)
            strangers: Set[int] = makers - trusted - {place.entry.uid}
            if strangers and place.entry.kind != "absent":
                hint = "see who made that link and why; if it is right: chown -h root LINK"
                raise HostError(f"{path} leads through a link of user {min(strangers)} to what another user owns", hint)
            yield place
        finally:
            folders.close()

    def _steps(self, path: str, folders: _Folders, *, follow: bool) -> Tuple[_Place, Set[int]]:
        """Take every step; return where they led and who made the links on the way."""
        todo, hops, makers, way = _parts(path), 0, set(), []
        while todo:
            name = todo.pop()
            way.append(folders.path())
            try:
                if name in (".", ".."):
                    folders.leave(1 if name == ".." else 0)
                    continue
                entry = self._look(folders.path(name), folders.fd, name)
                if entry.kind == "link" and (todo or follow):
                    hops += 1
                    if hops > MAX_LINKS:
                        raise HostError(f"{path} leads through more than {MAX_LINKS} links", f"see where: readlink {entry.path}")
                    makers.add(entry.uid)
                    folders.leave(MAX_DEPTH if entry.text.startswith("/") else 0)
                    todo.extend(_parts(entry.text))
                elif todo:
                    folders.enter(name)
                else:
                    return _Place(folders.fd, name, entry, tuple(way)), makers
            except (FileNotFoundError, NotADirectoryError) as missing:
                absent = Entry(folders.path(name, *reversed(todo)), "absent")
                if isinstance(missing, FileNotFoundError):  # what is no folder was noted when it was looked at
                    self.notes.look(self._outside(folders.path(name)), None)
                return _Place(folders.fd, name, absent, tuple(way)), makers
        return _Place(folders.fd, ".", self._look(folders.path(), folders.fd, "."), tuple(way)), makers

    def entry(self, path: str) -> Entry:
        """Return what stands at `path`: its parents are followed inside the root, the last name is not."""
        with self._walk(path, follow=False) as place:
            return place.entry

    def resolve(self, path: str) -> Entry:
        """Return what `path` leads to inside the root; "absent" if it dangles. Raises HostError for a loop."""
        with self._walk(path, follow=True) as place:
            return place.entry

    def way(self, path: str) -> Tuple[str, ...]:
        """Return every folder that somebody goes through to get to a file, those of each link on the way included."""
        with self._walk(path, follow=True) as place:
            return tuple(dict.fromkeys(place.way))

    def host_path(self, path: str) -> str:
        """Return the path outside the root, all links resolved inside it: for messages and for starting programs."""
        return self._outside(self.resolve(path).path)

    def open_dir(self, path: str) -> int:
        """Return a descriptor of a folder, for the caller to close. FileNotFoundError if absent, else HostError."""
        with self._walk(path, follow=True) as place:
            self._demand(path, place, "dir", "folder")
            with _explained(path):
                return os.open(place.name, _FOLDER, dir_fd=place.parent)

    def open_file(self, path: str) -> int:
        """Return a descriptor of a regular file, for the caller to close. FileNotFoundError if absent, else HostError."""
        with self._walk(path, follow=True) as place:
            self._demand(path, place, "file", "regular file")
            with _explained(path):
                fd = os.open(place.name, _FILE, dir_fd=place.parent)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != place.entry.uid:
            os.close(fd)
            raise HostError(f"{path} was replaced while it was opened", "run again once its files are quiet")
        return fd

    @staticmethod
    def _demand(path: str, place: _Place, kind: str, name: str) -> None:
        if place.entry.kind == "absent":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if place.entry.kind != kind:
            raise HostError(f"{path} is not a {name}", "see what stands there and move it away")

    def read(self, path: str, limit: int, *, private: bool = False, trusted: bool = False) -> bytes:
        """Return the whole of a regular file of at most `limit` bytes.

        `trusted`: owned by root or by us, and not writable by anybody else; `private`: nor readable by anybody else.
        Raises FileNotFoundError if it is absent or dangles, HostError otherwise.
        """
        fd = self.open_file(path)
        try:
            found = os.fstat(fd)
            if (private or trusted) and found.st_uid not in (0, os.geteuid()):
                raise HostError(f"{path} belongs to user {found.st_uid}, not to root", f"chown root {path}")
            if private and found.st_mode & 0o077:
                raise HostError(f"{path} is open to others than its owner", f"chmod 600 {path}")
            if trusted and found.st_mode & 0o022:
                raise HostError(f"{path} can be written by others than its owner", f"chmod go-w {path}")
        except HostError:
            os.close(fd)
            raise
        with _explained(path):
            return _bounded(fd, path, limit)

    def kernel_says(self, path: str) -> bytes:
        """Return what a small file of the kernel's holds; none where it can't be read. It is noted by that, not by its times."""
        real = self.aside().host_path(path)
        self.notes.said[real] = idle.says(real)
        return bytes.fromhex(self.notes.said[real])

    def listdir(self, path: str) -> Tuple[str, ...]:
        """Return the names in a folder, sorted; none if it is absent."""
        try:
            fd = self.open_dir(path)
        except FileNotFoundError:
            return ()
        try:
            with _explained(path):
                self.notes.read_names(self.host_path(path), os.fstat(fd))
                return tuple(sorted(os.listdir(fd)))
        finally:
            os.close(fd)

    def has_acl(self, path: str) -> bool:
        """Say whether an access control list may allow more than the mode of `path` tells; no premise tells when that changes."""
        with self._walk(path, follow=True) as place, suppress(OSError):  # none, or a file system without them
            self.notes.looked[self._outside(place.entry.path)] = None
            name = f"/proc/self/fd/{place.parent}/{place.name}"
            return bool(os.getxattr(name, "system.posix_acl_access", follow_symlinks=False))
        return False

    def is_locked(self, path: str) -> bool:
        """Tell whether another process holds a write lock on a file; one that is absent is not locked."""
        try:
            fd = self.open_file(path)
        except FileNotFoundError:
            return False
        try:
            with _explained(path):
                self.notes.unlocked.add(self.host_path(path))
                return idle.is_locked(fd)
        finally:
            os.close(fd)


def read_argument(path: str, limit: int) -> bytes:
    """Return the bytes of a file named on the command line ("-" is standard input): an ordinary path, not beneath a root.

    Raises HostError if it can't be read or is longer than `limit` bytes.
    """
    try:
        fd = os.dup(sys.stdin.fileno()) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return _bounded(fd, path, limit)
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise HostError(f"can't read {path}: {why}", "name a file that exists and that you may read") from problem
