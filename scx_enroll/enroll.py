"""The driver: look, plan, act, record, again; it alone carries out what `plan` decides.

lock -> journal -> configuration -> look -> plan -> act -> (again) -> result
"""

import time
from dataclasses import replace
from typing import Callable, List, Mapping, Optional, Tuple, TypeVar

from scx_enroll import (
    access,
    activate,
    adoption,
    aside,
    drift,
    keys,
    naming,
    observe,
    places,
    plan,
    request,
    sealing,
    tidy,
    transaction,
    unproven,
    verify,
)
from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll.acquire import ACTS as CA_ACTS
from scx_enroll.acquire import Acquisition, Want
from scx_enroll.activate import Site, refuse_held
from scx_enroll.begin import begun, config_of, site_of
from scx_enroll.case import Step, Wish
from scx_enroll.config import CA, Config
from scx_enroll.errors import AgentNotReady, CertificateRefused, EnrollError, UsageError
from scx_enroll.job import Options, Result, Stopped, Tools
from scx_enroll.keys import Key
from scx_enroll.observe import View
from scx_enroll.preflight import check_agent
from scx_enroll.rootfs import Root
from scx_enroll.store import Generation

MAX_STEPS = 16  # the longest way takes fewer, but for one more with each CA that fails

T = TypeVar("T")


