"""The full-size codec against live PyTorch `moshi` and `rustymimi`, on half a minute of speech.

The reference is PyTorch on the whole signal. Streaming, PyTorch and Rust both write the keys of a frame into their
rings before they read them: once the ring is full (after 125 frames), the first of the two latents of a frame misses
the oldest key. Ours sees the same keys however the signal is cut, so it equals PyTorch's stream only before that, or
with a ring that is one slot wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moshi")

from moshi_mlx.checkpoint.mimi import load_mimi  # noqa: E402
from moshi_mlx.codec.base import RustMimi, make_codec  # noqa: E402
from moshi_mlx.models.mimi import Mimi  # noqa: E402
from tests.helpers.mimi import unproven_differences  # noqa: E402
from tests.helpers.mimi_torch import decode_stream, encode_stream, load  # noqa: E402
from tests.parity.full_mimi import speech, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity

SECONDS = 32.0
FULL_RING = 125


@dataclass
class Run:
    path: Path
    pcm: np.ndarray
    model: Any
    codes: np.ndarray
    decoded: np.ndarray
    mimi: Mimi
    streamed: np.ndarray
    spoken: np.ndarray


def report(line: str) -> None:
    print(f"\n    {line}", end="")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("mimi")
    path = folder / "mimi.safetensors"
    pcm = speech(folder, SECONDS)
    write_checkpoint(path, pcm[: 20 * 24000])
    model, mimi = load(str(path)), load_mimi(path)
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(pcm)[None, None])[0].numpy().astype(np.int32)
        decoded = model.decode(torch.from_numpy(codes).long()[None])[0, 0].numpy()
    frames = [mx.array(frame)[None, None] for frame in pcm.reshape(-1, mimi.frame_size)]
    state, columns = mimi.init_encoder_state(1), []
    for frame in frames:
        columns.append(np.array(mimi.encode_step(frame, state))[0])
    state, parts = mimi.init_decoder_state(1), []
    for index in range(codes.shape[1]):
        parts.append(np.array(mimi.decode_step(mx.array(codes[None, :, index : index + 1]), state))[0, 0])
    yield Run(path, pcm, model, codes, decoded, mimi, np.concatenate(columns, axis=1), np.concatenate(parts))
    path.unlink()


def test_the_fixture_is_worth_comparing(run: Run) -> None:
    """If this fails, the codes are so uniform that equality says nothing."""
    used = [len(np.unique(row)) for row in run.codes]
    report(f"{run.codes.shape[1]} frames; distinct codes per codebook {min(used)} to {max(used)}")
    assert min(used) > 20


def test_streamed_codes_equal_pytorch(run: Run) -> None:
    """If this fails, models trained on PyTorch's codes hear something else from ours."""
    differ = run.streamed != run.codes
    report(f"differing codes {differ.sum()} of {differ.size}, in {differ.any(axis=0).sum()} frames")
    assert unproven_differences(run.mimi, run.pcm, run.streamed, run.codes) == []
    assert differ.any(axis=0).mean() < 0.05, "too many near-ties to be chance"


def test_streamed_samples_equal_pytorch(run: Run) -> None:
    """If this fails, the voice sounds otherwise than the reference's."""
    gap = np.abs(run.spoken - run.decoded).max()
    report(f"largest difference of a sample {gap:.1e}, loudest {np.abs(run.decoded).max():.2f}")
    assert gap < 1e-4


def test_the_codec_in_numpy_equals_pytorch(run: Run) -> None:
    """If this fails, a conversation on a CPU hears and says something else than the reference."""
    codec = make_codec(run.path, kind="numpy")
    encoder, decoder = codec.encoder(), codec.decoder()
    codes = np.stack([encoder.encode(frame) for frame in run.pcm.reshape(-1, codec.frame_size)], axis=1)
    report(f"differing codes {(codes != run.codes).sum()} of {codes.size}")
    assert unproven_differences(run.mimi, run.pcm, codes, run.codes) == []
    assert (codes != run.codes).any(axis=0).mean() < 0.05, "too many near-ties to be chance"
    gap = np.abs(np.concatenate([decoder.decode(column) for column in run.codes.T]) - run.decoded).max()
    report(f"largest difference of a sample {gap:.1e}")
    assert gap < 1e-4


