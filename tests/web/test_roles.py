"""Role and voice in the query: checked before the upgrade, told before the handshake; gaps for who wants them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.roles import Roles, ends_turns_by_gaps
from moshi_mlx_app.server.server import Server, listening

import moshi_mlx
from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.errors import ConfigError, StateError
from moshi_mlx.realtime import Conversation, Scheduler
from moshi_mlx.tasks.personaplex import PersonaPlex


def small() -> PersonaPlex:
    """The built-in model as if it took roles: its prompts are told to it, and it makes of them what it will."""
    loaded = moshi_mlx.load("small")
    model = PersonaPlex(loaded.config, loaded.lm, loaded.codec, loaded.tokenizer, name="small")
    return model


@pytest.fixture(scope="module")
def model() -> PersonaPlex:
    return small()


def server(model: Any, **more: Any) -> Server:
    return Server(
        Engine(model), Guard("localhost", ""), Line(2), GenerationConfig(), roles=Roles(model, "", ""), **more
    )


async def answers(served: Server, query: dict[str, str], count: int = 12) -> tuple[int, str, list[tuple[int, bytes]]]:
    """Status, reason, and the first messages of a connection."""
    async with (
        listening(served, "127.0.0.1", 0) as port,
        aiohttp.ClientSession() as session,
    ):
        url = f"http://127.0.0.1:{port}/api/chat"
        try:
            async with session.ws_connect(url, params={"audio": "pcm", **query}) as socket:
                came: list[tuple[int, bytes]] = []
                while len(came) < count and (not came or came[-1][0] != 4):
                    received = await asyncio.wait_for(socket.receive(), 60)
                    if received.type != aiohttp.WSMsgType.BINARY:
                        break
                    came.append((received.data[0], received.data[1:]))
                return 101, "", came
        except aiohttp.WSServerHandshakeError as error:
            async with session.get(url, params=query, headers={
                "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }) as response:  # fmt: skip
                return error.status, await response.text(), []


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"voice_prompt": "NATF9.pt", "text_prompt": "x"}, "there is no voice 'NATF9.pt'"),
        ({"voice_prompt": "../../etc/passwd"}, "there is no voice"),
        ({"text_prompt": "word " * 700}, "shorten the role"),
        ({"text_prompt": "x" * 5000}, "letters at most"),
    ],
)
def test_refused_before_the_upgrade(model: PersonaPlex, query: dict[str, str], reason: str) -> None:
    """A client that asks for what there is not gets a silent connection, or a stack trace, in place of the reason."""
    status, said, _ = asyncio.run(answers(server(model), query))
    assert status == 400 and reason in said


def test_a_model_without_roles_says_so() -> None:
    """A role for a model that takes none is ignored, and its sender wonders why nothing changes."""
    loaded = moshi_mlx.load("small")
    status, said, _ = asyncio.run(answers(server(loaded), {"text_prompt": "You sing."}))
    assert status == 400 and said.startswith("this model takes no role")
    assert asyncio.run(answers(server(loaded), {"text_prompt": "", "voice_prompt": ""}))[0] == 101
    with pytest.raises(ConfigError, match="takes no voice"):
        loaded.session(voice="NATF0")


def test_prompts_come_before_the_handshake(model: PersonaPlex) -> None:
    """A client that waits for the handshake talks into prompts that still run, or never hears how far they are."""
    status, _, came = asyncio.run(answers(server(model), {"text_prompt": "You sing.", "events": "1"}))
    assert status == 101
    kinds = [kind for kind, _ in came]
    told = [json.loads(content) for kind, content in came[: kinds.index(0)] if kind == 0x11]
    steps = [event for event in told if event["type"] == "opening"]
    assert steps and steps[-1]["done"] == steps[-1]["total"] > 12


def test_prompts_everywhere_alike(model: PersonaPlex) -> None:
    """A role is heard by a session, but not by a conversation, or not on a scheduler; or its words are shown."""
    frame = np.zeros(model.frame_size, np.float32)
    opening = model.opening("You sing.", "")
    assert opening is not None
    told: list[tuple[int, int]] = []
    with model.session(seed=1, role="You sing.", voice="", on_opening=lambda *step: told.append(step)) as session:
        expected = session.snapshot()
        assert told[-1] == (len(opening), len(opening)) and "system" not in session.step(frame).text
    for driver in ("threads", "scheduler"):
        if driver == "threads":
            with Conversation(model, seed=1, opening=opening) as conversation:
                found = conversation.snapshot()
        else:
            with Scheduler(model) as scheduler, Conversation(scheduler, seed=1, opening=opening) as conversation:
                found = conversation.snapshot()
        for name in ("inputs", "position"):
            assert np.array_equal(np.array(found["generator"][name]), np.array(expected["generator"][name])), driver
    model_without = moshi_mlx.load("small")
    with pytest.raises(StateError):
        model_without.session().restore(expected)


def test_who_gets_no_silence() -> None:
    """LiveKit's client never ends a turn; or a browser hears gaps."""
    livekit = {"voice_prompt": "NATF2.pt", "text_prompt": "x", "seed": "1"}
    assert ends_turns_by_gaps(livekit, "Python/3.11 aiohttp/3.13")
    assert not ends_turns_by_gaps(livekit, "Mozilla/5.0")
    assert not ends_turns_by_gaps({**livekit, "gaps": "0"}, "Python/3.11 aiohttp/3.13")
    assert not ends_turns_by_gaps({**livekit, "text_topk": "25"}, "x")
    assert ends_turns_by_gaps({"gaps": "1"}, "Mozilla/5.0")
    assert not ends_turns_by_gaps({}, "Python/3.11 aiohttp/3.13")