class Run:
    """One run; `site.store` holds the journal as it was read."""

    def __init__(self, site: Site, tools: Tools, config: Config, wish: Wish) -> None:
        self.site = replace(site, reload=config.agent.activation == "reload")
        self.tools = tools
        self.config = config
        self.wish = replace(wish, hasty=wish.now or wish.hasty)
        self.acquisition = Acquisition(site, config, tools.line)
        self.rehearsed: observe.Known = {}
        self.noticed = False

    def look(self) -> View:
        """Look at the host as it is now."""
        return observe.look(self.site.root, self.site.store, self.config, self.acquisition.pool, self.site.clock(), self.rehearsed)

    def want(self, view: View, step: Optional[Step] = None) -> Want:
        """Return what is asked of a CA: the certificate for the agent's key, or for the one that shall take its place."""
        ready, seen = view.ready, view.seen
        open_request = self.site.store.journal.request
        waits = ready.staged is not None and open_request.state != "none" and open_request.spki == ready.staged.spki
        new_key = waits or (step is not None and step.new_key)
        key = ready.staged if new_key and ready.staged else Key(seen.key, ready.agent.key, ready.pair.key)

        def judge(ca: CA, leaf: bytes, pool: Tuple[bytes, ...]) -> Tuple[verify.Mismatch, ...]:
            path = observe.rehearsal(self.site.root, key.path, key.pem, self.rehearsed)
            return observe.judge(self.site.root, path, self.config, ca, ready.spec, key.spki, leaf, pool, self.site.clock())

        def csr() -> Tuple[bytes, str]:
            nonlocal key
            if new_key:
                known, kind = key, self.config.agent.new_key
                key = keys.staged(self.site.store, ready.staged, kind)
                if key != known:
                    self.site.noted(f"a new key was made, {kind}; it comes into service with its certificate")
            return request.build_csr(ready.spec, request.load_key(key.pem or b"")), key.spki

        return Want(ready.spec, key.spki, seen.inputs, seen.held, csr, judge, self.latch(view), new_key)

    def latch(self, view: View) -> Optional[j.Latch]:
        """Return the name that the host gave itself, to be kept from the first success on; None where it is told its name."""
        if not naming.names_itself(self.config):
            return None
        known = naming.latched(self.config, self.site.store.journal)
        return known or j.Latch(naming.short_name(self.site.root), view.ready.spec.fqdn, self.config.host.name)

    def decide(self, view: View) -> Step:
        """Return the next step."""
        store = self.site.store
        return plan.decide(view.seen, view.policy, store.journal, store.budget, self.site.clock(), self.wish)

    def result(self, acts: Tuple[Step, ...] = (), view: Optional[View] = None) -> Result:
        """Say how it stands; `view`: as seen just now, else it looks once more."""
        view, store = view or self.look(), self.site.store
        step, failure = self.decide(view), self.acquisition.records.failure
        return Result(step, view, store.journal, store.budget, store.generations(), acts, failure, store.waiting_errands())

    def converge(self, *done: Step) -> Result:
        """Act until nothing can be done now; `done` was done already. Raises what goes wrong on this host."""
        acts: List[Step] = list(done)
        try:
            return self._converge(acts)
        except EnrollError as error:
            drift.failed(self.site, acts, error)
            raise

    def _converge(self, acts: List[Step]) -> Result:
        self.acquisition.records.forget_old_secrets()
        while len(acts) < MAX_STEPS + len(self.config.cas):
            view = self.look()
            acts += self.tell(sealing.remember(self.site, view.seen))
            step = self.decide(view)
            if step.row not in ("L0", "L1") and self.notice(view):
                step = self.decide(view)
            if step.row == "L2" and view.found is None:
                activate.start_unreachable(self.site, self.config.agent.layout)
            if step.action in plan.WAITING:
                if view.found and step.row not in ("L3", "L4"):
                    tidy.clear(self.site.store, view.found.agent, view.found.pair, view.seen)
                self._note_proof(view)
                drift.conclude(self.site, self.config, view, acts, step, hasty=self.wish.hasty)
                return self.result(tuple(acts), view)
            if self.tools.stopping():
                raise Stopped
            ACTS[step.action](self, view, step)
            acts.append(step)
            self.tools.acted(step)
        raise EnrollError(f"no end after {len(acts)} steps; the last one was {step.row} {step.action}: {step.reason}")

    def tell(self, steps: Tuple[Step, ...]) -> Tuple[Step, ...]:
        """Log what was done; returns it."""
        for step in steps:
            self.tools.acted(step)
        return steps

    def notice(self, view: View) -> bool:
        """Write down, at the first quiet look, what others did since the last run; says whether they did anything."""
        first, self.noticed = not self.noticed, True
        return first and drift.notice(self.site, self.config, view, self.tools.noticed, hasty=self.wish.hasty)

    def _note_proof(self, view: View) -> None:
        journal = self.site.store.journal
        if journal.restarting and view.seen.listening:
            self.site.store.update(restarting="")
        if journal.installed and not journal.proven and journal.installed.leaf == view.seen.served:
            self.site.store.proved()
        if any(held.leaf == view.seen.certificate and not held.mismatches for held in view.seen.held) and self.latch(view) != journal.latch:
            self.site.store.update(latch=self.latch(view))

    # -- the acts, one for each action of `plan` --------------------------------------------------------------------

    def recover(self, _view: View, _step: Step) -> None:
        """L1."""
        transaction.proceed(self.site)

    def another(self, _view: View, _step: Step) -> None:
        """L0."""
        raise AgentNotReady("this machine became another one while it was looked at", "run again")

    def make_key(self, view: View, _step: Step) -> None:
        """L5."""
        self._mend(view, lambda: activate.make_key(self.site, view.ready.agent))

    def restore_pair(self, view: View, _step: Step) -> None:
        """L5: nothing is overwritten, and nothing new is made."""
        self._mend(view, lambda: aside.put_back(self.site.root, self.site.store.beside, view.ready.agent))

    def _mend(self, view: View, work: Callable[[], object]) -> None:
        """Make a pair whole; an agent that could not start is to be started with it, also where we are killed meanwhile."""
        if view.seen.running and not view.seen.listening:
            self.site.store.update(restarting=self.site.store.journal.restarting or activate.ANY)
        work()
        self.site.store.update(seen=places.signature(agents.read_pair(self.site.root, view.ready.agent)))

    def adopt(self, view: View, _step: Step) -> None:
        """L7: what is installed is valid, so the CA need not be asked."""
        if view.ready.adoptable is None:
            raise EnrollError("there is nothing to adopt")
        unproven.take_over(self.site, view.ready.agent, view.ready.pair, view.ready.served)
        self.site.store.add_generation(view.ready.adoptable)  # last, or a run that is killed here would not know whose it is
        self.site.store.prune()

    def install(self, view: View, step: Step) -> None:
        """L7."""
        self.put_in_service(view, next(g for g in self.site.store.generations() if g.id == step.generation))

    def put_in_service(self, view: View, generation: Generation) -> None:
        """Install a generation and have it served. Raises RolledBack, RollbackFailed, HostError."""
        agent = view.ready.agent
        access.demand(self.site.root, agent)
        self.site.store.beside.check_folder(agent.certificate)
        self.wish = replace(self.wish, now=False)
        spki = verify.facts(observe.stored(generation)[0]).spki
        key = spki if spki != view.seen.key else ""
        if key:
            self.site.store.beside.check_folder(agent.key)
        transaction.install(self.site, agent, generation, running=view.seen.running, inputs=view.seen.inputs, key=key)

    def restart(self, view: View, _step: Step) -> None:
        """L8, L9: what is installed is what shall be served."""
        journal, leaf = self.site.store.journal, view.seen.certificate
        others = not journal.installed or journal.installed.leaf != leaf  # put one of ours there
        refused = any(skip.generation == leaf[:16] for skip in journal.skipped)
        if others and any(one.leaf == leaf for one in view.seen.held) and (view.seen.served or refused):
            unproven.take_over(self.site, view.ready.agent, view.ready.pair, view.ready.served)
        unproven.restart(self.site, view.ready.agent, view.seen.certificate, view.seen.inputs)

    def ask(self, view: View, step: Step) -> None:
        """The CA table. What would keep a certificate from being installed keeps it from being asked for."""
        if step.action == "submit":
            check_agent(self.site, self.config, view, step)
        try:
            self.wish = self.acquisition.carry_out(step, self.want(view, step), self.wish, lambda: self.decide(self.look()) == step)
        except EnrollError:
            tidy.drop_keys(self.site.store, view.seen)  # one that was made for nothing
            raise


