"""PersonaPlex: where prompts go, compared with NVIDIA's generator; pinned positions; voices; refusals."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.checkpoint.fit import load_lm
from moshi_mlx.checkpoint.pickled import read_torch_tensors, write_torch_tensors
from moshi_mlx.checkpoint.readers import write_safetensors
from moshi_mlx.checkpoint.voices import VoicePrompt, load_voice_prompt
from moshi_mlx.config import ModelConfig
from moshi_mlx.cpu.lm import Backend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.pipeline import Opening
from moshi_mlx.errors import AudioError, CheckpointError, ConfigError
from moshi_mlx.loudness import at_loudness, loudness
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx.tasks.personaplex import PersonaPlex, make_opening, wrap_role

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_personaplex", GOLDEN / "make_personaplex.py")
assert spec is not None and spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
SHORT = 64
GREEDILY = GenerationConfig(GREEDY, GREEDY)
golden: dict[str, Any] = {
    name: np.array(value) for name, value in mx.load(str(GOLDEN / "personaplex" / "golden.safetensors")).items()
}
about = json.loads((GOLDEN / "personaplex" / "golden.json").read_text())


@pytest.fixture(params=["as chosen here", "modules"])
def backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with what this machine would use, and with the model's modules, as a Mac does."""
    if request.param == "modules":
        monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "personaplex", **made.CONFIG})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "model.safetensors"
    made_of = made.random_weights(about["shapes"])
    write_safetensors(path, {name: mx.array(value) for name, value in made_of.items()})
    return path


@pytest.fixture(scope="module")
def lm(config: ModelConfig, weights: Path) -> Lm:
    return load_lm(config, (weights,))


@pytest.fixture(scope="module")
def short(config: ModelConfig, weights: Path) -> Lm:
    """The same with a context that a test can leave."""
    return load_lm(replace(config, lm=replace(config.lm, context=SHORT)), (weights,))


def opening(lm: Lm, voice: Any, role: list[int] | None = None, pin: bool = False) -> Opening:
    silence, sine = golden["silence"].astype(np.int32), golden["sine"].astype(np.int32)
    role = list(made.ROLE) if role is None else role
    return make_opening(lm.config, voice, role, silence, sine, made.PAUSE, pin)


def saved_voice() -> VoicePrompt:
    cache = mx.array(golden["voice.cache"][0].astype(np.int64))
    return VoicePrompt(mx.array(golden["voice.embeddings"][:, 0, 0]), cache)


class Run:
    """A conversation on a generator: what each position reads, and what comes out."""

    def __init__(self, lm: Lm, prompts: Opening, monkeypatch: pytest.MonkeyPatch | None = None, seed: int = 0):
        self.generator = Generator(lm, GREEDILY, seeds=None, pinning=True)
        self.row = self.generator.join(seed, pinned=prompts.pinned)
        self.columns: list[np.ndarray] = []
        predict = self.generator._predict

        def noting(team: Any, column: np.ndarray, *rest: Any) -> Any:
            self.columns.append(column[0].copy())
            return predict(team, column, *rest)

        self.generator._predict = noting  # type: ignore[method-assign]
        for at in range(len(prompts)):
            embedded = {self.row: prompts.embedded[at]} if at < len(prompts.embedded) else None
            given = {"text": prompts.text[at : at + 1], "own_codes": prompts.own[at : at + 1], "embedded": embedded}
            (self.last,) = self.generator.step_rows([self.row], prompts.user[at : at + 1], **given)

    def live(self, codes: np.ndarray) -> Any:
        (self.last,) = self.generator.step_rows([self.row], codes[None])
        return self.last


# ------------------------------------------------------------------------------------------- NVIDIA's generator


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("name", ["recording", "saved"])
def test_columns_as_nvidias(lm: Lm, name: str) -> None:
    """What PersonaPlex reads at some position of its prompts, or answers in 200 live frames, differs from NVIDIA's.

    Theirs runs 16 depth steps and ours 8: equal tokens say that the other eight change nothing. They read a user frame
    one call later, so their call j + 1 is our frame j.
    """
    voice = made.random_codes(7, 1).astype(np.int32) if name == "recording" else saved_voice()
    prompts = opening(lm, voice)
    assert len(prompts) == golden[f"{name}.prompts"][0] + 1
    run = Run(lm, prompts)
    live, theirs = made.random_codes(made.LIVE, 2), golden[f"{name}.out"]
    for index in range(made.LIVE - 1):
        step = run.live(live[index])
        assert step.codes is not None and step.aligned_text is not None
        np.testing.assert_array_equal(step.codes[0], theirs[index + 1, 1:9])
        assert step.aligned_text[0] == theirs[index + 1, 0]
    columns = golden[f"{name}.columns"]
    embedded = len(prompts.embedded)  # theirs hold nothing of meaning there
    assert len(run.columns) == len(columns)
    np.testing.assert_array_equal(run.columns[embedded:], columns[embedded:])
    assert lm.config.own_q == 8 and lm.config.dep_q == 16


