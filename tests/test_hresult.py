"""The table of AD CS error codes: every code has a sentence, a next act, and one of four classes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import hresult

CLASSES = {"transient", "configuration", "final", "ambiguous"}
every_code = pytest.mark.parametrize("code", sorted(hresult.TABLE), ids="{:08x}".format)


@every_code
def test_a_code_without_a_next_act(code):
    """A message must say what to do, in the program's voice: no capital at the front, no full stop at the end."""
    known = hresult.TABLE[code]
    assert 0x80000000 <= code <= 0xFFFFFFFF
    assert known.retry in CLASSES
    for text in (known.sentence, known.hint):
        assert text
        assert not text.endswith(".")
        assert text.isprintable()
    assert not re.match(r"[A-Z][a-z]", known.sentence)


@pytest.mark.parametrize(
    ("code", "retry"),
    [
        (0x8009480F, "configuration"),  # no DNS name in the directory
        (0x8009400F, "transient"),  # too many sessions
        (0x800706BA, "transient"),
        (0x800706BF, "transient"),
        (0x800706BE, "ambiguous"),
        (0x80094014, "final"),
        (0x80094004, "final"),
    ],
    ids=lambda value: f"{value:08x}" if isinstance(value, int) else "",
)
def test_codes_that_differ_by_a_digit_keep_their_class(code, retry):
    """8009480f stops until the directory is changed, 8009400f is gone in a minute; 706be may have stored the request."""
    assert hresult.meaning(code).retry == retry


def test_refusals_about_templates_name_what_to_set():
    """The most frequent mistakes are an unpublished template and a missing right: the hint says where to go."""
    assert "template=" in hresult.meaning(0x80094800).hint
    assert "/etc/scx-enroll/scx-enroll.conf" in hresult.meaning(0x80094800).hint
    assert "Enroll" in hresult.meaning(0x80094012).hint


@given(st.integers(-(1 << 40), 1 << 40))
def test_any_code_is_quoted(code):
    """Whoever searches for a message needs the code; one that is not known has the class that stops."""
    found = hresult.meaning(code)
    assert f"(0x{code % (1 << 32):08x})" in found.sentence
    assert found.retry in CLASSES
    if code % (1 << 32) not in hresult.TABLE:
        assert found.retry == "configuration"
