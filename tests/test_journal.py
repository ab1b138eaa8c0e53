"""What one run tells the next: no transition that the page does not allow, no journal that is half understood."""

import dataclasses
import json
import os
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import journal as j
from scx_enroll.errors import EnrollError, HostError

MACHINES = {"The request": j.REQUEST, "The installation": j.INSTALLATION}
PAIRS = [
    (name, state, event)
    for name, machine in MACHINES.items()
    for state in [*machine, "unheard-of"]
    for event in sorted({event for events in machine.values() for event in events} | {"unheard-of"})
]
NOW = 1_700_000_000


# -- the two machines -----------------------------------------------------------------------------------------------


@pytest.fixture
def page(checkout):
    """docs/state.md, as its sections."""
    with open(os.path.join(checkout, "docs", "state.md"), encoding="utf-8") as file:
        return {part.split("\n", 1)[0]: part for part in file.read().split("\n## ")}


def rows(section):
    """The rows of a section's tables: the words in back quotes of each cell."""
    lines = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[re.findall(r"`([\w/.<>]+)`", cell) for cell in line] for line in lines]


@pytest.mark.checkout
@pytest.mark.parametrize("title", MACHINES)
def test_the_page_tells_of_other_states_than_the_code(page, title):
    """An operator who reads a state in the journal finds it on the page, and the page promises no other."""
    described = [row[0][0] for row in rows(page[title]) if len(row) == 3 and row[0] and not row[2]]
    written_before = [row[0][0] for row in rows(page[title]) if len(row) == 3 and row[0] and not row[1]]
    assert sorted(set(described) | set(written_before)) == sorted(MACHINES[title])


@pytest.mark.checkout
@pytest.mark.parametrize("title", MACHINES)
def test_the_page_tells_of_other_transitions_than_the_code(page, title):
    """Every row of the table of events is in the code with the same end, and the code has no other."""
    told = [(row[0][0], row[1][0], row[2][0]) for row in rows(page[title]) if len(row) == 3 and all(row)]
    coded = [(state, event, end) for state, events in MACHINES[title].items() for event, end in events.items()]
    assert sorted(told) == sorted(coded)
    assert len(told) == len(set(told)), "a row stands twice"


@pytest.mark.parametrize(("machine", "state", "event"), PAIRS)
def test_an_event_that_the_table_lacks_moves_nothing(machine, state, event):
    """Allowed pairs move to the state of the table; all others are defects, and the table is as before."""
    table = MACHINES[machine]
    before = {key: dict(events) for key, events in table.items()}
    if event in before.get(state, {}):
        assert j.step(table, state, event) == before[state][event]
    else:
        with pytest.raises(EnrollError, match=f"illegal transition: {event} in state {state}") as caught:
            j.step(table, state, event)
        assert caught.value.exit_status == 1
    assert {key: dict(events) for key, events in table.items()} == before


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_machine_that_can_not_come_to_rest(machine):
    """From every state the state at rest, which is the first, can be reached: no run is stuck for ever."""
    rest, *others = machine
    for state in others:
        reached, todo = set(), [state]
        while todo:
            here = todo.pop()
            reached.add(here)
            todo.extend(set(machine[here].values()) - reached)
        assert rest in reached
    assert set().union(*(events.values() for events in machine.values())) <= set(machine)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_table_that_a_caller_could_change(machine):
    """The outer mapping is read-only: no module can allow itself a transition."""
    with pytest.raises(TypeError):
        machine["none"] = {}


