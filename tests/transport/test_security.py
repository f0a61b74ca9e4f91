import datetime as dt
import ipaddress
import os
import stat
import string

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from fedsys.errors import SecurityError
from fedsys.transport.security import Authority, Credentials, check, new_token, same_token

AUTHORITY = Authority.create("test authority", days=30)
EDGE = AUTHORITY.issue("edge-a", ["edge-a.example", "10.0.0.7", "::1"], role="server")
DEVICE = AUTHORITY.issue("device-7")


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


@pytest.mark.parametrize(
    "subject",
    [
        x509.DNSName("edge-a.example"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.7")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ],
)
def test_an_independent_verifier_accepts_the_server_for_each_of_its_hosts(subject):
    store = Store([parsed(AUTHORITY.certificate)])
    chain = (
        PolicyBuilder()
        .store(store)
        .build_server_verifier(subject)
        .verify(parsed(EDGE.certificate), [])
    )
    assert [c.subject for c in chain] == [
        parsed(EDGE.certificate).subject,
        parsed(AUTHORITY.certificate).subject,
    ]


def test_keys_are_p256_and_the_key_of_a_device_is_its_own():
    keys = [serialization.load_pem_private_key(c.key, None) for c in (EDGE, DEVICE)]
    assert all(isinstance(k, ec.EllipticCurvePrivateKey) for k in keys)
    assert all(k.curve.name == "secp256r1" for k in keys)  # type: ignore[union-attr]
    assert EDGE.key != DEVICE.key
    assert EDGE.ca == DEVICE.ca == AUTHORITY.certificate


def test_the_common_name_is_the_identity():
    assert (EDGE.name, DEVICE.name) == ("edge-a", "device-7")


def test_a_representation_does_not_show_the_key():
    assert "PRIVATE" not in repr(EDGE)
    assert "PRIVATE" not in repr(AUTHORITY)


@pytest.mark.parametrize(("credentials", "role"), [(EDGE, "server"), (DEVICE, "client")])
def test_what_the_authority_issued_is_accepted(credentials, role):
    check(credentials, role=role)


def test_a_certificate_for_both_roles_serves_both():
    both = AUTHORITY.issue("edge-b", ["edge-b"], role="both")
    for role in ("server", "client", "both"):
        check(both, role=role)  # type: ignore[arg-type]


def days_from_now(days: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def without_hosts() -> Credentials:
    """A server's certificate as other tools make them: with a common name only."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca = parsed(AUTHORITY.certificate)
    ca_key = serialization.load_pem_private_key(AUTHORITY.key, None)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edge-a")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(days_from_now(-1))
        .not_valid_after(days_from_now(1))
        .sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Credentials(
        AUTHORITY.certificate, certificate.public_bytes(serialization.Encoding.PEM), pem
    )


@pytest.mark.parametrize(
    ("make", "role", "now", "words"),
    [
        (lambda: DEVICE, "client", days_from_now(29 + 90), "expired on"),
        (lambda: AUTHORITY.issue("d", days=1), "client", days_from_now(2), "'d': expired on"),
        (lambda: DEVICE, "client", days_from_now(-1), "not valid before"),
        (lambda: DEVICE, "server", None, "not issued for the role 'server'"),
        (lambda: EDGE, "client", None, "not issued for the role 'client'"),
        (
            lambda: Credentials(Authority.create().certificate, DEVICE.certificate, DEVICE.key),
            "client",
            None,
            "not issued by the authority 'fedsys'",
        ),
        (
            lambda: Credentials(
                Authority.create("test authority").certificate, DEVICE.certificate, DEVICE.key
            ),
            "client",
            None,
            "not issued by the authority 'test authority'",
        ),
        (
            lambda: Credentials(DEVICE.ca, DEVICE.certificate, EDGE.key),
            "client",
            None,
            "belongs to another certificate",
        ),
        (lambda: Credentials(DEVICE.ca, b"junk", DEVICE.key), "client", None, "not a certificate"),
        (lambda: Credentials(DEVICE.ca, DEVICE.certificate, b"x"), "client", None, "not an unenc"),
        (without_hosts, "server", None, "names no host"),
    ],
)
def test_what_a_peer_would_refuse_is_refused_here_in_words(make, role, now, words):
    with pytest.raises(SecurityError, match=words):
        check(make(), role=role, now=now)


def test_a_server_needs_hosts_and_a_holder_needs_a_name():
    with pytest.raises(SecurityError, match="must name its hosts"):
        AUTHORITY.issue("edge-a", role="server")
    with pytest.raises(SecurityError, match="needs a name"):
        AUTHORITY.issue("")


def test_files_come_back_as_they_were_and_keys_are_for_their_owner_only(tmp_path):
    old = os.umask(0)
    try:
        AUTHORITY.save(tmp_path)
        EDGE.save(tmp_path / "edge-a")
        EDGE.save(tmp_path / "edge-a")  # again, over the first
    finally:
        os.umask(old)
    assert Authority.load(tmp_path) == AUTHORITY
    assert Credentials.load(tmp_path / "edge-a", role="server") == EDGE
    for path in (tmp_path / "ca-key.pem", tmp_path / "edge-a" / "key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_missing_and_mismatched_files_are_named(tmp_path):
    with pytest.raises(SecurityError, match=r"ca\.pem: No such file"):
        Credentials.load(tmp_path)
    AUTHORITY.save(tmp_path)
    (tmp_path / "ca.pem").write_bytes(Authority.create().certificate)
    with pytest.raises(SecurityError, match="is not the key of"):
        Authority.load(tmp_path)


def test_tokens_are_long_random_and_safe_in_urls():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    allowed = set(string.ascii_letters + string.digits + "-_")
    assert all(len(token) == 43 and set(token) <= allowed for token in tokens)


def test_tokens_compare_by_value():
    token = new_token()
    assert same_token("".join(list(token)), token)
    assert not same_token(token[:-1], token)
    assert not same_token("", token)
    assert not same_token("ü" * 43, token)
