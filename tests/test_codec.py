"""The one face of both codecs: numpy in and out, streams in threads, errors by name."""

from __future__ import annotations

import json
import queue
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from moshi_mlx.codec import Codec, MimiCodec, RustMimi, make_codec
from moshi_mlx.errors import AudioError, CheckpointError, CodecError, ConfigError, TokenError
from moshi_mlx.mimi import MimiConfig
from tests.helpers.mimi import tiny_mimi
from tests.helpers.signal import speechlike

GOLDEN = Path(__file__).parent / "golden" / "mimi" / "published_shape"


@pytest.fixture(scope="module", params=[True, False], ids=["numpy", "mlx"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return MimiCodec(tiny_mimi(), lean=request.param)


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
    with pytest.raises(CodecError, match="use kind='mlx'"):
        make_codec(GOLDEN / "mimi.safetensors", config, kind="rust")
    with pytest.raises(ConfigError, match="not 'fast'"):
        make_codec(GOLDEN / "mimi.safetensors", config, kind="fast")
    with pytest.raises(CheckpointError, match="nowhere"):
        make_codec(GOLDEN / "nowhere.safetensors")


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


def test_rust_errors_are_named(rust: RustMimi, tmp_path: Path) -> None:
    """If this fails, silence or a Rust backtrace is all that a user sees."""
    with pytest.raises(CodecError, match="gave no codes"):
        rust.encoder().encode(np.full(1920, 9, np.float32))
    rust.max_latents = 2
    stream = rust.encoder()
    stream._tokenizer._limit = 10  # type: ignore[attr-defined]
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
    import moshi_mlx.codec as module

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
