"""``moshi-mlx-local talk``: the live conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_mlx.errors import MoshiError
from moshi_mlx_app.captions import TalkCaptions
from moshi_mlx_app.commands.file import UNTRAINED, check_seed
from moshi_mlx_app.models.recogniser import HELP as CAPTIONS
from moshi_mlx_app.models.recogniser import load_recogniser
from moshi_mlx_app.options import (
    add_cache_option,
    add_generation_options,
    add_machine_options,
    add_model_options,
    add_role_options,
    bounded,
    generation_from,
    opening_from,
)
from moshi_mlx_app.recording.interrupt import no_interrupt
from moshi_mlx_app.recording.outputs import check_folder, reserved, unused_name
from moshi_mlx_app.screen.terminal import Loading, say, warn
from moshi_mlx_app.tracing import add_trace_option, trace_output, tracing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_mlx.realtime import Conversation, Event, Trace
    from moshi_mlx.realtime.workers import Work
    from moshi_mlx.tasks.dialogue import Moshi, SessionFrame
    from moshi_mlx_app.audio.device import EchoCanceller, SoundCard
    from moshi_mlx_app.recording.recorder import Recorder
    from moshi_mlx_app.screen.panel import Keys, Panel

__all__ = ["EXAMPLES", "HELP", "add_arguments", "echo_canceller", "run", "stop_signals"]

HELP = "talk with Moshi in the terminal (the default)"
EXAMPLES = """\
examples:
  moshi-mlx-local                                the best model for this machine
  moshi-mlx-local --model kyutai/moshika-mlx-q4  a given model
  moshi-mlx-local talk --record talks            record it: talks/*.wav, *.json
  moshi-mlx-local talk --resume talks/2026-11-22_14-05-33.moshi
  moshi-mlx-local talk --input-device 3 --output-device headset
  moshi-mlx-local talk --seconds 60 --json       a minute, then the figures

Keys: m mute, r record, k keep, n or space new conversation, d look for devices
again, ? what the figures mean, q or Ctrl-C quit. A recording is a stereo wav
(left Moshi, right you) and a JSON file with timed words, the layout that
moshi-finetune trains on. k saves the conversation itself: --resume continues
it as if it had never stopped.

The panel:
"""
FIGURES = {
    "latency": "from the end of a frame of your voice (80 ms) until its answer is ready: the median",
    "queue": "sound waiting inside the program: yours to be processed, Moshi's to be played",
    "late": "frames whose answer came more than two frames (160 ms) after their end",
    "dropped": "your voice skipped because the model fell behind by more than --backlog",
    "underruns": "times the loudspeaker ran out of sound: heard as a gap or a click",
}
EXAMPLES += "".join(
    textwrap.fill(text, 78, initial_indent=f"  {name:10} ", subsequent_indent=" " * 13) + "\n"
    for name, text in FIGURES.items()
)
BUILT_IN = (
    "the built-in model knows a few hundred questions and nothing else. Say hello; ask for its name, the capital of "
    "France, the opposite of hot, two plus three, the day after Monday"
)
_TICK = 0.05
_ENOUGH = 250  # frames needed to measure how long a step takes
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    add_model_options(parser, chosen="the best one that this machine can hold and run in real time")
    group = parser.add_argument_group("sound")
    group.add_argument("--input-device", metavar="D", help="microphone: its number or part of its name")
    group.add_argument("--output-device", metavar="D", help="loudspeaker: its number or part of its name")
    group.add_argument(
        "--latency",
        type=bounded(float, 0.001, 1),
        metavar="SECONDS",
        help="system buffer in each direction; increase it if the sound stutters (default: low; 0.02 on Linux)",
    )
    group.add_argument(
        "--no-aec",
        action="store_true",
        help="no echo cancellation: for headphones, or if the system already does it",
    )
    group.add_argument(
        "--backlog",
        type=bounded(float, 0.08, 3),
        default=0.32,
        metavar="SECONDS",
        help="how far Moshi may fall behind before the oldest part of your voice is dropped (default: %(default)s)",
    )
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--record",
        metavar="DIR",
        help="record into this folder from the start (without it, the keys r and k write into ./recordings)",
    )
    group.add_argument(
        "--resume",
        metavar="FILE",
        help="continue a conversation saved with the key k: its model, seed and sampling apply until a new one begins",
    )
    group.add_argument("--captions", metavar="MODEL", help=CAPTIONS)
    group.add_argument("--seconds", type=bounded(float, 0.1, 1e9), metavar="N", help="end after N seconds")
    group.add_argument("--json", action="store_true", help="print the figures as one line of JSON at the end, no text")
    group.add_argument("--quiet", action="store_true", help="no text and no panel; notices and errors are still shown")
    add_trace_option(group)
    group.add_argument("--force", action="store_true", help="replace an existing trace file")
    add_role_options(parser)
    add_generation_options(parser)
    add_cache_option(parser)
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until the user quits. Returns the exit status: 0, or 130 after Ctrl-C."""
    from moshi_mlx_app.recording.recorder import LIST

    folder = Path(args.record or "recordings")
    if args.record is not None:
        check_folder(folder, "--record")
    outputs = [] if args.trace is None else [trace_output(args.trace)]
    others = {"the folder of recordings": folder, "the list of recordings": folder / LIST}
    with reserved(args.parser, outputs, others=others, force=args.force), tracing(args.trace) as trace:
        return _run(args, trace)


def _run(args: argparse.Namespace, trace: Trace | None) -> int:
    from moshi_mlx.engine.session import describe_conversation
    from moshi_mlx.realtime import Captions, Conversation
    from moshi_mlx.tasks.dialogue import generation_defaults
    from moshi_mlx_app.audio.device import SoundCard
    from moshi_mlx_app.audio.portaudio import devices, find_device
    from moshi_mlx_app.models.catalog import BUILTIN
    from moshi_mlx_app.models.fetch import load_model
    from moshi_mlx_app.models.select import remember_step
    from moshi_mlx_app.recording.recorder import Recorder
    from moshi_mlx_app.recording.transcript import Transcript, clean
    from moshi_mlx_app.screen.panel import Keys, Panel, own_errors

    found = devices()  # report missing devices before a download
    find_device(args.input_device, "input", found)
    find_device(args.output_device, "output", found)
    if args.resume is not None:
        about = describe_conversation(args.resume)
        args.model = args.model or about["model"]
        args.kv_bits = args.kv_bits or (int(about["kv_bits"]) if about["kv_bits"].isdigit() else None)
    _SAID.clear()
    model = load_model(args, shown=not args.quiet, accept=_accept)
    if not model.trained:
        warn(UNTRAINED.format(name=model.name), "notice")
    elif args.model == BUILTIN and not args.quiet:
        warn(BUILT_IN, "notice")
    generation = generation_from(args, generation_defaults(model.config))
    check_seed(args.seed, model, generation)
    opening = opening_from(args, model)
    resumed = {} if args.resume is None else {"resumed": clean(args.resume)}
    recorder = Recorder(
        Path(args.record or "recordings"),
        model.sample_rate,
        model.frame_size,
        Transcript.of(model, args.seed, generation, kv_bits=args.kv_bits, settings=resumed),
    )
    recogniser = None if args.captions is None else load_recogniser(args, model)
    captions = None if recogniser is None else TalkCaptions(Captions(recogniser), recorder.caption)

    def tap(heard: NDArray[np.float32], frame: SessionFrame) -> None:
        recorder.tap(heard, frame)
        if captions is not None:
            captions.tap(heard, frame)

    conversation = Conversation(
        model,
        seed=args.seed,
        generation=generation,
        kv_bits=args.kv_bits,
        resume=args.resume,
        backlog=args.backlog,
        tap=tap if trace is None else trace.wrap("record", tap),
        trace=trace,
        opening=opening,
        on_opening=lambda done, total: loading(f"telling the model its role: {done} of {total}"),
    )
    loading = Loading(shown=opening is not None and not args.quiet)
    if args.record is not None:
        recorder.start()
    impatient = False
    try:
        with stop_signals() as stopped, own_errors():
            echo = None if args.no_aec else echo_canceller(model.sample_rate)
            if trace is not None and echo is not None:
                echo.cancel = trace.wrap("echo", echo.cancel)  # type: ignore[method-assign]
            card = SoundCard(
                conversation.feed,
                conversation.read_into,
                model.sample_rate,
                input_device=args.input_device,
                output_device=args.output_device,
                echo=echo,
                latency=args.latency,
            )
            with loading:
                conversation.start()
            with (
                _running(conversation),
                card,
                Keys() as keys,
                Panel(panel=not args.quiet, text=not (args.quiet or args.json), keys=keys.available) as panel,
            ):
                talk = _Talk(args, conversation, card, recorder, panel, keys, captions)
                talk.run(stopped)
    except KeyboardInterrupt:  # pressed again: do not wait for the figures
        impatient = True
    finally:
        with no_interrupt():
            if captions is not None:
                captions.stop()
                if not (args.quiet or args.json):
                    for line in captions.lines():
                        say(f"you: {line}")
            recorder.stop()
            for notice in recorder.notices():
                warn(notice, "recording")
    with no_interrupt():
        if impatient:
            _recorded(recorder)
            return 130
        talk.report(model.name)
        if conversation.stats.frames >= _ENOUGH:
            remember_step(model.name, conversation.stats.step.percentile(95) * 1e3)
    conversation.check()
    return 130 if stopped and stopped[0] == signal.SIGINT else 0


@contextlib.contextmanager
def _running(conversation: Conversation) -> Iterator[None]:
    """Stop a conversation that has started, as its own ``with`` does."""
    with contextlib.ExitStack() as stack:
        stack.push(conversation.__exit__)
        yield


def _accept(name: str, task: type[Moshi] | Moshi) -> None:
    """Refuse a model that does not hear; of one that hears and is for something else, say what it is for."""
    from moshi_mlx_app.models.fetch import refuse_deaf, wrong_model

    refuse_deaf(name, task)
    if task.purpose != "dialogue" and name not in _SAID:
        _SAID.add(name)  # before the download, and not again after it
        warn(wrong_model(name, task), "notice")


_SAID: set[str] = set()


def echo_canceller(rate: int) -> EchoCanceller | None:
    """The echo canceller, or a notice about how to do without."""
    from moshi_mlx_app.audio.echo import EchoError, WebRtcEcho

    try:
        return WebRtcEcho(rate)
    except EchoError as error:
        warn(f"{error}. --no-aec silences this", "notice")
        return None


class _Talk:
    """The loop that connects the conversation, the devices and the user."""

    def __init__(
        self,
        args: argparse.Namespace,
        conversation: Conversation,
        card: SoundCard,
        recorder: Recorder,
        panel: Panel,
        keys: Keys,
        captions: TalkCaptions | None,
    ):
        self.captions = captions
        self.args, self.conversation, self.card = args, conversation, card
        self.recorder, self.panel, self.keys = recorder, panel, keys
        self.muted = False
        self.seconds = 0.0
        self.kept: list[Path] = []
        self._keeping: Work | None = None
        self._said: deque[tuple[str, str]] = deque()  # written by the thread that saves
        self._first_frame = 0  # of the current conversation

    def run(self, stopped: list[int]) -> None:
        """Run until a signal, the key q, the end of --seconds, or an error."""
        args, conversation = self.args, self.conversation
        began = time.monotonic()
        shown = 0.0
        while not stopped and conversation.running:
            conversation.wait(_TICK)
            self.seconds = time.monotonic() - began
            for event in conversation.events():
                self._event(event)
            self.panel.say(self._time(conversation.stats.frames), "")
            for notice in (*self.card.notices(), *self.recorder.notices()):
                self.panel.notice(notice)
            for line in () if self.captions is None else self.captions.lines():
                self.panel.notice(line, "you")
            self._tell_kept()
            if not all(self._key(key) for key in self.keys.pressed()):
                break
            if args.seconds is not None and self.seconds >= args.seconds:
                break
            self.card.check()
            if self.seconds - shown >= _TICK or not shown:
                shown = self.seconds
                self.panel.show(self._state())
        if self._keeping is not None:
            self._keeping.join()
        self._tell_kept()

    def _event(self, event: Event) -> None:
        if event.kind == "text":
            self.panel.say(self._time(event.frame), event.text)
        elif event.kind == "reset":
            self._first_frame = event.frame
            self.panel.restart()
            self.panel.notice("a new conversation")

    def _time(self, frame: int) -> float:
        return (frame - self._first_frame) / self.conversation.engine.frame_rate

    def _key(self, key: str) -> bool:
        """Handle a key; False to quit."""
        if key == "q":
            return False
        if key == "m":
            self.muted = not self.muted
            self.conversation.mute(self.muted)
        elif key in "n ":
            self.conversation.reset()
        elif key == "k":
            self._keep()
        elif key == "d":
            self.card.reopen()
        elif key == "r":
            self._record()
        elif key == "?":
            for name, text in FIGURES.items():
                self.panel.notice(text, name)
        return True

    def _record(self) -> None:
        if self.recorder.running:
            self.recorder.stop()
            self.panel.notice(str(self.recorder.files[-1]) if self.recorder.files else "nothing yet", "recorded")
            return
        try:
            self.recorder.start()
        except OSError as error:
            self.panel.notice(f"{error.filename}: {error.strerror}" if error.filename else str(error), "recording")

    def _keep(self) -> None:
        """Save the conversation to a file, in a thread: with a large model this takes seconds."""
        from moshi_mlx.realtime.workers import run as run_in_thread

        if self._keeping is None or not self._keeping.alive:
            self._keeping = run_in_thread("moshi keeper", self._write_kept)

    def _write_kept(self) -> None:
        try:
            self.recorder.folder.mkdir(parents=True, exist_ok=True)
            path = unused_name(self.recorder.folder, ".moshi")
            self.conversation.save(path)
        except (MoshiError, OSError) as error:
            self._said.append((str(error), "notice"))
        else:
            self.kept.append(path)
            self._said.append((f"{path}; continue it with --resume", "kept"))

    def _tell_kept(self) -> None:
        while self._said:
            self.panel.notice(*self._said.popleft())

    def _state(self) -> Any:
        from moshi_mlx_app.screen.panel import State

        stats = self.conversation.stats
        return State(
            seconds=self.seconds,
            user=stats.level_in,
            moshi=stats.level_out,
            latency=stats.latency.percentile(50),
            queue=self.conversation.delay,
            late=stats.late,
            dropped=stats.dropped_in / self.conversation.engine.sample_rate,
            underruns=stats.underruns,
            recording=self.recorder.seconds if self.recorder.running else None,
            muted=self.muted,
            sound=self.card.open,
        )

    def report(self, name: str) -> None:
        """Figures of the whole conversation."""
        stats, card = self.conversation.stats, self.card
        rate = self.conversation.engine.sample_rate
        figures = {
            "model": name,
            "seconds": round(self.seconds, 3),
            "frames": stats.frames,
            "late": stats.late,
            "latency_ms": {str(p): round(stats.latency.percentile(p) * 1e3, 1) for p in (50, 95)},
            "step_ms": {str(p): round(stats.step.percentile(p) * 1e3, 1) for p in (50, 95)},
            "dropped_seconds": round(stats.dropped_in / rate, 3),
            "dropped_output_seconds": round(stats.dropped_out / rate, 3),
            "underruns": stats.underruns,
            "device_overflows": card.overflows,
            "device_underflows": card.underflows,
            "device_openings": card.openings,
            "echo_cancellation": self.card.cancels_echo,
            "files": [str(path) for path in self.recorder.files],
            "kept": [str(path) for path in self.kept],
        }
        if self.args.json:
            say(json.dumps(figures))
        elif not self.args.quiet:
            latency = [stats.latency.percentile(percent) * 1e3 for percent in (50, 95)]
            warn(
                f"{self.seconds:.1f} s, {stats.frames} frames, {stats.late} late; latency {latency[0]:.0f} ms "
                f"(p95 {latency[1]:.0f}); {figures['dropped_seconds']} s dropped, {stats.underruns} underruns",
                "",
            )
            _recorded(self.recorder)


def _recorded(recorder: Recorder) -> None:
    for path in recorder.files:
        warn(str(path), "recorded")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Let Ctrl-C and similar signals end the loop and close devices and files; a second one interrupts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
