"""What changed behind our back is named by its cause, once; and a name that two rewrite is left alone for longer and longer."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import causes
from scx_enroll.case import Step
from scx_enroll.causes import ITSELF, SCOM, Sight
from scx_enroll.journal import CAUSES, DAY_S, HOUR_S, Change, Fight, Journal, Known, Place, Request

NOW = 1_800_000_000
ID = "0123456789abcdef"
OURS = Place("link", f"scx-enroll-{ID}-1.pem", ID * 4, "s" * 64, mode=0o444, generation=ID)
KNOWN = Known(NOW - 60, "key", OURS, "/opt/omi/bin/omiserver 1,2,3", "/etc/opt/omi/conf/omiserver.conf 4,5,6", "omi 990", "0.1 aa", host="old", names="/ssl/omi.pem /ssl/omikey.pem")
WAS = Journal(installed=OURS, known=KNOWN, newest=2)
SAME = Sight(KNOWN, "/ssl/omi.pem", "CN=CA", generations=("older", ID), newest=2)
HOST_PEM = Place("link", "/ssl/omi-host-h.pem", "l", "h" * 64)
FILE = Place("file", "", "l", "f" * 64)


def seen(place=OURS, signer="CN=CA", **known):
    """A look at a host where something is other than before."""
    own = {name: known.pop(name) for name in ("generations", "newest", "aside", "older", "fits") if name in known}
    return replace(SAME, known=replace(KNOWN, place=place, **known), signer=signer, **own)


EACH = [
    ("key-regenerated", "a package upgrade replaced", seen(replace(FILE, marker=True), ITSELF, key="new")),
    ("key-regenerated", "scxsslconfig -f made a new key", seen(HOST_PEM, ITSELF, key="new")),
    ("key-regenerated", "scxsslconfig -f made a new key", seen(replace(HOST_PEM, marker=True), ITSELF, key="new")),
    ("key-regenerated", "somebody replaced the agent's key", seen(replace(FILE, marker=True), "CN=Other", key="new")),
    ("key-regenerated", "somebody replaced the agent's key", seen(HOST_PEM, "CN=Other", key="new")),
    ("key-regenerated", "somebody replaced the agent's key", seen(OURS, ITSELF, key="new", fits=False)),
    ("key-regenerated", "a package upgrade made a new key", seen(HOST_PEM, ITSELF, key="new", program="/opt/omi/bin/omiserver 9,9,9")),
    ("key-regenerated", "somebody replaced the agent's key", seen(key="new", fits=False)),
    ("key-regenerated", "somebody replaced the agent's key", seen(FILE, ITSELF, key="new")),
    ("overwritten", "through the link, by SCOM's signing", seen(replace(OURS, leaf="x", sha256="x", generation=""), SCOM)),
    ("overwritten", "through the link, by somebody, with a certificate of CN=Other", seen(replace(OURS, sha256="x"), "CN=Other")),
    ("overwritten", "by somebody, with what is no certificate", seen(replace(OURS, leaf="", sha256="x"), "")),
    ("link-moved", "was linked to /ssl/omi-host-h.pem", seen(HOST_PEM, ITSELF)),
    ("link-moved", "was linked to gone.pem, where nothing is", seen(Place("link", "gone.pem"), "")),
    ("deleted", "/ssl/omi.pem was deleted", seen(Place("absent"), "")),
    ("deleted", f"scx-enroll-{ID}-1.pem was deleted, to which", seen(Place("link", OURS.text), "")),
    ("deleted", "the agent's key was deleted", seen(key="")),
    ("replaced", "replaced by a file, by somebody, with a self-signed certificate", seen(FILE, ITSELF)),
    ("permissions", "mode 0600 now, and had owner 0:0, mode 0444", seen(replace(OURS, mode=0o600))),
    ("permissions", "owner 990:990", seen(replace(OURS, uid=990, gid=990))),
    ("permissions", "can't get at /ssl/omikey.pem", seen(locked="/ssl/omikey.pem")),
    ("served-older", "the older generation older", seen(served="x" * 64, older="older")),
    ("served-older", "which is not ours", seen(served="x" * 64)),
    ("configuration", "of scx-enroll changed", seen(config="0.1 bb")),
    ("configuration", "the agent's configuration changed: /etc/opt/omi/conf/omiserver.conf", seen(conf="/etc/opt/omi/conf/omiserver.conf 7,8,9")),
    ("configuration", "reads another pair now, as it is configured: /b/x.pem and /b/y.pem", seen(HOST_PEM, ITSELF, names="/b/x.pem /b/y.pem")),
    ("restored", "generation fedcba9876543210 is installed", seen(replace(OURS, text="scx-enroll-fedcba9876543210-1.pem", generation="fedcba9876543210"))),
    ("restored", "the journal is older", seen(newest=3)),
    ("clock", "lies before what was written", seen(clock="behind")),
    ("clock", "more than a year ahead", seen(clock="ahead")),
    ("agent-reinstalled", "installed again or upgraded", seen(program="/opt/omi/bin/omiserver 9,9,9")),
    ("agent-reinstalled", "another number: omi 991, before omi 990", seen(account="omi 991")),
    ("agent-removed", "was removed", seen(program="/opt/omi/bin/omiserver")),
    ("renamed", "calls itself new, and was old", seen(host="new")),
    ("moved-aside", "moved the agent's pair aside", seen(Place("absent"), "", key="", aside=True)),
    ("moved-aside", "moved the agent's pair aside", seen(Place("absent"), "", aside=True)),
    ("moved-aside", "moved the agent's pair aside", seen(key="", aside=True)),
]
BY_OTHERS = {"cloned"}  # told by whoever judges the host's identity


@pytest.mark.parametrize(("cause", "what", "sight"), EACH, ids=lambda value: value if isinstance(value, str) else "")
def test_each_cause_is_told_from_the_others(cause, what, sight):
    """An operator who reads it knows whom to ask; an upgrade is also told as an agent that is another."""
    found = causes.named(WAS, sight)
    assert found[0][0] == cause
    assert what in found[0][1]
    assert {other for other, _ in found[1:]} <= {"agent-reinstalled"}


def test_a_cause_that_nothing_tells():
    """Every word has a sight that it stands for, but those of identity; nobody can add one that is never seen."""
    assert {cause for cause, _, _ in EACH} | BY_OTHERS == set(CAUSES)


@pytest.mark.parametrize("sight", [SAME, *(sight for _, _, sight in EACH)])
def test_a_change_is_named_once(sight):
    """Once it is written down, the next run finds it as it was left, and says nothing."""
    after = replace(WAS, known=sight.known, newest=sight.newest)
    assert causes.named(after, sight) == ()


def test_what_we_did_ourselves_is_no_change():
    """A run that was killed after its installation has not written down what it saw."""
    mine = replace(OURS, text="scx-enroll-fedcba9876543210-1.pem", sha256="n", generation="fedcba9876543210")
    ours = replace(WAS, installed=mine)
    assert causes.named(ours, seen(mine, generations=(ID, "fedcba9876543210"))) == ()
    assert causes.named(ours, seen(mine, generations=(ID, "fedcba9876543210"), key="new")) == (), "certificate and key, swapped together"
    assert causes.named(replace(WAS, newest=1, request=Request("submitted", id=7)), SAME) == (), "killed before it was written down"


STRANGERS = replace(WAS, known=replace(KNOWN, place=HOST_PEM))  # known, and left, since the host is held
OWN_FILE = replace(FILE, generation=ID)  # at a name that the configuration gives
CLONED = Change(NOW, "cloned", "its state was set aside")


@pytest.mark.parametrize(
    ("journal", "sight"),
    [
        pytest.param(WAS, replace(SAME, aside=True), id="what stands aside was there before"),
        pytest.param(Journal(changes=(CLONED,)), replace(SAME, generations=()), id="the records of a clone are set aside"),
        pytest.param(replace(WAS, installed=HOST_PEM), seen(replace(OURS, mode=0o600)), id="rights of what we did not put there"),
        pytest.param(replace(WAS, installed=HOST_PEM, known=replace(KNOWN, place=HOST_PEM)), seen(replace(HOST_PEM, mode=0o600)), id="the agent's own"),
        pytest.param(STRANGERS, seen(replace(HOST_PEM, mode=0o600)), id="rights of a stranger's"),
        pytest.param(replace(WAS, known=replace(KNOWN, place=replace(OURS, mode=0o600))), SAME, id="rights that are as they were installed"),
        pytest.param(replace(WAS, known=replace(KNOWN, served="x")), SAME, id="the right one is served again"),
        pytest.param(replace(WAS, known=replace(KNOWN, locked="/ssl")), SAME, id="the agent can read again"),
        pytest.param(WAS, seen(account=""), id="the account can't be told"),
        pytest.param(WAS, seen(conf=""), id="no configuration can be told"),
        pytest.param(WAS, seen(host=""), id="a tree without a name"),
        pytest.param(WAS, seen(host="OLD.lab.test"), id="a name with its domain"),
        pytest.param(replace(WAS, known=replace(KNOWN, config="")), SAME, id="no configuration was known"),
        pytest.param(replace(WAS, known=replace(KNOWN, names="")), seen(HOST_PEM, names="/b/x.pem /b/y.pem"), id="no names were known"),
        pytest.param(Journal(installed=OURS), Sight(causes.remembered(Journal(installed=OURS))), id="no agent that can be looked at"),
    ],
)
def test_a_cause_is_told_where_nothing_was_done(journal, sight):
    """A word that is not so makes the others worth less."""
    if sight.known.place == HOST_PEM and not journal.known.names:
        journal = replace(journal, installed=HOST_PEM)
    assert causes.named(journal, sight) == ()


@pytest.mark.parametrize(
    ("journal", "sight", "cause", "what"),
    [
        (replace(WAS, changes=(CLONED,)), replace(SAME, known=replace(KNOWN, place=replace(OURS, generation="f" * 16, sha256="n"))), "restored", "generation ffff"),
        (replace(WAS, installed=OWN_FILE, known=replace(KNOWN, place=OWN_FILE)), seen(replace(FILE, sha256="n"), SCOM), "overwritten", "/ssl/omi.pem was overwritten by SCOM"),
        (replace(WAS, installed=OWN_FILE, known=replace(KNOWN, place=OWN_FILE)), seen(replace(FILE, sha256="n"), "CN=Other"), "replaced", "with a certificate of CN=Other"),
        (replace(WAS, known=replace(KNOWN, place=None)), seen(HOST_PEM, ITSELF), "link-moved", "/ssl/omi-host-h.pem"),
    ],
    ids=["a backup after a clone", "a file that SCOM signed over", "a file that somebody else put there", "the last run saw no agent"],
)
def test_a_cause_is_missed_where_less_is_known(journal, sight, cause, what):
    """Files instead of links, clones, and looks in vain before: the word is the same."""
    found = causes.named(journal, sight)
    assert found[0][0] == cause
    assert what in found[0][1]


def test_an_upgrade_that_brings_another_configuration_is_one_change():
    """The packages carry the agent's configuration over, and nobody edited it."""
    sight = seen(program="/opt/omi/bin/omiserver 9,9,9", conf="/etc/opt/omi/conf/omiserver.conf 7,8,9")
    assert [cause for cause, _ in causes.named(WAS, sight)] == ["agent-reinstalled"]


