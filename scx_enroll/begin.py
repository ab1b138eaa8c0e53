"""How every work on a host begins: the lock, whose state it is, and what a killed run left."""

import os
from contextlib import contextmanager
from typing import Callable, Iterator, TypeVar

from scx_enroll import activate, causes, plan, sealing, transaction
from scx_enroll import config as configs
from scx_enroll.activate import Site
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, HostError, RollbackFailed, RolledBack
from scx_enroll.job import Options, Stopped, Tools
from scx_enroll.rootfs import Root

T = TypeVar("T")


def site_of(root: Root, tools: Tools) -> Site:
    """Return where and with what the work is done."""
    return Site(root, tools.store(root), tools.patience, tools.clock, tools.waiting, tools.noted)


@contextmanager
def locked(root: Root, options: Options, tools: Tools) -> Iterator[Site]:
    """Hold the lock, the state loaded. Raises HostError for who is not root, Busy."""
    if root.path == "/" and os.geteuid() != 0:
        raise HostError("only root may do this", "run it as root, or through sudo")
    site = site_of(root, tools)

    def waiting(message: str) -> None:
        if tools.stopping():
            raise Stopped
        tools.waiting(message)

    with site.store.lock(options.wait_s, waiting):
        activate.forget_the_future(site)
        yield site


@contextmanager
def settled(root: Root, options: Options, tools: Tools, *, seals: bool = False) -> Iterator[Site]:
    """Hold the lock, the state loaded, which is this machine's. Raises Sealed, unless the work `seals`."""
    with locked(root, options, tools) as site:
        for done in sealing.settle(site, options.config, seals=seals):
            if done.action == "set_aside":
                tools.noticed(site.store.journal.changes[-1])
            tools.acted(done)
            for note in sealing.named_in_full(site, options.config) if done.action == "set_aside" else ():
                tools.noted(note)
        yield site


def begun(root: Root, options: Options, tools: Tools, work: Callable[[Site], T], *, seals: bool = False, holds: bool = False) -> T:
    """Take the lock, see whose state it is, finish or undo what a killed run left, even where no configuration is read; then `work`.

    Work that only `holds` is done where that can't be finished now, too; the next run does it first.
    """
    with settled(root, options, tools, seals=seals) as site:
        activate.settle_command(site)
        step = plan.interrupted(site.store.journal)
        if step:
            try:
                transaction.proceed(site)
                site.store.update(changes=causes.settled(site.store.journal.changes, (step,), "nothing yet"))
                tools.acted(step)
            except (AgentNotReady, RolledBack, RollbackFailed) as problem:
                if not holds:
                    raise
                ended = site.store.journal.installation.state == "settled"
                how = "was ended" if ended else "is still open, and the next run goes on with it"
                tools.noted(f"what an interrupted run began {how}: {problem.message}")
        return work(site)


def config_of(root: Root, options: Options) -> Config:
    """Return the configuration that counts. Raises ConfigError, Unconfigured, HostError."""
    return configs.given(root, options.config)
