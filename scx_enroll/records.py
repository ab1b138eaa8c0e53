"""What is remembered of the CAs: what each said last, why one is not asked for now, what the budget was spent on."""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll import outcomes, pace
from scx_enroll.activate import Site
from scx_enroll.config import CA, Config
from scx_enroll.errors import CAUnreachable, ConfigError, EnrollError, HostError, SigninRefused
from scx_enroll.rootfs import Root

if TYPE_CHECKING:
    from scx_enroll import ca as cas


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


class Records:
    """The records of one run about the CAs. `failure`: what went wrong last, None after success."""

    def __init__(self, site: Site, config: Config, line: Line) -> None:
        self.site = site
        self.store = site.store
        self.config = config
        self.line = line
        self.failure: Optional[EnrollError] = None

    def begin(self) -> Optional[EnrollError]:
        """Begin an act; returns what went wrong before."""
        earlier, self.failure = self.failure, None
        return earlier

    # -- passwords that were refused --------------------------------------------------------------------------------

    def forget_old_secrets(self) -> None:
        """End the back-off of a refused password when user or password have changed."""
        self._keep(lambda refused: any(ca.server == refused.ca and self._is_secret_of(ca, refused) for ca in self.config.cas))

    def let_in(self, ca: CA) -> None:
        """The CA took the password, whatever it, or another CA that is given the same, said earlier."""
        taken = {refused.secret for refused in self.store.budget.refused if refused.ca == ca.server}
        self._keep(lambda refused: refused.secret not in taken)

    def _keep(self, kept: Callable[[j.Backoff], bool]) -> None:
        budget = self.store.budget
        refused = tuple(filter(kept, budget.refused))
        if refused != budget.refused:
            self.store.save_budget(replace(budget, refused=refused))

    def check_secret(self, ca: CA) -> None:
        """Raise SigninRefused where this CA has refused the password that it would be given."""
        self.forget_old_secrets()
        for refused in self.store.budget.refused:
            if refused.ca == ca.server:
                raise SigninRefused(refused.message, refused.hint)

    def _is_secret_of(self, ca: CA, refused: j.Backoff) -> bool:
        """Say whether this CA would be given the password that was refused; one that can't be read is no new one."""
        try:
            return self._mark(ca) == refused.secret
        except (ConfigError, HostError):
            return ca.server == refused.ca

    def _mark(self, ca: CA) -> str:
        if not self.store.budget.salt:
            self.store.save_budget(replace(self.store.budget, salt=secrets.token_hex(16)))
        return self.line.secret_mark(self.site.root, ca, self.store.budget.salt.encode())

    # -- what a CA said -----------------------------------------------------------------------------------------------

    def met(self, ca: CA, status: int, message: str, **certificate: Any) -> None:
        """Record what a CA said, and what was seen of its certificate (fields of `Contact`)."""
        self.store.update(contacts=self.contacts(ca, status, message, **certificate))

    def contacts(self, ca: CA, status: int, message: str, **certificate: Any) -> Tuple[j.Contact, ...]:
        """Return what is known of each configured CA, with what this one said now."""
        known = {contact.ca: contact for contact in self.store.journal.contacts}
        known[ca.server] = replace(
            known.get(ca.server, j.Contact(ca.server, 0, 0, "")), at=self.site.clock(), status=status, message=message, **certificate
        )
        return tuple(known[other.server] for other in self.config.cas if other.server in known)

    def fail(
        self, ca: CA, inputs: str, retry: str, problem: EnrollError, *, event: str = "", every: bool = False
    ) -> None:
        """Record why this CA (`every`: any) is not asked for now, and the event of the request machine with it."""
        if retry == "changed":  # a cure at the CA is no change that can be seen from here
            cure = "where only the account was mended" if isinstance(problem, SigninRefused) else "then"
            problem = type(problem)(problem.message, f"{problem.hint}; {cure}: scx-enroll run --renew")
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
        if secret:
            same = tuple(replace(backoff, ca=other.server) for other in self.config.cas if self._is_secret_of(other, backoff))
            others = tuple(one for one in self.store.budget.refused if one.secret != secret)
            self.store.save_budget(replace(self.store.budget, refused=(*others, *same)))
        configured = {"", *(other.server for other in self.config.cas)}
        kept = tuple(b for b in entry.backoffs if b.ca != server and b.ca in configured)
        met = self.contacts(ca, problem.exit_status, problem.message)
        self.store.update(backoffs=kept if secret else (*kept, backoff), request=moved, contacts=met)
        self.failure = problem

    def doubt(self, why: str, *, answered: bool) -> None:
        """The request may have been stored; `answered`: so surely that it is not sent again."""
        self.store.request("lost", next=self.site.clock() + pace.COOL_DOWN_S, why=why, answered=answered)

    def unrecognised(self, outcome: outcomes.Unknown, ca: CA) -> CAUnreachable:
        """Keep the skeleton of a page, and return what to say of it."""
        path = self.store.save_page(outcome.skeleton, self.site.clock())
        return CAUnreachable(
            f"an answer of {ca.server} was not recognised ({outcome.where}); its skeleton is in {path}",
            "look at that page in a browser; the skeleton holds tags only and may be shown to others",
        )

    # -- what was spent -------------------------------------------------------------------------------------------------

    def spend(self, now: int) -> None:
        """Count a submission before it is made, as one that may issue a certificate."""
        budget = self.store.budget.kept(now)
        self.store.save_budget(replace(budget, submissions=(*budget.submissions, j.Submission(now, counts=True))))

    def unspend(self, since: int) -> None:
        """The submission of that time surely issued nothing; it still is a submission."""
        budget = self.store.budget
        spent = tuple(replace(s, counts=False) if s.at == since else s for s in budget.submissions)
        if spent != budget.submissions:
            self.store.save_budget(replace(budget, submissions=spent))
