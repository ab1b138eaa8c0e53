"""Gets a certificate from a certification authority: preflight, one POST, and a record of what came of it.

Section "The request" of docs/state.md is the specification. What goes wrong at a CA is recorded, and the plan that
follows says how long to wait and why; what goes wrong on this host is raised.
"""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Optional, Tuple, Union

from scx_enroll import journal as j
from scx_enroll import observe, pace, request, service, verify
from scx_enroll.activate import Site
from scx_enroll.config import CA, Config
from scx_enroll.errors import (
    AgentNotReady,
    CARefused,
    CAUnreachable,
    CertificateRefused,
    ConfigError,
    EnrollError,
    HostError,
    SigninRefused,
)
from scx_enroll.observe import View
from scx_enroll.rootfs import Root
from scx_enroll.store import Generation

if TYPE_CHECKING:
    from scx_enroll import ca as cas

MAX_CLOCK_SKEW_S = 300  # what Kerberos allows, and less than AD CS sets NotBefore back by


def _connect(root: Root, ca: CA) -> "cas.Conversation":
    from scx_enroll import ca as cas
    from scx_enroll import signin

    return cas.connect(root, ca, signin.authentication(root, ca))


def _secret_mark(root: Root, ca: CA, salt: bytes) -> str:
    from scx_enroll import signin

    return signin.mark(root, ca, salt)


@dataclass(frozen=True)
class Line:
    """How CAs are reached: a conversation with one, and a mark of the secret that would be used there."""

    connect: Callable[[Root, CA], "cas.Conversation"] = _connect
    secret_mark: Callable[[Root, CA, bytes], str] = _secret_mark


