"""Every decision: which row, why, until when. What is forbidden is forbidden whatever else was observed."""

import time
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, note
from hypothesis import strategies as st

from scx_enroll import pace, plan
from scx_enroll.journal import (
    DAY_S,
    HOUR_S,
    RESTARTS_PER_DAY,
    RESTARTS_PER_HOUR,
    Backoff,
    Budget,
    Fight,
    Identity,
    Installation,
    Journal,
    Place,
    Request,
    Skip,
    Submission,
)
from scx_enroll.pace import WEEK_S, Held, Policy, due, needs_a_person, poll_after, until_of
from scx_enroll.plan import Observed, Step, Wish, decide

NOW = 1_700_000_000
YEAR = 365 * DAY_S
KEY = "k" * 64
POLICY = Policy(cas=("ca01", "ca02"))
NEW = Held("new", "leaf-new", NOW - DAY_S, NOW - DAY_S + YEAR)
OLD = Held("old", "leaf-old", NOW - 200 * DAY_S, NOW - 200 * DAY_S + YEAR)
GOOD = Observed(key=KEY, certificate=NEW.leaf, held=(NEW,), listening=True, served=NEW.leaf, inputs="i")
EMPTY = replace(GOOD, certificate="self", held=(), served="self")
SENT = Request("submitted", "ca01", "csr", KEY, 7, NOW - HOUR_S, 1, NOW + 60, pending=True)
DOUBT = Request("doubtful", "ca01", "csr", KEY, None, NOW - HOUR_S, 1, NOW + 60, why="the reply was lost")


def backoff(ca="ca01", retry="soon", status=5, at=NOW - 60, failures=1, inputs="i"):
    return Backoff(ca, inputs, at, failures, retry, status, f"{ca} failed", "a hint")


def skip(held=NEW, retry="later", status=9, at=NOW - 60, failures=1, inputs="i"):
    return Skip(held.id, inputs, at, failures, retry, status, f"{held.id} was rolled back")


def spent(count, age=60, counts=True):
    return Budget(submissions=(Submission(NOW - age, counts),) * count)


def restarts(count, age=60):
    return Budget(restarts=(NOW - age,) * count)


def at(seen=GOOD, journal=None, budget=None, wish=None, policy=POLICY, now=NOW):
    """The decision of a case, told by what differs from a host where all is well."""
    return decide(seen, policy, journal or Journal(), budget or Budget(), now, wish or Wish())


def told(step):
    return step.row, step.action, step.until, step.status


# -- the restart window ---------------------------------------------------------------------------------------------

OPENS = NOW + 6 * HOUR_S
SHUT = replace(POLICY, opens=OPENS)
DRIFTED = replace(GOOD, certificate="self", served="self", served_until=NOW + YEAR)


@pytest.mark.parametrize(("seen", "row"), [(DRIFTED, "L7"), (replace(DRIFTED, certificate=NEW.leaf), "L8")])
def test_a_restart_outside_the_window(seen, row):
    """L7, L8: left to it, whatever was asked for on the command line; and then done."""
    for wish in (Wish(), Wish(now=True, hasty=True)):
        step = at(seen, policy=SHUT, wish=wish)
        assert told(step) == (row, "wait", OPENS, 4)
        assert "restart-window" in step.reason
    assert at(seen, policy=SHUT, now=OPENS).action in ("install", "restart")
    assert not needs_a_person(4, seen.held, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"served": ""}, {"listening": False, "served": "", "process": "died"}, {"served_until": OPENS}, {"served_until": 0},
        {"served": OLD.leaf, "held": (NEW, replace(OLD, revoked=True, mismatches=("revoked",)))}, {"live": False},
        {"listening": False, "served": "", "process": "stopped"}, {"foreign_key": "it came with the image"},
    ],
)
def test_a_window_keeps_an_agent_from_its_cure(changes):
    """An agent that serves nothing, something that expires before the window opens or was revoked, or with another's key, has nothing to lose."""
    assert at(replace(DRIFTED, **changes), policy=SHUT).action == "install"


def test_an_open_installation_waits_for_the_window():
    """L1: what was begun is finished or undone at any hour."""
    entry = Installation("rolling_back", target=Place("link"), previous=Place("link"))
    assert at(DRIFTED, Journal(installation=entry), policy=SHUT).action == "recover"


def test_a_window_keeps_a_certificate_from_being_asked_for():
    """To obtain one is not to install it: renewals, polls and --renew go on; what waits for either ends with the sooner."""
    tired = replace(DRIFTED, certificate=OLD.leaf, held=(OLD,))
    due_now = replace(tired, held=(replace(OLD, not_before=NOW - 300 * DAY_S, not_after=NOW + 65 * DAY_S),))
    assert told(at(due_now, policy=SHUT))[:2] == ("C4", "submit")
    assert at(DRIFTED, policy=SHUT, wish=Wish(renew=True)).row == "C4"
    assert at(DRIFTED, Journal(request=replace(SENT, next=NOW)), policy=SHUT).action == "poll"
    waits = at(DRIFTED, Journal(request=replace(SENT, next=NOW + 60)), policy=SHUT)
    assert told(waits) == ("L7", "wait", NOW + 60, 4)
    assert at(DRIFTED, Journal(backoffs=(backoff("", "changed", 8),)), policy=SHUT).until == OPENS, "the CA's answer has no end of its own"


def test_a_window_is_slept_through():
    """The answer that waits for it stands until an hour before, so that a look at the very time can be arranged."""
    assert plan.rest(DRIFTED, SHUT, Journal(), Budget(), NOW)[1] == OPENS - HOUR_S
    assert plan.rest(DRIFTED, SHUT, Journal(), Budget(), OPENS - 600)[1] == OPENS


# -- each row of the tables -----------------------------------------------------------------------------------------


def test_all_is_well():
    """C6: nothing until the renewal is due, with the generation named."""
    step = at()
    assert told(step) == ("C6", "nothing", due(NEW, POLICY, 0), 0)
    assert step.reason == "generation new is valid and in service"
    assert at(replace(GOOD, live=False, listening=False, served="")).reason == "generation new is valid and installed, not proven"


@pytest.mark.parametrize("state", ["installing", "rolling_back"])
def test_an_interrupted_installation_comes_before_everything(state):
    """L1: also before a hold, a missing agent and a package manager; half an installation is nobody's wish."""
    open_one = Journal(installation=Installation(state, target=Place("link"), previous=Place("link")), hold="by the operator")
    step = at(replace(GOOD, blocked="no agent", busy="dpkg", key=""), open_one)
    assert told(step) == ("L1", "recover", None, 0)
    assert state in step.reason
    assert plan.interrupted(open_one) == step
    assert plan.interrupted(Journal()) is None


def test_no_agent_was_found():
    """L2: status 4 with what was seen and the next act; nothing changes by itself."""
    blocked = replace(GOOD, blocked="no agent was found: ...", blocked_hint="install it")
    step = at(blocked)
    assert told(step) == told(at(blocked, Journal(backoffs=(backoff(),)))) == ("L2", "wait", None, 4)
    assert (step.reason, step.hint) == ("no agent was found: ...", "install it")


@pytest.mark.parametrize("wish", [Wish(), Wish(now=True, hasty=True), Wish(renew=True)])
def test_a_package_manager_is_at_work(wish):
    """L3: `--now` skips no lock of others."""
    assert told(at(replace(GOOD, busy="dpkg is changing packages"), wish=wish)) == ("L3", "wait", None, 4)


def test_files_that_others_changed_a_moment_ago():
    """L3: waited for until they were quiet for `settle`; `--now` does not, also after its first act has ended the haste elsewhere."""
    seen = replace(GOOD, changed_at=NOW - 100)
    assert told(at(seen)) == ("L3", "wait", NOW + 20, 4)
    assert at(seen).reason == "the agent's files changed 100 s ago and must be quiet for 120 s"
    assert at(seen, now=NOW + 20).row == "C6"
    assert at(seen, wish=Wish(hasty=True)).row == "C6"
    assert at(seen, wish=Wish(renew=True)).row == "L3"
    assert at(replace(GOOD, changed_at=NOW + 500)).row == "C6", "a change in the future is a wrong clock"
    assert plan.quiet_from(Observed(), POLICY, 30) == 0, "nobody changed anything, and the clock begins at the epoch"


def test_files_that_never_rest():
    """L3: `settle` is at most half an hour long, whatever is configured; the reason gives the time that is waited."""
    seen, policy = replace(GOOD, changed_at=NOW), replace(POLICY, settle_s=5 * HOUR_S)
    assert at(seen, policy=policy).until == NOW + plan.MAX_SETTLE_S
    assert at(seen, policy=policy, now=NOW + plan.MAX_SETTLE_S).row == "C6"


def test_the_operator_said_hold():
    """L4: nothing is changed, however urgent; the way out is the hint."""
    step = at(EMPTY, Journal(hold="change freeze"), wish=Wish(now=True))
    assert told(step) == ("L4", "hold", None, 0)
    assert at(EMPTY, Journal(hold="change freeze"), wish=Wish(renew=True)).status == 4, "what was asked for was not done"
    assert (step.reason, step.hint) == ("held: change freeze", "scx-enroll release")
    again = "scx-enroll release; then run it again, which is not remembered"
    assert at(EMPTY, Journal(hold="change freeze"), wish=Wish(renew=True)).hint == again


def test_a_hold_with_an_end():
    """L4: the end is in the plan, and then it is as if nobody had said anything."""
    journal = Journal(hold="change freeze", hold_until=NOW + 7200)
    assert told(at(EMPTY, journal)) == ("L4", "hold", NOW + 7200, 0)
    assert at(EMPTY, journal, now=NOW + 7200).action == "submit"
    assert plan.rest(GOOD, POLICY, journal, Budget(), NOW)[1] == NOW + 7200


