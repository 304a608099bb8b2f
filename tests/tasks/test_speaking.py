"""Texts spoken by small models: Kyutai's codes, rows together, words that come slowly, ends, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.engine.pipeline import Engine
from moshi_mlx.errors import CheckpointError, ConfigError, StateError, TextError
from moshi_mlx.layers.conditioning import TensorCondition
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx.tasks.speak import TextToSpeech
from moshi_mlx.tasks.speaking import Manner, SpeechRows, Spoken, Timing, Voice
from moshi_mlx.tasks.tts_machine import Entry
from tests.helpers.tiny import WAYS, use
from tests.helpers.tts import tiny_speaker

GOLDEN = Path(__file__).parents[1] / "golden" / "tts"
RUNS: dict[str, Any] = json.loads((GOLDEN / "runs.json").read_text())


class SilentCodec:
    """Stands for the codec of the golden models, which have none: four codebooks, and no sound."""

    sample_rate, frame_size, frame_rate, batched, num_codebooks = 24000, 1920, 12.5, True, 4

    def decoder(self) -> Any:
        class Stream:
            def __init__(self) -> None:
                self.state = {"nothing": np.zeros((1, 1), np.float32)}

        return Stream()

    def decode_step(self, codes: np.ndarray, state: Any, rows: Any) -> np.ndarray:
        return np.zeros((len(codes), 1920), np.float32)


def golden_rows(name: str) -> SpeechRows:
    about = RUNS[name]
    config = load_config(GOLDEN / about["model"] / "config.json")
    lm = load_lm(config, GOLDEN / about["model"] / "model.safetensors", dtype=mx.float32)
    codec: Any = SilentCodec()
    timing = Timing.of(config, 12.5)
    assert (timing.delay, timing.ahead) == (16, about["ahead"])
    return SpeechRows(Engine(config, lm, codec, None), timing)


def golden_manner(name: str, index: int, arrays: dict[str, np.ndarray]) -> Manner:
    about = RUNS[name]
    prefix = arrays.get(f"prefix{index}")
    return Manner(
        voice=Voice(TensorCondition(arrays["speakers"][index], arrays["mask"][index].astype(bool)), prefix),
        generation=GenerationConfig(GREEDY, GREEDY, padding_bonus=about.get("padding_bonus", 0.0)),
        guidance=float(about["cfg"]) if about["cfg"] else about["cfg_coef"],
        codebooks=about["n_q"],
    )


def collect(rows: SpeechRows) -> dict[int, list[Spoken]]:
    found: dict[int, list[Spoken]] = {row: [] for row in rows.rows}
    while rows.rows:
        for row, spoken in rows.step().items():
            if isinstance(spoken, Exception):
                raise spoken
            found[row].append(spoken)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_kyutais_codes(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, words or ends differ from PyTorch's: guidance in the model or in two rows, prefixes, fewer codebooks."""
    use(way, monkeypatch)
    loaded: Any = mx.load(str(GOLDEN / f"{name}.safetensors"))
    arrays = {key: np.array(value) for key, value in loaded.items()}
    about, rows = RUNS[name], golden_rows(name)
    generated: dict[int, list[int]] = {}
    following = rows._read

    def read(row: Any, step: Any) -> None:
        generated.setdefault(row.name, []).append(int(step.text[0]))
        following(row, step)

    monkeypatch.setattr(rows, "_read", read)
    names = []
    for index, entries in enumerate(about["entries"]):
        names.append(rows.join(golden_manner(name, index, arrays)))
        rows.push(names[-1], [Entry(tuple(tokens), text, padding) for tokens, text, padding in entries])
        rows.finish(names[-1])
    spoken = collect(rows)
    for index, row in enumerate(names):
        lead = 0 if about["prefixes"] is None else about["prefixes"][index]
        end = about["ends"][index]
        tokens = generated[row]
        assert tokens == arrays["logged"][index, : len(tokens), 1].tolist()
        assert len(tokens) == end + 16 + 4
        codes = np.stack([one.codes for one in spoken[row] if one.codes is not None])
        last = 16 + end + 4 - 2
        assert np.array_equal(codes, arrays["frames"][16 + lead : last, index, 1:]), (index, codes.shape)
        assert (arrays["frames"][:16, index, 1:] == -1).all()
        words = [word for one in spoken[row] for word in one.words]
        assert [(word.text, round(word.start * 12.5) + lead) for word in words] == [
            tuple(w) for w in about["words"][index]
        ]


