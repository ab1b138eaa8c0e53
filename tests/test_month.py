"""A month under every fault switch of the lab: what is issued stays within the budget, and is exactly one where the reply was received."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from scx_enroll import enroll
from scx_enroll.config import Renewal
from scx_enroll.journal import DAY_S, HOUR_S
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.lab.switches import Switches
from tests.scene import Scene, take_openssls_clock_away

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MONTH_S = 31 * DAY_S
BUDGET = Renewal()

# Every choice of every switch, one at a time; and those that are no list, or mean more together.
FAULTS: List[Dict[str, Any]] = [
    {item.name: choice}
    for item in fields(Switches) for choice in item.metadata["choices"]
    if choice != item.default and item.name not in ("answer_on", "slow_on", "shape_on", "lost_on", "oversize", "deny_page", "foreign", "digits")
    and not str(choice).startswith(("rsa-", "ecdsa-", "pss-", "ed25519"))  # signatures of the web server's certificate are no faults
]
FAULTS += [{"answer": kind, "answer_on": "post"} for kind in ("400", "403", "404", "413", "429", "503", "307", "500", "502", "login", "empty")]
FAULTS += [
    {"answer": kind, "answer_on": "post", "answer_after": True}
    for kind in ("500", "502", "504", "500-asp", "login", "captive", "json", "204", "empty", "nul", "bad-utf8", "huge", "100-then-close")
]
FAULTS += [{"answer": kind, "answer_on": "get"} for kind in ("503", "login", "500")]
FAULTS += [{"lost": kind, "lost_times": 1} for kind in ("after", "reset", "truncated", "truncated-quiet")]
FAULTS += [{"lost": kind, "lost_on": "get"} for kind in ("before", "after", "truncated")]
FAULTS += [{"unavailable": where, "unavailable_hresult": code} for where in ("post", "all") for code in (0x800706BE, 0x800706BF, 0x80080005, 0x80070005)]
FAULTS += [{"mode": "deny", "deny_hresult": code} for code in (None, 0x80094800, 0x80094012, 0x80092013, 0x8009400F, 0x80094014, 0x800706BE, 0x8000FFFF)]
FAULTS += [{"mode": "deny", "deny_page": page} for page in ("no-code", "no-id", "bare", "echo")]
FAULTS += [{"language": "ar", "digits": "native"}, {"mode": "pending", "language": "ar", "digits": "native"}]
FAULTS += [{"cer_fails": 40, "cer_fails_as": how} for how in ("500", "html", "drop")]
FAULTS += [{"names_from_ad": "svc.lab.test"}, {"bag": "leaf"}, {"bag": "empty"}, {"bag_extra": True}, {"nrenewals": 0}, {"nrenewals": 3}]
FAULTS += [{"chunked": True}, {"chunked": True, "lost": "truncated"}, {"body_bytes": 2 << 20}, {"content_type": "none"}, {"bom": True}]
FAULTS += [{"date_offset": 3600.0}, {"escape": True}, {"spacer": False}, {"sniff": False}, {"lower_case": True}, {"charset": True}]
FAULTS += [{"truncate_at": 700, "lost": "truncated-quiet"}, {"slow": 1.0, "slow_on": "post"}]

# Where no certificate can come of it: nothing is sent, nothing is stored, or a person said no.
NOTHING: Tuple[Callable[[Dict[str, Any]], bool], ...] = (
    lambda fault: fault.get("mode", "issue") != "issue",
    lambda fault: "unavailable" in fault and (fault["unavailable"] != "get") and fault.get("unavailable_hresult") != 0x800706BE,
    lambda fault: "unavailable" in fault and fault["unavailable"] in ("get", "all"),  # the chain can't be learnt
    lambda fault: "answer" in fault and not fault.get("answer_after"),
    lambda fault: "auth" in fault or "https" in fault or "date_offset" in fault or fault.get("enroll") == "denied",
    lambda fault: fault.get("lost_on") == "get" or fault.get("lost") == "before",
    lambda fault: "body_bytes" in fault,  # pages beyond every limit, the CA's own too
    lambda fault: fault.get("content_length") in ("wrong-more", "wrong-less"),
    lambda fault: fault.get("nrenewals") == 3,  # of the CA's certificates there is one
)
# One of each kind is seen through the month, the others through three days: nothing that was sent changes from day to day.
WHOLE_MONTHS = [
    {"mode": "pending"}, {"mode": "deny"}, {"unavailable": "post"}, {"answer": "503"}, {"answer": "login", "answer_on": "post"},
    {"answer": "500", "answer_on": "post"}, {"auth": "refused"}, {"https": "unknown-ca"}, {"lost": "before"},
    {"mode": "deny", "deny_hresult": 0x80092013}, {"mode": "deny", "deny_hresult": 0x800706BE},
]
# Where what the CA said of a stored request does not arrive, or can't be read: the budget is all there is.
UNREAD: Tuple[Callable[[Dict[str, Any]], bool], ...] = (
    lambda fault: bool(fault.get("answer_after")),
    lambda fault: "lost" in fault and fault.get("lost_on") != "get" and fault["lost"] != "before",
    lambda fault: fault.get("unavailable_hresult") == 0x800706BE,
    lambda fault: fault.get("page_charset") == "utf-16",
    lambda fault: fault.get("wrong") == "short",  # it is taken, and runs out
    lambda fault: fault.get("slow", 0) >= 1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[LabCA, LabHost, List[float]]]:
    """One CA and one host for all, since their keys are what takes time; and their common clock's advance."""
    offset = [0.0]
    folder = tmp_path_factory.mktemp("month")
    with LabCA(folder / "ca", clock=lambda: time.time() + offset[0], ca_lifetime=40 * 365 * 86400.0, root_lifetime=80 * 365 * 86400.0) as ca, \
            LabHost(folder / "host", key="ec:secp256r1") as host:
        yield ca, host, offset


