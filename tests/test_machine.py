"""What tells one machine from another: a rule that raises no false alarm for one change, and misses no clone that shows two."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import machine, plan
from scx_enroll.journal import Identity, Journal

NOW = 1_700_000_000
WEEK_S = machine.SETTLE_S
HOME = Identity("m1", "p1", "lin01", "key", 0)
parts = st.sampled_from(["", "1", "2", "3"])
identities = st.builds(Identity, parts, parts, st.sampled_from(["", "a", "a.lab.test", "b", "c"]))


@pytest.mark.parametrize("text", ["", "\n", "uninitialized\n", "0" * 32, "f" * 32, "0123", "0" * 31 + "g", "x" * 300])
def test_a_machine_id_that_is_none(text):
    """An image's empty file, or one that was never made, is the same on every machine."""
    assert machine.machine_id(text) == ""


@pytest.mark.parametrize("text", [
    "", "Not Settable", "00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "03000200-0400-0500-0006-000700080009",
    "12345678-1234-5678-90AB-CDDEEFAABBCC", "4c4c4544-0000-2010-8020-80c04f202020",
])
def test_a_product_uuid_that_many_machines_have(text):
    """Boards whose maker entered none would all be one machine."""
    assert machine.product_uuid(f"{text}\n") == ""


@pytest.mark.parametrize("text", ["", "localhost", "localhost.localdomain", "(none)", "LOCALHOST"])
def test_a_host_name_that_is_none(text):
    """Before DHCP has answered, every host is called so."""
    assert machine.host_name(text) == ""


def test_the_journal_tells_a_machine_id():
    """It is confidential (machine-id(5)): what is kept is neither it nor a part of it; and the two marks of one text differ."""
    text = "4c0ffee04c0ffee04c0ffee04c0ffee0"
    marks = machine.machine_id(text), machine.product_uuid(text)
    assert all(len(mark) == 32 and text[:8] not in mark for mark in marks)
    assert marks[0] != marks[1]
    assert machine.product_uuid("4C0FFEE0-4C0F-FEE0-4C0F-FEE04C0FFEE0") == marks[1]


@pytest.mark.parametrize(("seen", "row"), [
    (HOME, None),
    (Identity("m2", "p1", "lin01"), None),  # regenerated machine-id
    (Identity("m1", "p2", "lin01"), None),  # a virtual machine that was moved
    (Identity("m1", "p1", "lin02"), None),  # renamed
    (Identity("m1", "p1", "LIN01.lab.test"), None),
    (Identity("", "", "lin02"), None),  # containers without DMI, a transient machine-id
    (Identity(), None),
    (Identity("m2", "p2", "lin01"), "L0"),
    (Identity("m2", "", "lin02"), "L0"),
    (Identity("m1", "p2", "lin02"), "L0"),
    (Identity("m2", "p2", "lin02"), "L0"),
])
def test_one_part_is_a_change_and_two_are_another_machine(seen, row):
    """The rule of the design, with each false alarm by its name."""
    step = plan.whose(Journal(identity=HOME), seen)
    assert (step and step.row) == row
    assert step is None or (step.action, "machine-id" in step.reason) == ("set_aside", seen.machine == "m2")


def test_a_clone_gets_its_name_long_after_its_first_boot():
    """One change counts for a week, so that two of them are one clone; after that it is as if it had always been so."""
    moved = Identity("m1", "p2", "lin01")
    kept = machine.kept(HOME, moved, "key", NOW)
    assert kept == Identity("m1", "p1", "lin01", "key", NOW)
    assert plan.whose(Journal(identity=kept), Identity("m1", "p2", "lin02")).action == "set_aside"
    assert machine.kept(kept, moved, "", NOW + WEEK_S - 1) == kept
    settled = machine.kept(kept, moved, "", NOW + WEEK_S)
    assert settled == Identity("m1", "p2", "lin01", "key", 0)
    assert plan.whose(Journal(identity=settled), Identity("m1", "p2", "lin02")) is None
    assert machine.kept(kept, HOME, "", NOW + 5) == HOME, "it was as before again"
    assert machine.kept(kept, moved, "", NOW - 5).since == NOW - 5, "the clock ran ahead"


def test_what_was_not_known_is_learnt():
    """An early boot knows less; nothing that was known is forgotten for that."""
    early = Identity("", "p1", "")
    assert machine.kept(None, early, "", NOW) == early
    assert machine.kept(early, HOME, "key", NOW) == HOME
    assert machine.kept(HOME, Identity(), "", NOW) == HOME


SEALED = Identity("", "p1", "golden", "key", NOW)


@pytest.mark.parametrize(("seen", "action"), [
    (SEALED, "wait"), (Identity("", "p1", ""), "wait"), (Identity(), "wait"), (Identity("", "p1", "golden.lab.test"), "wait"),
    (Identity("m1", "p1", "golden"), "set_aside"),  # the first boot of an image without machine-id
    (Identity("", "p2", "golden"), "set_aside"), (Identity("", "p1", "web1"), "set_aside"),
])
def test_a_sealed_image_begins_with_the_first_sign_of_another_machine(seen, action):
    """It was said to be an image, so one part is enough, and one that was not there before."""
    step = plan.whose(Journal(identity=HOME, sealed=SEALED), seen)
    assert (step.row, step.action, step.status) == ("L0", action, 4 if action == "wait" else 0)


@given(identities, identities, st.integers(0, 2 * WEEK_S))
def test_no_order_of_changes_loses_an_identity(known, seen, later):
    """What is kept is either what was known or what is seen, part by part; and what is no other machine now is none a moment later."""
    kept = machine.kept(known, seen, "", NOW + later)
    for part in machine.PARTS:
        was, now, is_ = (getattr(one, part) for one in (known, seen, kept))
        assert is_ in (was, now)
        assert is_ or not (was or now)
    assert bool(kept.since) == bool(machine.changed(kept, seen))
    if plan.whose(Journal(identity=known), seen) is None:
        assert plan.whose(Journal(identity=kept), seen) is None
