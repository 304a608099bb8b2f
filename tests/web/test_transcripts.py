"""What the user says in a Realtime conversation, from a recogniser beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_app.server.transcripts import Transcripts

from moshi_mlx.engine.text import EPAD, PAD, Word
from moshi_mlx.tasks.transcribe import Heard, SpeechToText
from tests.helpers.tiny import tiny_model

from .serving import FRAME, serving
from .test_openai import judged, talker


@pytest.fixture
def recogniser() -> SpeechToText:
    made = tiny_model(stt={"audio_delay_seconds": 0.04}, name="writer")
    assert isinstance(made, SpeechToText)
    weight = np.array(made.lm.text_linear.weight)  # else random weights write one endless word
    weight[[EPAD, PAD]] *= 4
    made.lm.text_linear.weight = mx.array(weight)
    return made


def loud(seed: int) -> np.ndarray:
    return (3000 * np.random.default_rng(seed).standard_normal(FRAME)).clip(-32768, 32767).astype(np.int16)


def test_turns_are_written_down(recogniser: SpeechToText) -> None:
    """If this fails, clients show nothing of what their users say, or show it at another turn."""

    async def run() -> list[dict[str, Any]]:
        async with serving(stt=recogniser) as served, talker(served, "/v1/realtime") as client:
            await client.until("session.created")
            asked = {"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
            await client.send("session.update", session=asked)
            session = (await client.until("session.updated"))["session"]
            assert session["audio"]["input"]["transcription"] == {"model": "writer"}
            items = []
            for turn in range(2):
                for index in range(12):
                    await client.say(loud(12 * turn + index))
                    await asyncio.sleep(0.02)
                for _ in range(25):
                    await client.say(np.zeros(FRAME, np.int16))
                    await asyncio.sleep(0.02)
                started = await client.until("input_audio_buffer.speech_started")
                await client.until("input_audio_buffer.committed")
                done = await client.until("conversation.item.input_audio_transcription.completed")
                assert done["item_id"] == started["item_id"] and done["usage"]["type"] == "duration"
                items.append(done)
            for done in items:
                deltas = [
                    event["delta"]
                    for event in client.came
                    if event["type"].endswith("transcription.delta") and event["item_id"] == done["item_id"]
                ]
                assert deltas and "".join(deltas) == done["transcript"]
                await client.send("conversation.item.retrieve", item_id=done["item_id"])
                item = (await client.until("conversation.item.retrieved"))["item"]
                assert item["content"][0]["transcript"] == done["transcript"]
            await client.send(
                "session.update", session={"type": "realtime", "audio": {"input": {"transcription": None}}}
            )
            session = (await client.until("session.updated"))["session"]
            assert session["audio"]["input"]["transcription"] is None
            return client.came

    judged("realtime", asyncio.run(asyncio.wait_for(run(), 120)))


def test_without_a_recogniser() -> None:
    """If this fails, a client is promised a transcript that never comes."""

    async def run() -> None:
        async with serving() as served, talker(served, "/v1/realtime") as client:
            asked = {"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
            await client.send("session.update", session=asked)
            session = (await client.until("session.updated"))["session"]
            assert session["audio"]["input"]["transcription"] is None

    asyncio.run(asyncio.wait_for(run(), 60))


class Fed:
    """Stands for the captions: a test says what was heard."""

    def __init__(self, model: Any):
        self.model = model

    def begin(self, tell: Any) -> Fed:
        self.tell = tell
        return self

    def feed(self, pcm: np.ndarray) -> None:
        pass

    def end(self) -> None:
        pass


def test_words_that_come_late_belong_to_their_turn(recogniser: SpeechToText) -> None:
    """If this fails, the last word of a turn, which a recogniser writes after its end, is another turn's."""
    told: list[tuple[Any, ...]] = []

    async def run() -> None:
        fed = Fed(recogniser)
        made = Transcripts(
            fed,  # type: ignore[arg-type]
            lambda item, delta: told.append((item, delta)),
            lambda item, text, until: told.append((item, text, until)),
            lambda: told.append(("pause",)),
        )
        made.hear(np.zeros(FRAME, np.float32), 10.0)  # the recogniser began when ten seconds had gone
        made.begin("one")
        made.end("one", 12.0)
        made.begin("two")
        heard = [
            Heard(1.0, "", (Word("a", 0.5, 0.8),), 0.0, False),
            Heard(2.3, "", (Word(" b", 1.9, 2.2), Word("c", 2.1, 2.3)), 0.0, False),
            Heard(2.6, "", (), 0.9, True),
        ]
        for one in heard:
            fed.tell(one)
        await asyncio.sleep(0.05)
        made.end("two", 12.5)
        fed.tell(Heard(9.0, "", (), 0.0, False))
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert told == [("one", "a"), ("one", " b"), ("two", "c"), ("one", "a b", 12.0), ("two", "c", 12.5)]
