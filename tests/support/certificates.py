"""A certificate authority of a test, and a certificate of it for servers on this machine."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

AUTHORITY = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority of a test")])
SERVER = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server of a test")])
NAMES = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]


def local_tls(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Return the file of a new authority, and the context of a server with a certificate of it."""
    issuing, serving = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate(AUTHORITY, issuing, issuing, x509.BasicConstraints(ca=True, path_length=0))
    certificate = _certificate(SERVER, serving, issuing, x509.SubjectAlternativeName(NAMES))
    trusted, own = folder / "authority.pem", folder / "server.pem"
    trusted.write_bytes(authority.public_bytes(Encoding.PEM))
    private = serving.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    own.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    return trusted, context


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder(AUTHORITY, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1))
        .not_valid_after(datetime(9999, 12, 31))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(issuer, hashes.SHA256())
    )
