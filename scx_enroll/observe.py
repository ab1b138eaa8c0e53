"""One look at the host: what the agent holds and serves, judged against what the configuration asks for.

It changes nothing and sends nothing, except one TLS handshake with the agent's own port. What it finds is handed to
`plan` as plain facts.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Callable, Dict, List, Optional, Set, Tuple

from scx_enroll import access, aside, identity, keys, naming, pace, request, service, unit, verify
from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll.agent import Agent, Pair
from scx_enroll.case import Observed
from scx_enroll.config import CA, Config
from scx_enroll.errors import AgentNotReady, CertificateRefused, ConfigError, HostError, NeedsPerson
from scx_enroll.idle import STATE
from scx_enroll.keys import Key
from scx_enroll.pace import Held, Policy
from scx_enroll.places import certificates_of, place_of, signature, sound_copy
from scx_enroll.request import RequestSpec
from scx_enroll.rootfs import Root
from scx_enroll.store import Generation, Store

MAX_TRUST_BYTES = 1 << 20  # a system's whole bundle has 250 kB
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Ready:
    """An agent that can be worked on, and what the acts and the report need to know of it."""

    agent: Agent
    pair: Pair
    spec: RequestSpec
    installed: Optional[verify.Facts]  # of the first certificate at the name the agent reads
    mismatches: Tuple[verify.Mismatch, ...]  # of that certificate
    adoptable: Optional[Generation]  # that certificate, where it is valid and no generation
    notes: Tuple[str, ...]  # what the operator should know
    turns: Tuple[int, ...]  # when each certificate that was judged, or judged by, begins and ends
    served: bytes  # by the agent's port: the leaf, DER
    resolved: bool  # the resolver gave the host's name just now, and may give another
    staged: Optional[Key]  # the key that waits for its certificate


@dataclass(frozen=True)
class View:
    """What one look found: the facts for `plan`, and what they were made from."""

    seen: Observed
    policy: Policy
    found: Optional[Ready]

    @property
    def ready(self) -> Ready:
        """Return what was found. Raises AgentNotReady where no agent can be worked on."""
        if self.found is None:
            raise AgentNotReady(self.seen.blocked, self.seen.blocked_hint)
        return self.found


def share_of(identity: str) -> int:
    """Return this host's place in a spread: evenly distributed over hosts, always the same for one."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")


def ordered(cas: Tuple[CA, ...], identity: str) -> Tuple[CA, ...]:
    """Return the CAs in the order in which a host asks them (rendezvous hashing).

    Hosts are spread evenly over the CAs; those of a CA that is down, evenly over the others. One that comes or goes
    changes the order for its own hosts only.
    """
    return tuple(sorted(cas, key=lambda ca: hashlib.sha256(f"{identity} {ca.server}".encode()).digest()))


def trust(root: Root, ca: CA) -> Tuple[Tuple[bytes, ...], Tuple[bytes, ...]]:
    """Read a CA's issuer-trust: anchors and intermediates, DER. Raises ConfigError where it can't be used."""
    hint = f"put the root certificate of {ca.server}'s PKI there, as PEM"
    try:
        anchors, intermediates = verify.split_trust(root.read(ca.issuer_trust, MAX_TRUST_BYTES, trusted=True))
    except FileNotFoundError:
        raise ConfigError(f"issuer-trust {ca.issuer_trust} is missing", hint) from None
    if not anchors:
        raise ConfigError(f"issuer-trust {ca.issuer_trust} holds no self-signed certificate", hint)
    return anchors, intermediates


def rules_of(ca: CA, config: Config) -> verify.Rules:
    """Return what a certificate of this CA must hold beyond names and key."""
    return verify.Rules(ca.require_cn, ca.require_revocation, config.agent.minimum_key)


Path = Callable[[Tuple[bytes, ...], Tuple[bytes, ...], str], str]  # DER, leaf first; anchors; FQDN -> "" or what is wrong


Known = Dict[Tuple[Optional[bytes], Tuple[bytes, ...], Tuple[bytes, ...], str], str]  # key and what a Path takes -> what it said


def rehearsal(root: Root, key_path: str, key: Optional[bytes], known: Known) -> Path:
    """Return the check of a path by a handshake with the key at `key_path`, whose PEM is `key`; once for the same in one run."""

    def path(ders: Tuple[bytes, ...], anchors: Tuple[bytes, ...], fqdn: str) -> str:
        asked = (key, ders, anchors, fqdn)
        if asked not in known:
            known[asked] = service.rehearse(root, key_path, b"".join(map(verify.pem, ders)), anchors, fqdn)
        return known[asked]

    return path


