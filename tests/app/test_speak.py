"""``moshi-mlx-local speak``: texts and pipes in, a wav file with its words out."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands import speak as command
from moshi_mlx_app.models import fetch

from moshi_mlx.tasks.speak import TextToSpeech
from tests.helpers.tiny import tiny_model
from tests.helpers.tts import tiny_speaker

TEXT = "the man will have one of the more"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TextToSpeech:
    """A random model that the command loads."""
    made = tiny_speaker()
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True, accept=None: made)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Standard input from a pipe: its other end."""
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(reading))
    return os.fdopen(writing, "wb", buffering=0)


def sound(name: str) -> np.ndarray:
    pcm, _ = soundfile.read(name, dtype="float32")
    return pcm


def test_a_file(model: TextToSpeech, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the file has not the speech, or its words have other times."""
    assert main(["speak", TEXT, "-o", "out.wav", "--words", "out.json", "--seed", "4"]) == 0
    speech = model.speak(TEXT, seed=4)
    np.testing.assert_allclose(sound("out.wav"), speech.pcm, atol=1 / 32768)
    found = json.loads(Path("out.json").read_text())
    assert found["complete"] and found["file"] == "out.wav"
    assert found["words"] == [
        {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in speech.words
    ]
    assert "out.wav" in capsys.readouterr().err
    assert main(["speak", TEXT, "-o", "out.wav"]) == 1  # it exists


def test_a_text_that_comes_slowly(model: TextToSpeech, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, speech begins only when the text has ended, or markdown is read aloud."""
    begun = threading.Event()
    take = command._Speech.take

    def seen(self: Any, pcm: Any, words: Any) -> None:
        if pcm is not None:
            begun.set()
        take(self, pcm, words)

    monkeypatch.setattr(command._Speech, "take", seen)
    early: list[bool] = []

    def write() -> None:
        for piece in ("**the m", "an** wi", "ll have ", "_one_ of the more so I was about to do it there is "):
            pipe.write(piece.encode())
            time.sleep(0.02)
        early.append(begun.wait(150))
        pipe.write(b"the `more`")
        pipe.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert main(["speak", "-o", "out.wav", "--quiet"]) == 0
    writer.join()
    assert early == [True]
    whole = "the man will have one of the more so I was about to do it there is the more"
    np.testing.assert_allclose(sound("out.wav"), model.speak(whole).pcm, atol=1 / 32768)


def test_ctrl_c_keeps_what_was_spoken(
    model: TextToSpeech, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, an hour of speech is lost because somebody stopped in the last minute."""
    take = command._Speech.take

    def stops(self: Any, pcm: Any, words: Any) -> None:
        take(self, pcm, words)
        if self._samples >= 5 * model.frame_size:
            raise KeyboardInterrupt

    monkeypatch.setattr(command._Speech, "take", stops)
    assert main(["speak", TEXT, "-o", "out.wav", "--words", "out.json"]) == 130
    kept = sound("out.partial.wav")
    assert len(kept) == 5 * model.frame_size and not Path("out.wav").exists()
    np.testing.assert_allclose(kept, model.speak(TEXT).pcm[: len(kept)], atol=1 / 32768)
    assert not json.loads(Path("out.partial.json").read_text())["complete"]
    assert "out.partial.wav" in capsys.readouterr().err


def test_bad_text(model: TextToSpeech, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, bad input ends in a traceback or in silence, or takes what was spoken with it."""
    for text, said in (("", "nothing to say"), ("\U0001f600", "nothing to say"), ("a" * 100_000, "word of")):
        assert main(["speak", text, "-o", "out.wav"]) == 1
        told = capsys.readouterr().err.strip()
        assert said in told and len(told.splitlines()) == 1
        assert not list(Path().glob("out*"))
    pipe.write(b'one of the\n<break time="3600s"/> more\n')
    pipe.close()
    assert main(["speak", "-", "-o", "out.wav", "--quiet"]) == 1
    told = capsys.readouterr().err
    assert "break of 3,600 s" in told and "out.partial.wav" in told
    kept = sound("out.partial.wav")
    np.testing.assert_allclose(kept, model.speak("one of the").pcm, atol=1 / 32768)


def test_a_script(model: TextToSpeech, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a script's turns are not those of two speakers, or a broken one ends in a traceback."""
    Path("talk.jsonl").write_text('{"turns": ["one of", "the more"], "id": "x"}\n')
    assert main(["speak", "--script", "talk.jsonl", "-o", "out.wav", "--quiet"]) == 0
    np.testing.assert_allclose(sound("out.wav"), model.speak(["one of", "the more"]).pcm, atol=1 / 32768)
    Path("broken.jsonl").write_text('{"turn": 1}\n')
    assert main(["speak", "--script", "broken.jsonl", "-o", "b.wav"]) == 1
    assert "broken.jsonl, line 1" in capsys.readouterr().err


def test_another_model(
    model: TextToSpeech, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a model that converses is asked to speak a text, or an unknown voice is another one."""
    assert main(["speak", "one", "-o", "out.wav", "--voice", "nobody.wav"]) == 1
    assert "nobody.wav" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True, accept=None: accept("m", tiny_model()))
    assert main(["speak", "one", "-o", "out.wav"]) == 1
    assert "moshi-mlx-local talk" in capsys.readouterr().err


def test_the_loudspeaker_runs_dry() -> None:
    """If this fails, there is a click where a word comes late, or the last frames are never heard."""
    made = object.__new__(command._Loudspeaker)
    from moshi_mlx.realtime.ring import Ring

    made._ring, made._begin, made._playing, made._ended, made._edge = Ring(1000), 300, False, False, 50
    out = np.ones(100, np.float32)
    made._ring.write(np.ones(250, np.float32))
    made._fill(out)
    assert not out.any()
    made._ring.write(np.ones(100, np.float32))
    heard = []
    for _ in range(4):
        made._fill(out)
        heard.append(out.copy())
    played = np.concatenate(heard)
    assert played[:300].all() and played[349] == 0 and np.abs(np.diff(played)).max() < 0.03
    made._ring.write(np.ones(10, np.float32))
    made._fill(out)
    assert not out.any()
    made._ended = True
    made._fill(out)
    assert out[0] == 1 and made._ring.available == 0