# -- to and from JSON -----------------------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=30)
times = st.integers(min_value=0, max_value=2**37)  # far beyond the year 6000
places = st.builds(
    j.Place, kind=st.sampled_from(["link", "file", "absent"]), text=texts, leaf=texts, sha256=texts, saved=texts, uid=times, gid=times,
    mode=st.integers(0, 0o7777), marker=st.booleans(), generation=texts,
)
requests = st.one_of(
    st.builds(
        j.Request, state=st.just("submitted"), ca=texts, csr=texts, spki=texts, id=times, since=times, tries=times, next=times,
        pending=st.booleans(), answered=st.booleans(), why=texts, rule=texts,
    ),
    st.builds(j.Request, state=st.sampled_from([s for s in j.REQUEST if s != "submitted"]), id=st.none() | times, ca=texts, next=times),
)
installations = st.one_of(
    st.builds(
        j.Installation, state=st.sampled_from(list(j.INSTALLATION)), layout=texts, port=times, certificate=texts, target=places,
        previous=places, running=st.booleans(), pid=times, pid_start=times, inputs=texts, hold=texts, why=texts,
    ),
    st.just(j.Installation()),
)
retries = st.sampled_from(["soon", "later", "changed"])
backoffs = st.lists(st.builds(j.Backoff, texts, texts, times, times, retries, times, texts, texts, texts), max_size=3).map(tuple)
journals = st.builds(
    j.Journal,
    version=st.just(j.VERSION),
    request=requests,
    installation=installations,
    installed=st.none() | places,
    proven=st.booleans(),
    before=st.none() | places,
    original=st.none() | places,
    seen=texts,
    backoffs=backoffs,
    skipped=st.lists(st.builds(j.Skip, texts, texts, times, times, retries, times, texts), max_size=3).map(tuple),
    hold=texts,
    latch=st.none() | st.builds(j.Latch, texts, texts, texts),
    identity=st.none() | st.builds(j.Identity, texts, texts, texts, texts, times),
    sealed=st.none() | st.builds(j.Identity, texts, texts, texts, texts, times),
    strangers=st.lists(texts, max_size=3).map(tuple),
    contacts=st.lists(st.builds(j.Contact, texts, times, times, texts, texts, times, st.booleans()), max_size=3).map(tuple),
    revoked=st.lists(texts, max_size=3).map(tuple),
    question=times,
    hold_until=times,
    known=st.none() | st.builds(j.Known, times, texts, st.none() | places, texts, texts, texts, texts, texts, texts, st.sampled_from(["", "behind"])),
    changes=st.lists(
        st.builds(j.Change, times, st.sampled_from(j.CAUSES), texts, st.lists(texts, max_size=2).map(tuple), texts), max_size=2
    ).map(tuple),
    fights=st.lists(st.builds(j.Fight, st.sampled_from(["certificate", "key"]), times, times, times), max_size=2).map(tuple),
    newest=times,
    untried=st.booleans(),
)
submissions = st.lists(st.builds(j.Submission, times, st.booleans()), max_size=8).map(tuple)
budgets = st.builds(j.Budget, st.just(j.VERSION), submissions, st.lists(times, max_size=8).map(tuple), backoffs, texts)
origins = st.builds(j.Origin, st.just(j.VERSION), texts, st.none() | times, times, times, texts)


@given(st.one_of(journals, budgets, origins))
def test_what_is_written_is_read_back(value):
    """Nothing is lost or changed on the way, whatever characters a CA's answer brought into it."""
    data = j.to_json(value)
    assert j.from_json(type(value), data, "x") == value
    assert j.to_json(j.from_json(type(value), data, "x")) == data
    data.decode("ascii")


def dataclasses_of(kind):
    """The dataclass and all that stand in it."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *getattr(hint, "__args__", ())):
            if dataclasses.is_dataclass(part):
                yield from dataclasses_of(part)


def test_a_dataclass_that_no_test_writes_and_reads():
    """The strategies above reach every dataclass of the module, so a new one can't be forgotten."""
    every = {kind for kind in vars(j).values() if dataclasses.is_dataclass(kind)}
    assert set().union(*(dataclasses_of(kind) for kind in (j.Journal, j.Budget, j.Origin))) == every