def test_what_the_agents_account_can_not_read():
    """L2: an agent that would not start again gets no certificate; the command that helps is the hint."""
    seen = replace(EMPTY, locked="/ssl/omikey.pem", locked_hint="chown omi /ssl/omikey.pem")
    for wish in (Wish(), Wish(now=True, hasty=True), Wish(renew=True)):
        assert told(at(seen, wish=wish)) == ("L2", "wait", None, 4)
    assert at(seen).hint == "chown omi /ssl/omikey.pem"
    assert needs_a_person(4, GOOD.held, NOW, at(seen).retry), "no time mends it: the timer's unit fails"
    assert "/ssl/omikey.pem" in at(seen).reason


def test_a_sound_copy_is_linked_again():
    """L7: where our copy still stands, no other one is made."""
    seen = replace(GOOD, certificate="self", copies=(NEW.leaf,))
    assert (*told(at(seen)), at(seen).generation) == ("L7", "relink", None, 0, "new")
    assert at(replace(seen, copies=("leaf-old",))).action == "install"


def test_a_new_key_is_told_before_it_comes_into_service():
    """L7: who did not ask for one must see that the agent's key changes."""
    reasons = [at(replace(GOOD, certificate="self", held=(replace(NEW, key=key),))).reason for key in (KEY, "other")]
    assert reasons == ["generation new is valid and not in place", "generation new is valid for a new key and not in place"]


def test_the_right_certificate_with_the_wrong_owner():
    """L7: a new copy, though the bytes are right; the reason is the one that was seen."""
    step = at(replace(GOOD, spoilt="somebody changed its mode"))
    assert (*told(step), step.reason) == ("L7", "install", None, 0, "somebody changed its mode")


def test_a_heal_that_needs_no_restart_waits_for_none():
    """L7: the agent still serves the right one, so the link is put back whatever the budget says, before somebody restarts it."""
    assert at(replace(GOOD, certificate="self"), budget=restarts(3)).action == "install"
    assert at(replace(GOOD, certificate="self", served="self"), budget=restarts(3)).action == "wait"


CALLED_OFF = Journal(fights=(Fight("certificate", NOW - 60, NOW + 3540, HOUR_S),))


def test_a_truce_leaves_the_name_alone():
    """L7: until it ends nothing is done, whoever asks; what is served meanwhile is told, and what is wrong with it."""
    seen = replace(GOOD, certificate="self", served="self", copies=(NEW.leaf,), problems=("it is self-signed",))
    for wish in (Wish(), Wish(now=True, hasty=True), Wish(renew=True)):
        assert told(at(seen, CALLED_OFF, wish=wish)) == ("L7", "wait", NOW + 3540, 4)
    step = at(seen, CALLED_OFF)
    assert "truce: others rewrote the agent's certificate again" in step.reason
    assert "the agent serves self, which is not what is wanted (it is self-signed)" in step.reason
    assert "scx-enroll hold" in step.hint
    assert at(seen, CALLED_OFF, wish=Wish(renew=True)).hint == f"{step.hint}; then run it again, which is not remembered"
    assert at(replace(seen, problems=()), CALLED_OFF).reason.endswith("serves self, which is valid")
    assert at(replace(seen, served="x"), CALLED_OFF).reason.endswith("serves x, which is not what is installed")
    down = replace(seen, served="", listening=False, process="died", loadable=False)
    assert at(down, CALLED_OFF).action == "relink", "an agent that is down has nothing to lose"
    for loadable in (True, False):
        step = at(replace(down, loadable=loadable), CALLED_OFF, budget=restarts(3))
        assert (step.action, step.hint, needs_a_person(4, GOOD.held, NOW, step.retry)) == ("wait", plan.TRUCE_HINT, True), "and nobody brings it up"
    fallen = at(replace(GOOD, served="", listening=False, process="died"), CALLED_OFF, budget=restarts(3))
    assert (fallen.row, fallen.action, fallen.hint, needs_a_person(4, GOOD.held, NOW, fallen.retry)) == ("L9", "wait", plan.TRUCE_HINT, True)
    assert at(replace(seen, served="", live=False), CALLED_OFF).reason.endswith("the agent serves nothing")
    assert needs_a_person(4, GOOD.held, NOW, at(seen, CALLED_OFF).retry)
    assert at(seen, CALLED_OFF, now=NOW + 3540).action == "relink"
    assert plan.rest(seen, POLICY, CALLED_OFF, Budget(), NOW)[1] == NOW + 3540
    assert at(GOOD, CALLED_OFF).row == "C6", "others put it right themselves"
    ahead = Journal(fights=(Fight("certificate", NOW + 60, NOW + 3660, HOUR_S),))
    assert at(seen, ahead).action == "relink", "one of the future was written by a wrong clock"


def test_a_truce_over_the_key_asks_no_ca():
    """L7: packages that replace the key twice in an hour get no third certificate; one that is held for it may go in."""
    journal = Journal(fights=(Fight("key", NOW - 60, NOW + 3540, HOUR_S),))
    assert told(at(EMPTY, journal)) == ("L7", "wait", NOW + 3540, 4)
    assert at(replace(EMPTY, key=""), journal).action == "make_key", "an agent without a key is down"
    assert at(replace(EMPTY, served="", listening=False), journal).action == "submit", "and so is one whose key has no certificate"
    assert at(EMPTY, CALLED_OFF).action == "submit"
    assert at(replace(GOOD, certificate="self", served="self"), journal).action == "install"


def test_no_room_for_two_restarts_keeps_an_agent_down():
    """L7, L9: with a valid one to be installed and one restart left, an agent that is down is started with what it has."""
    down = replace(GOOD, certificate="self", served="", listening=False, process="died", loadable=True)
    one_left = restarts(2, 1800)
    assert told(at(down, budget=one_left)) == ("L9", "restart", None, 0)
    assert at(down, budget=restarts(3, 1800)).action == "wait"
    assert at(replace(down, loadable=False), budget=one_left).action == "install"
    assert at(replace(down, loadable=False), budget=restarts(3, 1800)).row == "L7", "it can't be started with what it has"
    assert at(replace(down, served="self", listening=True), budget=one_left).action == "wait", "what is served can wait"


def test_the_agent_has_no_key():
    """L5: its own tool makes one, before anything is asked for."""
    assert told(at(replace(EMPTY, key="", certificate="", listening=False, served=""))) == ("L5", "make_key", None, 0)


def test_a_valid_certificate_that_is_not_in_our_records():
    """L7: adopted without asking the CA: by hand, or the journal was lost."""
    step = at(replace(GOOD, held=(), stranger=NEW))
    assert told(step) == ("L7", "adopt", None, 0)


def test_the_best_generation_is_not_installed():
    """L7: installed without asking the CA, because another rewrote the link."""
    step = at(replace(GOOD, certificate="self", served="self"))
    assert (*told(step), step.generation) == ("L7", "install", None, 0, "new")
    assert at(replace(GOOD, certificate="")).action == "install"


def test_the_newest_valid_generation_is_the_best():
    """L7: an older one that is valid too is no reason to go back, nor one that lasts longer."""
    longer = replace(OLD, not_after=NOW + 10 * YEAR)
    assert at(replace(GOOD, held=(longer, NEW, OLD))).row == "C6"
    assert at(replace(GOOD, held=(longer, replace(NEW, mismatches=("cn: ...",))))).generation == "old"


@pytest.mark.parametrize(("used", "row"), [(0, "install"), (1, "install"), (2, "wait"), (3, "wait")])
def test_an_installation_needs_two_restarts(used, row):
    """L7: one for it and one for its rollback, or it does not begin."""
    step = at(replace(GOOD, certificate="self", served="self"), budget=restarts(used))
    assert (step.row, step.action) == ("L7", row)
    if row == "wait":
        assert (step.until, step.status) == (NOW - 60 + HOUR_S, 4)
        assert "restart budget" in step.reason


@pytest.mark.parametrize(
    ("wish", "skipped", "promised"),
    [
        (Wish(), (), "it goes on by itself then"),
        (Wish(now=True), (), "it goes on by itself then"),
        (Wish(now=True), (skip(retry="changed", inputs="other"),), "it goes on by itself then"),
        (Wish(now=True), (skip(retry="changed"),), "run it again then"),
        (Wish(renew=True), (), "run it again then"),
    ],
)  # fmt: skip
def test_what_only_this_run_was_told_to_do_goes_on_by_itself(wish, skipped, promised):
    """L7: what the operator rolled back is installed by `--now` and by no timer, so that must be said again."""
    step = at(replace(GOOD, certificate="self", served="self"), Journal(skipped=skipped), budget=restarts(3), wish=wish)
    assert (step.row, step.action, step.hint.partition(";")[0]) == ("L7", "wait", promised)


@pytest.mark.parametrize("seen", [dict(live=False), dict(process="stopped", listening=False, served="")])
def test_where_nothing_is_restarted_no_restart_is_needed(seen):
    """L7: an image and an agent stopped on purpose get their certificate whatever the budget says."""
    assert at(replace(GOOD, certificate="self", **seen), budget=restarts(9)).action == "install"


def test_something_answers_although_the_agent_counts_as_stopped():
    """L7: without a pid file a listener is restarted all the same (View.running), so the budget must allow it before it begins."""
    step = at(replace(GOOD, certificate="self", served="self", process="stopped", listening=True), budget=restarts(3))
    assert told(step) == ("L7", "wait", NOW - 60 + HOUR_S, 4)


@pytest.mark.parametrize("served", ["self", "", "leaf-old"])
def test_something_else_is_served(served):
    """L8: installed and valid, but not what the port shows: restart, within the budget."""
    seen = replace(GOOD, served=served)
    assert told(at(seen)) == ("L8", "restart", None, 0)
    assert told(at(seen, budget=restarts(3))) == ("L8", "wait", NOW - 60 + HOUR_S, 4)
    assert at(seen, budget=restarts(2)).action == "restart"
    assert at(seen).reason == f"the agent serves {served or 'no TLS'} instead of new"