def test_the_runs_cover_what_they_should() -> None:
    """A golden run that takes no decision, or one of the ways of guidance, has been lost."""
    assert set(RUNS) == {"distilled", "few_codebooks", "guided", "prefix"}
    for name in RUNS:
        loaded: Any = mx.load(str(GOLDEN / f"{name}.safetensors"))
        assert {0} < set(np.array(loaded["logged"])[:, :, 0].reshape(-1).tolist())


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("way", WAYS)
def test_rows_together(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are spoken together, with other settings, sound otherwise than alone."""
    use(way, monkeypatch)
    model = tiny_speaker(way)
    manners = [
        model.manner(seed=1),
        model.manner(seed=2, codebooks=2, padding_bonus=1.0),
        model.manner(seed=3, cfg=1.5),
    ]
    texts = ["the man will have one of", "there is more", "so I was about to do it"]

    def run(chosen: list[int], later: int = 0) -> dict[int, np.ndarray]:
        rows, names, sound = model.rows(), {}, {index: [] for index in chosen}
        for step in range(10_000):
            for index in chosen:
                if index not in names and step >= later * index:
                    names[index] = rows.join(manners[index])
                    rows.push(names[index], model.script().entries(texts[index]))
                    rows.finish(names[index])
            for row, spoken in rows.step().items():
                assert isinstance(spoken, Spoken)
                if spoken.pcm is not None:
                    sound[next(index for index in names if names[index] == row)].append(spoken.pcm)
            if len(names) == len(chosen) and not rows.rows:
                return {index: np.concatenate(found) for index, found in sound.items()}
        raise AssertionError("it does not end")

    alone = {index: run([index])[index] for index in range(3)}
    together = run([0, 1, 2], later=7)
    for index in range(3):
        assert together[index].shape == alone[index].shape
        np.testing.assert_allclose(together[index], alone[index], atol=1e-5)


def test_words_that_come_slowly() -> None:
    """A text that comes word by word is spoken otherwise, falls silent for lack of words, or begins late."""
    model = tiny_speaker()
    text = "the man will have one of the more"
    whole = model.speak(text, seed=5)
    with model.speaker(seed=5) as speaker:
        sound, words, steps, fed_at, first = [], [], 0, [], None
        pieces = [piece + " " for piece in text.split()]
        for tick in range(10_000):
            if tick % 5 == 0 and pieces:  # one word every 400 ms
                speaker.feed(pieces.pop(0))
                fed_at.append(tick)
                if not pieces:
                    speaker.finish()
            spoken = speaker.step()
            if spoken is not None:
                steps += 1
                words += spoken.words
                if spoken.pcm is not None:
                    first = tick if first is None else first
                    sound.append(spoken.pcm)
            if speaker.over:
                break
    assert np.array_equal(np.concatenate(sound), whole.pcm) and tuple(words) == whole.words
    needed = model.timing.ahead  # words that must be known before the first is read
    delay = model.timing.delay + model.lm.config.max_delay
    assert first is not None and first <= fed_at[needed] + 16 + delay


def test_the_ends() -> None:
    """There is a click at the beginning or the end, or the sound is not cut where the words are over."""
    model = tiny_speaker()
    speech = model.speak("one more", seed=3)
    assert abs(speech.pcm[0]) < 1e-3 and abs(speech.pcm[-1]) < 1e-3
    edge = model.frame_size // 20
    body = np.abs(speech.pcm).max()
    assert body > 0 and np.abs(speech.pcm[:edge]).max() < 0.1 * body and np.abs(speech.pcm[-edge:]).max() < 0.1 * body
    assert len(speech.pcm) % model.frame_size == 0
    last = speech.words[-1]
    frames = len(speech.pcm) // model.frame_size
    assert [word.text for word in speech.words] == ["one", "more"]
    assert frames == round(last.end * model.frame_rate) + 4 - model.lm.config.max_delay


def test_refusals(tmp_path: Path) -> None:
    """What cannot be spoken ends in something else than one sentence, or another voice speaks."""
    model = tiny_speaker()
    for text in ("", " \n", "\U0001f600 \U0001f44d"):
        with pytest.raises(TextError, match="nothing to say"):
            model.speak(text)
    with pytest.raises(TextError, match="break"):
        model.speak('Wait <break time="3600s"/> there')
    with pytest.raises(ConfigError, match="1 to 4 codebooks"):
        model.speak("one", codebooks=5)
    with pytest.raises(ConfigError, match="no voices by name"):
        model.speak("one", voice="somebody")
    with pytest.raises(ConfigError, match="does not converse"):
        model.session()
    speaker = model.speaker()
    speaker.feed("one ")
    speaker.finish()
    with pytest.raises(StateError):
        speaker.feed("two")


def test_voices(tmp_path: Path) -> None:
    """An unknown voice is another voice, a voice of another model is taken, or the second speaker is the first."""
    model = tiny_speaker(speakers=True)
    rng = np.random.default_rng(0)
    for name in ("anna", "bert"):
        wavs = mx.array(rng.standard_normal((1, 12, 3)).astype(np.float32))
        mx.save_safetensors(str(tmp_path / f"{name}.wav.00000000@2.safetensors"), {"speaker_wavs": wavs})
    both = model.voice("anna.wav", "bert.wav", source=str(tmp_path))
    one = model.voice(tmp_path / "anna.wav.00000000@2.safetensors")
    assert both.speakers is not None and one.speakers is not None and both.speakers.mask is not None
    assert both.speakers.tensor.shape == (15, 12) and both.speakers.mask.sum() == 6
    assert np.array_equal(np.array(both.speakers.tensor)[:3], np.array(one.speakers.tensor)[:3])
    with pytest.raises(CheckpointError, match=r"no voice 'anne\.wav'.*anna\.wav"):
        model.voice("anne.wav", source=str(tmp_path))
    (tmp_path / "anna.wav.00000000@2.safetensors").rename(tmp_path / "anna.wav.11111111@2.safetensors")
    with pytest.raises(CheckpointError, match="for another model"):
        model.voice(tmp_path / "anna.wav.11111111@2.safetensors")
    turns = ["one of", "the more"]
    spoken = [model.speak(turns, voice=voice, seed=1).pcm for voice in (both, one)]
    assert spoken[0].shape != spoken[1].shape or not np.array_equal(spoken[0], spoken[1])


def test_a_voice_from_a_recording() -> None:
    """The recording itself is heard, or it has no effect."""
    model = tiny_speaker()
    assert isinstance(model, TextToSpeech)
    sound = 0.3 * np.sin(np.arange(12 * model.frame_size) / 7).astype(np.float32)
    voice = model.voice_of(sound, model.sample_rate)
    assert voice.prefix is not None and voice.prefix.shape == (4, 10)
    plain, prefixed = model.speak("one more", seed=2), model.speak("one more", seed=2, voice=voice)
    assert prefixed.words[0].start == plain.words[0].start
    assert not np.array_equal(plain.pcm[: len(prefixed.pcm)], prefixed.pcm[: len(plain.pcm)])
