"""What killed runs and lost journals leave is cleared up; what still serves somebody, or is somebody else's, is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

from scx_enroll import agent as agents
from scx_enroll import aside, keys, pairs, tidy
from scx_enroll.case import Observed
from scx_enroll.journal import Journal, Request
from scx_enroll.keys import Key
from scx_enroll.pace import Held
from scx_enroll.pairs import Names, Side
from scx_enroll.places import signature
from scx_enroll.request import kind_of, load_key, make_key, spki_of
from scx_enroll.rootfs import Root
from scx_enroll.store import STATE, Store
from tests.lab.agent import LabHost

EC, OTHER = "ec:secp256r1", "ec:secp384r1"
LEAF = "a" * 64
MARKER = "/etc/opt/omi/ssl/.omi_cert_marker"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LabHost]:
    """An agent with a pair; nothing runs."""
    with LabHost(tmp_path / "host", key=EC) as made:
        yield made


def store_of(host: LabHost) -> Store:
    """Our state in that tree, its folder made."""
    os.makedirs(host.path(STATE), 0o700)
    return Store(Root(host.root))


def held(key: str = "", *, number: int = 0, revoked: bool = False, mismatches: tuple[str, ...] = ()) -> Held:
    """A certificate for that key."""
    return Held("id", LEAF, 0, 1, number=number, mismatches=mismatches, revoked=revoked, key=key)


def clear(store: Store, seen: Optional[Observed] = None) -> None:
    """Tidy up, as the end of a run does."""
    agent = agents.find(store.root, port=None)
    tidy.clear(store, agent, agents.read_pair(store.root, agent), seen or Observed())


def names_of(host: LabHost) -> Names:
    """By which the agent reads its pair."""
    return Names(host.certificate, host.key, host.account)


def sides(host: LabHost) -> tuple[Side, Side]:
    """What the agent reads now, and another pair."""
    return Side(host.read(host.certificate), host.read(host.key)), Side(*host.new_pair())


# -- keys that wait ------------------------------------------------------------------------------------------------------


def test_a_key_waits_as_long_as_something_waits_with_it(host: LabHost) -> None:
    """A request, or the newest certificate; not one that was revoked or overtaken, nor once the agent has the key: secrets don't live on."""
    store = store_of(host)
    asked, good, revoked, forgotten, present, overtaken = (letter * 64 for letter in "123457")
    for spki in (asked, good, revoked, forgotten, present, overtaken):
        store.save_key(spki, b"a key")
    store.save_key("6" * 64, b"a key", old=True)
    store.save_journal(Journal(request=Request(spki=asked)))
    seen = Observed(key=present, held=(held(present, number=1), held(good, number=3), held(overtaken, number=2), held(revoked, number=4, revoked=True)))
    tidy.drop_keys(store, seen)
    assert store.kept_keys() == {asked, good}
    tidy.drop_keys(store, replace(seen, held=(*seen.held, held(present, number=5))))
    assert store.kept_keys() == {asked}, "a renewal for the present key was asked for later"


def save(store: Store, kind: str) -> Key:
    """Keep a new key of that kind."""
    pem = make_key(kind)
    spki = spki_of(load_key(pem))
    store.save_key(spki, pem)
    return Key(spki, store.key_path(spki), pem)


def test_the_key_that_waits_is_not_the_one_that_the_agent_has(host: LabHost) -> None:
    """Nor one that a disk has spoilt, nor another than its name says: a certificate for it would be asked for in vain."""
    store = store_of(host)
    assert keys.waiting(store, "") is None
    waits = save(store, EC)
    assert keys.waiting(store, "present") == waits
    assert keys.waiting(store, waits.spki) is None
    store.save_key(waits.spki, make_key(EC))
    assert keys.waiting(store, "present") is None
    store.save_key(waits.spki, b"no key")
    assert keys.waiting(store, "present") is None


@pytest.mark.parametrize(
    ("waits", "asked", "again"),
    [("", False, False), (EC, False, True), (OTHER, False, False), (OTHER, True, True)],
    ids=["none waits", "of that kind", "of another kind", "of another kind, and asked for"],
)
def test_which_key_a_certificate_is_asked_for(host: LabHost, waits: str, asked: bool, again: bool) -> None:
    """An open request is for its own key; otherwise `new-key` of today decides, not that of the day on which a key was made."""
    store = store_of(host)
    known = save(store, waits) if waits else None
    store.save_journal(Journal(request=Request(spki=known.spki if known and asked else "")))
    got = keys.staged(store, known, EC)
    assert (got == known) is again
    assert got.pem == store.key(got.spki)
    assert store.kept_keys() == {got.spki}, "one waits at a time"
    if not again:
        assert kind_of(load_key(got.pem).public_key()) == EC


