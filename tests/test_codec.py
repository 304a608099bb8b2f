"""The one face of both codecs: numpy in and out, streams in threads, errors by name."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.codec.base import (
    KINDS,
    Codec,
    MimiCodec,
    MlxMimi,
    NumpyMimi,
    RustMimi,
    make_codec,
    measure_codecs,
    mimi_codec,
)
from moshi_mlx.errors import AudioError, CheckpointError, CodecError, ConfigError, StateError, TokenError
from moshi_mlx.loading import measure_codec
from moshi_mlx.models.mimi import MimiConfig
from moshi_mlx.state import concatenate_rows, copy_state, load_state, put_rows, save_state, state_arrays, take_rows
from tests.helpers.mimi import TINY, tiny_mimi, unproven_differences
from tests.helpers.signal import speechlike

GOLDEN = Path(__file__).parent / "golden" / "mimi" / "published_shape"


@pytest.fixture(scope="module", params=["numpy", "mlx"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return mimi_codec(tiny_mimi(), request.param)


@pytest.fixture(scope="module")
def pcm() -> np.ndarray:
    return speechlike(30 * 160, 24000)


def test_sizes(codec: Codec) -> None:
    """If this fails, everything around the codec counts wrongly."""
    assert (codec.sample_rate, codec.frame_size, codec.frame_rate) == (24000, 160, 150.0)
    assert (codec.num_codebooks, codec.card) == (4, 32)


def test_a_recording_goes_through_as_it_does_live(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, files and conversations differ."""
    codes = codec.encode(pcm)
    assert codes.dtype == np.int32 and codes.shape == (4, 30)
    encoder, decoder = codec.encoder(), codec.decoder()
    columns = np.stack([encoder.encode(frame) for frame in pcm.reshape(-1, 160)], axis=1)
    np.testing.assert_array_equal(columns, codes)
    samples = codec.decode(codes)
    assert samples.dtype == np.float32 and samples.shape == (30 * 160,)
    live = np.concatenate([decoder.decode(column) for column in codes.T])
    np.testing.assert_allclose(live, samples, atol=2e-6)


