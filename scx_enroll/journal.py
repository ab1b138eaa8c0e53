"""What happened so far: two small state machines, their allowed transitions as tables, to and from JSON.

The *request* is what the certification authority may hold for this host; the *installation* is what the agent's folder
holds. They are apart so that healing goes on while a request is pending. A state is recorded before the act it names:
whoever reads `submitting` knows that a POST may have been sent, whoever reads `installing` knows that files may have
changed. docs/state.md specifies both and is compared with this module by a test.

Nothing here reads a clock or a file; times are whole seconds since the epoch.
"""

import json
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Type, TypeVar, Union, get_type_hints

from scx_enroll.errors import EnrollError, HostError

VERSION = 1
LAST_TIME = 253_402_300_799  # the end of the year 9999; no number of ours is larger
DAY_S = 24 * 3600
HOUR_S = 3600
RESTARTS_PER_HOUR = 3
RESTARTS_PER_DAY = 6

REQUEST: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "none": {"submit": "submitting", "identified": "submitted"},
    "submitting": {"identified": "submitted", "unsent": "none", "refused": "none", "lost": "doubtful"},
    "submitted": {"identified": "submitted", "mistaken": "doubtful", "obtained": "none", "refused": "none", "abandoned": "none"},
    "doubtful": {"submit": "submitting", "identified": "submitted", "abandoned": "none"},
})

INSTALLATION: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "settled": {"install": "installing"},
    "installing": {"proved": "settled", "left_unproven": "settled", "undone": "settled", "failed": "rolling_back"},
    "rolling_back": {"restored": "settled", "kept": "settled"},
})

# What may have happened to a host behind our back; README says what each means and what is done.
CAUSES = (
    "key-regenerated", "overwritten", "link-moved", "deleted", "replaced", "permissions", "served-older", "renamed", "configuration",
    "cloned", "restored", "clock", "agent-reinstalled", "agent-removed", "moved-aside",
)


def step(machine: Mapping[str, Mapping[str, str]], state: str, event: str) -> str:
    """Return the state after `event`; an event that the table lacks is a defect and changes nothing."""
    try:
        return machine[state][event]
    except KeyError:
        raise EnrollError(f"illegal transition: {event} in state {state}") from None


@dataclass(frozen=True)
class Place:
    """What stands at the name the agent reads, or shall stand there; enough to put it back."""

    kind: str  # "link" | "file" | "absent"
    text: str = ""  # of a link
    leaf: str = ""  # SHA-256 of the first certificate reached through the name; "" where there is none
    sha256: str = ""  # of the bytes reached through the name
    saved: str = ""  # those bytes, as a name in original/
    uid: int = 0
    gid: int = 0
    mode: int = 0o444
    marker: bool = False  # the package's marker file stands beside it
    generation: str = ""  # the generation that it is a copy of, "" where it isn't ours
    unserved: bool = False  # the agent was never seen serving it: no way back


@dataclass(frozen=True)
class KeyPlace:
    """What stands at the name by which the agent reads its key, or shall stand there. The bytes are in keys/, by their SPKI."""

    kind: str  # "link" | "file"
    spki: str  # SHA-256 of the public key
    text: str = ""  # of a link
    uid: int = 0
    gid: int = 0
    mode: int = 0o400


@dataclass(frozen=True)
class Request:
    """One certificate signing request, from the moment before its first POST."""

    state: str = "none"
    ca: str = ""  # the server: request IDs mean nothing elsewhere
    csr: str = ""  # PEM
    spki: str = ""  # SHA-256 of the public key that it is for
    id: Optional[int] = None
    since: int = 0  # of the first POST
    tries: int = 0  # POSTs of this CSR
    next: int = 0  # not polled or repeated before
    pending: bool = False  # a page said that it waits for a person
    adopted: bool = False  # the ID is the operator's word, which the key of the certificate has not confirmed yet
    answered: bool = False  # a whole page answered the POST and was not understood: sent again, it may only be stored again
    inputs: str = ""  # hash of what it was made from
    names: Tuple[str, ...] = ()  # that it asks for
    due: int = 0  # when the renewal was planned, 0 where none was
    why: str = ""
    rule: str = ""  # the `name` in [host] by which the host named itself, "" where it was given its name