# -- the shape of a change of the key ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["omi", "omi-regular", "omi-apart"])
def test_both_names_change_by_one_rename_and_are_regular_again(tmp_path: Path, layout: str) -> None:
    """In one folder or two; the files are ours as the next run sees them, else it waits for them to be quiet."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        store, names = store_of(host), names_of(host)
        now, then = sides(host)
        pairs.switch(store, names, now, then)
        assert pairs.reads(store.root, names, then)
        assert os.path.islink(host.path(host.key))
        store.save_journal(Journal(seen="before"))
        clear(store)
        for name in (host.certificate, host.key):
            assert not os.path.islink(host.path(name))
        assert pairs.reads(store.root, names, then)
        assert not [name for name in host.snapshot() if "scx-enroll" in name]
        assert store.journal.seen == signature(agents.read_pair(store.root, agents.find(store.root, port=None)))


def test_what_leads_to_nothing_is_not_ours_to_decide(host: LabHost) -> None:
    """The names lead through the link, and the certificate is gone: link and folders stay, for the run that knows the pair."""
    store, names = store_of(host), names_of(host)
    pairs.switch(store, names, *sides(host))
    os.unlink(host.resolve(host.certificate))
    clear(store)
    assert os.path.islink(host.path(host.certificate))
    assert os.path.lexists(host.path("/etc/opt/omi/ssl/scx-enroll-pair"))
    assert any(name.endswith("scx-enroll-pair-2") for name in host.snapshot())


@pytest.mark.parametrize("alike", ["certificate", "key"])
def test_a_folder_with_half_of_a_pair_is_not_that_pair(host: LabHost, alike: str) -> None:
    """Left over from another change: the agent would be given a certificate and a key that don't belong together."""
    store, names = store_of(host), names_of(host)
    now, then = sides(host)
    other = Side(*host.new_pair())
    half = (then.certificate, other.key) if alike == "certificate" else (other.certificate, then.key)
    store.beside.make_pair(host.certificate, *half, host.account)
    pairs.switch(store, names, now, then)
    assert pairs.reads(store.root, names, then)


def test_somebody_writes_between_the_links_and_the_commit(host: LabHost) -> None:
    """Both names lead through the link already; the one rename that is left would undo what they wrote."""
    store, names = store_of(host), names_of(host)
    now, then = sides(host)
    real, theirs = store.beside.swap, host.new_pair()[0]

    def swap(name: str, *rest: Any) -> None:
        real(name, *rest)
        if name == host.key:  # the last step before
            os.unlink(host.path(host.certificate))
            Path(host.path(host.certificate)).write_bytes(theirs)

    store.beside.swap = swap  # type: ignore[method-assign]
    with pytest.raises(pairs.Disturbed):
        pairs.switch(store, names, now, then)
    assert host.read(host.certificate) == theirs
    assert host.read(host.key) == now.key


def test_back_to_the_old_pair_whatever_was_written_through_the_links(host: LabHost) -> None:
    """A script wrote a certificate of its own into our folder: the agent gets the old pair back, from a folder that holds it whole."""
    store, names = store_of(host), names_of(host)
    now, then = sides(host)
    assert not pairs.turn_back(store, names, now), "no name goes through the link"
    pairs.switch(store, names, now, then)
    for name in (host.certificate, host.key):
        host.write_through(name, b"theirs")
    os.unlink(host.path("/etc/opt/omi/ssl/scx-enroll-pair-1/cert.pem"))
    assert pairs.turn_back(store, names, now)
    assert pairs.reads(store.root, names, now)


@pytest.mark.parametrize("name", ["certificate", "key"])
def test_there_is_no_way_back_through_one_link(host: LabHost, name: str) -> None:
    """Somebody put a file of their own at one of the names: turning the link would give the agent half of a pair."""
    store, names = store_of(host), names_of(host)
    now, then = sides(host)
    pairs.switch(store, names, now, then)
    path = Path(host.path(getattr(host, name)))
    path.unlink()
    path.write_bytes(b"theirs")
    before = host.snapshot()
    assert not pairs.turn_back(store, names, now)
    assert host.snapshot() == before


