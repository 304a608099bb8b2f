"""What quantizing costs: measured, shown, and used to choose; and a result that is published with it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_quantize.cli import main
from moshi_mlx_quantize.measure import evaluate
from moshi_mlx_quantize.measure.compare import lesson
from moshi_mlx_quantize.measure.evaluate import (
    Subject,
    calibrate,
    codes_of,
    compare,
    cost_of,
    make_subject,
    read_recording,
    same_text,
)
from moshi_mlx_quantize.plan.recipes import RECIPES, make_plan
from moshi_mlx_quantize.plan.sensitivity import Sensitivity, allocate, measured_plan
from moshi_mlx_quantize.source import Source, open_source

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.checkpoint.quantization import Quantization
from moshi_mlx.checkpoint.resolve import resolve
from moshi_mlx.errors import ConfigError

from ..helpers.checkpoints import conditioned_config, helium_config, small_config, write_checkpoint
from .memory import ROOT

TRAINED = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(resolve(TRAINED), tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def subject(source: Source) -> Subject:
    return make_subject(source)


def test_the_model_has_learnt(subject: Subject) -> None:
    """Broken: the model that costs are measured on is as good as random, so that they mean nothing."""
    from .trained import sequences

    tokens = mx.array(sequences(np.random.default_rng(5), 4, 40))
    out = subject.lm(tokens)
    ours = mx.argmax(out.text_logits, axis=-1) == tokens[:, :1]
    audio = mx.argmax(out.logits, axis=-1) == tokens[:, 1:3]
    assert float(ours.mean()) > 0.7 and float(audio[:, 1].mean()) > 0.7  # guessing: 0.01 and 0.016


def test_cost_of_nothing_is_nothing(subject: Subject) -> None:
    """Broken: the measure is not zero where nothing changes, or the model is not put back after measuring."""
    calibration = calibrate(subject, 30)
    reference = subject.outputs(calibration)
    subject.apply({"text_linear": Quantization(2, 64)})
    worse = compare(reference, subject.outputs(calibration))
    assert worse.text_kl > 0.01 and worse.audio_kl == 0.0 and worse.audio_top1 == 1.0
    subject.apply({})
    same = compare(reference, subject.outputs(calibration))
    assert (same.frame_kl, same.text_top1, same.audio_top1) == (0.0, 1.0, 1.0)


def test_divergence_against_its_definition(subject: Subject) -> None:
    """Broken: the divergence is another number than the sum of p log(p / q)."""
    from moshi_mlx_quantize.measure.evaluate import Outputs

    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(7), 5) for _ in range(2))
    text = [Outputs(mx.array(np.log(x), mx.float32), mx.array(np.log(x), mx.float32), 3) for x in (p, q)]
    cost = compare(*text)
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    assert cost.text_kl == pytest.approx(expected, rel=1e-4)
    assert cost.frame_kl == pytest.approx(4 * expected, rel=1e-4)
    assert cost.text_top1 == (p.argmax(1) == q.argmax(1)).mean()


def test_what_is_measured_is_what_is_written(source: Source, subject: Subject, tmp_path: Path) -> None:
    """Broken: the report describes another model than the one that the file holds."""
    calibration = calibrate(subject, 30)
    reference = subject.outputs(calibration)
    for name in ("q4", "mxfp4"):
        predicted = cost_of(subject, make_plan(source.modules, RECIPES[name]), calibration, reference)
        assert main([str(TRAINED), str(tmp_path / name), "--quiet", "--recipe", name]) == 0
        files = resolve(tmp_path / name)
        lm = load_lm(load_config(files.config, files.weights), files.weights)
        actual = compare(reference, Subject(lm, mx.bfloat16).outputs(calibration))
        assert actual.frame_kl == pytest.approx(predicted.frame_kl, rel=1e-2)


def test_mixed_beats_uniform_and_measured_beats_mixed(source: Source, subject: Subject) -> None:
    """Broken: mixing bits does not pay, or measuring where to spend them does not.

    Chosen on one conversation, compared on another.
    """
    calibration, held_out = calibrate(subject, 60, seed=0), calibrate(subject, 120, seed=1)
    reference, exam = subject.outputs(calibration), subject.outputs(held_out)

    def kl(plan: Any) -> float:
        return cost_of(subject, plan, held_out, exam).frame_kl

    plans = {name: make_plan(source.modules, recipe) for name, recipe in RECIPES.items()}
    sizes = {name: plan.bytes(source.modules) for name, plan in plans.items()}
    assert sizes["protect-5"] <= sizes["q4"] and kl(plans["protect-5"]) < kl(plans["q4"])
    measured, _ = measured_plan(subject, source.modules, calibration, reference, sizes["mixed_4_6"])
    assert measured.bytes(source.modules) <= sizes["mixed_4_6"] < sizes["protect-5"]
    for name in ("mixed_4_6", "protect-5", "ends-8"):  # the last two are larger, and lose all the same
        assert kl(measured) < 0.9 * kl(plans[name]), name


def test_distilled_scales(subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: training scales and biases does not pay, changes the format, or something else is written."""
    arguments = ["--recipe", "q4", "--rule", "feed-forward=3:32", "--rule", "audio heads=mxfp4", "--distill", "25"]
    report, out = tmp_path / "r", tmp_path / "out"
    assert main([str(TRAINED), str(out), *arguments, "--frames", "30", "--report", str(report), "--quiet"]) == 0
    tuned, plain = json.loads((report / "report.json").read_text())["recipes"]
    assert tuned["name"] == "q4 with rules, distilled" and tuned["bytes"] == plain["bytes"]
    assert tuned["cost"]["frame_kl"] < 0.7 * plain["cost"]["frame_kl"]  # on a conversation that it did not learn from
    files = resolve(out)
    lm = load_lm(load_config(files.config, files.weights), files.weights)
    calibration = calibrate(subject, 30)
    actual = compare(subject.outputs(calibration), Subject(lm, mx.bfloat16).outputs(calibration))
    assert actual.frame_kl == pytest.approx(tuned["cost"]["frame_kl"], rel=1e-2)
    assert "distilled" in (out / "README.md").read_text()
    assert main([str(TRAINED), str(tmp_path / "no"), "--q-mode", "mxfp4", "--distill", "5", "--frames", "8"]) == 1
    assert "no affine modules" in capsys.readouterr().err


