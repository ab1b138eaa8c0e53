"""The operator's configuration: /etc/scx-enroll/scx-enroll.conf, then conf.d/*.conf beside it, as one frozen `Config`.

A line is `[section]`, `[ca NAME]`, `key = value`, blank, or a comment (`#` or `;`); a value ends before a `#` that follows
a blank; an empty value means the default. A later file wins; within one file a key stands once. Everything that is wrong is
reported at once, and nothing is guessed: an unknown key is an error that names the nearest known one.
"""

import difflib
import os
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from scx_enroll import values
from scx_enroll.errors import ConfigError, Unconfigured
from scx_enroll.rootfs import Root

PATH = "/etc/scx-enroll/scx-enroll.conf"
MAX_FILE_BYTES = 64 << 10  # the shipped file has 2 kB
MAX_FILES = 64  # in conf.d
MAX_SHOWN = 80  # characters of a wrong value in a message
MAX_CERTIFICATES_PER_DAY = 20
MAX_SUBMISSIONS_PER_DAY = 200
MAX_PENDING_DAYS = 365


@dataclass(frozen=True)
class Host:
    """What this host is called: "auto", an FQDN, or a pattern with {hostname}; and further DNS names."""

    name: str = "auto"
    alternative_names: Tuple[str, ...] = ()


@dataclass(frozen=True)
class CA:
    """One certification authority: where, as whom, and what is trusted; "" where nothing was given."""

    label: str = ""  # "" for a plain [ca]
    server: str = ""  # host or host:port
    template: str = ""
    auth: str = "kerberos"
    user: str = ""
    password_file: str = ""
    keytab: str = ""
    principal: str = ""
    proxy: str = ""
    client_certificate: str = ""
    client_key: str = ""
    server_trust: str = "system"
    issuer_trust: str = "/etc/scx-enroll/ca.pem"
    require_revocation: bool = False
    require_cn: bool = True


@dataclass(frozen=True)
class Renewal:
    """When to renew, in parts of the certificate's lifetime; and how much may be asked of a CA."""

    at: Fraction = Fraction(2, 3)
    spread: Fraction = Fraction(1, 10)
    certificates_per_day: int = 3
    submissions_per_day: int = 24
    pending_days: int = 30


@dataclass(frozen=True)
class Agent:
    """How the agent is found and treated; `port` 0 is auto."""

    layout: str = "auto"
    port: int = 0
    activation: str = "restart"
    key: str = "agent"
    new_key: str = "rsa:3072"
    minimum_key: str = ""
    settle_s: int = 120
    restart_window: Tuple[Tuple[int, int], ...] = ()  # from, to, in minutes of the day


@dataclass(frozen=True)
class Report:
    """Where to report to."""

    metrics: str = ""


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    host: Host
    cas: Tuple[CA, ...]
    renewal: Renewal
    agent: Agent
    report: Report


class _Where(NamedTuple):
    order: int  # of the file
    file: str
    line: int


class _Setting(NamedTuple):
    where: _Where
    text: str


_Section = Dict[str, _Setting]  # "" holds the section's first header
_Problems = List[Tuple[_Where, str]]


# Which keys of [ca] belong to which ways of signing in, and those that one can't do without.
_PASSWORD = ("user", "password-file")
_METHODS = dict(kerberos=("keytab", "principal"), ntlm=_PASSWORD, basic=_PASSWORD, certificate=("client-certificate", "client-key"))

# Every section and key, and what it takes. The defaults stand on the classes.
_KEYS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "host": {"name": values.host_name, "alternative-names": values.dns_names},
    "ca": {
        "server": values.server,
        # A newline would add attributes to the request: facts/adcs.md section 1.
        "template": values.shaped(r"[A-Za-z0-9 ()_.-]{1,64}", "a template's name: letters, digits, blanks and ()_.-"),
        "auth": values.choice(*_METHODS),
        "user": values.shaped(r"[^:]{1,256}", "a user's name: it can't hold a colon"),
        "password-file": values.path,
        "keytab": values.path,
        "principal": values.anything,
        "proxy": values.shaped(r"https?://[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?/?", "a URL such as http://proxy.corp.example:3128"),
        "client-certificate": values.path,
        "client-key": values.path,
        "server-trust": lambda text: text if text == "system" else values.path(text),
        "issuer-trust": values.path,
        "require-revocation": values.flag,
        "require-cn": values.flag,
    },
    "renewal": {
        "at": values.fraction,
        "spread": values.fraction,
        "certificates-per-day": values.count(1, MAX_CERTIFICATES_PER_DAY),
        "submissions-per-day": values.count(1, MAX_SUBMISSIONS_PER_DAY),
        "pending-days": values.count(1, MAX_PENDING_DAYS),
    },
    "agent": {
        "layout": values.choice("auto", "omi", "classic-omi", "pegasus"),
        "port": values.port,
        "activation": values.choice("restart", "reload"),
        "key": values.choice("agent", "new"),
        "new-key": values.key_kind,
        "minimum-key": values.key_kind,
        "settle": values.duration,
        "restart-window": values.windows,
    },
    "report": {"metrics": values.path},
}

