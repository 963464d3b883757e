"""Certificates of the server and keys of the sites."""

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

SERVER_FILES = ("ca.crt", "ca.key", "server.crt", "server.key")

VALID_DAYS = 365

_AUTHORITY = "idiolect authority"

_KEY_USAGE = x509.KeyUsage(
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
"""Key usage of the authority: it signs certificates."""


def make_server(folder: Path, hosts: Sequence[str], days: int = VALID_DAYS) -> list[Path]:
    """Create a certificate authority and a server certificate signed by it.

    Args:
        folder: folder for `ca.crt`, which every site needs; `ca.key`, needed only to sign another certificate;
            `server.crt` and `server.key`. Private keys are readable by their owner only.
        hosts: host names and addresses under which sites reach the server.
        days: how long both certificates are valid.

    Returns:
        The four files.

    Raises:
        UsageError: if one of the files exists; nothing is overwritten.

    Example:
        >>> import tempfile
        >>> [path.name for path in make_server(Path(tempfile.mkdtemp()), ["127.0.0.1"])]
        ['ca.crt', 'ca.key', 'server.crt', 'server.key']
    """
    paths = [_new(folder / name) for name in SERVER_FILES]
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = _certificate(_AUTHORITY, authority, authority, days)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    root = root.add_extension(_KEY_USAGE, critical=True)
    names = [_general_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    leaf = _certificate(hosts[0], server, authority, days)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    signed = [builder.sign(authority, hashes.SHA384()) for builder in (root, leaf)]
    _write(paths[0], signed[0].public_bytes(serialization.Encoding.PEM), 0o644)
    _write(paths[1], _private_bytes(authority, serialization.PrivateFormat.PKCS8), 0o600)
    _write(paths[2], signed[1].public_bytes(serialization.Encoding.PEM), 0o644)
    _write(paths[3], _private_bytes(server, serialization.PrivateFormat.PKCS8), 0o600)
    return paths


def make_site(folder: Path, name: str) -> list[Path]:
    """Create a site's key pair: `NAME.key` stays with the site, `NAME.pub` goes to the coordinator.

    Raises:
        UsageError: if one of the files exists; nothing is overwritten.
    """
    private, public = _new(folder / f"{name}.key"), _new(folder / f"{name}.pub")
    key = ec.generate_private_key(ec.SECP384R1())
    _write(private, _private_bytes(key, serialization.PrivateFormat.OpenSSH), 0o600)
    text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, text + b"\n", 0o644)
    return [private, public]


def fingerprint(public: str) -> str:
    """Return the SHA-256 fingerprint of a public key as ``ssh-keygen -l`` prints it, for people to compare.

    Example:
        >>> fingerprint("ecdsa-sha2-nistp384 AAAA north")[:12]
        'SHA256:cJ6Ay'
    """
    fields = public.split()
    try:
        digest = hashlib.sha256(base64.b64decode(fields[1], validate=True)).digest()
    except (IndexError, ValueError):
        return "not a public key in OpenSSH format"
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, authority: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    """Return an unsigned certificate of a key, issued by the authority."""

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(_AUTHORITY))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return builder.add_extension(issuer, critical=False)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_bytes(key: ec.EllipticCurvePrivateKey, layout: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, layout, serialization.NoEncryption())


def _new(path: Path) -> Path:
    if path.exists():
        raise UsageError(f"{path} exists, and keys are never overwritten: move it away, or use another folder")
    return path


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
