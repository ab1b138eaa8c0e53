"""What people write with the certsrv library: a CSR from the agent's key, the certificate, the link, the restart. Nothing is verified."""

import json
import os
import subprocess
import sys

folder, facts = sys.argv[1:]
sys.path.insert(0, folder)

import certsrv  # noqa: E402 - from that folder, as the next ones
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.x509.oid import NameOID  # noqa: E402

with open(facts, encoding="utf-8") as file:
    given = json.load(file)
with open(given["key"], "rb") as file:
    key = serialization.load_pem_private_key(file.read(), None)
with open(given["password_file"], encoding="utf-8") as file:
    password = file.read().strip()
name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, given["fqdn"])])
builder = x509.CertificateSigningRequestBuilder().subject_name(name)
builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(given["fqdn"])]), critical=False)
csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
ca = certsrv.Certsrv(given["server"], given["user"], password, cafile=given["server_trust"])
certificate = ca.get_cert(csr, given["template"])
with open(given["certificate"], "wb") as file:
    file.write(certificate)
os.symlink(os.path.basename(given["certificate"]), given["link"] + ".new")
os.replace(given["link"] + ".new", given["link"])
if given["scxadmin"]:
    subprocess.run([given["scxadmin"], "-restart"], check=True)
