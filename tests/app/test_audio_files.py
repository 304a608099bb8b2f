"""Recordings of every kind, good and bad, and the file an answer grows in."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.recording.outputs import partial_name
from moshi_mlx_app.recording.wav import AnswerFile

from moshi_mlx.errors import AudioError
from tests.fuzz import attack

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000]


def tone(seconds: float, rate: int, channels: int = 1, level: float = 0.3) -> np.ndarray:
    """A rising tone, [samples, channels]; each channel softer than the one before, the mean at ``level``."""
    at = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * (200 + 300 * at) * at)
    gains = np.linspace(1.5, 0.5, channels) if channels > 1 else np.ones(1)
    return (level * wave[:, None] * gains).astype(np.float32)


def heard(path: Path | str, size: int = 1920, **silence: int) -> np.ndarray:
    """Everything that the model would hear."""
    with Recording(path) as recording:
        frames = list(recording.frames(24000, size, **silence))
    assert all(frame.shape == (size,) and frame.dtype == np.float32 for frame in frames)
    return np.concatenate(frames)


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_is_resampled_as_a_whole_file_would_be(rate: int, here: Path) -> None:
    """If this fails, questions at some rate arrive shifted, cut, or with clicks where two blocks meet."""
    pcm = tone(3.3, rate)[:, 0]
    soundfile.write("q.wav", pcm, rate, subtype="FLOAT")
    got = heard("q.wav")
    want = pcm if rate == 24000 else soxr.resample(pcm, rate, 24000, quality="VHQ")
    length = round(len(pcm) * 24000 / rate)
    assert len(got) == -(-length // 1920) * 1920
    assert np.abs(got[: len(want)] - want).max() < 2e-4
    assert not got[length:].any()


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16])
def test_channels_are_averaged(channels: int, here: Path) -> None:
    """If this fails, a side of a stereo recording is not heard, or is heard twice as loud."""
    pcm = tone(0.5, 24000, channels)
    soundfile.write("q.wav", pcm, 24000, subtype="FLOAT")
    assert np.abs(heard("q.wav")[: len(pcm)] - pcm.mean(axis=1)).max() < 1e-6


FORMATS = [
    *((f"q.{end}", None) for end in ("flac", "ogg", "mp3", "aiff", "au", "caf", "w64")),
    *(("q.wav", subtype) for subtype in ("PCM_U8", "PCM_24", "DOUBLE", "ULAW")),
]


@pytest.mark.parametrize(("name", "subtype"), FORMATS)
def test_formats(name: str, subtype: str | None, here: Path) -> None:
    """If this fails, a common kind of file can no longer be asked."""
    pcm = tone(1.0, 44100)
    soundfile.write(name, pcm, 44100, subtype=subtype)
    with Recording(name) as recording:
        assert recording.sample_rate == 44100 and recording.duration == pytest.approx(1.0, abs=0.06)
        assert not recording.warnings
    got = heard(name)[: 24000 - 2000]
    want = soxr.resample(pcm[:, 0], 44100, 24000)[: len(got)]
    assert np.corrcoef(got, want)[0, 1] > 0.97


def test_content_decides_the_format_not_the_name(here: Path) -> None:
    """If this fails, a renamed recording is refused, or a name like q.raw ends in a TypeError from the depths."""
    for name in ("q.raw", "q.txt", "question"):
        soundfile.write(name, tone(0.2, 16000), 16000, format="WAV")
        assert np.abs(heard(name)).max() > 0.2


def test_silence_before_and_after(here: Path) -> None:
    """If this fails, the tail in which the answer ends is missing, or speech-to-text hears its question too early."""
    pcm = tone(0.3, 24000)[:, 0]
    soundfile.write("q.wav", pcm, 24000, subtype="FLOAT")
    got = heard("q.wav", lead=1000, tail=5000)
    assert len(got) == 1920 * 7 and not got[:1000].any() and not got[1000 + len(pcm) :].any()
    assert np.array_equal(got[1000 : 1000 + len(pcm)], pcm)


@pytest.mark.parametrize("rate", [8000, 24000, 48000, 192000])
def test_one_sample_is_a_question(rate: int, here: Path) -> None:
    """If this fails, the shortest recordings end in an empty answer, a division by zero or a hang."""
    soundfile.write("q.wav", np.array([0.5]), rate)
    assert heard("q.wav").shape == (1920,)


def test_silence_is_answered_and_remarked_on(here: Path) -> None:
    """If this fails, a muted microphone goes unnoticed, or silence is refused."""
    soundfile.write("q.wav", np.zeros(8000), 8000)
    assert not heard("q.wav").any()
    with Recording("q.wav") as recording:
        assert "digital silence" in recording.warnings[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_values_that_are_no_numbers_are_named_with_their_time(bad: float, channels: int, here: Path) -> None:
    """If this fails, one bad sample silences the codec's state for the rest of the file, and nobody says so."""
    pcm = tone(20.0, 16000, channels)
    pcm[16000 * 12 + 4000, -1] = bad
    soundfile.write("q.wav", pcm, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"q\.wav .*not finite.* 12\.250 s"):
        Recording("q.wav")


