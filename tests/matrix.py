"""Runs the fast tests on the oldest and the newest Python and libraries, each cell in an environment of its own.

Cells with libraries from the package index stand under .venv/, for the interpreters that this machine has. Cells with a
distribution's own Python and libraries are overlays over the Debian trees of tests.lab.roots, entered with chroot, which takes
root and mmdebstrap. A cell that can't be run is named with what is missing; under CI=true that is a failure.

    .venv/dev/bin/python -I tests/matrix.py [CELL...]
"""

import concurrent.futures
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from tests.lab import roots

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(CHECKOUT, ".cache")
REQUIREMENTS = os.path.join(CHECKOUT, "tests", "requirements.txt")
OLDEST, NEWEST = (3, 9), (0, 0)
LIMIT_S = 900  # for one command; a cell takes about half a minute when it is made, so beyond this something hangs

PIP = ("-I", "-m", "pip", "--disable-pip-version-check", "-qq")
PYTEST = ("-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-m")
CHOICE = "not slow and not checkout and not lab"
VERSIONS = (
    "import cryptography, requests, sys, warnings;"
    " print('Python %d.%d.%d' % sys.version_info[:3], 'cryptography', cryptography.__version__, 'requests', requests.__version__)"
)


class Missing(Exception):
    """This machine lacks what the cell needs."""


class Broken(Exception):
    """A command failed; with its output."""


@dataclass(frozen=True)
class Cell:
    """With `suite` a Debian tree and its own libraries; else the nearest interpreter of this machine, and libraries from the index."""

    name: str
    python: Tuple[int, int] = NEWEST
    libraries: Tuple[str, ...] = ()
    suite: str = ""
    instead: str = ""  # the cell that stands for it where its interpreter is not here


CELLS = (
    Cell("oldest", OLDEST, ("cryptography==3.3.*", "requests==2.25.*", "urllib3==1.26.5"), instead="debian-11"),  # whose libraries those are
    Cell("newest", NEWEST, ("cryptography", "requests")),
    Cell("debian-11", suite="bullseye"),
    Cell("debian-sid", suite="sid"),
)


