"""The deb and the rpm, as files: what is in them, what they ask for, and what the distributions' own checkers say about them."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests import packages
from tests.lab import roots

pytestmark = pytest.mark.slow

PROGRAM = "usr/share/scx-enroll/"
CONFIGURATION = "etc/scx-enroll/scx-enroll.conf"
DOCUMENTATION = ("usr/share/doc/", "usr/share/man/", "usr/share/licenses/", "usr/share/lintian/")
DEPENDS = {
    "Depends": "python3 (>= 3.9), python3-cryptography (>= 3.3), python3-requests (>= 2.25)",
    "Recommends": "python3-gssapi",
    "Suggests": "python3-requests-ntlm",
    **dict.fromkeys(["Pre-Depends", "Conflicts", "Breaks", "Replaces", "Provides"], ""),
}
REQUIRES = {
    "REQUIRENEVRS": [
        (
            "((python3-cryptography and python3-requests) if python3 >= 3.9 else"
            " ((python3.12 and python3.12-cryptography and python3.12-requests)"
            " or (python3.11 and python3.11-cryptography and python3.11-requests)"
            " or (python311 and python311-cryptography and python311-requests)"
            " or (python39 and python39-cryptography and python39-requests)))"
        ),
        "util-linux",
    ],
    "RECOMMENDNEVRS": ["(python3-gssapi if python3 >= 3.9)"],
    "SUGGESTNEVRS": ["python3-requests_ntlm"],
    **{tag: [] for tag in ("SUPPLEMENTNEVRS", "ENHANCENEVRS", "CONFLICTNEVRS", "OBSOLETENEVRS")},
}
DEB_SCRIPTS = ("postinst", "prerm", "postrm")
RPM_SCRIPTS = ("PREIN", "POSTIN", "PREUN", "POSTUN", "POSTTRANS")


@pytest.fixture(scope="module")
def built():
    packages.need("dpkg-deb", "rpm", "rpm2archive")
    return packages.current()


def unpacked(data):
    """Each member of a tar archive by its name without the leading `./`, and its bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        return {re.sub(r"^\./?", "", member.name): (member, archive.extractfile(member).read() if member.isfile() else b"") for member in members}


