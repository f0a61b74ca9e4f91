"""Certificates and tokens: who may speak on the data plane.

A run has one certificate authority. Every edge server, device and server app gets a certificate
from it, whose common name is its identity; both ends of a link check the other's (mutual TLS).
A session is opened with a random token besides, which the device must present.

Keys are ECDSA on P-256. Key files are readable by their owner only.
"""

from __future__ import annotations

import datetime as dt
import hmac
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsys.errors import SecurityError

Role = Literal["server", "client", "both"]

_CLOCK_SKEW: Final = dt.timedelta(minutes=5)
_USAGES: Final = {
    "server": [ExtendedKeyUsageOID.SERVER_AUTH],
    "client": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "both": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}


def new_token() -> str:
    """Return 256 random bits as 43 characters that are safe in URLs and file names."""
    return secrets.token_urlsafe(32)


def same_token(presented: str, expected: str) -> bool:
    """Compare two tokens in a time that does not depend on where they differ."""
    return hmac.compare_digest(presented.encode(), expected.encode())


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one end of a link needs for mutual TLS, each part in PEM.

    Attributes:
        ca: Certificate of the authority that the peer's certificate must come from.
        certificate: This end's certificate; its common name is the identity the peer sees.
        key: This end's private key.
    """

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Identity of the holder: the common name of the certificate."""
        return _common_name(_parse(self.certificate, "certificate"))

    def save(self, folder: Path) -> None:
        """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` (mode 0600) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.pem").write_bytes(self.ca)
        (folder / "cert.pem").write_bytes(self.certificate)
        _write_key(folder / "key.pem", self.key)

    @classmethod
    def load(
        cls, folder: Path, *, role: Role = "client", now: dt.datetime | None = None
    ) -> Credentials:
        """Read what `save` wrote, or three files of the same names, and check them.

        Raises:
            SecurityError: A file is missing or is not accepted by `check`.
        """
        credentials = cls(*(_read(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")))
        check(credentials, role=role, now=now)
        return credentials


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def create(cls, name: str = "fedsys", *, days: int = 365) -> Authority:
        """Return a new authority whose certificate holds for `days` days."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        certificate = (
            _builder(_name(name), _name(name), public, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))

    def issue(
        self, name: str, hosts: Sequence[str] = (), *, role: Role = "client", days: int = 90
    ) -> Credentials:
        """Return credentials for one holder.

        Args:
            name: Identity; the common name of the certificate.
            hosts: DNS names and IP addresses at which a server is dialled. A client needs none.
            role: What the certificate is good for.
            days: Validity from now.

        Raises:
            SecurityError: A server without hosts, or an empty name.
        """
        if not name:
            raise SecurityError("name='': a certificate needs a name, the identity of its holder")
        if role != "client" and not hosts:
            raise SecurityError(f"hosts=[]: the certificate of server {name!r} must name its hosts")
        ca = _parse(self.certificate, "CA certificate")
        ca_key = _parse_key(self.key)
        key = ec.generate_private_key(ec.SECP256R1())
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        builder = (
            _builder(_name(name), ca.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USAGES[role]), critical=False)
            .add_extension(authority_id, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(ca_key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Credentials(self.certificate, pem, _pem(key))

    def save(self, folder: Path) -> None:
        """Write ``ca.pem`` and ``ca-key.pem`` (mode 0600) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.pem").write_bytes(self.certificate)
        _write_key(folder / "ca-key.pem", self.key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read what `save` wrote.

        Raises:
            SecurityError: A file is missing or unreadable.
        """
        authority = cls(_read(folder / "ca.pem"), _read(folder / "ca-key.pem"))
        certificate, key = _parse(authority.certificate, "ca.pem"), _parse_key(authority.key)
        if certificate.public_key() != key.public_key():
            raise SecurityError(f"{folder}: ca-key.pem is not the key of ca.pem")
        return authority


def check(
    credentials: Credentials, *, role: Role = "client", now: dt.datetime | None = None
) -> None:
    """Check what a peer would check, so that a mistake is told at the start and in words.

    Args:
        credentials: What this end is about to use.
        role: What the certificate must be good for.
        now: The time to check for; by default the present.

    Raises:
        SecurityError: Not yet or no longer valid, of another authority, for another role, without
            the names of hosts, or with a key of another certificate.
    """
    now = now or dt.datetime.now(dt.UTC)
    ca = _parse(credentials.ca, "CA certificate")
    certificate = _parse(credentials.certificate, "certificate")
    who = f"certificate of {_common_name(certificate)!r}"
    for what, one in (("CA certificate", ca), (who, certificate)):
        if now < one.not_valid_before_utc:
            raise SecurityError(
                f"{what}: not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
                "check the clock of this machine"
            )
        if now > one.not_valid_after_utc:
            raise SecurityError(
                f"{what}: expired on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; issue a new one"
            )
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise SecurityError(
            f"{who}: not issued by the authority {_common_name(ca)!r}; use certificates of one "
            "authority on both sides"
        ) from error
    if certificate.public_key() != _parse_key(credentials.key).public_key():
        raise SecurityError(f"{who}: the private key belongs to another certificate")
    _check_extensions(certificate, who, role)


def _check_extensions(certificate: x509.Certificate, who: str, role: Role) -> None:
    extensions = {type(extension.value) for extension in certificate.extensions}
    if x509.ExtendedKeyUsage in extensions:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if not set(_USAGES[role]) <= set(usage):
            raise SecurityError(f"{who}: not issued for the role {role!r}; issue one that is")
    if role != "client" and x509.SubjectAlternativeName not in extensions:
        raise SecurityError(f"{who}: names no host; issue it with the hosts that are dialled")


def holder_of(certificate: bytes) -> str:
    """Return the common name of a certificate in DER.

    Raises:
        SecurityError: It cannot be read.
    """
    try:
        return _common_name(x509.load_der_x509_certificate(certificate))
    except ValueError as error:
        raise SecurityError(f"the certificate of the peer cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------------
# PEM and X.509


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _parse(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise SecurityError(f"the {what} is not a certificate in PEM: {error}") from error


def _parse_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise SecurityError("the private key is not an unencrypted key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SecurityError("the private key must be an elliptic-curve key, as fedsys issues them")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecurityError(
            f"{path}: {error.strerror or error}; issue credentials first"
        ) from error


def _write_key(path: Path, key: bytes) -> None:
    # Created with its final mode: at no time can another user open it.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
