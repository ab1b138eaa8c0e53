"""What a run is given, and what comes of it."""

import time
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll.case import Step, Wish
from scx_enroll.errors import EnrollError
from scx_enroll.observe import View
from scx_enroll.records import Line
from scx_enroll.rootfs import Root
from scx_enroll.service import Patience
from scx_enroll.store import Generation, Store


class Stopped(BaseException):
    """A signal asked for the end, between two steps."""


def _silent(_message: str) -> None:
    pass


@dataclass(frozen=True)
class Tools:
    """What a run works with; a test puts parts of its own here."""

    line: Line = Line()
    clock: Callable[[], int] = lambda: int(time.time())
    patience: Patience = Patience()
    waiting: Callable[[str], None] = _silent  # for a person at a terminal
    acted: Callable[[Step], None] = lambda _step: None  # for the log
    noticed: Callable[[j.Change], None] = lambda _change: None  # likewise
    stopping: Callable[[], bool] = lambda: False  # a signal asked for the end; the step in hand is finished first
    store: Callable[[Root], Store] = Store
    noted: Callable[[str], None] = _silent  # for the log


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    config: str = ""  # an ordinary path; else the usual one beneath the root
    wish: Wish = Wish()
    wait_s: float = 0.0
    accept_name: bool = False  # take the name that the host gives itself now


@dataclass(frozen=True)
class Result:
    """How a run ended: what it did, its last step, and what it saw then."""

    step: Step
    view: View
    journal: j.Journal
    budget: j.Budget
    generations: Tuple[Generation, ...]
    acts: Tuple[Step, ...] = ()
    failure: Optional[EnrollError] = None  # at a CA, and not made good since
    errands: Tuple[j.Request, ...] = ()  # of other hosts, not settled

    @property
    def status(self) -> int:
        """The exit status: a run that only waits repeats that of what it waits for."""
        return self.step.status or (self.failure.exit_status if self.failure else 0)
