"""What is trained: our own language model, three heads that teach it to listen, and the losses.

The heads tell, from what the temporal transformer knows, which phones the user is saying, which word has just been said
and, at the end of a question, which answer it asks for. They are thrown away at export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from moshi_mlx.config import LmConfig
from moshi_mlx.engine.text import EPAD, PAD
from moshi_mlx.models.lm import Lm
from moshi_mlx_training.lm.data import heard_words
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.synthesis import PHONES

ANSWER, HEARD, PHONE, SEMANTIC, ACOUSTIC = 0.5, 0.5, 0.3, 1.0, 0.7  # weights of losses beside the text's


class Learner(nn.Module):
    """The model and its teachers."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.lm = Lm(config)
        self.answer_head = nn.Linear(config.dim, len(dialogues.answers()), bias=False)
        self.heard_head = nn.Linear(config.dim, len(heard_words()) + 1, bias=False)
        self.phone_head = nn.Linear(config.dim, 2 * len(PHONES), bias=False)


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    """Arrays of a tree with their dotted names."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def embed(lm: Lm, tokens: mx.array) -> mx.array:
    """What ``lm.embed`` gives, in one gather instead of one a stream."""
    tables = [lm.text_emb, *lm.audio_embs]
    if not all(type(table) is nn.Embedding for table in tables):
        return lm.embed(tokens)
    offsets = np.cumsum([0, *(table.weight.shape[0] for table in tables)]).astype(np.int32)
    joined = mx.concatenate([*(table.weight for table in tables), mx.zeros((1, tables[0].weight.shape[1]))])
    tokens = tokens.transpose(0, 2, 1)
    return joined[mx.where(tokens < 0, mx.array(offsets[-1]), tokens + mx.array(offsets[:-1]))].sum(axis=2)


def _mean(values: mx.array, weights: mx.array) -> mx.array:
    return (values * weights).sum() / mx.maximum(weights.sum(), 1e-6)


def losses(
    learner: Learner,
    inputs: mx.array,
    text: mx.array,
    text_weight: mx.array,
    depth_rows: mx.array,
    depth_tokens: mx.array,
    answer_rows: mx.array,
    answer: mx.array,
    answer_weight: mx.array,
    heard_rows: mx.array,
    heard: mx.array,
    heard_weight: mx.array,
    phone_rows: mx.array,
    phones: mx.array,
    phone_weight: mx.array,
    first_weight: mx.array,
) -> tuple[mx.array, mx.array]:
    """The loss, and the figures named by ``FIGURES`` [len(FIGURES)]; arguments are a ``Batch``'s arrays."""
    lm = learner.lm
    hidden = lm.out_norm(lm.transformer(embed(lm, inputs)))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    entropy = nn.losses.cross_entropy
    logits = lm.text_linear(hidden)
    each = entropy(logits, text)
    text_loss = _mean(each, text_weight)
    codes = entropy(lm.depformer(hidden[depth_rows], depth_tokens[:, :-1]), depth_tokens[:, 1:])
    semantic, acoustic = codes[:, 0].mean(), codes[:, 1:].mean()
    told = learner.answer_head(hidden[answer_rows])
    answer_loss = _mean(entropy(told, answer), answer_weight)
    words = learner.heard_head(hidden[heard_rows])
    heard_loss = _mean(entropy(words, heard), heard_weight)
    saying = learner.phone_head(hidden[phone_rows]).reshape(*phones.shape, -1)
    phone_loss = _mean(entropy(saying, phones).mean(-1), phone_weight)
    total = text_loss + ANSWER * answer_loss + HEARD * heard_loss + PHONE * phone_loss
    total = total + SEMANTIC * semantic + ACOUSTIC * acoustic
    figures = [
        total,
        text_loss,
        _mean(each, first_weight),
        _mean((logits.argmax(-1) == text).astype(mx.float32), first_weight),
        answer_loss,
        _mean((told.argmax(-1) == answer).astype(mx.float32), answer_weight),
        heard_loss,
        _mean((words.argmax(-1) == heard).astype(mx.float32), heard_weight),
        phone_loss,
        _mean((saying.argmax(-1) == phones).astype(mx.float32).mean(-1), phone_weight),
        semantic,
        acoustic,
    ]
    return total, mx.stack(figures)