@pytest.fixture(scope="module")
def deb(built):
    return unpacked(subprocess.run(["dpkg-deb", "--fsys-tarfile", built.deb], stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def rpm(built):
    with built.rpm.open("rb") as file:
        return unpacked(subprocess.run(["rpm2archive", "-"], stdin=file, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def control(built, tmp_path_factory):
    """The deb's control files, unpacked."""
    place = tmp_path_factory.mktemp("control") / "DEBIAN"
    subprocess.run(["dpkg-deb", "-e", built.deb, place], check=True)
    return place


def files_of(contents):
    return {name: data for name, (member, data) in contents.items() if not member.isdir()}


def lines(*command):
    return packages.output_of(*command).splitlines()


def listed(rpm):
    """The type and mode of each file and folder that the rpm owns, by name."""
    found = packages.queried(rpm, "[%{FILENAMES} %{FILEMODES:octal}\n]").splitlines()
    return {name: int(mode, 8) for name, mode in (line.split() for line in found)}


# The build.


def test_another_builder_gets_other_packages(built, tmp_path):
    """Whoever doubts a package builds it again: folder, umask, modes, time, time zone and language of the builder leave no trace."""
    source = packages.copy(tmp_path / "a folder elsewhere")
    for path in (source / "packaging", source / "scx_enroll", source / "docs", source / "systemd"):
        for file in path.rglob("*"):
            file.chmod(0o700 if file.is_dir() else 0o600)
            os.utime(file, (1e9, 1e9))
    while time.time() < built.rpm.stat().st_mtime + 1:  # in another second
        time.sleep(0.1)
    before = os.umask(0o077)
    try:
        again = packages.build(source, tmp_path / "out", TZ="Pacific/Kiritimati", LANG="tr_TR.UTF-8", LC_ALL="tr_TR.UTF-8", HOSTNAME="elsewhere", USER="somebody")
    finally:
        os.umask(before)
    assert again.deb.read_bytes() == built.deb.read_bytes()
    assert again.rpm.read_bytes() == built.rpm.read_bytes()


def test_time_of_the_commit_is_not_that_of_the_packages(built, deb):
    """SOURCE_DATE_EPOCH is the time of every file, inside both."""
    times = {int(word) for word in packages.queried(built.rpm, "%{BUILDTIME} [%{FILEMTIMES} ]").split()}
    assert times == {packages.EPOCH}
    assert {int(member.mtime) for member, _ in deb.values()} == {packages.EPOCH}


def test_another_archive_is_packed_for_the_pinned_library(tmp_path):
    """An archive that is not the pinned one ends the build, with one line and no package, wherever it came from."""
    source = packages.copy(tmp_path / "checkout")
    (source / ".cache" / "vendored").unlink()
    shutil.copytree(packages.VENDORED, source / ".cache" / "vendored")
    (archive,) = (source / ".cache" / "vendored").glob("certsrv-*.tar.gz")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    ran = packages.run_build(source, tmp_path / "out")
    assert (ran.returncode, ran.stdout) == (1, f"build: {archive} is not what packaging/vendored.txt pins: remove it and build again\n")
    assert not (tmp_path / "out").exists()


# What is in them.


def test_a_module_is_missing_in_a_package(deb, rpm):
    """Both hold every module of the program, byte for byte, certsrv as the one library, and nothing else that runs."""
    modules = {path.name: path.read_bytes() for path in (packages.CHECKOUT / "scx_enroll").glob("*.py")}
    for contents in (deb, rpm):
        inside = {name[len(PROGRAM):]: data for name, data in files_of(contents).items() if name.startswith(PROGRAM)}
        library = inside.pop("certsrv.py")
        assert inside == {f"scx_enroll/{name}": data for name, data in modules.items()}
        assert library == files_of(deb)[f"{PROGRAM}certsrv.py"]
    assert {name for name, data in files_of(deb).items() if data.startswith(b"#!")} == {"usr/sbin/scx-enroll"}


def test_the_packages_do_not_deliver_the_same(deb, rpm):
    """An operator with both kinds of host finds the same files; only the first line of the command differs."""
    beside = {kind: {name: data for name, data in files_of(contents).items() if not name.startswith(DOCUMENTATION)} for kind, contents in (("deb", deb), ("rpm", rpm))}
    assert set(beside["deb"]) == set(beside["rpm"])
    launchers = [beside[kind].pop("usr/sbin/scx-enroll").decode().partition("\n") for kind in ("deb", "rpm")]
    assert beside["deb"] == beside["rpm"]
    assert [first for first, _, _ in launchers] == ["#!/usr/bin/python3 -IS", "#!/usr/share/scx-enroll/python -IS"]
    assert launchers[0][2] == launchers[1][2]


def test_the_library_is_not_the_published_one(deb):
    """certsrv.py is that of the archive whose hash stands in vendored.txt."""
    pinned = re.search(r"^certsrv==(\S+) --hash=sha256:(\S+)$", (packages.CHECKOUT / "packaging" / "vendored.txt").read_text(encoding="utf-8"), re.MULTILINE)
    data = (packages.VENDORED / f"certsrv-{pinned[1]}.tar.gz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == pinned[2]
    assert unpacked(data)[f"certsrv-{pinned[1]}/certsrv.py"][1] == deb[f"{PROGRAM}certsrv.py"][1]


def test_a_file_is_not_roots_or_writable_by_others(built, deb):
    """Everything runs as root: every file is root's, 0644 or (the command, the folders) 0755, without setuid."""
    assert {(member.uid, member.gid) for member, _ in deb.values()} == {(0, 0)}
    for name, (member, _) in deb.items():
        assert member.isdir() or member.isfile(), name
        assert (name, oct(member.mode)) == (name, "0o755" if member.isdir() or name == "usr/sbin/scx-enroll" else "0o644")
    owners = packages.queried(built.rpm, "[%{FILEUSERNAME}:%{FILEGROUPNAME} ]").split()
    assert set(owners) == {"root:root"}
    modes = listed(built.rpm)
    assert modes.pop(f"/{PROGRAM}python") == 0o100644  # a place for the link, which is made when it is installed
    for name, mode in modes.items():
        expected = 0o100755 if name == "/usr/sbin/scx-enroll" else 0o040755 if stat.S_ISDIR(mode) else 0o100644
        assert (name, oct(mode)) == (name, oct(expected))


def test_an_upgrade_overwrites_the_configuration(built, control):
    """The configuration, and it alone, is marked so that an operator's changes survive; in the rpm as `noreplace`."""
    assert (control / "conffiles").read_text(encoding="ascii").split() == [f"/{CONFIGURATION}"]
    assert lines("rpm", "-qpc", built.rpm) == [f"/{CONFIGURATION}"]
    flags = dict(line.split() for line in packages.queried(built.rpm, "[%{FILENAMES} %{FILEFLAGS:fflags}|\n]").splitlines())
    assert flags[f"/{CONFIGURATION}"] == "cn|"


def test_documentation_can_not_be_left_out(built):
    """`--nodocs` and `--excludedocs` go by the marks: all that is documentation is marked so, and licences as licences."""
    files = {name for name, mode in listed(built.rpm).items() if not stat.S_ISDIR(mode)}
    expected = {name for name in files if name.startswith(("/usr/share/doc/", "/usr/share/man/"))}
    assert set(lines("rpm", "-qpd", built.rpm)) == expected != set()
    assert set(lines("rpm", "-qpL", built.rpm)) == {f"/usr/share/licenses/scx-enroll/{name}" for name in ("LICENSE", "certsrv.LICENCE")}


def test_a_licence_or_the_changelog_is_not_delivered(deb, rpm):
    """Both licences, both changelogs, README, docs, examples and the bill of materials are in both."""
    texts = {name: (packages.CHECKOUT / name).read_bytes() for name in ("LICENSE", "packaging/certsrv.LICENCE", "CHANGELOG.md", "README.md")}
    copyright_ = deb["usr/share/doc/scx-enroll/copyright"][1]
    assert texts["LICENSE"] in copyright_
    assert texts["packaging/certsrv.LICENCE"] in copyright_
    assert rpm["usr/share/licenses/scx-enroll/LICENSE"][1] == texts["LICENSE"]
    assert rpm["usr/share/licenses/scx-enroll/certsrv.LICENCE"][1] == texts["packaging/certsrv.LICENCE"]
    assert gzip.decompress(deb["usr/share/doc/scx-enroll/changelog.gz"][1]) == rpm["usr/share/doc/scx-enroll/CHANGELOG.md"][1] == texts["CHANGELOG.md"]
    docs = {f"docs/{path.name}" for path in (packages.CHECKOUT / "docs").glob("*.md")}
    examples = {f"examples/{path.name}" for path in (packages.CHECKOUT / "packaging" / "examples").iterdir()}
    for contents in (deb, rpm):
        inside = {name[len("usr/share/doc/scx-enroll/"):] for name in files_of(contents) if name.startswith("usr/share/doc/scx-enroll/")}
        assert docs | examples | {"README.md", "scx-enroll.cdx.json"} <= inside
        assert contents["usr/share/doc/scx-enroll/README.md"][1] == texts["README.md"]
        assert contents["usr/share/man/man8/scx-enroll.8.gz"][1] == gzip.compress((packages.CHECKOUT / "docs" / "scx-enroll.8").read_bytes(), 9, mtime=0)


def test_removal_leaves_folders_behind(built, deb):
    """An rpm's folder goes with it only if the package owns it: it owns all that are its own, and none that others have, too."""
    folders = {name for name, mode in listed(built.rpm).items() if stat.S_ISDIR(mode)}
    ours = {f"/{name}" for name, (member, _) in deb.items() if member.isdir() and "scx-enroll" in name}
    assert folders == ours | {"/usr/share/licenses/scx-enroll"}


def test_the_builders_paths_are_in_a_package(built, deb, rpm, control):
    """Neither the checkout's folder, nor the environment's, nor the home, nor the host's name is anywhere in a package."""
    texts = [data for contents in (deb, rpm) for _, data in contents.values()]
    texts += [gzip.decompress(data) for data in texts if data.startswith(b"\x1f\x8b")]
    texts += [path.read_bytes() for path in control.iterdir()]
    texts += [packages.output_of("rpm", "-qp", "--xml", built.rpm).encode()]
    for trace in (packages.CHECKOUT, packages.KEPT, packages.NFPM, Path.home() / ".cache", Path("/tmp/pytest")):
        assert [text for text in texts if os.fsencode(trace) in text] == []
    assert packages.queried(built.rpm, "%{BUILDHOST}") == "build" != socket.gethostname()


def test_byte_code_of_another_python_is_delivered(deb, rpm):
    """It is made where it is installed, for the Python that is there."""
    assert [name for name in [*deb, *rpm] if "__pycache__" in name or name.endswith((".pyc", ".pyo"))] == []


# What they ask for.


@pytest.mark.parametrize("field", DEPENDS)
def test_the_deb_asks_for_something_else(built, field):
    """A dependency too many keeps it off hosts, one too few breaks it on them."""
    assert packages.output_of("dpkg-deb", "-f", built.deb, field).strip() == DEPENDS[field]


@pytest.mark.parametrize("tag", REQUIRES)
def test_the_rpm_asks_for_something_else(built, tag):
    """As for the deb; what starts with rpmlib( rpm itself provides."""
    asked = packages.queried(built.rpm, f"[%{{{tag}}}\n]").splitlines()
    assert [one for one in asked if not one.startswith(("rpmlib(", "(none)"))] == REQUIRES[tag]


def test_the_version_is_not_the_programs(built):
    """Both carry the program's version, the release beside it, and are for every architecture."""
    assert packages.output_of("dpkg-deb", "-f", built.deb, "Version", "Architecture").split() == ["Version:", f"{built.version}-1", "Architecture:", "all"]
    assert packages.queried(built.rpm, "%{NAME} %{VERSION} %{RELEASE} %{ARCH} %{LICENSE}") == f"scx-enroll {built.version} 1 noarch MIT"
    module = (packages.CHECKOUT / "scx_enroll" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{built.version}"' in module


# The bill of materials.


@pytest.fixture
def bill(deb):
    return json.loads(deb["usr/share/doc/scx-enroll/scx-enroll.cdx.json"][1])


def test_a_scanner_does_not_understand_the_bill_of_materials(bill):
    """It is CycloneDX 1.5 by the published schema, which is delivered with cyclonedx-python-lib."""
    import fastjsonschema

    (library,) = importlib.util.find_spec("cyclonedx").submodule_search_locations

    def resolve(address):
        name = address.rpartition("/")[2]
        return json.loads((Path(library) / "schema" / "_res" / name.replace(".schema.json", ".SNAPSHOT.schema.json").replace(".SNAPSHOT.SNAPSHOT", ".SNAPSHOT")).read_text(encoding="utf-8"))

    judge = fastjsonschema.compile(resolve("bom-1.5.schema.json"), handlers={"http": resolve, "https": resolve})
    judge(bill)
    for wrong in ({"specVersion": "1.5", "version": 1}, {**bill, "components": [{"name": "certsrv"}]}, {**bill, "serialNumber": "7"}):
        with pytest.raises(fastjsonschema.JsonSchemaException):  # so it does judge
            judge(wrong)


def test_a_vulnerability_in_the_library_is_not_found_in_the_bill(bill, built, deb, rpm):
    """It names certsrv as the Python Package Index does, with the pinned hash, its licence and the program that depends on it."""
    assert rpm["usr/share/doc/scx-enroll/scx-enroll.cdx.json"][1] == deb["usr/share/doc/scx-enroll/scx-enroll.cdx.json"][1]
    pinned = re.search(r"^certsrv==(\S+) --hash=sha256:(\S+)$", (packages.CHECKOUT / "packaging" / "vendored.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (library,) = bill["components"]
    assert (library["name"], library["version"], library["purl"]) == ("certsrv", pinned[1], f"pkg:pypi/certsrv@{pinned[1]}")
    assert library["hashes"] == [{"alg": "SHA-256", "content": pinned[2]}]
    assert library["licenses"] == [{"license": {"id": "MIT"}}]
    program = bill["metadata"]["component"]
    assert (program["name"], program["version"]) == ("scx-enroll", f"{built.version}-1")
    assert bill["metadata"]["timestamp"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(packages.EPOCH))
    assert {"ref": program["bom-ref"], "dependsOn": [library["bom-ref"]]} in bill["dependencies"]


# The checkers.


def test_a_python_writes_its_own_system_into_what_it_packs(checkout):
    """RFC 1952, byte 9: 255 from some versions of Python, 3 from others; and no time and no name."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import build; print(build.packed(b'x' * 999)[:10].hex())"
    assert packages.output_of(sys.executable, "-I", "-c", code, os.path.join(checkout, "packaging")).strip() == "1f8b0800000000000203"


def test_lintian_has_something_to_say(built):
    """Nothing, down to what it calls pedantic and experimental, but what is overridden."""
    packages.need("lintian")
    ran = subprocess.run(
        ["lintian", "--allow-root", "--pedantic", "--display-info", "--display-experimental", "--fail-on", "error,warning,info,pedantic,experimental", built.deb],
        capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert (ran.returncode, re.sub(r"^(?:N:|running with root|warning: running with root).*\n", "", ran.stdout + ran.stderr, flags=re.MULTILINE)) == (0, "")


def test_an_override_has_no_reason(deb):
    """Each line of them has a comment above it. (One of no use lintian itself complains of.)"""
    before = ""
    for line in deb["usr/share/lintian/overrides/scx-enroll"][1].decode().splitlines():
        assert line.startswith("# ") or before.startswith("# "), line
        before = line


def rpmlint(built, place, text):
    """What rpmlint says with this configuration, without the frame around it."""
    (place / "rpmlint.toml").write_text(text, encoding="utf-8")
    ran = subprocess.run(["rpmlint", "-c", place / "rpmlint.toml", built.rpm], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    return ran.returncode, [line for line in ran.stdout.splitlines() if re.search(r": [EW]: ", line)], ran.stdout + ran.stderr


def test_rpmlint_has_something_to_say_or_a_filter_no_use(built, tmp_path):
    """No error and no warning; and each filter, which has its reason beside it, hides something that rpmlint does say."""
    packages.need("rpmlint")
    text = (packages.CHECKOUT / "packaging" / "rpmlint.toml").read_text(encoding="utf-8")
    status, said, everything = rpmlint(built, tmp_path, text)
    assert (status, said) == (0, []), everything
    assert "0 errors, 0 warnings" in everything
    filters = [line for line in text.splitlines(keepends=True) if line.startswith("    ")]
    assert filters != []
    for line in filters:
        assert re.fullmatch(r'    ".+",  # .+\n', line)
        assert rpmlint(built, tmp_path, text.replace(line, ""))[1] != [], line


# The scripts.


@pytest.fixture(scope="module")
def scripts(built, control, tmp_path_factory):
    """Each script as a file, by its name: of the deb as shipped, of the rpm as rpm hands it to the shell."""
    place = tmp_path_factory.mktemp("scripts")
    found = {f"deb {name}": control / name for name in DEB_SCRIPTS}
    for name in RPM_SCRIPTS:
        assert packages.queried(built.rpm, f"%{{{name}PROG}}") == "/bin/sh"
        found[f"rpm {name}"] = place / name
        found[f"rpm {name}"].write_text(packages.queried(built.rpm, f"%{{{name}}}\n"), encoding="utf-8")
    return found


def test_a_script_is_in_a_package_that_no_test_knows(built, control):
    """The tables above name every script."""
    assert {path.name for path in control.iterdir()} == {"control", "md5sums", "conffiles", "triggers", *DEB_SCRIPTS}
    headings = re.findall(r"^(\w+) (?:scriptlet|program)", packages.output_of("rpm", "-qp", "--scripts", "--triggers", "--filetriggers", built.rpm), re.MULTILINE)
    assert headings == ["preinstall", "postinstall", "preuninstall", "postuninstall", "posttrans"]


@pytest.mark.parametrize("shell", ["dash", "busybox sh", "bash --posix"])
def test_a_shell_does_not_understand_a_script(scripts, shell):
    """Whatever /bin/sh is: each script is read to its end, and one with nothing to do does nothing and says nothing."""
    packages.need(shell.split()[0])
    command, *options = shell.split()
    words = (shutil.which(command), *options)
    for name, path in scripts.items():
        assert packages.output_of(*words, "-n", path) == "", name
        if name != "rpm POSTIN" and name != "rpm POSTTRANS":  # they have something to do in any case
            assert packages.output_of(*words, path, "1" if name.startswith("rpm") else "nothing", env={"PATH": "/nowhere"}) == "", name


def test_a_script_trips_over_the_shell(scripts):
    """Not a word from shellcheck; the names of the units are meant to be words."""
    packages.need("shellcheck")
    assert packages.output_of("shellcheck", "--shell=sh", "--exclude=SC2086", *scripts.values()) == ""


# A Debian tree in which it is installed and purged.


@pytest.mark.timeout(300)
def test_a_purge_leaves_something_behind(built, tmp_path):
    """piuparts finds a tree as it was before: nothing that the package's scripts made is left, nothing of others is changed."""
    packages.need("piuparts")
    mirrors = roots.mirror()
    missing = roots.missing() or ("" if mirrors else "a place that it gets Debian from")
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(f"this machine lacks {missing}")
    tree, mirror = roots.root("bookworm"), mirrors[0]
    ran = subprocess.run(
        [
            "piuparts", "--existing-chroot", tree, "--distribution", "bookworm", "--mirror", f"{mirror} main", "--tmpdir", tmp_path,
            "--no-check-valid-until", "--no-eatmydata",  # it may be a snapshot's; what fakes fsync is not in the tree
            "--warn-on-debsums-errors",  # the tree has no documentation, and with the only man page its folder goes from these lists
            "--ignore-regex", r"/var/lib/dpkg/info/.*\.list",
            built.deb,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert "PASS: Installation and purging test." in ran.stdout
    assert "INFO: Installation of ['./tmp/" in ran.stdout
    assert not re.search(r"debsums: .*\(from scx-enroll package\)", ran.stdout), ran.stdout
