"""``moshi-mlx-finetune train``: everything from the arguments to the files."""

from __future__ import annotations

import argparse
import json
import signal
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from moshi_mlx.checkpoint.quantization import unpack_modules
from moshi_mlx.checkpoint.readers import read_json
from moshi_mlx.checkpoint.resolve import resolve
from moshi_mlx.errors import ConfigError, MoshiError
from moshi_mlx.models.lm import Lm
from moshi_mlx.sharding.training import DataParallel

from .data.pieces import Piece, encode_pieces, load_pieces, made_of, split_pieces
from .data.recordings import Recording, find_recordings, read_piece
from .data.rows import FRAME_RATE, frames_in
from .data.vary import varied
from .learn.adapters import FILE, Adapter, save_adapter
from .learn.loss import Weights
from .learn.memory import SHORTEST, calculate, fit_frames, measured, memory_limit
from .learn.trainer import Figures, Plan, Trainer, batches_of
from .show import Bar, draw, say, warn

if TYPE_CHECKING:
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["train"]

STATE, LOG, PLOT, PIECES, SAMPLES = "state.safetensors", "log.jsonl", "losses.svg", "pieces.safetensors", "samples"
_OURS = {FILE, "config.json", STATE, LOG, PLOT, PIECES, SAMPLES}
_SAMPLE_SECONDS = 20.0
_PLOT_EVERY = 60.0  # seconds


class Stop:
    """True once Ctrl-C or SIGTERM came, so that a step is finished and kept; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def train(args: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    out, ranks = Path(args.out).expanduser(), DataParallel()
    if ranks.leads:
        _check_out(out, args.force)
    args.quiet = args.quiet or not ranks.leads
    recordings = find_recordings(Path(args.data).expanduser())
    plan = Plan(
        steps=args.steps,
        rate=args.rate,
        batch=args.batch,
        accumulate=args.accumulate,
        weights=Weights(args.text_padding_weight, args.first_codebook_weight),
        adapter=Adapter(args.rank, args.scaling, args.part, args.ft_embed),
        recompute=not args.keep_activations,
        seed=args.seed,
    )
    with Bar(shown=not args.quiet) as bar:
        model, base = _load(args, bar)
        trainer = Trainer(model.lm, plan, ranks)
        seconds = ranks.least(_fit(args, trainer, bar))
        pieces = _pieces(args, out, recordings, seconds, model, bar, ranks)
        learnt, judged = _split(args, seconds, pieces, model, bar)
        count = sum(value.size for value in trainer.parameters.values())
        bar.line(
            f"{len(learnt)} pieces of {seconds:g} s to learn from, {len(judged)} to judge by; {count / 1e6:.2f} "
            f"million numbers are trained, {2 * count / 1e6:.1f} MB as a file"
        )
        run = _Run(args, out, model, base, trainer, recordings, bar)
        finished = run.go(learnt, judged)
    if not ranks.leads:
        return 0 if finished else 130
    state = f"{trainer.step_count} of {plan.steps} steps"
    if not finished:
        warn(f"{state} are kept in {out}; the same command goes on from there", "stopped")
        return 130
    if not args.quiet:
        say(f"{out / FILE}: {state}, text loss {run.last.text:.3f}, audio loss {run.last.audio:.3f}")
        say(f"try it: moshi-mlx-local talk --model {args.model} --lora {out / FILE}")
    return 0


def _check_out(out: Path, force: bool) -> None:
    """Refuse a folder that holds other things; remove an earlier training with ``force``."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} exists and is no folder: choose another name")
    if not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name not in _OURS and not path.name.startswith("."))
    if foreign:
        raise ConfigError(f"{out} holds what is not of a training ({', '.join(foreign[:3])}): choose another folder")
    if force:
        for name in (STATE, LOG, PLOT, FILE, "config.json"):
            (out / name).unlink(missing_ok=True)


def _load(args: argparse.Namespace, bar: Bar) -> tuple[Moshi, dict[str, Any]]:
    """The model, and its config.json."""
    import moshi_mlx

    bar.stage(f"loading {args.model}")
    model = moshi_mlx.load(args.model, weights=args.weights, backend="mlx")
    config = model.lm.config
    if not (config.own_q and config.user_q) or model.codec is None or model.tokenizer is None:
        raise ConfigError(f"{args.model} is for {model.purpose}: models that hear and speak can be trained")
    if args.base == "unpacked" or (args.base == "auto" and _better_unpacked(model.lm, memory_limit(args.memory))):
        unpack_modules(model.lm)
    files = resolve(args.model, weights=args.weights)
    return model, {} if files.config is None else dict(read_json(files.config))


