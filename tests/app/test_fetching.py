"""A model that has to be fetched first: what is said, what is shown, what is left after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.utils._http
import pytest
from moshi_mlx_app.cli import main
from moshi_mlx_app.models import fetch as fetching
from moshi_mlx_app.models.fetch import fetch, load_model

from moshi_mlx.checkpoint import transfer
from moshi_mlx.errors import DownloadError
from tests.app.conftest import FakeModel
from tests.helpers.fake_hub import FakeHub, FakeRepo, running_hub

NAME = "someone/model"
WEIGHTS = bytes(range(256)) * 100_000  # more than two of huggingface_hub's pieces of 10 MB
FILES = {
    "config.json": json.dumps({"moshi_name": "weights.safetensors"}).encode(),
    "weights.safetensors": WEIGHTS,
    "tokenizer-e351c8d8-checkpoint125.safetensors": b"m" * 100,
    "tokenizer_spm_32k_3.model": b"t" * 50,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model, and an empty cache."""
    with running_hub() as running:
        running.repos[NAME] = FakeRepo(dict(FILES))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        for reset in ("reset_sessions", "close_session"):
            getattr(huggingface_hub.utils._http, reset, lambda: None)()
        yield running


def test_a_download_is_announced_and_resumed(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, gigabytes come without a word, or Ctrl-C costs what came before it."""
    monkeypatch.setattr(fetching, "_EVERY", 0.0)
    progress = fetching._Download.__call__

    def interrupted(self: fetching._Download, name: str, here: int, size: int) -> None:
        progress(self, name, here, size)
        if name == "weights.safetensors" and 10_000_000 < here < size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetching._Download, "__call__", interrupted)
        fetch(NAME)
    announced, *lines = capsys.readouterr().err.splitlines()
    assert announced.startswith(f"download: {NAME}: 0.03 GB, fetched once; into {tmp_path / 'cache'}")
    assert "the next run resumes it" in announced and any("0.01 of 0.03 GB" in line for line in lines)
    fetch(NAME, shown=False)
    said = capsys.readouterr().err
    assert "0.01 GB of it already here" in said and said.count("\n") == 1
    fetch(NAME)
    assert capsys.readouterr() == ("", "")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*")) == sum(map(len, FILES.values()))


def test_load_model(
    hub: FakeHub, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the chosen model is not the one that is loaded, or nobody is told which one it is."""
    monkeypatch.setattr(fetching, "fetch", fetch)  # the true one
    args = argparse.Namespace(model=None, codec="auto", backend="auto")
    load_model(args)
    assert args.model == model.loaded[0][0] == "small"
    said = capsys.readouterr().err  # why none of the published ones depends on this machine
    assert said.startswith("model: small, the built-in one: ") and "kyutai/moshiko-mlx" in said
    load_model(argparse.Namespace(model=NAME, codec="mlx", backend="auto"))
    assert model.loaded[1][0] == NAME and model.loaded[1][1]["codec"] == "mlx"
    assert "weights.safetensors" in hub.fetched()


def test_what_cannot_be_fetched(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a missing repository is a traceback, or is not explained."""
    monkeypatch.chdir(tmp_path)
    assert main(["file", "--demo", "-o", "a.wav", "--model", "no/such"]) == 1
    assert "shows no repository no/such" in capsys.readouterr().err


def test_a_hub_that_never_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a person looks at an empty terminal, twice as long as a hub may take, without knowing why."""
    said: list[str] = []
    monkeypatch.setattr(fetching.Loading, "__call__", lambda self, doing: said.append(doing))
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3)
    hub.repos[NAME].delay = 2.0
    began = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached"):
        load_model(argparse.Namespace(model=NAME, codec="auto"))
    assert time.monotonic() - began < 1.5 and len(hub.requests) == 1
    assert said == [f"asking {hub.url} for {NAME}; it has 15 s to answer"]