def judge(
    root: Root, path: Path, config: Config, ca: CA, spec: RequestSpec, spki: str, der: bytes, pool: Tuple[bytes, ...],
    now: int,
) -> Tuple[verify.Mismatch, ...]:
    """Judge one certificate wholly: what it says, and OpenSSL's path to the CA's configured roots."""
    found = verify.judge(der, spec, spki, rules_of(ca, config), now)
    if found:
        return found
    anchors, intermediates = trust(root, ca)
    problem = path((der, *verify.chain(der, (*pool, *intermediates))), anchors, spec.fqdn)
    hint = "see that issuer-trust holds the CA's root, and its intermediates where the CA does not send them"
    return (verify.Mismatch("path", problem, hint),) if problem else ()


def look(root: Root, store: Store, config: Config, pool: Tuple[bytes, ...], now: int, known: Known) -> View:
    """Look once. `pool`: intermediates learnt from the CA in this run; `known`: rehearsals of this run.

    Raises ConfigError and HostError; an agent that isn't there, isn't ready or is being changed is a fact, not an error.
    """
    try:
        view = _look(root, store, config, pool, now, known)
    except FileNotFoundError as gone:
        seen = Observed(blocked=f"{gone.filename} went away while it was looked at", blocked_hint="run again when its files are quiet")
        view = View(seen, policy_of(config, ""), None)
    return replace(view, seen=replace(view.seen, identity=identity.read(root)))


def _process(root: Root, agent: Agent, journal: j.Journal, *, paired: bool) -> str:
    """Return the state of the agent's process; one that went down by our own restart, or can't start, was not stopped on purpose."""
    state = agents.process(root, agent)
    return "died" if state == "stopped" and (journal.restarting or not paired) and root.live else state


def _blocked(root: Root, layout: str, journal: j.Journal, problem: AgentNotReady) -> Observed:
    process = "stopped"
    with suppress(AgentNotReady):  # one that does not list SCOM's port can be started
        process = _process(root, agents.find(root, layout, None), journal, paired=True)
    lasting = isinstance(problem, NeedsPerson)
    return Observed(blocked=problem.message, blocked_hint=problem.hint, lasting=lasting, process=process, live=root.live)


def _note_lost_keys(held: Dict[str, Held]) -> None:
    """Where a certificate was revoked, the older ones for its key are worth no more: the key may be what was lost."""
    lost = {one.key for one in held.values() if one.revoked}
    for leaf, one in held.items():
        if one.key in lost and not one.revoked:
            held[leaf] = replace(one, mismatches=(*one.mismatches, "revoked: another certificate for its key was"))