FULL = j.Journal(
    request=j.Request("submitted", "ca01.lab.test", "csr", "spki", 7, NOW, 1, NOW, pending=True),
    installation=j.Installation("installing", "omi", 1270, "/name", j.Place("link", "a"), j.Place("file", saved="b")),
    installed=j.Place("link"),
    backoffs=(j.Backoff("ca01.lab.test", "i", NOW, 1, "soon", 5, "m", "h"),),
    skipped=(j.Skip("g", "i", NOW, 1, "later", 9, "m"),),
    latch=j.Latch("h", "h.lab.test"),
)


def refused(data, kind=j.Journal):
    """The failure with which the bytes are refused; anything else fails the test."""
    with pytest.raises(HostError, match=r"journal\.json is not understood") as caught:
        j.from_json(kind, data, "journal.json")
    assert caught.value.exit_status == 12
    assert "journal.json" in caught.value.hint
    return caught.value.message


def changed(change, value=FULL):
    """JSON of a journal after a change of its raw form."""
    raw = json.loads(j.to_json(value))
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"\0" * 4096, b"{", b"null", b"[]", b"7", b'"x"', b"true", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"version": 1} x',
        b'{"version": 1', b"[" * 100_000, b'{"version": 1, "request": ' + b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"9" * 5000, b'{"version": ' + b"9" * 5000 + b"}", b'{"version": NaN}',
    ],
    ids=lambda data: f"{len(data)}-{data[:12]!r}",
)
def test_a_damaged_journal_is_refused_not_replaced(data):
    """What a disk or an editor made of it: status 12 with what to do, never a crash and never an empty journal."""
    refused(data)
    refused(data, j.Budget)
    refused(data, j.Origin)


@pytest.mark.parametrize("cut", [0.01, 0.3, 0.7, 0.99])
def test_a_truncated_journal_is_refused(cut):
    """A prefix of a journal is no journal."""
    data = j.to_json(FULL).rstrip()
    refused(data[: int(len(data) * cut)])


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_with_a_hint(data):
    """Random bytes raise nothing but HostError."""
    for kind in (j.Journal, j.Budget, j.Origin):
        try:
            j.from_json(kind, data, "journal.json")
        except HostError as problem:
            assert problem.hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from([
    (key, *more) for key, value in json.loads(j.to_json(FULL)).items()
    for more in ([()] + [(inner,) for inner in value] if isinstance(value, dict) else [()])
])


@given(paths, json_values)
def test_one_value_of_another_kind_is_understood_or_refused(path, value):
    """Whatever stands in one place: the journal read holds exactly that, or it is refused. Nothing is converted or dropped."""
    raw = json.loads(j.to_json(FULL))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        found = j.from_json(j.Journal, json.dumps(raw).encode(), "journal.json")
    except HostError:
        return
    written = json.loads(j.to_json(found))
    for key in path:
        written = written[key]
    if isinstance(value, (dict, list)) and value:
        return  # keys that were left out have come back with their defaults
    if isinstance(value, dict):
        assert isinstance(written, dict)
    else:
        assert (written, type(written)) == (value, type(value))


@pytest.mark.parametrize("version", [0, 2, -1, 99, "1", None, 1.0, True, [1]])
def test_a_newer_version_is_not_guessed_at(version):
    """After a downgrade nothing is changed; the hint says which package to install again."""
    refused(changed(lambda raw: raw.update(version=version)))
    with pytest.raises(HostError) as caught:
        j.from_json(j.Journal, changed(lambda raw: raw.update(version=version)), "journal.json")
    assert "newer" in caught.value.hint