@pytest.mark.parametrize("process", ["running", "died"])
def test_nothing_listens(process):
    """L9: started, within the budget; a pid file without a process is no stop on purpose."""
    seen = replace(GOOD, listening=False, served="", process=process)
    assert told(at(seen)) == ("L9", "restart", None, 0)
    assert told(at(seen, budget=restarts(6, 2 * HOUR_S))) == ("L9", "wait", NOW - 2 * HOUR_S + DAY_S, 4)
    assert at(replace(GOOD, certificate="other", served="other"), budget=restarts(6, 2 * HOUR_S)).retry == "", "it serves another, and waits"
    assert [at(seen, budget=spent).retry for spent in (restarts(6, 2 * HOUR_S), restarts(3, 60))] == [pace.PERSON, ""], "down for hours, or for minutes"


def test_nothing_listens_and_nothing_is_held():
    """L9: an agent that we stopped, or whose pair was mended, goes on with what it has; not with a pair that can't be loaded."""
    down, ours = replace(EMPTY, listening=False, served="", process="died"), Journal(restarting="self")
    assert told(at(down, ours)) == ("L9", "restart", None, 0)
    assert at(down, ours, budget=restarts(3)).action == "wait"
    assert at(down).row == at(replace(down, loadable=False), ours).row == "C4"


def test_an_agent_stopped_on_purpose_is_left_stopped():
    """L9: nothing restarts it; renewal goes on."""
    seen = replace(GOOD, listening=False, served="", process="stopped")
    assert at(seen).row == "C6"
    assert at(seen, now=NEW.not_after - DAY_S).action == "submit"


def test_another_root_is_neither_probed_nor_restarted():
    """L8, L9: an image's tree must not restart its builder's agent."""
    assert at(replace(GOOD, live=False, listening=False, served="")).row == "C6"
    assert at(replace(GOOD, live=False, listening=True, served="other")).row == "C6"


def test_a_request_is_pending():
    """C1: status 7 until the next poll; the hint names the CA and the request ID."""
    step = at(EMPTY, Journal(request=SENT))
    assert told(step) == ("C1", "wait", NOW + 60, 7)
    assert "request ID 7 at ca01" in step.reason
    assert "ca01" in step.hint
    assert "request ID 7" in step.hint


def test_a_certificate_could_not_be_fetched_yet():
    """C1: stored with an ID but not read: status 5, because no person at the CA is waited for."""
    step = at(EMPTY, Journal(request=replace(SENT, pending=False, why="time-out")))
    assert told(step) == ("C1", "wait", NOW + 60, 5)
    assert "time-out" in step.reason


def test_a_poll_is_due():
    """C1: at its time, and at once with `--now`."""
    assert told(at(EMPTY, Journal(request=SENT), now=NOW + 60)) == ("C1", "poll", None, 0)
    assert at(EMPTY, Journal(request=SENT), wish=Wish(now=True)).action == "poll"
    assert at(EMPTY, Journal(request=SENT), wish=Wish(renew=True)).action == "wait"


@pytest.mark.parametrize(
    ("change", "why"),
    [(dict(ca="gone"), "not configured any more"), (dict(spki="other"), "the key that it asks for is not here"), (dict(since=NOW - 30 * DAY_S), "30 days")],
)
def test_a_pending_request_that_ends_by_itself(change, why):
    """C1: its CA left, its key is gone, or it is too old; the ID is in the log, so that it can be withdrawn."""
    step = at(EMPTY, Journal(request=replace(SENT, **change)))
    assert told(step) == ("C1", "abandon", None, 0)
    assert why in step.reason
    assert "request ID 7" in step.reason


def test_nothing_is_submitted_beside_a_pending_request():
    """C1 comes before C4: not even with `--renew`, nor for another CA."""
    assert at(EMPTY, Journal(request=SENT), wish=Wish(renew=True)).row == "C1"


def test_a_run_was_killed_during_the_post():
    """C2: its fate is doubtful."""
    assert told(at(EMPTY, Journal(request=replace(DOUBT, state="submitting")))) == ("C2", "lost", None, 0)


def test_a_doubtful_request_cools_down_and_is_repeated_once():
    """C2: 15 minutes, then the same CSR at the same CA; `--now` does not shorten it; twice sent, only a day ends it."""
    journal = Journal(request=DOUBT)
    assert told(at(EMPTY, journal)) == ("C2", "wait", NOW + 60, 5)
    assert told(at(EMPTY, journal, wish=Wish(now=True, renew=True))) == ("C2", "wait", NOW + 60, 5)
    step = at(EMPTY, journal, now=NOW + 60)
    assert (*told(step), step.ca) == ("C2", "repeat", None, 0, "ca01")
    twice = Journal(request=replace(DOUBT, tries=2))
    assert told(at(EMPTY, twice)) == ("C2", "wait", DOUBT.since + DAY_S, 5)
    assert at(EMPTY, twice, now=DOUBT.since + DAY_S).action == "abandon"


@pytest.mark.parametrize("change", [dict(ca="gone"), dict(spki="other"), dict(since=NOW - DAY_S)])
def test_a_doubtful_request_that_ends_by_itself(change):
    """C2: its CA or key is not ours any more, or a day has passed."""
    assert at(EMPTY, Journal(request=replace(DOUBT, **change))).action == "abandon"


@pytest.mark.parametrize("request_", [SENT, replace(DOUBT, next=NOW)], ids=["pending", "doubtful"])
def test_a_request_for_names_that_are_not_wanted_any_more_is_given_up(request_):
    """C1, C2: its certificate would be refused here; asked for once more, it would be one in vain."""
    seen = replace(EMPTY, names=("new.corp.example",))
    step = at(seen, Journal(request=replace(request_, names=("old.corp.example",))))
    assert step.action == "abandon"
    assert "old.corp.example" in step.reason
    assert at(seen, Journal(request=replace(request_, names=seen.names))).action != "abandon"


def test_a_repeated_post_counts_as_well():
    """C2: it may issue a second certificate, so the budget must allow it."""
    step = at(EMPTY, Journal(request=replace(DOUBT, next=NOW)), spent(3))
    assert told(step) == ("C2", "wait", DOUBT.since + DAY_S, 6), "then it is given up"


def test_a_certificate_that_was_refused_here_is_not_asked_for_again():
    """C3: status 8 until an input changes, whichever CA issued it; `--now` is no input, `--renew` is a person's word."""
    journal = Journal(backoffs=(backoff("", "changed", 8),))
    step = at(EMPTY, journal)
    assert told(step) == ("C3", "wait", None, 8)
    assert (step.reason, step.hint) == (" failed", "a hint")
    assert at(EMPTY, journal, wish=Wish(now=True)).row == "C3"
    assert at(EMPTY, journal, wish=Wish(renew=True)).action == "submit"
    assert at(replace(EMPTY, inputs="other"), journal).action == "submit"


def test_nothing_valid_is_held():
    """C4: the first CA of this host's order is asked."""
    step = at(EMPTY)
    assert (*told(step), step.ca, step.reason) == ("C4", "submit", None, 0, "ca01", "no valid certificate is held")


def test_renewal_is_due():
    """C4: to the second."""
    moment = due(NEW, POLICY, 0)
    assert at(now=moment - 1).row == "C6"
    step = at(now=moment)
    assert (step.row, step.action, step.reason) == ("C4", "submit", "renewal of generation new is due")


def test_a_new_certificate_was_asked_for():
    """C4: `--renew` at once; `--now` alone asks for none."""
    assert at(wish=Wish(renew=True)).reason == "a new certificate was asked for"
    assert at(wish=Wish(now=True)).row == "C6"


def test_a_ca_that_failed_is_not_asked_and_the_next_one_is():
    """C4: fail-over; a back-off for all CAs stops all of them."""
    assert at(EMPTY, Journal(backoffs=(backoff("ca01"),))).ca == "ca02"
    assert at(EMPTY, Journal(backoffs=(backoff(""),))).action == "wait"


def test_all_cas_have_failed():
    """C4: until the first of them may be asked again; status, words and hint are those of the CA that this host prefers."""
    step = at(EMPTY, Journal(backoffs=(backoff("ca01", "later", 6), backoff("ca02", "soon", 5))))
    assert told(step) == ("C4", "wait", NOW - 60 + 300, 6)
    assert (step.reason, step.hint) == ("ca01 failed", "a hint; then: scx-enroll run --now")


def test_what_is_mended_on_this_host_is_looked_at_in_days():
    """C4: whoever sets the clock or corrects the trust should not wait as for a CA; what a person must do there has its own words."""
    held = replace(OLD, not_before=NOW - 300 * DAY_S, not_after=NOW + 65 * DAY_S)
    seen = replace(GOOD, held=(held,), certificate=held.leaf, served=held.leaf)
    for status, wait in ((12, 300), (3, 300), (5, DAY_S), (6, DAY_S)):
        failed = Journal(backoffs=(backoff("", "soon", status),))
        assert at(seen, failed).until == NOW - 60 + wait, status


def test_a_refused_password_is_not_tried_again_by_itself():
    """C4: accounts lock; not with `--now`, only with other inputs or the operator's `--renew`."""
    journal = Journal(backoffs=(backoff("ca01", "changed", 13), backoff("ca02", "changed", 13)))
    assert told(at(EMPTY, journal)) == ("C4", "wait", None, 13)
    assert at(EMPTY, journal, wish=Wish(now=True)).action == "wait"
    assert at(EMPTY, journal, wish=Wish(renew=True)).action == "submit"
    assert at(EMPTY, journal, now=NOW + 10 * YEAR).action == "wait"