class Acquisition:
    """One run's dealings with the CAs. `pool`: the chain learnt; `failure`: what went wrong last, None after success."""

    def __init__(self, site: Site, config: Config, line: Line) -> None:
        self.site = site
        self.store = site.store
        self.config = config
        self.line = line
        self.pool: Tuple[bytes, ...] = ()
        self.failure: Optional[EnrollError] = None

    def _ca(self, server: str) -> CA:
        return next(ca for ca in self.config.cas if ca.server == server)

    def forget_old_secrets(self) -> None:
        """End the back-off of a refused password when the password has changed."""
        backoffs = self.store.journal.backoffs
        kept = tuple(b for b in backoffs if not b.secret or self._is_secret_of(b))
        if kept != backoffs:
            self.store.update(backoffs=kept)

    def _is_secret_of(self, backoff: j.Backoff) -> bool:
        """Say whether the password is still the one that was refused; one that can't be read is no new one."""
        try:
            return any(ca.server == backoff.ca and self._mark(ca) == backoff.secret for ca in self.config.cas)
        except (ConfigError, HostError):
            return True

    def _mark(self, ca: CA) -> str:
        if not self.store.journal.salt:
            self.store.update(salt=secrets.token_hex(16))
        return self.line.secret_mark(self.site.root, ca, self.store.journal.salt.encode())

    def submit(self, view: View, server: str, *, renew: bool, still_due: Callable[[], bool]) -> bool:
        """Preflight, then one POST of a new CSR; says whether it was sent.

        `still_due` is asked once the CA's chain is known: with it, what is installed may turn out to be valid.
        """
        self.failure = None
        ready, ca = view.ready, self._ca(server)
        self.store.check_state()
        self.store.check_folder(ready.agent.certificate)
        observe.account_can_read(ready.agent, self.site.root)
        if view.seen.running:
            service.check_tool(self.site.root, ready.agent.scxadmin)
        if view.seen.running and not view.seen.served:
            raise AgentNotReady(
                f"the agent does not answer on port {ready.agent.port}, so a new certificate could not be proved",
                f"start it ({ready.agent.scxadmin} -start) and see {ready.agent.log}",
            )
        conversation = self._connect(ca)
        if not self._preflight(conversation, ca, view, renew=renew) or not still_due():
            return False
        csr = request.build_csr(ready.spec, request.load_key(ready.pair.key or b""))
        now = self.site.clock()
        self._spend(now)
        self.store.request("submit", ca=ca.server, csr=csr.decode(), spki=view.seen.key, since=now, tries=1, next=0,
                           inputs=view.seen.inputs)
        self._record(conversation.submit(csr, self._identified), view, ca)
        return True

    def check_line(self, server: str) -> None:
        """See that a conversation could begin: password and trust are readable. Raises ConfigError, HostError; sends nothing."""
        self.line.connect(self.site.root, self._ca(server))

    def repeat(self, view: View) -> None:
        """Send the CSR of a doubtful request once more, so that either certificate fits."""
        entry = self.store.journal.request
        ca = self._ca(entry.ca)
        conversation = self._connect(ca)
        self._spend(self.site.clock())
        self.store.request("submit", tries=entry.tries + 1)
        self._record(conversation.submit(entry.csr.encode(), self._identified), view, ca)

    def poll(self, view: View) -> None:
        """Ask what became of a request; GETs only."""
        entry = self.store.journal.request
        ca = self._ca(entry.ca)
        self._record(self._connect(ca).fetch(entry.id or 0), view, ca)

    def _connect(self, ca: CA) -> "cas.Conversation":
        self.site.waiting(f"waiting for {ca.server}")
        return self.line.connect(self.site.root, ca)

    def abandon(self) -> None:
        """Give a request up."""
        self.store.request("abandoned")

    def lost(self, why: str) -> None:
        """A run was killed between the record and the answer, or the answer was lost."""
        self.store.request("lost", next=self.site.clock() + pace.COOL_DOWN_S, why=why)

    def _preflight(self, conversation: "cas.Conversation", ca: CA, view: View, *, renew: bool) -> bool:
        """Learn the CA's chain and clock: what can fail after a certificate was issued should fail here."""
        from scx_enroll import ca as cas

        answer = conversation.authority()
        if isinstance(answer, cas.Unavailable):
            self._fail(view, ca, *_unavailable(answer))
            return False
        if isinstance(answer, cas.Unknown):
            self._fail(view, ca, "soon", self._unrecognised(answer, ca))
            return False
        anchors, intermediates = observe.trust(self.site.root, ca)
        if not verify.leads_to((*answer.chain, *intermediates), anchors):
            raise ConfigError(
                f"the CA certificate of {ca.server} does not lead to a root in {ca.issuer_trust}; nothing was sent",
                "add the root of that CA's PKI there, after comparing its fingerprint",
            )
        skew_s = abs(answer.date - self.site.clock()) if answer.date is not None else 0
        if skew_s > MAX_CLOCK_SKEW_S:
            raise HostError(
                f"this host's clock and that of {ca.server} are {skew_s} s apart; nothing was sent",
                "set the clock (chrony, systemd-timesyncd), then run again",
            )
        self.pool = answer.chain
        best = max((held.not_after for held in view.seen.held if not held.mismatches), default=0)
        ends = min((verify.facts(der).not_after for der in answer.chain), default=0)
        if best and not renew and ends <= best:
            message = f"a new certificate of {ca.server} would last no longer than the one held: its own ends then"
            self._fail(view, ca, "later", CARefused(message, f"renew the CA certificate of {ca.server}"))
            return False
        return True

    def _spend(self, now: int) -> None:
        """Count a submission before it is made, as one that may issue a certificate."""
        budget = self.store.budget.kept(now)
        self.store.save_budget(replace(budget, submissions=(*budget.submissions, j.Submission(now, counts=True))))

    def _unspend(self) -> None:
        """The last submission surely issued nothing; it still is a submission."""
        *earlier, last = self.store.budget.submissions
        self.store.save_budget(replace(self.store.budget, submissions=(*earlier, replace(last, counts=False))))

    def _identified(self, request_id: int) -> None:
        self.store.request("identified", id=request_id, next=0)

    def _record(self, outcome: "cas.Outcome", view: View, ca: CA) -> None:
        """Record what the CA said of the request. What can't be told leaves the request as it is."""
        from scx_enroll import ca as cas

        entry, now = self.store.journal.request, self.site.clock()
        posted = entry.state == "submitting"  # no page has shown an ID yet
        if isinstance(outcome, cas.Certificate):
            self._obtained(outcome, view, ca)
        elif isinstance(outcome, cas.Pending):
            later = now + pace.poll_after(now - entry.since)
            others = tuple(b for b in self.store.journal.backoffs if b.ca != ca.server)  # it talks to us again
            self.store.update(request=replace(entry, pending=True, next=later, why=""), backoffs=others)
        elif isinstance(outcome, (cas.Denied, cas.Revoked, cas.Gone)):
            if isinstance(outcome, cas.Denied) and posted:
                self._unspend()
            self._fail(view, ca, *_refusal(outcome, ca), event="refused")
        elif isinstance(outcome, cas.Unavailable) and posted:
            if entry.tries == 1:
                self._unspend()
            self._fail(view, ca, *_unavailable(outcome), event="unsent" if entry.tries == 1 else "lost")
        else:
            why = self._unrecognised(outcome, ca).message if isinstance(outcome, cas.Unknown) else outcome.reason
            if posted:
                self.lost(why)
                return
            if isinstance(outcome, cas.Unavailable) and outcome.kind.startswith("signin"):
                self._fail(view, ca, *_unavailable(outcome))
                return
            self.store.update(request=replace(entry, next=now + pace.poll_after(now - entry.since), why=why))
            self.failure = CAUnreachable(f"request ID {entry.id} at {ca.server} was not fetched: {why}", "it is tried again")

    def _obtained(self, outcome: "cas.Certificate", view: View, ca: CA) -> None:
        """Keep a certificate that fits; one that doesn't is not asked for again with the same inputs."""
        ready, now, root = view.ready, self.site.clock(), self.site.root
        pool = (*outcome.bag, *self.pool)
        wrong = observe.judge(
            root, ready.agent, self.config, ca, ready.spec, view.seen.key, outcome.leaf, pool, now
        )
        if wrong:
            detail = "; ".join(mismatch.detail for mismatch in wrong)
            message = f"certificate of request ID {outcome.request_id} from {ca.server} refused: {detail}"
            self._fail(view, ca, "changed", CertificateRefused(message, wrong[0].hint), event="refused", every=True)
            return
        chain = verify.chain(outcome.leaf, (*pool, *observe.trust(root, ca)[1]))
        origin = j.Origin(
            ca=ca.server, request_id=outcome.request_id, obtained=now, first=not self.store.generations()
        )
        generation = generation_of(outcome.leaf, chain, origin)
        self.store.add_generation(generation)
        state = j.step(j.REQUEST, self.store.journal.request.state, "obtained")
        self.store.update(request=j.Request(state=state), backoffs=(), latch=latch(self.site, self.config, view))
        self.failure = None

    def _fail(
        self, view: View, ca: CA, retry: str, problem: EnrollError, *, event: str = "", every: bool = False
    ) -> None:
        """Record why this CA (`every`: any) is not asked for now, and the event of the request machine with it."""
        if retry == "changed":  # a cure at the CA is no change that can be seen from here
            cure = "where only the account was mended" if isinstance(problem, SigninRefused) else "then"
            problem = type(problem)(problem.message, f"{problem.hint}; {cure}: scx-enroll run --renew")
        inputs = self.store.journal.request.inputs or view.seen.inputs  # of what was asked for, which may not be wanted now
        server, now = "" if every else ca.server, self.site.clock()
        secret = self._mark(ca) if retry == "changed" and isinstance(problem, SigninRefused) else ""
        entry = self.store.journal
        failures = max((b.failures for b in entry.backoffs if (b.ca, b.inputs) == (server, inputs)), default=0) + 1
        backoff = j.Backoff(
            server, inputs, now, failures, retry, problem.exit_status, problem.message, problem.hint, secret
        )
        moved = entry.request
        if event:
            state = j.step(j.REQUEST, moved.state, event)
            again = replace(moved, state=state, next=now + pace.COOL_DOWN_S, why=problem.message)
            moved = j.Request() if state == "none" else again
        others = tuple(b for b in entry.backoffs if b.ca != server and b.inputs in (inputs, view.seen.inputs))
        self.store.update(backoffs=(*others, backoff), request=moved)
        self.failure = problem

    def _unrecognised(self, outcome: "cas.Unknown", ca: CA) -> CAUnreachable:
        path = self.store.save_page(outcome.skeleton, self.site.clock())
        return CAUnreachable(
            f"an answer of {ca.server} was not recognised ({outcome.where}); its skeleton is in {path}",
            "look at that page in a browser; the skeleton holds tags only and may be shown to others",
        )


