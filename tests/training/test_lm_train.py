"""Training the language model: it learns, it goes on as if it had not been stopped, and the result loads."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_training.lm import evaluate as lm_evaluate
from moshi_mlx_training.lm import train as lm_train
from moshi_mlx_training.lm.batch import delayed, training_batch
from moshi_mlx_training.lm.dialogue import Pieces, compose
from moshi_mlx_training.lm.export import mix, published_tensors
from moshi_mlx_training.lm.model import FIGURES, embed, flat
from moshi_mlx_training.lm.train import SharedSum, Trainer

from moshi_mlx.checkpoint.fit import fit_lm
from moshi_mlx.checkpoint.quantization import unpack_modules
from moshi_mlx.checkpoint.readers import write_safetensors
from moshi_mlx.checkpoint.resolve import BUILTIN
from moshi_mlx.config import LmConfig
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY
from tests.helpers.lm_data import write_data

SMALL = BUILTIN / "small"
TINY = LmConfig(
    dim=64, text_card=624, card=512, num_heads=2, num_layers=1, hidden_scale=3.0, context=40,
    depformer_dim=64, depformer_dim_feedforward=96, depformer_num_heads=2, depformer_num_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    folder = write_data(tmp_path_factory.mktemp("data"), size=20, exchanges=4)
    return Pieces(folder, TextTokenizer(SMALL / "tokenizer.model"))


def batches(pieces: Pieces, count: int, size: int = 3) -> list[tuple[mx.array, ...]]:
    return [training_batch(pieces, TINY, size, 80, 0, step).arrays() for step in range(count)]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in lm_train.flat(trainer.learner.parameters())}


def test_the_loss_falls(pieces: Pieces) -> None:
    """If this fails, the trainer does not train: every part of the loss must fall, and answers be told apart."""
    trainer = Trainer(TINY, compiled=False)
    figures = np.array([trainer.step(batch, 2e-2)[0] for batch in batches(pieces, 30, 2)])
    early, late = figures[:4].mean(0), figures[-4:].mean(0)
    change = dict(zip(FIGURES, late - early))
    for name in ("loss", "text", "first", "answer", "heard", "phone", "semantic", "acoustic"):
        assert change[name] < -0.3, change
    assert late[FIGURES.index("heard_right")] > 0.8
    assert np.isfinite(figures).all()


def test_a_resumed_run_is_the_run(pieces: Pieces, tmp_path: Path) -> None:
    """If this fails, stopping and going on changes the result: something is not in the checkpoint."""
    steps = batches(pieces, 5)
    whole = Trainer(TINY, compiled=False)
    for batch in steps[:3]:
        whole.step(batch, 1e-3)
    whole.save(tmp_path / "lm.safetensors", codec="random", frames=7)
    second = Trainer(TINY, seed=1, compiled=False)
    assert second.load(tmp_path / "lm.safetensors") == {"codec": "random", "frames": 7}
    assert second.step_count == 3
    for batch in steps[3:]:
        one, two = whole.step(batch, 1e-3), second.step(batch, 1e-3)
        np.testing.assert_array_equal(one[0], two[0])
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(value, weights(second)[name], name)
    assert list(tmp_path.iterdir()) == [tmp_path / "lm.safetensors"]


def test_compiled_steps_are_the_same_steps(pieces: Pieces) -> None:
    """If this fails, compiling captured something as a constant that changes from step to step."""
    plain, compiled = Trainer(TINY, compiled=False), Trainer(TINY)
    for rate, batch in zip((1e-3, 5e-3, 1e-3, 0.0), batches(pieces, 4)):
        one, two = plain.step(batch, rate), compiled.step(batch, rate)
        np.testing.assert_allclose(one[0], two[0], rtol=1e-3, atol=1e-3)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(value, weights(compiled)[name], atol=2e-3, err_msg=name)


def test_a_broken_batch_does_not_end_the_run(pieces: Pieces) -> None:
    """If this fails, one loss that is not finite destroys hours of training."""
    trainer = Trainer(TINY)
    good, _ = batches(pieces, 2)
    trainer.step(good, 1e-3)
    bad = list(good)
    bad[2] = bad[2] * float("nan")  # the weights of the text loss
    _, norm = trainer.step(bad, 1e-3)
    assert not np.isfinite(norm)
    assert all(np.isfinite(value).all() for value in weights(trainer).values())
    assert np.isfinite(trainer.step(good, 1e-3)[0]).all()


def _worker(number: int, shared: SharedSum, results: object) -> None:
    add_up = shared.adder(number)
    out = [add_up([mx.full((2, 3), float(number + k)), mx.arange(4).astype(mx.float32)]) for k in range(3)]
    results.put((number, [[np.array(value) for value in values] for values in out]))  # type: ignore[attr-defined]


def test_workers_add_their_gradients() -> None:
    """If this fails, workers train on their own part of the batch and drift apart."""
    context = multiprocessing.get_context("spawn")
    shared, results = SharedSum(context, 2, 10), context.Queue()
    workers = [context.Process(target=_worker, args=(n, shared, results), daemon=True) for n in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(30)
    for k in range(3):
        for number in range(2):
            matrix, vector = found[number][k]
            np.testing.assert_array_equal(matrix, np.full((2, 3), k + 0.5))
            np.testing.assert_array_equal(vector, np.arange(4))


def test_the_fused_embedding_is_the_model_s(pieces: Pieces) -> None:
    """If this fails, the model is trained with another input layer than it runs with."""
    lm = Lm(TINY)
    tokens = training_batch(pieces, TINY, 2, 30, 0, 0).inputs
    np.testing.assert_allclose(np.array(embed(lm, tokens)), np.array(lm.embed(tokens)), atol=1e-5)


def test_a_step_sees_what_the_generator_sees(pieces: Pieces) -> None:
    """If this fails, positions in training are not positions in a conversation, and nothing learnt applies."""
    lm = Lm(TINY)
    tokens = compose(pieces, 30, np.random.default_rng(0)).tokens
    hidden = lm.out_norm(lm.transformer(embed(lm, mx.array(delayed(tokens, TINY)[None, :, :-1]))))
    wanted = np.array(lm.text_linear(hidden)[0].argmax(-1))
    generator = Generator(
        lm, GenerationConfig(text=GREEDY, audio=GREEDY), text=[-2], own_codes=tokens[1:9, 0][None].astype(np.int32)
    )
    predicted = [int(generator.first.text[0])]
    if predicted[0] != tokens[0, 0]:
        generator.reset(text=[int(tokens[0, 0])], own_codes=tokens[1:9, 0][None])
    for frame in range(28):
        snapshot = generator.snapshot()
        own = tokens[1:9, frame + 1][None]
        predicted.append(int(generator.step(tokens[9:, frame], own_codes=own).text[0]))
        generator.restore(snapshot)
        generator.step(tokens[9:, frame], text=[int(tokens[0, frame + 1])], own_codes=own)
    np.testing.assert_array_equal(predicted, wanted[: len(predicted)])


@pytest.mark.parametrize("bits", [8, None])
def test_an_exported_model_loads_and_agrees(bits: int | None, tmp_path: Path) -> None:
    """If this fails, the file in the package is not the model that was evaluated."""
    trainer = Trainer(TINY, compiled=False)
    trainer.save(tmp_path / "lm.safetensors", codec="random")
    lm = lm_evaluate.load_weights(tmp_path / "lm.safetensors", TINY)
    tokens = mx.array(np.random.default_rng(0).integers(0, 500, (1, 17, 12)))
    wanted = np.array(lm(tokens).text_logits)
    loaded = fit_lm(TINY, published_tensors(lm, TINY, bits))
    found = np.array(loaded(tokens).text_logits.astype(mx.float32))
    assert np.abs(found - wanted).max() < 0.08 * wanted.std() + 0.05
    unpack_modules(loaded)
    again = np.array(loaded(tokens).text_logits.astype(mx.float32))
    np.testing.assert_allclose(again, found, atol=1e-3 if bits else 0)


def test_a_mean_of_weights() -> None:
    """If this fails, the package's weights cannot be made again, or half of a training is lost."""
    one, two = Lm(TINY), Lm(TINY)
    first, second = (dict(flat(lm.parameters())) for lm in (one, two))
    kept = {name: np.array(value) for name, value in first.items()}
    mix(one, two, 0.25)
    for name, value in flat(one.parameters()):
        np.testing.assert_allclose(np.array(value), 0.75 * kept[name] + 0.25 * np.array(second[name]), atol=1e-6)
    with pytest.raises(SystemExit, match="from 0 to 1"):
        mix(one, two, 1.5)