def test_a_first_run_and_one_after_an_upgrade_of_the_program_accuse_nobody():
    """Nothing was remembered yet, or only what an earlier version wrote down: what it left installed."""
    assert causes.named(Journal(), seen(HOST_PEM, ITSELF)) == ()
    old = Journal(installed=OURS)
    assert causes.named(old, SAME) == ()
    assert [cause for cause, _ in causes.named(old, seen(HOST_PEM, ITSELF))] == ["link-moved"]
    assert causes.named(WAS, seen(config="0.2 bb")) == (), "another version of the program reads the same file otherwise"


def test_a_lost_state_is_told_even_where_nothing_is_remembered():
    """Our own copy is in place and no record knows it."""
    assert causes.named(Journal(), replace(SAME, generations=()))[0][0] == "restored"


@given(st.sampled_from([sight for _, _, sight in EACH]), st.sampled_from([sight for _, _, sight in EACH]))
def test_any_two_looks_have_words(one, other):
    """Whatever stood there and whatever stands there now: at most one cause for each question, all of them known words."""
    found = causes.named(replace(WAS, known=one.known), other)
    assert len(found) <= len(causes.TABLES)
    assert {cause for cause, _ in found} <= set(CAUSES)


@pytest.mark.parametrize(
    ("now", "known", "written", "word"),
    [
        (NOW, KNOWN, (), ""), (NOW, None, (), ""), (NOW - 59, KNOWN, (NOW + 200,), ""), (NOW - 3 * HOUR_S, KNOWN, (), "behind"),
        (NOW, KNOWN, (NOW + HOUR_S,), "behind"), (1_000, None, (), "behind"), (NOW + 360 * DAY_S, KNOWN, (), ""),
        (NOW + 370 * DAY_S, KNOWN, (), "ahead"), (NOW, Known(), (), ""), (NOW - 360, KNOWN, (), ""),
        (KNOWN.at + 366 * DAY_S, KNOWN, (), ""), (NOW + 5 * 365 * DAY_S, None, (NOW,), ""),
    ],
)  # fmt: skip
def test_a_clock_far_off_is_seen(now, known, written, word):
    """Before what was written, before the program was made, or more than a year after the last run; a few minutes are none."""
    assert causes.clock(now, known, written) == word


