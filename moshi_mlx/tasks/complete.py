"""Text: Helium continues a prompt.

::

    model = moshi_mlx.load("kyutai/helium-1-preview-2b-mlx")
    for piece in model.stream("Aujourd'hui, il est temps"):
        print(piece.text, end="")

Helium is a base model: it continues a text as its training data might, and was not trained to follow instructions or to
hold a dialogue. A prompt is BOS and the tokenizer's ids.

mlx-lm generates: its :class:`~mlx_lm.generate.BatchGenerator` reads the prompts in pieces, keeps the caches, and lets
prompts that have ended make room for others. The network is this project's (:class:`_Network`), so that every layout
and quantization that loads can be used; the sampler too, since it draws from a seed that belongs to the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import mlx.core as mx

from ..config import BOS_ID, EOS_ID
from ..engine.text import TextTokenizer
from ..errors import ConfigError, TokenError
from ..models.lm import Lm
from ..models.sampling import Sampling, keys_at, noise_key, sample
from .dialogue import Moshi

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MAX_TOKENS", "SAMPLING", "Completion", "Helium", "Piece"]

MAX_TOKENS = 200
"""New tokens at most, by default."""
SAMPLING = Sampling(0.8, top_p=0.95)
"""As Kyutai's ``run_helium``."""
_PIECE = 512  # tokens of a prompt that are read at once
_TOGETHER = 8  # prompts that are computed at once: each may need a cache of the whole context

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """What a token adds to a text.

    Attributes
    ----------
    prompt : int
        Which of the prompts it continues.
    text : str
        Often empty: a character may take several tokens.
    finish : {"stop", "length", "context"} or None
        Why the text ends here: the model ended it, or it has ``max_tokens``, or it fills the context.
    """

    prompt: int
    text: str
    finish: Finish | None = None


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes
    ----------
    text : str
        Without the prompt.
    prompt_tokens, tokens : int
        With BOS; without the end of text.
    finish : {"stop", "length", "context"}
        As in :class:`Piece`.
    seconds_computed : float
        Until it was complete; prompts that are computed together share the time.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: Finish
    seconds_computed: float


