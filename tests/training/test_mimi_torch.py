"""The codec that is trained is the codec that the library runs; skipped where PyTorch is not installed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch, of the 'train' extra")
pytest.importorskip("safetensors", reason="needs safetensors, of the 'train' extra")

import torch.nn.functional as F  # noqa: E402
from moshi_mlx_training import checkpoint  # noqa: E402
from moshi_mlx_training.codec import losses  # noqa: E402
from moshi_mlx_training.codec import train as codec  # noqa: E402
from moshi_mlx_training.codec.adversary import Judge, losses_of  # noqa: E402
from moshi_mlx_training.codec.export import export, from_published, published_tensors  # noqa: E402
from moshi_mlx_training.codec.mimi_torch import CausalConv, CausalConvTranspose, Codebook, Mimi, MimiShape  # noqa: E402

SMALL = MimiShape(n_filters=4, dimension=32, num_heads=2, dim_feedforward=64, bins=32, codebook_dimension=16)


def codec_on_noise(shape: MimiShape, seed: int = 0) -> Mimi:
    """A random codec whose codebooks lie on its own latents, so that its codes vary."""
    torch.manual_seed(seed)
    model = Mimi(shape).eval()
    with torch.no_grad():
        z = model.latent(0.1 * torch.randn(10, 1, 60 * 1920))
        for quantizer in (model.first, model.rest):
            quantizer.fit(quantizer.project(z), usage=1.0)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(1, 7, 1), (4, 3, 1), (8, 1, 1), (16, 8, 4), (4, 16, 8), (160, 3, 1)]
)
def test_convolution_is_a_convolution(channels: int, kernel: int, stride: int) -> None:
    """If this fails, the product that stands in for a convolution trains another codec than is exported."""
    torch.manual_seed(0)
    layer = CausalConv(channels, 6, kernel, stride)
    x = torch.randn(2, 48, channels, requires_grad=True)
    y = layer(x)
    padded = F.pad(x.transpose(1, 2), (kernel - stride, 0))
    expected = F.conv1d(padded, layer.conv.conv.weight, layer.conv.conv.bias, stride).transpose(1, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(y)
    inputs = (x, layer.conv.conv.weight, layer.conv.conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("channels", "out", "stride", "groups"), [(12, 6, 5, 1), (8, 8, 2, 8)])
def test_transposed_convolution_is_one(channels: int, out: int, stride: int, groups: int) -> None:
    """If this fails, the decoder that is trained is not the one that is exported."""
    torch.manual_seed(0)
    layer = CausalConvTranspose(channels, out, 2 * stride, stride, groups=groups, bias=groups == 1)
    x = torch.randn(2, 9, channels, requires_grad=True)
    y = layer(x)
    inner = layer.convtr.convtr
    expected = F.conv_transpose1d(x.transpose(1, 2), inner.weight, inner.bias, stride, groups=groups)
    expected = expected[..., : 9 * stride].transpose(1, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(y)
    inputs = [x, *inner.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_gradient_points_the_same_way() -> None:
    """If this fails, training in bfloat16 follows noise: two of oneDNN's own convolutions do."""
    torch.manual_seed(0)
    model, pcm = Mimi(MimiShape()), 0.1 * torch.randn(1, 1, 8 * 1920)
    gradients = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            said = model.synthesize(model.latent(pcm).float())
        losses.spectral_loss(said.float()[:, 0], pcm[:, 0])[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, exact in gradients[0].items():
        if name.startswith("decoder.") and name.endswith("weight"):
            similarity = F.cosine_similarity(exact.flatten(), gradients[1][name].flatten(), 0)
            assert similarity > 0.9, (name, float(similarity))


def test_codec_is_causal() -> None:
    """If this fails, the codec cannot be streamed: sound depends on what comes after it."""
    model = codec_on_noise(SMALL)
    torch.manual_seed(1)
    pcm = 0.1 * torch.randn(1, 1, 12 * 1920)
    later = pcm.clone()
    later[..., 7 * 1920 :] = torch.randn(1, 1, 5 * 1920)
    codes, other = model.encode(pcm), model.encode(later)
    assert torch.equal(codes[..., :7], other[..., :7]) and not torch.equal(codes, other)
    torch.testing.assert_close(
        model.decode(codes)[..., : 7 * 1920], model.decode(other)[..., : 7 * 1920], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("shape", [SMALL, MimiShape()], ids=["small", "built-in"])
def test_library_runs_what_was_trained(shape: MimiShape, tmp_path: Path) -> None:
    """If this fails, the exported file holds another codec: other codes, other sound, or names the loader refuses."""
    mx = pytest.importorskip("mlx.core")
    from moshi_mlx.checkpoint.mimi import load_mimi
    from moshi_mlx.models.mimi import MimiConfig

    model = codec_on_noise(shape)
    weights, config = export(model, tmp_path, torch.float32)
    library = load_mimi(weights, MimiConfig.from_dict(json.loads(config.read_text())), num_codebooks=shape.n_q)
    torch.manual_seed(1)
    pcm = 0.1 * torch.randn(1, 1, 24 * 1920)
    codes = model.encode(pcm)
    heard = np.array(library.encode(mx.array(pcm.numpy())))
    assert (heard == codes.numpy()).mean() > 0.99  # a tie may fall the other way
    assert len(np.unique(heard[0, 0])) > 3
    said = np.array(library.decode(mx.array(codes.numpy().astype(np.uint32))))
    expected = model.decode(codes).numpy()
    np.testing.assert_allclose(said, expected, atol=2e-4 * np.abs(expected).max())


def test_reference_runs_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the exported file is not in the published format: Kyutai's own loader reads it strictly.

    Needs the PyTorch package ``moshi``; whole signals, then 80 ms at a time.
    """
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    loaders = pytest.importorskip("moshi.models.loaders", reason="needs the reference package moshi")
    model = codec_on_noise(MimiShape())
    weights, config = export(model, tmp_path, torch.float32)
    reference = loaders.get_mimi(str(weights), json.loads(config.read_text()), num_codebooks=8)
    torch.manual_seed(1)
    pcm = 0.1 * torch.randn(1, 1, 40 * 1920)
    codes = model.encode(pcm)
    said = model.decode(codes)
    tolerance = 1e-4 * float(said.abs().max())
    with torch.no_grad():
        assert (reference.encode(pcm) == codes).float().mean() > 0.99
        torch.testing.assert_close(reference.decode(codes), said, atol=tolerance, rtol=0)
        with reference.streaming(1):
            heard = torch.cat([reference.encode(frame) for frame in pcm.split(1920, -1)], -1)
            streamed = torch.cat([reference.decode(column) for column in codes.split(1, -1)], -1)
    assert (heard == codes).float().mean() > 0.99
    # Beyond its window the reference's stream differs this much from its own whole pass.
    torch.testing.assert_close(streamed, said, atol=20 * tolerance, rtol=0)


def test_adversary_is_balanced() -> None:
    """If this fails, the judge can overwhelm the plain loss, or does not learn."""
    torch.manual_seed(0)
    judge, meant = Judge(), 0.1 * torch.randn(2, 9600)
    said = (meant + 0.05 * torch.randn(2, 9600)).requires_grad_()
    loss = (said - meant).abs().mean()
    (plain,) = torch.autograd.grad(loss, said, retain_graph=True)
    gradient, opinions = codec.push_apart(judge, loss, said, meant, share=0.5)
    assert (gradient - plain).norm() == pytest.approx(0.5 * float(plain.norm()), rel=1e-3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.parameters() if p.ndim > 1)
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3)
    for _ in range(20):
        losses_of(judge, said.detach(), meant)[1].backward(inputs=list(judge.parameters()))
        optimizer.step()
        judge.zero_grad()
    assert losses_of(judge, said.detach(), meant)[1] < 0.995 * opinions["judge"]


def test_export_keeps_the_codes_in_16_bits() -> None:
    """If this fails, the shipped codec hears other codes than the language model was trained on."""
    model = codec_on_noise(SMALL)
    model.round_to_half()  # as a finished training does
    tensors = published_tensors(model, torch.float16)
    assert not any("phone" in name for name in tensors)
    again = Mimi(SMALL).eval()
    state = {name: value.float() for name, value in tensors.items()}
    for kind in ("weight", "bias"):
        state[f"decoder.model.14.conv.conv.{kind}"] /= again.decoder.model[-1].gain
    missing = again.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("phone" in name for name in missing.missing_keys)
    torch.manual_seed(2)
    pcm = 0.1 * torch.randn(1, 1, 30 * 1920)
    assert torch.equal(model.encode(pcm), again.encode(pcm))


def test_a_published_codec_can_go_on_learning(tmp_path: Path) -> None:
    """If this fails, training that starts from a published file starts from another codec, or from dead codebooks."""
    model = codec_on_noise(MimiShape())
    model.round_to_half()
    weights, _ = export(model, tmp_path)
    again = from_published(weights, usage=2.0)
    pcm = 0.1 * torch.randn(1, 1, 12 * 1920)
    codes = model.encode(pcm)
    assert torch.equal(codes, again.encode(pcm))
    torch.testing.assert_close(again.decode(codes), model.decode(codes), atol=1e-4, rtol=1e-2)
    assert all((book.cluster_usage == 2).all() and book._initialized for book in again.rest.books)


def test_codebook_follows_and_revives() -> None:
    """If this fails, codebooks stay where they started, or entries die and the codec loses bits."""
    torch.manual_seed(0)
    book, points = Codebook(16, 4), torch.randn(400, 4) + 3
    book.fit(points, usage=25.0)
    before = (points - book.embedding[book.nearest(points)]).square().mean()
    moved = points + 1
    for _ in range(200):
        book.follow(moved, book.nearest(moved))
    assert (
        moved - book.embedding[book.nearest(moved)]
    ).square().mean() < 1.5 * before  # they were four times as far when it began
    with torch.no_grad():
        book.embedding_sum[:8] = 1e3
    for _ in range(300):
        book.follow(moved, book.nearest(moved))
    assert len(book.nearest(moved).unique()) >= 15


def test_spectrum_and_its_gradient() -> None:
    """If this fails, the loss measures something other than a spectrum, or pulls the wrong way."""
    torch.manual_seed(0)
    pcm = (0.1 * torch.randn(2, 9600)).requires_grad_()
    for window, bands in losses.RESOLUTIONS:
        ours = losses.magnitudes(pcm, window, bands)[0]
        theirs = torch.stft(pcm, window, window // 4, window, torch.hann_window(window), return_complex=True).abs()
        torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-5, rtol=1e-4)
        weights = torch.randn_like(ours)
        gradients = [
            torch.autograd.grad((x * w).sum(), pcm)[0] for x, w in ((ours, weights), (theirs, weights.transpose(1, 2)))
        ]
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-2, rtol=1e-2)


def test_mel_distance() -> None:
    """If this fails, the reported "mel L1" is not a distance, or not one of levels."""
    torch.manual_seed(0)
    pcm = 0.1 * torch.randn(1, 24000)
    assert losses.mel_distance(pcm, pcm) == 0
    assert abs(float(losses.mel_distance(pcm * 2, pcm)) - np.log(2)) < 0.01


def noise_corpus(folder: Path) -> None:
    """Shards of labelled noise: enough to run a trainer on, where there is no synthesizer."""
    rng = np.random.default_rng(0)
    for kind in ("answer", "user"):
        (1000 * rng.standard_normal(400 * 960)).astype(np.int16).tofile(folder / f"{kind}-0000.pcm")
        rng.integers(0, 40, 400).astype(np.uint8).tofile(folder / f"{kind}-0000.lab")


def test_low_spectra_weigh_more() -> None:
    """If this fails, the decoder is tuned for the wrong frequencies, or by a loss that is not one."""
    time = torch.arange(24_000) / 24_000
    low, high, above = (0.1 * torch.sin(2 * torch.pi * hertz * time)[None] for hertz in (300, 3000, 6000))
    both = low + high
    assert float(losses.low_loss(both, both)) == 0
    assert float(losses.low_loss(high, both)) > 2 * float(losses.low_loss(low, both)) > 0
    assert float(losses.low_loss(both + above, both)) < 0.1 * float(losses.low_loss(low, both))


def test_training_goes_on_and_the_decoder_alone_is_tuned(tmp_path: Path) -> None:
    """If this fails, a stopped training starts anew, or tuning the decoder changes the codes."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    noise_corpus(data)

    def command(module: str, *more: str, run: Path = run) -> str:
        line = [sys.executable, "-m", f"moshi_mlx_training.{module}", str(data), str(run), "--workers", "1", *more]
        return subprocess.run([*line, "--finish-in", "0.1"], check=True, capture_output=True, text=True).stdout

    command("codec")
    state = checkpoint.load(run / "codec.pt")
    assert state["step"] > 0 and set(state["shape"]) == {f.name for f in dataclasses.fields(MimiShape)}
    state["step"], state["level"] = codec.BYPASS_STEPS, 1.0  # as if the codebooks were due
    checkpoint.save(run / "codec.pt", state)
    assert f"going on from step {codec.BYPASS_STEPS}" in command("codec")
    model = checkpoint.load_model(run / "codec.pt")
    assert all(book._initialized for book in (*model.first.books, *model.rest.books))
    command("finetune")
    tuned = checkpoint.load_model(run / "finetuned.pt")
    pcm = 0.1 * torch.randn(1, 1, 10 * 1920)
    assert torch.equal(model.encode(pcm), tuned.encode(pcm))
    export(tuned, tmp_path)
    other = tmp_path / "other"
    assert "phone head fitted" in command("codec", "--start-from", str(tmp_path / "mimi.safetensors"), run=other)
    state = checkpoint.load(other / "codec.pt")
    assert state["step"] >= state["first"] == codec.BYPASS_STEPS
    changed = {n for n, p in tuned.state_dict().items() if not torch.equal(p, model.state_dict()[n])}
    assert changed and all(n.startswith(("decoder", "upsample")) or "output_proj" in n for n in changed)
