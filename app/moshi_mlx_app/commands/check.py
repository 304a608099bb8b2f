"""``moshi-mlx-local check``: whether this machine can run a conversation, with which model, and if not, why."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from moshi_mlx.printable import printable
from moshi_mlx_app.options import add_model_options, bounded
from moshi_mlx_app.screen.terminal import Loading, say, wrapped
from moshi_mlx_app.version import program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "test devices, memory and speed, and list the models of each kind that run here in real time"
EXAMPLES = """\
examples:
  moshi-mlx-local check
  moshi-mlx-local check --json > check.json          for a bug report
  moshi-mlx-local check --model kyutai/moshiko-mlx-q4   measure this model

The exit status is 0 if a conversation with the model is possible, else 1.
"""
_LISTEN = 2.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    add_model_options(parser, chosen="the one that talk would take if it is downloaded, else small")
    parser.add_argument("--input-device", metavar="D", help="microphone: its number or part of its name")
    parser.add_argument("--output-device", metavar="D", help="loudspeaker: its number or part of its name")
    parser.add_argument(
        "--captions", metavar="MODEL", help="whether there is time for talk --captions with this speech-to-text model"
    )
    parser.add_argument("--no-sound", action="store_true", help="do not test the sound devices")
    parser.add_argument(
        "--frames",
        type=bounded(int, 4, 10_000),
        default=25,
        metavar="N",
        help="frames to measure (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print the report. Returns the exit status."""
    from moshi_mlx.cpu.backend import choose_backend
    from moshi_mlx_app.models.catalog import BUILTIN, CATALOG, verdict
    from moshi_mlx_app.models.fastest import fastest_backend, fastest_codec
    from moshi_mlx_app.models.fetch import load_model, refuse_deaf
    from moshi_mlx_app.models.measure import machine, memory_used, unpaced
    from moshi_mlx_app.models.select import default_model, measured, remember_step

    here = machine()
    sound = {"ok": True, "said": "not tested"} if args.no_sound else _sound(args)
    with Loading() as loading:
        loading("measuring how fast weights can be read")
        measurement = measured(again=True)
        selected = default_model(loading, measurement)
    if args.model is None:
        args.model = BUILTIN if selected.missing else selected.model
    model = load_model(args, accept=refuse_deaf)
    talks = model.purpose == "dialogue"
    with Loading() as loading:
        loading("measuring the model")
        stages = unpaced(model, args.frames)
    remember_step(model.name, stages["step"]["p95"])
    captions = None if args.captions is None else _captions(args, model, stages)
    frame = 1e3 / model.frame_rate
    slowest = max(stages[name]["p95"] for name in ("encode", "step", "decode"))
    whole = stages["silent"] and stages["spoken"]
    in_time = slowest < frame and stages["frame"]["p50"] < 3 * frame
    report: dict[str, Any] = {
        "program": program(),
        "machine": here,
        "sound": sound,
        "model": {
            "name": model.name,
            "trained": model.trained,
            "description": model.description,
            "purpose": model.purpose,
            "command": model.command,
        },
        "stages": stages,
        "fastest": {"codec": fastest_codec(args.model), "backend": fastest_backend(model)},
        "computes": {"codec": model.codec.kind if model.codec else None, "backend": choose_backend(model.lm.backend)},
        "memory_used": memory_used(),
        "bytes_per_second": {str(bits): round(value) for bits, value in measurement.speeds.items()},
        "keeps_up": in_time,
        "captions": captions,
        "verdicts": [verdict(one, measurement.room, measurement.speeds, measurement.steps) for one in CATALOG],
        "default": {"model": selected.model, "why": selected.line, "download_bytes": selected.missing},
        "ok": bool(sound["ok"] and whole and in_time and talks),
    }
    if args.json:
        say(json.dumps(report))
    else:
        _print(report, frame)
    return 0 if report["ok"] else 1


