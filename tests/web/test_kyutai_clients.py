"""Kyutai's own clients hold a conversation with this server: its Python one as it is, its Rust one by its bytes."""

from __future__ import annotations

import asyncio
import os
import ssl
import struct
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.server import certificates
from moshi_mlx_app.server.connection import Talk

from .serving import FRAME, RATE, install, serving
from .test_talk import Reader

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sphn = pytest.importorskip("sphn")


def kyutai_python() -> str:
    """An interpreter that has Kyutai's client; empty if there is none."""
    places = [
        os.environ.get("REFERENCE_PYTHON", ""),
        ROOT / ".venv-client/bin/python",
        ROOT / ".venv-reference/bin/python",
    ]
    for place in [*map(str, places), sys.executable]:
        if place and Path(place).exists():
            # Found, not imported: the package itself would want PyTorch.
            look = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ('moshi', 'sphn', 'aiohttp'))))"
            if subprocess.run([place, "-c", look]).returncode == 0:
                return place
    return ""


def question(frames: int) -> np.ndarray:
    path = files("moshi_mlx") / "assets" / "questions.wav"
    return np.ascontiguousarray(soundfile.read(str(path), frames * FRAME, dtype="float32")[0])


def spoken_by(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the engine says from now on, frame by frame."""
    spoken: list[np.ndarray] = []
    tap = Talk._tap

    def keep(self, heard, frame) -> None:
        spoken.append(frame.pcm.copy())
        tap(self, heard, frame)

    monkeypatch.setattr(Talk, "_tap", keep)
    return spoken


def as_opus(frames: list[np.ndarray]) -> np.ndarray:
    """Frames after Opus, as this server's encoder and any decoder give them."""
    encoder, decoder = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    return np.concatenate([decoder.append_bytes(encoder.append_pcm(frame)) for frame in frames])


def against(got: np.ndarray, said: np.ndarray) -> tuple[int, float]:
    """The delay, in samples, at which ``got`` lies on ``said``, and the signal-to-noise ratio there, in dB."""
    count = min(len(got), len(said)) - 1000
    delay = int(np.argmax([float(np.dot(got[shift : shift + count], said[:count])) for shift in range(1000)]))
    error = got[delay : delay + count] - said[:count]
    return delay, float(10 * np.log10(np.sum(said[:count] ** 2) / np.sum(error**2)))


def test_the_python_client(monkeypatch, tmp_path):
    """If it fails, people who use Kyutai's Python client cannot talk with this server, or hear something else than
    what was said."""
    python = kyutai_python()
    if not python:
        pytest.skip("no environment with Kyutai's client: make kyutai-client, or name one in REFERENCE_PYTHON")
    install(monkeypatch, reader=Reader)
    spoken = spoken_by(monkeypatch)
    np.save(tmp_path / "question.npy", question(60))

    async def run() -> subprocess.CompletedProcess[str]:
        async with serving(places=1) as served:
            command = [
                python,
                str(HERE / "kyutai_client.py"),
                str(tmp_path / "question.npy"),
                str(tmp_path / "heard.npz"),
            ]
            command += ["--", "--host", "127.0.0.1", "--port", served.url.rpartition(":")[2]]
            done = await asyncio.to_thread(
                subprocess.run,
                command,
                capture_output=True,
                text=True,
                timeout=200,
                env={**os.environ, "PYTHONPATH": ""},
            )
            await served.until_free(1)
            return done

    done = asyncio.run(run())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "connected!" in done.stderr and "Err" not in done.stderr, done.stderr
    heard = np.load(tmp_path / "heard.npz")
    got = heard["decoded"]
    assert len(got) >= 60 * FRAME and done.stdout.count(" héllo") >= len(got) // FRAME // 5
    np.testing.assert_array_equal(got, as_opus(spoken)[: len(got)])  # bit-exact up to Opus
    delay, snr = against(got, np.concatenate(spoken))
    print(f"moshi.client: {len(got) / RATE:.1f} s, engine's sound at {delay / RATE * 1e3:.1f} ms, SNR {snr:.1f} dB")
    assert 150 <= delay <= 160 and snr > 8
    assert np.abs(heard["played"]).max() > 0.05


def test_the_rust_clients_bytes(monkeypatch, tmp_path):
    """If it fails, people who use Kyutai's Rust terminal client cannot talk with this server.

    It speaks TLS only and trusts any certificate; sends the two header pages together with the first packet, and then
    a page of stream 42 for each packet of 40 ms; takes packets out of the pages that come; and restarts with 3, 3.
    """
    install(monkeypatch, reader=Reader)
    spoken = spoken_by(monkeypatch)
    tls, _ = certificates.own("localhost", tmp_path)
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    sound = question(40)

    async def run() -> tuple[list[bytes], str]:
        encoder = sphn.OpusStreamWriter(RATE)
        packets, text, sent = [], "", 0
        pages = ogg_page([b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 3840, 48_000, 0, 0)], 0, 0, first=True)
        pages += ogg_page([b"OpusTags" + struct.pack("<I", 11) + b"KyutaiMoshi" + struct.pack("<I", 0)], 0, 1)
        async with serving(places=1, tls=tls, trust=trusting) as served, served.client("") as client:
            await client.until(0x00)
            for index in range(0, len(sound), 960):
                body = encoder.append_pcm(sound[index : index + 960])
                sent += 960
                for packet in packets_of(body):
                    if not packet.startswith((b"OpusHead", b"OpusTags")):
                        pages += ogg_page([packet], sent, 2 + index // 960)
                await client.socket.send_bytes(b"\x01" + pages)
                pages = b""
                if index // 960 % 2:
                    while True:
                        kind, content = await client.next()
                        text += content.decode() if kind == 2 else ""
                        if kind == 1:
                            packets += packets_of(content)
                            break
            await client.socket.send_bytes(b"\x03\x03")
            await client.socket.close()
            await served.until_free(1)
        return packets, text

    packets, text = asyncio.run(run())
    assert text.count(" héllo") >= 7
    sounds = [packet for packet in packets if not packet.startswith((b"OpusHead", b"OpusTags"))]
    assert len(packets) - len(sounds) == 2
    # Its decoder takes the packets and never looks at the pages: here they go into pages of our own.
    decoder = sphn.OpusStreamReader(RATE)
    stream = ogg_page([b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, RATE, 0, 0)], 0, 0, first=True)
    stream += ogg_page([b"OpusTags" + bytes(8)], 0, 1)
    got = [decoder.append_bytes(stream)]
    got += [decoder.append_bytes(ogg_page([packet], 0, 2 + index)) for index, packet in enumerate(sounds)]
    heard = np.concatenate(got)
    assert len(heard) == len(sound)
    np.testing.assert_array_equal(heard, as_opus(spoken)[: len(heard)])
    delay, snr = against(heard, np.concatenate(spoken))
    print(f"Rust client's bytes: engine's sound at {delay / RATE * 1e3:.1f} ms, SNR {snr:.1f} dB")


def packets_of(stream: bytes) -> list[bytes]:
    """Packets in whole Ogg pages (RFC 3533), each page's last one complete."""
    found = []
    while stream:
        assert stream[:4] == b"OggS" and stream[4] == 0
        count = stream[26]
        lacing, stream = stream[27 : 27 + count], stream[27 + count :]
        length = 0
        for size in lacing:
            length += size
            if size < 255:
                found.append(stream[:length])
                stream, length = stream[length:], 0
        assert not length
    return found


def ogg_page(packets: list[bytes], granule: int, number: int, *, first: bool = False) -> bytes:
    """One page of stream 42 (RFC 3533) that holds these packets."""
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, 2 if first else 0, granule, 42, number, 0, len(lacing)) + lacing
    page = bytearray(head + b"".join(packets))
    page[22:26] = struct.pack("<I", _checksum(page))
    return bytes(page)


def _checksum(page: bytes | bytearray) -> int:
    """CRC-32 of polynomial 0x04C11DB7, not reflected, from 0 (RFC 3533, section 6)."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value
