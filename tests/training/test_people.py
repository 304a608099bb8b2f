"""The codec judged by recordings of people: what is read, aligned and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from moshi_mlx_training.codec import people
from moshi_mlx_training.speech.synthesis import PHONE_INDEX, SpeechUnavailable, Utterance, say

from moshi_mlx.checkpoint.resolve import BUILTIN


def test_recordings_are_found_with_their_words(tmp_path: Path) -> None:
    """If this fails, people are judged by words that they did not say."""
    sphinx, alsa = tmp_path / "sphinx", tmp_path / "alsa"
    (sphinx / "cards").mkdir(parents=True)
    alsa.mkdir()
    (sphinx / "cards" / "cards.transcription").write_text("<s> ten of clubs  </s> (001)\n<s> not here </s> (002)\n")
    time = np.arange(16000) / 16000
    tone = (0.5 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    soundfile.write(sphinx / "cards" / "001.wav", tone, 16000)
    soundfile.write(alsa / "Front_Left.wav", np.stack([tone, tone], 1), 48000)
    (0.25 * 32767 * tone).astype("<i2").tofile(sphinx / "goforward.raw")
    found = people.recordings(sphinx, alsa)
    assert [(one.path.name, one.text) for one in found] == [
        ("goforward.raw", "go forward ten meters"), ("001.wav", "ten of clubs"), ("Front_Left.wav", "front left"),
    ]  # fmt: skip
    for one, seconds in zip(found, (1, 1, 1 / 3)):
        pcm = one.read()
        assert pcm.dtype == np.float32 and len(pcm) == pytest.approx(24000 * seconds, abs=2)
        assert 10 * np.log10(np.mean(pcm**2)) == pytest.approx(-23, abs=0.2)
    assert people.recordings(tmp_path, tmp_path) == []


def test_a_code_stands_for_the_phone_it_comes_with() -> None:
    """If this fails, the accuracy of phones is of other phones."""
    aa, s, ah, ax = (PHONE_INDEX[name] for name in ("aa", "s", "ah", "ax"))
    codes = np.array([3, 3, 3, 5, 5], np.uint16)
    labels = np.array([[aa, s], [aa, s], [s, s], [0, ax], [0, ax]], np.uint8)
    phones = people.counted(codes, labels, 8)
    assert phones[3].tolist() == [aa, s] and phones[5].tolist() == [0, ah]  # the recogniser has one phone for both
    right, spoken = people.agreement(codes, labels, phones)
    assert right.tolist() == [[True, True], [True, True], [False, True], [True, True], [True, True]]
    assert spoken.tolist() == [[True, True]] * 3 + [[False, True]] * 2


def test_sound_and_labels_begin_together() -> None:
    """If this fails, every phone is compared with the one before it."""
    utterance = Utterance(np.full(2400, 0.1, np.float32), (("aa", 0.1),), ())
    pcm, labels = people.padded(utterance)
    assert len(pcm) == len(labels) * people.FRAME and not pcm[: people.LEAD * people.FRAME].any()
    assert not labels[: people.LEAD].any() and (labels[people.LEAD] == PHONE_INDEX["aa"]).all()
    assert not labels[people.LEAD + 2 :].any()


def test_the_recogniser_says_when_phones_are_spoken() -> None:
    """If this fails, what people say is compared with phones at other times."""
    pytest.importorskip("pocketsphinx", reason="needs pocketsphinx, which has no wheel for Python 3.14")
    try:
        spoken = say("My name is on the table, and I can listen to water.")
    except SpeechUnavailable as reason:
        pytest.skip(str(reason))
    heard = people.aligned(spoken.pcm, "My name is on the table, and I can listen to water.")
    count = len(spoken.pcm) // 960
    one, other = (people._SAME[utterance.labels(count)] for utterance in (spoken, heard))
    assert (one == other)[one > 0].mean() > 0.75
    with pytest.raises(ValueError, match="qqzzx"):
        people.aligned(spoken.pcm, "qqzzx")


def test_figures_are_those_of_the_codec() -> None:
    """If this fails, the figures are not those of the codec that is named."""

    class Perfect:
        def encode(self, pcm: np.ndarray) -> np.ndarray:
            self.pcm = pcm
            return np.repeat(np.abs(pcm.reshape(-1, people.FRAME)).max(1).astype(bool)[None], 8, axis=0).astype(int)

        def decode(self, codes: np.ndarray) -> np.ndarray:
            return self.pcm

    utterance = Utterance(np.full(8 * 1920, 0.1, np.float32), (("aa", 0.64),), ())
    phones = np.array([[0, 0], [PHONE_INDEX["aa"]] * 2])
    figures = people.measure(Perfect(), [utterance] * 2, phones)
    assert figures["phones"] == figures["phones_in_speech"] == 1 and figures["count"] == 2
    assert figures["seconds_of_speech"] == pytest.approx(1.28)
    assert people.measure(Perfect(), [utterance], phones[::-1])["phones_in_speech"] == 0


def test_the_command_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a machine without the recordings gets an average of nothing."""
    with pytest.raises(SystemExit):
        people.main([str(BUILTIN / "small"), "--sphinx", str(tmp_path), "--alsa", str(tmp_path)])
    assert "apt install pocketsphinx-testdata" in capsys.readouterr().err


def test_the_command_measures_the_built_in_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, no command says what the codec keeps of people."""
    rng = np.random.default_rng(0)
    hiss = (0.1 * rng.standard_normal(24000)).astype(np.float32)
    soundfile.write(tmp_path / "Front_Left.wav", hiss, 24000)
    spoken = Utterance(hiss, (("f", 0.5), ("aa", 1.0)), ())
    monkeypatch.setattr(people, "synthetic", lambda count, voices, seed: [spoken] * min(count, 2))
    monkeypatch.setattr(people, "aligned", lambda pcm, text: spoken)
    people.main([str(BUILTIN / "small"), "--sphinx", str(tmp_path), "--alsa", str(tmp_path)])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert set(told) == {"people", "known", "unheard"} and told["people"]["count"] == 1
    assert 0 < told["known"]["phones_in_speech"] <= 1