def test_beyond_full_scale_is_played_softer(here: Path) -> None:
    """If this fails, float recordings above full scale are distorted, or clipped without a word."""
    pcm = tone(1.0, 24000, level=1.0)[:, 0] * 32768  # somebody forgot to divide
    soundfile.write("q.wav", pcm, 24000, subtype="FLOAT")
    with Recording("q.wav") as recording:
        assert "full scale" in recording.warnings[0] and "90.3 dB" in recording.warnings[0]
    got = heard("q.wav")[: len(pcm)]
    assert np.abs(got).max() <= 1 and np.abs(got - pcm / np.abs(pcm).max()).max() < 1e-6


@pytest.mark.parametrize("name", ["q.wav", "q.aiff", "q.mp3", "q.flac"])
def test_a_truncated_file_is_used_as_far_as_it_goes(name: str, here: Path) -> None:
    """If this fails, an interrupted download is refused, answered without a warning, or ends in a decoder's error."""
    pcm = tone(8.0, 44100)
    soundfile.write(name, pcm, 44100)
    contents = Path(name).read_bytes()
    Path(name).write_bytes(contents[: len(contents) // 2])
    with Recording(name) as recording:
        assert 1.0 < recording.duration < 5.0
        (warning,) = recording.warnings
    assert f"only the first {recording.duration:.2f} s" in warning
    got = heard(name)
    want = soxr.resample(pcm[:, 0], 44100, 24000)[: recording.length(24000) - 2000]
    assert np.corrcoef(got[: len(want)], want)[0, 1] > 0.97


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
def test_a_wav_that_was_written_into_a_pipe_is_whole(size: int, here: Path) -> None:
    """If this fails, everything that ffmpeg or arecord pipe in is called damaged."""
    soundfile.write("q.wav", tone(1.0, 16000), 16000)
    contents = bytearray(Path("q.wav").read_bytes())
    contents[4:8] = contents[40:44] = size.to_bytes(4, "little")
    Path("q.wav").write_bytes(contents)
    with Recording("q.wav") as recording:
        assert recording.samples == 16000 and not recording.warnings


NOT_SOUND = {
    "empty.wav": b"",
    "text.wav": b"These are words, not sound.\n" * 500,
    "noise.mp3": np.random.default_rng(0).bytes(50_000),
    "short.wav": b"RIFF\x24\x00\x00\x00WAVEfm",
    "zeros.flac": bytes(10_000),
    "page.html": b"<!DOCTYPE html><html><body>404</body></html>",
    "memo.m4a": b"\x00\x00\x00\x1cftypM4A \x00\x00\x00\x00M4A mp42isom" + bytes(5000),
}


@pytest.mark.parametrize("name", NOT_SOUND)
@pytest.mark.parametrize("ffmpeg", [False, True])
def test_what_is_not_sound_is_refused_by_name(
    name: str, ffmpeg: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a wrong file ends in a traceback, or in an answer to noise."""
    if not ffmpeg:
        monkeypatch.setenv("PATH", "/nowhere")
    elif not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not installed")
    Path(name).write_bytes(NOT_SOUND[name])
    with pytest.raises(AudioError, match=f"^{name} is") as caught:
        Recording(name)
    assert "0 bytes" in str(caught.value) or f"ffmpeg -i {name}" in str(caught.value)


def test_the_way_out_without_ffmpeg(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the command that a message offers does something else when it is copied into a shell."""
    monkeypatch.setenv("PATH", "/nowhere")
    for name, quoted in {"my memo.m4a": "'my memo.m4a'", "-f.m4a": "./-f.m4a", "a;b.m4a": "'a;b.m4a'"}.items():
        Path(name).write_bytes(NOT_SOUND["memo.m4a"])
        with pytest.raises(AudioError) as caught:
            Recording(name)
        assert f"with: ffmpeg -i {quoted} question.wav" in str(caught.value) and "install ffmpeg" in str(caught.value)
    stdin = SimpleNamespace(buffer=io.BytesIO(NOT_SOUND["memo.m4a"]), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(AudioError, match="with: ffmpeg -i - -f wav -$"):
        Recording("-")


FFMPEG = """#!{python}
import os, sys
import soundfile
assert sys.argv[sys.argv.index("-i") + 1] == "file:/dev/stdin" and "pipe:1" in sys.argv, sys.argv
content = open("/dev/stdin", "rb").read()
if not content.startswith(b"SECRET"):
    sys.exit("file:/dev/stdin: Invalid data found when processing input")
if b"DAMAGED" in content[:20]:
    print("[aac @ 0x55] Input buffer exhausted\\nand more", file=sys.stderr)
open("q.wav", "wb").write(content[content.index(b"RIFF"):])
pcm, rate = soundfile.read("q.wav")
soundfile.write("q.au", pcm, rate, "PCM_16", format="AU")
sys.stdout.buffer.write(open("q.au", "rb").read())
"""


def test_ffmpeg_decodes_what_libsndfile_does_not_know(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, ffmpeg is there and not used, or its complaints about a damaged file are not passed on."""
    os.mkdir("bin")
    Path("bin/ffmpeg").write_text(FFMPEG.format(python=sys.executable))
    os.chmod("bin/ffmpeg", 0o755)
    monkeypatch.setenv("PATH", str(here / "bin"))
    pcm = tone(1.0, 44100, 2)
    wav = io.BytesIO()
    soundfile.write(wav, pcm, 44100, format="WAV")
    Path("memo.m4a").write_bytes(b"SECRET" + wav.getvalue())
    with Recording("memo.m4a") as recording:
        assert (recording.sample_rate, recording.channels, recording.samples) == (44100, 2, 44100)
        assert recording.warnings == ()
    want = soxr.resample(pcm.mean(axis=1), 44100, 24000, quality="VHQ")
    assert np.abs(heard("memo.m4a")[: len(want)] - want).max() < 1e-3
    stdin = SimpleNamespace(buffer=io.BytesIO(Path("memo.m4a").read_bytes()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert np.array_equal(heard("-"), heard("memo.m4a"))
    Path("memo.m4a").write_bytes(b"SECRET DAMAGED" + wav.getvalue())
    with Recording("memo.m4a") as recording:
        assert recording.warnings == ("memo.m4a: some of it could not be decoded (Input buffer exhausted)",)
    Path("memo.m4a").write_bytes(b"nonsense")
    with pytest.raises(AudioError, match=r"^memo.m4a is not a sound file that ffmpeg can decode \(Invalid data"):
        Recording("memo.m4a")


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", ["memo.m4a", "memo.webm", "memo.aac", "memo.wma"])
def test_formats_of_ffmpeg(name: str, here: Path) -> None:
    """If this fails, a memo from a telephone cannot be asked."""
    pcm = tone(2.0, 44100)
    soundfile.write("tone.wav", pcm, 44100)
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", "tone.wav", name], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this ffmpeg cannot write {name}")
    with Recording(name) as recording:
        assert recording.duration == pytest.approx(2.0, abs=0.1) and recording.warnings == ()
    subprocess.run(["ffmpeg", "-v", "error", "-i", name, "-c:a", "pcm_s16le", "same.wav"], check=True, timeout=60)
    assert np.array_equal(heard(name), heard("same.wav")) and np.abs(heard(name)).max() > 0.2


def test_a_header_without_sound(here: Path) -> None:
    """If this fails, a recording that never started is answered with silence instead of a word."""
    soundfile.write("q.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="not one sample"):
        Recording("q.wav")


@pytest.mark.parametrize("rate", [1, 4000, 7999, 192001, 768000])
def test_rates_outside_the_range_are_named(rate: int, here: Path) -> None:
    """If this fails, a header that claims one sample a second makes the program compute for a day."""
    soundfile.write("q.wav", np.zeros(100), rate)
    with pytest.raises(AudioError, match=rf"{rate} Hz"):
        Recording("q.wav")


def test_hostile_headers() -> None:
    """If this fails, a file that somebody sent can crash the program, or make it reserve gigabytes."""
    outcome = attack("recordings", 1, inputs=200)
    assert not outcome.findings
    assert 20 < outcome.refused < 180  # both ways were taken


def test_folders_devices_and_missing_files(here: Path) -> None:
    """If this fails, a slip on the command line hangs (reading /dev/zero never ends) or shows a traceback."""
    with pytest.raises(AudioError, match="is a folder"):
        Recording(here)
    with pytest.raises(AudioError, match="is a device"):
        Recording("/dev/zero")
    with pytest.raises(FileNotFoundError):
        Recording("nothing.wav")
    os.symlink("itself", "itself")
    with pytest.raises(OSError, match="symbolic links"):
        Recording("itself")


def test_pipes_are_copied_and_standard_input_is_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, `ffmpeg ... | moshi-mlx-local file -` and `file <(ffmpeg ...)` stop working."""
    soundfile.write("q.flac", tone(0.4, 16000), 16000)
    contents = Path("q.flac").read_bytes()
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(contents), daemon=True)
    writer.start()
    piped = heard("pipe")
    writer.join(10)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(contents), isatty=lambda: False))
    assert np.array_equal(piped, heard("q.flac"))
    assert np.array_equal(piped, heard("-"))
    for broken in (b"", b"hello"):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(broken), isatty=lambda: False))
        with pytest.raises(AudioError, match="^standard input is"):
            Recording("-")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(AudioError, match="is a terminal"):
        Recording("-")


