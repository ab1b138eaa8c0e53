"""The trust that Management Servers need: the roots for the store Root, and the intermediates for the store CA.

What stands in `issuer-trust` is trusted, and so is what leads there. What a CA itself sends is not: its fingerprints are
for a person to compare.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Callable, Dict, List, Tuple

from scx_enroll import observe, verify
from scx_enroll.acquire import Acquisition
from scx_enroll.begin import config_of, locked, site_of
from scx_enroll.config import CA
from scx_enroll.errors import ConfigError, EnrollError
from scx_enroll.job import Options, Tools
from scx_enroll.outcomes import Authority
from scx_enroll.rootfs import Root
from scx_enroll.store import Generation

MAX_FILE_NAME = 40  # characters of a proposed file name; ours


@dataclass(frozen=True)
class Trusted:
    """One certificate to import: the Windows store it belongs into, a file name for it, and whether it is known to be right."""

    store: str  # "Root" | "CA"
    file: str
    der: bytes
    facts: verify.Facts
    sha1: str  # hex; Windows calls it the thumbprint
    trusted: bool


def known(root: Root, cas: Tuple[CA, ...], generations: Tuple[Generation, ...]) -> Tuple[Trusted, ...]:
    """Return what the host trusts and knows already: nobody is asked. Raises ConfigError where issuer-trust can't be used."""
    found: List[Trusted] = []
    for ca in cas:
        anchors, intermediates = observe.trust(root, ca)
        pool = (*intermediates, *observe.known_chains(generations))
        found += [_entry("Root", der, trusted=True) for der in anchors]
        found += [_entry("CA", der, trusted=True) for der in pool if verify.leads_to((der, *pool), anchors)]
    return _distinct(found)


def fetched(root: Root, cas: Tuple[CA, ...], ask: Callable[[CA], Authority]) -> Tuple[Tuple[Trusted, ...], Tuple[EnrollError, ...]]:
    """Return what the CAs send as their own chains, and what went wrong; what leads to no root of issuer-trust is not trusted yet."""
    found: List[Trusted] = []
    failures: List[EnrollError] = []
    for ca in cas:
        try:
            newest, *rest = ask(ca).chain
        except EnrollError as problem:
            failures.append(problem)
            continue
        try:
            anchors, intermediates = observe.trust(root, ca)
        except ConfigError:  # that file is what is being made
            anchors, intermediates = (), ()
        top, _ = verify.split_trust(b"".join(map(verify.pem, (newest, *rest))), ca.server)
        roots = [der for der in top if verify.leads_to((newest, *rest), (der,))]
        found += [_entry("Root", der, trusted=der in anchors) for der in roots]
        way = [der for der in (newest, *verify.chain(newest, (*rest, *intermediates))) if der not in top]
        found += [_entry("CA", der, trusted=verify.leads_to((der, *rest, *intermediates), anchors)) for der in way]
    return _distinct(found), tuple(failures)


def show(
    root: Root, options: Options, tools: Tools, name: str, *, fetch: bool
) -> Tuple[Tuple[Trusted, ...], Tuple[EnrollError, ...]]:
    """Return what to import, of every CA or of the one called `name`, and what went wrong. With `fetch` the CA is asked."""
    config = config_of(root, options)
    if not fetch:
        site = site_of(root, tools)
        return known(root, _chosen(Acquisition(site, config, tools.line), name), site.store.generations()), ()
    with locked(root, options, tools) as site:
        acquisition = Acquisition(site, config, tools.line)
        return fetched(root, _chosen(acquisition, name), acquisition.authority)


def _chosen(acquisition: Acquisition, name: str) -> Tuple[CA, ...]:
    server = acquisition.server_of(name)
    return tuple(ca for ca in acquisition.config.cas if server in ("", ca.server))


def _entry(store: str, der: bytes, *, trusted: bool) -> Trusted:
    facts = verify.facts(der)
    common = re.search(r"CN=((?:[^,\\]|\\.)*)", facts.subject)
    name = re.sub("[^a-z0-9]+", "-", (common[1] if common else facts.subject).lower()).strip("-")[:MAX_FILE_NAME]
    return Trusted(store, f"{name or 'ca'}-{facts.leaf[:8]}.cer", der, facts, hashlib.sha1(der).hexdigest(), trusted)  # noqa: S324 - Windows' name for it


def _distinct(found: List[Trusted]) -> Tuple[Trusted, ...]:
    """Return each certificate once, roots first."""
    once: Dict[Tuple[str, bytes], Trusted] = {}
    for one in sorted(found, key=lambda one: (one.store != "Root", not one.trusted)):
        once.setdefault((one.store, one.der), one)
    return tuple(once.values())