def test_training_goes_on_from_an_exported_model(pieces: Pieces, tmp_path: Path) -> None:
    """If this fails, a run that starts from a published file starts from other weights, or cannot take a step."""
    first = Trainer(TINY, compiled=False)
    tokens = mx.array(np.random.default_rng(0).integers(0, 500, (1, 17, 12)))
    wanted = np.array(first.learner.lm(tokens).text_logits)
    write_safetensors(tmp_path / "model.safetensors", published_tensors(first.learner.lm, TINY, 8))
    second = Trainer(TINY, seed=1)
    second.start_from(tmp_path / "model.safetensors")
    found = np.array(second.learner.lm(tokens).text_logits)
    assert np.abs(found - wanted).max() < 0.08 * wanted.std() + 0.05
    assert all(value.dtype == mx.float32 for _, value in lm_train.flat(second.learner.parameters()))
    assert np.isfinite(second.step(batches(pieces, 1)[0], 1e-3)[0]).all()


def test_evaluation_knows_right_from_wrong(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, figures in the model card are not what they say: a perfect reply must score 1, silence 0."""
    tokenizer = TextTokenizer(SMALL / "tokenizer.model")

    def perfect(lm: Lm, user: np.ndarray, settings: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
        text = np.full(user.shape[:2], 3, np.int32)
        for row, question in enumerate(pieces.questions[: len(user)]):
            sound = lm_evaluate.BEFORE + question.end + 6
            tokens = pieces.answers[question.answer].tokens
            text[row, sound + tokens[:, 0]] = tokens[:, 1]
        return text, np.zeros((*user.shape[:2], 8), np.int32)

    def mute(lm: Lm, user: np.ndarray, settings: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
        return np.full(user.shape[:2], 3, np.int32), np.zeros((*user.shape[:2], 8), np.int32)

    settings = GenerationConfig(text=GREEDY, audio=GREEDY)
    for run, right in ((perfect, 1.0), (mute, 0.0)):
        monkeypatch.setattr(lm_evaluate, "run", run)
        report = lm_evaluate.answers(Lm(TINY), tokenizer, pieces, settings, 15, None, 100)
        assert report.figures["right"] == report.figures["spoke"] == right
        assert len(report.wrong) == 15 * (1 - right)
    assert lm_evaluate.silence(Lm(TINY), tokenizer, pieces, settings, 100)["silent"] == 1.0


def test_real_runs_of_the_evaluation(pieces: Pieces) -> None:
    """If this fails, evaluation does not work with the program's own generator."""
    tokenizer, lm = TextTokenizer(SMALL / "tokenizer.model"), Lm(TINY)
    settings = GenerationConfig(text=GREEDY, audio=GREEDY)
    report = lm_evaluate.answers(lm, tokenizer, pieces, settings, 3, None, 2)
    assert report.figures["right"] == 0.0
    assert json.dumps(report.figures)
    found = lm_evaluate.interruptions(lm, tokenizer, pieces, settings, 3, 4)
    assert 0 <= found["stopped"] <= 1