def test_ring_after_a_voice(lm: Lm) -> None:
    """The tokens behind a saved voice are other than those that its file holds."""
    prompts, count = opening(lm, saved_voice()), len(golden["voice.embeddings"])
    ring = golden["saved.ring"]
    assert golden["saved.offset"][0] == count + 1 and len(prompts.embedded) == count
    run = Run(lm, prompts)
    np.testing.assert_array_equal(run.columns[count], ring[:, count % 4])
    delayed = np.array(lm.config.delays) == 1
    np.testing.assert_array_equal(run.columns[count + 1][delayed], ring[delayed, (count + 1) % 4])


def test_recording_as_a_file(lm: Lm, config: ModelConfig, tmp_path: Path) -> None:
    """The file that is written from a recording is not the one that NVIDIA's program writes from it."""
    model = PersonaPlex(config, lm, None, None)
    sine = golden["sine"].astype(np.int32)
    model._frame_codes = lambda: (golden["silence"].astype(np.int32), sine)  # type: ignore[method-assign]
    voice = model._as_prompt(made.random_codes(7, 1).astype(np.int32))
    np.testing.assert_allclose(np.array(voice.embeddings), golden["voice.embeddings"][:, 0, 0], atol=1e-5)
    count, theirs = len(golden["voice.embeddings"]), golden["voice.cache"][0]
    delayed = np.array(lm.config.delays) == 1
    np.testing.assert_array_equal(np.array(voice.cache)[:, count % 4], theirs[:, count % 4])
    np.testing.assert_array_equal(np.array(voice.cache)[delayed, (count + 1) % 4], theirs[delayed, (count + 1) % 4])
    tensors = {"embeddings": voice.embeddings[:, None, None].astype(mx.bfloat16), "cache": voice.cache[None]}
    write_torch_tensors(tmp_path / "voice.pt", tensors)
    again = load_voice_prompt(tmp_path / "voice.pt")
    assert np.array_equal(np.array(again.cache), np.array(voice.cache))
    assert again.embeddings.dtype == mx.bfloat16 and again.embeddings.shape == voice.embeddings.shape
    assert set(read_torch_tensors(tmp_path / "voice.pt")) == {"embeddings", "cache"}


@pytest.mark.parametrize("text", [text for text in about["wrapped"] if text])
def test_wrapped_as_nvidias(text: str) -> None:
    """A role is not told in the form that the model was trained on."""
    assert wrap_role(text) == about["wrapped"][text]


def test_empty_role_has_no_tokens(lm: Lm) -> None:
    """An empty role is told as two tags around nothing."""
    assert wrap_role("  ") == ""
    assert len(opening(lm, None, [])) == 2 * made.PAUSE + 1


# ------------------------------------------------------------------------------------------------ pinned positions


@pytest.mark.usefixtures("backends")
def test_pinning_is_exact_without_wrap(short: Lm) -> None:
    """A pinned prompt changes a conversation that fits into the context."""
    live = made.random_codes(SHORT - 25, 3)
    runs = [Run(short, opening(short, saved_voice(), pin=pin)) for pin in (False, True)]
    for codes in live:
        one, other = (run.live(codes) for run in runs)
        assert one.text == other.text and (one.codes is None or np.array_equal(one.codes, other.codes))


def test_pinned_state_is_kept(short: Lm) -> None:
    """A conversation with a pinned role goes on otherwise after it was saved and restored, behind the context."""
    live = made.random_codes(3 * SHORT, 4)
    run = Run(short, opening(short, saved_voice(), pin=True))
    for codes in live[: 2 * SHORT]:
        run.live(codes)
    snapshot = run.generator.snapshot()
    other = Generator(short, GREEDILY, seeds=None, pinning=True)
    (row,) = other.adopt(snapshot)
    for codes in live[2 * SHORT :]:
        (step,) = other.step_rows([row], codes[None])
        expected = run.live(codes)
        assert step.text == expected.text and np.array_equal(step.codes, expected.codes)


def test_pinned_rows_beside_others(short: Lm) -> None:
    """In a batch with rows that pin nothing, or something else, a row answers otherwise than alone; both paths."""
    live = made.random_codes(2 * SHORT, 5)
    for backend in (None, Backend):
        with pytest.MonkeyPatch.context() as patch:
            if backend is not None:
                patch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))
            alone = [
                Run(short, opening(short, saved_voice(), pin=pin), seed=seed) for seed, pin in ((0, True), (1, False))
            ]
            together = Generator(short, GREEDILY, seeds=None, pinning=True)
            prompts = [opening(short, saved_voice(), pin=pin) for pin in (True, False)]
            rows = [together.join(seed, pinned=one.pinned) for seed, one in enumerate(prompts)]
            for at in range(len(prompts[0])):
                vectors = {row: one.embedded[at] for row, one in zip(rows, prompts) if at < len(one.embedded)}
                together.step_rows(
                    rows,
                    np.stack([one.user[at] for one in prompts]),
                    text=np.stack([one.text[at] for one in prompts]),
                    own_codes=np.stack([one.own[at] for one in prompts]),
                    embedded=vectors,
                )
            for index, codes in enumerate(live):
                stepping = rows if index % 3 else rows[1:]  # now and then the pinned one waits
                steps = together.step_rows(stepping, np.stack([codes] * len(stepping)))
                for row, step in zip(stepping, steps):
                    expected = alone[rows.index(row)].live(codes)
                    assert np.array_equal(step.text, expected.text) and np.array_equal(step.codes, expected.codes)


