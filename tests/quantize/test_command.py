"""The command line: order of options, paths that are checked before any work, and names that nobody should print."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from moshi_mlx_quantize import run as running
from moshi_mlx_quantize.cli import build_parser, main

from moshi_mlx.checkpoint.readers import read_safetensors, write_safetensors

from ..helpers.checkpoints import small_config, write_checkpoint
from .helpers import error_of
from .memory import ROOT

TRAINED = Path(__file__).parent / "data"


@pytest.mark.parametrize("arguments", ["S --recipe q8 D", "--recipe q8 S D", "S D --recipe q8", "--recipe q8 -- S D"])
def test_options_stand_anywhere(arguments: str, tmp_path: Path) -> None:
    """If this fails, an option between SOURCE and DEST is a usage error, as argparse alone has it."""
    places = {"S": str(TRAINED), "D": str(tmp_path / "out")}
    assert main(["--quiet", *(places.get(word, word) for word in arguments.split())]) == 0
    assert (tmp_path / "out" / "model.q8.safetensors").is_file()


def test_help_names_the_built_in_model() -> None:
    """If this fails, somebody without a checkpoint is not told what to try."""
    assert "SOURCE is `small` (the built-in model)" in build_parser().format_help()


def test_a_report_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a slip in --report is found after all the work, or the report goes over somebody's files."""
    monkeypatch.setattr(
        running, "resolve", lambda *_, **__: pytest.fail("there was work before the paths were checked")
    )
    monkeypatch.setattr(running, "read_recording", lambda *_: pytest.fail("there was work before"))
    out = tmp_path / "out"

    def refused(report: Path, *more: str) -> str:
        return error_of(capsys, TRAINED, out, "--recipe", "q4", "--report", report, *more)

    (tmp_path / "q.wav").write_bytes(b"sound")
    assert "q.wav is no folder: --report names the folder" in refused(tmp_path / "q.wav")
    assert "q.wav is no folder" in refused(tmp_path / "q.wav" / "deeper", "--force")
    for folder in (out, out / "cost", tmp_path / "out.partial", tmp_path / "x" / ".." / "out"):
        assert "are in each other's way" in refused(folder, "--force")
    message = error_of(capsys, TRAINED, out / "report.json", "--report", out, "--force")
    assert "are in each other's way" in message
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, text in (("report.json", '{"findings": []}'), ("report.html", "<!doctype html>\n<html>mine</html>")):
        (theirs / name).write_text(text)
        assert f"{name} exists and is no report of this program" in refused(theirs, "--force")
        assert (theirs / name).read_text() == text
        (theirs / name).unlink()
    (theirs / "report.html").symlink_to("/nowhere/precious")
    assert "report.html exists and is no report" in refused(theirs, "--force")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not be written to" in refused(tmp_path / "new")
    assert (tmp_path / "q.wav").read_bytes() == b"sound" and not out.exists()


def test_an_earlier_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a second run costs the first one's figures without being told to, or --force does not help."""
    arguments = [
        str(TRAINED),
        "--compare",
        "q4",
        "--frames",
        "4",
        "--quiet",
        "--report",
        str(tmp_path / "new" / "cost"),
    ]
    assert main(arguments) == 0
    cost = tmp_path / "new" / "cost"
    first = (cost / "report.json").read_bytes()
    arguments[2] = "q8"
    assert "report.json exists: choose another folder for --report" in error_of(capsys, *arguments)
    assert (cost / "report.json").read_bytes() == first
    assert main([*arguments, "--force"]) == 0
    assert json.loads((cost / "report.json").read_text())["recipes"][0]["name"] == "q8"
    assert sorted(path.name for path in cost.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "text", "empty"])
def test_a_recording_that_cannot_be_read(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a slip in --calibration is found after the download, or reading it never ends."""
    monkeypatch.setattr(running, "resolve", lambda *_, **__: pytest.fail("there was work before"))
    path = tmp_path / "speech.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("no sound")
    elif kind == "empty":
        import soundfile

        soundfile.write(path, [], 16000)
    message = error_of(capsys, TRAINED, "--compare", "q4", "--calibration", "/dev/zero" if kind == "device" else path)
    assert ("/dev/zero" if kind == "device" else "speech.wav") in message


def test_a_report_that_fails_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a full disk at the very end hides that the checkpoint is complete, or leaves half a report."""
    real = Path.write_text

    def full(self: Path, *arguments: object, **options: object) -> int:
        if ".report.html" in self.name:
            real(self, "half")
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    out, cost = tmp_path / "out", tmp_path / "cost"
    message = error_of(capsys, TRAINED, out, "--report", cost, "--frames", "4")
    assert f"{out} is complete, but the disk is full: {cost / 'report.html'}" in message
    assert (out / "config.json").is_file() and [path.name for path in cost.iterdir()] == ["report.json"]


def test_stopped_after_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, Ctrl-C during an upload says that nothing was written."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "upload", stop)
    assert main([str(TRAINED), str(tmp_path / "out"), "--upload-repo", "a/b", "--quiet"]) == 130
    assert capsys.readouterr().err == f"stopped: {tmp_path / 'out'} is complete\n"
    monkeypatch.setattr(running, "resolve", stop)
    assert main([str(TRAINED), str(tmp_path / "no"), "--quiet"]) == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "no").exists()


EVIL = "m[/red]x\x1b]0;evil\x07\x1b[31m\u202egnp"
OBEYED = re.compile(r"\]0;evil\x07|\x1b\[31m|\u202e")