# What this version does not do yet: these keys may so far have their default only.
_LATER: Mapping[str, Tuple[str, ...]] = {"report": ("metrics",)}
_HINT = "correct the lines named, then run scx-enroll again"

_NEEDED = ("user", "client-certificate", "client-key")


def given(root: Root, path: str) -> Config:
    """Return the configuration at an ordinary path, or, for "", the usual one beneath the root. Raises as `load`."""
    return load(Root("/", notes=root.notes), os.path.abspath(path)) if path else load(root)


def load(root: Root, path: str = PATH) -> Config:
    """Return the configuration at `path` beneath `root`, and of conf.d beside it.

    Raises Unconfigured if there is no file or no server in it, ConfigError with every problem as `file:line: problem`, and
    HostError if a file is not root's alone to write, or can't be read.
    """
    problems: _Problems = []
    sections: Dict[str, _Section] = {}
    for order, (file, data) in enumerate(_files(root, path)):
        _parse(_Where(order, file, 0), data, sections, problems)
    cas = {name: section for name, section in sections.items() if _kind(name) == "ca"}  # "ca", or "ca NAME" each
    config = Config(
        host=_build(Host, "host", sections, problems),
        cas=tuple(replace(_build(CA, name, sections, problems), label=name[3:]) for name in cas),
        renewal=_build(Renewal, "renewal", sections, problems),
        agent=_build(Agent, "agent", sections, problems),
        report=_build(Report, "report", sections, problems),
    )
    if not problems and not any(ca.server for ca in config.cas):
        raise Unconfigured(f"no certification authority is configured in {path}", "set server and template in [ca]")
    for section in cas.values():
        _check_ca(section, problems)
    if "ca" in cas and len(cas) > 1:
        problems.append((cas["ca"][""].where, "[ca] can't stand beside [ca NAME]: name them all"))
    if config.renewal.spread >= config.renewal.at:
        renewal = sections["renewal"]
        where = renewal.get("spread", renewal.get("at", renewal[""])).where
        problems.append((where, "spread must be less than at"))
    servers = [re.sub(":443$", "", ca.server) for ca in config.cas]
    for at, section in enumerate(cas.values()):
        if not problems and servers[at] in servers[:at]:
            problems.append((section["server"].where, f"server: {servers[at]} stands in another section too"))
    if problems:
        message = "\n".join(f"{where.file}:{where.line}: {what}" for where, what in sorted(problems))
        raise ConfigError(message, _HINT)
    return config


def _files(root: Root, path: str) -> List[Tuple[str, bytes]]:
    folder = f"{path.rpartition('/')[0]}/conf.d"
    extra = [f"{folder}/{name}" for name in root.listdir(folder) if name.endswith(".conf")]
    if len(extra) > MAX_FILES:
        raise ConfigError(f"{folder} holds more than {MAX_FILES} files", "merge them")
    found = []
    for name in (path, *extra):
        try:
            found.append((name, root.read(name, MAX_FILE_BYTES, trusted=True)))
        except FileNotFoundError:
            if root.entry(name).kind == "link":
                raise ConfigError(f"{name} is a link to nothing", "mend or remove it") from None
    if not found:
        raise Unconfigured(f"there is no {path}", "write one with [ca] server and template in it")
    return found


def _kind(section: str) -> str:
    return section.partition(" ")[0]