@dataclass(frozen=True)
class Installation:
    """One change of what the agent reads; needs no configuration to be finished or undone."""

    state: str = "settled"
    layout: str = ""
    port: int = 0
    certificate: str = ""  # the name the agent reads
    target: Optional[Place] = None
    previous: Optional[Place] = None
    running: bool = False  # the agent was meant to run when it began
    pid: int = 0  # of the control command under way
    pid_start: int = 0  # its start time, /proc/PID/stat field 22
    inputs: str = ""
    hold: str = ""  # after a rollback that the operator asked for
    why: str = ""  # it is being rolled back
    key: str = ""  # the name by which the agent reads its key, where that changes, too
    key_target: Optional[KeyPlace] = None
    key_previous: Optional[KeyPlace] = None


@dataclass(frozen=True)
class Backoff:
    """Why a certification authority is not asked for now; `plan` says until when."""

    ca: str  # server, "" for all
    inputs: str  # what it was asked for; other inputs end the back-off, except that of a refused password
    at: int  # the last failure
    failures: int  # in a row
    retry: str  # "soon" | "later" where a person must act | "changed": other inputs only | "joining" the domain | "key" refused by it
    status: int
    message: str
    hint: str
    secret: str = ""  # mark of the password or keytab that was refused; another one ends the back-off


@dataclass(frozen=True)
class Contact:
    """What a certification authority said last, and what was seen last of the certificate that it signs with."""

    ca: str  # server
    at: int
    status: int  # as a run that ends so
    message: str
    issuer: str = ""  # SHA-256 of its newest certificate
    ends: int = 0  # when the first certificate on the way to its root expires
    trusted: bool = True  # it leads to a root of issuer-trust


@dataclass(frozen=True)
class Skip:
    """A generation that is not installed again for now; `plan` says until when."""

    generation: str
    inputs: str
    at: int
    failures: int
    retry: str  # as in Backoff
    status: int
    message: str


@dataclass(frozen=True)
class Latch:
    """The name that the host gave itself, the host name that it rests on, and the `name` in [host] that asked for it."""

    host: str
    fqdn: str
    rule: str = "auto"


@dataclass(frozen=True)
class Identity:
    """What tells this machine from others: marks, no values but the name; "" where a part is not known (`machine` has the rule)."""

    machine: str = ""  # of /etc/machine-id
    product: str = ""  # of the firmware's product UUID
    name: str = ""
    key: str = ""  # SHA-256 of the agent's public key, as seen last
    since: int = 0  # when a part was first seen to have changed, whose old value stands here meanwhile; of a seal: its time


@dataclass(frozen=True)
class Known:
    """What a run saw at its end. What is otherwise at the next one, others did, or time."""

    at: int = 0  # when it was written: with each change, and once a week
    key: str = ""  # SHA-256 of the public key
    place: Optional[Place] = None  # the name the agent reads
    program: str = ""  # the agent's server: its path, and what tells one installation from another; the path alone: gone
    conf: str = ""  # the same of its configuration
    account: str = ""  # who reads the pair: name and uid
    config: str = ""  # hash of what our own configuration means
    served: str = ""  # the leaf that was served although another one was installed
    locked: str = ""  # what the agent's account could not read or enter
    clock: str = ""  # "" | "behind" | "ahead"
    host: str = ""  # what the host called itself
    names: str = ""  # the two that the agent reads


@dataclass(frozen=True)
class Change:
    """Something that others did, or time, as it was first seen, and what became of it."""

    at: int
    cause: str
    what: str  # a sentence
    deeds: Tuple[str, ...] = ()  # what was done
    waits: str = ""  # why not all is done yet; "" where it is


@dataclass(frozen=True)
class Fight:
    """One of the two names that others rewrote after we had put it right."""

    name: str  # "certificate" | "key"
    at: int  # the last time
    until: int = 0  # nothing is done to that name before
    rest_s: int = 0  # the length of the truce, 0 for none