def _better_unpacked(lm: Lm, limit: int) -> bool:
    """On a CPU MLX's products with packed weights take several times as long; the numbers are the same."""
    packed = [module for module in lm.modules() if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    unpacked = sum(module.scales.size * module.group_size * lm.dtype.size for module in packed)
    return mx.default_device() == mx.cpu and unpacked < limit / 8


def _fit(args: argparse.Namespace, trainer: Trainer, bar: Bar) -> float:
    """Seconds of a piece that fit into memory: by calculation, then by one step."""
    limit, asked = memory_limit(args.memory), frames_in(args.duration)
    frames = fit_frames(trainer.lm, trainer.plan, asked, limit)
    need = calculate(trainer.lm, trainer.plan, frames)
    bar.stage(f"measuring a step, which needs {need.total / 1e9:.2f} GB by calculation")
    while (peak := measured(trainer, frames)) > limit:
        if frames <= SHORTEST:
            raise ConfigError(
                f"a step on two seconds takes {peak / 1e9:.1f} GB, and {limit / 1e9:.1f} GB may be used: take the "
                "model in 4 bits (moshi-mlx-quantize), a smaller --batch or --rank, or give more with --memory"
            )
        frames = max(SHORTEST, min(frames - 1, int(0.95 * frames * limit / peak)))
    if mx.default_device() == mx.gpu:
        mx.set_cache_limit(max(0, limit - peak))
    bar.line(f"memory: {need.total / 1e9:.2f} GB by calculation, {peak / 1e9:.2f} GB measured, of {limit / 1e9:.1f} GB")
    if frames < asked:
        seconds = frames / FRAME_RATE
        warn(f"pieces of {seconds:g} s instead of {args.duration:g} s, to fit into memory", "notice")
        return seconds
    return float(args.duration)


def _pieces(
    args: argparse.Namespace,
    out: Path,
    recordings: Sequence[Recording],
    seconds: float,
    model: Moshi,
    bar: Bar,
    ranks: DataParallel,
) -> list[Piece]:
    codec, tokenizer = model.codec, model.tokenizer
    assert codec is not None and tokenizer is not None
    key = made_of(recordings, seconds=seconds, ahead=args.text_ahead, model=model.name, codec=type(codec).__name__)

    def encode() -> list[Piece]:
        bar.stage("encoding", sum(recording.seconds for recording in recordings))
        ahead = args.text_ahead
        return encode_pieces(recordings, seconds, model.lm.config, codec, tokenizer, ahead=ahead, advance=bar.advance)

    if ranks.leads:
        out.mkdir(parents=True, exist_ok=True)
        pieces = load_pieces(out / PIECES, key, encode)
    else:
        pieces = encode()
    if not pieces:
        raise ConfigError(f"{args.data} holds nothing to learn from")
    text = zlib.crc32(b"".join(piece.tokens[0].tobytes() for piece in pieces)) % 2**24  # a float32 holds it exactly
    if ranks.any(ranks.least(text) != text):
        raise ConfigError(f"{args.data} is not the same on all machines: copy the recordings and their words to each")
    return pieces


def _split(
    args: argparse.Namespace, seconds: float, pieces: list[Piece], model: Moshi, bar: Bar
) -> tuple[list[Piece], list[Piece]]:
    """Pieces to learn from and to judge by: a share of them, or other recordings."""
    if args.validation is None:
        return split_pieces(pieces, args.validation_share, args.seed)
    other = find_recordings(Path(args.validation).expanduser())
    bar.stage("encoding for validation", sum(recording.seconds for recording in other))
    assert model.codec is not None and model.tokenizer is not None
    config = model.lm.config
    judged = encode_pieces(
        other, seconds, config, model.codec, model.tokenizer, ahead=args.text_ahead, advance=bar.advance
    )
    return pieces, judged


class _Run:
    """The loop, and what it writes."""

    def __init__(
        self,
        args: argparse.Namespace,
        out: Path,
        model: Moshi,
        base: dict[str, Any],
        trainer: Trainer,
        recordings: Sequence[Recording],
        bar: Bar,
    ):
        self.args, self.out, self.model, self.base, self.trainer, self.bar = args, out, model, base, trainer, bar
        self.recording = recordings[0]
        self.last = Figures(0.0, 0.0)
        self.curves: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("text", "audio", "text, judged", "audio, judged")
        }

    def go(self, learnt: Sequence[Piece], judged: Sequence[Piece]) -> bool:
        """Train to the end; False if it was stopped before."""
        args, trainer, plan = self.args, self.trainer, self.trainer.plan
        ranks = trainer.ranks
        if ranks.leads and (self.out / STATE).exists():
            extra = trainer.load(self.out / STATE)
            self.curves = {name: [tuple(point) for point in curve] for name, curve in extra["curves"].items()}
            self.bar.line(f"going on from step {trainer.step_count}")
            self.last = Figures(*extra["last"])
        trainer.follow()
        self.bar.stage("training", plan.steps, trainer.step_count)
        drawn = time.monotonic()
        with Stop() as stop:
            while trainer.step_count < plan.steps and not ranks.any(stop.asked):
                batches = self.vary(batches_of(learnt, plan, trainer.step_count, ranks.rank, ranks.size))
                self.last = figures = trainer.step(batches)
                if not ranks.leads:
                    continue
                step = trainer.step_count
                self.log(step, figures)
                self.bar.advance(1, f"step {step}: text {figures.text:.3f}, audio {figures.audio:.3f}")
                ends = step == plan.steps
                if judged and (ends or (args.validate_every and step % args.validate_every == 0)):
                    self.judge(step, judged)
                if args.keep_every and step % args.keep_every == 0 and not ends:
                    self.keep()
                if args.sample_every and (ends or step % args.sample_every == 0):
                    self.sample(step)
                if time.monotonic() - drawn > _PLOT_EVERY:
                    self.plot()
                    drawn = time.monotonic()
            if ranks.leads:
                self.keep()
                self.plot()
        return trainer.step_count >= plan.steps

    def vary(self, batches: list[list[Piece]]) -> list[list[Piece]]:
        """A share of the pieces as others might have said them, other ones in every step."""
        share, trainer = self.args.vary_user, self.trainer
        if not share:
            return batches
        rng = np.random.default_rng([trainer.plan.seed, trainer.step_count, trainer.ranks.rank])
        config = trainer.lm.config
        return [[varied(piece, config, rng) if rng.random() < share else piece for piece in batch] for batch in batches]

    def log(self, step: int, figures: Figures) -> None:
        """A line of log.jsonl for every step, and of the terminal for some."""
        entry = {"step": step, "text": figures.text, "audio": figures.audio, "norm": figures.norm, "rate": figures.rate}
        self.write({**entry, "clock": time.strftime("%H:%M:%S")})
        self.curves["text"].append((step, figures.text))
        self.curves["audio"].append((step, figures.audio))
        if step % self.args.log_every == 0:
            self.bar.line(
                f"step {step}: text {figures.text:.3f}, audio {figures.audio:.3f}, gradient {figures.norm:.2f}, "
                f"rate {figures.rate:.2g}"
            )

    def write(self, entry: dict[str, Any]) -> None:
        with open(self.out / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def judge(self, step: int, judged: Sequence[Piece]) -> None:
        """Losses of pieces that are not learnt."""
        found = self.trainer.evaluate(judged)
        self.curves["text, judged"].append((step, found.text))
        self.curves["audio, judged"].append((step, found.audio))
        self.write({"step": step, "judged_text": found.text, "judged_audio": found.audio})
        self.bar.line(f"step {step}: judged by other pieces: text {found.text:.3f}, audio {found.audio:.3f}")

    def keep(self) -> None:
        """The result so far, and what is needed to go on."""
        trainer = self.trainer
        save_adapter(self.out, trainer.parameters, trainer.lm.config, trainer.plan.adapter, self.base)
        last = [self.last.text, self.last.audio]
        trainer.save(self.out / STATE, curves=self.curves, last=last)

    def plot(self) -> None:
        shown: dict[str, Sequence[tuple[float, float]]] = {
            name: smooth(curve) if "judged" not in name else curve for name, curve in self.curves.items()
        }
        draw(self.out / PLOT, shown, f"losses of {self.model.name} by step")

    def sample(self, step: int) -> None:
        """The user's side of the first recording, answered by the model as it is now."""
        import soundfile

        seconds = min(_SAMPLE_SECONDS, self.recording.seconds)
        _, user = read_piece(self.recording, 0.0, seconds, self.model.sample_rate)
        self.trainer.lm.eval()
        try:
            reply = self.model.reply(user, self.model.sample_rate, tail=2.0, seed=self.args.seed)
        except MoshiError as error:
            warn(f"no spoken sample: {error}")
            return
        finally:
            self.trainer.lm.train()
        folder = self.out / SAMPLES
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.wav"
        sides = np.stack([reply.pcm, reply.user_pcm], axis=1)
        soundfile.write(str(path), np.clip(sides, -1, 1), reply.sample_rate, subtype="PCM_16")
        self.bar.line(f"step {step}: {path} says: {reply.text or '(nothing)'}")


def smooth(curve: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Means of neighbours, so that a picture has at most so many points."""
    size = max(1, len(curve) // most)
    groups = [curve[at : at + size] for at in range(0, len(curve), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