def test_a_refused_password_is_not_tried_with_other_inputs_either():
    """C4: another name or template makes it no other password; what was refused stands with the budget, for every request of this host."""
    refused = tuple(replace(backoff(ca, "changed", 13), secret="mark") for ca in ("ca01", "ca02"))
    budget = Budget(refused=refused)
    assert told(at(replace(EMPTY, inputs="other"), budget=budget)) == ("C4", "wait", None, 13)
    assert at(EMPTY, Journal(request=replace(SENT, next=NOW)), budget).status == 13, "no poll with it"
    assert at(EMPTY, budget=budget, wish=Wish(renew=True)).action == "submit"
    assert at(EMPTY, budget=Budget(refused=refused[:1])).ca == "ca02"


def test_a_page_that_was_not_understood_is_not_asked_for_again_within_the_day():
    """C2: the CA took the request; sent again, it would take it twice."""
    journal = Journal(request=replace(DOUBT, answered=True))
    assert told(at(EMPTY, journal, now=NOW + 60)) == ("C2", "wait", DOUBT.since + DAY_S, 5)
    assert "--adopt" in at(EMPTY, journal).hint
    assert at(EMPTY, journal, now=DOUBT.since + DAY_S).action == "abandon"


ENDING = replace(NEW, not_before=NOW - 95 * DAY_S, not_after=NOW + 5 * DAY_S)
LATE = replace(SENT, since=NOW - 2 * DAY_S)


@pytest.mark.parametrize(
    ("held", "request_", "more", "action"),
    [
        (ENDING, LATE, {}, "abandon"),
        (replace(ENDING, not_after=NOW - 1), LATE, {}, "abandon"),
        (NEW, LATE, {}, "wait"),  # time remains
        (ENDING, replace(LATE, since=NOW - HOUR_S), {}, "wait"),  # a person had no day yet
        (ENDING, replace(LATE, pending=False), {}, "wait"),  # no person is waited for
        (ENDING, LATE, {"journal": Journal(request=LATE, backoffs=(backoff("ca02"),))}, "wait"),
        (ENDING, LATE, {"policy": replace(POLICY, cas=("ca01",))}, "wait"),
        (ENDING, LATE, {"budget": spent(3)}, "wait"),
    ],
    ids=["runs-out", "has-run-out", "time-remains", "just-asked", "not-pending", "other-fails", "no-other", "budget"],
)
def test_another_ca_is_turned_to_when_what_is_held_runs_out(held, request_, more, action):
    """C1: a request that nobody approves is given up in time, and only for a CA that can be asked now."""
    seen = replace(GOOD, held=(held,), certificate=held.leaf, served=held.leaf)
    step = at(seen, **{"journal": Journal(request=request_), **more})
    assert (step.row, step.action) == ("C1", action)
    if action == "abandon":
        assert (step.ca, step.status) == ("ca01", 7)
        assert "request ID 7 at ca01" in step.reason
        assert "ca02" in step.reason
    else:
        assert step.until is not None
        assert step.until <= request_.next


KNOWN = replace(NEW, ca="ca01", request_id=7, obtained=NOW - DAY_S, number=1)
KNOWN_GOOD = replace(GOOD, held=(KNOWN,))


def test_once_a_week_the_ca_is_asked_whether_it_revoked_what_is_in_service():
    """C5: first after half a week to a week and a half, at each host's own time; then as arranged."""
    first = pace.first_question(KNOWN.obtained, 0)
    assert told(at(KNOWN_GOOD)) == ("C6", "nothing", first, 0)
    step = at(KNOWN_GOOD, now=first)
    assert (*told(step), step.ca, step.generation) == ("C5", "question", None, 0, "ca01", "new")
    arranged = Journal(question=first + WEEK_S)
    assert told(at(KNOWN_GOOD, arranged, now=first)) == ("C6", "nothing", first + WEEK_S, 0)
    assert at(KNOWN_GOOD, arranged, now=first + WEEK_S).row == "C5"


@pytest.mark.parametrize(
    ("seen", "more"),
    [
        (replace(GOOD, held=(replace(KNOWN, ca="gone"),)), {}),
        (replace(GOOD, held=(replace(KNOWN, request_id=0),)), {}),
        (KNOWN_GOOD, {"journal": Journal(backoffs=(backoff("ca01", "later"),))}),
        (KNOWN_GOOD, {"journal": Journal(hold="by the operator")}),
        (KNOWN_GOOD, {"budget": Budget(refused=(replace(backoff("ca01", "changed", 13), secret="mark"),))}),
    ],
    ids=["ca-left", "brought-by-hand", "ca-fails", "held", "password-refused"],
)
def test_nobody_is_asked_about_what_no_ca_can_tell(seen, more):
    """C5: only the CA that gave the ID, and only while it may be asked."""
    more = {"journal": Journal(), **more}
    more["journal"] = replace(more["journal"], backoffs=tuple(replace(b, at=NOW + 30 * DAY_S - 60) for b in more["journal"].backoffs))
    assert at(seen, now=NOW + 30 * DAY_S, **more).action in ("nothing", "hold")


def test_a_question_arranged_by_a_wrong_clock():
    """C5: a time of next year must not end the questions, nor one of last year make it one at every run."""
    first = pace.first_question(KNOWN.obtained, 0)
    assert at(KNOWN_GOOD, Journal(question=NOW + YEAR), now=first).row == "C5"
    assert at(KNOWN_GOOD, Journal(question=NOW - YEAR), now=first - 1).row == "C6"


def test_a_revoked_certificate_is_replaced_and_its_successor_is_not():
    """C4, C3: SCOM refuses a revoked one. Whoever revokes twice means it."""
    gone = replace(KNOWN, revoked=True, mismatches=("revoked: its CA says so",), key=GOOD.key)
    step = at(replace(GOOD, held=(gone,)))
    assert (step.row, step.action, step.new_key) == ("C4", "submit", True)
    assert "revoked generation new" in step.reason
    again = replace(gone, id="newer", leaf="leaf-newer", number=2)
    twice = replace(GOOD, held=(gone, again))
    assert told(at(twice)) == ("C3", "wait", None, 6)
    assert at(twice, wish=Wish(now=True)).action == "wait"
    assert at(twice, wish=Wish(renew=True)).action == "submit"
    third = replace(KNOWN, id="newest", leaf="leaf-newest", number=3)
    assert at(replace(GOOD, held=(gone, again, third), certificate=third.leaf, served=third.leaf)).action == "nothing"
    assert at(replace(GOOD, held=(gone, replace(again, revoked=False, mismatches=("dates: it has expired",))))).action == "submit"


@pytest.mark.parametrize("wish", [Wish(now=True), Wish(renew=True), Wish(now=True, renew=True)])
def test_a_ca_that_failed_in_this_run_is_not_asked_again_whatever_was_wished(wish):
    """C4: a wish is good for one try of each CA; a refusal by us, which is for all of them, ends it."""
    both = Journal(backoffs=(backoff("ca01"), backoff("ca02")))
    assert at(EMPTY, both, wish=wish).ca == "ca01"
    assert at(EMPTY, both, wish=replace(wish, tried=("ca01",))).ca == "ca02"
    assert at(EMPTY, both, wish=replace(wish, tried=("ca01", "ca02"))).action == "wait"
    refused = Journal(backoffs=(backoff("", "changed", 8),))
    assert told(at(EMPTY, refused, wish=replace(wish, tried=("ca01",)))) == ("C3", "wait", None, 8)


@pytest.mark.parametrize("retry", ["soon", "later"])
def test_a_back_off_ends(retry):
    """C4: by time, by `--now`, and by other inputs, to the second."""
    entry = backoff("", retry)
    until = until_of(entry)
    assert told(at(EMPTY, Journal(backoffs=(entry,)))) == ("C4", "wait", until, 5)
    assert at(EMPTY, Journal(backoffs=(entry,)), now=until).action == "submit"
    assert at(EMPTY, Journal(backoffs=(entry,)), now=until - 1).action == "wait"
    assert at(EMPTY, Journal(backoffs=(entry,)), wish=Wish(now=True)).action == "submit"
    assert at(replace(EMPTY, inputs="other"), Journal(backoffs=(entry,))).action == "submit"
    forgotten = backoff("ca01", inputs="other")
    assert at(EMPTY, Journal(backoffs=(entry, forgotten))).until == at(EMPTY, Journal(backoffs=(entry,))).until, "what other inputs ended ends nothing"


@pytest.mark.parametrize("wish", [Wish(), Wish(now=True, renew=True)])
@pytest.mark.parametrize("budget", [spent(3), spent(24, counts=False), spent(30)])
def test_the_submission_budget_is_spent(budget, wish):
    """C4: 3 that may have issued, 24 in all, whatever was wished; the last failure is told with its status."""
    step = at(EMPTY, budget=budget, wish=wish)
    assert told(step) == ("C4", "wait", NOW - 60 + DAY_S, 6)
    step = at(EMPTY, Journal(backoffs=(backoff("ca01", "soon", 5),)), budget, wish)
    assert (step.action, step.status) == ("wait", 5)
    assert "ca01 failed" in step.reason
    assert at(EMPTY, budget=budget, wish=wish, now=NOW - 60 + DAY_S).action == "submit"


@pytest.mark.parametrize("budget", [spent(2), spent(23, counts=False)])
def test_the_submission_budget_is_not_spent(budget):
    """C4: one less than allowed."""
    assert at(EMPTY, budget=budget).action == "submit"


def test_a_generation_that_was_rolled_back_is_not_installed_again():
    """C6: the older one stays, the failure is repeated with its status, and *until* is when it is tried again."""
    seen = replace(GOOD, held=(NEW, OLD), certificate=OLD.leaf, served=OLD.leaf)
    step = at(seen, Journal(skipped=(skip(),)))
    assert (*told(step), step.reason) == ("C6", "wait", NOW - 60 + HOUR_S, 9, "new was rolled back")
    assert "--now" in step.hint
    assert at(seen, Journal(skipped=(skip(),)), now=NOW - 60 + HOUR_S).action == "install"
    assert at(seen, Journal(skipped=(skip(),)), wish=Wish(now=True)).action == "install"
    assert at(replace(seen, inputs="other"), Journal(skipped=(skip(),))).action == "install"


