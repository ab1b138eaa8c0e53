"""Debian trees to put overlays over: made once on a machine, whoever asks first, and never changed afterwards.

    python -m tests.lab.roots [SUITE...]      make them, by default all; prints where they are

They stand under $SCX_ENROLL_CACHE, by default the checkout's .cache; one that is a month old is made anew beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from types import MappingProxyType
from typing import Iterator, List, Mapping, Sequence

SUITES = ("bullseye", "bookworm", "trixie", "sid")
PACKAGES = (
    # what boots and is looked at
    "ca-certificates", "dbus", "init-system-helpers", "iproute2", "openssl", "systemd", "systemd-sysv",
    # the distribution's Python, what the program and the lab import, and what builds the program
    "python3", "python3-cryptography", "python3-gssapi", "python3-requests", "python3-requests-ntlm", "python3-setuptools", "python3-venv",
    "python3-wheel",
)  # fmt: skip
OPTIONS = (
    "--variant=minbase",
    # a mirror that is a snapshot has release files past their date, and the tree is only ever used for tests
    "--aptopt=Acquire::Check-Valid-Until false",
    "--dpkgopt=force-unsafe-io",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")),
    # for the building only: what a package under test brings must all be there
    '--customize-hook=rm -f "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap',
)
HOSTS = "127.0.0.1 localhost\n::1 localhost\n"  # an old C library looks nowhere else
UNLIKE_ITS_MAKER = ("etc/hostname", "etc/resolv.conf", "var/lib/dbus/machine-id")  # which mmdebstrap takes from where it runs
WRITTEN = (("etc/machine-id", ""), ("etc/hosts", HOSTS))
MAX_AGE_DAYS = 30
LIMIT_S = 900  # for one tree; half a minute where nobody else works
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOLS = {  # and their packages
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "systemd-nspawn": "systemd-container",
}
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# Its own mount and process spaces: when the first process ends, for whatever reason, nothing runs and nothing is mounted any more.
SEPARATE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec")
ENTER = """
mount -t overlay overlay -o "$1" "$2"
cd "$2"
case " $3 " in *" tmp "*) mount -t tmpfs -o mode=1777 tmpfs tmp;; esac
case " $3 " in *" run "*) mount -t tmpfs -o mode=755 tmpfs run;; esac
if [ -n "$4" ]; then mkdir -p "./$5" && mount --bind -o ro "$4" "./$5"; fi
mount -t proc proc proc
mount --rbind /dev dev
shift 5
exec chroot . "$@"
"""


class Broken(Exception):
    """A tree could not be made; with what was said about it."""


def missing(*tools: str) -> str:
    """Return what this machine lacks for trees and these tools, with the packages that bring it; "" for nothing."""
    if os.geteuid() != 0:
        return "root, to enter a Debian tree"
    lacks = [tool for tool in ("mmdebstrap", "unshare", *tools) if not shutil.which(tool)]
    packages = sorted({TOOLS.get(tool, tool) for tool in lacks})
    return f"{' '.join(lacks)}: apt-get install {' '.join(packages)}" if lacks else ""


def cache() -> str:
    """Return the folder of whatever is expensive to make; it is there."""
    folder = os.environ.get("SCX_ENROLL_CACHE") or os.path.join(CHECKOUT, ".cache")
    os.makedirs(folder, exist_ok=True)
    return os.path.realpath(folder)


def mirror() -> List[str]:
    """Return where this machine gets Debian from, as an argument for mmdebstrap; nothing where that isn't to be seen."""
    for name in (
        *glob.glob("/etc/apt/sources.list.d/*.sources"),
        "/etc/apt/sources.list",
        *glob.glob("/etc/apt/sources.list.d/*.list"),
    ):
        if os.path.exists(name):
            with open(name, encoding="utf-8") as file:
                address = re.search(
                    r"^(?:URIs:|deb (?:\[.*?\])?)\s*(https?://\S+/debian/?)(?:\s|$)", file.read(), re.MULTILINE
                )
            if address:
                return [address[1]]
    return []


def key(suite: str) -> str:
    """Return a short name for all that a tree is made from."""
    return hashlib.sha256(repr((suite, PACKAGES, OPTIONS, UNLIKE_ITS_MAKER, WRITTEN)).encode()).hexdigest()[:12]


def root(suite: str) -> str:
    """Return the tree of a suite, made now if there is none that is young enough; no other process makes it meanwhile.

    It has no name and no resolver's settings, and its machine ID is empty: made at boot, not a first boot. Raises Broken.
    """
    folder = os.path.join(cache(), "roots")
    os.makedirs(folder, mode=0o755, exist_ok=True)
    with _locked(os.path.join(folder, f"{suite}.lock")):
        fitting = sorted(glob.glob(os.path.join(folder, f"{suite}-{key(suite)}-*")))
        if fitting and _age_days(fitting[-1]) < MAX_AGE_DAYS:
            return fitting[-1]
        fresh = os.path.join(folder, f".{suite}.making")
        _remove(fresh)
        _make(suite, fresh)
        made = os.path.join(folder, f"{suite}-{key(suite)}-{int(time.time())}")
        os.rename(fresh, made)
        # nothing that began with an older tree is still at work
        for other in glob.glob(os.path.join(folder, f"{suite}-*-*")):
            if _age_days(other) > MAX_AGE_DAYS + 2:
                _remove(other)
        return made


def _make(suite: str, tree: str) -> None:
    words = ["mmdebstrap", "--quiet", *OPTIONS, f"--include={','.join(PACKAGES)}", suite, tree, *mirror()]
    try:
        done = subprocess.run(
            words,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as late:
        raise Broken(f"{' '.join(words)}\nnot done after {LIMIT_S} s\n{late.stdout!r}") from late
    if done.returncode:
        raise Broken(f"{' '.join(words)}\n{done.stdout}\nexit status {done.returncode}")
    os.chmod(tree, 0o755)
    for name in UNLIKE_ITS_MAKER:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(tree, name))
    for name, text in WRITTEN:
        with open(os.path.join(tree, name), "w", encoding="ascii") as file:
            file.write(text)


def overlay(layers: Sequence[str], folder: str) -> str:
    """Return the options that mount `layers`, the uppermost first, with what is changed going to `folder`, which is made."""
    for name in ("upper", "work", "tree"):
        os.makedirs(os.path.join(folder, name), mode=0o755, exist_ok=True)
    lower = ":".join(re.sub(r"([\\:,])", r"\\\1", layer) for layer in layers)
    upper, work = (re.sub(r"([\\,])", r"\\\1", os.path.join(folder, name)) for name in ("upper", "work"))
    return f"lowerdir={lower},upperdir={upper},workdir={work}"


def entering(
    layers: Sequence[str],
    folder: str,
    argv: Sequence[str],
    *,
    empty: str = "",
    bind: Sequence[str] = ("", ""),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> List[str]:
    """Return the command that runs `argv` in such an overlay: as root, with no other process, and nothing of this environment.

    `empty`: "tmp run" or either, which are not the tree's then. `bind`: a folder that is seen there too, and where.
    """
    settings = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **environment}
    clean = ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
    mounted = [overlay(layers, folder), os.path.join(folder, "tree"), empty, *bind]
    return [*clean, *SEPARATE, ENTER, "enter", *mounted, *argv]


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _age_days(tree: str) -> float:
    return (time.time() - int(tree.rpartition("-")[2])) / 86400


def _remove(tree: str) -> None:
    subprocess.run(["rm", "-rf", "--one-file-system", tree], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or SUITES:
        print(root(name), flush=True)
