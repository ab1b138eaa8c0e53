"""Takes over a request whose ID the operator knows: its answer was lost, or its record."""

from dataclasses import replace

from scx_enroll import journal as j
from scx_enroll import outcomes, verify
from scx_enroll.acquire import Acquisition, Want
from scx_enroll.errors import CARefused, CertificateRefused, UsageError


def adopt(acquisition: Acquisition, request_id: int, server: str, want: Want) -> None:
    """Take a request ID for what is wanted; afterwards it is obtained, or waited for.

    `server`: "" for the CA of the doubtful request, or the only one. Raises UsageError where it can't be meant,
    CertificateRefused for a certificate of another key, and what the CA says else; then nothing has changed. Of a pending
    request nobody can tell whose it is: it is waited for on the operator's word, who may name another one.
    """
    store = acquisition.store
    if store.journal.request.state == "submitting":
        acquisition.records.doubt("an earlier run was killed while it submitted a request", answered=False)
    entry = store.journal.request
    if entry.state == "submitted" and not entry.adopted and (entry.id, server or entry.ca) != (request_id, entry.ca):
        raise UsageError(f"request ID {entry.id} at {entry.ca} is waited for already, and it is this host's", "it goes on by itself")
    server = server or entry.ca or (acquisition.config.cas[0].server if len(acquisition.config.cas) == 1 else "")
    if not server:
        raise UsageError("several CAs are configured", "say at which one the request is: --ca NAME")
    if entry.ca and server != entry.ca:
        raise UsageError(f"the doubtful request was sent to {entry.ca}", f"look for it there; --ca may be left out, but is not {server}")
    if server not in [ca.server for ca in acquisition.config.cas]:
        raise UsageError(f"the request was sent to {server}, which is not configured any more", "put it back, then name the request ID")
    ca = acquisition.ca(server)
    acquisition.pool = acquisition.authority(ca).chain
    outcome = acquisition.connect(ca).fetch(request_id)
    what, look = f"request ID {request_id} at {server}", f"look on {server} for the right one: requester, time, and the names asked for"
    if isinstance(outcome, outcomes.Certificate) and verify.facts(outcome.leaf).spki != want.spki:
        subject = verify.facts(outcome.leaf).subject
        raise CertificateRefused(f"{what} is not for this key: its certificate is for {subject}; nothing was changed", look)
    known = next((held for held in want.held if (held.ca, held.request_id) == (server, request_id)), None)
    if isinstance(outcome, outcomes.Revoked) and known:
        acquisition.records.note_revoked(ca, known)
        return
    if not isinstance(outcome, (outcomes.Certificate, outcomes.Pending)):
        raise CARefused(f"{what} brings no certificate: {outcomes.sentence(outcome)}; nothing was changed", look)
    now = acquisition.site.clock()
    store.update(request=replace(
        entry, state=j.step(j.REQUEST, entry.state, "identified"), ca=server, id=request_id, spki=want.spki, inputs=want.inputs,
        since=now if entry.state == "none" else entry.since, next=0, why="", pending=False,
        adopted=entry.adopted if entry.state == "submitted" else True,
    ))
    acquisition.record(outcome, want, ca, posted=False)
