"""The shape of the program: who may know whom, and who may touch what. Imports inside functions count like any other."""

import ast
import glob
import os
import subprocess
import sys

import pytest

# Rank, in steps of ten so that another finds room, and what a module knows of the world: "pure" ones get everything as arguments, time included; "io" ones may look.
RANKS = {
    "__init__": (0, "pure"),
    "errors": (0, "pure"),
    "idle": (0, "io"),
    "der": (10, "pure"),
    "binding": (20, "pure"),
    "spnego": (20, "pure"),
    "keytab": (10, "pure"),
    "challenges": (10, "pure"),
    "request": (10, "pure"),
    "pages": (10, "pure"),
    "hresult": (10, "pure"),
    "journal": (10, "pure"),
    "outcomes": (10, "pure"),
    "verify": (20, "pure"),
    "machine": (20, "pure"),
    "pace": (20, "pure"),
    "case": (30, "pure"),
    "asking": (40, "pure"),
    "plan": (50, "pure"),
    "arguments": (20, "io"),
    "rootfs": (10, "io"),
    "systemd": (10, "io"),
    "durable": (10, "io"),
    "unit": (30, "io"),
    "aside": (45, "io"),
    "values": (15, "pure"),
    "config": (20, "io"),
    "agent": (20, "io"),
    "exchange": (20, "io"),
    "web": (30, "io"),
    "beside": (20, "io"),
    "store": (25, "io"),
    "service": (20, "io"),
    "kerberos": (30, "io"),
    "ntlm": (30, "io"),
    "signin": (40, "io"),
    "ca": (40, "io"),
    "activate": (35, "io"),
    "places": (30, "io"),
    "pairs": (35, "io"),
    "keys": (40, "io"),
    "tidy": (40, "io"),
    "transaction": (40, "io"),
    "unproven": (45, "io"),
    "naming": (30, "io"),
    "identity": (45, "io"),
    "sealing": (75, "io"),
    "access": (30, "io"),
    "causes": (40, "pure"),
    "drift": (60, "io"),
    "preflight": (60, "io"),
    "records": (50, "io"),
    "observe": (50, "io"),
    "acquire": (60, "io"),
    "adoption": (70, "io"),
    "job": (70, "io"),
    "begin": (78, "io"),
    "enroll": (80, "io"),
    "behalf": (90, "io"),
    "cacert": (90, "io"),
    "check": (90, "io"),
    "report": (100, "io"),
    "premises": (110, "io"),
    "unattended": (110, "io"),
    "verbs": (120, "io"),
    "cli": (130, "io"),
    "__main__": (140, "io"),
}
# Everything else of the standard library is refused to a pure module until somebody has thought about it.
PURE_LIBRARY = {
    "__future__", "base64", "binascii", "calendar", "collections", "dataclasses", "enum", "fractions", "functools", "hashlib", "html",
    "ipaddress", "itertools", "json", "math", "re", "string", "struct", "textwrap", "types", "typing", "cryptography",
}
PURE_DATETIME = "datetime"  # may be imported, but not asked for the time
CLOCKS = {"now", "utcnow", "today", "fromtimestamp"}  # without a time zone given, the last one reads the machine's
HEAVY = {"cryptography", "requests", "certsrv", "urllib3", "gssapi", "requests_ntlm"}
HEAVY_AT_TOP = {"ca", "web", "ntlm", "exchange"}  # their classes are made from certsrv's and requests'
FILES = {"idle", "rootfs", "durable", "beside", "store"}
# Calls that make or change a file, or get at its content, whoever spells them.
OPENERS = {"open", "fdopen", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "makedirs", "mkstemp", "NamedTemporaryFile"}
CHANGERS = {"rename", "replace", "unlink", "rmdir", "symlink", "link", "chmod", "chown", "fchmod", "fchown", "truncate", "rmtree", "copyfile"}
OWNERS_OF_FILES = {"os", "io", "shutil", "tempfile", "pathlib"}

HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "scx_enroll")
MODULES = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(HERE, "*.py")))
each_module = pytest.mark.parametrize("name", MODULES)


def parsed(name):
    with open(os.path.join(HERE, f"{name}.py"), encoding="utf-8") as file:
        return ast.parse(file.read())


def imported(tree):
    """Every dotted name that is imported anywhere; of this package its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide whom a module knows"
            if node.module == "scx_enroll":
                yield from (f"scx_enroll.{alias.name}" if alias.name in MODULES else "scx_enroll.__init__" for alias in node.names)
            else:
                yield node.module


def own(tree):
    return {name.split(".")[1] if "." in name else "__init__" for name in imported(tree) if name.split(".")[0] == "scx_enroll"}


def at_top(tree):
    """The import statements that run when the module is imported: none in functions, none for the type checker."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)) and "TYPE_CHECKING" not in ast.dump(getattr(node, "test", ast.Pass())):
            yield from at_top(node)


@pytest.mark.checkout
def test_a_module_that_nobody_placed():
    """Every module has its rank; the table also names those that are to come."""
    assert set(MODULES) <= set(RANKS)


@pytest.mark.checkout
@each_module
def test_a_module_knows_one_of_its_rank_or_above(name):
    """A module imports only lower ranks."""
    rank, _ = RANKS[name]
    assert {other for other in own(parsed(name)) if RANKS[other][0] >= rank and other != "__init__"} == set()


@pytest.mark.checkout
@pytest.mark.parametrize("name", [name for name in MODULES if RANKS.get(name, (0, ""))[1] == "pure"])
def test_a_pure_module_that_knows_the_world(name):
    """Pure modules import pure ones and the part of the library that knows no files, sockets, clock, chance or environment."""
    tree = parsed(name)
    assert {other for other in own(tree) if RANKS[other][1] != "pure"} == set()
    libraries = {module.split(".")[0] for module in imported(tree)} - {"scx_enroll"}
    assert libraries - PURE_LIBRARY - {PURE_DATETIME} == set()
    asked = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    if PURE_DATETIME in libraries:
        assert asked & CLOCKS <= {"fromtimestamp"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called & {"open", "input", "print", "__import__", "exec", "eval"} == set()


@pytest.mark.checkout
@pytest.mark.parametrize("name", [name for name in MODULES if name not in FILES])
def test_a_file_opened_past_the_root(name):
    """Only rootfs opens files, and only store changes them: nobody else could be led outside the root, or write without fsync."""
    found = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add((node.lineno, "open"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OWNERS_OF_FILES:
            if node.attr in OPENERS | CHANGERS:
                found.add((node.lineno, f"{node.value.id}.{node.attr}"))
        elif isinstance(node, ast.ImportFrom) and node.module in OWNERS_OF_FILES:
            found |= {(node.lineno, alias.name) for alias in node.names if alias.name in OPENERS | CHANGERS | {"Path"}}
    assert found == set()


@pytest.mark.checkout
@pytest.mark.parametrize("name", [name for name in MODULES if name not in HEAVY_AT_TOP])
def test_a_heavy_import_that_every_run_pays_for(name):
    """cryptography and requests are imported inside the functions that need them."""
    modules = {module.split(".")[0] for node in at_top(parsed(name)) for module in imported(node)}
    assert modules & HEAVY == set()


@pytest.mark.checkout
def test_the_certification_authority_half_never_sees_the_key():
    """The conversation with AD CS could run as somebody who can read neither key nor state."""
    assert own(parsed("ca")) & {"agent", "store", "service", "journal", "plan"} == set()


def test_an_idle_run_pays_for_what_it_does_not_use():
    """Importing the command line imports neither cryptography nor requests."""
    program = "import sys, scx_enroll.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ran = subprocess.run([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert set(ran.stdout.split()) & (HEAVY | {"importlib_metadata", "pkg_resources"}) == set()
