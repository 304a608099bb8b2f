"""Holds a conversation by one of the programs that speak OpenAI's protocols, as it is on the package index.

    PYTHON openai_clients.py CLIENT ws://127.0.0.1:8998/v1 SECONDS

CLIENT is one of realtime, live (openai-python), agents (openai-agents), pipecat, livekit, livekit-live. The recorded
questions are played in real time, SECONDS of them; what was begun to be said at half the time is interrupted as the
library does it. Prints a JSON object: what was said (``text``), ``seconds`` of sound, its loudest RMS (``loud``), how
many answers were ``interrupted``, and what the library logged from warnings on (``log``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import sys
import time
import wave
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RATE, BLOCK = 24_000, 2_400  # samples of 100 ms, as LiveKit sends them
QUESTIONS = Path(__file__).resolve().parents[2] / "moshi_mlx" / "assets" / "questions.wav"
os.environ["OPENAI_API_KEY"] = "none"
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"


class Heard:
    """What came back."""

    def __init__(self) -> None:
        self.text, self.pieces, self.interrupted = "", [], 0
        self.log: list[str] = []

    def sound(self, data: bytes) -> None:
        self.pieces.append(np.frombuffer(data, "<i2").astype(np.float32) / 32768)

    def report(self) -> str:
        pcm = np.concatenate([*self.pieces, np.zeros(BLOCK, np.float32)])
        blocks = pcm[: len(pcm) // BLOCK * BLOCK].reshape(-1, BLOCK)
        loud = float(np.sqrt(np.mean(blocks**2, 1)).max())
        about = {"text": self.text, "seconds": round(len(pcm) / RATE, 2), "loud": round(loud, 4)}
        return json.dumps({**about, "interrupted": self.interrupted, "log": self.log})


class Log(logging.Handler):
    def __init__(self, heard: Heard):
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.log.append(f"{record.name}: {record.getMessage()}"[:300])


def question(seconds: float) -> Iterator[bytes]:
    with wave.open(str(QUESTIONS)) as file:
        assert file.getframerate() == RATE and file.getsampwidth() == 2
        pcm = file.readframes(round(seconds * RATE))
    for start in range(0, len(pcm), 2 * BLOCK):
        yield pcm[start : start + 2 * BLOCK]


async def play(
    seconds: float, send: Callable[[bytes], Awaitable[None]], interrupt: Callable[[], Awaitable[None]]
) -> None:
    """The microphone, and once an interruption."""
    began, interrupting = time.monotonic(), None
    for index, block in enumerate(question(seconds)):
        await asyncio.sleep(max(0.0, began + index * BLOCK / RATE - time.monotonic()))
        await send(block)
        if interrupting is None and index * BLOCK / RATE > seconds / 2:
            interrupting = asyncio.ensure_future(interrupt())  # beside the sound: it may have to wait for an answer
    if interrupting is not None:
        await asyncio.wait_for(interrupting, 30)


async def realtime(url: str, seconds: float, heard: Heard) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="none", websocket_base_url=url)
    async with client.realtime.connect(model="gpt-realtime") as connection:
        await connection.session.update(
            session={"type": "realtime", "instructions": "Be brief.", "audio": {"output": {"voice": "marin"}}}
        )
        active: list[str] = []

        async def send(block: bytes) -> None:
            await connection.input_audio_buffer.append(audio=base64.b64encode(block).decode())

        async def interrupt() -> None:
            while not active:
                await asyncio.sleep(0.01)
            await connection.response.cancel()

        async def listen() -> None:
            async for event in connection:
                if event.type == "error":
                    heard.log.append(str(event.error))
                elif event.type == "response.created":
                    active.append(event.response.id)
                elif event.type == "response.output_audio.delta":
                    heard.sound(base64.b64decode(event.delta))
                elif event.type == "response.output_audio_transcript.done":
                    heard.text += event.transcript + " "
                elif event.type == "response.done":
                    active.clear()
                    heard.interrupted += event.response.status == "cancelled"

        listening = asyncio.ensure_future(listen())
        await play(seconds, send, interrupt)
        await asyncio.sleep(1.0)
        await connection.close()
        await asyncio.wait_for(listening, 10)


async def live(url: str, seconds: float, heard: Heard) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="none", websocket_base_url=url)
    async with client.live.connect() as connection:
        sound: Any = {"format": {"type": "audio/pcm", "rate": RATE}}
        await connection.session.start(session={"model": "gpt-live-1", "audio": sound})
        begun = asyncio.Event()

        async def send(block: bytes) -> None:
            await connection.session.input_audio.append(audio=base64.b64encode(block).decode())

        async def interrupt() -> None:
            await connection.session.input_audio.mute()
            await connection.session.input_audio.unmute()

        async def listen() -> None:
            async for event in connection:
                if event.type == "error":
                    heard.log.append(str(event.error))
                elif event.type == "session.started":
                    begun.set()
                elif event.type == "session.output_audio.delta":
                    heard.sound(base64.b64decode(event.delta))
                elif event.type == "session.output_transcript.delta":
                    heard.text += event.delta
                elif event.type == "session.input_audio.muted":
                    heard.interrupted += 1
                elif event.type == "session.closed":
                    assert event.reason == "close_requested", event
                    return

        listening = asyncio.ensure_future(listen())
        await asyncio.wait_for(begun.wait(), 30)
        await play(seconds, send, interrupt)
        await connection.session.close()
        await asyncio.wait_for(listening, 10)


async def agents(url: str, seconds: float, heard: Heard) -> None:
    from agents.realtime import RealtimeAgent, RealtimeRunner

    runner = RealtimeRunner(starting_agent=RealtimeAgent(name="Moshi", instructions="Be brief."))
    async with await runner.run(
        model_config={"url": f"{url}/realtime?model=gpt-realtime", "api_key": "none"}
    ) as session:
        said: dict[str, str] = {}

        async def listen() -> None:
            async for event in session:
                if event.type == "error":
                    heard.log.append(str(event.error))
                elif event.type == "audio":
                    heard.sound(event.audio.data)
                elif event.type == "audio_interrupted":
                    heard.interrupted += 1
                elif event.type == "raw_model_event" and event.data.type == "transcript_delta":
                    said[event.data.item_id] = said.get(event.data.item_id, "") + event.data.delta

        listening = asyncio.ensure_future(listen())
        await play(seconds, session.send_audio, session.interrupt)
        await asyncio.sleep(1.0)
        heard.text = " ".join(said.values())
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)


async def pipecat(url: str, seconds: float, heard: Heard) -> None:
    from loguru import logger
    from pipecat.frames.frames import (
        EndFrame,
        ErrorFrame,
        InputAudioRawFrame,
        InterruptionFrame,
        TTSAudioRawFrame,
        TTSTextFrame,
    )
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineParams, PipelineWorker
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
    from pipecat.workers.runner import WorkerRunner

    logger.remove()
    logger.add(lambda text: heard.log.append(str(text).strip()[:300]), level="WARNING")

    class Sink(FrameProcessor):
        async def process_frame(self, frame: Any, direction: Any) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, TTSAudioRawFrame):
                heard.sound(frame.audio)
            elif isinstance(frame, TTSTextFrame):
                heard.text += frame.text
            elif isinstance(frame, ErrorFrame):
                heard.log.append(frame.error)
            await self.push_frame(frame, direction)

    service = OpenAIRealtimeLLMService(api_key="none", base_url=f"{url}/realtime")
    task = PipelineWorker(Pipeline([service, Sink()]), params=PipelineParams(audio_in_sample_rate=RATE))
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(task)
    running = asyncio.ensure_future(runner.run())
    await asyncio.sleep(1.0)

    async def send(block: bytes) -> None:
        await task.queue_frame(InputAudioRawFrame(audio=block, sample_rate=RATE, num_channels=1))

    async def interrupt() -> None:
        heard.interrupted += 1
        await task.queue_frame(InterruptionFrame())

    await play(seconds, send, interrupt)
    await asyncio.sleep(1.0)
    await task.queue_frame(EndFrame())
    await asyncio.wait_for(running, 20)


async def livekit(url: str, seconds: float, heard: Heard) -> None:
    import aiohttp
    from livekit import rtc
    from livekit.plugins.openai import realtime as plugin

    async with aiohttp.ClientSession() as http:
        model = plugin.RealtimeModel(base_url=url, api_key="none", http_session=http)
        session = model.session()
        await session.update_instructions("Be brief.")
        readers: list[asyncio.Task[None]] = []

        async def read(generation: Any) -> None:
            async for message in generation.message_stream:

                async def words(stream: Any = message.text_stream) -> None:
                    async for text in stream:
                        heard.text += text
                    heard.text += " "

                async def sound(stream: Any = message.audio_stream) -> None:
                    async for frame in stream:
                        heard.sound(bytes(frame.data))

                await asyncio.gather(words(), sound())

        session.on("generation_created", lambda made: readers.append(asyncio.ensure_future(read(made))))
        session.on("error", lambda error: heard.log.append(str(error)))

        async def send(block: bytes) -> None:
            session.push_audio(rtc.AudioFrame(block, RATE, 1, len(block) // 2))

        async def interrupt() -> None:
            while not session.has_active_generation:
                await asyncio.sleep(0.01)
            heard.interrupted += 1
            session.interrupt()

        await play(seconds, send, interrupt)
        await asyncio.sleep(1.0)
        for _ in range(100):  # else it warns of what it cuts off
            if not session.has_active_generation:
                break
            await asyncio.sleep(0.1)
        await session.aclose()
        await asyncio.gather(*readers, return_exceptions=True)


async def livekit_live(url: str, seconds: float, heard: Heard) -> None:
    import aiohttp
    from livekit import rtc
    from livekit.agents import llm
    from livekit.plugins.openai.realtime import GPTLiveModel

    async with aiohttp.ClientSession() as http:
        session = GPTLiveModel(base_url=url, api_key="none", http_session=http).session()
        await session._update_session(  # what AgentSession calls when it starts
            instructions="Be brief.", chat_ctx=llm.ChatContext.empty(), tools=[]
        )
        session.on("transcript_delta", lambda piece: setattr(heard, "text", heard.text + piece.text))
        session.on("error", lambda error: heard.log.append(str(error)))

        async def listen() -> None:
            async for frame in session.audio_stream:
                heard.sound(bytes(frame.frame.data))

        listening = asyncio.ensure_future(listen())

        async def send(block: bytes) -> None:
            session.push_audio(rtc.AudioFrame(block, RATE, 1, len(block) // 2))

        async def interrupt() -> None:
            heard.interrupted += 1
            session.mute_input()
            session.unmute_input()

        await play(seconds, send, interrupt)
        await session.aclose()
        await asyncio.wait_for(listening, 10)


CLIENTS = {
    "realtime": realtime,
    "live": live,
    "agents": agents,
    "pipecat": pipecat,
    "livekit": livekit,
    "livekit-live": livekit_live,
}


def main() -> None:
    name, url, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    heard = Heard()
    logging.getLogger().addHandler(Log(heard))
    asyncio.run(CLIENTS[name](url, seconds, heard))
    with contextlib.suppress(BrokenPipeError):
        print(heard.report())


if __name__ == "__main__":
    main()
