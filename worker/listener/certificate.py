"""The certificate of a worker's epoch.  Only its digest counts, which the worker publishes in Redis."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from worker.listener.protocol import Identity

NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loadstone worker")])


def self_signed() -> Identity:
    """Return a new key and a certificate of it, which is valid at any time: hosts' clocks may differ."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder(NAME, NAME, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1))
        .not_valid_after(datetime(9999, 12, 31))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(private + certificate.public_bytes(Encoding.PEM), certificate.fingerprint(hashes.SHA256()))
