"""The program with the built-in model, without fakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main

import moshi_mlx


def test_the_built_in_model_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, program and library do not fit together, or a seed does not repeat its answer."""
    pcm = np.random.default_rng(0).normal(0, 0.05, 11025).astype(np.float32)
    question, first, second = (str(tmp_path / name) for name in ("q.wav", "a.wav", "b.wav"))
    soundfile.write(question, pcm, 22050, subtype="FLOAT")
    for output in (first, second):
        assert main(["file", question, "-o", output, "--tail", "0.3", "--seed", "5", "--json"]) == 0
    said = capsys.readouterr()
    a, b = soundfile.read(first)[0], soundfile.read(second)[0]
    assert a.shape == (19200, 2) and np.isfinite(a).all() and np.array_equal(a, b)
    about = json.loads(Path(first).with_suffix(".json").read_text(encoding="utf-8"))
    assert about["model"] == "small" and about["duration"] == 0.8 and about["real_time_factor"] > 0

    model = moshi_mlx.load("small")
    assert about["trained"] is model.trained and ("notice:" in said.err) is not model.trained
    reply = model.reply(pcm, 22050, seed=5, tail=0.3)
    assert reply.text == about["text"]
    assert [word.text for word in reply.words] == [word["text"] for word in about["words"]]
    assert np.abs(np.clip(reply.pcm[:19200], -1, 1) - a[:, 0]).max() < 1e-4
    assert np.abs(reply.user_pcm[:19200] - a[:, 1]).max() < 1e-4