def command(*words: str) -> str:
    """The command succeeded, and this is what it said. Raises Broken."""
    try:
        done = subprocess.run(
            words, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired as late:
        raise Broken(f"{' '.join(words)}\nnot done after {LIMIT_S} s\n{late.stdout}") from late
    if done.returncode:
        raise Broken(f"{' '.join(words)}\n{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def remove(path: str) -> None:
    """The folder is gone, whatever it held, but never what is mounted in it."""
    command("rm", "-rf", "--one-file-system", path)


def digest(*parts: str) -> str:
    """A short name for what an environment was made from."""
    with open(REQUIREMENTS, encoding="utf-8") as file:
        return hashlib.sha256("\n".join((*parts, file.read())).encode()).hexdigest()


def is_made(stamp: str, key: str) -> bool:
    """The environment with this stamp was made from these things, to the end."""
    try:
        with open(stamp, encoding="ascii") as file:
            return file.read() == key
    except FileNotFoundError:
        return False


def make_stamp(stamp: str, key: str) -> None:
    """The next run takes the environment as it is."""
    with open(stamp, "w", encoding="ascii") as file:
        file.write(key)


def interpreters() -> Dict[Tuple[int, int], str]:
    """Every released Python from 3.9 on that runs here and can make environments."""
    candidates = [sys.executable]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        candidates += glob.glob(os.path.join(folder, "python3*"))
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, text=True).stdout.strip()
        candidates += glob.glob(os.path.join(root, "versions", "*", "bin", "python3"))
    probe = "import ensurepip, sys, venv; assert sys.version_info[3] == 'final'; print(*sys.version_info[:2])"
    found: Dict[Tuple[int, int], str] = {}
    for candidate in candidates:
        if re.fullmatch(r"python3?(\.\d+)?", os.path.basename(candidate)):
            # run, because a pyenv shim stands there for interpreters that it does not have
            ran = subprocess.run([candidate, "-I", "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if ran.returncode == 0:
                major, minor = ran.stdout.split()
                found.setdefault((int(major), int(minor)), candidate)
    return {version: path for version, path in found.items() if version >= OLDEST}


def fetch() -> List[str]:
    """What every cell installs, as wheels that fit any of them; gives those of this package and of certsrv."""
    pip = (sys.executable, *PIP)
    tools = os.path.join(CACHE, "tools")
    if not is_made(os.path.join(tools, ".made"), digest()):
        remove(tools)
        pure = ("--platform", "any", "--implementation", "py", "--abi", "none", "--python-version", "3.9", "--only-binary", ":all:")
        command(*pip, "download", "--no-deps", *pure, "-r", REQUIREMENTS, "-d", tools)
        certsrv = command(sys.executable, "-I", "-c", "from importlib.metadata import version; print(version('certsrv'))").strip()
        command(*pip, "wheel", "--no-deps", "--no-build-isolation", f"certsrv=={certsrv}", "-w", tools)
        make_stamp(os.path.join(tools, ".made"), digest())
    source, wheel = os.path.join(CACHE, "source"), os.path.join(CACHE, "wheel")
    remove(source)
    remove(wheel)
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    command(*pip, "wheel", "--no-deps", "--no-build-isolation", source, "-w", wheel)
    return [*glob.glob(os.path.join(wheel, "*.whl")), *glob.glob(os.path.join(tools, "certsrv-*.whl"))]


def run_index(cell: Cell, wheels: List[str]) -> str:
    """The tests passed with libraries from the index. Raises Missing, Broken."""
    found = interpreters()
    if not found:
        raise Missing("a Python that can make environments: apt-get install python3-venv")
    nearest = max(found) if cell.python == NEWEST else min(found, key=lambda version: (abs(version[1] - cell.python[1]), version))
    if cell.instead and nearest != cell.python and cell.name not in sys.argv[1:] and not roots.missing("chroot"):
        return f"no Python {'.'.join(map(str, cell.python))} here\n{cell.instead} has that one, and these libraries"
    interpreter = found[nearest]
    place = os.path.join(CHECKOUT, ".venv", cell.name)
    python, stamp = os.path.join(place, "bin", "python"), os.path.join(place, ".made")
    # unpinned libraries are looked for anew once a day
    key = digest(place, interpreter, *cell.libraries, "" if "==" in cell.libraries[0] else time.strftime("%F"))
    if not is_made(stamp, key):
        remove(place)
        command(interpreter, "-m", "venv", place)
        command(python, *PIP, "install", "-r", REQUIREMENTS, *cell.libraries, *wheels)
        make_stamp(stamp, key)
    else:
        command(python, *PIP, "install", "--no-index", "--no-deps", "--force-reinstall", wheels[0])
    asked = ("-I", "-W", "ignore", "-c", VERSIONS)
    versions = command(python, *asked)
    if versions == command(sys.executable, *asked) and cell.name not in sys.argv[1:]:
        return f"{versions}the same as in {sys.prefix}: make fast runs all of it there"
    return versions + command(python, *PYTEST, CHOICE)


def run_debian(cell: Cell) -> str:
    """The tests passed with a distribution's Python and libraries, built with its own tools. Raises Missing, Broken."""
    missing = roots.missing("chroot")
    if missing:
        raise Missing(missing)
    try:
        tree = roots.root(cell.suite)
    except roots.Broken as broken:
        raise Broken(str(broken)) from broken
    place = os.path.join(CACHE, cell.name)
    stamp = os.path.join(place, ".made")

    def inside(*words: str) -> str:
        # CI: hypothesis draws the same examples each time then
        environment = {"HOME": "/tmp", "CI": os.environ.get("CI", "")}
        return command(*roots.entering([tree], place, words, empty="tmp run", bind=(CACHE, "/run/cache"), environment=environment))

    key = digest(place, tree)
    if not is_made(stamp, key):
        remove(place)
        inside("python3", "-m", "venv", "--system-site-packages", "/cell")
        # without dependencies: the pins name them all, and the distribution's pip may be too old to read what it does not need
        tools = [f"/run/cache/tools/{os.path.basename(wheel)}" for wheel in glob.glob(os.path.join(CACHE, "tools", "*.whl"))]
        inside("/cell/bin/python", *PIP, "install", "--no-index", "--no-deps", *tools)
        make_stamp(stamp, key)
    # a copy: building leaves files
    inside("sh", "-ec", "rm -rf /checkout; cp -r /run/cache/source /checkout; rm -rf /checkout/build /checkout/*.egg-info")
    python = "/cell/bin/python"
    inside(python, *PIP, "uninstall", "--yes", "scx-enroll")
    inside(python, *PIP, "install", "--no-index", "--no-build-isolation", "/checkout")
    there = "import os, sys; os.chdir('/checkout'); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return inside(python, "-I", "-W", "ignore", "-c", VERSIONS) + inside(python, "-I", "-c", there, *PYTEST, f"{CHOICE} and not kdc")


def run(cell: Cell, wheels: List[str]) -> Tuple[str, bool, Optional[str]]:
    """One line for the table, whether that is a failure, and what there is to read about it."""
    began = time.monotonic()
    try:
        said = run_debian(cell) if cell.suite else run_index(cell, wheels)
    except Missing as missing:
        return f"{cell.name:<10} not run; this machine lacks {missing}", os.environ.get("CI") == "true", None
    except Broken as broken:
        return f"{cell.name:<10} FAILED after {time.monotonic() - began:.0f} s", True, str(broken)
    lines = said.strip().splitlines()
    return f"{cell.name:<10} {lines[0]}: {lines[-1].strip('= ')} ({time.monotonic() - began:.0f} s in all)", False, None


def main() -> int:
    """The tests were run in every cell, or in those named; 1 if one failed."""
    cells = [cell for cell in CELLS if cell.name in sys.argv[1:] or not sys.argv[1:]]
    wheels = fetch()
    failed = False
    # all at once: each cell waits for processes much of the time
    with concurrent.futures.ThreadPoolExecutor(len(cells) or 1) as pool:
        for line, failure, output in pool.map(lambda cell: run(cell, wheels), reversed(cells)):
            print(*([output] if output else []), line, sep="\n", flush=True)
            failed = failed or failure
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
