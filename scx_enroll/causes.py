"""Names what changed behind our back, by its cause: what was remembered of the last look against what this one sees.

Pure. Each table asks one question, and the first of its rows that matches is the answer: a package upgrade that replaced the key also
moved the link, and is one change. A cause is named once, when it is first seen. README says what each one means to the operator.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Callable, Mapping, Optional, Sequence, Tuple

from scx_enroll import machine
from scx_enroll.case import Step
from scx_enroll.journal import DAY_S, HOUR_S, Change, Fight, Journal, Known, Place

KEPT_CHANGES = 16
SLACK_S = 300  # clocks that are set differ by less, and so does the time between two looks of an hourly timer
BUILT = 1_735_689_600  # 2025: a clock before that has not been set
LONG_S = 366 * DAY_S  # between two runs of an hourly timer
FRESH_S = 7 * DAY_S  # after so long the time is written down anew
SCOM = "SCOM's signing"
ITSELF = "itself"


@dataclass(frozen=True)
class Sight:
    """What one look saw, as far as causes can be told from it."""

    known: Known  # what is remembered of it
    certificate: str = ""  # the name the agent reads
    signer: str = ""  # of the certificate there: SCOM, ITSELF, an issuer; "" where there is none
    fits: bool = True  # it is for the agent's key
    older: str = ""  # the generation of ours that is served instead
    generations: Tuple[str, ...] = ()
    newest: int = 0  # number of the newest generation
    aside: bool = False  # a package script moved the pair aside and left it there


def remembered(journal: Journal) -> Known:
    """Return what the last run saw; of an older program, or where it was killed or saw no agent, what one left installed."""
    known = journal.known or Known()
    return known if known.place else replace(known, place=journal.installed)


def _same(one: Optional[Place], other: Place) -> bool:
    return one is not None and (one.kind, one.text, one.sha256) == (other.kind, other.text, other.sha256)


@dataclass(frozen=True)
class Compared:
    """What was remembered, and what is there now."""

    journal: Journal
    now: Sight

    @property
    def was(self) -> Known:
        """What the last run saw."""
        return remembered(self.journal)

    @property
    def before(self) -> Place:
        """What stood at the name then, as far as is known."""
        return self.was.place or self.place

    @property
    def place(self) -> Place:
        """What stands at the name now."""
        return self.now.known.place or Place("absent")

    @property
    def touched(self) -> bool:
        """Whether others changed the name, or what it leads to."""
        return self.was.place is not None and not _same(self.was.place, self.place) and not _same(self.journal.installed, self.place)

    @property
    def elsewhere(self) -> bool:
        """Whether the agent reads another pair of names: nobody touched the one that it read."""
        return bool(self.was.names) and self.was.names != self.now.known.names

    @property
    def upgraded(self) -> bool:
        """Whether the agent's program is another."""
        return bool(self.was.program) and self.was.program != self.now.known.program


Row = Callable[[Compared], str]  # "" or what happened, in a sentence


def _moved_aside(one: Compared) -> str:
    gone = one.touched or (one.was.key and not one.now.known.key)
    return "a package script moved the agent's pair aside (*_temp) and made no new one" if one.now.aside and gone else ""


def _restored(one: Compared) -> str:
    if one.journal.known is None and any(change.cause == "cloned" for change in one.journal.changes):
        return ""  # the records are where the state was set aside to
    copy = one.place.generation
    if copy and copy not in one.now.generations and not _same(one.was.place, one.place):
        return f"generation {copy} is installed, which our records do not know: they come from a backup, or were lost"
    newer = 0 < one.journal.newest < one.now.newest and one.journal.request.state == "none"
    return "the journal is older than the newest generation: it comes from a backup" if newer else ""


def _key_deleted(one: Compared) -> str:
    return "the agent's key was deleted" if one.was.key and not one.now.known.key else ""