def test_allocation() -> None:
    """Broken: bytes are not spent where they save most, or more of them than there are."""
    q = {bits: Quantization(bits, 64) for bits in (2, 4, 8)}
    choices = {
        "a": [(q[2], 10, 8.0), (q[4], 20, 1.0), (q[8], 40, 0.5)],
        "b": [(q[2], 10, 2.0), (q[4], 20, 1.9), (q[8], 40, 0.0)],  # 4 bits are not worth having
        "c": [(q[2], 10, 1.0), (q[4], 20, 1.5), (q[8], 40, 1.2)],  # noise: more bits, no gain
    }
    found = Sensitivity({}, choices)
    assert allocate(found, 30) == {"a": q[2], "b": q[2], "c": q[2]}
    assert allocate(found, 40) == {"a": q[4], "b": q[2], "c": q[2]}
    assert allocate(found, 70) == {"a": q[4], "b": q[8], "c": q[2]}
    assert allocate(found, 1000) == {"a": q[8], "b": q[8], "c": q[2]}
    with pytest.raises(ConfigError, match="are too few"):
        allocate(found, 29)


def test_report_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: the report is not written, not valid, or says something else in its table than in its JSON."""
    out = tmp_path / "report"
    assert main([str(TRAINED), "--compare", "q4,q8,4:64", "--report", str(out), "--frames", "20"]) == 0
    printed = capsys.readouterr().out
    data = json.loads((out / "report.json").read_text())
    assert [recipe["name"] for recipe in data["recipes"]] == ["q4", "q8", "4:64"]
    q4, q8, _ = data["recipes"]
    assert 0 < q8["cost"]["frame_kl"] < q4["cost"]["frame_kl"] and q8["bytes"] > q4["bytes"]
    assert f"{q4['cost']['frame_kl']:.4f}" in printed and "5.00" in printed
    assert 0.05 < q4["modules"]["text_linear"]["error"] < 0.15
    page = (out / "report.html").read_text()
    picture = page[page.index("<svg") : page.rindex("</svg>") + len("</svg>")]
    assert len(ElementTree.fromstring(picture).findall(".//text")) > 6
    assert page.count("<circle") == 3 and "http" not in page


def test_measured_recipe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: a target is missed, or what was chosen does not reach the file and its card."""
    out = tmp_path / "out"
    arguments = ["--target-size", "0.138", "--frames", "12", "--report", str(tmp_path / "r")]
    assert main([str(TRAINED), str(out), *arguments]) == 0
    assert "measured" in capsys.readouterr().out
    entry = json.loads((tmp_path / "r" / "report.json").read_text())["recipes"][0]
    assert 4.3 < entry["bits_per_weight"] <= 4.65
    assert 132_000 < (out / "model.safetensors").stat().st_size < 155_000  # with a header of 14 kB
    card = (out / "README.md").read_text()
    assert "Recipe `measured`" in card and f"{entry['cost']['frame_kl']:.4f}" in card
    assert len({str(v["choice"]) for v in entry["modules"].values()}) > 1
    assert main([str(TRAINED), str(tmp_path / "no"), "--target-bpw", "2.4", "--frames", "12"]) == 1
    assert "are too few" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["conditions", "helium", "stt", "gguf"])