def test_the_answer_is_valid_while_it_grows(here: Path) -> None:
    """If this fails, a crash or a full disk costs the whole answer."""
    target = here / "a.wav"
    target.write_bytes(b"an older answer")
    answer = AnswerFile(target, 24000, 4000)
    left, right = np.linspace(-1.5, 1.5, 2000, dtype=np.float32), np.full(2000, 0.25, np.float32)
    for _ in range(2):
        answer.write(left, right)
        with wave.open(str(partial_name(target))) as file:
            assert file.getnframes() == answer.samples and file.getparams()[:3] == (2, 2, 24000)
    assert target.read_bytes() == b"an older answer"
    assert answer.finish() == target and not partial_name(target).exists()
    pcm, _ = soundfile.read(target)
    assert np.abs(pcm[:2000, 0] - np.clip(left, -1, 1)).max() < 1e-4 and np.all(pcm[:, 1] == 0.25)


def test_sixteen_bits_come_back_as_they_were(here: Path) -> None:
    """If this fails, the question's side of the answer is no longer the question, sample for sample."""
    values = np.arange(-32768, 32768, 7, dtype=np.int16)
    soundfile.write("q.wav", values, 24000, subtype="PCM_16")
    answer = AnswerFile(here / "a.wav", 24000, len(values))
    pcm = heard("q.wav")[: len(values)]
    answer.write(pcm, pcm)
    answer.finish()
    got, _ = soundfile.read("a.wav", dtype="int16")
    assert np.array_equal(got[:, 1], values)


def test_an_answer_without_sound_leaves_nothing(here: Path) -> None:
    """If this fails, a download that fails leaves empty files behind."""
    answer = AnswerFile(here / "a.wav", 24000, 10)
    assert answer.keep() is None and not list(here.iterdir())


def test_an_answer_longer_than_a_wav_is_refused_at_once(here: Path) -> None:
    """If this fails, the program fails after twelve hours of work instead of at the start."""
    with pytest.raises(AudioError, match="13.0 hours; a wav file ends at 12.4"):
        AnswerFile(here / "a.wav", 24000, 13 * 3600 * 24000)
    assert not list(here.iterdir())
