"""Where the contenders stand: environments of their own beneath .venv/, on the distribution's Python where there is one."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import certsrv

import scx_enroll

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
DISTRIBUTION = "/usr/bin/python3"
PIP = ("-I", "-m", "pip", "--disable-pip-version-check", "-q", "install")
LIMIT_S = 600
VERSIONS = (
    "import cryptography, platform, requests, ssl;"
    " print(f'Python {platform.python_version()}, cryptography {cryptography.__version__}, requests {requests.__version__},"
    " {\" \".join(ssl.OPENSSL_VERSION.split()[:2])}')"
)


def run(*words: str) -> str:
    """The command succeeded, and this is what it said."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(words)}\n{done.stdout}")
    return done.stdout


def works(python: str, code: str) -> bool:
    return subprocess.run([python, "-I", "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def base() -> str:
    """The distribution's interpreter, or else the one that this runs on."""
    if os.access(DISTRIBUTION, os.X_OK) and works(DISTRIBUTION, "import sys, ensurepip, venv; assert sys.version_info >= (3, 9)"):
        return DISTRIBUTION
    return sys.executable


def environment(name: str, *requirements: str) -> str:
    """Make the environment of that name on `base()`, unless it stands there as it should; returns its interpreter."""
    place = os.path.join(CHECKOUT, ".venv", name)
    python, stamp = os.path.join(place, "bin", "python"), os.path.join(place, ".made")
    key = hashlib.sha256("\n".join((place, base(), sys.version, *requirements)).encode()).hexdigest()
    try:
        with open(stamp, encoding="ascii") as file:
            made = file.read() == key and works(python, "pass")
    except FileNotFoundError:
        made = False
    if not made:
        shutil.rmtree(place, ignore_errors=True)
        run(base(), "-m", "venv", place)
        run(python, *PIP, *requirements)
        with open(stamp, "w", encoding="ascii") as file:
            file.write(key)
    return python


@dataclass(frozen=True)
class Place:
    """An interpreter, the folder with scx_enroll and certsrv for it, and the script that starts the program."""

    python: str
    folder: str
    program: str
    libraries: str  # whose

    @property
    def versions(self) -> str:
        return run(self.python, "-I", "-c", VERSIONS).strip()


def ours() -> Place:
    """Put the installed package and certsrv into a folder of their own, as the deb and the rpm do, compiled, with their launcher."""
    python, libraries = base(), "the distribution's python3 and libraries"
    if python != DISTRIBUTION or not works(python, "import cryptography, requests"):
        whose = "the distribution's" if python == DISTRIBUTION else "another"
        python, libraries = environment("bench-python", "cryptography", "requests"), f"{whose} python3, libraries from PyPI"
    home = os.path.join(CHECKOUT, ".venv", "bench")
    folder, program = os.path.join(home, "lib"), os.path.join(home, "scx-enroll.py")
    shutil.rmtree(home, ignore_errors=True)
    os.makedirs(folder)
    shutil.copytree(os.path.dirname(scx_enroll.__file__), os.path.join(folder, "scx_enroll"), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(certsrv.__file__, folder)
    run(python, "-I", "-m", "compileall", "-q", folder)
    with open(os.path.join(CHECKOUT, "packaging", "launcher"), encoding="utf-8") as file:
        launcher = file.read()
    with open(program, "w", encoding="utf-8") as file:
        file.write(launcher.replace("@PYTHON@", python).replace("/usr/share/scx-enroll", folder))
    return Place(python, folder, program, libraries)


def certbot(which: str) -> str:
    """The program of an environment made from certbot-WHICH.txt."""
    return os.path.join(os.path.dirname(environment(f"certbot-{which}", "-r", os.path.join(HERE, f"certbot-{which}.txt"))), "certbot")


def cli_versions() -> str:
    """Of openssl and curl, for the machine's line."""
    return ", ".join((" ".join(run("openssl", "version").split()[:2]), " ".join(run("curl", "--version").split()[:2])))


def machine() -> str:
    """One line on the machine."""
    model = "unknown CPU"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("model name", "Model", "cpu model")):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores, {model}, Linux {os.uname().release.partition('-')[0]}"
