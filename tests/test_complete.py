"""Helium: greedy text as transformers', prompts in pieces and together, limits, seeds, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.config import EOS_ID
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.errors import ConfigError, TokenError
from moshi_mlx.models.sampling import GREEDY, Sampling
from moshi_mlx.tasks import complete
from moshi_mlx.tasks.complete import Helium
from tests.helpers.checkpoints import helium_config, write_checkpoint
from tests.helpers.golden_lm import model as golden_model
from tests.helpers.tokenizer import tokenizer_bytes

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "complete.json").read_text())


class Numbers:
    """A tokenizer whose text is the ids themselves, for models too small for a real one."""

    def __init__(self, end: Sequence[int] = ()):
        self.end = end

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenizer(self, **_: Any) -> Any:
        return self

    def step(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def golden(name: str) -> Helium:
    lm, config = golden_model(name)
    return Helium(config, lm, None, Numbers(), name=name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Helium:
    """A small Helium in Hugging Face's layout with a real tokenizer, in float32."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("helium"), helium_config(max_position_embeddings=512), "helium", dtype=mx.float32
    )
    config = load_config(folder / "config.json")
    lm = load_lm(config, sorted(folder.glob("*.safetensors"))[0])
    return Helium(config, lm, None, TextTokenizer(tokenizer_bytes(600)), name="small")


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_greedy_text_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, Helium continues a prompt otherwise than Hugging Face's implementation on the same files."""
    monkeypatch.setattr(complete, "EOS_ID", 10**6)  # the golden goes on after the end of text
    model = golden(name)
    prompts = [" ".join(map(str, run["prompt"][1:])) for run in GOLDEN[name]]
    expected = [run["greedy"] for run in GOLDEN[name]]
    for prompt, tokens in zip(prompts, expected):
        alone = model.complete(prompt, max_tokens=len(tokens), sampling=GREEDY)
        assert [int(word) for word in alone.text.split()] == tokens
        assert alone.finish in ("length", "context") and alone.prompt_tokens == 1 + len(prompt.split())
    together = model.complete_all(prompts, max_tokens=24, sampling=GREEDY)
    assert [[int(word) for word in one.text.split()] for one in together] == expected