def _key_regenerated(one: Compared) -> str:
    now = one.now.known
    if not one.was.key or now.key == one.was.key or (_same(one.journal.installed, one.place) and one.now.fits):
        return ""
    own = one.now.signer == ITSELF
    if own and one.place.kind == "file" and one.place.marker:
        return "a package upgrade replaced the agent's key and certificate"
    if own and one.place.kind == "link" and not one.place.generation:
        by = "a package upgrade" if one.upgraded else "scxsslconfig -f"
        return f"{by} made a new key and certificate, and linked its own: {one.place.text}"
    return "somebody replaced the agent's key"


def _deleted(one: Compared) -> str:
    if not one.touched or one.place.sha256:
        return ""
    if one.place.kind == "absent":
        return f"{one.now.certificate} was deleted"
    return f"{one.place.text} was deleted, to which the agent's link leads" if one.before.text == one.place.text else ""


def _by(one: Compared) -> str:
    if one.now.signer == SCOM:
        return f"by {SCOM}"
    kinds = {"": "what is no certificate", ITSELF: "a self-signed certificate"}
    return f"by somebody, with {kinds.get(one.now.signer, f'a certificate of {one.now.signer}')}"


def _overwritten(one: Compared) -> str:
    if not one.touched or (one.before.kind, one.before.text) != (one.place.kind, one.place.text):
        return ""
    if one.place.kind == "link":
        return f"the agent's certificate was overwritten through the link, {_by(one)}"
    return f"{one.now.certificate} was overwritten by {SCOM}" if one.now.signer == SCOM else ""


def _replaced(one: Compared) -> str:
    return f"{one.now.certificate} was replaced by a file, {_by(one)}" if one.touched and one.place.kind == "file" else ""


def _link_moved(one: Compared) -> str:
    where = "" if one.place.sha256 else ", where nothing is"
    return f"{one.now.certificate} was linked to {one.place.text}{where}" if one.touched else ""


def _copy_spoilt(one: Compared) -> str:
    def rights(place: Place) -> str:
        return f"owner {place.uid}:{place.gid}, mode {place.mode:04o}"

    kept = one.journal.installed
    if kept is None or not kept.generation or not _same(kept, one.place) or rights(kept) == rights(one.place):
        return ""
    return "" if rights(one.before) == rights(one.place) else f"{kept.text} has {rights(one.place)} now, and had {rights(kept)}"


def _served_older(one: Compared) -> str:
    served = one.now.known.served
    if not served or served == one.was.served:
        return ""
    what = f"the older generation {one.now.older}" if one.now.older else f"{served[:16]}, which is not ours,"
    return f"the agent serves {what} although another one is installed"


def _locked(one: Compared) -> str:
    locked = one.now.known.locked
    return f"the agent's account can't get at {locked} any more" if locked and locked != one.was.locked else ""


def _removed(one: Compared) -> str:
    return "the agent was removed" if one.upgraded and " " not in one.now.known.program else ""


def _reinstalled(one: Compared) -> str:
    was, now = one.was, one.now.known
    if one.upgraded:
        return "the agent was installed again or upgraded"
    moved = was.account and now.account and was.account != now.account
    return f"the agent's account has another number: {now.account}, before {was.account}" if moved else ""


def _named_otherwise(one: Compared) -> str:
    return f"the agent reads another pair now, as it is configured: {one.now.known.names.replace(' ', ' and ')}" if one.elsewhere else ""


def _agent_configured(one: Compared) -> str:
    was, now = one.was.conf, one.now.known.conf
    return f"the agent's configuration changed: {now.partition(' ')[0]}" if was and now and was != now and not one.upgraded else ""


def _configured(one: Compared) -> str:
    was, now = one.was.config, one.now.known.config
    alike = was.partition(" ")[0] == now.partition(" ")[0]  # written by the same version of the program
    return "the configuration of scx-enroll changed" if was and alike and was != now else ""


def _renamed(one: Compared) -> str:
    was, now = one.was.host, one.now.known.host
    return f"this host calls itself {now}, and was {was}" if was and now and not machine.same_name(was, now) else ""


def _clock(one: Compared) -> str:
    now = one.now.known.clock
    told = {"behind": "lies before what was written by its time", "ahead": "is more than a year ahead of the last run"}
    return f"this host's clock {told[now]}: it is wrong now, or was" if now and now != one.was.clock else ""


