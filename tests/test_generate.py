"""Generation: the reference's tokens, timing, what a session is made of, forcing, sampling, refusals, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from moshi_mlx.config import UNGENERATED, ZERO_TOKEN
from moshi_mlx.cpu.lm import Backend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.generator import GenerationConfig, Generator, Step
from moshi_mlx.errors import ConfigError, StateError, TokenError
from moshi_mlx.models.lm import DepthCache, Lm
from moshi_mlx.models.sampling import GREEDY, Sampling, filter_logits, gumbel_noise
from moshi_mlx.state import describe_state, load_state, save_state, state_arrays, state_bytes

from .helpers import golden_lm
from .helpers.golden_lm import Run, relative_error, small_model

GREEDILY = GenerationConfig(GREEDY, GREEDY)
SAMPLED = GenerationConfig(Sampling(0.9, 20), Sampling(1.0, 0, 0.95))
GREEDY_RUNS = [name for name in golden_lm.MOSHI if "greedy" in golden_lm.runs_of(name)]
FORCED_RUNS = [(name, file) for name in golden_lm.MOSHI for file in golden_lm.runs_of(name) if file != "greedy"]


@pytest.fixture(params=["as chosen here", "modules"])
def backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with what this machine would use, and with the model's modules, as a Mac does."""
    if request.param == "modules":
        monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))


# -------------------------------------------------------------------------------------- the reference's tokens


def forced_codes(run: Run) -> np.ndarray:
    """What was written over the codes that each position chose [positions, batch, dep_q]; -2 where nothing was."""
    codes = run.forcing("replace")
    for kind in ("inside", "audio"):
        over = run.forcing(kind)
        codes = np.where(over == UNGENERATED, codes, over)
    return codes