@pytest.mark.parametrize("where", [(), ("request",), ("installation",), ("installation", "target"), ("latch",)])
def test_an_unknown_key_is_refused(where):
    """A key that this version would drop at the next save is somebody's data."""

    def add(raw):
        for key in where:
            raw = raw[key]
        raw["surprise"] = 1

    assert "unknown key 'surprise'" in refused(changed(add))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hold", None), ("hold", 1), ("proven", 1), ("proven", "true"), ("backoffs", {}), ("backoffs", [7]), ("backoffs", [{}]),
        ("installed", {}), ("installed", []), ("request", None), ("latch", {"host": "h"}), ("question", ["x"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    """1 is not true and null is no text: what wrote that was not this program."""
    refused(changed(lambda raw: raw.update({key: value})))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["request"].update(state="sent"),
        lambda raw: raw["installation"].update(state=""),
        lambda raw: raw["installation"].update(target=None),
        lambda raw: raw["installation"].update(previous=None),
        lambda raw: raw["request"].update(id=None),
        lambda raw: raw["request"].pop("id"),
    ],
)
def test_a_state_without_what_it_needs_is_refused(change):
    """An open installation that does not know what to put back, or a request without its ID, can't be gone on with."""
    refused(changed(change))


@pytest.mark.parametrize("path", [("installed", "kind"), ("backoffs", 0, "retry"), ("skipped", 0, "retry")])
def test_an_unknown_word_in_place_of_a_known_one_is_refused(path):
    """A kind of place or of retry that this version does not know must not be taken for the nearest branch of an `if`."""

    def change(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = "surprise"

    refused(changed(change))


# -- the budget -----------------------------------------------------------------------------------------------------


def test_a_day_is_rolling_not_a_date():
    """What is a day old to the second is free again; a second younger still counts."""
    budget = j.Budget(submissions=(j.Submission(NOW - j.DAY_S, counts=True), j.Submission(NOW - j.DAY_S + 1, counts=False)))
    assert budget.current(NOW).submissions == (j.Submission(NOW - j.DAY_S + 1, counts=False),)
    assert j.Budget(restarts=(NOW - j.DAY_S, NOW - j.DAY_S + 1)).current(NOW).restarts == (NOW - j.DAY_S + 1,)


def test_a_clock_that_was_ahead_frees_nothing():
    """A time in the future counts as now: it is neither forgotten nor kept in the future for a year."""
    ahead = NOW + 365 * j.DAY_S
    budget = j.Budget(submissions=(j.Submission(ahead, counts=True),), restarts=(ahead,)).current(NOW)
    assert budget == j.Budget(submissions=(j.Submission(NOW, counts=True),), restarts=(NOW,))


@given(budgets, times)
def test_the_present_budget_is_never_larger_than_the_past_one(budget, now):
    """Only what is over a day old is forgotten, nothing lies in the future afterwards, and twice is as good as once."""
    current = budget.current(now)
    assert all(now - j.DAY_S < at <= now for at in (*current.restarts, *(s.at for s in current.submissions)))
    assert len(current.restarts) == sum(at > now - j.DAY_S for at in budget.restarts)
    assert sum(s.counts for s in current.submissions) == sum(s.counts for s in budget.submissions if s.at > now - j.DAY_S)
    assert current.current(now) == current


@pytest.mark.parametrize(
    ("ages", "needed", "wait"),
    [
        ((), 1, None),
        ((), 2, None),
        ((0, 0), 1, None),
        ((0, 0), 2, j.HOUR_S),
        ((0, 0, 0), 1, j.HOUR_S),
        ((10, 20, 30), 1, j.HOUR_S - 30),
        ((10, 20, 30), 2, j.HOUR_S - 20),
        ((j.HOUR_S, 20, 30), 1, None),
        ((j.HOUR_S - 1, 20, 30), 1, 1),
        ((7200, 7300, 7400, 7500, 7600), 1, None),
        ((7200, 7300, 7400, 7500, 7600), 2, j.DAY_S - 7600),
        ((7200, 7300, 7400, 7500, 7600, 7700), 1, j.DAY_S - 7700),
        ((7200, 7300, 7400, 7500, 7600, 7700), 2, j.DAY_S - 7600),
    ],
)
def test_restarts_are_free_again_to_the_second(ages, needed, wait):
    """3 an hour and 6 a day, the earliest moment at which as many as needed fit; in any order of the records."""
    for order in (ages, ages[::-1]):
        until = j.Budget(restarts=tuple(NOW - age for age in order)).restarts_until(needed)
        assert until <= NOW if wait is None else until == NOW + wait


@given(st.lists(st.integers(0, 3 * j.DAY_S), max_size=12), st.integers(1, 3))
def test_restarts_wait_exactly_as_long_as_they_must(ages, needed):
    """At the time named so many restarts fit into both windows, and a second before they do not."""
    budget = j.Budget(restarts=tuple(NOW - age for age in ages))
    until = max(budget.restarts_until(needed), NOW)

    def fit(now):
        hour, day = (sum(now - at < window for at in budget.restarts) for window in (j.HOUR_S, j.DAY_S))
        return hour + needed <= j.RESTARTS_PER_HOUR and day + needed <= j.RESTARTS_PER_DAY

    assert fit(until)
    assert until == NOW or not fit(until - 1)


@given(st.lists(st.integers(1, 10_000), max_size=8), st.integers(0, 5), st.integers(1, 5000))
def test_a_window_is_free_at_the_time_that_was_named(used, allowed, window_s):
    """`free_at` is the first moment at which the window holds no more than allowed; 0 means that it always did."""
    at = j.free_at(used, allowed, window_s)
    assert (at == 0) == (len(used) <= allowed)
    if at:
        assert sum(at - one < window_s for one in used) <= allowed < sum(at - 1 - one < window_s for one in used)


def test_a_clock_that_was_behind_once_frees_nothing():
    """A host without a battery begins each boot in the past; what it noted then must not count as old tomorrow."""
    spent = j.Budget(submissions=(j.Submission(NOW, counts=True),) * 3, restarts=(NOW,))
    behind = spent.kept(NOW - 10 * 365 * j.DAY_S)
    assert behind.submissions == spent.submissions
    assert behind.ahead == NOW - 10 * 365 * j.DAY_S
    right = behind.kept(NOW + 60)
    assert (right.submissions, right.restarts, right.ahead) == (spent.submissions, spent.restarts, 0)


def test_a_clock_that_ran_ahead_blocks_for_a_day_only():
    """Noticed, then counted as now for a day, then forgotten."""
    written = j.Budget(restarts=(NOW + 5 * 365 * j.DAY_S,))
    noticed = written.kept(NOW)
    assert noticed.kept(NOW + j.DAY_S - 1).current(NOW + j.DAY_S - 1).restarts == (NOW + j.DAY_S - 1,)
    assert noticed.kept(NOW + j.DAY_S) == j.Budget()


def test_what_0_1_0_remembered_of_refused_passwords_is_let_go():
    """It stood in the journal; kept there, it would stop a CA for ever, and refused, it would stop the program."""
    kept = j.Backoff("ca01", "i", 1, 1, "later", 6, "m", "h")
    old = json.loads(j.to_json(j.Journal(backoffs=(kept, dataclasses.replace(kept, ca="ca02", retry="changed", status=13, secret="mark")))))
    old["salt"] = "aa"
    assert j.from_json(j.Journal, json.dumps(old).encode(), "journal.json").backoffs == (kept,)
    del old["salt"]
    assert len(j.from_json(j.Journal, json.dumps(old).encode(), "journal.json").backoffs) == 2


def test_a_generation_that_0_1_0_kept_is_not_read():
    """It noted which one was the first; refused, the certificate of record would stop the program. Its plan for the next one stays."""
    for first, due in ((True, -3), (False, -10)):
        old = {**json.loads(j.to_json(j.Origin(ca="ca01", number=3))), "first": first}
        del old["due"]
        assert j.from_json(j.Origin, json.dumps(old).encode(), "meta.json") == j.Origin(ca="ca01", number=3, due=due)