def _look(root: Root, store: Store, config: Config, pool: Tuple[bytes, ...], now: int, rehearsed: Known) -> View:
    try:
        agent = agents.find(root, config.agent.layout, config.agent.port)
        pair = agents.read_pair(root, agent)
        spki = request.spki_of(request.load_key(pair.key)) if pair.key is not None else ""
        access.demand_two(root, agent)
    except AgentNotReady as problem:
        return View(_blocked(root, config.agent.layout, store.journal, problem), policy_of(config, ""), None)
    certificates = certificates_of(pair.certificate)
    installed = _facts(certificates)
    fqdn = naming.host_fqdn(root, config, store.journal, installed)
    staged = keys.waiting(store, spki)
    spec = RequestSpec(fqdn, config.host.alternative_names)
    share, foreign_key = share_of(fqdn), identity.foreign(root, agent, store.journal, spki)
    by_server = {ca.server: ca for ca in config.cas}

    def judged(der: bytes, more: Tuple[bytes, ...], server: str) -> Tuple[verify.Mismatch, ...]:
        authorities = (by_server[server],) if server in by_server else config.cas
        ours = staged is not None and verify.facts(der).spki == staged.spki
        key = staged if staged and ours else Key(spki, agent.key, pair.key)
        path = rehearsal(root, key.path, key.pem, rehearsed)
        found = [judge(root, path, config, ca, spec, key.spki, der, (*more, *pool), now) for ca in authorities]
        foreign = (verify.Mismatch("foreign", foreign_key, "a new key follows by itself"),) if foreign_key and not ours else ()
        return (*min(found, key=len), *foreign)

    held: Dict[str, Held] = {}
    generations = store.generations()
    for generation in generations:
        if generation.id in store.journal.revoked or verify.facts(stored(generation)[0]).spki in (spki, staged.spki if staged else spki):
            one = held_as(generation, store.journal, judged)
            held[one.leaf] = one
    _note_lost_keys(held)
    adoptable: Optional[Generation] = None
    wrong: Tuple[verify.Mismatch, ...] = ()
    if installed and installed.leaf not in held:
        known = (*certificates[1:], *known_chains(generations))
        wrong = judged(certificates[0], known, "")
        if not wrong:
            chain = verify.chain(certificates[0], (*known, *pool))
            origin = j.Origin(obtained=now, how="adopted")
            pem = b"".join(map(verify.pem, chain))
            adoptable = Generation(installed.leaf[:16], verify.pem(certificates[0]), pem, origin)
    locked, answer = access.locked(root, agent), service.probe(agent.port) if root.live else service.Served(listening=False)
    changed_ns = max(aside.moved_ns(root, agent), *(entry.ctime_ns for entry in (pair.name, pair.target, pair.key_target)))
    ours = not root.live or signature(pair) == store.journal.seen
    packager = agents.packager(root) if root.live else ""
    served = _facts((answer.der,) if answer.der else ())
    paired = bool(installed and installed.spki == spki)
    loadable = paired and service.fits(root, agent.key, pair.certificate or b"")
    seen = Observed(
        busy=f"{packager} is changing packages" if packager else "",
        changed_at=0 if ours else changed_ns // 10**9,
        key=spki,
        certificate=installed.leaf if installed else "",
        held=tuple(held.values()),
        stranger=Held(adoptable.id, installed.leaf, installed.not_before, installed.not_after)
        if adoptable and installed else None,
        live=root.live,
        listening=answer.listening,
        served=answer.leaf,
        process=_process(root, agent, store.journal, paired=paired),
        inputs=inputs_of(config, spec, spki),
        names=spec.dns_names,
        trust_changed_at=max(root.resolve(ca.issuer_trust).mtime_ns for ca in config.cas) // 10**9,
        share=share,
        aside=bool(aside.names(root, agent)),
        served_until=served.not_after if served and served.issuer != served.subject else 0,  # its own: no Management Server trusts that
        loadable=loadable,
        staged=staged.spki if staged else "",
        foreign_key=foreign_key,
        locked=locked,
        locked_hint=access.cure(agent, locked) if locked else "",
        spoilt=_spoilt(root, store.journal, agent, pair) or ("" if loadable else f"the agent can't load {agent.certificate}"),
        copies=tuple(
            one.leaf for one in held.values() if one.key == spki
            for kept in generations if kept.id == one.id and sound_copy(root, agent.certificate, kept)
        ),
        problems=tuple(m.detail for m in wrong) or (held[installed.leaf].mismatches if installed and installed.leaf in held else ()),
    )
    notes = (*_notes(root, store, config, certificates, spec), *_ca_notes(root, store.journal, config, generations, now))
    notes += (*aside.leftovers(root, agent), *_stray(root, agent))
    turns = _turns(root, config, {*certificates, *pool, *(der for one in generations for der in stored(one))})
    turns += tuple(contact.ends - _lifetime_s(one) for contact in store.journal.contacts for one in generations)  # _ca_notes
    resolved = config.host.name == "auto" and naming.latched(config, store.journal) is None
    ready = Ready(agent, pair, spec, installed, tuple(wrong), adoptable, notes, turns, answer.der, resolved, staged)
    return View(seen, policy_of(config, fqdn, root, now), ready)


def _spoilt(root: Root, journal: j.Journal, agent: Agent, pair: Pair) -> str:
    """Say why what stands at the name can't stay, though its bytes are right; "" where it can."""
    ours, now = journal.installed, place_of(root, agent, pair)
    same = ours and ours.generation and ours.kind == now.kind and (ours.text, ours.sha256) == (now.text, now.sha256)
    if ours and same and (ours.uid, ours.gid, ours.mode) != (now.uid, now.gid, now.mode):
        return f"somebody changed owner or mode of {now.text}"
    return "" if access.readable(root, agent) else f"the agent's account {agent.account} can't read {agent.certificate}"


def _stray(root: Root, agent: Agent) -> Tuple[str, ...]:
    pid = unit.outside(root, agent)
    what = f"the agent runs outside {agent.unit}.service, as process {pid}, where no restart reaches it"
    return (f"{what}; it is ended before the next one that is due",) if pid else ()


def _turns(root: Root, config: Config, ders: Set[bytes]) -> Tuple[int, ...]:
    """Return when each of these certificates, and each in the issuer-trust of a CA, begins and ends."""
    for ca in config.cas:
        with suppress(ConfigError):  # said where it is needed
            ders.update(*trust(root, ca))
    found = filter(None, (_facts((der,)) for der in ders))
    return tuple(moment for one in found for moment in (one.not_before, one.not_after))


def held_as(
    generation: Generation,
    journal: j.Journal,
    judged: Callable[[bytes, Tuple[bytes, ...], str], Tuple[verify.Mismatch, ...]],
) -> Held:
    """Return a generation as `plan` knows it; `judged` says what is wrong with a leaf, given its intermediates and its CA."""
    der, *rest = stored(generation)
    facts, origin = verify.facts(der), generation.origin
    revoked = generation.id in journal.revoked
    wrong = tuple(f"{m.what}: {m.detail}" for m in judged(der, tuple(rest), origin.ca)) + (("revoked: its CA says so",) if revoked else ())
    return Held(
        generation.id, facts.leaf, facts.not_before, facts.not_after, origin.due, origin.number, origin.obtained, wrong,
        origin.ca, origin.request_id or 0, revoked, facts.spki,
    )


