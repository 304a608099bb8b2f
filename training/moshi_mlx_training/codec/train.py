"""Train the codec: everything at once, from waveforms and phone labels.

    python -m moshi_mlx_training.codec.train runs/data runs/codec

runs until stopped (Ctrl-C, SIGTERM) and goes on where it stopped when run again. The learning rate is constant; a
run with ``--finish-in 20`` lowers it to nothing over 20 minutes and ends; run again, it starts at the full rate.

Two workers with one thread each take steps on copies of one shared model and apply them to it under a lock, each
gradient at most a step or two behind. On a machine with other things to do this is many times faster than two threads
in one process, which wait for each other at every operation (docs/training.md has the figures).
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_mlx_training import checkpoint
from moshi_mlx_training.codec.adversary import Discriminator, losses_of
from moshi_mlx_training.codec.data import FRAME_SAMPLES, Corpus
from moshi_mlx_training.codec.export import from_published
from moshi_mlx_training.codec.losses import RESOLUTIONS, low_loss, spectral_loss
from moshi_mlx_training.codec.mimi_torch import Mimi
from moshi_mlx_training.process import Stop, half_precision, keep_memory
from moshi_mlx_training.speech import recipe as recipes
from moshi_mlx_training.speech.synthesis import SAMPLE_RATE

Moments = list[tuple[Tensor, Tensor]]  # AdamW's two averages, for each parameter
WAVE, COMMITMENT, PHONE, LOW = 1.0, 0.5, 1.0, 2.0  # weights beside the spectral loss
BYPASS_STEPS, WARMUP_STEPS = 300, 200  # nothing is quantized at first
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
JUDGE_RATE, JUDGE_WARMUP = 1e-3, 500  # the discriminator's opinion counts in full after so many steps
LOG_EVERY = 200  # steps
DECODER_CROPS, DECODER_SKIP = ((5, 14), (3, 22)), 2  # frames
CROPS = ((5, 12), (3, 20))  # (batch, frames)


def perplexities(model: Mimi) -> list[int]:
    """How many entries each codebook uses, as the exponential of its entropy."""
    out = []
    for book in (*model.first.books, *model.rest.books):
        share = book.cluster_usage / book.cluster_usage.sum()
        out.append(round(float((-(share * (share + 1e-9).log()).sum()).exp())))
    return out


def step_losses(
    model: Mimi, batch: tuple[Tensor, Tensor, Tensor], books: int, bypass: bool, which: Sequence[int]
) -> dict[str, Tensor]:
    """Every loss of one batch (heard, target [batch, samples], labels [batch, frames, 2])."""
    heard, target, labels = batch
    with half_precision():
        said, commitment, phones = model(heard[:, None], books, bypass)
    said, phones = said.float()[:, 0], phones.float()
    return plain_losses(said, target, which) | {
        "commitment": commitment,
        "phone": F.cross_entropy(phones.flatten(0, 2), labels.flatten()),
        "phones_right": (phones.argmax(-1) == labels).float().mean(),
    }


def freeze_codes(model: Mimi) -> None:
    """Leave only what is behind the codes to learn: projections back, upsampling, transformer and decoder."""
    behind = (model.first.output_proj, model.rest.output_proj, model.upsample, model.decoder_transformer, model.decoder)
    model.requires_grad_(False)
    for module in behind:
        module.requires_grad_(True)


def decode_again(model: Mimi, heard: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder makes of the codes, and what it should, less the first frames, which lack their left context."""
    with half_precision():
        with torch.no_grad():
            z = model.latent(heard[:, None])
            points = [rvq.quantize(rvq.project(z))[0] for rvq in (model.first, model.rest)]
        mixed = model.first.back(points[0], len(heard)) + model.rest.back(points[1], len(heard))
        said = model.synthesize(mixed)
    skipped = DECODER_SKIP * FRAME_SAMPLES
    return said.float()[:, 0, skipped:], target[:, skipped:]


def plain_losses(said: Tensor, target: Tensor, which: Sequence[int]) -> dict[str, Tensor]:
    """How far what was said is from what was meant, of pcm [batch, samples]; mel is for the log alone."""
    spectral, mel = spectral_loss(said, target, which)
    losses = {"spectral": spectral, "wave": (said - target).abs().mean(), "low": low_loss(said, target)}
    return losses if mel is None else losses | {"mel": mel}


def sound_loss(losses: dict[str, Tensor]) -> Tensor:
    return losses["spectral"] + WAVE * losses["wave"] + LOW * losses["low"]


