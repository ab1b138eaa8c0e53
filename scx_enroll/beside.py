"""The only writer in the agent's folders: copies beside the name the agent reads, the swap of that name, the marker.

docs/state.md lists every change; each is one method here. A change is durable when its method returns, or it did not happen.
The folders may be writable by the agent's less privileged account, so names in them are never followed.
"""

import errno
import os
import re
import secrets
import stat
from contextlib import contextmanager, suppress
from itertools import count
from typing import Iterator, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll.durable import TEMPORARY, explained, move, remove_tree, temporary_file, write
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root

COPY = re.compile(r"scx-enroll-([0-9a-f]{16})-([0-9]{1,9})\.pem")
BAKED_IN = ".scx-enroll-baked-in"  # a dotfile: the agent's packages remove all else in that folder
KEPT_BAKED_IN = 64  # keys; an image made of an image of an image has three
_BAKED_IN_HEAD = "# SHA-256 of public keys (DER) that came with an image: no host may use one. See man scx-enroll, seal.\n"
OF_THE_AGENT = re.compile(r"(omi|scx)-host-.+\.pem|.+\.pem_(temp|backup)")  # what its tool made, and what its scripts put by
ASIDE = "_temp"  # what a package script of the agent's puts behind the names that it moves aside
_ON_ITS_WAY = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")
PAIR_LINK = "scx-enroll-pair"  # both names go through it while a key is changed, to one of the folders
PAIR = re.compile(r"scx-enroll-pair-([0-9]{1,9})")
PAIR_CERTIFICATE, PAIR_KEY = "cert.pem", "key.pem"
MIN_FREE_BYTES = 1 << 20  # what one run writes at the most, several times over


