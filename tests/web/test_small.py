"""The built-in model over the socket says what it says without one."""

from __future__ import annotations

import asyncio
from importlib.resources import files

import numpy as np
import soundfile
from moshi_mlx_app.web.wire import Pcm

import moshi_mlx

from .serving import FRAME, serving


def test_the_engines_sound_arrives_bit_for_bit():
    """If it fails, a conversation in the browser is another than the library's: other samples, another order, or frames
    that got lost, with the same seed and the same question."""
    path = files("moshi_mlx") / "assets" / "questions.wav"
    sound = soundfile.read(str(path), 12 * FRAME, dtype="int16")[0].reshape(12, FRAME)
    model = moshi_mlx.load("small")
    wire, expected, text = Pcm(), [], ""
    with model.session(seed=5) as session:
        for frame in sound:
            said = session.step(wire.decode(frame.tobytes()))
            expected.append(np.frombuffer(wire.encode(said.pcm), "<i2"))
            text += said.text

    async def run() -> tuple[list[np.ndarray], str]:
        got, told = [], ""
        async with serving(model, places=1) as served, served.client("audio=pcm&seed=5") as client:
            metadata = await client.begun()
            assert metadata["model"] == model.name and metadata["sampling"]["seed"] == 5
            for frame in sound:
                await client.socket.send_bytes(b"\x10" + frame.tobytes())
                while True:
                    kind, content = await client.next()
                    assert kind in (0x02, 0x06, 0x10), (kind, content)
                    told += content.decode() if kind == 0x02 else ""
                    if kind == 0x10:
                        got.append(np.frombuffer(content, "<i2"))
                        break
            while len(told) < len(text):  # a frame's words come behind its sound
                told += (await client.until(0x02)).decode()
        return got, told

    got, told = asyncio.run(run())
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))
    assert np.abs(np.concatenate(got)).max() > 0 and told == text