class Helium(Moshi):
    """A loaded Helium checkpoint."""

    purpose: ClassVar[str] = "text"
    command: ClassVar[str] = "complete"

    @property
    def context(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return self.lm.config.context

    def encode(self, prompt: str) -> list[int]:
        """BOS and the ids of a prompt.

        Raises
        ------
        TokenError
            If it is empty, has characters that the tokenizer has no piece for, or leaves no room in the context.
        """
        if not prompt:
            raise TokenError("the prompt is empty: give the beginning of a text")
        if len(prompt) > 64 * self.context:  # no piece has so many characters; the tokenizer would take minutes
            raise TokenError(f"the prompt has {len(prompt):,} characters, and the model reads {self.context:,} tokens")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise TokenError(f"character {error.start} of the prompt is half of a surrogate pair, no text") from None
        ids = self._tokenizer.encode(prompt)
        if 0 in ids:
            unknown = next((letter for letter in prompt if 0 in self._tokenizer.encode(letter)), prompt[:20])
            raise TokenError(f"the tokenizer of {self.name} has no piece for {unknown!r}: take it out of the prompt")
        if len(ids) + 1 >= self.context:
            raise TokenError(
                f"the prompt has {len(ids) + 1:,} tokens, and {self.name} reads {self.context:,} with what it adds: "
                "shorten it"
            )
        return [BOS_ID, *ids]

    def complete(
        self, prompt: str, *, max_tokens: int = MAX_TOKENS, sampling: Sampling = SAMPLING, seed: int = 0
    ) -> Completion:
        """Continue a text. Parameters and errors as for :meth:`complete_all`."""
        return self.complete_all([prompt], max_tokens=max_tokens, sampling=sampling, seed=seed)[0]

    def complete_all(
        self, prompts: Sequence[str], *, max_tokens: int = MAX_TOKENS, sampling: Sampling = SAMPLING, seed: int = 0
    ) -> list[Completion]:
        """Continue several texts, some of them together.

        Parameters
        ----------
        prompts : sequence of str
        max_tokens : int
            New tokens at most, for each.
        sampling : Sampling
            Temperature 0 always takes the likeliest token.
        seed : int
            Of the first prompt; each other has the next one. A prompt gives the same text with others as alone with its
            seed, up to rounding.

        Raises
        ------
        ConfigError
            If ``max_tokens`` is not positive.
        TokenError
            As :meth:`encode`, naming the prompt; none has been computed then.
        """
        began = time.perf_counter()
        texts, counts = [""] * len(prompts), [0] * len(prompts)
        done: dict[int, Completion] = {}
        ids = self._encoded(prompts)
        for piece in self._generate(ids, max_tokens, sampling, seed):
            texts[piece.prompt] += piece.text
            counts[piece.prompt] += piece.finish != "stop"
            if piece.finish is not None:
                index, spent = piece.prompt, time.perf_counter() - began
                done[index] = Completion(texts[index], len(ids[index]), counts[index], piece.finish, spent)
        return [done[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = SAMPLING,
        seed: int = 0,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Iterator[Piece]:
        """The same, piece by piece as it is computed; pieces of several texts come mixed.

        Parameters
        ----------
        prompts : str or sequence of str
        max_tokens, sampling, seed
            As for :meth:`complete_all`.
        on_progress : callable, optional
            Called with the tokens of prompts that have been read, and those of all.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self._generate(self._encoded(prompts), max_tokens, sampling, seed, on_progress)

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        if len(prompts) == 1:
            return [self.encode(prompts[0])]
        ids = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids.append(self.encode(prompt))
            except TokenError as error:
                raise TokenError(f"prompt {number} of {len(prompts)}: {error}") from None
        return ids

    def _generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Iterator[Piece]:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ConfigError(f"max_tokens is a number of tokens, 1 or more, found {str(max_tokens)[:60]}")
        return self._pieces(prompts, max_tokens, sampling, seed, on_progress or (lambda *_: None))

    def _pieces(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int, int], object],
    ) -> Iterator[Piece]:
        if not prompts:
            return
        from mlx_lm.generate import BatchGenerator

        limits = [min(max_tokens, self.context - len(ids)) for ids in prompts]
        network: Any = _Network(self.lm)  # what the generator calls of a module, and no more
        generator = BatchGenerator(
            network,
            stop_tokens=[[EOS_ID]],
            completion_batch_size=_TOGETHER,
            prefill_batch_size=_TOGETHER,
            prefill_step_size=_PIECE,
        )
        try:
            samplers: list[Any] = [_Sampler(sampling, seed + index) for index in range(len(prompts))]
            names = generator.insert(prompts, limits, samplers=samplers)
            number = {name: index for index, name in enumerate(names)}
            streams = [self._tokenizer.detokenizer(strip_leading_space=False) for _ in prompts]
            read, total = [0] * len(prompts), sum(map(len, prompts))
            while number:
                reading, made = generator.next()
                for response in reading:
                    read[number[response.uid]] = response.progress[0]
                if reading:
                    on_progress(sum(read), total)
                for response in made:
                    index, stream = number[response.uid], streams[number[response.uid]]
                    finish: Finish | None = response.finish_reason
                    text = "" if finish == "stop" else stream.step(response.token)
                    if finish is not None:
                        text += stream.flush()
                        del number[response.uid]
                    if finish == "length" and limits[index] < max_tokens:
                        finish = "context"
                    yield Piece(index, text, finish)
        finally:
            generator.close()

    @property
    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} has no tokenizer: put its SentencePiece model next to the weights")
        return self.tokenizer


class _Network:
    """A text model as mlx-lm's generation calls it: tokens and its caches in, logits out."""

    def __init__(self, lm: Lm):
        self._lm = lm
        self.layers = lm.transformer.layers

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits [batch, time, text_out], float32, of ``tokens`` [batch, time]."""
        from mlx_lm.models.base import create_attention_mask

        x = self._lm.embed(tokens[:, None])
        x = self._lm.transformer.extend(x, cache, create_attention_mask(x, cache[0]))
        logits: mx.array = self._lm.text_linear(self._lm.out_norm(x))
        return logits.astype(mx.float32)


class _Sampler:
    """Draws the tokens of one text, one after the other, from its own seed."""

    def __init__(self, sampling: Sampling, seed: int):
        self._sampling, self._drawn = sampling, 0
        self._key: NDArray[Any] = noise_key(seed, 0)

    def __call__(self, logits: mx.array) -> mx.array:
        noise = None
        if self._sampling.temperature:
            noise = mx.random.gumbel(logits.shape, key=mx.array(keys_at(self._key, self._drawn)))
            self._drawn += 1
        return sample(logits, self._sampling, noise)