@dataclass
class Shared:
    """What the workers have in common: models and optimizer states in shared memory, counters and a lock."""

    model: Mimi
    moments: Moments
    discriminator: Discriminator | None  # of the adversarial training, if there is one
    judge_moments: Moments
    lock: Any
    steps: Any  # steps taken
    begun: Any  # steps handed out; each has a batch of its own
    judged: Any  # steps the discriminator has taken
    level: Any  # learning rate, as a share of the full one
    stop: Any
    first: int = 0  # the step at which this model's optimizer began: later than 0 if it goes on from published weights


def no_moments(model: torch.nn.Module) -> Moments:
    return [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]


@torch.no_grad()
def adamw(theirs: torch.nn.Module, mine: torch.nn.Module, moments: Moments, step: int, rate: float) -> None:
    """One step of AdamW on ``theirs`` with the gradients of ``mine``; ``step`` counts from 1."""
    beta1, beta2 = BETAS
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for (mean, square), local, shared in zip(moments, mine.parameters(), theirs.parameters(), strict=True):
        gradient = local.grad
        if gradient is None:
            continue
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if shared.ndim > 1:  # kernels and matrices decay, vectors do not
            shared.mul_(1 - rate * WEIGHT_DECAY)
        shared.addcdiv_(mean, square.div(correction2).sqrt_().add_(1e-8), value=-rate / correction1)


def apply_step(shared: Shared, local: Mimi, before: dict[str, Tensor], options: argparse.Namespace) -> None:
    """A worker's gradients move the shared parameters; its codebooks' movement is added to the shared ones."""
    step = shared.steps.value + 1
    age = step - shared.first
    rate = options.rate * min(1.0, age / WARMUP_STEPS) * max(shared.level.value, 0.01)
    adamw(shared.model, local, shared.moments, age, rate)
    with torch.no_grad():
        for name, mine in local.named_buffers():
            shared.model.get_buffer(name).add_(mine - before[name])
            if name.endswith("cluster_usage"):
                shared.model.get_buffer(name).clamp_min_(1e-4)
    shared.steps.value = step


