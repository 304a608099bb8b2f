"""The certificate that is kept: used again only while it is good, and nobody else could read its key."""

from __future__ import annotations

import datetime
import os
import random
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moshi_mlx_app.server import certificates

from moshi_mlx.errors import ConfigError

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, password: bytes = b"") -> bytes:
    lock: Any = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, lock) + certificate.public_bytes(
        serialization.Encoding.PEM
    )


def made(key: ec.EllipticCurvePrivateKey, *, names: bool = True, begins: datetime.datetime = NOW - DAY) -> Any:
    """A certificate for this machine's own names."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "moshi")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begins).not_valid_after(begins + 90 * DAY)
    if names:
        entries = [certificates._name(each) for each in ("localhost", "127.0.0.1", "::1")]
        builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=False)
    return builder.sign(key, hashes.SHA256())


def others_may_read(path: Path) -> None:
    path.chmod(0o644)


def of_another_key(path: Path) -> None:
    path.write_bytes(pem(ec.generate_private_key(ec.SECP256R1()), made(ec.generate_private_key(ec.SECP256R1()))))


def with_(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        path.write_bytes(pem(key, made(key, **options)))

    return write


def locked(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(pem(key, made(key), b"secret"))


@pytest.mark.parametrize(
    "spoil",
    [
        others_may_read,
        of_another_key,
        with_(names=False),
        with_(begins=NOW + DAY),
        with_(begins=NOW - 100 * DAY),
        locked,
    ],
    ids=["others may read it", "of another key", "without names", "not yet valid", "expired", "key with a password"],
)
def test_what_cannot_be_used_is_made_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """If it fails, a key that others could read goes on protecting the talk, or --tls ends in a traceback."""
    certificates.own("localhost", tmp_path)
    path = tmp_path / "certificate.pem"
    spoil(path)
    before = path.read_bytes()
    _, fingerprint = certificates.own("localhost", tmp_path)
    assert path.read_bytes() != before and path.stat().st_mode & 0o777 == 0o600
    assert certificates.own("localhost", tmp_path)[1] == fingerprint
    assert sorted(os.listdir(tmp_path)) == ["certificate.pem"]


def test_one_that_is_good_is_kept(tmp_path: Path) -> None:
    """If it fails, the test above passes because nothing is ever kept."""
    path = tmp_path / "certificate.pem"
    with_()(path)
    path.chmod(0o600)
    before = path.read_bytes()
    certificates.own("localhost", tmp_path)
    assert path.read_bytes() == before


def test_mutated(tmp_path: Path) -> None:
    """If it fails, one changed byte in the file ends --tls in a traceback."""
    certificates.own("localhost", tmp_path)
    path, rng = tmp_path / "certificate.pem", random.Random(7)
    good = path.read_bytes()
    for _ in range(int(os.environ.get("MOSHI_MUTATIONS", "60"))):
        content = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(content))
            how = rng.randrange(3)
            if how == 0:
                content[place] = rng.randrange(256)
            elif how == 1:
                del content[place : place + rng.randrange(1, 80)]
            else:
                content[place:place] = content[place : place + rng.randrange(80)]
        path.write_bytes(content)
        context, _ = certificates.own("localhost", tmp_path)
        assert isinstance(context, ssl.SSLContext)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    """If it fails, a copy of the key stays behind under another name, or the reason is a bare "Is a directory"."""
    (tmp_path / "certificate.pem" / "inside").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"certificate\.pem is a folder: move it away"):
        certificates.own("localhost", tmp_path)
    assert os.listdir(tmp_path) == ["certificate.pem"]


def test_no_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, a key that could not be put in its place stays behind under another name."""

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificates.os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        certificates.own("localhost", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_given_key_with_a_password(tmp_path: Path) -> None:
    """If it fails, a server that was started without a terminal waits for a password that nobody types."""
    path = tmp_path / "mine.pem"
    locked(path)
    with pytest.raises(ConfigError, match=r"the key in .*mine\.pem has a password"):
        certificates.given(str(path), None)
