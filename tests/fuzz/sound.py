"""Sound that others send: recordings of every format, and streams of Ogg/Opus."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import soundfile
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.server.protocols.kyutai import Opus, Pcm, ProtocolError

from moshi_mlx.errors import AudioError

from . import Attack, Attempt, fuzzer
from .files import mutate

RATE = 24_000
_FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AU", "PCM_16"), ("CAF", "PCM_16"),
    ("W64", "PCM_16"), ("RF64", "PCM_16"), ("NIST", "PCM_16"), ("VOC", "PCM_U8"), ("IRCAM", "PCM_16"),
    ("SVX", "PCM_16"), ("PAF", "PCM_16"),
]  # fmt: skip


@fuzzer(refusals=(AudioError,), seconds=10.0)
def recordings(folder: Path) -> Attack:
    """Recordings, damaged: they are heard as far as they go, or refused by name."""
    goods = []
    for rate in (8000, 24000):
        pcm = 0.3 * np.sin(np.arange(rate // 4) * 0.05)
        for kind, subtype in _FORMATS:
            buffer = io.BytesIO()
            if soundfile.check_format(kind, subtype):
                soundfile.write(buffer, pcm, rate, format=kind, subtype=subtype)
                goods.append(buffer.getvalue())
    path = folder / "q.wav"

    def make(rng: random.Random) -> Attempt:
        data = mutate(rng.choice(goods), rng)
        if rng.random() < 0.3 and len(data) > 60:  # where the sizes and rates are
            head = bytearray(data)
            for _ in range(rng.randint(1, 5)):
                head[rng.randrange(60)] = rng.randrange(256)
            data = bytes(head)

        def call() -> None:
            path.write_bytes(data)
            try:
                with Recording(path) as recording:
                    count = 0
                    for frame in recording.frames(RATE, 1920):
                        assert frame.shape == (1920,) and frame.dtype == np.float32 and np.isfinite(frame).all()
                        count += len(frame)
                        if count > 600 * RATE:
                            break  # a minute of sound is a minute of work: long is not wrong
                    assert count >= min(recording.length(RATE), 600 * RATE)
            except AudioError as error:
                assert path.name in str(error), error
                raise

        return data, call

    return make


@fuzzer(refusals=(ProtocolError,), seconds=2.0)
def opus(folder: Path) -> Attack:
    """Streams of Ogg/Opus from a client, damaged, cut and joined; and samples as they are."""
    writer = Opus(RATE)
    tone = (0.3 * np.sin(np.arange(1920) * 0.05)).astype(np.float32)
    pages = [writer.encode(tone) for _ in range(20)]
    stream = b"".join(pages)

    def make(rng: random.Random) -> Attempt:
        data = bytearray(b"".join(rng.sample(pages, 3)) if rng.random() < 0.2 else stream)
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            at = data.find(b"OggS", rng.randrange(len(data) + 1))
            if at >= 0 and rng.random() < 0.7:  # a page's head: flags, positions, numbers, the table of its segments
                data[min(at + rng.randrange(4, 40), len(data) - 1)] = rng.choice(
                    [0, 1, 2, 4, 127, 255, rng.randrange(256)]
                )
            else:
                data = bytearray(mutate(bytes(data), rng))
        if rng.random() < 0.05:  # pages of 255 packets of a byte
            data += (b"OggS" + bytes(22) + bytes([255]) + bytes([1]) * 255 + bytes([rng.randrange(256)]) * 255) * 50
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 1, 5, 50])))

        def call() -> None:
            reader = Opus(RATE)
            for start, end in zip([0, *cuts], [*cuts, len(data)]):
                pcm = reader.decode(bytes(data[start:end]))
                assert pcm.ndim == 1 and pcm.dtype == np.float32
            Pcm().decode(bytes(data))

        return bytes(data), call

    return make