def test_a_skipped_generation_is_not_asked_for_again():
    """C4: it is valid, so that a new one of the same kind is not due before its renewal."""
    seen = replace(EMPTY, held=(NEW,))
    assert at(seen, Journal(skipped=(skip(retry="changed"),))).row == "C6"
    assert at(seen, Journal(skipped=(skip(retry="changed"),)), now=due(NEW, POLICY, 0)).action == "submit"


# -- precedence -----------------------------------------------------------------------------------------------------

def test_a_pair_that_was_moved_aside():
    """L5: it is given its names back before a key would be made."""
    assert told(at(replace(EMPTY, key="", aside=True))) == ("L5", "restore_pair", None, 0)


# What brings each row about, all of which can hold at once; the rows in the order of the tables.
CAUSES = [
    ("L0", dict(identity=Identity("m", "p")), dict(identity=Identity("n", "q"))),
    ("L1", dict(), dict(installation=Installation("installing", target=Place("link"), previous=Place("link")))),
    ("L2", dict(blocked="no agent"), dict()),
    ("L4", dict(), dict(hold="by the operator")),
    ("L3", dict(busy="dpkg"), dict()),
    ("L5", dict(key=""), dict()),
    ("L7", dict(certificate="self", held=(OLD,)), dict()),
    ("L8", dict(served="other", held=(OLD,)), dict()),
    ("C1", dict(), dict(request=replace(SENT, ca="gone"))),
    ("C3", dict(), dict(backoffs=(backoff("", "changed", 8),))),
    ("L6", dict(foreign_key="it came with the image"), dict()),
    ("C4", dict(), dict()),
]


@pytest.mark.parametrize("first", range(len(CAUSES)), ids=[row for row, *_ in CAUSES])
@pytest.mark.parametrize("last", range(len(CAUSES)), ids=[row for row, *_ in CAUSES])
def test_a_later_row_does_not_overtake_an_earlier_one(first, last):
    """With the causes of two rows at once, the upper one decides."""
    seen, journal = replace(GOOD, certificate=OLD.leaf, held=(), served=OLD.leaf), Journal()
    for index in {first, last}:
        _, observed, remembered = CAUSES[index]
        seen, journal = replace(seen, **observed), replace(journal, **remembered)
    assert at(seen, journal).row == CAUSES[min(first, last)][0]


def test_healing_goes_on_while_a_request_is_pending():
    """The two machines are apart: a link moved back is healed beside a pending and beside a doubtful request."""
    for request in (SENT, DOUBT):
        assert at(replace(GOOD, certificate="self", served="self"), Journal(request=request)).action == "install"
        assert at(replace(GOOD, served="self"), Journal(request=request)).action == "restart"


# -- times ----------------------------------------------------------------------------------------------------------

fractions = st.integers(1, 99).map(lambda hundredths: Fraction(hundredths, 100))
shares = st.integers(0, pace.SHARES - 1)
lifetimes = st.integers(HOUR_S, 20 * YEAR)


@given(fractions, fractions, shares, lifetimes, st.integers(-YEAR, 20 * YEAR), st.integers(0, 19))
def test_renewal_is_never_due_outside_its_part_of_the_lifetime(at_, spread, share, lifetime, planned, age):
    """Whatever was planned: after a twentieth of what is left of its life, and by `at` where that still lies ahead."""
    assume(spread < at_)
    obtained = NOW + lifetime * age // 20
    held = Held("x", "leaf", NOW, NOW + lifetime, due=max(NOW + planned, 0), obtained=obtained)
    moment = due(held, replace(POLICY, at=at_, spread=spread), share)
    left = NOW + lifetime - obtained
    assert moment >= obtained + left // 20
    assert moment <= max(NOW + lifetime * at_, obtained + left / 2)


@given(fractions, fractions, shares)
def test_a_certificate_is_not_due_on_the_day_it_was_issued(at_, spread, share):
    """However small `at` is: a twentieth of a year are 18 days."""
    assume(spread < at_)
    assert due(Held("x", "leaf", NOW, NOW + YEAR), replace(POLICY, at=at_, spread=spread), share) >= NOW + 18 * DAY_S


CYCLE = int(YEAR * (POLICY.at - POLICY.spread / 2))