def _parse(file: _Where, data: bytes, sections: Dict[str, _Section], problems: _Problems) -> None:
    """Add the settings of one file to `sections`, and what is wrong with it to `problems`."""
    name: Optional[str] = ""  # of the section we are in; None in one that is not known
    seen: Dict[Tuple[str, str], int] = {}
    for where, line in _lines(file, data, problems):
        if line.startswith("["):
            name = _section(line, where, problems)
            if name:
                sections.setdefault(name, {}).setdefault("", _Setting(where, ""))
            continue
        key, equals, value = (part.strip(" ") for part in line.partition("="))
        if not equals:
            problems.append((where, "neither [section] nor key = value"))
        elif name == "":
            problems.append((where, f"{key} stands before any section"))
        elif name and key not in _KEYS[_kind(name)]:
            problems.append((where, f"unknown key {key} in [{name}]{_nearest_key(key, _kind(name))}"))
        elif name and seen.setdefault((name, key), where.line) != where.line:
            problems.append((where, f"{key} stands in line {seen[name, key]} too"))
        elif name:
            sections[name][key] = _Setting(where, re.split("(?:^| )#", value, maxsplit=1)[0].rstrip(" "))


def _lines(file: _Where, data: bytes, problems: _Problems) -> Iterator[Tuple[_Where, str]]:
    """Yield what is neither blank nor a comment, without blanks around it."""
    for number, raw in enumerate(data.split(b"\n"), 1):
        where = file._replace(line=number)
        try:
            line = raw.decode("utf-8").rstrip("\r").replace("\t", " ").strip(" ")
        except UnicodeDecodeError:
            problems.append((where, "not UTF-8"))
            continue
        if not line.isprintable():
            problems.append((where, "holds a character that can't be printed"))
        elif line and line[0] not in "#;":
            yield where, line


def _section(line: str, where: _Where, problems: _Problems) -> Optional[str]:
    shape = re.fullmatch(r"\[ *([^][ ]+)(?: +([^][ ]+))? *\] *(?:#.*)?", line)
    if not shape:
        problems.append((where, "not of the form [section] or [ca NAME]"))
        return None
    kind, label = shape[1], shape[2] or ""
    name = f"{kind} {label}".rstrip(" ")
    if kind not in _KEYS or (label and kind != "ca"):
        problems.append((where, f"unknown section [{name}]{_nearest(kind, _KEYS)}"))
    elif not re.fullmatch("[A-Za-z0-9_.-]{0,32}", label, re.ASCII):
        problems.append((where, "a CA's name is up to 32 letters, digits and _.-"))
    else:
        return name
    return None


def _nearest_key(key: str, section: str) -> str:
    other = next((name for name, keys in _KEYS.items() if key in keys), "")
    return f", it belongs into [{other}]" if other else _nearest(key, _KEYS[section])


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word[:64], known, 1)
    return f", did you mean {near[0]}?" if near else f", known are {', '.join(known)}"


def _build(kind: Callable[..., Any], name: str, sections: Mapping[str, _Section], problems: _Problems) -> Any:
    """Return a `kind` with what section `name` sets, and the class's defaults for the rest."""
    values: Dict[str, Any] = {}
    section = _kind(name)
    for key, setting in sections.get(name, {}).items():
        if not setting.text:
            continue
        field = "settle_s" if key == "settle" else key.replace("-", "_")
        try:
            values[field] = _KEYS[section][key](setting.text)
        except ConfigError as problem:  # from request's own checks, with its own way to say where
            problems.append((setting.where, f"{key}: {problem.message.partition(': ')[2]}"))
        except ValueError as problem:
            problems.append((setting.where, f"{key}: {setting.text[:MAX_SHOWN]!r} {problem}"))
        if key in _LATER.get(section, ()) and values.get(field, getattr(kind, field)) != getattr(kind, field):
            problems.append((setting.where, f"{key} = {setting.text} is not available in this version"))
    return kind(**values)


def _check_ca(section: _Section, problems: _Problems) -> None:
    """Add what is missing, and what doesn't go together."""

    def said(key: str) -> str:
        return section[key].text if key in section else ""

    def complain(key: str, what: str) -> None:
        problems.append((section.get(key, section[""]).where, what))

    for key in ("server", "template"):
        if not said(key):
            complain(key, f"{key} is not set")
    auth = said("auth") or CA.auth
    for key in dict.fromkeys(key for keys in _METHODS.values() for key in keys) if auth in _METHODS else ():
        methods = [method for method, keys in _METHODS.items() if key in keys]
        if auth in methods and key in _NEEDED and not said(key):
            complain("auth", f"auth = {auth} needs {key}")
        elif auth not in methods and said(key):
            other = f"not {auth}" if said("auth") else f"but auth is not set, and {auth} is the default: set auth, or take {key} out"
            complain(key, f"{key} is for auth = {' or '.join(methods)}, {other}")
    if auth == "kerberos" and re.fullmatch("[0-9.]+(:[0-9]+)?", said("server"), re.ASCII):
        complain("server", "server: auth = kerberos needs the server's full name, there are no tickets for addresses")
