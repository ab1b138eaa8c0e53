"""Gets a certificate from a certification authority: preflight, one POST, and a record of what came of it.

Section "The request" of docs/state.md is the specification. What goes wrong at a CA is recorded, and the plan that
follows says how long to wait and why; what goes wrong on this host is raised. Whose key it is about is not known here.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Mapping, Optional, Tuple, Union

from scx_enroll import journal as j
from scx_enroll import observe, outcomes, pace, verify
from scx_enroll.activate import Site
from scx_enroll.case import Step, Wish
from scx_enroll.config import CA, Config
from scx_enroll.errors import CARefused, CAUnreachable, CertificateRefused, ConfigError, EnrollError, HostError, SigninRefused, UsageError
from scx_enroll.pace import Held
from scx_enroll.places import generation_of
from scx_enroll.records import Line, Records
from scx_enroll.request import RequestSpec

if TYPE_CHECKING:
    from scx_enroll import ca as cas

MAX_CLOCK_SKEW_S = 300  # what Kerberos allows, and less than AD CS sets NotBefore back by


@dataclass(frozen=True)
class Want:
    """The certificate that is asked for, whoever holds its key.

    `csr` makes the request (PEM) when it is about to be sent, and says for which key: a new one is made then. `judge` says
    what is wrong with a leaf of this CA, given the certificates that came with it (DER). `latch` is recorded with the
    first success.
    """

    spec: RequestSpec
    spki: str
    inputs: str
    held: Tuple[Held, ...]
    csr: Callable[[], Tuple[bytes, str]]
    judge: Callable[[CA, bytes, Tuple[bytes, ...]], Tuple[verify.Mismatch, ...]]
    latch: Optional[j.Latch] = None
    new_key: bool = False  # it is for a key that waits for its certificate


class Acquisition:
    """One run's dealings with the CAs. `pool`: the chain learnt."""

    def __init__(self, site: Site, config: Config, line: Line) -> None:
        self.site = site
        self.store = site.store
        self.config = config
        self.records = Records(site, config, line)
        self.pool: Tuple[bytes, ...] = ()
        self.obtained = False  # by the last act
        self.unprepared: Optional[EnrollError] = None  # why a conversation could not begin

    def ca(self, server: str) -> CA:
        """Return the configured CA at that server."""
        return next(ca for ca in self.config.cas if ca.server == server)

    # -- the CA itself ----------------------------------------------------------------------------------------------

    def server_of(self, name: str) -> str:
        """Return the server of the CA called so, by its name in [ca NAME] or by its server; "" for "". Raises UsageError."""
        found = [ca.server for ca in self.config.cas if name in (ca.label, ca.server)]
        if name and not found:
            known = ", ".join(ca.label or ca.server for ca in self.config.cas)
            raise UsageError(f"no CA called {name} is configured", f"known are {known}")
        return found[0] if name else ""

    def authority(self, ca: CA, *, retry: bool = False) -> outcomes.Authority:
        """Ask a CA for its own certificates: this sends nothing. Raises what went wrong; and ConfigError, HostError.

        `retry`: with a secret that was refused, too.
        """
        if not retry:
            self.records.check_secret(ca)
        answer = self._authority(self.connect(ca), ca)
        if isinstance(answer, outcomes.Authority):
            return answer
        self.records.missed(ca, answer)
        raise answer[1]

    def greeted(self, ca: CA) -> outcomes.Greeting:
        """Ask a CA's web server how one may sign in, without doing so. Raises as `authority`."""
        conversation = self.connect(ca)
        greeting = conversation.greet()
        if isinstance(greeting, outcomes.Unavailable):
            raise outcomes.unavailable(greeting)[1]
        return greeting

    def check_line(self, server: str) -> None:
        """See that a conversation could begin: password and trust are readable. Raises ConfigError, HostError; sends nothing."""
        self.records.line.connect(self.site.root, self.ca(server))

    def connect(self, ca: CA) -> "cas.Conversation":
        """Begin a conversation; the network is not touched yet. Raises ConfigError, HostError."""
        self.site.waiting(f"waiting for {ca.server}")
        try:
            conversation = self.records.talks[ca.server] = self.records.line.connect(self.site.root, ca)
        except (ConfigError, HostError) as problem:
            self.unprepared = problem
            raise
        return conversation

    def _authority(self, conversation: "cas.Conversation", ca: CA) -> Union[outcomes.Authority, outcomes.Problem]:
        """Return the CA's own certificates, what is worth knowing of them recorded; or what is wrong."""
        answer = conversation.authority()
        if isinstance(answer, outcomes.Unavailable):
            return outcomes.unavailable(answer)
        if isinstance(answer, outcomes.Unknown):
            return "soon", self.records.unrecognised(answer, ca)
        self.records.let_in(ca)
        newest, *rest = answer.chain
        try:
            anchors, intermediates = observe.trust(self.site.root, ca)
        except ConfigError:  # not there yet
            anchors, intermediates = (), ()
        way = (newest, *verify.chain(newest, (*rest, *intermediates)))
        self.records.met(
            ca, 0, "it answered",
            issuer=verify.facts(newest).leaf,
            ends=min(verify.facts(der).not_after for der in way),
            trusted=verify.leads_to((*answer.chain, *intermediates), anchors),
        )
        return answer

    # -- acts -------------------------------------------------------------------------------------------------------

    def carry_out(self, step: Step, want: Want, wish: Wish, still_due: Callable[[], bool]) -> Wish:
        """Carry out a step of the CA table; returns what of the wish remains.

        A CA that failed is not asked again in this run, whatever was wished. `still_due` is asked once the CA's chain is
        known, before anything is sent: with it, what is held may turn out to be valid.
        """
        earlier, self.obtained = self.records.begin(), False
        server = step.ca or self.store.journal.request.ca
        try:
            sent = ACTS[step.action](self, step, want, wish, still_due)
        except SigninRefused as problem:  # before anything was sent: there is no keytab, or not this machine's
            self.records.fail(self.ca(server), want.inputs, "joining", problem)
            sent = False
        except (ConfigError, HostError) as problem:
            if problem is not self.unprepared or len(self.config.cas) == 1:
                raise
            self.records.fail(self.ca(server), want.inputs, "soon", problem)  # another one may need no such library or file
            sent = False
        done = sent or self.obtained
        if self.records.failure:
            wish = replace(wish, tried=(*wish.tried, *self.records.alike(server)))
        elif not done:
            self.records.failure = earlier
        left = not done or (wish.rekey and not want.new_key)
        return replace(wish, now=wish.now and left and step.action != "poll", renew=wish.renew and left, rekey=wish.rekey and left)

    def submit(self, step: Step, want: Want, wish: Wish, still_due: Callable[[], bool]) -> bool:
        """Preflight, then one POST of a new CSR; says whether it was sent."""
        ca = self.ca(step.ca)
        self.store.check_state()
        conversation = self.connect(ca)
        if not self._preflight(conversation, ca, want, wish) or not still_due():
            return False
        csr, spki = want.csr()
        now = self.site.clock()
        self.records.spend(now)
        self.store.request(
            "submit", ca=ca.server, csr=csr.decode(), spki=spki, names=want.spec.dns_names, since=now, tries=1, next=0,
            rule=want.latch.rule if want.latch else "",
            inputs=want.inputs, due=step.due,
        )
        self.record(conversation.submit(csr, self._identified), want, ca, posted=True)
        return True

    def _preflight(self, conversation: "cas.Conversation", ca: CA, want: Want, wish: Wish) -> bool:
        """Learn the CA's chain and clock: what can fail after a certificate was issued should fail here."""
        observe.trust(self.site.root, ca)
        answer = self._authority(conversation, ca)
        if not isinstance(answer, outcomes.Authority):
            self.records.fail(ca, want.inputs, *answer)
            return False
        contact = next(known for known in self.store.journal.contacts if known.ca == ca.server)
        problem = self._unfit(ca, contact, answer)
        if problem:  # another CA may do
            self.records.fail(ca, want.inputs, "soon", problem)
            return False
        self.pool = answer.chain
        best = max((held.not_after for held in want.held if not held.mismatches), default=0)
        if best and not wish.renew and contact.ends <= best:
            message = f"a new certificate of {ca.server} would last no longer than the one held: its own ends then"
            self.records.fail(ca, want.inputs, "later", CARefused(message, f"renew the CA certificate of {ca.server}"))
            return False
        return True

    def _unfit(self, ca: CA, contact: j.Contact, answer: outcomes.Authority) -> Optional[EnrollError]:
        """Return why nothing is sent to a CA that answers: its chain, or the clocks."""
        if not contact.trusted:
            return ConfigError(
                f"the CA certificate of {ca.server} does not lead to a root in {ca.issuer_trust}; nothing was sent",
                "compare its fingerprint (scx-enroll ca-cert --fetch), then add the root of that CA's PKI there",
            )
        skew_s = abs(answer.date - self.site.clock()) if answer.date is not None else 0
        if skew_s > MAX_CLOCK_SKEW_S:
            return HostError(
                f"this host's clock and that of {ca.server} are {skew_s} s apart; nothing was sent",
                "set the clock (chrony, systemd-timesyncd), then run again",
            )
        return None

    def repeat(self, _step: Step, want: Want, *_: object) -> bool:
        """Send the CSR of a doubtful request once more, so that either certificate fits."""
        entry = self.store.journal.request
        ca = self.ca(entry.ca)
        conversation = self.connect(ca)
        answer = self._authority(conversation, ca)
        if not isinstance(answer, outcomes.Authority):  # not sent, so it is no try
            self.store.update(request=replace(entry, next=self.site.clock() + pace.COOL_DOWN_S))
            self.records.fail(ca, want.inputs, *answer)
            return False
        self.records.spend(self.site.clock())
        self.store.request("submit", tries=entry.tries + 1)
        self.record(conversation.submit(entry.csr.encode(), self._identified), want, ca, posted=True)
        return False

    def poll(self, _step: Step, want: Want, *_: object) -> bool:
        """Ask what became of a request; GETs only."""
        entry = self.store.journal.request
        ca = self.ca(entry.ca)
        self.record(self.connect(ca).fetch(entry.id or 0), want, ca, posted=False)
        return False

    def abandon(self, step: Step, want: Want, *_: object) -> bool:
        """Give a request up; where another CA is to serve, this one is not asked again for the same."""
        if step.ca:
            self.records.fail(self.ca(step.ca), want.inputs, "changed", CARefused(step.reason, step.hint), event="abandoned")
        else:
            self.store.request("abandoned")
        return False

    def lost(self, step: Step, _want: Want, *_: object) -> bool:
        """A run was killed between the record and the answer."""
        self.records.doubt(step.reason, answered=False)
        return False

    def question(self, step: Step, want: Want, *_: object) -> bool:
        """Ask whether the certificate in service was revoked, and look at the CA's own: what fails is asked again in half a week."""
        ca, now = self.ca(step.ca), self.site.clock()
        held = next(held for held in want.held if held.id == step.generation)
        self.store.update(question=now + pace.MISSED_S)  # whatever comes: not again at every run
        try:
            conversation = self.connect(ca)
        except (SigninRefused, ConfigError, HostError) as problem:
            self.records.missed(ca, ("soon", problem))
            return False
        answer = self._authority(conversation, ca)
        if not isinstance(answer, outcomes.Authority):
            self.records.missed(ca, answer)
            return False
        outcome = conversation.fetch(held.request_id)
        if isinstance(outcome, outcomes.Revoked):
            self.records.note_revoked(ca, held)
        elif isinstance(outcome, outcomes.Certificate):
            same = verify.facts(outcome.leaf).leaf == held.leaf
            what = "is in force" if same else "is not the one in service: was the CA rebuilt, or restored?"
            message = f"the certificate of request ID {held.request_id} {what}"
            self.store.update(question=now + pace.WEEK_S, contacts=self.records.contacts(ca, 0, message))
        else:
            why = f": {self.records.unrecognised(outcome, ca).message}" if isinstance(outcome, outcomes.Unknown) else ""
            self.records.met(ca, 0, f"it did not tell whether request ID {held.request_id} was revoked{why}")
        return False

    # -- records ------------------------------------------------------------------------------------------------------

    def _identified(self, request_id: int) -> None:
        self.store.request("identified", id=request_id, next=0)

    def record(self, outcome: outcomes.Outcome, want: Want, ca: CA, *, posted: bool) -> None:
        """Record what the CA said of the request. What can't be told leaves the request as it is. `posted`: just now."""
        entry, now = self.store.journal.request, self.site.clock()
        nameless = entry.state == "submitting"  # no page has shown an ID
        inputs = entry.inputs or want.inputs  # of what was asked for, which may not be wanted now
        if isinstance(outcome, (outcomes.Certificate, outcomes.Pending)):
            self.records.let_in(ca)
        if isinstance(outcome, outcomes.Certificate):
            self._obtained(outcome, want, ca, inputs, posted=posted)
        elif isinstance(outcome, outcomes.Pending):
            later = now + pace.poll_after(now - entry.since)
            others = tuple(b for b in self.store.journal.backoffs if b.ca != ca.server)  # it talks to us again
            met = self.records.contacts(ca, 7, f"request ID {entry.id} is pending")
            self.store.update(request=replace(entry, pending=True, next=later, why=""), backoffs=others, contacts=met)
        elif isinstance(outcome, (outcomes.Denied, outcomes.Revoked, outcomes.Gone)):
            retry, problem = outcomes.refused(outcome, ca.server)
            if entry.adopted:
                self._mistaken(ca, problem.message)
                return
            if isinstance(outcome, outcomes.Denied) and entry.tries == 1:
                self.records.unspend(entry.since)
            self.records.fail(ca, inputs, retry, problem, event="refused", every=outcomes.by_a_person(outcome))
        elif isinstance(outcome, outcomes.Unavailable) and nameless:
            if entry.tries == 1:
                self.records.unspend(entry.since)
            self.records.fail(ca, inputs, *outcomes.unavailable(outcome), event="unsent" if entry.tries == 1 else "lost")
        elif isinstance(outcome, outcomes.Unavailable) and outcome.kind.startswith("signin"):
            self.records.fail(ca, want.inputs, *outcomes.unavailable(outcome))
        else:
            self._unread(outcome, ca, nameless=nameless)

    def _unread(self, outcome: outcomes.Outcome, ca: CA, *, nameless: bool) -> None:
        """Record that the CA said nothing that could be read: of a request without an ID it is doubtful what became of it."""
        entry, now = self.store.journal.request, self.site.clock()
        why = self.records.unrecognised(outcome, ca).message if isinstance(outcome, outcomes.Unknown) else outcomes.sentence(outcome)
        if nameless:
            self.records.doubt(why, answered=bool(getattr(outcome, "whole", False) or getattr(outcome, "answered", False)))
            self.records.met(ca, CAUnreachable.exit_status, why)
            return
        met = self.records.contacts(ca, CAUnreachable.exit_status, why)
        self.store.update(request=replace(entry, next=now + pace.poll_after(now - entry.since), why=why), contacts=met)
        if not entry.pending:  # else it goes on waiting for a person
            self.records.failure = CAUnreachable(f"request ID {entry.id} at {ca.server} was not fetched: {why}", "it is tried again")

    def _mistaken(self, ca: CA, why: str) -> None:
        """The ID that the operator named brings nothing: what was doubtful before is so again, with time to name another one."""
        entry, later = self.store.journal.request, self.site.clock() + pace.COOL_DOWN_S
        state = j.step(j.REQUEST, entry.state, "mistaken")
        doubt = replace(entry, state=state, id=None, adopted=False, pending=False, next=later, why=why)
        nothing = j.Request(state=j.step(j.REQUEST, entry.state, "refused"))
        met = self.records.contacts(ca, CARefused.exit_status, why)
        self.store.update(request=doubt if entry.csr else nothing, contacts=met)
        self.records.failure = CARefused(why, f"look for this host's request on {ca.server}, then: scx-enroll run --adopt ID")

    def _obtained(self, outcome: outcomes.Certificate, want: Want, ca: CA, inputs: str, *, posted: bool) -> None:
        """Keep a certificate that fits; one that doesn't is not asked for again with the same inputs."""
        facts, what = verify.facts(outcome.leaf), f"request ID {outcome.request_id}"
        if facts.spki != self.store.journal.request.spki and not posted:
            if self.store.journal.request.adopted:
                self._mistaken(ca, f"{what} at {ca.server} is somebody else's: its certificate is for {facts.subject}")
                return
            message = f"{what} at {ca.server} is somebody else's now, {facts.subject}: was the CA rebuilt or restored?"
            self.records.fail(ca, inputs, "later", CARefused(message, "a new request follows by itself"), event="refused")
            return
        pool = (*outcome.bag, *self.pool, *observe.known_chains(self.store.generations()))
        wrong = want.judge(ca, outcome.leaf, pool)
        if _path_alone(wrong) and not self.pool:  # the chain did not come along, or not wholly
            answer = self._authority(self.connect(ca), ca)
            if not isinstance(answer, outcomes.Authority) and not outcome.bag:
                self._unread(outcomes.Unfetched(outcome.request_id, "its chain could not be fetched", ""), ca, nameless=False)
                return
            self.pool = answer.chain if isinstance(answer, outcomes.Authority) else ()
            pool = (*pool, *self.pool)
            wrong = want.judge(ca, outcome.leaf, pool)
        detail = "; ".join(mismatch.detail for mismatch in wrong)
        message = f"certificate of {what} from {ca.server} refused: {detail}" if wrong else f"it issued {what}"
        if wrong and not _path_alone(wrong):
            self.records.fail(ca, inputs, "changed", CertificateRefused(message, wrong[0].hint), event="refused", every=True)
            return
        now = self.site.clock()  # one that only lacks a trusted root is kept, too: it is good as soon as the trust is mended
        chain = verify.chain(outcome.leaf, (*pool, *observe.trust(self.site.root, ca)[1]))
        origin = j.Origin(ca=ca.server, request_id=outcome.request_id, obtained=now, due=self.store.journal.request.due)
        self.store.add_generation(generation_of(outcome.leaf, chain, origin))
        state = j.step(j.REQUEST, self.store.journal.request.state, "obtained")
        met = self.records.contacts(ca, CertificateRefused.exit_status if wrong else 0, message)
        latch = self.store.journal.latch if wrong else want.latch
        self.store.update(request=j.Request(state=state), backoffs=(), contacts=met, latch=latch)
        self.obtained = True


ACTS: Mapping[str, Callable[[Acquisition, Step, Want, Wish, Callable[[], bool]], bool]] = {
    "submit": Acquisition.submit,
    "repeat": Acquisition.repeat,
    "poll": Acquisition.poll,
    "abandon": Acquisition.abandon,
    "lost": Acquisition.lost,
    "question": Acquisition.question,
}


def _path_alone(wrong: Tuple[verify.Mismatch, ...]) -> bool:
    return bool(wrong) and all(mismatch.what == "path" for mismatch in wrong)
