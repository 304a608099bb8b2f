"""Speech to text: words and their times, ends of turns, long streams, many recordings."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from moshi_mlx.engine import Batch, SessionFrame, Settings
from moshi_mlx.engine.generator import Step
from moshi_mlx.engine.pipeline import _Text
from moshi_mlx.engine.text import EPAD, Word
from moshi_mlx.errors import AudioError, ConfigError, StateError
from moshi_mlx.tasks.transcribe import Heard, Listener, SpeechToText, advance
from tests.helpers.signal import speechlike
from tests.helpers.tiny import WAYS, sound, tiny_model, use

PAD, GARDEN, KNOW, HEAR, PAIR, ED = 3, 306, 310, 309, 290, 271
DELAY = 6
FRAMES = int(os.environ.get("MOSHI_TEST_STT_FRAMES", "1000"))
MANY = int(os.environ.get("MOSHI_TEST_ROWS", "12"))


def model_for(delay: int = DELAY, lead: int = 2, way: str = "numpy") -> SpeechToText:
    """A random model whose text runs ``delay`` frames behind, after ``lead`` frames of silence."""
    rate = tiny_model().frame_rate
    stt = {"audio_delay_seconds": delay / rate, "audio_silence_prefix_seconds": lead / rate}
    model = tiny_model(way, stt=stt)
    assert isinstance(model, SpeechToText)
    return model


class Script:
    """Takes a batch's place: writes scripted tokens, each in a given frame of the whole stream."""

    def __init__(self, model: SpeechToText, tokens: Mapping[int, int], pauses: Collection[int] = (), again: int = 0):
        self.model, self.tokens, self.pauses, self.again = model, tokens, pauses, again
        self.frame = 0  # the stream's next one: where a row that joins begins
        self.rows: dict[int, Any] = {}
        self.begun: list[int] = []
        self.count = 0

    def join(self, settings: Settings | None = None, snapshot: Any = None) -> int:
        text, first = _Text(self.model.engine, self.model.engine.lead), max(self.frame - self.again, 0)
        at = first
        if snapshot is None:
            self.begun.append(first)
        else:
            words, first, at = snapshot
            text.restore(words)
        self.rows[self.count] = [text, first, at]
        self.count += 1
        return self.count - 1

    def open(self, row: int) -> None:
        for index in range(-1, self.model.engine.lead):
            self._write(row, index, PAD)

    def leave(self, row: int) -> None:
        del self.rows[row]

    def snapshot(self, row: int) -> Any:
        text, first, at = self.rows[row]
        return text.snapshot(), first, at

    def flush(self, row: int) -> Any:
        return self.rows[row][0].flush()

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, SessionFrame]:
        return {row: self._frame(row) for row in frames}

    def _frame(self, row: int) -> SessionFrame:
        _, first, at = self.rows[row]
        self.rows[row][2] += 1
        index = at - first + self.model.engine.lead
        # A model writes about what it has heard.
        text, words = self._write(row, index, self.tokens.get(at, PAD) if at - DELAY >= first or not first else PAD)
        heads = np.zeros((1, 4, 6), np.float32)
        heads[0, 2, 0] = float(at in self.pauses)
        return SessionFrame(at, np.zeros(0, np.float32), text, words, self._step(index, PAD, heads), False)

    def _write(self, row: int, index: int, token: int) -> Any:
        return self.rows[row][0].step(self._step(index, token))

    def _step(self, index: int, token: int, heads: Any = None) -> Step:
        return Step(index, np.array([token], np.int32), -1, None, None, heads)


def listened(model: SpeechToText, script: Script, frames: int, **limits: int) -> list[Heard]:
    listener = Listener(model, script, Settings())  # type: ignore[arg-type]
    for name, value in {"_soft": 10_000, "_full": 10_000, **limits}.items():
        setattr(listener, name, value)
    heard: list[Heard] = []
    for _ in range(frames):
        script.frame = len(heard) + 1
        heard += listener.feed(np.zeros(model.frame_size, np.float32))
    return heard + list(listener.finish())


def words_of(heard: list[Heard]) -> list[Word]:
    return [word for one in heard for word in one.words]