def test_a_fleet_that_enrolled_in_one_hour():
    """Its renewals are spread evenly over a whole cycle, and the same host comes at the same time each time it is asked."""
    held = replace(NEW, not_before=NOW, not_after=NOW + YEAR)
    moments = sorted(due(held, POLICY, share) for share in range(0, pace.SHARES, pace.SHARES // 1000))
    last = NOW + int(YEAR * POLICY.at)
    for tenth in range(10):
        low, high = (last - CYCLE + CYCLE * part / 10 for part in (tenth, tenth + 1))
        assert 95 <= sum(low < moment <= high for moment in moments) <= 105
    assert {due(held, POLICY, 12345) for _ in range(3)} == {due(held, POLICY, 12345)}


@given(shares, st.lists(st.integers(0, 17 * DAY_S), min_size=20, max_size=20))
def test_a_host_that_was_late_keeps_its_place(share, late):
    """An outage leaves no wave behind: the next renewal is planned from when this one should have been, for ever."""
    first = due(replace(NEW, not_before=NOW, not_after=NOW + YEAR), POLICY, share)
    planned = first
    for delay in late:
        issued = planned + delay - 600  # AD CS dates a certificate back by ten minutes
        held = Held("x", "leaf", issued, issued + YEAR, due=planned, obtained=issued + 605)
        assert due(held, POLICY, share) == planned + CYCLE
        planned += CYCLE
    assert planned == first + 20 * CYCLE


def test_a_host_that_was_off_for_months_gets_a_new_place():
    """What was planned lies behind: it is as after a roll-out, not due at once, and many such hosts come apart again."""
    held = Held("x", "leaf", NOW, NOW + YEAR, due=NOW - CYCLE, obtained=NOW)
    assert due(held, POLICY, 123) == due(replace(held, due=0), POLICY, 123)


def test_a_fleet_that_adopts_old_certificates():
    """Installed by hand months ago, adopted in one hour: nobody is due at once, though `at` lies behind."""
    old = Held("x", "leaf", NOW - 300 * DAY_S, NOW + 65 * DAY_S, obtained=NOW)
    moments = [due(old, POLICY, share) for share in range(0, pace.SHARES, pace.SHARES // 100)]
    assert min(moments) > NOW + 3 * DAY_S
    assert max(moments) < NOW + 33 * DAY_S
    assert max(moments) - min(moments) > 28 * DAY_S


@pytest.mark.parametrize("parts", [3, 10])
def test_a_fleet_that_upgrades_from_0_1_0(parts):
    """Its renewals were spread over a third of the lifetime, then over a tenth, before two thirds: they are due when they were, not at once."""
    for share in range(0, pace.SHARES, pace.SHARES // 100):
        held = Held("x", "leaf", NOW, NOW + YEAR, due=-parts, obtained=NOW + 5)
        assert abs(due(held, POLICY, share) - (NOW + YEAR * (Fraction(2, 3) - Fraction(share, pace.SHARES) / parts))) <= 2


def test_a_certificate_whose_lifetime_gains_nothing():
    """A CA near its end gives certificates that are born late in their life; the next one is not asked for in a loop."""
    held = Held("x", "leaf", NOW - 300 * DAY_S, NOW + 2 * DAY_S, due=NOW - HOUR_S, obtained=NOW)
    assert due(held, POLICY, 0) >= NOW + 2 * DAY_S // 20


@given(st.integers(0, 60 * DAY_S), st.integers(0, 60 * DAY_S))
def test_polls_become_rarer_with_the_age_of_the_request(age, older):
    """Between a minute and four hours, never shorter for an older request: who issues at once is seen at once."""
    age, older = sorted((age, older))
    assert 60 <= poll_after(age) <= poll_after(older) <= 4 * HOUR_S


@given(st.sampled_from([backoff, skip]), st.integers(-3, 10**9), st.sampled_from([("soon", 300, 7200), ("later", 3600, 86400)]))
def test_back_off_doubles_up_to_its_bound(make, failures, kind):
    """From 5 minutes to 2 hours, from an hour to a day; any count in a journal gives a time."""
    retry, first, longest = kind
    wait = until_of(make(retry=retry, failures=failures, at=NOW)) - NOW
    assert wait == min(first * 2 ** min(max(failures - 1, 0), 40), longest)
    assert until_of(make(retry="changed", failures=failures)) is None


@given(st.sampled_from(["soon", "later"]), st.integers(-3, 10**9), st.integers(1, 20 * YEAR))
def test_a_fleet_that_comes_back_from_an_outage_in_one_hour(retry, failures, left):
    """Who holds a valid certificate has time: it asks after a day, then every four, sooner the less time remains."""
    wait = until_of(backoff(retry=retry, failures=failures, at=NOW), NOW + left) - NOW
    first = failures <= 1
    assert wait == max(min(left // (16 if first else 3), DAY_S if first else 4 * DAY_S), 300 if retry == "soon" else HOUR_S)
    assert until_of(backoff(retry="changed", failures=failures), NOW + left) is None


def test_a_host_without_a_certificate_waits_as_long_as_one_that_has_time():
    """C4: the same failure, to the second: five minutes where nothing is held or all of it is invalid, a day where a year is left."""
    failed, late = Journal(backoffs=(backoff(ca="ca01"), backoff(ca="ca02"))), replace(OLD, not_after=NOW + 120 * DAY_S)
    assert at(EMPTY, failed).until == NOW - 60 + 300
    expired = replace(late, mismatches=("dates: it has expired",))
    assert at(replace(GOOD, held=(expired,)), failed).until == NOW - 60 + 300
    due_now = replace(GOOD, held=(replace(late, due=NOW - CYCLE - DAY_S, obtained=NOW - 200 * DAY_S),), certificate=late.leaf, served=late.leaf)
    step = at(due_now, failed)
    assert (step.row, step.action, step.until) == ("C4", "wait", NOW - 60 + DAY_S)
    assert at(due_now, failed, now=step.until).action == "submit"


def test_a_renewal_that_was_planned_loses_its_place():
    """C4 carries when it was planned; what a person asks for, or what is needed out of turn, was not planned."""
    held = replace(OLD, not_before=NOW - 300 * DAY_S, not_after=NOW + 65 * DAY_S)
    seen = replace(GOOD, held=(held,), certificate=held.leaf, served=held.leaf)
    assert (at(seen).action, at(seen).due) == ("submit", due(held, POLICY, 0))
    assert (at(seen, wish=Wish(renew=True)).action, at(seen, wish=Wish(renew=True)).due) == ("submit", 0)
    assert (at(EMPTY).action, at(EMPTY).due) == ("submit", 0)


@pytest.mark.parametrize("retry", ["soon", "later"])
def test_a_clock_that_was_set_back_ends_a_back_off(retry):
    """A failure recorded in 2030 by a wrong clock must not keep the CA from being asked until 2030."""
    ahead = backoff("", retry, at=NOW + 5 * YEAR)
    assert at(EMPTY, Journal(backoffs=(ahead,))).action == "submit" or at(EMPTY, Journal(backoffs=(ahead,)), now=NOW + DAY_S + 1).action == "submit"


def test_a_clock_that_was_set_back_ends_the_wait_for_a_poll():
    """No poll is more than four hours away, whatever clock wrote its time."""
    journal = Journal(request=replace(SENT, since=NOW + 5 * YEAR, next=NOW + 5 * YEAR))
    assert at(EMPTY, journal, now=NOW + pace.POLL_S[1] + 1).action == "poll"


def test_a_clock_that_was_set_back_ends_a_doubt():
    """A doubtful request of the future is repeated or given up within a day, too."""
    for tries in (1, 2):
        journal = Journal(request=replace(DOUBT, since=NOW + 5 * YEAR, next=NOW + 5 * YEAR, tries=tries))
        assert at(EMPTY, journal, now=NOW + DAY_S + 1).action in ("repeat", "abandon")


# -- unattended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", range(14))
def test_an_unattended_run_fails_only_where_a_person_is_needed(status):
    """Waiting is no failure while time remains; once less than a tenth is left it is; anything else always is."""
    patient = status in (4, 5, 7, 11)
    end = NEW.not_after - (NEW.not_after - NEW.not_before) // 10
    assert needs_a_person(status, (NEW,), NOW) is (status != 0 and not patient)
    assert needs_a_person(status, (NEW,), end + 2) is (status != 0)
    assert needs_a_person(status, (), NOW) is (status != 0 and not patient)


def test_who_has_not_joined_the_domain_yet_is_waited_for_in_minutes_for_a_day():
    """At first boot keytab and computer account may come late; after a day it is a failure like others, for a person."""
    at_, waits = NOW, []
    for failures in range(1, 99):
        entry = backoff(retry="joining", status=13, failures=failures, at=at_)
        waits.append(until_of(entry) - at_)
        assert needs_a_person(13, (), NOW, pace.patience(entry)) is (at_ - NOW >= DAY_S - 900), failures
        at_ = until_of(entry)
    assert waits[:3] == [300, 600, 900]
    assert set(waits[2:96]) == {900}
    assert waits[96:] == [HOUR_S, 2 * HOUR_S]
    assert until_of(backoff(retry="joining", failures=10**9)) - (NOW - 60) == DAY_S


def test_a_sign_in_that_waits_for_a_person_or_for_nobody():
    """A domain controller that is down is waited for like a CA; a host that was enrolled and lost its keytab needs a person."""
    end = NEW.not_after - (NEW.not_after - NEW.not_before) // 10
    assert not needs_a_person(13, (NEW,), NOW, "soon")
    assert needs_a_person(13, (NEW,), end + 2, "soon")
    assert not needs_a_person(13, (), NOW, "joining")
    assert needs_a_person(13, (NEW,), NOW, "joining")
    for retry in ("", "later", "changed", "key"):
        assert needs_a_person(13, (), NOW, retry)
    assert needs_a_person(6, (), NOW, "soon")


def test_a_key_that_was_refused_is_not_sent_again_for_a_command_that_is_repeated():
    """C4: a configuration management that calls `run --now` every five minutes would lock the account."""
    refused = Budget(refused=(replace(backoff("ca01", "key", 13), secret="mark"), replace(backoff("ca02", "key", 13), secret="mark")))
    for wish in (Wish(), Wish(now=True)):
        step = at(EMPTY, budget=refused, wish=wish)
        assert (step.action, step.status, step.until, step.retry) == ("wait", 13, NOW - 60 + HOUR_S, "key")
    assert at(EMPTY, budget=refused, wish=Wish(renew=True)).action == "submit"
    assert at(EMPTY, budget=refused, now=NOW - 60 + HOUR_S).action == "submit"
    assert at(replace(EMPTY, inputs="other"), budget=refused).action == "wait", "another configuration makes it no other key"


def test_the_best_certificate_decides_how_much_time_remains():
    """An old one near its end is no reason while a new one is held; one that is over is a reason, not an end of it."""
    ending = replace(OLD, not_after=NOW + 60)
    assert not needs_a_person(5, (ending, NEW), NOW)
    assert needs_a_person(5, (ending,), NOW)
    assert needs_a_person(5, (replace(OLD, not_after=NOW - 1),), NOW)


# -- properties over everything that can be observed ----------------------------------------------------------------

PAST = (NOW - 2 * DAY_S, NOW - DAY_S, NOW - 2 * HOUR_S, NOW - HOUR_S, NOW - 60, NOW - 1, NOW, 0)
ANY = (*PAST, NOW + 1, NOW + 60, NOW + HOUR_S, NOW + 3 * DAY_S)


class Cases:
    """Draws whole cases from one random source of hypothesis: a strategy for each field would take 50 times as long."""

    def __init__(self, random, written, planned):
        self.random, self.written, self.planned = random, written, planned

    def one(self, *values):
        return self.random.choice(values)

    def when(self, values):
        return self.random.choice(values) + (self.random.randrange(-HOUR_S, 1) if self.random.random() < 0.5 else 0)

    def some(self, most, make):
        return tuple(make() for _ in range(self.random.randrange(most + 1)))

    def held(self):
        found = []
        for name in self.random.sample(["g1", "g2", "g3"], self.random.randrange(4)):
            begin, end = self.random.randrange(NOW - 300 * DAY_S, NOW + 1), self.random.randrange(NOW + 60, NOW + 300 * DAY_S)
            mismatches = self.one((), (), ("cn: ...",), ("revoked: its CA says so",))
            found.append(
                Held(
                    name, f"leaf-{name}", begin, end, self.one(0, begin, begin - 200 * DAY_S), mismatches=mismatches, ca=self.one("ca01", "ca02", "gone", ""),
                    request_id=self.one(0, 7), obtained=self.one(0, begin), revoked=bool(mismatches and "revoked" in mismatches[0]),
                    number=self.random.randrange(4),
                )
            )
        return tuple(found)

    def seen(self):
        leaves = ("leaf-g1", "leaf-g2", "leaf-g3", "self", "")
        listening = self.one(True, False)
        return Observed(
            blocked=self.one("", "", "", "", "", "no agent"), busy=self.one("", "", "", "", "", "dpkg"),
            changed_at=self.one(0, self.when(self.written)), key=self.one(KEY, KEY, KEY, KEY, KEY, ""), certificate=self.one(*leaves),
            held=self.held(), stranger=self.one(None, None, None, None, NEW), live=self.one(True, False), listening=listening,
            served=self.one(*leaves) if listening else "", process=self.one("running", "stopped", "died"),
            inputs=self.one("i", "i", "i", "other"), share=self.random.randrange(pace.SHARES),
            served_until=self.one(0, NOW + DAY_S, NOW + YEAR), loadable=self.one(True, True, False), aside=self.one(*[False] * 9, True),
            locked=self.one(*[""] * 7, "/ssl/omikey.pem"), spoilt=self.one(*[""] * 4, "its mode changed"), copies=self.one((), tuple(leaves)),
            problems=self.one((), ("it is expired",)),
        )

    def failure(self, kind, subject, status):
        retry = self.one("soon", "later", "changed", *(("joining", "key") if kind is Backoff else ()))
        rest = (self.one("i", "i", "i", "other"), self.when(self.written), self.random.randrange(1, 40), retry)
        if status == 8:
            rest = (*rest[:2], 1, "changed")
        return kind(subject, *rest, status, "a message", *(("a hint",) if kind is Backoff else ()))

    def journal(self):
        request = Request(
            self.one("none", "none", "none", "submitting", "submitted", "doubtful"), self.one("ca01", "ca02", "gone"), "csr",
            self.one(KEY, KEY, "other"), 7, self.when(self.written), self.random.randrange(1, 4), self.when(self.planned),
            pending=self.one(True, False), answered=self.one(True, False),
        )
        open_one = Installation("installing", target=Place("link"), previous=Place("link"))
        cas = self.random.sample(["ca01", "ca02", ""], self.random.randrange(4))
        ids = self.random.sample(["g1", "g2", "g3"], self.random.randrange(4))
        return Journal(
            request=request,
            installation=self.one(*[Installation()] * 11, open_one),
            backoffs=tuple(self.failure(Backoff, ca, self.one(5, 6, 13, *([] if ca else [8]))) for ca in cas),
            skipped=tuple(self.failure(Skip, name, 9) for name in ids),
            hold=self.one("", "", "", "", "", "by the operator"), restarting=self.one("", "", "", "leaf-g1"),
            hold_until=self.one(0, 0, self.when(self.written), self.when(self.planned)),
            fights=self.some(2, lambda: Fight(self.one("certificate", "key"), self.when(self.written), self.when(self.planned), HOUR_S)),
            question=self.one(0, self.when(self.planned)),
        )

    def budget(self):
        return Budget(
            submissions=self.some(6, lambda: Submission(self.when(self.written), self.one(True, False))),
            restarts=self.some(7, lambda: self.when(self.written)),
            refused=self.some(1, lambda: replace(self.failure(Backoff, self.one("ca01", "ca02"), 13), retry=self.one("changed", "key"), secret="mark")),
        )

    def policy(self):
        spread, at_ = sorted((Fraction(self.random.randrange(1, 50), 100), Fraction(self.random.randrange(50, 100), 100)))
        return Policy(
            self.one(("ca01",), ("ca01", "ca02"), ("ca02", "ca01")), at_, spread, self.random.randrange(1, 5),
            self.random.randrange(1, 7), self.one(DAY_S, 30 * DAY_S), self.one(0, 120, 9999),
            self.one(0, 0, NOW + 60, NOW + 5 * HOUR_S, NOW + 30 * HOUR_S),
        )

    def wish(self):
        return Wish(self.one(True, False), self.one(True, False), self.one(True, False), self.one((), (), ("ca01",), ("ca01", "ca02")))

    def case(self):
        return self.seen(), self.policy(), self.journal(), self.budget(), self.wish()


sources = st.randoms(use_true_random=True)


def each(random, check, written=ANY, planned=ANY):
    """Twenty cases at a time; the one that fails is shown."""
    source = Cases(random, written, planned)
    for _ in range(20):
        case = source.case()
        try:
            check(*case)
        except AssertionError:
            note("\n".join(map(repr, case)))
            raise


@given(sources, st.sampled_from([NOW, 0, NOW - DAY_S, NOW + 900 * DAY_S]))
def test_no_observation_is_without_a_decision(random, now):
    """Whatever was seen: one step, the same each time, that the driver knows, with words for a person; nothing is raised."""
    each(random, lambda *case: sensible(*case, now))


def sensible(seen, policy, journal, budget, wish, now):
    step = decide(seen, policy, journal, budget, now, wish)
    assert step == decide(seen, policy, journal, budget, now, wish)
    assert isinstance(step, Step)
    assert step.reason or step.row == "L2"
    assert step.action in {"recover", "make_key", "restore_pair", "adopt", "install", "relink", "restart", "submit", "repeat", "poll", "abandon", "lost", "question",
                           "wait", "hold", "nothing"}
    assert step.until is None or step.until > now
    assert (step.until is None) or step.action in ("wait", "nothing", "hold"), "only a step that waits has an end of waiting"
    if step.action not in ("wait", "nothing", "hold", "abandon"):
        assert step.status == 0
    if step.action == "wait":
        assert step.status or step.row == "C6", "a run that waits repeats the status of what it waits for"


def in_truce(journal, name):
    return any(fight.name == name and fight.at <= NOW < fight.until for fight in journal.fights)


def available_restarts(budget, now):
    used = budget.current(now).restarts
    return min(RESTARTS_PER_HOUR - sum(at > now - HOUR_S for at in used), RESTARTS_PER_DAY - len(used))


@given(sources)
def test_a_submission_that_is_forbidden(random):
    """No POST beside a pending or doubtful request, while held, without agent or key, during a back-off, over a budget."""
    each(random, submits_only_where_allowed)


def submits_only_where_allowed(seen, policy, journal, budget, wish):
    step = decide(seen, policy, journal, budget, NOW, wish)
    if step.action not in ("submit", "repeat"):
        return
    sent = budget.current(NOW).submissions
    assert sum(s.counts for s in sent) < policy.certificates_per_day
    assert len(sent) < policy.submissions_per_day
    assert not (journal.held(NOW) or seen.blocked or seen.busy or seen.locked)
    assert seen.key
    assert not in_truce(journal, "key") or [held for held in seen.held if not held.mismatches] or (seen.running and not seen.served)
    assert journal.installation.state == "settled"
    assert step.ca in policy.cas
    if step.action == "repeat":
        assert (journal.request.state, journal.request.ca, journal.request.spki) == ("doubtful", step.ca, seen.key)
        assert journal.request.tries < 2
        assert journal.request.next <= NOW, "`--now` does not shorten a cool-down"
        return
    assert journal.request.state == "none"
    for entry in journal.backoffs:
        if entry.ca in ("", step.ca) and entry.inputs == seen.inputs:
            ends = until_of(entry, pace.expiry(seen.held))
            ended = ends is not None and (ends <= NOW or entry.at > NOW)
            wished = wish.renew or (wish.now and entry.retry not in ("changed", "key"))
            again = wish.tried if not entry.ca else entry.ca in wish.tried
            assert ended or (wished and not again), "a back-off forbids it"
    fit = [held for held in seen.held if not held.mismatches]
    assert wish.renew or not fit or due(max(fit, key=lambda h: (h.not_before, h.not_after, h.id)), policy, seen.share) <= NOW


@given(sources)
def test_a_restart_that_is_forbidden(random):
    """None of an agent that is stopped or not this root's, none beyond the budget, no installation that could not be undone."""
    each(random, restarts_only_where_allowed)


def restarts_only_where_allowed(seen, policy, journal, budget, wish):
    step = decide(seen, policy, journal, budget, NOW, wish)
    if step.action in ("install", "relink", "restart"):
        assert not (journal.held(NOW) or seen.blocked or seen.busy or seen.locked)
        restarts_it = step.action == "restart" or seen.served != next((h.leaf for h in seen.held if h.id == step.generation), "")
        good = seen.served and seen.served_until > policy.opens > NOW and seen.running
        assert not (good and restarts_it) or seen.foreign_key or any(h.revoked for h in seen.held if h.leaf == seen.served)
    skipped = [
        s.generation for s in journal.skipped
        if s.inputs == seen.inputs and not wish.now and (until_of(s) is None or until_of(s) > NOW >= s.at)
    ]
    fit = {h.id: h for h in seen.held if not h.mismatches and h.id not in skipped}
    if step.action == "restart":
        assert available_restarts(budget, NOW) >= 1
        assert seen.live
        assert seen.process != "stopped" or seen.listening
        if seen.certificate not in [h.leaf for h in fit.values()]:
            assert (step.row, seen.listening, seen.loadable) == ("L9", False, True), "only what is installed can be served"
            assert journal.restarting or (seen.running and available_restarts(budget, NOW) == 1), "one is left: to start what is there"
    if step.action in ("install", "relink"):
        held = fit[step.generation]
        assert not in_truce(journal, "certificate") or (seen.running and not seen.served)
        assert (step.action == "relink") == (held.leaf in seen.copies)
        if seen.live and seen.process != "stopped" and seen.served != held.leaf:
            assert available_restarts(budget, NOW) >= (2 if seen.loadable else 1)


def test_a_spent_budget_is_told_no_longer_than_a_refused_secret_hides_what_came_before():
    """The end of the latter's wait brings the older refusal to light, which needs a person: an answer must not stand beyond it."""
    budget = replace(spent(3), refused=(replace(backoff("ca01", "key", 13, NOW - HOUR_S, 9), secret="mark"),))
    journal = Journal(backoffs=(backoff("", "changed", 8, NOW - 2 * HOUR_S),))
    step = at(EMPTY, journal, budget, policy=Policy(cas=("ca01",)))
    assert told(step) == ("C4", "wait", NOW + 23 * HOUR_S, 8)
    assert told(at(EMPTY, journal, budget, policy=Policy(cas=("ca01",)), now=NOW + 23 * HOUR_S))[0] == "C3"


@given(sources)
def test_until_is_honest(random):
    """An idle run relies on it: before that time nothing else is decided unless something outside changes."""
    each(random, stays_as_it_is, PAST, ANY)


def stays_as_it_is(seen, policy, journal, budget, wish):
    step = decide(seen, policy, journal, budget, NOW, wish)
    if step.action not in ("wait", "hold", "nothing"):
        return
    end = step.until if step.until is not None else NOW + 400 * DAY_S
    # the times at which something could change, and one between
    marks = [until_of(failure) for failure in journal.skipped]
    marks += [until_of(failure, pace.expiry(seen.held)) for failure in journal.backoffs] + [due(held, policy, seen.share) for held in seen.held]
    marks += [journal.question, *(pace.first_question(held.obtained, seen.share) for held in seen.held)]
    marks += [pace.runs_out_at(seen.held)] if seen.held else []
    marks += [journal.request.next, journal.request.since + policy.pending_s, journal.request.since + DAY_S]
    for moment in {mark for mark in marks if mark is not None and NOW <= mark < end} | {end - 1, (NOW + end) // 2}:
        later = decide(seen, policy, journal, budget, moment, wish)
        assert (later.row, later.action, later.status) == (step.row, step.action, step.status), f"{moment - NOW} s later"


@given(sources)
def test_a_rest_is_honest(random):
    """What an idle run relies on: until then the plan decides the very same, words and times included, whatever the moment."""
    each(random, rests, PAST, ANY)


def rests(seen, policy, journal, budget, wish):
    found = plan.rest(seen, policy, journal, budget, NOW)
    step = decide(seen, policy, journal, budget, NOW)
    if found is None:
        return
    assert found[0] == step
    assert step.action in plan.WAITING and step.row != "L3"
    until = found[1]
    assert NOW < until <= NOW + plan.REST_S
    assert needs_a_person(step.status, seen.held, NOW) == needs_a_person(step.status, seen.held, until - 1)
    marks = [until_of(failure) for failure in journal.skipped] + [until_of(failure, pace.expiry(seen.held)) for failure in journal.backoffs]
    marks += [due(held, policy, seen.share) for held in seen.held] + [journal.request.next, journal.request.since + DAY_S]
    marks += [NOW + 1, until - 1, (NOW + until) // 2]
    for moment in {mark for mark in marks if mark is not None and NOW <= mark < until}:
        assert decide(seen, policy, journal, budget, moment) == step, f"{moment - NOW} s later"


def test_a_host_where_all_is_well_rests_for_a_week():
    """Not until its renewal: once a week everything is looked at, whatever nobody thought of."""
    assert plan.rest(GOOD, POLICY, Journal(), Budget(), NOW) == (at(), NOW + plan.REST_S)
    waiting = Journal(request=SENT)
    assert plan.rest(EMPTY, POLICY, waiting, Budget(), NOW) == (at(EMPTY, waiting), NOW + 60)
    assert plan.rest(GOOD, POLICY, Journal(hold="change freeze"), Budget(), NOW)[1] == NOW + plan.REST_S == NOW + 7 * DAY_S
    assert plan.rest(Observed(blocked="no agent"), POLICY, Journal(), Budget(), NOW)[1] == NOW + plan.REST_S
    assert plan.rest(GOOD, POLICY, Journal(), restarts(1, age=DAY_S - 50), NOW)[1] == NOW + 50, "a figure of the status changes"
    late = replace(OLD, not_before=NOW - 9000, not_after=NOW + 1500)  # a tenth of its life begins in 450 s
    asked = Journal(request=replace(SENT, next=NOW + 3000))
    assert plan.rest(replace(GOOD, held=(late,), certificate=late.leaf, served=late.leaf), POLICY, asked, Budget(), NOW)[1] == NOW + 450, "then a person is needed"
    fight = Fight("certificate", NOW + 100, NOW + 200, HOUR_S)
    for ahead in (Journal(backoffs=(backoff(at=NOW + 100),)), Journal(skipped=(skip(at=NOW + 100),)), Journal(fights=(fight,))):
        assert plan.rest(GOOD, POLICY, ahead, Budget(), NOW)[1] == NOW + 100, "a failure or a fight of the future counts from then on"
    renamed = Journal(identity=Identity(since=NOW - 6 * DAY_S))
    assert plan.rest(GOOD, POLICY, renamed, Budget(), NOW)[1] == NOW + DAY_S, "its change is to be forgotten, before another one makes it a clone"
    ending = replace(NEW, not_before=NOW - 900 * DAY_S, not_after=NOW + 500, mismatches=("dates: ...",))
    assert plan.rest(replace(GOOD, held=(NEW, ending)), POLICY, Journal(), Budget(), NOW)[1] == NOW + 500


@pytest.mark.parametrize("seen", [EMPTY, replace(GOOD, busy="dpkg"), replace(GOOD, changed_at=NOW - 5)])
def test_a_host_that_does_not_rest(seen):
    """There is something to do, or others are at work: the next run must look."""
    assert plan.rest(seen, POLICY, Journal(), Budget(), NOW) is None
    assert plan.rest(GOOD, POLICY, Journal(), restarts(1, age=-60), NOW) is None, "a clock was wrong"
    assert plan.rest(Observed(blocked="no port"), POLICY, Journal(restarting="any"), Budget(), NOW) is None, "an agent that we stopped is to be started"
    down = replace(EMPTY, listening=False, served="", process="died", loadable=False)
    ill = Journal(backoffs=tuple(backoff(ca) for ca in POLICY.cas), restarting="any")
    assert plan.rest(down, POLICY, ill, Budget(), NOW), "nothing of it could be started"
    assert plan.rest(replace(down, loadable=True, locked="/etc"), POLICY, ill, Budget(), NOW), "nor by its account"


def test_until_ends_with_the_life_of_a_pending_request():
    """The request is given up before its next poll is due: *until* must not lie beyond that."""
    journal = Journal(request=replace(SENT, since=NOW - 30 * DAY_S + 30, next=NOW + 3600))
    assert at(EMPTY, journal).until == NOW + 30


def test_until_ends_with_the_day_of_a_doubtful_request():
    """A cool-down that began late, or a spent budget, does not outlast the day after which it is given up."""
    journal = Journal(request=replace(DOUBT, since=NOW - DAY_S + 30, next=NOW + 600))
    assert at(EMPTY, journal).until == NOW + 30
    over = Journal(request=replace(DOUBT, since=NOW - DAY_S + 30, next=NOW - 1))
    assert at(EMPTY, over, spent(3)).until == NOW + 30


def test_a_fleet_whose_answers_were_lost_in_one_hour():
    """C2: a CA that drowned would drown again: the repeats are spread over four hours, the new requests over a day, by the host's share."""
    for share in (0, 1 << 23, (1 << 24) - 1):  # the other place of these is 256 times as far
        seen, doubt = replace(EMPTY, share=share), Journal(request=replace(DOUBT, since=NOW - 900, next=NOW))
        wait = pace.REPEAT_SPREAD_S * 256 * share // pace.SHARES
        assert at(seen, doubt, now=NOW + wait).action == "repeat"
        if share:
            assert at(seen, doubt).until == NOW + wait
            assert at(seen, doubt, now=NOW + wait - 1).action == "wait"
        twice, ends = Journal(request=replace(doubt.request, tries=2)), NOW - 900 + DAY_S + DAY_S * 256 * share // pace.SHARES
        assert at(seen, twice).until == ends
        assert (at(seen, twice, now=ends - 1).action, at(seen, twice, now=ends).action) == ("wait", "abandon")


def test_until_ends_when_a_skipped_generation_is_tried_again():
    """C4 waits two hours for the CA, but the generation that was rolled back is installed again before that."""
    seen = replace(GOOD, held=(replace(NEW, not_before=NOW - 300 * DAY_S, not_after=NOW + 65 * DAY_S),), certificate="self", served="self")
    journal = Journal(skipped=(skip(at=NOW - HOUR_S + 30),), backoffs=(backoff("", "later", 6, at=NOW),))
    step = at(seen, journal)
    assert (step.row, step.until) == ("C4", NOW + 30)
    assert at(seen, journal, now=NOW + 30).action == "install"


def test_until_ends_when_renewal_of_a_skipped_generation_is_due():
    """C6: a generation skipped until inputs change is renewed all the same, so that time is named."""
    seen = replace(EMPTY, held=(NEW,))
    assert at(seen, Journal(skipped=(skip(retry="changed"),))).until == due(NEW, POLICY, 0)


def test_new_roots_do_not_make_a_fleet_renew_in_one_hour():
    """C4: configuration management puts a new root file on every host at once; the certificates in service still serve."""
    displaced = replace(NEW, mismatches=("path: self-signed certificate in chain",))
    seen = replace(GOOD, held=(displaced,), trust_changed_at=NOW - 60, share=pace.SHARES // 2)
    step = at(seen)
    assert told(step) == ("C6", "nothing", NOW - 60 + pace.TRUST_SPREAD_S // 2, 0)
    assert at(seen, now=step.until).action == "submit"
    assert at(seen, wish=Wish(renew=True)).action == "submit"
    assert at(replace(seen, held=(replace(displaced, mismatches=("path: x", "dates: expired")),))).action == "submit"
    assert at(replace(seen, certificate="self", served="self")).action == "submit", "it is not what the agent serves"


# -- the time on the wall -------------------------------------------------------------------------------------------


@pytest.fixture
def berlin(monkeypatch):
    """The time of a zone that changes its clocks, and what its clock shows."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")  # POSIX: no database of zones is needed
    time.tzset()
    yield lambda text: int(time.mktime(time.strptime(text, "%Y-%m-%d %H:%M")))
    monkeypatch.undo()
    time.tzset()


def next_of(text, clock, *windows):
    return time.strftime("%d %H:%M", time.localtime(pace.opens(windows, clock(text), time.localtime) or clock(text)))


def test_a_range_that_spans_midnight(berlin):
    """It lasts from its beginning to its end, to the minute; the nearest of several counts."""
    night, noon = (22 * 60, 2 * 60), (12 * 60, 12 * 60 + 30)
    assert next_of("2027-06-10 21:59", berlin, night) == "10 22:00"
    for inside in ("2027-06-10 22:00", "2027-06-10 23:59", "2027-06-11 00:00", "2027-06-11 01:59"):
        assert pace.opens((night,), berlin(inside), time.localtime) == 0
    assert next_of("2027-06-11 02:00", berlin, night) == "11 22:00"
    assert next_of("2027-06-11 02:00", berlin, night, noon) == "11 12:00"
    assert next_of("2027-06-11 12:30", berlin, night, noon) == "11 22:00"
    assert pace.opens((), NOW, time.localtime) == pace.opens(((0, 1440),), NOW, time.localtime) == 0
    assert next_of("2027-06-11 02:00", berlin, (23 * 60, 24 * 60)) == "11 23:00"


def test_a_night_with_an_hour_more_or_less(berlin):
    """The clock on the wall counts: a range that the day lacks is left out, one that it has twice lasts twice."""
    assert next_of("2027-03-28 01:30", berlin, (120, 300)) == "28 03:00", "02:00 does not exist that night"
    assert next_of("2027-03-28 01:30", berlin, (120, 180)) == "29 02:00"
    before = berlin("2027-10-31 01:59")
    assert pace.opens(((120, 180),), before, time.localtime) == before + 60
    for hour in (1, 2):
        assert pace.opens(((120, 180),), before + hour * HOUR_S, time.localtime) == 0
    assert pace.opens(((120, 180),), before + 2 * HOUR_S + 60, time.localtime) == berlin("2027-11-01 02:00")