class Beside:
    """The folders that the agent reads from, beneath one root."""

    def __init__(self, root: Root) -> None:
        self.root = root

    @contextmanager
    def folder(self, path: str) -> Iterator[Tuple[int, str]]:
        """Open the folder of a path; gives its descriptor and the name in it. Raises HostError for what fails inside."""
        folder_path, _, name = path.rpartition("/")
        with explained(path):
            folder = self.root.open_dir(folder_path)
            try:
                yield folder, name
            finally:
                os.close(folder)

    def check_folder(self, path: str) -> None:
        """See that a file can be made beside `path` and that there is space. Raises HostError."""
        with self.folder(path) as (folder, _):
            space = os.fstatvfs(folder)
            if space.f_bavail * space.f_frsize < MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.unlink(temporary_file(folder, b"x", 0o600, None), dir_fd=folder)

    def has_strays(self, path: str) -> bool:
        """Say whether a killed run left something on its way beside `path`."""
        return any(name.startswith(TEMPORARY) for name in self.root.listdir(path.rpartition("/")[0]))

    def has_pairs(self, path: str) -> bool:
        """Say whether anything that `remove_pairs` may remove stands beside `path`."""
        return any(name == PAIR_LINK or PAIR.fullmatch(name) for name in self.root.listdir(path.rpartition("/")[0]))

    def free_copy(self, path: str, generation: str) -> str:
        """Return a name for a copy beside `path` that does not exist yet."""
        with self.folder(path) as (folder, _):
            taken = set(os.listdir(folder))
        return next(name for name in (f"scx-enroll-{generation}-{number}.pem" for number in count(1)) if name not in taken)

    def make_copy(self, path: str, name: str, data: bytes, place: j.Place) -> None:
        """Make the copy `name` beside `path`, with the owner and mode of `place`; never over one that exists."""
        with self.folder(path) as (folder, _):
            temporary = temporary_file(folder, data, place.mode, (place.uid, place.gid))
            try:
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            finally:
                os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)

    def swap(self, path: str, place: j.Place, data: Optional[bytes] = None) -> None:
        """Put `place` at the name the agent reads, by one rename: the commit. `data`: of a regular file."""
        with self.folder(path) as (folder, name):
            if data is not None:
                write(folder, name, data, place.mode, (place.uid, place.gid))
                return
            temporary = TEMPORARY + secrets.token_hex(8)
            os.symlink(place.text, temporary, dir_fd=folder)
            move(folder, temporary, name)

    def save_baked_in(self, key: str, listed: Tuple[str, ...]) -> None:
        """Replace the list of baked-in keys beside the agent's key; an empty one is removed."""
        with self.folder(f"{key.rpartition('/')[0]}/{BAKED_IN}") as (folder, name):
            if listed:
                write(folder, name, (_BAKED_IN_HEAD + "".join(f"{one}\n" for one in listed[-KEPT_BAKED_IN:])).encode(), 0o644)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                os.fsync(folder)

    def delete_pair(self, key: str, certificate: str) -> None:
        """Delete the agent's key and the name of its certificate; and beside them our copies, the agent's and what its scripts put by."""
        target = self.root.resolve(key).path  # the secret first; and the certificate's name before what it leads to: nothing dangles
        for path in dict.fromkeys((target, key, certificate)):
            with self.folder(path) as (folder, name):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                os.fsync(folder)
        for path in (key, certificate):
            self.remove_pairs(path)
            self.sweep(path, ())
            with self.folder(path) as (folder, _):
                for name in filter(OF_THE_AGENT.fullmatch, os.listdir(folder)):
                    os.unlink(name, dir_fd=folder)
                os.fsync(folder)

    def move_back(self, path: str) -> None:
        """Give what was moved aside its name back, which must be free, or its own already where we were killed between the two."""
        with self.folder(path) as (folder, name):
            try:
                os.link(name + ASIDE, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                found = [os.stat(one, dir_fd=folder, follow_symlinks=False) for one in (name, name + ASIDE)]
                if not os.path.samestat(*found):
                    raise
            os.fsync(folder)
            os.unlink(name + ASIDE, dir_fd=folder)
            os.fsync(folder)

    def set_marker(self, path: str, *, present: bool) -> None:
        """Remove the package's marker file, or make it again."""
        with self.folder(path) as (folder, name):
            if present:
                write(folder, name, b"", 0o644)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                os.fsync(folder)

    def sweep(self, path: str, kept: Tuple[str, ...]) -> None:
        """Remove our copies beside `path` that are not in `kept` and that no link of that folder names."""
        with self.folder(path) as (folder, _):
            names = os.listdir(folder)
            used = set(kept)
            for name in names:
                with suppress(OSError):
                    used.add(os.readlink(name, dir_fd=folder).rpartition("/")[2])
            for name in names:
                if name not in used and (COPY.fullmatch(name) or name.startswith(TEMPORARY)):
                    with suppress(FileNotFoundError, IsADirectoryError):  # the agent's account may make a folder of that name
                        os.unlink(name, dir_fd=folder)
                if _ON_ITS_WAY.fullmatch(name):
                    with suppress(FileNotFoundError, NotADirectoryError):
                        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == os.geteuid():  # a pair, and its key
                            remove_tree(folder, name)
            os.fsync(folder)

    # -- a pair, while a key is changed ---------------------------------------------------------------------------

    def make_pair(self, path: str, certificate: bytes, key: bytes, owner: Tuple[int, int]) -> str:
        """Make a folder with certificate and key beside `path`, the key for its owner alone; returns its name, which was free."""
        with self.folder(path) as (folder, _):
            taken, temporary = set(os.listdir(folder)), TEMPORARY + secrets.token_hex(8)
            name = next(name for name in (f"{PAIR_LINK}-{number}" for number in count(1)) if name not in taken)
            os.mkdir(temporary, 0o700, dir_fd=folder)
            try:
                with self._inside(folder, temporary) as inner:
                    secret = b"PRIVATE KEY-----" in certificate  # a file with both is for the agent's account alone
                    write(inner, PAIR_CERTIFICATE, certificate, 0o400 if secret else 0o444, owner if secret else None)
                    write(inner, PAIR_KEY, key, 0o400, owner)
                    os.fchmod(inner, 0o755)  # whatever the umask; the agent's account goes through
            except BaseException:
                remove_tree(folder, temporary)
                raise
            move(folder, temporary, name)
        return name

    def check_link(self, path: str) -> None:
        """See that the link beside `path` is one, or absent. Raises HostError for what is somebody else's."""
        name = f"{path.rpartition('/')[0]}/{PAIR_LINK}"
        if self.root.entry(name).kind not in ("absent", "link"):
            raise HostError(f"{name} is in the way of a new key, and not ours", f"see whose it is, and move it away: mv {name} /root/")

    def point(self, path: str, pair: str) -> None:
        """Have the link beside `path` lead to that pair, by one rename: where both names go through it, the commit."""
        self.check_link(path)
        with self.folder(path) as (folder, _):
            temporary = TEMPORARY + secrets.token_hex(8)
            os.symlink(pair, temporary, dir_fd=folder)
            move(folder, temporary, PAIR_LINK)

    def own(self, path: str, pair: str, owner: Tuple[int, int], data: bytes) -> bool:
        """Give the key of a pair to its owner again, and its folder to us: packages change what links lead to.

        Says whether it is the key, and stands nowhere else: what somebody put in its place is given to nobody.
        """
        with self.folder(path) as (folder, _), suppress(FileNotFoundError, NotADirectoryError), self._inside(folder, pair) as inner:
            try:
                key = os.open(PAIR_KEY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=inner)
            except OSError:
                return False
            try:
                found = os.fstat(key)
                if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or os.read(key, len(data) + 1) != data:
                    return False
                for fd, ids, mode in ((key, owner, 0o400), (inner, (os.geteuid(), os.getegid()), 0o755)):
                    os.fchown(fd, *ids)
                    os.fchmod(fd, mode)
                    os.fsync(fd)
                return True
            finally:
                os.close(key)
        return False

    def remove_pairs(self, path: str) -> None:
        """Remove the link and every pair, keys included: both names are regular again."""
        with self.folder(path) as (folder, _):
            with suppress(FileNotFoundError):
                if stat.S_ISLNK(os.stat(PAIR_LINK, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(PAIR_LINK, dir_fd=folder)
            for name in filter(PAIR.fullmatch, os.listdir(folder)):
                with explained(f"{path.rpartition('/')[0]}/{name}"), suppress(NotADirectoryError):  # not ours
                    remove_tree(folder, name)
            os.fsync(folder)

    @staticmethod
    @contextmanager
    def _inside(folder: int, name: str) -> Iterator[int]:
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            yield inner
        finally:
            os.close(inner)