def test_other_models_can_be_measured(kind: str, tmp_path: Path) -> None:
    """Broken: only dialogue models can be measured."""
    if kind == "helium":
        write_checkpoint(tmp_path / "m", helium_config(), "helium")
    elif kind == "gguf":
        write_checkpoint(tmp_path / "m", layout="gguf")
    elif kind == "stt":
        config = small_config(dep_q=0, delays=[0] * 7, model_type="stt", stt_config={"audio_delay_seconds": 0.5})
        write_checkpoint(tmp_path / "m", config, "torch")
    else:
        write_checkpoint(tmp_path / "m", conditioned_config(), "torch")
    arguments = [str(tmp_path / "m"), "--compare", "q8", "--report", str(tmp_path / "r"), "--frames", "8", "--quiet"]
    assert main(arguments) == 0
    cost = json.loads((tmp_path / "r" / "report.json").read_text())["recipes"][0]["cost"]
    assert 0 < cost["text_kl"] < 0.1


def test_speech_is_measured_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a report without --calibration describes silence, where nothing can be lost."""
    out, report = tmp_path / "out", tmp_path / "r"
    assert main(["small", str(out), "--recipe", "q4", "--compare", "mixed_2_6", "--report", str(report)]) == 0
    data = json.loads((report / "report.json").read_text())
    q4, mixed = data["recipes"]
    assert data["calibration"] == "the recorded questions, answered by the model, 125 frames (10.0 s)"
    assert "My name is Moshi." in data["says"]
    assert 0.005 < q4["cost"]["frame_kl"] < 0.1 < 0.5 < mixed["cost"]["frame_kl"]
    assert q4["same_text"] > 0.9 > mixed["same_text"]
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    for text in (printed, card):
        assert "the recorded questions, answered by the model, 125 frames (10.0 s)" in text
        assert f"{q4['cost']['frame_kl']:.4f}" in text
    assert "The source is quantized itself" in card  # it has 8 bits


def test_sizes_are_those_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the result is compared with a size that nobody has, such as the source's if it were dense."""
    before = (ROOT / "moshi_mlx" / "builtin" / "small" / "model.safetensors").stat().st_size
    sharded = write_checkpoint(tmp_path / "sharded", layout="sharded")
    shards = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    for source, size, recipe in (("small", before, "q4"), ("small", before, "q8"), (sharded, shards, "q4")):
        out = tmp_path / f"{Path(source).name}-{recipe}"
        assert main([str(source), str(out), "--recipe", recipe]) == 0
        after = (out / f"model.{recipe}.safetensors").stat().st_size
        assert f"{after / 1e6:.2f} MB instead of {size / 1e6:.2f} MB" in capsys.readouterr().out
        assert f"{after / 1e6:.2f} MB of weights instead of {size / 1e6:.2f} MB" in (out / "README.md").read_text()
    assert main([str(TRAINED), "--compare", "q8", "--report", str(tmp_path / "r"), "--frames", "4", "--quiet"]) == 0
    data = json.loads((tmp_path / "r" / "report.json").read_text())
    assert data["source_bytes"] == (TRAINED / "model.safetensors").stat().st_size