def generation_of(leaf: bytes, chain: Tuple[bytes, ...], origin: j.Origin) -> Generation:
    """Return the generation of a leaf and its intermediates, DER."""
    pems = b"".join(map(verify.pem, chain))
    return Generation(verify.facts(leaf).leaf[:16], verify.pem(leaf), pems, origin)


def latch(site: Site, config: Config, view: View) -> Optional[j.Latch]:
    """Return the name that `auto` gave, to be kept from the first success on."""
    if site.store.journal.latch or config.host.name != "auto":
        return site.store.journal.latch
    return j.Latch(observe.short_name(site.root), view.ready.spec.fqdn)


def _unavailable(outcome: "cas.Unavailable") -> Tuple[str, EnrollError]:
    if outcome.kind.startswith("signin"):
        retry = "changed" if outcome.kind == "signin-password" else "later"
        return retry, SigninRefused(outcome.reason, outcome.hint)
    return "soon", CAUnreachable(outcome.reason, outcome.hint)


def _refusal(outcome: "Union[cas.Denied, cas.Revoked, cas.Gone]", ca: CA) -> Tuple[str, EnrollError]:
    from scx_enroll import ca as cas

    what = f"request ID {outcome.request_id}" if outcome.request_id is not None else "the request"
    retry, hint = "later", f"ask the operator of {ca.server} why, then: scx-enroll run --now"
    if isinstance(outcome, cas.Denied):
        reason, hint = outcome.reason, outcome.hint or hint
        retry = "soon" if outcome.retry == "transient" else "later"
    else:
        reason = "its certificate was revoked" if isinstance(outcome, cas.Revoked) else "the CA does not know it any more"
    return retry, CARefused(f"{ca.server} refused {what}: {reason}", hint)