def push_apart(
    discriminator: Discriminator, loss: Tensor, said: Tensor, meant: Tensor, share: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of ``loss`` and the discriminator's opinion with respect to ``said``, and its own gradients.

    The opinion's gradient is scaled to ``share`` of the norm of the loss's, so neither can run away with the decoder.
    """
    (plain,) = torch.autograd.grad(loss, said)
    opinion, own = losses_of(discriminator, said, meant)
    (judged,) = torch.autograd.grad(opinion, said, retain_graph=True)
    discriminator.zero_grad()
    own.backward(inputs=list(discriminator.parameters()))
    torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 3.0)
    scale = share * plain.norm() / judged.norm().clamp_min(1e-12)
    return plain + scale * judged, {"opinion": opinion, "discriminator": own}


@torch.no_grad()
def fit_codebooks(model: Mimi, corpus: Corpus, options: argparse.Namespace) -> None:
    """Place every codebook on some 5,000 latents of the model as it is."""
    rng, (size, frames) = np.random.default_rng([options.seed, 1 << 40]), CROPS[0]
    latents = []
    for _ in range(40):
        heard = torch.from_numpy(corpus.batch(size, frames, rng, options.answer_share)[0])
        with half_precision():
            latents.append(model.latent(heard[:, None]).float())
    z = torch.cat(latents)
    for quantizer in (model.first, model.rest):
        quantizer.fit(quantizer.project(z), usage=60 / model.shape.bins)


def learn_phone_head(model: Mimi, corpus: Corpus, options: argparse.Namespace, steps: int = 150) -> None:
    """Fit a new phone head to the codes as they are, so that its first mistakes do not pull at a trained encoder."""
    rng, (size, frames) = np.random.default_rng([options.seed, 1 << 41]), CROPS[0]
    optimizer = torch.optim.Adam(model.phone_head.parameters(), 1e-2)
    for _ in range(steps):
        heard, _, labels = (torch.from_numpy(a) for a in corpus.batch(size, frames, rng, options.answer_share))
        with torch.no_grad():
            semantic = model.first.quantize(model.first.project(model.latent(heard[:, None])))[0]
        loss = F.cross_entropy(model.phones(semantic, size).flatten(0, 2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"phone head fitted to the codes: cross-entropy {float(loss):.2f}", flush=True)


def work(number: int, shared: Shared, results: Any, options: argparse.Namespace) -> None:
    """One worker: one thread, one step after the other on a copy of the model, until told to stop."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    corpus = Corpus(options.data, wide=options.channel == "wide")
    local, refreshed, parent = Mimi(), time.monotonic(), os.getppid()
    crops, discriminator = CROPS, None if shared.discriminator is None else Discriminator()
    if options.stage == "decoder":
        freeze_codes(local.eval())
        crops = DECODER_CROPS
    else:
        local.train()
    while not shared.stop.value and os.getppid() == parent:  # an orphan would train for ever
        with shared.lock:
            step = shared.begun.value
            shared.begun.value += 1
            if options.stage == "codec" and step >= BYPASS_STEPS and not shared.model.first.books[0]._initialized:
                fit_codebooks(shared.model, corpus, options)
            local.load_state_dict(shared.model.state_dict())
            if discriminator is not None and shared.discriminator is not None:
                discriminator.load_state_dict(shared.discriminator.state_dict())
        before = {name: buffer.clone() for name, buffer in local.named_buffers()}
        torch.manual_seed(options.seed * 1_000_003 + step)
        rng = np.random.default_rng([options.seed, step])
        size, frames = crops[int(rng.integers(len(crops)))]
        books = local.shape.n_q if rng.random() < 0.7 else int(rng.integers(1, local.shape.n_q))
        which = rng.choice(len(RESOLUTIONS), 2, replace=False).tolist()  # half the cost, the same on average
        heard, target, labels = (torch.from_numpy(a) for a in corpus.batch(size, frames, rng, options.answer_share))
        local.zero_grad()
        if options.stage == "decoder":
            books = local.shape.n_q
            said, meant = decode_again(local, heard, target)
            leaf = said.detach().requires_grad_()
            losses = plain_losses(leaf, meant, which)
            loss = sound_loss(losses)
            if discriminator is None:
                (gradient,) = torch.autograd.grad(loss, leaf)
            else:
                share = options.adversarial * min(1.0, shared.judged.value / JUDGE_WARMUP)
                gradient, opinions = push_apart(discriminator, loss, leaf, meant, share)
                losses |= opinions
            said.backward(gradient)
        else:
            losses = step_losses(local, (heard, target, labels), books, step < BYPASS_STEPS, which)
            loss = sound_loss(losses) + COMMITMENT * losses["commitment"] + options.phone * losses["phone"]
            loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(local.parameters(), 3.0))
        with shared.lock:
            if math.isfinite(norm):
                apply_step(shared, local, before, options)
                if discriminator is not None and shared.discriminator is not None:
                    shared.judged.value += 1
                    adamw(shared.discriminator, discriminator, shared.judge_moments, shared.judged.value, JUDGE_RATE)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if books < local.shape.n_q:
            values.pop("mel", None)  # report it of the whole codec
        results.put((heard.numel() / SAMPLE_RATE, values | {"norm": norm, f"worker{number}": 1.0}))
        if time.monotonic() - refreshed > 120:
            corpus.refresh()
            refreshed = time.monotonic()