def stored(generation: Generation) -> Tuple[bytes, ...]:
    """Return a generation's leaf and intermediates, DER. Raises HostError, naming the file, for what a disk made of it."""
    found: List[bytes] = []
    for name, data in (("cert.pem", generation.certificate), ("chain.pem", generation.chain)):
        try:
            found += verify.read(data)
            if found:
                verify.facts(found[0])
                continue
        except CertificateRefused:
            pass
        folder = f"{STATE}/generations/{generation.id}"
        raise HostError(f"{folder}/{name} is damaged", f"move {folder} away: what is installed is adopted again, if it is valid")
    return tuple(found)


def known_chains(generations: Tuple[Generation, ...]) -> Tuple[bytes, ...]:
    """Return every intermediate that came with a generation, DER."""
    return tuple(der for generation in generations for der in stored(generation)[1:])


def _facts(certificates: Tuple[bytes, ...]) -> Optional[verify.Facts]:
    """Return the facts of the first certificate; None where there is none that can be read."""
    try:
        return verify.facts(certificates[0]) if certificates else None
    except CertificateRefused:
        return None


def policy_of(config: Config, identity: str, root: Optional[Root] = None, now: int = 0) -> Policy:
    """Return what the configuration asks for, of the host called `identity`; `root`: of an agent that is restarted in its window only."""
    renewal = config.renewal
    return Policy(
        cas=tuple(ca.server for ca in ordered(config.cas, identity)),
        at=renewal.at,
        spread=renewal.spread,
        certificates_per_day=renewal.certificates_per_day,
        submissions_per_day=renewal.submissions_per_day,
        pending_s=renewal.pending_days * DAY_S,
        settle_s=config.agent.settle_s,
        opens=_opens(root, config.agent.restart_window, now) if root else 0,
        new_key=config.agent.key == "new",
    )


def _opens(root: Root, windows: Tuple[Tuple[int, int], ...], now: int) -> int:
    """Return when the restart window opens; what the time on the wall rests on is noted."""
    if windows:
        Root("/", notes=root.notes).resolve("/etc/localtime")
        if "TZ" in os.environ:
            root.notes.looked["TZ"] = None  # the timer's run has none, so this answer is not for it
    return pace.opens(windows, now, time.localtime)


def inputs_of(config: Config, spec: RequestSpec, spki: str) -> str:
    """Hash what a request is made from: other inputs may have another outcome."""
    text = json.dumps([asdict(spec), spki, [asdict(ca) for ca in config.cas], config.agent.minimum_key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _notes(
    root: Root, store: Store, config: Config, certificates: Tuple[bytes, ...], spec: RequestSpec
) -> Tuple[str, ...]:
    notes = verify.warnings(certificates[0], spec, rules_of(config.cas[0], config)) if certificates else ()
    return tuple(filter(None, (*notes, naming.renamed(root, config, store.journal))))


def _ca_notes(
    root: Root, journal: j.Journal, config: Config, generations: Tuple[Generation, ...], now: int
) -> Tuple[str, ...]:
    """Say what will matter at the next renewal, as seen when the CA was asked last."""
    notes = []
    for ca in config.cas:
        contact = next((contact for contact in journal.contacts if contact.ca == ca.server), None)
        own = [one for one in generations if one.origin.ca == ca.server]
        if contact is None or not contact.issuer or not own:
            continue
        mended = root.resolve(ca.issuer_trust).mtime_ns // 10**9 > contact.at  # seen again when the CA is asked next
        known = {hashlib.sha256(der).hexdigest() for der in (*known_chains(generations), *sum(trust(root, ca), ()))}
        if not contact.trusted and not mended:
            notes.append(
                f"the CA certificate of {ca.server} leads to no root in {ca.issuer_trust} any more, so renewal would be refused; "
                "compare its fingerprint (scx-enroll ca-cert --fetch), then add the new root there and to the Management Servers"
            )
        elif contact.trusted and contact.issuer not in known:
            notes.append(
                f"{ca.server} signs with a new CA certificate now, SHA-256 {contact.issuer}; import it on every Management Server "
                "before the next renewal: scx-enroll ca-cert --fetch"
            )
        if contact.ends - now < _lifetime_s(own[-1]):
            notes.append(f"the CA certificate of {ca.server}, or one above it, ends soon and shortens what it issues: have it renewed")
    return tuple(notes)


def _lifetime_s(generation: Generation) -> int:
    facts = verify.facts(stored(generation)[0])
    return facts.not_after - facts.not_before