@dataclass(frozen=True)
class Journal:
    """All that one run tells the next."""

    version: int = VERSION
    request: Request = Request()
    installation: Installation = Installation()
    installed: Optional[Place] = None  # as we left it last
    proven: bool = False
    restarting: str = ""  # the leaf ("any") to be served by an agent that we stopped, or that could not start, until it was seen up again
    before: Optional[Place] = None  # what a rollback returns to
    original: Optional[Place] = None  # before our first installation
    seen: str = ""  # the agent's files as our last act left them: not a change by others
    backoffs: Tuple[Backoff, ...] = ()
    contacts: Tuple[Contact, ...] = ()
    revoked: Tuple[str, ...] = ()  # generations that their CA called revoked
    question: int = 0  # when the CA is next asked whether the certificate in service was revoked; 0: not arranged yet
    skipped: Tuple[Skip, ...] = ()
    hold: str = ""  # why nothing is changed until `release`
    latch: Optional[Latch] = None
    identity: Optional[Identity] = None  # of the machine that this is the journal of
    sealed: Optional[Identity] = None  # of the machine on which the image was sealed
    strangers: Tuple[str, ...] = ()  # SHA-256 of public keys that are other machines', or an image's
    hold_until: int = 0  # when the hold ends by itself, 0 for never
    known: Optional[Known] = None
    changes: Tuple[Change, ...] = ()  # the newest ones, oldest first
    fights: Tuple[Fight, ...] = ()
    newest: int = 0  # number of the newest generation, 0 where this was not written down yet
    untried: bool = False  # `installed` was put there while the agent did not run, and was not seen served since: it may be undone

    def held(self, now: int) -> str:
        """Return why nothing may be changed now, "" where it may."""
        return "" if self.hold_until and now >= self.hold_until else self.hold


@dataclass(frozen=True)
class Origin:
    """Where a generation came from."""

    version: int = VERSION
    ca: str = ""  # server
    request_id: Optional[int] = None
    obtained: int = 0
    due: int = 0  # when the renewal that brought it was planned, 0 where none was; -n: 0.1.0 spread the next one over a part in n
    how: str = "issued"  # "issued" | "adopted" | "file"
    number: int = 0  # the how-manieth of this host; set by the store


@dataclass(frozen=True)
class Submission:
    """One POST, as the budget counts it."""

    at: int
    counts: bool  # it issued a certificate or may have


def free_at(times: Iterable[int], allowed: int, window_s: int) -> int:
    """Return when at most `allowed` of `times` are younger than the window; 0 where that holds already."""
    newest_first = sorted(times, reverse=True)
    return newest_first[allowed] + window_s if len(newest_first) > allowed else 0


NOWHERE = "-"  # no server is called so: a refused secret that no CA would be given now


@dataclass(frozen=True)
class Budget:
    """Submissions and restarts so far, and passwords and keys that were refused: accounts lock."""

    version: int = VERSION
    submissions: Tuple[Submission, ...] = ()
    restarts: Tuple[int, ...] = ()
    refused: Tuple[Backoff, ...] = ()  # one for each CA that would be given the same secret, with its mark
    salt: str = ""  # of the marks of refused passwords
    ahead: int = 0  # when times of the future were first noticed, by the clock of then

    def restarts_until(self, needed: int = 1) -> int:
        """Return when `needed` restarts fit into the budget; a time that has come means now."""
        return max(
            free_at(self.restarts, RESTARTS_PER_HOUR - needed, HOUR_S),
            free_at(self.restarts, RESTARTS_PER_DAY - needed, DAY_S),
        )

    def current(self, now: int) -> "Budget":
        """Return what counts: what is over a day old does not; a time in the future counts as now."""
        kept = self.kept(now)
        return replace(
            kept,
            submissions=tuple(replace(s, at=min(s.at, now)) for s in kept.submissions),
            restarts=tuple(min(at, now) for at in kept.restarts),
            ahead=0,
        )

    def kept(self, now: int) -> "Budget":
        """Return what to save: without what is over a day old.

        Times in the future are kept as they are for a day from when they were noticed: the clock may be behind now and
        right tomorrow, or may have run ahead when they were written. Neither frees anything, neither blocks for years.
        """
        times = (*self.restarts, *(s.at for s in self.submissions))
        ahead = (self.ahead if 0 < self.ahead <= now else now) if any(at > now for at in times) else 0
        spent = ahead and now >= ahead + DAY_S

        def counts(at: int) -> bool:
            return not spent if at > now else at > now - DAY_S

        return replace(
            self,
            submissions=tuple(s for s in self.submissions if counts(s.at)),
            restarts=tuple(at for at in self.restarts if counts(at)),
            ahead=0 if spent else ahead,
        )


