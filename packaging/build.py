"""Builds the deb and the rpm into dist/: bit for bit the same from the same checkout and zlib, whoever builds them and when.

Run by `make packages`. What can't be taken from the checkout as it stands is made under build/packages/; nfpm.yaml describes the rest.
The one library that is delivered with the program comes from the package index, and is refused if it is not the one that
vendored.txt pins.

    python packaging/build.py [--release N] [--output DIR]
"""

import argparse
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path
from typing import Dict, Tuple

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGING = CHECKOUT / "packaging"
STAGE = CHECKOUT / "build" / "packages"
KINDS = ("deb", "rpm")
# What the launcher is run by. The link is made when the rpm is installed, since distributions differ in which interpreter is new enough.
PYTHON = {"deb": "/usr/bin/python3", "rpm": "/usr/share/scx-enroll/python"}
SCRIPTS = {"deb": ("postinst", "prerm", "postrm"), "rpm": ("pre", "post", "preun", "postun", "posttrans")}


def find(pattern: str, *names: str) -> "re.Match[str]":
    """The one line that a file of the checkout has for this."""
    found = re.search(pattern, CHECKOUT.joinpath(*names).read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        sys.exit(f"build: {'/'.join(names)} has no line like {pattern}")
    return found


def version() -> str:
    """The program's version has one home."""
    return find(r'^__version__ = "([^"]+)"', "scx_enroll", "__init__.py")[1]


def epoch() -> int:
    """The time that everything in the packages carries: SOURCE_DATE_EPOCH, or that of the last commit, or of the changelog."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    asked = subprocess.run(
        ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    return int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip() else int((CHECKOUT / "CHANGELOG.md").stat().st_mtime)


def vendored() -> Tuple[str, str, str]:
    """Name, version and SHA-256 of the library in vendored.txt."""
    found = find(r"^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", "packaging", "vendored.txt")
    return found[1], found[2], found[3]


def fetch() -> bytes:
    """The pinned library's one module; pip refuses an archive with another hash."""
    name, number, digest = vendored()
    kept = CHECKOUT / ".cache" / "vendored"
    archive = kept / f"{name}-{number}.tar.gz"
    if not archive.exists():
        pip = (sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "-qq")
        pinned = ("--no-deps", "--no-binary", ":all:", "--require-hashes", "-r", str(PACKAGING / "vendored.txt"))
        subprocess.run([*pip, "download", "--no-build-isolation", *pinned, "-d", str(kept)], check=True)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
        sys.exit(f"build: {archive} is not what packaging/vendored.txt pins: remove it and build again")
    with tarfile.open(archive) as files:
        member = files.extractfile(f"{name}-{number}/{name}.py")
        return member.read() if member else sys.exit(f"build: {archive} holds no {name}.py")


def write(name: str, data: bytes, mode: int = 0o644) -> None:
    """A file of the stage."""
    path = STAGE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def packed(data: bytes) -> bytes:
    """As `gzip -9n`: neither name nor time; nor the system, which Pythons write differently (RFC 1952, byte 9)."""
    made = gzip.compress(data, 9, mtime=0)
    return made[:9] + b"\x03" + made[10:]


def bill_of_materials(when: int, release: str) -> bytes:
    """What the packages are made of, as CycloneDX 1.5."""
    name, number, digest = vendored()

    def component(kind: str, part: str, of: str, **more: object) -> Dict[str, object]:
        url = f"pkg:pypi/{part}@{of}" if kind == "library" else f"pkg:generic/{part}@{of}"
        return {"type": kind, "bom-ref": url, "name": part, "version": of, "purl": url, "licenses": [{"license": {"id": "MIT"}}], **more}

    program = component("application", "scx-enroll", f"{version()}-{release}")
    library = component("library", name, number, author="Magnus Watn", hashes=[{"alg": "SHA-256", "content": digest}])
    library["description"] = f"as /usr/share/scx-enroll/{name}.py; the hash is that of the source archive in the Python Package Index"
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'scx-enroll {version()}-{release} {when}')}",
        "version": 1,
        "metadata": {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)), "component": program},
        "components": [library],
        "dependencies": [{"ref": program["bom-ref"], "dependsOn": [library["bom-ref"]]}, {"ref": library["bom-ref"]}],
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def changelog(when: int, release: str) -> bytes:
    """The one entry that the packages' own changelogs want; the operator's words are in CHANGELOG.md."""
    entry = {
        "semver": f"{version()}-{release}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)),
        "packager": find(r"^maintainer: (.+)$", "packaging", "nfpm.yaml")[1],
        "deb": {"urgency": "medium", "distributions": ["unstable"]},
        "changes": [{"note": "What changes for operators is in CHANGELOG.md (changelog.gz in the deb)."}],
    }
    return json.dumps([entry]).encode()  # JSON is YAML