# -- fights ---------------------------------------------------------------------------------------------------------

REWRITTEN = replace(WAS, known=KNOWN)


def rewritten(times, cause="overwritten", key="key", journal=REWRITTEN):
    """The fights after rewrites at these times, each of what we had put right before."""
    for at in times:
        journal = replace(journal, fights=causes.fights(journal, seen(HOST_PEM, ITSELF, key=key), [cause], at))
    return [(fight.name, fight.until - fight.at if fight.until else 0) for fight in journal.fights]


@pytest.mark.parametrize(
    ("hours", "truce"),
    [
        ([0], 0), ([0, 0], 1), ([0, 1], 1), ([0, 1.1], 0), ([0, 0.9], 1), ([0, 0.9, 2], 2), ([0, 0.9, 2, 4.1], 4), ([0, 0.5, 2, 4, 9, 18, 40, 70], 24),
        ([0, 0.5, 1.5 + 23.9], 2), ([0, 0.5, 1.5 + 24], 0), ([0, 0.5, 25.5, 26], 1), ([0, 2, 4, 6], 0),
    ],
)  # fmt: skip
def test_a_truce_is_twice_as_long_each_time_and_ends_after_a_quiet_day(hours, truce):
    """Two within an hour, or in two looks of an hourly timer, begin it; SCOM's one signing after an enrolment does not, nor does a job that comes every two hours."""
    assert rewritten([NOW + int(hour * HOUR_S) for hour in hours]) == [("certificate", truce * HOUR_S)]


