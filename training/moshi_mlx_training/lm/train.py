"""Train the language model in MLX: on any machine that MLX runs on, with the model that the program runs.

    python -m moshi_mlx_training.lm.train moshi_mlx/builtin/small runs/lm/data runs/lm/train --workers 2

The same for a folder of ``model_type`` stt or tts and data of ``--wordings words``. It
runs until stopped (Ctrl-C, SIGTERM) and goes on where it stopped when run again. The learning rate is constant; a
run with ``--finish-in 12`` lowers it to nothing over 12 minutes and ends. ``--plot`` draws the log instead.

On a CPU, MLX does everything outside matrix products on one thread, so ``--workers`` processes each take a part of the
batch and add their gradients in shared memory; with a GPU, one is right. MLX's own matrix products are slow on Linux:
if OpenBLAS is installed, the program starts again with it preloaded (docs/training.md has the figures).
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.config import LmConfig, ModelConfig
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.tasks.speaking import Timing
from moshi_mlx_training.lm.batch import Batch, training_batch
from moshi_mlx_training.lm.data import RATE
from moshi_mlx_training.lm.dialogue import GAP, Manner, Pieces
from moshi_mlx_training.lm.model import CONVERSATION, FIGURES, LESSONS, SPEECH_FIGURES, Lesson, borrow, flat
from moshi_mlx_training.lm.streams import Clips, SpeechBatch, speech_batch
from moshi_mlx_training.process import Stop, keep_memory
from moshi_mlx_training.speech.recipe import share

WARMUP = 100  # steps
CLIP = 1.0
LOG_EVERY = 20  # steps
BETAS, WEIGHT_DECAY = [0.9, 0.98], 0.05


def preload_blas() -> None:
    """Start this program again with OpenBLAS instead of MLX's own products: on Linux, once, if it is installed."""
    found = ctypes.util.find_library("openblas")
    if sys.platform != "linux" or "MOSHI_TRAIN_BLAS" in os.environ or not found:
        return
    os.environ["MOSHI_TRAIN_BLAS"] = found
    os.environ["LD_PRELOAD"] = ":".join(filter(None, [found, os.environ.get("LD_PRELOAD")]))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Trainer:
    """One worker's model, optimizer and step.

    Parameters
    ----------
    config : LmConfig
    seed : int
        Of the initial weights and of all data.
    add_up : callable or None
        Replaces a list of gradient arrays by their mean over the workers.
    lesson : Lesson
        What is learnt.
    """

    def __init__(
        self,
        config: LmConfig,
        seed: int = 0,
        add_up: Callable[[list[mx.array]], list[mx.array]] | None = None,
        compiled: bool = True,
        lesson: Lesson = CONVERSATION,
    ) -> None:
        mx.random.seed(seed)
        self.config, self.seed, self.add_up = config, seed, add_up
        self.learner = lesson.learner(config)
        self.optimizer = optim.AdamW(1e-3, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.optimizer.init(self.learner.trainable_parameters())
        self.step_count = 0
        mx.eval(self.learner.parameters(), self.optimizer.state)

        def learn(parameters: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
            self.learner.update(parameters)
            return lesson.losses(self.learner, *arrays)

        value_and_grad = mx.value_and_grad(learn)
        if compiled:
            value_and_grad = mx.compile(value_and_grad)

        state = [self.learner.state, self.optimizer.state]

        def gradient(*arrays: mx.array) -> Any:
            parameters = self.learner.trainable_parameters()
            out = value_and_grad(parameters, *arrays)
            self.learner.update(parameters)  # tracing has left its placeholders in the model
            return out

        def update(grads: Any) -> mx.array:
            grads, norm = optim.clip_grad_norm(grads, CLIP)
            # A step on numbers that are not finite would end the run: it is taken with no gradient instead.
            good = mx.isfinite(norm)
            grads = tree_unflatten([(name, mx.where(good, g, 0)) for name, g in flat(grads)])
            self.optimizer.update(self.learner, grads)
            return norm

        self._gradient: Callable[..., Any] = gradient
        self._update: Callable[..., Any] = update
        if compiled:
            self._update = mx.compile(update, inputs=state, outputs=state)

    def step(self, batch: Sequence[mx.array], rate: float) -> tuple[np.ndarray, float]:
        """One step of AdamW at this learning rate; returns the figures and the gradient's norm."""
        (_, figures), grads = self._gradient(*batch)
        if self.add_up is not None:
            names, values = zip(*flat(grads), strict=True)
            mx.eval(values, figures)
            grads = tree_unflatten(list(zip(names, self.add_up(list(values)), strict=True)))
        self.optimizer.learning_rate = rate * min(1.0, (self.step_count + 1) / WARMUP)
        norm = self._update(grads)
        mx.eval(self.learner.state, self.optimizer.state, figures, norm)
        self.step_count += 1
        return np.array(figures), float(norm)

    def save(self, path: Path, **extra: Any) -> None:
        """Weights, optimizer and counters in one safetensors file: whole or not at all."""
        arrays = {f"model.{name}": value for name, value in flat(self.learner.parameters())}
        arrays |= {f"optimizer.{name}": value for name, value in flat(self.optimizer.state)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.stem + ".tmp.safetensors")
        mx.save_safetensors(str(temporary), arrays, {"step": str(self.step_count), "extra": json.dumps(extra)})
        os.replace(temporary, path)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a saved state; returns what was saved beside it."""
        arrays, metadata = read_safetensors(path)
        model = [(name.removeprefix("model."), v) for name, v in arrays.items() if name.startswith("model.")]
        state = [(name.removeprefix("optimizer."), v) for name, v in arrays.items() if name.startswith("optimizer.")]
        self.learner.load_weights(model)
        _replace(self.optimizer.state, tree_unflatten(state))
        mx.eval(self.learner.state, self.optimizer.state)
        self.step_count = int(metadata["step"])
        extra: dict[str, Any] = json.loads(metadata["extra"])
        return extra

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a published file; the heads, which are not published, are new.

        A model of another configuration gives what can be used.
        """
        from moshi_mlx_training.lm.evaluate import load_weights

        theirs = path.with_name("config.json")
        config = read_model(path.parent)[0] if theirs.exists() else self.config
        lm = load_weights(path, config)
        if config != self.config:
            print(f"{len(borrow(self.learner.lm, lm))} tensors begin as in {path}", flush=True)
            return
        self.learner.lm.load_weights([(name, value.astype(mx.float32)) for name, value in flat(lm.parameters())])
        mx.eval(self.learner.state)


def _replace(into: Any, values: Any) -> None:
    """Put ``values`` into a tree in place: compiled functions hold on to the containers."""
    for key in into if isinstance(into, dict) else range(len(into)):
        if isinstance(into[key], (dict, list)):
            _replace(into[key], values[key])
        else:
            into[key] = values[key]


class SharedSum:
    """Means of gradients over processes, through shared memory."""

    def __init__(self, context: Any, workers: int, size: int) -> None:
        self.memory = [context.RawArray("f", size) for _ in range(workers)]
        self.barrier = context.Barrier(workers)

    def adder(self, worker: int) -> Callable[[list[mx.array]], list[mx.array]]:
        views = [np.frombuffer(memory, np.float32) for memory in self.memory]

        def add_up(values: list[mx.array]) -> list[mx.array]:
            at = 0
            for value in values:
                np.copyto(views[worker][at : at + value.size].reshape(value.shape), np.asarray(value))
                at += value.size
            self.barrier.wait()
            out, at = [], 0
            for value in values:
                part = slice(at, at + value.size)
                total = views[0][part] + views[1][part]
                for view in views[2:]:
                    total += view[part]
                total *= np.float32(1 / len(views))
                out.append(mx.array(total).reshape(value.shape))
                at += value.size
            self.barrier.wait()  # nobody writes before everybody has read
            return out

        return add_up


def work(worker: int, shared: SharedSum | None, orders: Any, results: Any, options: argparse.Namespace) -> None:
    """One worker: steps as ordered, (step, rate) each, until None comes. The first one saves and reports."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent decides
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(4 << 30)
    config, tokenizer = read_model(options.model)
    task, delay = read_task(options.model)
    add_up = None if shared is None else shared.adder(worker)
    trainer = Trainer(config, options.seed, add_up, lesson=LESSONS[task])
    path, extra = options.run / "lm.safetensors", {}
    if path.exists():
        extra = trainer.load(path)
    elif options.start_from is not None:
        trainer.start_from(options.start_from)
    pieces: Pieces | Clips = (
        Pieces(options.data, tokenizer) if task == "moshi" else Clips(options.data, tokenizer, task)
    )
    if extra and extra["codec"] != pieces.codec:
        raise ValueError(f"{path} was trained on codec {extra['codec']}, {options.data} holds {pieces.codec}")
    results.put(("ready", worker, trainer.step_count, extra))
    refreshed = time.monotonic()
    while (order := orders.get()) is not None:
        kind, value = order
        if kind == "save":
            if worker == 0:
                trainer.save(value["path"], codec=pieces.codec, **value["extra"])
            continue
        size, step = options.batch // options.workers, trainer.step_count
        batch: Batch | SpeechBatch
        if isinstance(pieces, Clips):
            batch = speech_batch(
                pieces, config, delay, size, options.frames, options.seed, step, worker, options.drop_acoustic
            )
        else:
            manner = Manner(tuple(options.unknown_gap), options.mix_speakers)
            batch = training_batch(
                pieces, config, size, options.frames, options.seed, step, worker, manner, options.drop_acoustic
            )
        figures, norm = trainer.step(batch.arrays(), value)
        results.put(("step", worker, figures, norm))
        if time.monotonic() - refreshed > 60:
            pieces.refresh()
            refreshed = time.monotonic()
    results.put(("end", worker, None, None))


def read_model(folder: Path) -> tuple[LmConfig, TextTokenizer]:
    """Sizes and tokenizer of a model's folder."""
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.tokenizer_name is not None
    return config.lm, TextTokenizer(folder / config.tokenizer_name)


def read_task(folder: Path) -> tuple[Literal["moshi", "stt", "tts"], int]:
    """What the model of a folder is for, and by how many frames its text or its voice is late.

    Raises
    ------
    ValueError : nobody here can teach that
    """
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    if config.model_type == "moshi":
        return "moshi", 0
    if config.model_type == "stt":
        return "stt", round(RATE * float(config.stt_config["audio_delay_seconds"]))
    if config.model_type == "tts":
        return "tts", Timing.of(config, RATE).delay
    raise ValueError(f"{folder}: a model of type {config.model_type} cannot be trained here; moshi, stt and tts can")


def train(options: argparse.Namespace) -> None:
    """Start the workers; hand out steps, log, save and stop."""
    stop, context = Stop(), multiprocessing.get_context("spawn")
    options.run.mkdir(parents=True, exist_ok=True)
    lesson = LESSONS[read_task(options.model)[0]]
    names = lesson.figures
    shared = None
    if options.workers > 1:
        config, _ = read_model(options.model)
        size = sum(int(value.size) for _, value in flat(lesson.learner(config).parameters()))
        shared = SharedSum(context, options.workers, size)
    orders = [context.Queue() for _ in range(options.workers)]
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(number, shared, orders[number], results, options), daemon=True)
        for number in range(options.workers)
    ]
    for worker in workers:
        worker.start()

    def answers(kind: str) -> list[Any]:
        out: list[Any] = []
        while len(out) < options.workers:
            try:
                out.append(results.get(timeout=2.0))
            except Exception:
                if any(worker.exitcode not in (None, 0) for worker in workers):
                    raise SystemExit("a worker died; its message is above") from None
        assert all(answer[0] == kind for answer in out)
        return sorted(out, key=lambda answer: answer[1])

    def tell(order: Any) -> None:
        for one in orders:
            one.put(order)

    ready = answers("ready")
    step, extra = ready[0][2], ready[0][3]
    frames_heard = int(extra.get("frames", 0))
    began = saved = kept = noted = time.monotonic()
    level_at_start = level = (
        float(extra.get("level", 1.0)) or 1.0
    )  # a finished run that goes on starts at the full rate
    print(f"from step {step}, {frames_heard / 12.5 / 3600:.2f} h heard", flush=True)
    log, sums, count = open(options.run / "lm.jsonl", "a", encoding="utf-8"), np.zeros(len(names)), 0

    def save(path: Path) -> None:
        tell(("save", {"path": path, "extra": {"frames": frames_heard, "level": level}}))

    while not stop and not (options.steps and step >= options.steps):
        minutes = (time.monotonic() - began) / 60
        if options.finish_in:
            level = level_at_start * max(0.0, 1 - minutes / options.finish_in)
            if level == 0:
                break
        tell(("step", options.rate * level))
        done = answers("step")
        step += 1
        frames_heard += options.batch * options.frames
        sums += sum(answer[2] for answer in done) / options.workers
        count += 1
        now = time.monotonic()
        if step % LOG_EVERY == 0:
            line = {
                "step": step,
                "hours_heard": round(frames_heard / 12.5 / 3600, 3),
                "rate": round(options.rate * level, 7),
                "frames_per_second": round(count * options.batch * options.frames / (now - noted)),
                "clock": time.strftime("%H:%M:%S"),
                "norm": round(done[0][3], 2),
                **{name: round(float(value), 4) for name, value in zip(names, sums / count, strict=True)},
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            sums, count, noted = np.zeros(len(names)), 0, now
        if now - saved > 60 * options.save_every:
            save(options.run / "lm.safetensors")
            saved = now
        if options.keep_every and now - kept > 60 * options.keep_every:
            save(options.run / f"lm-{step:06d}.safetensors")
            kept = now
    save(options.run / "lm.safetensors")
    tell(None)
    answers("end")
    for worker in workers:
        worker.join(30)
    print(
        f"saved {options.run / 'lm.safetensors'} at step {step}, {frames_heard / 12.5 / 3600:.2f} h heard", flush=True
    )


def plot(run: Path) -> Path:
    """Draw the log's curves to ``lm.png``; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run / "lm.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    hours = [line["hours_heard"] for line in lines]
    for name in (name for name in lines[0] if name in {*FIGURES, *SPEECH_FIGURES}):
        axes["right" in name].plot(hours, [line[name] for line in lines], label=name)
    for axis in axes:
        axis.set_xlabel("hours heard")
        axis.legend()
    figure.savefig(run / "lm.png", dpi=120)
    return run / "lm.png"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.lm.train", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder with config.json and the tokenizer")
    parser.add_argument("data", type=Path, help="folder that 'lm_data encode' wrote")
    parser.add_argument("run", type=Path, help="folder of the checkpoint and the log; an existing run goes on")
    parser.add_argument("--workers", type=int, default=1, help="processes that share a batch (1)")
    parser.add_argument("--batch", type=int, default=10, help="conversations in a step (10)")
    parser.add_argument("--frames", type=int, default=192, help="length of a conversation (192)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (0.002)")
    parser.add_argument("--steps", type=int, help="end after this step")
    parser.add_argument(
        "--finish-in", type=float, metavar="MINUTES", help="lower the learning rate to nothing, then end"
    )
    parser.add_argument("--save-every", type=float, default=2, metavar="MINUTES")
    parser.add_argument("--keep-every", type=float, metavar="MINUTES", help="keep a copy this often, to choose from")
    parser.add_argument(
        "--start-from", type=Path, metavar="FILE", help="a new run begins with the weights of this model.safetensors"
    )
    parser.add_argument(
        "--drop-acoustic",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of conversations in which acoustic codes of the user are hidden (0)",
    )
    parser.add_argument(
        "--mix-speakers",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of questions that have the acoustic codes of another speaker (0)",
    )
    parser.add_argument(
        "--unknown-gap",
        type=int,
        nargs=2,
        default=GAP,
        metavar=("FROM", "BEFORE"),
        help=f"frames until a sentence that is none of the questions is answered ({GAP[0]} {GAP[1]})",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", action="store_true", help="draw the log to lm.png and end")
    options = parser.parse_args(arguments)
    if options.plot:
        print(plot(options.run))
        return
    if options.batch % options.workers:
        parser.error(f"--batch {options.batch} must be a multiple of --workers {options.workers}")
    if not 3 < options.unknown_gap[0] < options.unknown_gap[1]:
        parser.error("--unknown-gap needs two numbers of frames above 3, the second above the first")
    preload_blas()
    keep_memory()
    train(options)


if __name__ == "__main__":
    main()