def on_a_terminal(*arguments: object) -> tuple[int, str]:
    """Run the command on a terminal of its own: exit status, and what appeared there."""
    own, other = pty.openpty()
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize"))
    environment = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm-256color", "COLUMNS": "300"}
    command = [sys.executable, "-m", "moshi_mlx_quantize", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=other, stderr=other, stdin=other, env=environment, cwd=ROOT)
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(own, 65536)
        except OSError:  # Linux says so at the end
            break
        if not piece:
            break
        shown += piece
    os.close(own)
    return process.wait(timeout=60), shown.decode()


def test_names_are_not_obeyed(tmp_path: Path) -> None:
    """If this fails, a folder's name ends the command with a markup error, or what it holds reaches the terminal."""
    source = write_checkpoint(tmp_path / EVIL, small_config(num_layers=1))
    out, cost = tmp_path / f"out-{EVIL}", tmp_path / f"cost-{EVIL}"
    status, shown = on_a_terminal(source, out, "--recipe", "q4", "--report", cost, "--frames", "4")
    assert status == 0 and "m[/red]x" in shown and not OBEYED.search(shown), shown
    for text in (out / "README.md", cost / "report.json", cost / "report.html"):
        assert not OBEYED.search(text.read_text("utf-8")), text
    for arguments in ([source, out, EVIL], [source, EVIL + "/out", "--lora", EVIL], [source, out, "--recipe", EVIL]):
        status, shown = on_a_terminal(*arguments, "--debug")
        assert status in (1, 2) and "error: " in shown and not OBEYED.search(shown), shown


def test_tensor_names_are_not_obeyed(tmp_path: Path) -> None:
    """If this fails, a name in a file of weights reaches the terminal as it is."""
    source = write_checkpoint(tmp_path / "m", small_config(num_layers=1))
    tensors = read_safetensors(source / "model.safetensors")[0]
    write_safetensors(source / "model.safetensors", {**tensors, EVIL: tensors["text_emb.weight"]})
    status, shown = on_a_terminal(source, tmp_path / "out")
    assert status == 1 and "m[/red]x" in shown and not OBEYED.search(shown), shown


@pytest.mark.skipif(sys.platform == "darwin", reason="names on a Mac are valid Unicode")
def test_names_that_are_no_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a path that is not valid UTF-8, which MLX cannot open, is found out at the end of the work."""
    (tmp_path / "m\udcff").mkdir()
    assert "is not valid UTF-8" in error_of(capsys, TRAINED, tmp_path / "m\udcff" / "out")
    write_checkpoint(tmp_path / "m", small_config(num_layers=1))
    os.rename(tmp_path / "m", tmp_path / "m\udcff" / "m")
    assert "cannot be read" in error_of(capsys, tmp_path / "m\udcff" / "m", tmp_path / "out")
    report = ["--compare", "q4", "--frames", "4", "--report", str(tmp_path / "m\udcff" / "r"), "--quiet"]
    assert main([str(TRAINED), *report]) == 0


def test_results_go_to_standard_output(tmp_path: Path) -> None:
    """If this fails, figures that are sent to a file appear on the terminal instead, where the bar is drawn."""
    own, other = pty.openpty()
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize"))
    environment = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm"}
    command = [sys.executable, "-m", "moshi_mlx_quantize", str(TRAINED), str(tmp_path / "out"), "--recipe", "q4"]
    command += ["--compare", "q8", "--frames", "4"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=other, env=environment, cwd=ROOT, timeout=120)
    os.close(other)
    os.close(own)
    assert done.returncode == 0
    assert b"measured on" in done.stdout and b"KL frame" in done.stdout and b"text embedding" in done.stdout


def test_files_of_one_name(tmp_path: Path) -> None:
    """If this fails, a codec or tokenizer is copied over the weights, config.json, or another file of the result."""
    import moshi_mlx

    source = write_checkpoint(tmp_path / "m", small_config(num_layers=1), mimi=True)
    config = json.loads((source / "config.json").read_text())
    for key, part in (("mimi_name", "model.q4.safetensors"), ("tokenizer_name", "a/model.q4.safetensors")):
        (source / part).parent.mkdir(exist_ok=True)
        os.rename(source / config[key], source / part)
        config[key] = part
    (source / "config.json").write_text(json.dumps(config))
    before = (source / "model.q4.safetensors").read_bytes(), (source / "a" / "model.q4.safetensors").read_bytes()
    assert main([str(source), str(tmp_path / "out"), "--recipe", "q4", "--quiet"]) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    names = [made[key] for key in ("moshi_name", "mimi_name", "tokenizer_name")]
    assert names[0] == "model.q4.safetensors" and len(set(names)) == 3
    assert tuple((tmp_path / "out" / name).read_bytes() for name in names[1:]) == before
    assert moshi_mlx.load(tmp_path / "out").lm.text_linear.bits == 4
    assert main([str(source), str(tmp_path / "out"), "--recipe", "q4", "--quiet", "--force"]) == 0


def test_a_gguf_is_measured_and_written(tmp_path: Path) -> None:
    """If this fails, what is unpacked to be measured is in the way when it is written."""
    write_checkpoint(tmp_path / "m", layout="gguf")
    arguments = ["--recipe", "q4", "--report", str(tmp_path / "r"), "--frames", "4", "--quiet"]
    assert main([str(tmp_path / "m"), str(tmp_path / "out"), *arguments]) == 0
    assert "unpacked.safetensors" not in [path.name for path in (tmp_path / "out").iterdir()]
