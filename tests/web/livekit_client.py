"""LiveKit's PersonaPlex client (livekit-plugins-nvidia), as it is: speaks twice with pauses, then with another role.

Run by tests/web/test_livekit.py in an environment of its own: ``livekit_client.py URL``. Prints JSON: for each answer
its seconds of sound, how long after its beginning it ended, and its text.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import aiohttp
import numpy as np
from livekit import rtc
from livekit.plugins.nvidia.experimental.realtime import RealtimeModel

RATE, FRAME = 24000, 1920


async def main(url: str) -> None:
    async with aiohttp.ClientSession() as web:
        await talk(RealtimeModel(base_url=url, voice="NATF2", text_prompt="You sing.", seed=7, http_session=web))


async def talk(model: RealtimeModel) -> None:
    session = model.session()
    answers: list[dict[str, object]] = []
    errors: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def collect(event: object) -> None:
        began, samples, text = time.monotonic(), 0, ""
        async for message in event.message_stream:  # type: ignore[attr-defined]

            async def words(message: object = message) -> None:
                nonlocal text
                async for piece in message.text_stream:  # type: ignore[attr-defined]
                    text += piece

            reading = asyncio.ensure_future(words())
            async for frame in message.audio_stream:
                samples += frame.samples_per_channel
            await reading
        answers.append({"audio": samples / RATE, "ended": time.monotonic() - began, "text": text})

    session.on("generation_created", lambda event: tasks.append(asyncio.ensure_future(collect(event))))
    session.on("error", lambda event: errors.append(str(event)))
    noise = np.random.default_rng(0)

    async def say(seconds: float, loud: bool) -> None:
        for _ in range(int(seconds * 12.5)):
            pcm = (noise.standard_normal(FRAME) * 3000 * loud).astype(np.int16)
            session.push_audio(rtc.AudioFrame(pcm.tobytes(), RATE, 1, FRAME))
            await asyncio.sleep(0.08)

    await say(3, False)  # until it is connected
    for _ in range(2):
        await say(1.2, True)
        await say(1.6, False)
    first = len(answers)
    await session.update_instructions("You tell jokes.")
    await say(3, False)
    await say(1.2, True)
    await say(1.6, False)
    await session.aclose()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    print(json.dumps({"answers": answers, "before": first, "errors": errors}))


asyncio.run(main(sys.argv[1]))
