"""Certificates and keys: who the server is, and which sites may join."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from idiolect.core.errors import UsageError

SERVER = ("ca.crt", "ca.key", "server.crt", "server.key")
DAYS = 365


def make_server(folder: Path, hosts: Sequence[str], days: int = DAYS) -> list[Path]:
    """Make an authority of one's own and the server's certificate, which it signs.

    Args:
        folder: takes `ca.crt`, which every site needs; `ca.key`, which nobody needs but for a new certificate;
            `server.crt` and `server.key`. Private keys are readable by their owner alone.
        hosts: names and addresses under which sites reach the server.
        days: how long both are valid.

    Raises:
        UsageError: if one of the files is there already: nothing is overwritten.

    Example:
        >>> import tempfile
        >>> [path.name for path in make_server(Path(tempfile.mkdtemp()), ["127.0.0.1"])]
        ['ca.crt', 'ca.key', 'server.crt', 'server.key']
    """
    paths = [_new(folder / name) for name in SERVER]
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    now = datetime.now(UTC)

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(name("idiolect authority"))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))
        mine = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        return builder.add_extension(mine, critical=False)

    signs = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    root = certificate(name("idiolect authority"), authority)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    root = root.add_extension(signs, critical=True)
    names = [_host(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    leaf = certificate(name(hosts[0]), server)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    pem = [builder.sign(authority, hashes.SHA384()) for builder in (root, leaf)]
    _write(paths[0], _certificate(pem[0]), 0o644)
    _write(paths[1], _private(authority, serialization.PrivateFormat.PKCS8), 0o600)
    _write(paths[2], _certificate(pem[1]), 0o644)
    _write(paths[3], _private(server, serialization.PrivateFormat.PKCS8), 0o600)
    return paths


def make_site(folder: Path, name: str) -> list[Path]:
    """Make a site's key: `NAME.key` stays with the site, `NAME.pub` goes to the coordinator, whom it lets in.

    Raises:
        UsageError: if one of the files is there already.
    """
    private, public = _new(folder / f"{name}.key"), _new(folder / f"{name}.pub")
    key = ec.generate_private_key(ec.SECP384R1())
    _write(private, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, text + b"\n", 0o644)
    return [private, public]


def fingerprint(public: str) -> str:
    """Return the SHA-256 of a public key, as ``ssh-keygen -l`` does: to be read out on the telephone.

    Example:
        >>> fingerprint("ecdsa-sha2-nistp384 AAAA north")[:12]
        'SHA256:cJ6Ay'
    """
    words = public.split()
    try:
        digest = hashlib.sha256(base64.b64decode(words[1], validate=True)).digest()
    except (IndexError, ValueError):
        return "no key in OpenSSH's form"
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey, layout: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, layout, serialization.NoEncryption())


def _new(path: Path) -> Path:
    if path.exists():
        raise UsageError(f"{path} exists, and a key is never overwritten: move it away, or give another folder")
    return path


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
