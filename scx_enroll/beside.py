"""The only writer in the agent's folders: copies beside the name the agent reads, the swap of that name, the marker.

docs/state.md lists every change; each is one method here. A change is durable when its method returns, or it did not happen.
The folders may be writable by the agent's less privileged account, so names in them are never followed.
"""

import errno
import os
import re
import secrets
from contextlib import contextmanager, suppress
from typing import Iterator, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll.durable import TEMPORARY, explained, move, temporary_file, write
from scx_enroll.rootfs import Root

COPY = re.compile(r"scx-enroll-([0-9a-f]{16})-([0-9]{1,9})\.pem")
BAKED_IN = ".scx-enroll-baked-in"  # a dotfile: the agent's packages remove all else in that folder
KEPT_BAKED_IN = 64  # keys; an image made of an image of an image has three
_BAKED_IN_HEAD = "# SHA-256 of public keys (DER) that came with an image: no host may use one. See man scx-enroll, seal.\n"
_OF_THE_AGENT = re.compile(r"(omi|scx)-host-.+\.pem|.+\.pem_(temp|backup)")  # what its tool made, and what its scripts put by
ASIDE = "_temp"  # what a package script of the agent's puts behind the names that it moves aside
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

    def free_copy(self, path: str, generation: str) -> str:
        """Return a name for a copy beside `path` that does not exist yet."""
        with self.folder(path) as (folder, _):
            taken = [int(m[2]) for m in map(COPY.fullmatch, os.listdir(folder)) if m and m[1] == generation]
        return f"scx-enroll-{generation}-{max(taken, default=0) + 1}.pem"

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
        for path in dict.fromkeys(path.rpartition("/")[0] + "/" for path in (key, certificate)):
            with self.folder(path) as (folder, _):
                for name in os.listdir(folder):
                    if COPY.fullmatch(name) or _OF_THE_AGENT.fullmatch(name):
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
            os.fsync(folder)
