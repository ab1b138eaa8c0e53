"""Shows the certificate that a TLS server sends, as anybody on the network sees it: `python -m tests.look [HOST:]PORT`.

It shares nothing with the program, so that it can contradict it. Nothing is verified: the agent's own certificate could not be.
"""

import contextlib
import hashlib
import os
import socket
import ssl
import sys
import tempfile


def served(port, host="127.0.0.1", timeout=5.0):
    """Return the DER of the leaf that is served, None where nothing listens or answers TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout) as plain, context.wrap_socket(plain) as connection:
            der = connection.getpeercert(binary_form=True)
            with contextlib.suppress(OSError):  # the agent never answers close_notify
                connection.unwrap()
            return der
    except OSError:
        return None


def described(der):
    """Return subject, issuer, DNS names, dates and SHA-256 as lines of text.

    OpenSSL reads it (by way of ssl's own test function): libraries with strict parsers refuse the agent's own certificate,
    which says version 1 and has extensions.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(ssl.DER_cert_to_PEM_cert(der))
        file.flush()
        fields = ssl._ssl._test_decode_cert(file.name)
    names = [value for kind, value in fields.get("subjectAltName", ()) if kind == "DNS"]
    fingerprint = hashlib.sha256(der).hexdigest()
    return [
        f"subject  {_name(fields['subject'])}",
        f"issuer   {_name(fields['issuer'])}" + (" (self-signed)" if fields["issuer"] == fields["subject"] else ""),
        f"names    {', '.join(names) or 'none'}",
        f"valid    {fields['notBefore']} to {fields['notAfter']}",
        f"SHA-256  {fingerprint}",
    ]


def _name(parts):
    short = {"commonName": "CN", "domainComponent": "DC", "organizationName": "O", "countryName": "C"}
    return ", ".join(f"{short.get(kind, kind)}={value}" for part in reversed(parts) for kind, value in part)


def main(arguments):
    host, _, port = arguments[0].rpartition(":") if len(arguments) == 1 else ("", "", "")
    if not port.isdigit():
        sys.exit("usage: python -m tests.look [HOST:]PORT")
    der = served(int(port), host or "127.0.0.1")
    if der is None:
        sys.exit(f"nothing answers TLS on {arguments[0]}")
    sys.stdout.write("".join(line + os.linesep for line in described(der)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