@pytest.mark.parametrize("what", ["our key", "a name"])
def test_somebody_writes_before_the_turn_back(host: LabHost, what: str) -> None:
    """In the last moment: the link is not turned to a key that is not ours, nor for one name alone."""
    store, names = store_of(host), names_of(host)
    now, then = sides(host)
    pairs.switch(store, names, now, then)
    real = store.beside.own

    def own(*rest: Any) -> bool:
        path = Path(host.path(f"{os.path.dirname(host.key)}/scx-enroll-pair-1/key.pem" if what == "our key" else host.key))
        path.unlink()
        path.write_bytes(b"theirs")
        return real(*rest)

    store.beside.own = own  # type: ignore[method-assign]
    assert not pairs.turn_back(store, names, now)
    assert os.readlink(host.path("/etc/opt/omi/ssl/scx-enroll-pair")) == "scx-enroll-pair-2"


def test_which_pair_the_agent_would_read(host: LabHost) -> None:
    """A pair without a certificate is read as one where there is none; and only as such."""
    root, names = Root(host.root), names_of(host)
    now, other = sides(host)
    for side, expected in ((now, True), (Side(now.certificate, other.key), False), (Side(other.certificate, now.key), False)):
        assert pairs.reads(root, names, side) is expected
    assert not pairs.reads(root, names, Side(other.certificate, now.key, bare=True))
    os.unlink(host.path(host.certificate))
    assert pairs.reads(root, names, Side(other.certificate, now.key, bare=True))
    assert not pairs.reads(root, names, now)


# -- the marker, and what stands aside ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "stays"),
    [
        (Observed(certificate=LEAF, held=(held(),)), False),
        (Observed(certificate=LEAF), True),
        (Observed(certificate=LEAF, held=(held(mismatches=("name: another host",)),)), True),
    ],
    ids=["ours", "not ours", "ours, and not wanted"],
)
def test_the_marker_goes_beside_what_is_ours(host: LabHost, seen: Observed, stays: bool) -> None:
    """It tells an upgrade that the pair is the package's: true of every other pair, which its owner may replace."""
    Path(host.path(MARKER)).touch()
    clear(store_of(host), seen)
    assert os.path.exists(host.path(MARKER)) is stays


@pytest.mark.parametrize("layout", ["omi", "classic-omi"])
def test_nothing_is_written_where_nothing_is_left(tmp_path: Path, layout: str) -> None:
    """Every run ends here: one with nothing to do waits for no disk, and goes on where nothing can be written."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        store = store_of(host)

        def refuse(*_: Any, **_named: Any) -> None:
            raise AssertionError("written")

        for owner, writers in ((store, ("save_journal", "drop_keys")), (store.beside, ("sweep", "set_marker", "remove_pairs", "swap"))):
            for name in writers:
                setattr(owner, name, refuse)
        clear(store, Observed(certificate=LEAF, held=(held(),)))


def move(name: str) -> Callable[[LabHost], None]:
    """Move one of the agent's two aside."""

    def act(host: LabHost) -> None:
        os.rename(host.path(getattr(host, name)), host.path(f"{getattr(host, name)}_temp"))

    return act


def put(name: str) -> Callable[[LabHost], None]:
    """Leave something aside while its name is taken."""
    return lambda host: Path(host.path(f"{getattr(host, name)}_temp")).touch()


@pytest.mark.parametrize(
    ("act", "named"),
    [(lambda _host: None, ""), (put("key"), "key"), (put("certificate"), "certificate"), (move("key"), ""), (move("certificate"), "")],
    ids=["nothing", "beside the key", "beside the certificate", "the key itself", "the certificate itself"],
)
def test_what_stands_aside_is_named_where_its_name_is_taken(host: LabHost, act: Callable[[LabHost], None], named: str) -> None:
    """A person is to remove it; what will be given its name back is no leftover, and they might remove the agent's only key."""
    act(host)
    root = Root(host.root)
    found = aside.leftovers(root, agents.find(root, port=None))
    assert [line.partition(" ")[0] for line in found] == ([f"{getattr(host, named)}_temp"] if named else [])