def test_the_same_text() -> None:
    """If this fails, an answer one frame later counts as another one, or silence as a right answer."""
    answer = np.array([3, 3, 0, 50, 51, 3, 3, 60, 3, 3, 3, 70, 71, 3] + [3] * 30)
    assert same_text(answer, answer) == 1.0
    for shift in (1, 12, -2):
        assert same_text(answer, np.roll(answer, shift)) == 1.0
    assert same_text(answer, np.roll(answer, 13)) == 0.0  # more than a second later
    silence = np.full_like(answer, 3)
    assert same_text(silence, silence) is None
    assert same_text(answer, silence) == same_text(silence, answer) == 0.0
    half = np.where(answer >= 60, 3, answer)
    assert same_text(answer, half) == same_text(half, answer) == pytest.approx(2 * 2 / (5 + 2))
    swapped = np.array([60, 50, 51, 70, 71])
    assert same_text(np.array([50, 51, 60, 70, 71]), swapped) == pytest.approx(4 / 5)


def test_silence_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, figures of silence are shown as if they were those of speech, and saying nothing as right."""
    import soundfile

    soundfile.write(tmp_path / "room.wav", np.zeros(24000, np.float32), 24000)
    arguments = ["--compare", "q4", "--calibration", str(tmp_path / "room.wav"), "--report", str(tmp_path / "r")]
    assert main(["small", *arguments, "--frames", "20"]) == 0
    data = json.loads((tmp_path / "r" / "report.json").read_text())
    assert "on which it says nothing: what speech would cost was not measured" in data["calibration"]
    assert data["says"] == data["recipes"][0]["says"] == "" and data["recipes"][0]["same_text"] is None
    assert "nothing said" in capsys.readouterr().out


def test_models_that_hear_no_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, it is not said that a model was measured on its own samples, or why."""
    helium = write_checkpoint(tmp_path / "helium", helium_config(), "helium")
    broken = write_checkpoint(tmp_path / "broken", small_config(n_q=6, dep_q=3), mimi=True)
    codec = next(broken.glob("tokenizer-*.safetensors"))
    codec.write_bytes(codec.read_bytes()[:-10])
    reasons = {helium: "the model hears nothing", TRAINED: "there is no codec", broken: "incomplete or damaged"}
    for index, (model, reason) in enumerate(reasons.items()):
        report = tmp_path / str(index)
        assert main([str(model), "--compare", "q8", "--report", str(report), "--frames", "6", "--quiet"]) == 0
        calibration = json.loads((report / "report.json").read_text())["calibration"]
        assert calibration.startswith("the model's own samples (") and reason in calibration
        wav = str(ROOT / "moshi_mlx" / "assets" / "questions.wav")
        assert main([str(model), "--compare", "q8", "--calibration", wav]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert reason in error and error.endswith("leave out --calibration")


def test_a_codec_of_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a recording is played too fast or too slowly to a codec that does not run at 24 kHz."""
    heard = []

    class Codec:
        sample_rate = 16000

        def encode(self, pcm: np.ndarray) -> np.ndarray:
            heard.append(len(pcm))
            return np.zeros((8, 3), np.int32)

    monkeypatch.setattr(evaluate, "load_codec", lambda *_: Codec())
    files = resolve("small")
    codes = codes_of(read_recording(None, 2.0), files, load_config(files.config))
    assert codes.shape == (3, 8) and heard == [pytest.approx(32000, abs=2)]


def test_lessons_are_other_parts_of_the_recording() -> None:
    """If this fails, distilling learns from what it is measured on, and looks better than it is."""
    codes = np.arange(50)[:, None]
    first, second = lesson(codes, 10, 0), lesson(codes, 10, 1)
    assert first is not None and second is not None
    assert first.ravel().tolist() == list(range(10, 20)) and second.ravel().tolist() == list(range(20, 30))
    wrapped = [lesson(codes, 10, i) for i in range(6)]
    assert all(part is not None and len(part) == 10 and part.min() >= 10 for part in wrapped)
    assert lesson(codes[:15], 10, 0) is not None and lesson(None, 10, 0) is None


def test_a_recording(tmp_path: Path) -> None:
    """If this fails, costs cannot be measured on a recording of one's own."""
    import soundfile

    model = write_checkpoint(tmp_path / "m", small_config(n_q=6, dep_q=3), mimi=True)
    wav = tmp_path / "a.wav"
    rng = np.random.default_rng(0)
    soundfile.write(wav, 0.1 * rng.standard_normal(16000).astype(np.float32), 16000)
    report = tmp_path / "r"
    assert main([str(model), "--compare", "q8", "--report", str(report), "--calibration", str(wav), "--quiet"]) == 0
    data = json.loads((report / "report.json").read_text())
    assert data["calibration"].startswith("a recording") and data["says"] is not None
    assert data["recipes"][0]["same_text"] is not None


# ------------------------------------------------------------------------------------------------------------- upload


class _Handler(BaseHTTPRequestHandler):
    """As much of a hub as a commit needs; files come in the commit itself."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    refuse: bool

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(iter(self._chunk, b""))
        if self.refuse:
            self._send(403, {"error": "you may not write here"})
        elif self.path.endswith("/repos/create"):
            self._send(200, {"url": f"http://{self.headers['Host']}/someone/tiny", "name": "someone/tiny"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]
            self._send(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/someone/tiny/commit/{'a' * 40}"
            self._send(200, {"commitUrl": url, "commitOid": "a" * 40, "hookOutput": ""})
        else:  # validation of the card
            self._send(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._send(200, {"id": "someone/tiny", "sha": "a" * 40, "siblings": [], "tags": []})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[[bool], tuple[str, dict[str, bytes]]]]:
    servers = []

    def start(refuse: bool) -> tuple[str, dict[str, bytes]]:
        handler = type("Handler", (_Handler,), {"files": {}, "refuse": refuse})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}", handler.files  # type: ignore[attr-defined]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("refuse", [False, True])
def test_upload(refuse: bool, serve: Callable[[bool], tuple[str, dict[str, bytes]]], tmp_path: Path) -> None:
    """Broken: --upload-repo publishes something else than DEST, or a refusal costs the result."""
    url, files = serve(refuse)
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize"))
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    arguments = [str(TRAINED), str(tmp_path / "out"), "--recipe", "q4", "--upload-repo", "someone/tiny"]
    arguments += ["--compare", "q8", "--frames", "10"]
    run = subprocess.run(
        [sys.executable, "-m", "moshi_mlx_quantize", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "home"), **settings},
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if refuse:
        assert run.returncode == 1 and "is complete, but could not be uploaded" in run.stderr, run.stderr
        assert "model.q4.safetensors" in written
        return
    assert run.returncode == 0, run.stderr
    assert files == written
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name:") and "Recipe `q4`" in card
    assert "KL frame" in card and "q8" in card and "bits per weight" in card