def copyright_of_both() -> bytes:
    """What is delivered, and under which licence."""
    parts = [(CHECKOUT / "LICENSE").read_bytes(), b"\nThis holds for everything but certsrv.py, for which this does:\n\n"]
    return b"".join([*parts, (PACKAGING / "certsrv.LICENCE").read_bytes()])


def description() -> str:
    """nfpm.yaml with a line for each file that a pattern matches: nfpm itself does that for some types only."""

    def each(line: "re.Match[str]") -> str:
        names = sorted(os.path.relpath(path, CHECKOUT) for path in glob.glob(str(CHECKOUT / line[1])))
        return "".join(line[0].replace(f'"{line[1]}"', name).replace("/,", f"/{os.path.basename(name)},", 1) for name in names)

    text = (PACKAGING / "nfpm.yaml").read_text(encoding="utf-8")
    return re.sub(r'^  - \{src: "(\S+)", dst: .*\n', each, text, flags=re.MULTILINE)


def stage(when: int, release: str) -> None:
    """Everything that is made from something else stands under build/packages/."""
    shutil.rmtree(STAGE, ignore_errors=True)
    launcher = (PACKAGING / "launcher").read_text(encoding="utf-8")
    for kind in KINDS:
        write(f"launcher-{kind}", launcher.replace("@PYTHON@", PYTHON[kind]).encode(), 0o755)
        common = [PACKAGING / "scripts" / part for part in ("common", f"{kind}-common")]
        for name in SCRIPTS[kind]:
            parts = [*common, PACKAGING / "scripts" / f"{kind}-{name}"]
            write(f"{kind}/{name}", b"#!/bin/sh\nset -e\n\n" + b"\n".join(part.read_bytes() for part in parts), 0o755)
    write("certsrv.py", fetch())
    write("scx-enroll.8.gz", packed((CHECKOUT / "docs" / "scx-enroll.8").read_bytes()))
    write("copyright", copyright_of_both())
    write("changelog.gz", packed((CHECKOUT / "CHANGELOG.md").read_bytes()))
    write("changelog.yaml", changelog(when, release))
    write("scx-enroll.cdx.json", bill_of_materials(when, release))
    write("nfpm.yaml", description().encode())


def main() -> int:
    """Both packages stand in the output folder, and their names are printed."""
    parser = argparse.ArgumentParser(description="Builds the deb and the rpm.")
    parser.add_argument("--release", default="1", help="the package's own number beside the program's version (default: 1)")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "dist")
    options = parser.parse_args()
    when = epoch()
    stage(when, options.release)
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "VERSION": version(), "RELEASE": options.release,
        "SOURCE_DATE_EPOCH": str(when),
    }
    nfpm = os.path.join(os.path.dirname(sys.executable), "nfpm")
    for kind in KINDS:
        pattern = {"deb": "scx-enroll_*_all.deb", "rpm": "scx-enroll-*.noarch.rpm"}[kind]
        for old in glob.glob(str(options.output / pattern)):
            os.unlink(old)
        command = [nfpm, "package", "-f", "build/packages/nfpm.yaml", "-p", kind, "-t", str(options.output.resolve())]
        built = subprocess.run(
            command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if built.returncode:
            sys.exit(f"build: {built.stdout}")
        print(*(os.path.relpath(path, CHECKOUT) for path in glob.glob(str(options.output / pattern))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
