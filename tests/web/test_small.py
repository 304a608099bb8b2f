"""The built-in model over the socket says what it says without one."""

from __future__ import annotations

import asyncio
from importlib.resources import files

import numpy as np
import soundfile
from moshi_mlx_app.server.protocols.kyutai import Pcm

import moshi_mlx

from .serving import FRAME, SOON, Served, serving


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


def test_twelve_at_once_get_what_each_gets_alone():
    """If it fails, people who talk at the same time hear answers that are not theirs, or not in order."""
    path = files("moshi_mlx") / "assets" / "questions.wav"
    sound = soundfile.read(str(path), 40 * FRAME, dtype="int16")[0].reshape(40, FRAME)
    model, wire, frames = moshi_mlx.load("small"), Pcm(), 6

    def alone(seed: int) -> np.ndarray:
        with model.session(seed=seed) as session:
            heard = (wire.decode(frame.tobytes()) for frame in sound[seed : seed + frames])
            return np.concatenate([np.frombuffer(wire.encode(session.step(one).pcm), "<i2") for one in heard])

    async def talk(served: Served, seed: int) -> np.ndarray:
        async with served.client(f"audio=pcm&seed={seed}") as client:
            await client.begun()
            await asyncio.sleep(0.01 * seed)
            return np.concatenate([await client.say(frame) for frame in sound[seed : seed + frames]])

    async def run() -> list[np.ndarray]:
        async with serving(model, places=12) as served:
            got = await asyncio.gather(*(talk(served, seed) for seed in range(12)))
            await served.until_free(12)
            until = asyncio.get_running_loop().time() + SOON
            while served.server.engine.computing().rows:
                assert asyncio.get_running_loop().time() < until, "rows are still taken"
                await asyncio.sleep(0.01)
            return got

    for seed, got in enumerate(asyncio.run(run())):
        np.testing.assert_array_equal(got, alone(seed), err_msg=f"seed {seed}")