T = TypeVar("T")

_WORDS: Mapping[type, Tuple[str, Tuple[str, ...]]] = MappingProxyType({
    Place: ("kind", ("link", "file", "absent")),
    KeyPlace: ("kind", ("link", "file")),
    Backoff: ("retry", ("soon", "later", "changed", "joining", "key")),
    Skip: ("retry", ("soon", "later", "changed")),
    Known: ("clock", ("", "behind", "ahead")),
    Change: ("cause", CAUSES),
    Fight: ("name", ("certificate", "key")),
})


def to_json(value: Any) -> bytes:
    """Return the JSON of a dataclass of this module, one key a line so that a person can read it."""
    return (json.dumps(asdict(value), indent=1, sort_keys=True) + "\n").encode()


def from_json(kind: Type[T], data: bytes, name: str) -> T:
    """Read what `to_json` wrote.

    Raises HostError for damaged data, an unknown version, key or state: nothing is guessed.
    """
    try:
        raw = json.loads(data)
        if raw.get("version") != VERSION:
            raise ValueError(f"version {raw.get('version')!r}")
        if kind is Journal and raw.pop("salt", None):  # 0.1.0 kept refused passwords here; each is tried once more
            raw["backoffs"] = [backoff for backoff in raw["backoffs"] if not backoff["secret"]]
        if kind is Origin and "first" in raw:  # 0.1.0, whose plan stays in force for what it obtained
            raw["due"] = -3 if raw.pop("first") else -10
        value: T = _build(kind, raw)
        if isinstance(value, Journal):
            _check_states(value)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as problem:
        raise HostError(
            f"{name} is not understood: {problem}",
            f"if a newer scx-enroll wrote it, install that again; else move {name} away"
            + (": what is installed is adopted, and a pending request must be withdrawn at the CA" if kind is Journal else ""),
        ) from None
    return value


def _check_states(journal: Journal) -> None:
    for machine, state in ((REQUEST, journal.request.state), (INSTALLATION, journal.installation.state)):
        if state not in machine:
            raise ValueError(f"unknown state {state!r}")
    if journal.installation.state != "settled" and not (journal.installation.target and journal.installation.previous):
        raise ValueError("an open installation without target or previous")
    if bool(journal.installation.key) != bool(journal.installation.key_target and journal.installation.key_previous):
        raise ValueError("a new key without its target or previous")
    if journal.request.state == "submitted" and journal.request.id is None:
        raise ValueError("a submitted request without ID")


def _build(kind: Any, raw: Any) -> Any:
    """Build a value of type `kind` from JSON, strictly: no missing type is guessed and no key is dropped."""
    origin = getattr(kind, "__origin__", None)
    if origin is Union:  # Optional[X]
        return None if raw is None else _build(kind.__args__[0], raw)
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"expected a list, found {type(raw).__name__}")
        return tuple(_build(kind.__args__[0], item) for item in raw)
    if is_dataclass(kind):
        if not isinstance(raw, dict):
            raise ValueError(f"expected an object, found {type(raw).__name__}")
        hints: Dict[str, Any] = get_type_hints(kind)
        unknown = sorted(set(raw) - {field.name for field in fields(kind)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        value = kind(**{key: _build(hints[key], item) for key, item in raw.items()})  # type: ignore[operator]  # a class
        field, words = _WORDS.get(type(value), ("", ()))
        if field and getattr(value, field) not in words:
            raise ValueError(f"unknown {field} {getattr(value, field)!r}")
        return value
    if kind is int and type(raw) is int and abs(raw) > LAST_TIME:
        raise ValueError(f"{raw} is no time")
    if type(raw) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {type(raw).__name__}")
    return raw