def test_pieces_of_a_prompt_are_the_whole(small: Helium, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a prompt longer than a piece is continued otherwise than one that is read at once."""
    prompt = "the cat and the dog are in the house. " * 12
    assert 100 < len(small.encode(prompt)) < 400
    whole = small.complete(prompt, max_tokens=30, sampling=GREEDY)
    for piece in (1, 7, 64):
        monkeypatch.setattr(complete, "_PIECE", piece)
        assert small.complete(prompt, max_tokens=30, sampling=GREEDY).text == whole.text
    logits = complete._Network(small.lm)
    from mlx_lm.models.cache import KVCache

    ids = mx.array([small.encode(prompt)])
    caches = [[KVCache() for _ in logits.layers] for _ in range(2)]
    once = logits(ids, caches[0])
    parts = mx.concatenate([logits(ids[:, at : at + 50], caches[1]) for at in range(0, ids.shape[1], 50)], axis=1)
    np.testing.assert_allclose(np.array(parts), np.array(once), atol=1e-4)


def test_a_prompt_with_others_is_as_alone(small: Helium) -> None:
    """If this fails, the texts of `--batch` depend on each other: on padding, on positions, or on a shared seed."""
    prompts = [
        "hello",
        "the weather is fine today and the sun",
        "one two",
        "what is the capital of France?",
        "I am",
    ] * 3
    sampling = Sampling(1.0, top_p=0.9)
    together = small.complete_all(prompts, max_tokens=12, sampling=sampling, seed=5)
    alone = [
        small.complete(prompt, max_tokens=12, sampling=sampling, seed=5 + index) for index, prompt in enumerate(prompts)
    ]
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({one.text for one in together}) > 6
    assert together[0].text != small.complete("hello", max_tokens=12, sampling=sampling, seed=6).text


def test_it_stops_at_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, text goes on after the model has ended it, or the end of text is printed."""
    run = GOLDEN["helium"][2]
    end = run["greedy"][5]
    monkeypatch.setattr(complete, "EOS_ID", end)
    done = golden("helium").complete(" ".join(map(str, run["prompt"][1:])), max_tokens=24, sampling=GREEDY)
    first = run["greedy"].index(end)
    assert [int(word) for word in done.text.split()] == run["greedy"][:first]
    assert (done.finish, done.tokens) == ("stop", first)
    assert EOS_ID == 2


def test_the_context_is_the_end(small: Helium) -> None:
    """If this fails, text is written from a context that has lost its beginning, or the cache grows without bound."""
    prompt = "the cat and the dog are in the house. " * 30
    while len(small.encode(prompt)) < 505:
        prompt += " a"
    count = len(small.encode(prompt))
    done = small.complete(prompt, max_tokens=100, sampling=Sampling(1.0), seed=3)
    assert done.finish in ("context", "stop") and done.tokens <= small.context - count
    pieces = list(small.stream(prompt, max_tokens=3, sampling=GREEDY))
    assert pieces[-1].finish is not None and len(pieces) <= 3


def test_a_prompt_of_100_000_tokens_is_refused_with_the_numbers(small: Helium, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a prompt that is too long takes minutes and gigabytes before anybody is told."""
    with pytest.raises(TokenError, match=r"400,000 characters, and the model reads 512 tokens"):
        small.encode("the " * 100_000)
    monkeypatch.setattr(Helium, "context", 4096)
    model = Helium(small.config, small.lm, None, Numbers(), name="small")
    with pytest.raises(TokenError, match=r"100,001 tokens, and small reads 4,096 .* shorten it"):
        model.encode("7 " * 100_000)


def test_memory_is_bounded(small: Helium) -> None:
    """If this fails, many prompts are all in memory at once, or a long prompt is read at once."""
    prompt = "the cat and the dog are in the house. " * 4
    peaks = []
    for count in (8, 24):
        mx.clear_cache()
        mx.reset_peak_memory()
        small.complete_all([prompt] * count, max_tokens=3)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "empty"), ("half \ud83d", "surrogate")],
)
def test_a_prompt_that_is_no_text(small: Helium, prompt: str, reason: str) -> None:
    """If this fails, a bad prompt ends in a traceback, or in text that continues something else."""
    with pytest.raises(TokenError, match=reason):
        small.complete(prompt)
    with pytest.raises(TokenError, match=f"prompt 2 of 2.*{reason}"):
        small.complete_all(["fine", prompt])


def test_text_in_no_alphabet_of_the_tokenizer(small: Helium) -> None:
    """If this fails, letters that a tokenizer without byte pieces does not know are silently another prompt."""
    bare = Helium(small.config, small.lm, None, TextTokenizer(tokenizer_bytes(300, byte_fallback=False)), name="bare")
    with pytest.raises(TokenError, match="no piece for 'ᚠ'"):
        bare.complete("the rune ᚠ")
    assert small.complete("the rune ᚠ", max_tokens=2).prompt_tokens > 4  # with byte pieces it is only longer


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": True}],
)
def test_numbers_that_are_none(small: Helium, options: dict[str, Any]) -> None:
    """If this fails, a wrong number of tokens computes for ever or not at all."""
    with pytest.raises(ConfigError, match="max_tokens"):
        small.complete("hello", **options)
    with pytest.raises(ConfigError, match="temperature"):
        small.complete("hello", sampling=Sampling(float("nan")))


def test_characters_come_whole(small: Helium, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a character of several byte pieces is printed in pieces, or as <0xE2>."""
    tokenizer = small._tokenizer
    ids = tokenizer.encode("≈")  # bytes
    assert len(ids) >= 3
    script = iter([*ids, EOS_ID])
    monkeypatch.setattr(complete._Sampler, "__call__", lambda self, logits: mx.array([next(script, EOS_ID)]))
    pieces = [piece.text for piece in small.stream("x", max_tokens=20)]
    assert "≈" in "".join(pieces) and all("<0x" not in piece for piece in pieces)
    assert "�" not in "".join(pieces)
