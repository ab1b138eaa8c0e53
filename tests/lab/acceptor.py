"""Judges what clients sign in with, as a process of its own: the libraries for it are another Python's, or settle things by environment.

    /usr/bin/python3 -I acceptor.py kerberos    Kerberos, bare or in SPNEGO; needs gssapi
    python3 -I acceptor.py ntlm                 NTLM, bare or in SPNEGO; needs pyspnego, and accounts in $NTLM_USER_FILE

Each line of standard input is a question in JSON, each line of standard output the answer to it; it ends with its input. A question
holds `connection`, a number that tokens of one conversation have in common; `token`; `bindings`, the channel's own, or "" where
nobody looks at them; `require`, whether a client may leave them out; `keytab`. Bytes are base64. With `end` a conversation is over.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from typing import Any, Callable, Dict, Mapping

DELEGATED, MUTUAL, BOUND = 0x1, 0x2, 0x800  # GSS_C_DELEG_FLAG, GSS_C_MUTUAL_FLAG, GSS_C_CHANNEL_BOUND_FLAG
UNBOUND = bytes(16)  # what NTLM clients that know no channel may send

Contexts = Dict[int, Any]
Answer = Dict[str, Any]


def kerberos(question: Mapping[str, Any], contexts: Contexts) -> Answer:
    """Take one step; the token of an answer with an error is what tells the client about it."""
    import gssapi
    from gssapi.raw import ChannelBindings

    token = b""
    try:
        context = contexts.pop(question["connection"], None)
        if context is None:
            own = _bytes(question["bindings"])
            bindings = ChannelBindings(application_data=own) if own else None
            # read anew each time: a service's keytab is replaced while it runs
            credentials = gssapi.Credentials(usage="accept", store={"keytab": f"FILE:{question['keytab']}"})
            context = gssapi.SecurityContext(creds=credentials, usage="accept", channel_bindings=bindings)
        token = context.step(_bytes(question["token"])) or b""
        done = context.complete  # raises what went wrong where there is a token about it
    except gssapi.exceptions.GSSError as error:
        return {"error": " ".join(str(error).split()), "token": _text(token)}
    if not done:
        contexts[question["connection"]] = context
        return {"error": "", "token": _text(token), "done": False}
    flags = int(context.actual_flags)
    found = {
        "error": "", "token": _text(token), "done": True, "account": str(context.initiator_name), "bound": bool(flags & BOUND),
        "delegated": bool(flags & DELEGATED), "mutual": bool(flags & MUTUAL),
    }  # fmt: skip
    # to MIT's library bindings that the client left out are none that are wrong
    return _refused(found) if question["require"] and not flags & BOUND else found


def ntlm(question: Mapping[str, Any], contexts: Contexts) -> Answer:
    """Take one step, the first or the second of two."""
    import spnego
    from spnego.channel_bindings import GssChannelBindings

    given, own = _bytes(question["token"]), _bytes(question["bindings"])
    context = contexts.pop(question["connection"], None)
    try:
        bound = False
        sent = _sent_bindings(given)
        if sent is not None:
            bound = bool(own) and sent != UNBOUND
        # the library judges the bindings, but takes 16 zero bytes for right and none for wrong
        bindings = GssChannelBindings(application_data=own) if bound else None
        if context is None:
            options = spnego.NegotiateOptions
            bare = given.startswith(b"NTLMSSP\0")
            context = spnego.server(protocol="ntlm", options=options.use_ntlm) if bare else spnego.server(options=options.use_negotiate)
        token = context.step(given, channel_bindings=bindings) or b""
    except (spnego.exceptions.SpnegoError, ValueError, KeyError) as error:
        return {"error": " ".join(str(error).split()), "token": ""}
    if not context.complete:
        contexts[question["connection"]] = context
        return {"error": "", "token": _text(token), "done": False}
    account = str(context.client_principal)
    found = {"error": "", "token": _text(token), "done": True, "account": account, "bound": bound, "delegated": False, "mutual": False}
    return _refused(found) if question["require"] and not bound else found


def _sent_bindings(token: bytes) -> Any:
    """Return the 16 bytes of bindings in an AUTHENTICATE_MESSAGE; None where it holds none, and for other messages."""
    from spnego._ntlm_raw.messages import Authenticate, AvId, NTClientChallengeV2

    start = token.find(b"NTLMSSP\0\3\0\0\0")
    response = Authenticate.unpack(token[start:]).nt_challenge_response if start >= 0 else None
    if not response or len(response) <= 24:
        return None
    return NTClientChallengeV2.unpack(response[16:]).av_pairs.get(AvId.channel_bindings)


def _refused(found: Answer) -> Answer:
    return {**found, "error": "the client sent no channel bindings", "token": ""}


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def main() -> int:
    """Answer until there is no more to read."""
    judge: Callable[[Mapping[str, Any], Contexts], Answer] = {"kerberos": kerberos, "ntlm": ntlm}[sys.argv[1]]
    contexts: Contexts = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "end" in question:
            contexts.pop(question["end"], None)
            continue
        try:
            answer = judge(question, contexts)
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asked is told
            answer = {"error": f"the acceptor failed: {error!r}", "token": ""}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