def parrot(short: Lm) -> Lm:
    """A model whose text is the token that its first pinned position read, as long as that is seen.

    Constructed: one attention head finds the position whose text is the role's (its key is large only there), and
    copies it to the output; everything else is zero.
    """
    config = replace(short.config, positional_embedding="none", num_layers=1)
    built = Lm(config)
    zero = {name: mx.zeros_like(value) for name, value in flat(built).items()}
    dim, head = config.dim, config.dim // config.num_heads
    text = np.zeros(zero["text_emb.weight"].shape, np.float32)
    text[:, 2] = 1.0  # every token has a norm
    for token in made.ROLE:
        text[token, 0], text[token, 3 + made.ROLE.index(token)] = 3.0, 3.0
    projection = np.zeros((3 * dim, dim), np.float32)
    projection[0, 2] = 4.0  # query: what all have
    projection[dim, 0] = 4.0  # key: what the role has
    projection[2 * dim : 2 * dim + head, :head] = np.eye(head)
    out = np.zeros((config.text_card, dim), np.float32)
    for token in made.ROLE:
        out[token, 3 + made.ROLE.index(token)] = 8.0
    out[3, 2] = 1.0
    zero |= {
        "text_emb.weight": mx.array(text),
        "transformer.layers.0.self_attn.in_proj.weight": mx.array(projection),
        "transformer.layers.0.self_attn.out_proj.weight": mx.eye(dim),
        "text_linear.weight": mx.array(out),
    }
    for name in zero:
        if "norm" in name:
            zero[name] = mx.ones_like(zero[name])
    built.load_weights(list(zero.items()))
    return built


def flat(lm: Lm) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(lm.parameters()))


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("pin", [False, True])
def test_a_role_outlives_the_context(short: Lm, pin: bool) -> None:
    """A role that is pinned no longer steers the model after three contexts (or, unpinned, the case shows nothing)."""
    model = parrot(short)
    run = Run(model, opening(model, None, [7], pin=pin))
    said = []
    for codes in made.random_codes(3 * SHORT, 6):
        # Its own words would tell it the role again.
        (step,) = run.generator.step_rows([run.row], codes[None], text=np.array([-2]))
        said.append(int(step.text[0]))
        inputs = run.generator._rows.book["inputs"]
        inputs[0, 0, run.generator.position_of(run.row) % run.generator._columns] = 3
    assert said[0] == 7
    assert (said[-1] == 7) == pin, said[-10:]
    assert set(said[: SHORT - 20]) == {7}


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_role_longer_than_the_context(lm: Lm) -> None:
    """A role that leaves no room for a conversation is taken, and forgets itself."""
    with pytest.raises(ConfigError, match="shorten the role"):
        opening(lm, None, [5] * made.CONTEXT)


def test_a_voice_of_another_model(lm: Lm) -> None:
    """A voice file of another model is replayed as noise."""
    voice = saved_voice()
    with pytest.raises(CheckpointError, match="another model"):
        opening(lm, VoicePrompt(voice.embeddings[:, :16], voice.cache))
    with pytest.raises(CheckpointError, match="another model"):
        opening(lm, VoicePrompt(voice.embeddings, voice.cache[:9]))
    with pytest.raises(CheckpointError, match="the token 2047"):
        opening(lm, VoicePrompt(voice.embeddings, mx.full(voice.cache.shape, 2047, mx.int64)))
    with pytest.raises(CheckpointError, match="not finite"):
        opening(lm, VoicePrompt(voice.embeddings * mx.array(math.nan), voice.cache))


# -------------------------------------------------------------------------------------------------------- loudness


def tone(seconds: float, hertz: float = 1000.0, rate: int = 24000, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_loudness_of_a_sine() -> None:
    """A voice is levelled wrongly. BS.1770: a 997 Hz sine at full scale on one channel is -3.01 LUFS."""
    assert loudness(tone(5, 997, 48000, 1.0), 48000) == pytest.approx(-3.01, abs=0.05)
    assert loudness(np.append(tone(4), np.zeros(96000, np.float32)), 24000) == pytest.approx(
        loudness(tone(4), 24000), abs=0.2
    )
    assert loudness(at_loudness(tone(3), 24000, -24.0), 24000) == pytest.approx(-24.0, abs=1e-3)


def test_no_loudness() -> None:
    """Silence becomes NaN, or a click a voice."""
    with pytest.raises(AudioError, match="silent"):
        at_loudness(np.zeros(24000, np.float32), 24000, -24.0)
    with pytest.raises(AudioError, match="at least"):
        loudness(tone(0.1), 24000)
