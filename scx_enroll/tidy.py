"""Clears up when nothing is left to do: what killed runs and lost journals leave, in the agent's folders and among our keys."""

from scx_enroll import agent as agents
from scx_enroll import pairs
from scx_enroll.agent import Agent, Pair
from scx_enroll.case import Observed
from scx_enroll.durable import TEMPORARY
from scx_enroll.places import signature
from scx_enroll.store import Store


def drop_keys(store: Store, seen: Observed) -> None:
    """Remove the keys that wait for nothing any more: what was asked for last counts."""
    newest = max((held for held in seen.held if not held.revoked), key=lambda held: held.number, default=None)
    wanted = {newest.key if newest else "", store.journal.request.spki}
    if store.kept_keys() - (wanted - {seen.key}):
        store.drop_keys(frozenset(wanted - {seen.key}))


def clear(store: Store, agent: Agent, pair: Pair, seen: Observed) -> None:
    """Remove temporaries, keys that nothing waits with, the shape of a change of the key; the package's marker beside what is ours.

    With that marker the next upgrade of scx would move a pair aside that is not the package's any more.
    """
    root, beside = store.root, store.beside
    if beside.has_strays(agent.certificate):
        beside.sweep(agent.certificate, (pair.name.text.rpartition("/")[2],))
    if beside.has_strays(agent.key):  # its folder may be another one: nothing else there is ours
        folder = agent.key.rpartition("/")[0]
        beside.sweep(agent.key, tuple(name for name in root.listdir(folder) if not name.startswith(TEMPORARY)))
    drop_keys(store, seen)
    names = pairs.Names(agent.certificate, agent.key, (0, 0))
    if pairs.are_through(root, names):
        pairs.straighten(store, names)
        store.update(seen=signature(agents.read_pair(root, agent)))
    ours = seen.certificate in [held.leaf for held in seen.held if not held.mismatches]
    if ours and agent.marker and root.entry(agent.marker).kind == "file":
        beside.set_marker(agent.marker, present=False)
    if beside.has_pairs(agent.certificate) and not pairs.are_through(root, names):  # of a run that was killed, or another machine's
        beside.remove_pairs(agent.certificate)