def _captions(args: argparse.Namespace, model: Moshi, stages: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a frame of both models, and whether that is short enough."""
    from moshi_mlx_app.models.measure import unpaced
    from moshi_mlx_app.models.recogniser import SHARE, find_recogniser, time_for_both

    recogniser = find_recogniser(args, model)
    took = time_for_both(stages, unpaced(recogniser, args.frames))
    keeps_up = took <= SHARE * 1e3 / model.frame_rate
    return {"model": recogniser.name, "ms": round(took, 1), "keeps_up": keeps_up}


def _sound(args: argparse.Namespace) -> dict[str, Any]:
    """Open both devices for a moment, listen, and play silence."""
    from moshi_mlx_app.audio.device import SoundCard
    from moshi_mlx_app.audio.portaudio import DeviceError, devices, silence_hint
    from moshi_mlx_app.screen.panel import own_errors

    try:
        found = devices()
        loudest = 0.0
        heard = played = 0

        def take(pcm: NDArray[np.float32]) -> None:
            nonlocal heard, loudest
            heard += len(pcm)
            loudest = max(loudest, float(abs(pcm).max()))

        def fill(out: NDArray[np.float32]) -> None:
            nonlocal played
            played += len(out)
            out[:] = 0

        named = {"input_device": args.input_device, "output_device": args.output_device}
        with own_errors(), SoundCard(take, fill, 24_000, **named) as card:
            until = time.monotonic() + _LISTEN
            while time.monotonic() < until:
                time.sleep(0.05)
                card.check()
            notices = card.notices()
        microphone, loudspeaker = card.input, card.output
        said = []
        if not heard:
            said.append("the microphone gives nothing: allow this program to use it, or choose another")
        elif not loudest:
            said.append(silence_hint(microphone))
        if not played:
            said.append("the loudspeaker takes nothing: choose another")
        return {
            "ok": bool(heard and loudest and played),
            "said": "; ".join(dict.fromkeys([*said, *notices])) or "fine",
            "microphone": microphone.as_dict() if microphone else None,
            "loudspeaker": loudspeaker.as_dict() if loudspeaker else None,
            "heard_seconds": round(heard / 24_000, 2),
            "played_seconds": round(played / 24_000, 2),
            "loudest": round(loudest, 5),
            "latency_ms": [round(card.latency_in * 1e3, 1), round(card.latency_out * 1e3, 1)],
            "devices": [device.as_dict() for device in found],
        }
    except DeviceError as error:
        return {"ok": False, "said": str(error)}


def _print(report: dict[str, Any], frame: float) -> None:
    from moshi_mlx.tasks import TASKS
    from moshi_mlx_app.models.catalog import may_take

    here, sound, stages = report["machine"], report["sound"], report["stages"]
    say(f"{report['program']}")
    _line(
        "machine",
        f"{here['system']} {here['machine']}, {here['cores']} cores, {here['memory'] / 1e9:.0f} GB, "
        f"MLX on {here['device']} {here['processor']}, Python {here['python']}",
    )
    _line("packages", ", ".join(f"{name} {version or 'missing'}" for name, version in here["packages"].items()))
    for what in ("microphone", "loudspeaker"):
        if sound.get(what):
            _line(what, f"{sound[what]['name']}, {sound[what]['rate']:.0f} Hz, {sound[what]['host']}")
    _line("sound", sound["said"])
    _line("model", report["model"]["description"])
    _line(
        "",
        "one silent and one spoken frame went through"
        if stages["silent"] and stages["spoken"]
        else "a frame came out damaged: report this",
    )
    for name in ("encode", "step", "decode", "frame"):
        times = stages[name]
        _line(name, f"p50 {times['p50']:6.1f}   p95 {times['p95']:6.1f}   max {times['max']:6.1f} ms of {frame:.0f}")
    for what, unit in (("codec", "a frame"), ("backend", "a step")):
        figures = ", ".join(f"{name} {ms:.1f}" for name, ms in report["fastest"][what].items())
        measured = f"; milliseconds of {unit} here: {figures}" * bool(figures)
        _line(what, f"{report['computes'][what]}{measured}")
    _line("memory", f"{report['memory_used'] / 1e9:.2f} GB used")
    if report["captions"] is not None:
        found = report["captions"]
        word = "there is time for them" if found["keeps_up"] else "there is no time for them"
        _line("captions", f"with {found['model']} a frame takes {found['ms']:.0f} ms of {frame:.0f}: {word}")
    limit = f"a step, estimated from how fast weights are read here, may take {frame:.0f} ms"
    commands = {task.purpose: task.command for task in TASKS.values()}
    say(*wrapped(f"published models, by what they are for; {limit}:", sys.stdout))
    for entry in report["verdicts"]:
        if entry["purpose"] in commands:
            say(f" {entry['purpose']}: moshi-mlx-local {commands.pop(entry['purpose'])}")
        flaws = [text for text, good in (("too large", entry["fits"]), ("too slow", entry["keeps_up"])) if not good]
        why = ", ".join(flaws) + ": " * bool(flaws) + entry["why"].removesuffix(may_take(frame / 1e3))
        word = "no" if flaws else "yes"
        _line(f"  {word:4} {entry['model']:25}", why + "; its publisher asks for an agreement" * entry["gated"])
    _line("talk takes", report["default"]["why"])
    fetched = report["default"]["download_bytes"]
    if fetched:
        _line("", f"{fetched / 1e9:.1f} GB of it will be fetched first")
    flaws = [
        text
        for text, good in (
            ("see the sound devices above", sound["ok"]),
            ("frames come out damaged", stages["silent"] and stages["spoken"]),
            (f"{report['model']['name']} is too slow here", report["keeps_up"]),
            (
                f"{report['model']['name']} is for {report['model']['purpose']}: use moshi-mlx-local "
                f"{report['model']['command']}",
                report["model"]["purpose"] == "dialogue",
            ),
        )
        if not good
    ]
    possible = f"with {report['model']['name']} a conversation is possible"
    _line("verdict", f"a conversation is not possible as it is: {', '.join(flaws)}" if flaws else possible)


def _line(label: str, text: str) -> None:
    """A line of the report; on a terminal as many as are needed, under one another."""
    label = f"{label:11} "
    say(*wrapped(label + printable(text), sys.stdout, len(label)))