def train(options: argparse.Namespace) -> None:
    """Start the workers; log, save and stop them."""
    torch.set_num_threads(1)
    context = torch.multiprocessing.get_context("spawn")
    stop, path = Stop(), options.run / ("codec.pt" if options.stage == "codec" else "finetuned.pt")
    corpus = Corpus(options.data)  # complains here, once, if there is nothing to learn from
    torch.manual_seed(options.seed)
    model = Mimi()
    step, first, heard_seconds, level = 0, 0, 0.0, 1.0
    moments = no_moments(model)
    discriminator = Discriminator() if options.stage == "decoder" and options.adversarial else None
    judge_moments, judged = [] if discriminator is None else no_moments(discriminator), 0
    if path.exists():
        state = checkpoint.load(path)
        model.load_state_dict(state["model"])
        step, heard_seconds, level = state["step"], state["heard_seconds"], state["level"] or 1.0
        moments, first = state["moments"], state.get("first", 0)
        if discriminator is not None and "discriminator" in state:
            discriminator.load_state_dict(state["discriminator"])
            judge_moments, judged = state["judge_moments"], state["judged"]
        print(f"going on from step {step}, {heard_seconds / 3600:.2f} h heard", flush=True)
    elif options.start_from is not None:
        size, frames = CROPS[0]
        model = from_published(options.start_from, size * frames / model.shape.bins)
        if options.stage == "codec":
            learn_phone_head(model, corpus, options)
            step = first = BYPASS_STEPS  # its codebooks have their places
    elif options.stage == "decoder":
        model.load_state_dict(checkpoint.load(options.run / "codec.pt")["model"])
    model.share_memory()
    if discriminator is not None:
        discriminator.share_memory()
    for pair in (*moments, *judge_moments):
        for tensor in pair:
            tensor.share_memory_()
    shared = Shared(
        model,
        moments,
        discriminator,
        judge_moments,
        lock=context.Lock(),
        steps=context.Value("q", step, lock=False),
        begun=context.Value("q", step, lock=False),
        judged=context.Value("q", judged, lock=False),
        level=context.Value("d", level, lock=False),
        stop=context.Value("b", 0, lock=False),
        first=first,
    )
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(number, shared, results, options), daemon=True)
        for number in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    log = checkpoint.Log(path.with_suffix(".jsonl"))
    began = saved = noted = time.monotonic()
    level_at_start, heard_at_note, taken = level, heard_seconds, 0

    def save() -> None:
        with shared.lock:
            state = {
                **checkpoint.model_state(model),
                "moments": shared.moments,
                "step": shared.steps.value,
                "first": shared.first,
                "heard_seconds": heard_seconds,
                "level": shared.level.value,
            }
            if discriminator is not None:
                state |= {
                    "discriminator": discriminator.state_dict(),
                    "judge_moments": judge_moments,
                    "judged": shared.judged.value,
                }
            checkpoint.save(path, state)

    while not stop:
        if options.finish_in:
            shared.level.value = level_at_start * max(0.0, 1 - (time.monotonic() - began) / 60 / options.finish_in)
            if shared.level.value == 0:
                break
        if any(not worker.is_alive() for worker in workers):
            print("a worker died; stopping the others", flush=True)
            break
        try:
            seconds, values = results.get(timeout=1.0)
        except queue.Empty:
            continue
        heard_seconds += seconds
        taken += 1
        log.add(**{name: value for name, value in values.items() if not name.startswith("worker")})
        now = time.monotonic()
        if taken % LOG_EVERY == 0 or (taken < LOG_EVERY and taken % 10 == 0):
            log.write(
                step=shared.steps.value,
                hours_heard=round(heard_seconds / 3600, 3),
                rate=round(options.rate * shared.level.value, 7),
                times_real=round((heard_seconds - heard_at_note) / (now - noted), 2),
                clock=time.strftime("%H:%M:%S"),
                books=perplexities(model),
            )
            noted, heard_at_note = now, heard_seconds
        if now - saved > 60 * options.save_every:
            save()
            saved = now
    shared.stop.value = 1
    deadline = time.monotonic() + 30
    for worker in workers:
        while worker.is_alive() and time.monotonic() < deadline:
            while not results.empty():  # a worker cannot end while its results wait in the pipe
                heard_seconds += results.get()[0]
            worker.join(0.2)
        worker.kill()
    if options.finish_in and shared.level.value == 0 and options.stage == "codec":
        model.round_to_half()  # codes are about to be made with this: they must be those of the exported file
    save()
    print(f"saved {path} at step {shared.steps.value}, {heard_seconds / 3600:.2f} h heard", flush=True)


def parser_for(module: str, description: str, rate: float, answer_share: float) -> argparse.ArgumentParser:
    """The options both trainers have."""
    parser = argparse.ArgumentParser(prog=f"python -m moshi_mlx_training.codec.{module}", description=description)
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("run", type=Path, help="folder of the checkpoints and logs; an existing run goes on")
    parser.add_argument(
        "--finish-in", type=float, metavar="MINUTES", help="lower the learning rate to nothing, then end"
    )
    parser.add_argument("--rate", type=float, default=rate, help=f"learning rate ({rate})")
    parser.add_argument(
        "--answer-share", type=float, default=answer_share, help=f"share of the answering voice ({answer_share})"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument(
        "--save-every", type=float, default=3, metavar="MINUTES", help="minutes between checkpoints (3)"
    )
    recipes.add_options(parser, "channel")
    parser.add_argument("--seed", type=int, default=0, help="of the batches and the first weights (0)")
    parser.add_argument(
        "--start-from", type=Path, metavar="FILE", help="a new run begins with the weights of this mimi.safetensors"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("train", __doc__.split("\n")[0], 5e-4, 0.5)
    parser.add_argument("--phone", type=float, default=PHONE, help=f"weight of the phones' loss ({PHONE:g})")
    options = parser.parse_args(arguments)
    options.stage = "codec"
    keep_memory()
    train(options)


if __name__ == "__main__":
    main()