ACTS: Mapping[str, Callable[[Run, View, Step], None]] = {
    "set_aside": Run.another,
    "recover": Run.recover,
    "make_key": Run.make_key,
    "restore_pair": Run.restore_pair,
    "adopt": Run.adopt,
    "install": Run.install,
    "relink": Run.install,
    "restart": Run.restart,
    **dict.fromkeys(CA_ACTS, Run.ask),
}


# -- the verbs ------------------------------------------------------------------------------------------------------


def run(root: Root, options: Options, tools: Tools) -> Result:
    """Make the host match its configuration. Raises EnrollError for what goes wrong on this host."""

    def work(site: Site) -> Result:
        run = _run(site, options, tools)
        if options.wish.rekey:
            _refuse_two_wishes(site, run.look())
        return run.converge(*(run.tell(sealing.accept_name(site, run.config)) if options.accept_name else ()))

    return begun(root, options, tools, work)


def _refuse_two_wishes(site: Site, view: View) -> None:
    """Raise AgentNotReady where a new key is asked for while a CA still has a request for the present one."""
    request = site.store.journal.request
    if request.state != "none" and request.spki == view.seen.key:
        known = "with an ID that is not known" if request.id is None else f"ID {request.id}"
        then = "wait until it is decided, or have it denied there, then: scx-enroll run --rekey"
        hint = then if request.id is not None else f"look for it there (scx-enroll run --adopt ID), {then}"
        raise AgentNotReady(f"a request for the present key, {known}, is open at {request.ca}; no new key was made", hint)


def _run(site: Site, options: Options, tools: Tools) -> Run:
    return Run(site, tools, config_of(site.root, options), options.wish)


def inspect(root: Root, options: Options, tools: Tools) -> Result:
    """Look and plan, and change nothing; needs no lock, since the journal is replaced whole. What others did since is told, too."""
    looker = _looker(root, options, tools)
    result = looker.result()
    fresh = drift.unwritten(looker.site, looker.config, result.view)
    return replace(result, journal=replace(result.journal, changes=(*result.journal.changes, *fresh)))


def rehearse(root: Root, options: Options, tools: Tools) -> Result:
    """`inspect`, and see that what the next step reads can be read. Raises what the step would raise before it acts."""
    looker = _looker(root, options, tools)
    result = looker.result()
    if result.step.action == "submit":
        looker.acquisition.check_line(result.step.ca)
    return result


def _looker(root: Root, options: Options, tools: Tools) -> Run:
    site = site_of(root, tools)
    site.store.load()
    return _run(site, options, tools)


def _refuse_foreign(view: View) -> None:
    """Raise AgentNotReady where the agent's key is not this host's to use."""
    if view.seen.foreign_key:
        raise AgentNotReady(f"{view.seen.foreign_key}, and must not get a certificate", "scx-enroll run makes another one")


def make_csr(root: Root, options: Options, tools: Tools) -> bytes:
    """Return a CSR (PEM) for the agent's key, for a CA that can't be reached from here; changes nothing."""
    looked = inspect(root, options, tools)
    ready = looked.view.ready
    if looked.step.row == "L0":
        raise AgentNotReady(looked.step.reason, looked.step.hint)
    _refuse_foreign(looked.view)
    if ready.pair.key is None:
        raise AgentNotReady("the agent has no key", f"let its own tool make one: {ready.agent.scxsslconfig}")
    return request.build_csr(ready.spec, request.load_key(ready.pair.key))