def test_streaming_equals_whole(run: Run) -> None:
    """If this fails, a recording is answered otherwise when it is spoken live."""
    whole = np.array(run.mimi.encode(mx.array(run.pcm)[None, None]))[0]
    assert unproven_differences(run.mimi, run.pcm, run.streamed, whole) == []
    spoken = np.array(run.mimi.decode(mx.array(run.codes)[None]))[0, 0]
    gap = np.abs(run.spoken - spoken).max()
    report(f"differing codes {(whole != run.streamed).sum()}; largest difference of a sample {gap:.1e}")
    assert gap < 1e-5


def test_pytorch_streams_differ_by_their_ring_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, what this file's first lines say about the reference's streams is wrong."""
    from moshi.modules import transformer

    as_is, spoken = encode_stream(run.model, run.pcm), decode_stream(run.model, run.codes)
    before = FULL_RING * run.mimi.frame_size
    early = run.streamed[:, :FULL_RING], as_is[:, :FULL_RING]
    assert unproven_differences(run.mimi, run.pcm[:before], *early) == []
    assert np.abs(spoken - run.spoken)[:before].max() < 1e-4
    later = np.abs(spoken - run.spoken)[before:].max()
    original = transformer.RingKVCache.__init__

    def wider(self: Any, batch: int, heads: int, width: int, capacity: int, **rest: Any) -> None:
        original(self, batch, heads, width, capacity + 1, **rest)

    monkeypatch.setattr(transformer.RingKVCache, "__init__", wider)
    fixed, fixed_spoken = encode_stream(run.model, run.pcm), decode_stream(run.model, run.codes)
    for books in (8, 32):
        equal = (run.streamed[:books] == as_is[:books]).all(axis=0)
        wide = (run.streamed[:books] == fixed[:books]).all(axis=0)
        report(
            f"frames equal to PyTorch's stream, {books} codebooks: {equal[:FULL_RING].mean():.2%} before the ring is "
            f"full, {equal[FULL_RING:].mean():.2%} after; with a ring one slot wider {wide.mean():.2%}"
        )
    report(f"samples apart by {later:.1e} after it is full, by {np.abs(fixed_spoken - run.spoken).max():.1e} if wider")
    assert unproven_differences(run.mimi, run.pcm, run.streamed, fixed) == []
    assert np.abs(fixed_spoken - run.spoken).max() < 1e-4


def test_rust_agrees(run: Run) -> None:
    """If this fails, the two codecs behind the one face are not interchangeable."""
    pytest.importorskip("rustymimi")
    codec = make_codec(run.path, num_codebooks=8)
    assert isinstance(codec, RustMimi)
    codes = codec.encode(run.pcm)
    equal = (codes == run.streamed[:8]).all(axis=0)
    report(f"frames equal, 8 codebooks: {equal.mean():.2%}; before its ring is full {equal[:FULL_RING].mean():.2%}")
    assert equal.mean() >= 0.98
    spoken = codec.decode(run.codes[:8, :FULL_RING])
    ours = make_codec(run.path, num_codebooks=8, kind="mlx").decode(run.codes[:8, :FULL_RING])
    report(f"largest difference of a sample before its ring is full {np.abs(spoken - ours).max():.1e}")
    assert np.abs(spoken - ours).max() < 1e-4


def test_rust_streams_reset_and_outlive_their_tables(run: Run) -> None:
    """If this fails, the second conversation starts with the end of the first, or a long one ends in an error."""
    pytest.importorskip("rustymimi")
    codec = RustMimi(run.path, num_codebooks=8)
    codec.max_latents = 24
    encoder, decoder = codec.encoder(), codec.decoder()
    frames = run.pcm.reshape(-1, codec.frame_size)[20:50]
    first = [encoder.encode(frame) for frame in frames]
    spoken = [decoder.decode(column) for column in first]
    encoder.reset()
    decoder.reset()
    assert all((encoder.encode(frame) == codes).all() for frame, codes in zip(frames[:12], first, strict=False))
    again = [decoder.decode(column) for column in first[:12]]
    assert np.abs(np.array(again) - np.array(spoken[:12])).max() < 1e-5


def test_the_reference_reads_what_we_write(run: Run, tmp_path: Path) -> None:
    """If this fails, codecs exported from here work nowhere else."""
    from moshi_mlx.checkpoint.mimi import published_mimi_weights

    path = tmp_path / "written.safetensors"
    mx.save_safetensors(str(path), published_mimi_weights(run.mimi))
    model = load(str(path))
    frames = run.pcm[: 25 * 1920]
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(frames)[None, None])[0].numpy().astype(np.int32)
    assert unproven_differences(run.mimi, frames, run.streamed[:, :25], codes) == []
