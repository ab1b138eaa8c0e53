"""Durable changes of a folder: a name is wholly old or wholly new, and stays so when the power fails.

Everything is done through the folder's descriptor, with O_NOFOLLOW and O_EXCL and under names that nobody can guess.
"""

import errno
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from typing import Iterator, Optional, Tuple

from scx_enroll.errors import HostError

TEMPORARY = ".scx-enroll."  # how the names of files on their way begin
MAX_DEPTH = 8  # of a tree that is removed: ours have half of that

_HINTS = {
    errno.ENOSPC: "free some space on that file system, then run again",
    errno.EDQUOT: "free some space on that file system, then run again",
    errno.EROFS: "remount the file system for writing. Where only the timer's run can't write, its unit needs a drop-in: "
    "systemctl edit scx-enroll.service, with the lines [Service] and ReadWritePaths={folder}",
    errno.EACCES: "run it as root",
    errno.EPERM: "run it as root, and see that the file is not immutable (lsattr)",
    errno.ELOOP: "see who made it, and move it away",
    errno.EIO: "the disk reported an error: see the kernel's log",
}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Raise HostError, with a hint, for any OSError: `path` could not be written."""
    try:
        yield
    except OSError as problem:
        why = problem.strerror or str(problem)
        hint = _HINTS.get(problem.errno or 0, "nothing was changed by the failed step; mend the cause and run again")
        raise HostError(f"can't write {path}: {why}", hint.replace("{folder}", os.path.dirname(path))) from problem


def write(folder: int, name: str, data: bytes, mode: int, owner: Optional[Tuple[int, int]] = None) -> None:
    """Replace `name` in `folder` durably; it is born with its final owner and mode."""
    move(folder, temporary_file(folder, data, mode, owner), name)


def move(folder: int, temporary: str, name: str) -> None:
    """Rename a finished temporary to its name, durably; where that fails, it is gone."""
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            _remove(folder, temporary)
        raise
    os.fsync(folder)


def move_tree(source: int, name: str, target: int) -> None:
    """Move a folder of ours to another one of the same file system; where an overlay can't rename what its image holds, file by file."""
    try:
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        _move_each(source, name, target)


def _move_each(source: int, name: str, target: int) -> None:
    os.mkdir(name, 0o700, dir_fd=target)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folders = [os.open(name, flags, dir_fd=above) for above in (source, target)]
    try:
        for entry in os.listdir(folders[0]):
            move_tree(folders[0], entry, folders[1])
        os.fsync(folders[1])
    finally:
        for folder in folders:
            os.close(folder)
    os.rmdir(name, dir_fd=source)


def temporary_file(folder: int, data: bytes, mode: int, owner: Optional[Tuple[int, int]]) -> str:
    """Make a file under a new name, with its final owner and mode and its data on the disk; returns the name."""
    name = TEMPORARY + secrets.token_hex(8)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if owner is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise
    return name


def remove_tree(folder: int, name: str, depth: int = MAX_DEPTH) -> None:
    """Remove a folder of ours, with what is in it; absent is fine. One that goes deeper than any of ours is somebody else's."""
    if not depth:
        raise OSError(errno.ELOOP, "it holds folders deeper than any of ours")
    with suppress(FileNotFoundError):
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            for entry in os.listdir(inner):
                _remove(inner, entry, depth - 1)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


def _remove(folder: int, name: str, depth: int = MAX_DEPTH) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        remove_tree(folder, name, depth)
    else:
        os.unlink(name, dir_fd=folder)


def clear(folder: int) -> None:
    """Remove what a killed run left on its way in this folder of ours."""
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY):
            _remove(folder, name)