def test_key_and_certificate_are_fought_over_apart():
    """A package upgrade, and then SCOM's signing: each of them once."""
    once = replace(REWRITTEN, fights=causes.fights(REWRITTEN, seen(HOST_PEM, ITSELF, key="new"), ["key-regenerated", "agent-reinstalled"], NOW))
    assert rewritten([NOW + 600], journal=once) == [("key", 0), ("certificate", 0)]
    assert rewritten([NOW, NOW + 600], "key-regenerated", "new") == [("key", HOUR_S)]


def test_a_rewrite_of_what_was_not_ours_is_no_fight():
    """Two strangers who rewrite each other's certificate while this host is held fight without us; so does what is no rewrite."""
    held = replace(WAS, known=replace(KNOWN, place=HOST_PEM))
    assert rewritten([NOW, NOW + 60], journal=held) == []
    assert rewritten([NOW, NOW + 60], "permissions") == []
    assert rewritten([NOW, NOW + 60], journal=Journal()) == []
    elsewhere = replace(WAS, known=replace(KNOWN, names="/b/x.pem /b/y.pem"))
    assert rewritten([NOW, NOW + 60], journal=elsewhere) == []


def test_a_rewrite_before_anything_is_remembered_counts():
    """What a killed run, or an older version, left installed was ours, too."""
    assert rewritten([NOW, NOW + 60], journal=Journal(installed=OURS)) == [("certificate", HOUR_S)]


def test_a_fight_of_the_future_begins_anew():
    """A clock that ran ahead when it was written down must not make a truce out of one rewrite."""
    ahead = replace(REWRITTEN, fights=(Fight("certificate", NOW + 9 * DAY_S, NOW + 10 * DAY_S, DAY_S),))
    assert rewritten([NOW], journal=ahead) == [("certificate", 0)]


# -- what was done ----------------------------------------------------------------------------------------------------


def test_what_was_done_is_told_with_what_is_waited_for():
    """A change stays open until a run ends with nothing left to do; then it is not touched any more."""
    old, new = Change(NOW, "clock", "...", ("restarted",)), Change(NOW, "deleted", "...", waits="nothing yet")
    pending = Step("C1", "wait", "request ID 7 is pending", until=NOW + 60)
    asked = causes.settled((old, new), [Step("L0", "notice", ""), Step("C4", "submit", "")], causes.waits(pending))
    assert asked[0] == old
    assert causes.done(asked[1]) == "asked the CA, waiting: request ID 7 is pending, until 2027-01-15 08:01:00 UTC"
    ended = causes.settled(asked, [Step("C1", "poll", ""), Step("L7", "install", "")], causes.waits(Step("C6", "nothing", "all is well")))
    assert causes.done(ended[1]) == "asked the CA, reinstalled"
    assert causes.settled(ended, [Step("L8", "restart", "")], "") == ended
    assert causes.done(causes.settled((new,), [], causes.waits(Step("L4", "hold", "held: freeze")))[0]) == "nothing: held: freeze"
    assert causes.done(causes.settled((new,), [], "")[0]) == "nothing had to be done"