class SpeechLearner(nn.Module):
    """A model for speech to text or text to speech, and what teaches it phones."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.lm = Lm(config)
        self.phone_head = nn.Linear(config.dim, 2 * len(PHONES), bias=False)


def speech_losses(
    learner: SpeechLearner,
    inputs: mx.array,
    text: mx.array,
    text_weight: mx.array,
    phones: mx.array,
    phone_weight: mx.array,
    depth_rows: mx.array,
    depth_tokens: mx.array,
) -> tuple[mx.array, mx.array]:
    """The loss, and the figures named by ``SPEECH_FIGURES``; arguments are a ``SpeechBatch``'s arrays."""
    lm, entropy = learner.lm, nn.losses.cross_entropy
    hidden = lm.out_norm(lm.transformer(embed(lm, inputs)))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    logits = lm.text_linear(hidden)
    text_loss = _mean(entropy(logits, text), text_weight)
    words = text_weight * (text != PAD)
    total, semantic, acoustic = text_loss, mx.array(0.0), mx.array(0.0)
    saying = learner.phone_head(hidden).reshape(*phones.shape, -1)
    phone_loss = _mean(entropy(saying, phones).mean(-1), phone_weight)
    total = total + PHONE * phone_loss
    if "depformer" in lm:
        codes = entropy(lm.depformer(hidden[depth_rows], depth_tokens[:, :-1]), depth_tokens[:, 1:])
        semantic, acoustic = codes[:, 0].mean(), codes[:, 1:].mean()
        total = total + SEMANTIC * semantic + ACOUSTIC * acoustic
    figures = [
        total,
        text_loss,
        _mean((logits.argmax(-1) == text).astype(mx.float32), words),
        phone_loss,
        _mean((saying.argmax(-1) == phones).astype(mx.float32).mean(-1), phone_weight),
        semantic,
        acoustic,
    ]
    return total, mx.stack(figures)


def borrow(lm: Lm, other: Lm) -> list[str]:
    """Take what another model knows and this one can use, in place; returns the names of what was taken.

    Audio streams are those of its user for a model that only listens, else those of its voice. Layers that the other
    one does not have begin as if they were not there. The text is another: only its two kinds of padding are taken.
    """
    listens, skipped = not lm.config.own_q, other.config.own_q
    theirs = dict(flat(other.parameters()))
    taken: list[tuple[str, mx.array]] = []
    for name, value in flat(lm.parameters()):
        source = name
        if name.startswith("audio_embs.") and listens:
            number, rest = name.split(".")[1:]
            source = f"audio_embs.{int(number) + skipped}.{rest}"
        found = theirs.get(source)
        if name in ("text_emb.weight", "text_linear.weight", "depformer.embs.0.weight"):
            if found is not None and found.shape[1] == value.shape[1]:
                marks = mx.array([EPAD, PAD])
                value[marks] = found[marks].astype(mx.float32)
                taken.append((name, value))
        elif found is not None and found.shape == value.shape:
            taken.append((name, found.astype(mx.float32)))
        elif name.startswith("transformer.layers.") and name.endswith(("out_proj.weight", "linear_out.weight")):
            taken.append((name, mx.zeros_like(value)))
    lm.load_weights(taken, strict=False)
    mx.eval(lm.parameters())
    return [name for name, _ in taken]


FIGURES = (
    "loss", "text", "first", "first_right", "answer", "answer_right", "heard", "heard_right", "phone", "phone_right",
    "semantic", "acoustic",
)  # fmt: skip
SPEECH_FIGURES = ("loss", "text", "words_right", "phone", "phone_right", "semantic", "acoustic")


@dataclass(frozen=True)
class Lesson:
    """What a model of one kind is taught: its learner, losses(learner, *arrays), and the names of their figures."""

    learner: Callable[[LmConfig], Any]
    losses: Callable[..., tuple[mx.array, mx.array]]
    figures: tuple[str, ...]


CONVERSATION = Lesson(Learner, losses, FIGURES)
_SPEECH = Lesson(SpeechLearner, speech_losses, SPEECH_FIGURES)
LESSONS = {"moshi": CONVERSATION, "stt": _SPEECH, "tts": _SPEECH}
