"""What TLS and node authentication need: a certificate authority, the SuperLink's certificate, a key pair a SuperNode.

    python examples/deployment/keys.py FOLDER --host NAME_OR_ADDRESS --nodes 3

An organisation that has an authority of its own takes its certificates instead; only the nodes' keys are Flower's.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

DAYS = datetime.timedelta(days=365)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="under which the nodes reach the SuperLink")
    parser.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = certificate("sam_ds federation", authority, authority, "sam_ds federation", [])
    write(options.folder / "ca.pem", root.public_bytes(Encoding.PEM))
    # The processes of the SuperLink itself reach it by the loopback address.
    hosts = list(dict.fromkeys([options.host, "127.0.0.1", "localhost"]))
    signed = certificate(options.host, server, authority, "sam_ds federation", hosts)
    write(options.folder / "server.pem", signed.public_bytes(Encoding.PEM))
    write(options.folder / "server.key", private(server, PrivateFormat.PKCS8))
    for node in range(options.nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        write(options.folder / f"node-{node}", private(key, PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write(options.folder / f"node-{node}.pub", public + b"\n")


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, issuer: str, hosts: list[str]
) -> x509.Certificate:
    """A certificate for a server at these hosts, or for an authority where there is none."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + DAYS)
        .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )  # fmt: skip
    if hosts:
        names = [x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host)
                 for host in hosts]  # fmt: skip
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    else:
        builder = builder.add_extension(x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_agreement=False,
            key_encipherment=False, data_encipherment=False, encipher_only=False, decipher_only=False,
        ), critical=True)  # fmt: skip
    return builder.sign(signer, hashes.SHA384())


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def write(path: Path, data: bytes) -> None:
    """For this user's eyes only, from the first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


if __name__ == "__main__":
    main()