def by_frame(values: np.ndarray, delays: Sequence[int], frame: int) -> np.ndarray:
    """Values [positions, batch, streams] of one token index, gathered from the positions that predict it."""
    columns = [
        values[frame + delay, :, k] if frame + delay < len(values) else np.full(values.shape[1], UNGENERATED)
        for k, delay in enumerate(delays)
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def replay(name: str, file: str, limit: int = 10**9) -> Iterator[tuple[int, Step]]:
    """Our generator over a recorded run, given what was given and forced there: each position, and its step."""
    lm, config = golden_lm.model(name)
    run, delays, own, users = golden_lm.run(name, file), config.lm.delays, config.lm.own_q, config.lm.user_q
    text, codes = run.forcing("text"), forced_codes(run)
    if own < config.lm.dep_q:  # PersonaPlex: the reference forces what is the user's here
        frames = np.stack([by_frame(codes[:, :, own:], delays[1 + own :], p - 1) for p in range(1, len(codes))])
        frames = np.concatenate([frames[:1], frames])
        codes = codes[:, :, :own]
    else:
        frames = run.frames

    def forced(position: int) -> dict[str, Any]:
        own_codes = by_frame(codes, delays[1 : 1 + own], position) if own else None
        return {"text": text[position], "own_codes": own_codes}

    generator = Generator(lm, GenerationConfig(GREEDY, GREEDY, cfg_coef=run.cfg_coef), **run.options, **forced(0))
    yield 0, generator.first
    for position in range(1, min(len(run.tokens), limit)):
        yield position, generator.step(frames[position] if users else None, **forced(position))


def check_run(name: str, file: str, limit: int = 10**9) -> None:
    config = golden_lm.model(name)[1].lm
    run, own, last = golden_lm.run(name, file), config.own_q, max(config.delays)
    out, returned = run.data["out"], run.data["returned"]
    frames, heads = 0, []
    for position, step in replay(name, file, limit):
        assert step.index == position - 1
        heads += [] if step.heads is None else [step.heads]
        assert np.array_equal(step.text, run.tokens[position, :, 0]), position
        assert step.frame == position - 1 - max(config.max_delay - 1, 0)
        assert (step.aligned_text is None) == (step.frame < 0) and (step.codes is None) == (step.frame < 0 or not own)
        if step.aligned_text is None:
            continue
        expected = by_frame(run.tokens, config.delays[: 1 + own], step.frame)
        assert np.array_equal(step.aligned_text, expected[:, 0]), position
        assert step.codes is None or np.array_equal(step.codes, expected[:, 1:]), position
        call = step.frame + last  # of the reference, which puts this frame out there, text and codes together
        if call < len(out):
            assert returned[call] and np.array_equal(out[call, :, : 1 + own], expected)
        frames += 1
    assert frames >= min(len(run.tokens), limit) - last - 1
    if "last_extra_probs" in run.data:
        probabilities = run.data["last_extra_probs"]
        assert relative_error(np.stack(heads[-len(probabilities) :]), probabilities) < 1e-4


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("name", GREEDY_RUNS)
def test_greedy_run(name: str) -> None:
    """Over 500 frames (the window of 32 moves on 468 times) a token differs from PyTorch's, or is misaligned.

    For speech to text, the probabilities of the extra heads are compared as well.
    """
    check_run(name, "greedy")


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize(("name", "file"), [run for run in FORCED_RUNS if run != ("moshi", "forced")])
def test_forced_run(name: str, file: str) -> None:
    """With text, codes or the user's half given from outside, the free tokens differ from PyTorch's.

    tts: muxed text every frame, codes -1 at the beginning. personaplex: eight depth steps there, half of them here.
    """
    check_run(name, file)


@pytest.mark.usefixtures("backends")
def test_forced_run_of_single_codes() -> None:
    """The same with text forced now and then and whole frames of codes given.

    From frame 60 on the reference writes over single codes after all of a frame are sampled: there the next code was
    sampled for another one than is kept. Here (as in Rust and PersonaPlex) it is sampled for the code that is kept.
    """
    check_run("moshi", "forced", limit=60)


def test_runs_are_there() -> None:
    """The comparisons above have lost their cases."""
    assert set(GREEDY_RUNS) == {"conditions", "hibiki", "moshi", "odd_delays", "schedule", "stt", "tts"}
    assert set(FORCED_RUNS) >= {(name, "forced") for name in ("moshi", "personaplex", "tts")}
    assert all(len(golden_lm.run(name, "greedy").tokens) == 500 for name in GREEDY_RUNS)


@pytest.mark.parametrize(("name", "file"), [("moshi", "forced"), ("personaplex", "forced_inside")])
def test_reference_hooks(name: str, file: str) -> None:
    """Lm.step and the depth steps, driven as the reference drives them, give other tokens or logits.

    Codes are chosen by the depth transformer from its own choices; the hook writes over them afterwards.
    """
    lm, whole = golden_lm.model(name)
    run, config = golden_lm.run(name, file), whole.lm
    delays, width = np.array(config.delays), 1 + config.dep_q
    batch = run.tokens.shape[1]
    starts = np.array([config.text_start_id] + [config.audio_start_id] * config.n_q)
    state = lm.init_state(batch, condition=golden_lm.condition(name, file))
    text, inside = run.forcing("text"), run.forcing("inside")
    audio, replaced = run.forcing("audio"), run.forcing("replace")
    chosen: list[np.ndarray] = []
    for position in range(len(run.tokens)):
        column = np.broadcast_to(starts, (batch, config.num_streams)).copy()
        for k, delay in enumerate(delays):
            if position > delay:
                column[:, k] = chosen[-1][:, k] if k < width else run.frames[position - delay, :, k - width]
        assert np.array_equal(column, run.data["inputs"][position])
        hidden = lm.step(mx.array(column)[:, :, None], state)[:, 0]
        logits = [lm.text_linear(hidden)]
        token = np.array(mx.argmax(logits[0], axis=-1))
        assert np.array_equal(token, run.data["sampled_text"][position])
        row = [np.where(text[position] == UNGENERATED, token, text[position])]
        if (replaced[position] != UNGENERATED).any():
            row += list(replaced[position].T)
        else:
            cache: DepthCache = []
            previous = row[0]
            for k in range(config.dep_q):
                logits.append(lm.depformer.step(k, hidden, mx.array(previous), cache))
                code = np.array(mx.argmax(logits[-1], axis=-1))
                previous = np.where(inside[position, :, k] == UNGENERATED, code, inside[position, :, k])
                row.append(previous)
        made = np.stack(row, axis=1)
        made[:, 1:] = np.where(audio[position] == UNGENERATED, made[:, 1:], audio[position])
        assert np.array_equal(made, run.tokens[position]), position
        chosen.append(made)
        tail = position - len(run.tokens)
        if tail >= -len(run.data["last_text_logits"]):
            assert relative_error(logits[0], run.data["last_text_logits"][tail]) < 1e-4
            assert relative_error(mx.stack(logits[1:], axis=1), run.data["last_audio_logits"][tail]) < 1e-4


@pytest.mark.parametrize("name", GREEDY_RUNS)
def test_whole_pass_agrees_with_the_run(name: str) -> None:
    """Teacher forcing over the 500 generated frames gives other logits than the reference had when it chose them."""
    lm, whole = golden_lm.model(name)
    run, config = golden_lm.run(name, "greedy"), whole.lm
    positions, batch, width = run.tokens.shape
    unknown = max(*config.delays, 1)  # the last frame passed is not read any more
    time = positions - unknown
    tokens = [np.stack([by_frame(run.tokens, config.delays[:width], t) for t in range(time)], axis=2)]
    if config.user_q:
        tokens.append(run.frames[1 : time + 1].transpose(1, 2, 0))
    given = mx.array(np.concatenate(tokens, axis=1))
    condition = golden_lm.condition(name, "greedy")
    if run.cfg_coef != 1:
        given = mx.concatenate([given, given])
    out = lm(given, condition)

    def guided(logits: mx.array) -> np.ndarray:
        made = np.array(logits)
        return made if run.cfg_coef == 1 else made[batch:] + run.cfg_coef * (made[:batch] - made[batch:])

    kept = len(run.data["last_text_logits"])
    for k, (delay, logits, last) in enumerate(
        [
            (config.delays[0], guided(out.text_logits)[:, 0], run.data["last_text_logits"]),
            *(
                (config.delays[1 + k], guided(out.logits)[:, k], run.data["last_audio_logits"][:, :, k])
                for k in range(config.dep_q)
            ),
        ]
    ):
        compared = 0
        for index, position in enumerate(range(positions - kept, positions)):
            if position < time:  # later positions are not fed
                assert relative_error(logits[:, position - delay], last[index]) < 1e-4, (k, position)
                compared += 1
        assert compared == kept - unknown


@pytest.mark.parametrize("name", golden_lm.HELIUM)
def test_helium_run(name: str) -> None:
    """The text model does not continue a prompt as the reference does."""
    lm, _ = golden_lm.model(name)
    data = golden_lm.arrays(name)
    prompt, greedy = data["prompt"], data["greedy"]
    generator = Generator(lm, GREEDILY, seeds=(0, 0), text=prompt[:, 1])
    for token in prompt[:, 2:].T:
        generator.step(text=token)
    for expected in greedy.T:
        step = generator.step()
        assert np.array_equal(step.text, expected) and step.codes is None


# ------------------------------------------------------------------------------------------------------ timing


class NextCall:
    """The convention of Kyutai's MLX and Rust generators: call s runs position s and only stores frame s."""

    def __init__(self, lm: Lm, batch: int, steps: int):
        self.lm, self.batch, self.step_index = lm, batch, 0
        self.state = lm.init_state(batch)
        self.sequence = np.full((batch, lm.config.num_streams, steps), UNGENERATED)

    def step(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The text of this call, and the newest complete frame of own codes."""
        config, s = self.lm.config, self.step_index
        self.sequence[:, 1 + config.dep_q :, s] = user
        column = np.empty((self.batch, config.num_streams), np.int32)
        for k, delay in enumerate(config.delays):
            start = config.audio_start_id if k else config.text_start_id
            column[:, k] = self.sequence[:, k, s - 1 - delay] if s - 1 - delay >= 0 else start
        hidden = self.lm.step(mx.array(column)[:, :, None], self.state)[:, 0]
        chosen = [mx.argmax(self.lm.text_linear(hidden), axis=-1)]
        cache: DepthCache = []
        for k in range(config.dep_q):
            chosen.append(mx.argmax(self.lm.depformer.step(k, hidden, chosen[-1], cache), axis=-1))
        for k, token in enumerate(chosen):
            if s >= config.delays[k]:
                self.sequence[:, k, s - config.delays[k]] = np.array(token)
        self.step_index += 1
        complete = s - config.max_delay
        return np.array(chosen[0]), self.sequence[:, 1 : 1 + config.dep_q, complete] if complete >= 0 else None


@pytest.mark.parametrize("name", ["moshi", "odd_delays"])
def test_one_call_earlier_than_the_next_call_convention(name: str) -> None:
    """The answer to a frame comes one call (80 ms) later than it can, or is another answer.

    Same tokens as a generator that keeps a frame for the next call, every one of them one call earlier.
    """
    lm, config = golden_lm.model(name)
    frames = golden_lm.run(name, "greedy").frames[:100]
    batch, calls = frames.shape[1], len(frames)
    other, generator = NextCall(lm, batch, calls), Generator(lm, GREEDILY, seeds=range(batch))
    theirs = [other.step(frame) for frame in frames]
    ours = [generator.first, *(generator.step(frame) for frame in frames[:-1])]
    for call, ((text, codes), step) in enumerate(zip(theirs, ours)):
        assert step.index == call - 1
        assert np.array_equal(step.text, text)
        assert (codes is None) == (step.codes is None)
        if codes is not None:
            assert np.array_equal(step.codes, codes) and step.frame == call - config.lm.max_delay


def test_no_frame_is_lost_and_none_waits() -> None:
    """The frame of a call changes nothing in that call, or the first frame changes nothing at all."""
    lm, config = golden_lm.model("moshi")
    frames = golden_lm.run("moshi", "greedy").frames[:12, :1]
    generators = [Generator(lm, GREEDILY) for _ in range(2)]
    for call in range(3):
        before = [generator.snapshot() for generator in generators]
        changed = frames[call].copy()
        changed[0, 0] = (changed[0, 0] + 5) % config.lm.card
        for generator, frame in zip(generators, (frames[call], changed)):
            generator.step(frame)
        one, other = (generator.snapshot()["lm"]["transformer"]["1"]["values"] for generator in generators)
        slot = call + 1
        assert not mx.array_equal(one[:, :, slot], other[:, :, slot]).item()
        for generator, snapshot in zip(generators, before):
            generator.restore(snapshot)
            generator.step(frames[call])


# -------------------------------------------------------------------------------------------------- a session


def draw_frames(lm: Lm, batch: int, time: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-1, lm.config.card + 1, (time, batch, lm.config.user_q), dtype=np.int32)


def run_over(generator: Generator, frames: np.ndarray) -> np.ndarray:
    """Text and complete codes of each call [calls, batch, 1 + own_q]."""
    rows: list[np.ndarray] = []
    for frame in frames:
        step = generator.step(frame)
        codes = np.full((generator.batch, generator.lm.config.own_q), UNGENERATED) if step.codes is None else step.codes
        rows.append(np.concatenate([step.text[:, None], codes], axis=1))
    return np.stack(rows) if rows else np.zeros((0, generator.batch, 1 + generator.lm.config.own_q), np.int32)


def test_same_seed_same_words() -> None:
    """A conversation cannot be repeated, or its seed does not matter."""
    lm = small_model()
    frames = draw_frames(lm, 1, 40)
    one, again, other = (run_over(Generator(lm, SAMPLED, seeds=(seed,)), frames) for seed in (5, 5, 6))
    assert np.array_equal(one, again) and (one != other).mean() > 0.5


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_batch_equals_singles(kv_bits: int | None) -> None:
    """A conversation in a batch says something else than alone, though its seed and its user are the same."""
    lm = small_model()
    frames, seeds = draw_frames(lm, 3, 25), (11, 12, 11)
    together = run_over(Generator(lm, SAMPLED, seeds=seeds, kv_bits=kv_bits), frames)
    for row, seed in enumerate(seeds):
        alone = run_over(Generator(lm, SAMPLED, seeds=(seed,), kv_bits=kv_bits), frames[:, row : row + 1])
        assert np.array_equal(alone[:, 0], together[:, row])


def test_draws_are_what_the_noise_says() -> None:
    """Tokens are not drawn by the seed, position and settings that are documented: logits come from a whole pass."""
    lm = small_model()
    frames, seed = draw_frames(lm, 1, 30), 99
    generator = Generator(lm, SAMPLED, seeds=(seed,))
    steps = [generator.first, *(generator.step(frame) for frame in frames)]
    text = [int(step.text[0]) for step in steps]
    codes = [step.codes[0] for step in steps if step.codes is not None]
    time = len(codes)
    tokens = np.concatenate([[text[:time]], np.stack(codes, axis=1), frames[:time, 0].T])[None]
    out = lm(mx.array(tokens))
    for t in range(time):
        noise = gumbel_noise((seed,), t, (lm.config.text_out,), 0)[0]
        assert mx.argmax(filter_logits(out.text_logits[0, 0, t], SAMPLED.text) + noise).item() == text[t]
        for k, delay in enumerate(lm.config.delays[1:3]):
            position = t + delay
            if not 1 <= position < time:  # at position 0 training gives start codes, generation those just sampled
                continue
            noise = gumbel_noise((seed,), position, (2, lm.config.card), 1)[0, k]
            assert mx.argmax(filter_logits(out.logits[0, k, t], SAMPLED.audio) + noise).item() == codes[t][k]


def test_many_sessions_on_one_model() -> None:
    """Conversations on one model meet, or generating changes the weights."""
    lm = small_model()
    before = {name: np.array(value) for name, value in tree_flatten(lm.parameters())}
    options: list[dict[str, Any]] = [{}, {"kv_bits": 8}, {"seeds": (3, 4)}, {"seeds": (9,)}]
    inputs = [draw_frames(lm, len(o.get("seeds", (0,))), 25, seed) for seed, o in enumerate(options)]
    alone = [run_over(Generator(lm, SAMPLED, **o), frames) for o, frames in zip(options, inputs)]
    generators = [Generator(lm, SAMPLED, **o) for o in options]
    pieces: list[list[np.ndarray]] = [[] for _ in options]
    for call in range(25):
        for generator, frames, made in zip(generators, inputs, pieces):
            made.append(run_over(generator, frames[call : call + 1]))
    for made, expected in zip(pieces, alone):
        assert np.array_equal(np.concatenate(made), expected)
    after = dict(tree_flatten(lm.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(np.array(after[name]), value) for name, value in before.items())


PENALIZED = GenerationConfig(Sampling(0.9), Sampling(0.9), repetition_penalty=1.5, repetition_context=6)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("calls", [0, 1, 7, 40])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_snapshot_and_replay(kv_bits: int | None, calls: int, tmp_path: Path) -> None:
    """A conversation that is taken up again, in memory, on disk or by another generator, goes on differently."""
    lm = small_model(delays=[1, 0, 2, 0, 3])
    frames = draw_frames(lm, 2, calls + 30)
    options: dict[str, Any] = {"seeds": (5, 2**70), "kv_bits": kv_bits}
    generator = Generator(lm, PENALIZED, **options)
    run_over(generator, frames[:calls])
    kept = generator.snapshot()
    values = [np.array(array) for array in state_arrays(kept)]
    save_state(tmp_path / "talk.safetensors", kept)
    rest = run_over(generator, frames[calls:])
    assert generator.position == calls + 31
    for old, array in zip(values, state_arrays(kept), strict=True):
        assert np.array_equal(old, np.array(array)), "a snapshot changed with later steps"
    generator.restore(kept)
    assert generator.position == calls + 1
    assert np.array_equal(run_over(generator, frames[calls:]), rest)
    other = Generator(lm, PENALIZED, seeds=(1, 1), kv_bits=kv_bits)
    run_over(other, frames[:3])
    other.restore(load_state(tmp_path / "talk.safetensors", other.snapshot()))
    assert other.seeds == (5, 2**70)
    assert np.array_equal(run_over(other, frames[calls:]), rest)
    generator.restore(kept)
    assert np.array_equal(run_over(generator, frames[calls:]), rest), "restoring used the snapshot up"


def test_snapshots_that_do_not_fit() -> None:
    """A state of another model, batch, cache or setting is taken; or a refused one leaves the session broken."""
    lm = small_model()
    frames = draw_frames(lm, 1, 12)
    generator = Generator(lm, SAMPLED)
    run_over(generator, frames[:5])
    expected = run_over(Generator(lm, SAMPLED), frames)[5:]
    others = [
        Generator(lm, SAMPLED, seeds=(0, 1)),
        Generator(lm, SAMPLED, kv_bits=8),
        Generator(small_model(context=13), SAMPLED),
        Generator(small_model(num_layers=1), SAMPLED),
        Generator(small_model(delays=[0, 0, 2, 0, 1]), SAMPLED),
        Generator(lm, GenerationConfig(repetition_context=3)),
    ]
    for other in others:
        with pytest.raises(StateError, match="does not fit"):
            generator.restore(other.snapshot())
    with pytest.raises(StateError):
        generator.restore({"position": mx.array([3], mx.int32)})
    with pytest.raises(StateError):
        generator.restore({})
    for name, value in (("inputs", 2**30), ("inputs", -3), ("position", 0), ("position", -7)):
        damaged = generator.snapshot()
        damaged[name] = mx.full(damaged[name].shape, value, mx.int32)
        with pytest.raises(StateError, match="damaged"):
            generator.restore(damaged)
    assert np.array_equal(run_over(generator, frames[5:]), expected)


def test_reset() -> None:
    """If this fails, a reset generator remembers the previous conversation."""
    lm = small_model(delays=[1, 0, 2, 0, 3])
    frames = draw_frames(lm, 2, 25)
    generator = Generator(lm, PENALIZED, seeds=(5, 6))
    first = generator.first
    expected = run_over(generator, frames)
    again = generator.reset()
    assert again is generator.first and again.index == -1
    assert np.array_equal(again.text, first.text)
    assert np.array_equal(run_over(generator, frames), expected)
    forced = generator.reset(text=[7, 8])
    assert forced.text.tolist() == [7, 8]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_unwritten_slots_are_invisible(kv_bits: int | None) -> None:
    """NaN in ring slots that hold nothing yet reaches a token."""
    lm = small_model()
    frames = draw_frames(lm, 1, 25)
    generator = Generator(lm, SAMPLED, kv_bits=kv_bits)
    snapshot = generator.snapshot()
    expected = run_over(generator, frames)
    for layer in snapshot["lm"]["transformer"].values():
        for name, leaf in layer.items() if isinstance(layer, dict) else ():
            if leaf.ndim == 4:
                full = 0xFFFFFFFF if leaf.dtype == mx.uint32 else mx.nan
                leaf[:, :, 1:] = mx.full(leaf[:, :, 1:].shape, full, leaf.dtype)
                layer[name] = leaf
    generator.restore(snapshot)
    assert np.array_equal(run_over(generator, frames), expected)


def test_state_does_not_grow() -> None:
    """The schema or size of a session changes while it lasts."""
    lm = small_model(delays=[1, 0, 2, 0, 3])
    generator = Generator(lm, PENALIZED, kv_bits=8)
    schema, size = describe_state(generator.snapshot()), state_bytes(generator.snapshot())
    run_over(generator, draw_frames(lm, 1, 40))
    assert describe_state(generator.snapshot()) == schema and state_bytes(generator.snapshot()) == size


# --------------------------------------------------------------------------------------------------- forcing


def test_forced_tokens_come_out_where_they_were_put() -> None:
    """A prompt, or a voice, lands in another frame than it was given for."""
    lm = small_model(delays=[1, 0, 2, 0, 3])
    generator = Generator(lm, SAMPLED, seeds=(1, 2))
    free = Generator(lm, SAMPLED, seeds=(1, 2))
    text: dict[int, int] = {}
    codes: dict[int, list[int]] = {}
    differing = 0
    for frame in draw_frames(lm, 2, 30):
        position = generator.position
        forced: dict[str, Any] = {}
        if position % 3 == 0:
            text[position] = position % 40
            forced["text"] = np.array([text[position], UNGENERATED])
        if position % 4 == 0:
            codes[position] = [position % 30, ZERO_TOKEN]
            forced["own_codes"] = np.array([codes[position], [UNGENERATED, UNGENERATED]])
        step, other = generator.step(frame, **forced), free.step(frame)
        if position in text:
            assert step.text[0] == text[position]
        if step.frame in codes:
            assert step.codes is not None and step.codes[0].tolist() == codes[step.frame]
        if step.aligned_text is not None and step.frame + 1 in text:
            assert step.aligned_text[0] == text[step.frame + 1]  # text is delayed by one here
        assert step.text[1] == other.text[1]
        assert (step.codes is None) == (other.codes is None)
        assert step.codes is None or other.codes is None or np.array_equal(step.codes[1], other.codes[1])
        differing += int(step.text[0] != other.text[0])
    assert differing > 5


def test_shapes_that_are_understood() -> None:
    """One conversation may give plain lists and numbers, as a batch gives arrays."""
    lm = small_model()
    one, other = Generator(lm, GREEDILY), Generator(lm, GREEDILY)
    a = one.step([1, 2], text=5, own_codes=[3, 4])
    b = other.step(np.array([[1, 2]], np.uint16), text=np.array([5]), own_codes=mx.array([[3, 4]]))
    assert np.array_equal(a.text, b.text)
    assert np.array_equal(run_over(one, draw_frames(lm, 1, 5)), run_over(other, draw_frames(lm, 1, 5)))


def test_forcing_everything_skips_nothing() -> None:
    """A conversation whose tokens are all given leaves another state than one that chose the same tokens."""
    lm = small_model()
    frames = draw_frames(lm, 1, 20)
    chosen = Generator(lm, GREEDILY)
    steps = [chosen.first, *(chosen.step(frame) for frame in frames)]
    codes = np.stack([step.codes for step in steps if step.codes is not None])
    given = Generator(lm, GREEDILY, text=steps[0].text, own_codes=codes[0])
    for position, frame in enumerate(frames[: len(codes) - 1], start=1):
        given.step(frame, text=steps[position].text, own_codes=codes[position])
    rest = frames[len(codes) - 1 :]
    assert np.array_equal(
        run_over(given, rest)[:, :, 0], np.stack([step.text for step in steps[len(codes) :]])
    )  # fmt: skip


WRONG_FRAMES: list[Any] = [
    None,
    [],
    [1],
    [1, 2, 3],
    [[1, 2], [3, 4]],
    [[[1, 2]]],
    3,
    [1.0, 2.0],
    [True, False],
    ["a", "b"],
    [None, None],
    [[1], [2, 3]],
    [-2, 0],
    [0, 31],
    [0, 2**40],
    [0, -(2**40)],
    np.array([[1, 2]], np.float32),
    np.zeros((0, 2), np.int32),
    {"a": 1},
]


@pytest.mark.parametrize("frame", WRONG_FRAMES, ids=str)
def test_wrong_user_frames(frame: Any) -> None:
    """A broken frame ends in a traceback from the depths, reads outside of a table, or damages the session."""
    lm = small_model()
    frames = draw_frames(lm, 1, 6)
    generator = Generator(lm, SAMPLED)
    expected = run_over(Generator(lm, SAMPLED), frames)[3:]
    run_over(generator, frames[:3])
    with pytest.raises(TokenError):
        generator.step(frame)
    assert generator.position == 4
    assert np.array_equal(run_over(generator, frames[3:]), expected)


WRONG_FORCED: list[dict[str, Any]] = [
    {"text": 41},
    {"text": -3},
    {"text": 1.5},
    {"text": [1, 2]},
    {"text": [[1], [2, 3]]},
    {"text": "hello"},
    {"text": []},
    {"own_codes": 1},
    {"own_codes": [1]},
    {"own_codes": [1, 31]},
    {"own_codes": [1, -3]},
    {"own_codes": [0.5, 1]},
    {"own_codes": [[1, 2], [3, 4]]},
    {"own_codes": [[1], [2, 3]]},
    {"text": 3, "own_codes": [1, 99]},
]


@pytest.mark.parametrize("forced", WRONG_FORCED, ids=str)
def test_wrong_forced_tokens(forced: dict[str, Any]) -> None:
    """The same for tokens that are given instead of sampled; a refused call must not have stored half of them."""
    lm = small_model()
    frames = draw_frames(lm, 1, 8)
    generator = Generator(lm, SAMPLED)
    expected = run_over(Generator(lm, SAMPLED), frames)[3:]
    run_over(generator, frames[:3])
    with pytest.raises(TokenError):
        generator.step(frames[7], **forced)
    with pytest.raises(TokenError):
        generator.reset(**forced)
    assert generator.position == 4
    assert np.array_equal(run_over(generator, frames[3:]), expected)
    with pytest.raises(TokenError):
        Generator(lm, SAMPLED, **forced)


def test_text_without_an_embedding_row() -> None:
    """Helium has no row for a start token: that id must not be read from beyond its table."""
    lm, config = golden_lm.model("helium")
    with pytest.raises(TokenError, match="between -2 and 55"):
        Generator(lm, GREEDILY).step(text=config.lm.text_card)
    with pytest.raises(TokenError, match="has no user streams"):
        Generator(lm, GREEDILY).step([1])
    lm, config = golden_lm.model("tts")
    rows = config.lm.text_card + 1
    options = golden_lm.run("tts", "greedy").options
    Generator(lm, GREEDILY, **options).step(text=(rows + 1) * rows - 1)
    with pytest.raises(TokenError):
        Generator(lm, GREEDILY, **options).step(text=(rows + 1) * rows)


# --------------------------------------------------------------------------------------- choosing text, guidance


def test_padding_bonus() -> None:
    """The bonus goes to another token than the configuration's padding, or has no effect."""
    for pad in (3, 9):
        lm = small_model(existing_text_padding_id=pad)
        frames = draw_frames(lm, 1, 20)
        share = {}
        for bonus in (-100.0, 0.0, 3.0, 100.0):
            config = GenerationConfig(Sampling(1.0), GREEDY, padding_bonus=bonus)
            said = run_over(Generator(lm, config), frames)[:, 0, 0]
            share[bonus] = (said == pad).mean()
        assert share[-100.0] == 0 and share[100.0] == 1 and share[0.0] < 0.4 and share[0.0] < share[3.0]


def test_repetition_penalty() -> None:
    """Words of the last frames are not held back, special tokens are, or the window has another length.

    The choice of each position is repeated by hand from the logits of a whole pass over what was said.
    """
    lm = small_model()
    frames = draw_frames(lm, 2, 60)
    penalty, window = 1.7, 5
    config = GenerationConfig(GREEDY, GREEDY, repetition_penalty=penalty, repetition_context=window)
    generator = Generator(lm, config, seeds=(0, 1))
    steps = [generator.first, *(generator.step(frame) for frame in frames)]
    text = np.stack([step.text for step in steps], axis=1)
    codes = np.stack([step.codes for step in steps if step.codes is not None], axis=2)
    time = codes.shape[2]
    tokens = np.concatenate([text[:, None, :time], codes, frames[:time].transpose(1, 2, 0)], axis=1)
    logits = np.array(lm(mx.array(tokens)).text_logits)[:, 0]
    changed = 0
    for row in range(2):
        for t in range(time):
            adjusted = logits[row, t].copy()
            for word in set(text[row, max(0, t - window) : t].tolist()) - {0, 1, 2, 3}:
                adjusted[word] = adjusted[word] / penalty if adjusted[word] > 0 else adjusted[word] * penalty
            assert adjusted.argmax() == text[row, t]
            changed += int(logits[row, t].argmax() != text[row, t])
    assert changed > 5


def test_guidance_of_one_is_none() -> None:
    """Guidance with coefficient 1 must be the conditioned model; another coefficient must change what is said."""
    lm, _ = golden_lm.model("hibiki")
    frames = golden_lm.run("hibiki", "greedy").frames[:30]
    conditions, null = [{"description": "very_good"}], [{"description": "very_bad"}]
    plain = run_over(Generator(lm, GREEDILY, conditions=conditions), frames)
    one = GenerationConfig(GREEDY, GREEDY, cfg_coef=1.0)
    assert np.array_equal(run_over(Generator(lm, one, conditions=conditions, null_conditions=null), frames), plain)
    three = GenerationConfig(GREEDY, GREEDY, cfg_coef=3.0)
    assert not np.array_equal(
        run_over(Generator(lm, three, conditions=conditions, null_conditions=null), frames), plain
    )
    zero = GenerationConfig(GREEDY, GREEDY, cfg_coef=0.0)
    guided = run_over(Generator(lm, zero, conditions=conditions, null_conditions=null), frames)
    assert np.array_equal(guided, run_over(Generator(lm, GREEDILY, conditions=null), frames))


@pytest.mark.usefixtures("backends")
def test_guided_batch_equals_singles() -> None:
    """In a guided batch the halves of different conversations are mixed up."""
    lm, _ = golden_lm.model("hibiki")
    frames = draw_frames(lm, 2, 30)
    config = GenerationConfig(SAMPLED.text, SAMPLED.audio, cfg_coef=2.0)
    conditions, null = [{"description": "very_good"}, {"description": "good"}], [{"description": "bad"}] * 2
    both = run_over(Generator(lm, config, seeds=(1, 2), conditions=conditions, null_conditions=null), frames)
    for row in range(2):
        options: dict[str, Any] = {"conditions": conditions[row : row + 1], "null_conditions": null[:1]}
        alone = run_over(Generator(lm, config, seeds=(1 + row,), **options), frames[:, row : row + 1])
        assert np.array_equal(alone[:, 0], both[:, row])


def test_refusals() -> None:
    """A setting or a number of conditions that cannot work is noticed late, or never."""
    lm, hibiki = small_model(), golden_lm.model("hibiki")[0]
    good = {"description": "good"}
    with pytest.raises(ConfigError, match="at least one"):
        Generator(lm, seeds=())
    with pytest.raises(ConfigError, match="needs conditions"):
        Generator(hibiki)
    with pytest.raises(ConfigError, match="takes no conditions"):
        Generator(lm, conditions=[good])
    with pytest.raises(ConfigError, match="2 conversations need as many conditions, found 1"):
        Generator(hibiki, seeds=(0, 1), conditions=[good])
    with pytest.raises(ConfigError, match="guidance"):
        Generator(hibiki, GenerationConfig(cfg_coef=2.0), conditions=[good])
    with pytest.raises(ConfigError, match="as many conditions, found 2"):
        Generator(hibiki, GenerationConfig(cfg_coef=2.0), conditions=[good], null_conditions=[good, good])
    with pytest.raises(ConfigError, match="multiple of 32"):
        Generator(golden_lm.model("moshi")[0], kv_bits=8)
    for settings in (
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"repetition_context": 0},
        {"padding_bonus": float("inf")},
        {"cfg_coef": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            GenerationConfig(**settings)


def test_published_delays_keep_time() -> None:
    """With Moshi's delays, call s does not complete frame s."""
    lm = small_model(n_q=16, dep_q=8, delays=[0, 0, *[1] * 7, 0, *[1] * 7])
    generator = Generator(lm, SAMPLED)
    for call, frame in enumerate(draw_frames(lm, 1, 4)):
        step = generator.step(frame)
        assert (step.index, step.frame) == (call, call)
        assert step.codes is not None and step.codes.shape == (1, 8) and step.codes.min() >= 0


# ---------------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FRAMES = int(os.environ.get("MOSHI_TEST_FRAMES", "5000"))


TINY: dict[str, Any] = {
    "dim": 32,
    "num_heads": 1,
    "num_layers": 1,
    "n_q": 2,
    "dep_q": 1,
    "delays": [0, 0, 1],
    "context": 16,
    "depformer_dim": 8,
    "depformer_num_layers": 1,
    "depformer_dim_feedforward": 12,
}


@pytest.mark.usefixtures("backends")
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_memory_stays_flat() -> None:
    """Something grows with every frame: all of them must not take more memory than the first fifth.

    MOSHI_TEST_FRAMES=20000 makes it 27 minutes of talk: from frame 4,000 on not a byte was added.
    """
    lm = small_model(**TINY)
    generator = Generator(lm, PENALIZED)
    frames = draw_frames(lm, 1, 100)
    marks = []
    for call in range(FRAMES):
        generator.step(frames[call % 100])
        if (call + 1) % (FRAMES // 5) == 0:
            marks.append((resident(), mx.get_active_memory()))
    assert len({active for _, active in marks}) == 1
    assert marks[-1][0] - marks[0][0] < 500_000


@pytest.mark.usefixtures("backends")
def test_memory_stays_flat_while_all_is_forced() -> None:
    """With every token given, nothing reads the caches: unless evaluated, their graph grows with every frame."""
    lm = small_model(**TINY)
    generator = Generator(lm, PENALIZED)
    marks = []
    for call, frame in enumerate(draw_frames(lm, 1, 400)):
        generator.step(frame, text=call % 40, own_codes=[call % 30])
        if call % 100 == 99:
            marks.append(mx.get_active_memory())
    assert len(set(marks)) == 1