def test_a_recording_gives_a_voice(model: PersonaPlex, tmp_path: Path) -> None:
    """A recording and the file that is written from it give two different conversations."""
    from importlib.resources import files

    import soundfile

    pcm, rate = soundfile.read(str(files("moshi_mlx") / "assets" / "questions.wav"), 48000, dtype="float32")
    soundfile.write(tmp_path / "voice.wav", np.stack([pcm, -pcm], axis=1), rate)
    frames = model.save_voice(pcm, rate, tmp_path / "voice.pt")
    assert frames == -(-len(pcm) * model.sample_rate // rate // model.frame_size) and (tmp_path / "voice.pt").exists()
    snapshots = []
    for name in ("voice.wav", "voice.pt"):
        with model.session(seed=1, role="You sing.", voice=tmp_path / name) as session:
            snapshots.append(session.snapshot()["generator"])
    assert np.array_equal(np.array(snapshots[0]["inputs"]), np.array(snapshots[1]["inputs"]))
    keys = [np.array(one["lm"]["transformer"]["0"]["keys"]) for one in snapshots]
    soundfile.write(tmp_path / "long.wav", np.zeros(40 * 8000, np.float32), 8000)
    with pytest.raises(moshi_mlx.errors.AudioError, match="cut it"):
        model.opening("", tmp_path / "long.wav")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(moshi_mlx.errors.CheckpointError):
        model.opening("", tmp_path / "noise.pt")
    assert keys[0].shape == keys[1].shape and np.abs(keys[0] - keys[1]).max() < 0.05


@pytest.mark.parametrize("path", ["/v1/live/sessions", "/v1/realtime"])
def test_instructions_are_the_role(model: PersonaPlex, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, what a program of OpenAI's protocols tells the model is lost, or told to somebody else."""
    told: list[dict[str, str]] = []
    real = Roles.opening

    def opening(self: Roles, query: Any) -> Any:
        told.append(dict(query))
        return real(self, query)

    monkeypatch.setattr(Roles, "opening", opening)

    async def run() -> list[str]:
        async with listening(server(model), "127.0.0.1", 0) as port, aiohttp.ClientSession() as session:
            async with session.ws_connect(f"http://127.0.0.1:{port}{path}") as socket:
                live = "live" in path
                about = {"model": "any", "instructions": "You sell shoes."}
                if live:
                    await socket.send_json({"type": "session.start", "session": about})
                else:
                    asked = {"type": "realtime", "instructions": "You sell shoes."}
                    await socket.send_json({"type": "session.update", "session": asked})
                    silence = {"type": "input_audio_buffer.append", "audio": "AAAAAA=="}
                    await socket.send_json(silence)
                came = []
                wanted = "session.started" if live else "session.updated"
                while wanted not in came:
                    event = json.loads((await asyncio.wait_for(socket.receive(), 60)).data)
                    came.append(event["type"])
                    assert event["type"] != "error", event
                    if event["type"] == "session.updated":
                        assert event["session"]["instructions"] == "You sell shoes."
                for _ in range(200):
                    if told:
                        break
                    await asyncio.sleep(0.05)
                return came

    came = asyncio.run(asyncio.wait_for(run(), 120))
    assert told == [{"text_prompt": "You sell shoes."}]
    assert not any("instructions_not_supported" in kind for kind in came)