TABLES: Tuple[Tuple[Tuple[str, Row], ...], ...] = (
    (
        ("moved-aside", _moved_aside), ("restored", _restored), ("deleted", _key_deleted), ("key-regenerated", _key_regenerated),
        ("deleted", _deleted), ("overwritten", _overwritten), ("replaced", _replaced), ("link-moved", _link_moved),
        ("permissions", _copy_spoilt), ("served-older", _served_older),
    ),
    (("permissions", _locked),),
    (("agent-removed", _removed), ("agent-reinstalled", _reinstalled)),
    (("configuration", _named_otherwise), ("configuration", _agent_configured)),
    (("configuration", _configured),),
    (("renamed", _renamed),),
    (("clock", _clock),),
)
REWRITES = ("key-regenerated", "deleted", "overwritten", "replaced", "link-moved")  # of one of the agent's two names


def named(journal: Journal, sight: Sight) -> Tuple[Tuple[str, str], ...]:
    """Return what others did since the last run, or time: causes and sentences."""
    one = Compared(journal, sight)
    tables = TABLES[1:] if one.elsewhere else TABLES
    answers = (((cause, row(one)) for cause, row in table) for table in tables)
    found = (next(((cause, what) for cause, what in answer if what), None) for answer in answers)
    return tuple(change for change in found if change)


def clock(now: int, known: Optional[Known], written: Sequence[int]) -> str:
    """Return how the clock is wrong, as far as can be told; `written`: times that were written down, none of the future."""
    last = max((known.at if known else 0, *written), default=0)
    if now < max(last - SLACK_S, BUILT):
        return "behind"
    return "ahead" if known and known.at and now > known.at + LONG_S else ""


def fights(journal: Journal, sight: Sight, causes: Sequence[str], now: int) -> Tuple[Fight, ...]:
    """Return the fights after these changes: two rewrites of a name within an hourly look's hour, each of what we had put there.

    The truce is an hour long, and twice as long each time, up to a day; a quiet day after it ends the fight.
    """
    ours = journal.installed is not None and (journal.known is None or _same(journal.known.place, journal.installed))
    if not ours or not set(causes) & set(REWRITES) or Compared(journal, sight).elsewhere:
        return journal.fights
    name = "key" if journal.known and journal.known.key != sight.known.key else "certificate"
    last = next((fight for fight in journal.fights if fight.name == name and fight.at <= now), None)
    rest = 0
    if last and now < last.until + DAY_S:
        rest = min(2 * last.rest_s, DAY_S)
    elif last and now - last.at < HOUR_S + SLACK_S:
        rest = HOUR_S
    others = tuple(fight for fight in journal.fights if fight.name != name)
    return (*others, Fight(name, now, now + rest if rest else 0, rest))


DEEDS: Mapping[str, str] = {
    "recover": "an interrupted run finished", "make_key": "a key made", "restore_pair": "moved back", "adopt": "adopted",
    "relink": "relinked", "install": "reinstalled", "restart": "restarted", "submit": "asked the CA", "repeat": "asked the CA",
    "poll": "asked the CA",
}


def settled(changes: Tuple[Change, ...], acts: Sequence[Step], waits: str) -> Tuple[Change, ...]:
    """Return the changes with what was done about those that were open, and what is still waited for, "" for nothing."""
    deeds = [DEEDS[act.action] for act in acts if act.action in DEEDS]
    return tuple(
        replace(one, deeds=tuple(dict.fromkeys((*one.deeds, *deeds))), waits=waits) if one.waits else one for one in changes
    )


def waits(step: Step) -> str:
    """Return what is waited for where a run ends with this step, "" for nothing."""
    if step.action == "nothing":
        return ""
    until = f", until {datetime.fromtimestamp(step.until, timezone.utc):%Y-%m-%d %H:%M:%S} UTC" if step.until else ""
    return f"{'nothing' if step.action == 'hold' else 'waiting'}: {step.reason}{until}"


def done(change: Change) -> str:
    """Return what was done about a change, in words."""
    return ", ".join(filter(None, (*change.deeds, change.waits))) or "nothing had to be done"