def test_a_part_of_a_frame_counts_as_one(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, the last word of a recording is lost."""
    assert codec.encode(pcm[:1]).shape == (4, 1)
    assert codec.encode(pcm[:161]).shape == (4, 2)
    np.testing.assert_array_equal(codec.encode(pcm[:200]), codec.encode(np.pad(pcm[:200], (0, 120))))


def test_reset_forgets(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, a conversation begins with the end of the one before."""
    encoder, decoder, frames = codec.encoder(), codec.decoder(), pcm.reshape(-1, 160)
    first = [encoder.encode(frame) for frame in frames]
    spoken = [decoder.decode(column) for column in first]
    encoder.reset()
    decoder.reset()
    for frame, column, samples in zip(frames, first, spoken, strict=True):
        np.testing.assert_array_equal(encoder.encode(frame), column)
        np.testing.assert_array_equal(decoder.decode(column), samples)


def test_streams_work_in_threads_of_their_own(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, the workers of a conversation crash: MLX's arrays and streams belong to their threads."""
    expected = codec.encode(pcm)
    spoken = codec.decode(expected)
    encoder, decoder = codec.encoder(), codec.decoder()  # made here, used there
    columns: queue.Queue[np.ndarray | None] = queue.Queue()
    heard, said, errors = [], [], []

    def encode() -> None:
        try:
            for frame in pcm.reshape(-1, 160):
                columns.put(encoder.encode(frame))
        except BaseException as error:
            errors.append(error)
        finally:
            columns.put(None)

    def decode() -> None:
        try:
            while (column := columns.get(timeout=30)) is not None:
                heard.append(column)
                said.append(decoder.decode(column))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for work in (encode, decode)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not errors and not any(worker.is_alive() for worker in workers)
    np.testing.assert_array_equal(np.stack(heard, axis=1), expected)
    np.testing.assert_allclose(np.concatenate(said), spoken, atol=2e-6)
    encoder.reset()  # and back in this thread
    np.testing.assert_array_equal(encoder.encode(pcm[:160]), expected[:, 0])


def test_audio_that_does_not_fit_is_named(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, a bad buffer ends in a traceback from the depths or, worse, in codes."""
    encoder = codec.encoder()
    with pytest.raises(AudioError, match="a frame has 160 samples, not 161"):
        encoder.encode(pcm[:161])
    for encode in (encoder.encode, codec.encode):
        with pytest.raises(AudioError, match="must be float32 within -1 .. 1, not float64"):
            encode(pcm[:160].astype(np.float64))
        with pytest.raises(AudioError, match="not int16"):
            encode(np.zeros(160, np.int16))
        with pytest.raises(AudioError, match=r"one axis, not shape \[160, 2\]"):
            encode(np.zeros((160, 2), np.float32))
        broken = pcm[:160].copy()
        broken[7] = np.nan
        with pytest.raises(AudioError, match="sample 7 is not a finite number"):
            encode(broken)
        broken[7] = np.inf
        with pytest.raises(AudioError, match="sample 7 is not a finite number"):
            encode(broken)
    with pytest.raises(AudioError, match="no samples"):
        codec.encode(pcm[:0])
    np.testing.assert_array_equal(encoder.encode(pcm[:160]), codec.encode(pcm[:160])[:, 0])  # none of it was heard


def test_memory_that_is_not_contiguous_is_fine(codec: Codec, pcm: np.ndarray) -> None:
    """If this fails, one channel of a stereo buffer is refused or read wrongly."""
    stereo = np.stack([pcm, -pcm], axis=1)
    np.testing.assert_array_equal(codec.encode(stereo[:, 0]), codec.encode(pcm))
    codes = codec.encode(pcm)
    np.testing.assert_array_equal(codec.decode(np.asfortranarray(codes)), codec.decode(codes))


def test_codes_that_do_not_fit_are_named(codec: Codec) -> None:
    """If this fails, a special token reaches the codec and is played as noise."""
    decoder = codec.decoder()
    with pytest.raises(TokenError, match=r"code 32 of codebook 2, frame 0, is not within 0 .. 31"):
        decoder.decode(np.array([0, 31, 32, 5]))
    with pytest.raises(TokenError, match="code -1 of codebook 0"):
        decoder.decode(np.array([-1, 0, 0, 0]))
    with pytest.raises(TokenError, match=r"shape \[4, frames\], not \[3, 1\]"):
        decoder.decode(np.zeros(3, np.int32))
    with pytest.raises(TokenError, match="one axis"):
        decoder.decode(np.zeros((4, 1), np.int32))
    with pytest.raises(TokenError, match="integers, not float64"):
        decoder.decode(np.zeros(4))
    with pytest.raises(TokenError, match="frame 1, is not within"):
        codec.decode(np.array([[0, 0], [0, 0], [0, 99], [0, 0]]))
    with pytest.raises(TokenError, match=r"not \[4, 0\]"):
        codec.decode(np.zeros((4, 0), np.int32))


def test_a_small_codec_comes_in_mlx_whatever_is_installed() -> None:
    """If this fails, the Rust codec is given a file that it cannot read."""
    config = MimiConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))
    codec = make_codec(GOLDEN / "mimi.safetensors", config, num_codebooks=3)
    assert isinstance(codec, MimiCodec) and codec.num_codebooks == 3
    with pytest.raises(CodecError, match="choose the codec mlx or numpy"):
        make_codec(GOLDEN / "mimi.safetensors", config, kind="rust")
    with pytest.raises(ConfigError, match="not 'fast'"):
        make_codec(GOLDEN / "mimi.safetensors", config, kind="fast")
    with pytest.raises(CheckpointError, match="nowhere"):
        make_codec(GOLDEN / "nowhere.safetensors")


# Many streams are rows of one state


def sounds(count: int, frames: int) -> np.ndarray:
    """[count, frames * 160]"""
    return np.stack([speechlike(frames * 160, 24000, seed) for seed in range(count)])


def by_frames(step: Callable[[np.ndarray], np.ndarray], frames: np.ndarray) -> np.ndarray:
    return np.stack([step(frame) for frame in frames])


def test_a_row_computes_what_it_computes_alone(codec: MimiCodec) -> None:
    """If this fails, a conversation hears its neighbours, or a neighbour's pause shifts it; in numpy by no bit."""
    rng = np.random.default_rng(0)
    heard, said = sounds(5, 40), rng.integers(0, codec.card, (5, 4, 40)).astype(np.int32)
    encoder, decoder = codec.init_encoder_state(5), codec.init_decoder_state(5)
    at = np.zeros(5, int)
    codes: list[list[np.ndarray]] = [[] for _ in range(5)]
    pcm: list[list[np.ndarray]] = [[] for _ in range(5)]
    while (left := np.flatnonzero(at < 40)).size:
        rows = rng.permutation(left)[: rng.integers(1, left.size + 1)]
        frames = np.stack([heard[row, 160 * at[row] : 160 * (at[row] + 1)] for row in rows])
        columns = np.stack([said[row, :, at[row] : at[row] + 1] for row in rows])
        for row, new, samples in zip(
            rows, codec.encode_step(frames, encoder, rows), codec.decode_step(columns, decoder, rows), strict=True
        ):
            codes[row].append(new)
            pcm[row].append(samples)
        at[rows] += 1
    for row in range(5):
        ours, alone = np.concatenate(codes[row], axis=1), by_frames(codec.encoder().encode, heard[row].reshape(40, 160))
        voice, single = np.concatenate(pcm[row]), by_frames(codec.decoder().decode, said[row].T)
        if codec.kind == "numpy":
            np.testing.assert_array_equal(ours, alone.T)
            np.testing.assert_array_equal(voice, single.ravel())
        else:
            assert unproven_differences(codec.mimi, heard[row], ours, alone.T) == []
            np.testing.assert_allclose(voice, single.ravel(), atol=3e-6)


def test_a_row_that_waits_keeps_every_bit(codec: MimiCodec) -> None:
    """If this fails, a conversation whose client is late goes on with a click."""
    for state, step in ((codec.init_encoder_state(4), sounds(4, 1)), (codec.init_decoder_state(4), None)):
        before = codec.export_state(take_rows(state, [1, 3]))
        if step is not None:
            codec.encode_step(step[:2], state, [0, 2])
        else:
            codec.decode_step(np.ones((2, 4, 1), int), state, [2, 0])
        after = codec.export_state(take_rows(state, [1, 3]))
        for one, two in zip(state_arrays(before), state_arrays(after), strict=True):
            np.testing.assert_array_equal(one, two)
        moved = codec.export_state(take_rows(state, [0, 2]))
        assert any((a != b).any() for a, b in zip(state_arrays(before), state_arrays(moved), strict=True))


def test_rows_join_leave_and_begin_again(codec: MimiCodec) -> None:
    """If this fails, a new stream in a free row continues the previous one."""
    codes = np.random.default_rng(0).integers(0, codec.card, (4, 4, 30)).astype(np.int32)
    state = codec.init_decoder_state(3)
    early = np.concatenate([codec.decode_step(codes[:3, :, at : at + 1], state) for at in range(12)], axis=1)
    put_rows(state, [0], codec.init_decoder_state(1))  # the first begins again
    state = concatenate_rows([state, codec.init_decoder_state(1)])  # a fourth joins
    state = take_rows(state, [3, 0, 2])  # the second leaves
    begun = np.array([0, 0, 12])
    late = [codec.decode_step(codes[[3, 0, 2], :, begun + at][:, :, None], state) for at in range(18)]
    fourth, first, third = np.concatenate(late, axis=1)
    for row, ours in ((3, fourth), (0, first), (2, np.concatenate([early[2], third]))):
        np.testing.assert_allclose(ours, codec.decode(codes[row])[: len(ours)], atol=3e-6)


def test_disjoint_rows_may_advance_in_two_threads() -> None:
    """If this fails, two workers that share a state of the numpy codec write over each other's rows."""
    codec = mimi_codec(tiny_mimi(), "numpy")
    heard = sounds(6, 30)
    expected, state = codec.init_encoder_state(6), codec.init_encoder_state(6)
    found: dict[int, list[np.ndarray]] = {0: [], 3: []}
    errors = []

    def work(first: int) -> None:
        rows = [first, first + 1, first + 2]
        try:
            for at in range(0, heard.shape[1], 160):
                found[first].append(codec.encode_step(heard[rows, at : at + 160], state, rows))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not errors
    for first, parts in found.items():
        rows = [first, first + 1, first + 2]
        for index, at in enumerate(range(0, heard.shape[1], 160)):
            alone = codec.encode_step(heard[rows, at : at + 160], expected, rows)
            np.testing.assert_array_equal(parts[index], alone)


def test_rows_that_do_not_fit_are_named(codec: MimiCodec) -> None:
    """If this fails, a mixed-up row ends in a traceback from the depths, or advances twice."""
    state, frames = codec.init_encoder_state(3), np.zeros((2, 160), np.float32)
    before = codec.export_state(state)
    with pytest.raises(StateError, match="holds 3 sequences, the input 2"):
        codec.encode_step(frames, state)
    for rows in ([0, 0], [1, 3], [-1, 0]):
        with pytest.raises(StateError, match=r"distinct and within 0 .. 2"):
            codec.encode_step(frames, state, rows)
    with pytest.raises(StateError, match="2 sequences, and rows of shape"):
        codec.encode_step(frames, state, [0])
    with pytest.raises(AudioError, match=r"\[rows, whole frames of 160\], not \[2, 100\]"):
        codec.encode_step(frames[:, :100], state, [0, 1])
    frames[1, 3] = np.nan
    with pytest.raises(AudioError, match="sample 3 is not a finite number"):
        codec.encode_step(frames, state, [0, 1])
    with pytest.raises(TokenError, match="three axes"):
        codec.decode_step(np.zeros((4, 1), int), codec.init_decoder_state(1))
    with pytest.raises(TokenError, match="code 32 of codebook 1"):
        codec.decode_step(np.array([[[0], [32], [0], [0]]]), codec.init_decoder_state(1))
    for one, two in zip(state_arrays(before), state_arrays(codec.export_state(state)), strict=True):
        np.testing.assert_array_equal(one, two)


# A stream's state is a value


def test_a_stream_goes_on_where_it_was_saved(codec: MimiCodec, pcm: np.ndarray, tmp_path: Path) -> None:
    """If this fails, a conversation that is saved and resumed goes on with a click or with other codes."""
    frames = pcm.reshape(-1, 160)
    encoder, decoder = codec.encoder(), codec.decoder()
    for frame in frames[:11]:
        decoder.decode(encoder.encode(frame))
    for name, stream in (("encoder", encoder), ("decoder", decoder)):
        save_state(tmp_path / f"{name}.safetensors", stream.snapshot())
    codes = [encoder.encode(frame) for frame in frames[11:]]
    samples = [decoder.decode(column) for column in codes]
    again, spoken = codec.encoder(), codec.decoder()
    for frame in frames[:3]:
        again.encode(frame)
    again.restore(load_state(tmp_path / "encoder.safetensors"))
    spoken.restore(load_state(tmp_path / "decoder.safetensors"))
    for frame, column, sound in zip(frames[11:], codes, samples, strict=True):
        np.testing.assert_array_equal(again.encode(frame), column)
        np.testing.assert_array_equal(spoken.decode(column), sound)


@pytest.mark.parametrize(("first", "second"), [("numpy", "mlx"), ("mlx", "numpy")])
def test_a_stream_goes_on_in_the_other_codec(first: str, second: str, pcm: np.ndarray) -> None:
    """If this fails, a conversation that was saved on a machine without GPU cannot go on with one."""
    mimi = tiny_mimi()
    one, other = mimi_codec(mimi, first), mimi_codec(mimi, second)
    frames, expected = pcm.reshape(-1, 160), one.encode(pcm)
    encoder, decoder = one.encoder(), one.decoder()
    ours = [encoder.encode(frame) for frame in frames[:11]]
    sound = [decoder.decode(column) for column in ours]
    moved, voice = other.encoder(), other.decoder()
    moved.restore(encoder.snapshot())
    voice.restore(decoder.snapshot())
    ours += [moved.encode(frame) for frame in frames[11:]]
    sound += [voice.decode(column) for column in expected[:, 11:].T]
    assert unproven_differences(mimi, pcm, np.stack(ours, axis=1), expected) == []
    np.testing.assert_allclose(np.concatenate(sound), one.decode(expected), atol=3e-6)


def test_a_snapshot_is_a_copy_and_a_foreign_one_is_refused(codec: MimiCodec, pcm: np.ndarray) -> None:
    """If this fails, a snapshot changes while the conversation goes on, or another model's is played as noise."""
    encoder = codec.encoder()
    encoder.encode(pcm[:160])
    saved = encoder.snapshot()
    kept = copy_state(saved)
    following = encoder.encode(pcm[160:320])
    for one, two in zip(state_arrays(saved), state_arrays(kept), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(StateError, match="does not fit"):
        encoder.restore(codec.decoder().snapshot())
    other = mimi_codec(tiny_mimi(transformer={**TINY["transformer"], "context": 4}), codec.kind)
    with pytest.raises(StateError, match="does not fit"):
        encoder.restore(other.encoder().snapshot())
    damaged = copy_state(saved)
    damaged["transformer"]["offset"] -= 100
    with pytest.raises(StateError, match="damaged"):
        encoder.restore(damaged)
    encoder.restore(saved)
    np.testing.assert_array_equal(encoder.encode(pcm[160:320]), following)
    encoder.restore(saved)
    encoder.reset()
    np.testing.assert_array_equal(encoder.encode(pcm[:160]), codec.encode(pcm[:160])[:, 0])


def test_the_kinds_are_what_they_say() -> None:
    """If this fails, a request for MLX gets numpy, or the other way round."""
    config = MimiConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))
    path = GOLDEN / "mimi.safetensors"
    assert type(make_codec(path, config, kind="numpy")) is NumpyMimi
    assert type(make_codec(path, config, kind="mlx")) is MlxMimi
    usual = NumpyMimi if mx.default_device().type == mx.cpu else MlxMimi
    assert type(make_codec(path, config)) is usual
    assert {codec.kind for codec in (NumpyMimi, MlxMimi, RustMimi)} | {"auto"} == set(KINDS)


def test_what_computes_is_measured(rust: RustMimi, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a slow codec is chosen, or the choice takes as long as a conversation is willing to wait."""
    config = MimiConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))
    began = time.perf_counter()
    found = measure_codecs(GOLDEN / "mimi.safetensors", config, seconds=0.05)
    assert time.perf_counter() - began < 5
    assert set(found) == {"numpy", "mlx"} and all(value > 0 for value in found.values())
    assert list(found.values()) == sorted(found.values())

    assert set(measure_codec("small")) == {"numpy", "mlx"}

    def load(path: Any, config: MimiConfig, num_codebooks: int) -> Any:
        return tiny_mimi()

    monkeypatch.setattr("moshi_mlx.codec.base.load_mimi", load)
    monkeypatch.setattr("moshi_mlx.codec.base.is_published_layout", lambda path: True)
    assert set(measure_codecs(rust.path, num_codebooks=8, seconds=0.05)) == {"numpy", "mlx", "rust"}
    monkeypatch.setattr(Tokenizer, "encode_step", lambda self, pcm: None)  # one that fails is no candidate
    assert set(measure_codecs(rust.path, num_codebooks=8, seconds=0.05)) == {"numpy", "mlx"}


# The Rust codec behind a stand-in for its package, since its weights are too large to be kept here.
# tests/parity runs the true one.


class Tokenizer:
    """Counts like rustymimi: it fails past its length, and its own reset does not help."""

    made: ClassVar[list[Tokenizer]] = []

    def __init__(self, path: str, *, num_codebooks: int, max_seq_len: int):
        if not Path(path).name.startswith("mimi"):
            raise ValueError(f"cannot read {path}\n   0: backtrace\n   1: more of it")
        self.num_codebooks, self.left = num_codebooks, max_seq_len
        Tokenizer.made.append(self)

    def _count(self) -> None:
        self.left -= 2
        if self.left < 0:
            raise ValueError("narrow invalid args start + len > dim_len\n   0: backtrace")

    def encode_step(self, pcm: np.ndarray) -> np.ndarray | None:
        assert pcm.dtype == np.float32 and pcm.flags.c_contiguous and pcm.shape == (1, 1, 1920)
        self._count()
        if pcm[0, 0, 0] == 9:
            return None
        return np.full((1, self.num_codebooks, 1), self.left, np.uint32)

    def decode_step(self, codes: np.ndarray) -> np.ndarray:
        assert codes.dtype == np.uint32 and codes.flags.c_contiguous and codes.shape == (1, self.num_codebooks, 1)
        self._count()
        return np.full((1, 1, 1920), 0.0 if codes.max() == 0 else 0.5, np.float32)


@pytest.fixture
def rust(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RustMimi:
    module = types.ModuleType("rustymimi")
    module.Tokenizer = Tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rustymimi", module)
    monkeypatch.setattr(Tokenizer, "made", [])
    path = tmp_path / "mimi.safetensors"
    path.touch()
    codec = RustMimi(path, 8)
    codec.max_latents = 40
    return codec


def test_rust_streams_go_on_past_the_length_of_their_tables(rust: RustMimi) -> None:
    """If this fails, a conversation dies after some hours."""
    encoder, decoder = rust.encoder(), rust.decoder()
    assert len(Tokenizer.made) == 2, "an encoder and a decoder must not share an object that cannot do both at once"
    speech = np.full(1920, 0.5, np.float32)
    for _ in range(50):
        assert encoder.encode(speech).shape == (8,)
        assert decoder.decode(np.ones(8, np.int32)).shape == (1920,)
    assert len(Tokenizer.made) == 6


def test_rust_streams_are_renewed_in_a_pause_if_there_is_one(rust: RustMimi) -> None:
    """If this fails, the renewal cuts a word in two although a pause came in time."""
    encoder, decoder = rust.encoder(), rust.decoder()
    for _ in range(18):
        encoder.encode(np.full(1920, 0.5, np.float32))
        decoder.decode(np.ones(8, np.int32))
    assert len(Tokenizer.made) == 2
    encoder.encode(np.zeros(1920, np.float32))
    assert len(Tokenizer.made) == 3
    decoder.decode(np.zeros(8, np.int32))
    decoder.decode(np.zeros(8, np.int32))
    assert len(Tokenizer.made) == 4


def test_rust_reset_is_a_new_start(rust: RustMimi) -> None:
    """If this fails, a reset stream is not a fresh one; a reset of a fresh one should cost nothing."""
    encoder = rust.encoder()
    encoder.reset()
    assert len(Tokenizer.made) == 1
    first = encoder.encode(np.zeros(1920, np.float32))
    encoder.reset()
    np.testing.assert_array_equal(encoder.encode(np.zeros(1920, np.float32)), first)
    assert len(Tokenizer.made) == 2


def test_rust_rows_are_streams_of_their_own(rust: RustMimi) -> None:
    """If this fails, conversations share what belongs to one of them, or a snapshot pretends to hold it."""
    state = rust.init_encoder_state(3)
    assert len(Tokenizer.made) == 3 and not rust.batched
    speech = np.full((2, 1920), 0.5, np.float32)
    first = rust.encode_step(speech, state, [2, 0])
    assert first.shape == (2, 8, 1)
    rest = take_rows(state, [0, 1])
    np.testing.assert_array_equal(rust.encode_step(speech, rest)[:, 0, 0], [36, 38])
    assert rust.decode_step(np.ones((1, 8, 2), int), rust.init_decoder_state(1)).shape == (1, 3840)
    for stream in (rust.encoder(), rust.decoder()):
        for refused in (stream.snapshot, lambda stream=stream: stream.restore({})):
            with pytest.raises(CodecError, match="cannot be saved or resumed: choose the codec mlx or numpy"):
                refused()


def test_rust_errors_are_named(rust: RustMimi, tmp_path: Path) -> None:
    """If this fails, silence or a Rust backtrace is all that a user sees."""
    with pytest.raises(CodecError, match="gave no codes"):
        rust.encoder().encode(np.full(1920, 9, np.float32))
    rust.max_latents = 2
    stream = rust.encoder()
    stream.state["streams"][0]._limit = 10
    stream.encode(np.ones(1920, np.float32))
    with pytest.raises(CodecError, match="failed to encode a frame: narrow invalid args") as caught:
        stream.encode(np.ones(1920, np.float32))
    assert "backtrace" not in str(caught.value)
    other = tmp_path / "other.safetensors"
    other.touch()
    with pytest.raises(CodecError, match="cannot load .*other.safetensors: cannot read"):
        RustMimi(other).encoder()
    with pytest.raises(CheckpointError, match="no such file"):
        RustMimi(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="num_codebooks 33"):
        RustMimi(other, 33)


def test_a_missing_package_is_named(rust: RustMimi, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, Python 3.14, which has no wheel, ends in an ImportError instead of a way out."""
    monkeypatch.setitem(sys.modules, "rustymimi", None)
    with pytest.raises(CodecError, match="needs the package rustymimi"):
        rust.encoder()


def test_auto_takes_rust_for_the_published_codec(monkeypatch: pytest.MonkeyPatch, rust: RustMimi) -> None:
    """If this fails, the slow codec is taken where the fast one would do, or the fast one where it cannot."""
    import moshi_mlx.codec.base as module

    def load(path: Any, config: MimiConfig, num_codebooks: int) -> Any:
        return tiny_mimi()

    published = True
    monkeypatch.setattr(module, "load_mimi", load)
    monkeypatch.setattr(module, "is_published_layout", lambda path: published)
    assert isinstance(make_codec(rust.path, num_codebooks=8), RustMimi)
    assert isinstance(make_codec(rust.path, num_codebooks=8, kind="mlx"), MimiCodec)
    published = False
    assert isinstance(make_codec(rust.path, num_codebooks=8), MimiCodec)
    published = True
    monkeypatch.setitem(sys.modules, "rustymimi", None)
    assert isinstance(make_codec(rust.path, num_codebooks=8), MimiCodec)