def install(root: Root, options: Options, tools: Tools, data: bytes, name: str) -> Result:
    """Verify a certificate that was brought by hand, and put it in service by the same transaction."""

    def work(site: Site) -> Result:
        run = _run(site, options, tools)
        view, store = run.look(), site.store
        run.notice(view)
        refuse_held(site, "install")
        _refuse_foreign(view)
        seen, now = view.seen, run.site.clock()
        found = verify.read(data)
        leaf = next((der for der in found if verify.facts(der).spki == seen.key), None)
        if leaf is None:
            raise CertificateRefused(
                f"{name} holds no certificate" + (f" for the agent's key, among {len(found)}" if found else ""),
                "make the request with: scx-enroll csr, and save its certificate as Base-64",
            )
        rest = (*(der for der in found if der != leaf), *observe.known_chains(store.generations()))
        judged = run.want(view).judge
        wrong = min((judged(ca, leaf, rest) for ca in run.config.cas), key=len)
        if wrong:
            raise CertificateRefused(f"{name} refused: {'; '.join(m.detail for m in wrong)}", wrong[0].hint)
        origin = j.Origin(obtained=now, how="file")
        generation = places.generation_of(leaf, verify.chain(leaf, rest), origin)
        if seen.running and seen.certificate != verify.facts(leaf).leaf:
            activate.within_budget(site, 2)  # what is refused now must not be installed by a later run
        store.add_generation(generation)
        message = f"generation {generation.id} was installed by the operator instead"
        issued = verify.facts(leaf).not_before
        newer = {
            held.id: j.Skip(held.id, seen.inputs, now, 1, "changed", 0, message)
            for held in seen.held if held.not_before > issued and held.id != generation.id
        }
        kept = tuple(s for s in store.journal.skipped if s.generation not in (generation.id, *newer))
        store.update(skipped=(*kept, *newer.values()), latch=run.latch(view))
        if seen.certificate == verify.facts(leaf).leaf:
            return run.converge()
        run.put_in_service(view, generation)
        return run.converge(*run.tell((Step("L7", "install", f"{name} was given by the operator", generation=generation.id),)))

    return begun(root, options, tools, work)


def adopt(root: Root, options: Options, tools: Tools, request_id: int, ca: str) -> Result:
    """Take a request ID from the operator, for a request whose fate is doubtful or not known here; then go on as `run`."""

    def work(site: Site) -> Result:
        run = _run(site, options, tools)
        view, server = run.look(), run.acquisition.server_of(ca)
        run.notice(view)
        refuse_held(site)
        adoption.adopt(run.acquisition, request_id, server, run.want(view))
        return run.converge(*run.tell((Step("C1", "take_over", f"request ID {request_id} was named by the operator"),)))

    return begun(root, options, tools, work)


def roll_back(root: Root, options: Options, tools: Tools, *, original: bool = False) -> Result:
    """Go back to what was installed before (`original`: before the first installation), prove it, and hold."""

    def work(site: Site) -> Result:
        run = _run(site, options, tools)
        view = run.look()
        run.notice(view)
        before = site.store.journal.original if original else site.store.journal.before
        if before is None or not before.leaf:
            raise UsageError("nothing was installed before, so there is nothing to go back to", "see: scx-enroll status")
        if places.stands(site.root, view.ready.agent.certificate, before):
            raise UsageError(f"certificate {before.leaf[:16]}, which was installed before, is in place already", "see: scx-enroll status")
        places.check_way_back(site.root, site.store, view.ready.agent, before)
        access.demand(site.root, view.ready.agent)
        hold = f"rolled back by the operator at {when(site.clock())}"
        transaction.put_back(site, view.ready.agent, before, running=view.seen.running, inputs=view.seen.inputs, hold=hold)
        step = Step("L4", "roll_back", f"certificate {before.leaf[:16]} is in place again")
        tools.acted(step)
        return run.result((step,))

    return begun(root, options, tools, work)


def hold(root: Root, options: Options, tools: Tools, reason: str, until: int = 0) -> str:
    """Change nothing until released (`reason` given) or `until`, or release (""), truces, too; returns why it was held.

    Needs neither configuration nor agent.
    """

    def work(site: Site) -> str:
        journal, now = site.store.journal, site.clock()
        before = journal.held(now) or next((f"a truce over the agent's {fight.name}" for fight in journal.fights if fight.until > now), "")
        site.store.update(hold=reason, hold_until=until, fights=journal.fights if reason else ())
        return before

    return begun(root, options, tools, work, holds=True)


def seal(root: Root, options: Options, tools: Tools, work: Callable[[Site], T]) -> T:
    """Do what `sealing` does to an image; no other work is done on a host that is sealed."""
    sealing.check_image(root)
    return begun(root, options, tools, work, seals=True)


def when(at: int) -> str:
    """Return a time as an operator reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