def test_words_and_times() -> None:
    """If this fails, words are lost or joined, or their times are not those of the sound."""
    model = model_for()
    tokens = {19: EPAD, 20: GARDEN, 21: ED, 30: EPAD, 31: KNOW, 32: HEAR}
    heard = listened(model, Script(model, tokens), 60)
    rate, delay = model.frame_rate, 6
    # SPEC of the programs: after a 0 that follows sound frame s, and a piece in the next, (s + 2) / rate - delay.
    assert [(word.text.strip(), round(word.start * rate)) for word in words_of(heard)] == [
        ("gardened", 19 + 2 - delay),
        ("know", 30 + 2 - delay),
        ("hear", 31 + 2 - delay),
    ]
    assert all(word.start < word.end <= 60 / rate for word in words_of(heard))
    assert [index for index, one in enumerate(heard) if one.text.strip()] == [20, 21, 31, 32]


def pytorch_starts(row: list[int], delay: int) -> list[int]:
    """Starts of segments, in frames, as Kyutai's script for PyTorch counts: the position of a 0, plus one.

    Its positions are ours less one, since its first frame is lost.
    """
    return [s + 1 - delay for s, token in enumerate(row) if token == EPAD]


def rust_starts(row: list[int], delay: int) -> list[int]:
    """Starts of words by the rule of Kyutai's Rust server, whose call s + 1 reads sound frame s."""
    starts, pending, last = [], False, 0
    for s, token in enumerate(row):
        step = s + 2
        if token in (EPAD, PAD):
            if pending:
                starts.append(last)
            pending = False
            if token == EPAD:
                last = step - delay
        else:
            pending = True
    return starts


@pytest.mark.parametrize("row", [[3, 3, 0, GARDEN, ED, 3, 0, KNOW, 3, 3, 2], [3, 0, HEAR, 3, 3, 0, GARDEN, PAIR, 3, 3]])
def test_times_beside_the_other_programs(row: list[int]) -> None:
    """If this fails, our times differ from Kyutai's programs by something else than their known shifts."""
    model, delay, start = model_for(), 6, 20
    heard = listened(model, Script(model, {start + s: token for s, token in enumerate(row)}), start + len(row) + 20)
    ours = [round(word.start * model.frame_rate) for word in words_of(heard)]
    assert [frame + start + 1 for frame in pytorch_starts(row, delay)] == ours
    assert [frame + start for frame in rust_starts(row, delay)] == ours


def test_the_end_of_a_turn_comes_at_once() -> None:
    """If this fails, the last words of a turn come the model's delay late, twice, or not at all."""
    model = model_for()
    tokens = {19: EPAD, 20: GARDEN, 42: EPAD, 43: KNOW, 60: EPAD, 61: HEAR}
    heard = listened(model, Script(model, tokens, pauses=range(40, 50)), 90)
    assert [word.text.strip() for word in words_of(heard)] == ["garden", "know", "hear"]
    assert [index for index, one in enumerate(heard) if one.turn_ended] == [40, 90]
    assert [word.text.strip() for word in heard[40].words] == ["know"]
    plain = listened(model, Script(model, tokens), 90)
    assert [(word.text, word.start) for word in words_of(heard)] == [
        (word.text, word.start) for word in words_of(plain)
    ]
    assert heard[45].pause == 1.0 and heard[55].pause == 0.0


def test_words_of_the_invented_silence_are_left_out() -> None:
    """If this fails, what the model writes about silence that nobody recorded is given as the user's words."""
    model = model_for()
    tokens = {19: EPAD, 20: GARDEN, 47: EPAD, 48: KNOW}  # said at frame 43, after the pause at 40
    heard = listened(model, Script(model, tokens, pauses=[40]), 90)
    assert [word.text.strip() for word in heard[40].words] == []
    assert [word.text.strip() for word in words_of(heard)] == ["garden", "know"]


def test_a_long_stream_begins_anew_in_a_pause() -> None:
    """If this fails, long recordings go silent, lose words where a stream begins anew, or their times jump."""
    model = model_for()
    tokens = {19: EPAD, 20: GARDEN, 62: EPAD, 63: KNOW, 99: EPAD, 100: HEAR}
    script = Script(model, tokens, pauses=[30, 61])
    heard = listened(model, script, 150, _soft=50, _full=80)
    rate = model.frame_rate
    assert script.begun[:2] == [0, 62] and len(script.rows) == 0
    assert [word.text.strip() for word in words_of(heard)] == ["garden", "know", "hear"]
    starts = [round(word.start * rate) for word in words_of(heard)]
    assert starts == [20 + 1 - 6, 63 + 1 - 6, 100 + 1 - 6]


