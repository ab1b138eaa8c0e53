#!/bin/sh
# What people write with openssl and curl. Nothing is verified.
# FQDN KEY CERTIFICATE LINK SERVER USER PASSWORD-FILE SERVER-TRUST TEMPLATE [SCXADMIN]
set -eu
fqdn=$1 key=$2 certificate=$3 link=$4 server=$5 account=$6:$(cat "$7") trust=$8 template=$9
shift 9
csr=$(openssl req -new -sha256 -key "$key" -subj "/CN=$fqdn" -addext "subjectAltName=DNS:$fqdn")
page=$(curl -sSf --cacert "$trust" -u "$account" --data-urlencode "CertRequest=$csr" --data-urlencode "CertAttrib=CertificateTemplate:$template" \
    -d Mode=newreq -d TargetStoreFlags=0 -d SaveCert=yes "https://$server/certsrv/certfnsh.asp")
id=$(printf '%s\n' "$page" | sed -n 's/.*certnew\.cer?ReqID=\([0-9]*\)&.*/\1/p' | head -n 1)
curl -sSf --cacert "$trust" -u "$account" -o "$certificate" "https://$server/certsrv/certnew.cer?ReqID=$id&Enc=b64"
ln -sfn "${certificate##*/}" "$link.new"
mv -T "$link.new" "$link"
if [ $# -gt 0 ]; then "$1" -restart; fi
