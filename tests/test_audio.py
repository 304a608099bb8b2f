"""What is taken for sound, and what is refused with a sentence, at every entrance alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import moshi_mlx
from moshi_mlx.audio import TAIL, as_floats, as_mono, check_block, check_frame
from moshi_mlx.errors import AudioError
from moshi_mlx.realtime import Conversation

SIZE = 1920


@pytest.fixture(scope="module")
def model() -> moshi_mlx.Moshi:
    return moshi_mlx.load("small")


def tone(count: int = SIZE) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 220 * np.arange(count) / 24000)).astype(np.float32)


ENTRANCES: dict[str, Callable[[moshi_mlx.Moshi, Any], object]] = {
    "reply": lambda model, pcm: model.reply(pcm, 24000, tail=0),
    "step": lambda model, pcm: model.session().step(pcm),
    "feed": lambda model, pcm: Conversation(model).feed(pcm),
    "as_mono": lambda model, pcm: as_mono(pcm, 24000, 24000),
    "check_frame": lambda model, pcm: check_frame(pcm, SIZE),
    "check_block": lambda model, pcm: check_block(pcm),
}

REFUSED = {
    "integers that were made floats": ((tone() * 32768), r"samples reach 13,\d\d\d.* divide by the full scale"),
    "int64": ([0] * SIZE, r"samples of type int64 have no known full scale: give floats"),
    "uint16": (np.zeros(SIZE, np.uint16), r"samples of type uint16 have no known full scale"),
    "bool": (np.zeros(SIZE, bool), r"samples of type bool"),
    "complex": (np.zeros(SIZE, np.complex64), r"samples of type complex64"),
    "text": ("question.wav", r"samples must be numbers, found text: read a sound file first"),
    "texts": (["0.1"] * SIZE, r"samples must be numbers, found text"),
    "bytes": (b"\0\0" * SIZE, r"samples must be numbers, found text"),
    "nothing": (None, r"samples must be numbers, found Python objects"),
    "objects": ([None] * SIZE, r"samples must be numbers, found Python objects"),
    "ragged": ([[0.0], [0.0, 1.0]], r"numpy cannot read the samples \(.*give an array of numbers"),
    "one number": (0.5, r"pcm is one number"),
    "channels first": (np.zeros((2, SIZE), np.float32), r"shape \[2, 1920\]"),
    "three axes": (np.zeros((SIZE, 1, 1), np.float32), r"shape \[1920, 1, 1\]"),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_everywhere(model: moshi_mlx.Moshi, entrance: str, case: str) -> None:
    """If this fails, sound that means something else is heard as noise, or ends in a traceback of numpy's."""
    pcm, message = REFUSED[case]
    with pytest.raises(AudioError) as raised:
        ENTRANCES[entrance](model, pcm)
    assert re.search(message, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entrance", sorted(set(ENTRANCES) - {"feed"}))
def test_numbers_that_are_none(model: moshi_mlx.Moshi, entrance: str, bad: float) -> None:
    """If this fails, one NaN spoils everything that a session says afterwards."""
    pcm = tone()
    pcm[7] = bad
    with pytest.raises(AudioError, match="not (a )?finite number"):
        ENTRANCES[entrance](model, pcm)


def test_too_few_too_many_none(model: moshi_mlx.Moshi) -> None:
    """If this fails, a frame of another length shifts everything after it, or an empty recording is a numpy error."""
    for entrance in ("step", "check_frame"):
        for count in (0, SIZE - 1, SIZE + 1):
            with pytest.raises(AudioError, match=rf"a frame is 1920 samples of one channel, found shape \[{count}\]"):
                ENTRANCES[entrance](model, tone(count))
    for empty in (np.zeros(0), np.zeros((0, 2)), np.zeros((9, 0)), []):
        with pytest.raises(AudioError, match="the recording has no samples"):
            model.reply(empty, 24000)
    assert len(check_block([])) == 0, "an audio callback may bring nothing"


@pytest.mark.parametrize("rate", [0, -24000, 24, np.nan, np.inf, 1e9, "24000", None, True, [24000]])
def test_rates(model: moshi_mlx.Moshi, rate: Any) -> None:
    """If this fails, a rate in kilohertz or from a broken header makes a recording of no length, or of hours."""
    with pytest.raises(AudioError, match="a sample rate"):
        model.reply(tone(), rate)


@pytest.mark.parametrize("tail", [-1, -0.001, np.nan, np.inf, 1e9, "4", None])
def test_tails(model: moshi_mlx.Moshi, tail: Any) -> None:
    """If this fails, a negative tail cuts the question, or an endless one fills the memory."""
    with pytest.raises(AudioError, match="tail is the silence after the recording, from 0 to 3600 seconds"):
        model.reply(tone(), 24000, tail=tail)


def test_integers_sound_as_floats_do(model: moshi_mlx.Moshi) -> None:
    """If this fails, sound of a 16-bit source is heard 32,768 times too loud, and not understood."""
    floats = np.round(tone() * 2**15) / 2**15
    integers = [(floats * 2**15).astype(np.int16), (floats * 2**31).astype(np.int32)]
    for given in integers:
        assert np.array_equal(as_floats(given), floats) and as_floats(given).dtype == np.float32
        for heard in (check_frame(given, SIZE), check_block(given), as_mono(given, 24000, 24000)):
            assert np.array_equal(heard, floats)
        stereo = np.stack([given, given], axis=1)
        assert np.array_equal(as_mono(stereo, 24000, 24000), floats)
    assert as_floats(np.array([0, 128, 255], np.uint8)).tolist() == [-1, 0, 127 / 128]
    assert as_floats(np.array([-32768, 32767], np.int16)).tolist() == [-1, 32767 / 32768]
    first = [np.array(model.session().step(pcm).step.text) for pcm in (floats.astype(np.float32), integers[0])]
    assert np.array_equal(*first)
    conversation = Conversation(model)
    assert conversation.feed(integers[0]) == SIZE
    heard = np.zeros(SIZE, np.float32)
    conversation._pcm_in.read_into(heard)
    assert np.array_equal(heard, floats)


def test_what_passes() -> None:
    """If this fails, sound that is in order is refused, or copied for nothing in an audio callback."""
    pcm = tone()
    assert check_block(pcm) is pcm and check_frame(pcm, SIZE) is pcm
    for same in (pcm.astype(np.float64), pcm.astype(np.float64).tolist(), mx.array(pcm), pcm[::-1][::-1]):
        assert np.array_equal(check_frame(same, SIZE), pcm)
    assert check_block(pcm[::2]).flags.c_contiguous
    assert as_floats(pcm.astype(np.float16)).dtype == np.float32
    assert np.array_equal(check_block(8 * pcm), 8 * pcm), "a little beyond full scale is loud, not wrong"
    assert np.isnan(check_block(np.full(3, np.nan), finite=False)).all()
    assert len(as_mono(tone(22050), 22050, 24000)) == 24000 == len(as_mono(tone(44100), np.float64(44100), 24000))


def test_a_reply_leaves_time_for_an_answer(model: moshi_mlx.Moshi) -> None:
    """If this fails, the shortest program that asks a question hears nothing: the answer comes after it."""
    from moshi_mlx_app.commands import file

    assert file.TAIL is TAIL and TAIL >= 2
    reply = model.reply(tone(), 24000)
    assert len(reply.pcm) == len(reply.user_pcm) >= SIZE + TAIL * 24000
    assert model.reply(tone(), 24000, tail=0).frames == 1
    assert model.reply(np.zeros(1), 192000, tail=0).frames == 1, "less than a sample at the model's rate"