@pytest.mark.parametrize("every", [7, 10, 23])
def test_a_long_stream_without_a_pause(every: int) -> None:
    """If this fails, a stream without pauses outgrows the context, or words are lost or come twice at a beginning."""
    model = model_for()
    tokens = dict.fromkeys(range(10, 300, every), GARDEN)
    script = Script(model, tokens, again=25)  # the sound that a new row hears once more
    heard = listened(model, script, 320, _soft=50, _full=80)
    assert len(script.begun) > 3
    starts = [round(word.start * model.frame_rate) for word in words_of(heard)]
    assert starts == [frame + 1 - DELAY for frame in tokens]


@pytest.mark.parametrize("way", WAYS)
def test_an_hour(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, memory grows with a stream's length, or its times go back."""
    use(way, monkeypatch)
    model, frames = model_for(way=way), FRAMES if way == "numpy" else FRAMES // 10
    speech = speechlike(50 * model.frame_size, model.sample_rate).astype(np.float32)
    with model.listen(seed=1) as listener:
        listener._soft, listener._full = 200, 400
        heard: list[Heard] = []
        for _ in range(frames // 50):
            heard += [one for one in listener.feed(speech) if one.words or one.turn_ended]
            assert len(listener.batch.rows) == 1 and len(listener._early) < 40
        assert listener.time == pytest.approx(frames // 50 * 50 / model.frame_rate)
        heard += listener.finish()
    starts = [word.start for word in words_of(heard)]
    assert len(starts) > 5 and starts == sorted(starts)
    assert not listener.batch.rows


@pytest.mark.parametrize("way", WAYS)
def test_many_recordings_together(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a recording is written down differently beside others, or out of order."""
    use(way, monkeypatch)
    model, count = model_for(way=way), MANY if way == "numpy" else 4
    recordings = [sound(model, 20 + 7 * (number % 5), seed=number) for number in range(count)]
    together = model.transcribe_all(recordings, at_once=5)
    for recording, found in zip(recordings, together, strict=True):
        alone = model.transcribe(np.concatenate(recording), model.sample_rate)
        assert (found.text, found.words, found.turns) == (alone.text, alone.words, alone.turns)
        assert found.seconds_audio == pytest.approx(len(recording) / model.frame_rate)


def test_the_end_of_a_turn_changes_nothing() -> None:
    """If this fails, asking for the last words early changes what the model hears or writes afterwards."""
    model = model_for()
    listener, plain = model.listen(seed=2), model.listen(seed=2)
    for pcm in sound(model, 30):
        advance({listener: pcm})
        advance({plain: pcm})
        listener._end_of_turn()
    mine, its = (dict(tree_flatten(one.batch.snapshot(one.row))) for one in (listener, plain))
    assert mine.keys() == its.keys()
    assert all(np.array_equal(np.array(mine[name]), np.array(its[name])) for name in mine)


def test_sound_of_any_length() -> None:
    """If this fails, the size of an app's blocks changes what is heard."""
    model = model_for()
    pcm = np.concatenate(sound(model, 30))
    whole, pieces = model.listen(), model.listen()
    expected = list(whole.feed(pcm))
    found = [heard for start in range(0, len(pcm), 37) for heard in pieces.feed(pcm[start : start + 37])]
    assert found == expected
    assert list(pieces.feed(pcm[:1])) == [] and list(pieces.finish())[-1].time == pytest.approx(31 / model.frame_rate)


def test_bad_input() -> None:
    """If this fails, sound that cannot be used gives words, a crash or a reason that does not help."""
    model = model_for()
    with pytest.raises(AudioError, match="no samples"):
        model.transcribe(np.zeros(0, np.float32), 24_000)
    with pytest.raises(AudioError, match="finite"):
        model.transcribe(np.array([0.0, np.nan]), 24_000)
    with pytest.raises(ConfigError, match="at_once"):
        model.transcribe_all([], at_once=0)
    assert model.transcribe(np.zeros(1, np.float32), 24_000).seconds_audio == pytest.approx(1 / model.frame_rate)
    listener, other = model.listen(), model.listen()
    with pytest.raises(StateError, match="2 batches"):
        advance({listener: sound(model, 1)[0], other: sound(model, 1)[0]})
    listener.close()
    with pytest.raises(StateError, match="has ended"):
        list(listener.feed(sound(model, 1)[0]))
    assert isinstance(other.batch, Batch)
