"""Encryption: a given certificate, or one made here and kept, so that a browser asks only once whether to trust it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
import sys
from pathlib import Path
from typing import Any

from moshi_mlx.errors import ConfigError

from .hosts import own_names

__all__ = ["given", "own"]

_DAYS = 397  # browsers refuse certificates that last longer
_RENEW_BEFORE = datetime.timedelta(days=7)


def given(certificate: str, key: str | None) -> ssl.SSLContext:
    """Encryption with files that someone has.

    Parameters
    ----------
    certificate : str
        PEM file, with the chain behind it.
    key : str or None
        PEM file; None: it is in the same file.

    Raises
    ------
    ConfigError
        If they are damaged or do not belong together, or the key has a password.
    OSError
        If they cannot be read.
    """
    for path in (certificate, key):
        if path is not None:
            open(path, "rb").close()  # ssl's own complaint names no file

    def locked() -> str:
        raise ConfigError(
            f"the key in {key or certificate} has a password: give one without, as openssl pkey writes it"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, locked)  # without the last, ssl asks on the terminal
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate}{f' and {key}' if key else ''} cannot be used: {error.reason or error}. Both are PEM files, "
            "and the key is the one that the certificate was made for"
        ) from error
    return context


def own(host: str, folder: Path | None = None) -> tuple[ssl.SSLContext, str]:
    """Encryption with a certificate made here, for this machine's names and ``host``.

    Parameters
    ----------
    host : str
        What the server listens on.
    folder : Path, optional
        Where it is kept; by default where programs of this system keep such things.

    Returns
    -------
    context : ssl.SSLContext
    fingerprint : str
        SHA-256 of the certificate: a browser that asks shows the same.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    folder = _state_folder() if folder is None else folder
    path = folder / "certificate.pem"
    names = own_names(host)
    kept = _kept(path, names)
    if kept is None:
        _make(path, names)
        kept = given(str(path), None), x509.load_pem_x509_certificate(path.read_bytes())
    context, certificate = kept
    fingerprint = ":".join(f"{byte:02X}" for byte in certificate.fingerprint(hashes.SHA256()))
    return context, fingerprint


def _kept(path: Path, names: list[str]) -> tuple[ssl.SSLContext, Any] | None:
    """What is there, if nobody else could read the key, both belong together, and it is valid, for these names."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077 or about.st_uid != os.geteuid():
            return None
        content = path.read_bytes()
        key, certificate = load_pem_private_key(content, None), x509.load_pem_x509_certificate(content)
        there = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        now = datetime.datetime.now(datetime.timezone.utc)
        good = (
            key.public_key() == certificate.public_key()
            and certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc - _RENEW_BEFORE
            and set(names) <= {str(entry.value) for entry in there}
        )
        return (given(str(path), None), certificate) if good else None
    except Exception:  # cryptography and ssl have many for what is damaged: another is made then
        return None


def _make(path: Path, names: list[str]) -> None:
    """Write key and certificate into one file that only its owner can read."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "moshi-mlx-local")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: move it away, the certificate of this server is kept under that name")
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _name(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _state_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "moshi-mlx-local"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moshi-mlx-local"