class Month:
    """A host and its CA under one fault, and the times at which the CA issued."""

    def __init__(self, folder: Path, made: Tuple[LabCA, LabHost, List[float]], fault: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.ca, self.host, self.offset = made
        self.offset[0] = 0.0
        self.ca.switches.reset()
        self.ca.authority.rows.clear()
        self.ca.log.clear()
        root = folder / "root"
        self.scene = Scene(self._copied(root), [self.ca])
        self.ca.switches.update(fault)
        self.start = time.time()
        self.ended: List[int] = []
        take_openssls_clock_away(monkeypatch)

    def _copied(self, root: Path) -> LabHost:
        """The host's tree anew: state and configuration of the last fault are gone."""
        import shutil

        for name in ("etc/scx-enroll", "var/lib/scx-enroll", "run/scx-enroll"):
            shutil.rmtree(Path(self.host.root, name), ignore_errors=True)
        self.host.move_link_back()
        return self.host

    def run(self, **wish: bool) -> Any:
        """Run once, at the present time."""
        self.scene.offset_s = int(self.offset[0])
        ended = self.scene.do(enroll.run, live=False, parts={"line": hasty()}, **wish)
        self.ended.append(ended.status)
        return ended

    def passes(self, seconds: float) -> None:
        """Run as the timer does, but only when something may change; and in between by an impatient person with --now."""
        count = 0
        while self.offset[0] < seconds:
            ended = self.run(now=count % 5 == 4)
            count += 1
            assert count < 2000, "runs without end"
            until = ended.result.step.until if ended.result else None
            wait = until - int(time.time() + self.offset[0]) if until else DAY_S
            self.offset[0] += max(HOUR_S / 2 if count % 7 == 6 else wait + 1, 60)

    def worst_day(self, moments: List[float]) -> int:
        """The most of anything within a rolling day."""
        return max((sum(at <= other < at + DAY_S - 60 for other in moments) for at in moments), default=0)

    @property
    def issued_at(self) -> List[float]:
        """When certificates were issued."""
        return [row.at for row in self.ca.authority.rows.values() if row.certificate]

    @property
    def stored_at(self) -> List[float]:
        """When requests were stored, whatever became of them."""
        return [row.at for row in self.ca.authority.rows.values()]


def hasty() -> Any:
    """The real line to a CA, with limits that a test can wait for."""
    from scx_enroll import ca as cas
    from scx_enroll import records, signin
    from scx_enroll.web import Limits

    limits = Limits(connect_s=5, silence_s=0.4, total_s=0.6)
    return records.Line(connect=lambda root, ca: cas.connect(root, ca, signin.authentication(root, ca), limits))


def named(fault: Dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in fault.items())


@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_a_month_under_a_fault(tmp_path: Path, made: Any, fault: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong, however often it is run: never more than the budget; and one, where one was received."""
    month = Month(tmp_path, made, fault, monkeypatch)
    nothing = any(applies(fault) for applies in NOTHING)
    month.passes(MONTH_S if not nothing or fault in WHOLE_MONTHS else 3 * DAY_S)
    assert month.worst_day(month.issued_at) <= BUDGET.certificates_per_day
    assert month.worst_day(month.stored_at) <= BUDGET.submissions_per_day
    issued = len(month.issued_at)
    if nothing:
        assert issued == 0
        assert month.ended[-1] != 0
    elif any(applies(fault) for applies in UNREAD):
        assert issued >= 1
    else:
        assert issued == 1
        assert len(month.stored_at) == 1


@pytest.mark.parametrize("fault", [{"lost": "after"}, {"answer": "login", "answer_on": "post", "answer_after": True}, {}, {"mode": "deny"}], ids=named)
def test_an_impatient_operator_who_changes_everything_all_the_time(
    tmp_path: Path, made: Any, fault: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--renew, --now and new inputs end waits, never a budget: it is the CA's protection from whoever is at the keyboard."""
    month = Month(tmp_path, made, fault, monkeypatch)
    for number in range(3 * 24):
        month.scene.configure(alternative_names=f"other{number}.lab.test")
        month.run(renew=True)
        month.run(now=True)
        month.offset[0] += HOUR_S
    assert 1 <= month.worst_day(month.stored_at) <= BUDGET.submissions_per_day
    assert month.worst_day(month.issued_at) <= BUDGET.certificates_per_day
