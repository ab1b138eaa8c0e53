"""The CA's part alone, on behalf of a host that can't run this program: a CSR made there in, its certificate and chain out.

The same table decides as for this host's own certificate, over the same budget; what is remembered stands in a folder of
its own for each CSR, so the same call goes on with a request that waits, prints a certificate that is held, and asks for
a new one when its renewal is due.
"""

from dataclasses import dataclass, replace
from typing import List, Optional, Tuple

from scx_enroll import adoption, observe, plan, request, service, verify
from scx_enroll import journal as j
from scx_enroll.acquire import Acquisition, Want
from scx_enroll.activate import Site
from scx_enroll.asking import CA as CA_TABLE
from scx_enroll.begin import config_of, settled
from scx_enroll.case import Observed, Step, Wish
from scx_enroll.config import CA, Config
from scx_enroll.enroll import MAX_STEPS
from scx_enroll.errors import EnrollError, UsageError
from scx_enroll.job import Options, Stopped, Tools
from scx_enroll.pace import Held
from scx_enroll.records import Line
from scx_enroll.request import Foreign
from scx_enroll.rootfs import Root, read_argument
from scx_enroll.store import Generation


@dataclass(frozen=True)
class Ended:
    """How it stands with one CSR: the last step, and the certificate that is held, if one is valid."""

    step: Step
    spec: request.RequestSpec
    journal: j.Journal
    budget: j.Budget
    acts: Tuple[Step, ...]
    generation: Optional[Generation] = None
    failure: Optional[EnrollError] = None  # at a CA, and not made good since

    @property
    def status(self) -> int:
        """The exit status: that of what is waited for, also where an earlier certificate is still valid."""
        return self.step.status or (self.failure.exit_status if self.failure else 0)


class Errand:
    """One CSR on its way; `site.store` is the one of that CSR, entered and loaded."""

    def __init__(self, site: Site, config: Config, line: Line, foreign: Foreign, wish: Wish) -> None:
        self.site = site
        self.config = config
        self.foreign = foreign
        self.wish = wish
        self.acquisition = Acquisition(site, config, line)
        self.policy = observe.policy_of(config, foreign.spec.fqdn)

    def _judge(self, ca: CA, leaf: bytes, pool: Tuple[bytes, ...]) -> Tuple[verify.Mismatch, ...]:
        """Judge as for this host's own, but for the proof of the key, which is elsewhere."""
        foreign, root = self.foreign, self.site.root
        return observe.judge(root, service.check_path, self.config, ca, foreign.spec, foreign.spki, leaf, pool, self.site.clock())

    def _held(self) -> Tuple[Tuple[Held, Generation], ...]:
        def judged(der: bytes, rest: Tuple[bytes, ...], server: str) -> Tuple[verify.Mismatch, ...]:
            cas = [ca for ca in self.config.cas if ca.server == server] or self.config.cas
            return min((self._judge(ca, der, rest) for ca in cas), key=len)

        return tuple((observe.held_as(one, self.site.store.journal, judged), one) for one in self.site.store.generations())

    def want(self) -> Want:
        """Return what is asked of a CA."""
        inputs = observe.inputs_of(self.config, self.foreign.spec, self.foreign.spki)
        held = tuple(held for held, _ in self._held())
        return Want(self.foreign.spec, self.foreign.spki, inputs, held, lambda: (self.foreign.pem, self.foreign.spki), self._judge)

    def _decide(self, want: Want) -> Step:
        share = observe.share_of(self.foreign.spec.fqdn)
        seen = Observed(key=want.spki, held=want.held, live=False, inputs=want.inputs, names=want.spec.dns_names, share=share)
        store = self.site.store
        return plan.decide(seen, self.policy, store.journal, store.budget, self.site.clock(), self.wish, CA_TABLE)

    def run(self, tools: Tools) -> Ended:
        """Act until nothing can be done now. Raises what goes wrong on this host."""
        acts: List[Step] = []
        self.acquisition.records.forget_old_secrets()
        while len(acts) < MAX_STEPS + len(self.config.cas):
            want = self.want()
            step = self._decide(want)
            if step.action in plan.WAITING:
                self.site.store.prune()
                return self._ended(step, tuple(acts))
            if tools.stopping():
                raise Stopped
            self.wish = self.acquisition.carry_out(step, want, self.wish, lambda: True)
            acts.append(step)
            tools.acted(step)
        raise EnrollError(f"no end after {len(acts)} steps; the last one was {step.row} {step.action}: {step.reason}")

    def _ended(self, step: Step, acts: Tuple[Step, ...]) -> Ended:
        store = self.site.store
        valid = [(held, one) for held, one in self._held() if not held.mismatches]
        best = max(valid, key=lambda pair: (pair[0].not_before, pair[0].number), default=(None, None))[1]
        return Ended(step, self.foreign.spec, store.journal, store.budget, acts, best, self.acquisition.records.failure)

    def serve(self, name: str) -> None:
        """Turn to one CA alone, called so in the configuration. Raises UsageError."""
        server, request_ = self.acquisition.server_of(name), self.site.store.journal.request
        if request_.state != "none" and request_.ca != server:
            what = f"request ID {request_.id}" if request_.id else "a request whose fate is doubtful"
            raise UsageError(f"{what} is waited for at {request_.ca}, not {server}", "leave --ca out until that has ended")
        self.policy = replace(self.policy, cas=tuple(ca for ca in self.policy.cas if ca == server))

    def adopt(self, request_id: int, name: str) -> None:
        """Take a request ID from the operator. Raises as `adoption.adopt`."""
        adoption.adopt(self.acquisition, request_id, self.acquisition.server_of(name), self.want())


def submit(
    root: Root, options: Options, tools: Tools, foreign: Foreign, ca: str, request_id: Optional[int] = None
) -> Ended:
    """Get the certificate for another host's request. `ca`: one CA alone; `request_id`: the operator knows it."""
    with settled(root, options, tools) as site:
        config = config_of(root, options)
        weak = verify.weakness(foreign.key, verify.Rules(minimum_key=config.agent.minimum_key))
        if weak:
            raise UsageError(f"the request's {weak}; nothing was sent", "make a stronger key on that host, and a request with it")
        site.store.begin_errand(foreign.digest[:16])
        errand = Errand(site, config, tools.line, foreign, options.wish)
        if request_id is not None:
            errand.adopt(request_id, ca)
        elif ca:
            errand.serve(ca)
        return errand.run(tools)


def check_output(path: str, limit: int) -> None:
    """See that what is there may be replaced: a file with certificates, an empty one, or nothing. Raises UsageError."""
    kind = Root("/").entry(path).kind
    try:
        data = read_argument(path, limit) if kind == "file" else b""
        ours = kind == "absent" or (kind == "file" and (not data or bool(verify.read(data))))
    except EnrollError:
        ours = False
    if not ours:
        raise UsageError(f"--output {path} would replace what holds no certificate", "name a new file; without --output it is printed")
