"""``moshi-mlx-local translate``: speech in another language, from a file or while somebody speaks."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from moshi_mlx.errors import ConfigError
from moshi_mlx_app.commands.file import Answer, Question, add_output_arguments, answer
from moshi_mlx_app.commands.talk import echo_canceller, stop_signals
from moshi_mlx_app.models.fetch import wrong_model
from moshi_mlx_app.options import (
    add_cache_option,
    add_generation_options,
    add_model_options,
    bounded,
    generation_from,
)
from moshi_mlx_app.screen.terminal import warn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_mlx.engine.generator import GenerationConfig
    from moshi_mlx.realtime import Conversation
    from moshi_mlx.tasks.dialogue import Moshi, SessionFrame
    from moshi_mlx.tasks.translate import Hibiki
    from moshi_mlx_app.audio.device import SoundCard

    Pcm = NDArray[np.float32]

__all__ = ["EXAMPLES", "HELP", "MICROPHONE", "add_arguments", "run"]

MICROPHONE = "mic"
"""The name of the microphone as the source."""
DEFAULT = "kyutai/hibiki-1b-mlx-bf16"

HELP = "translate speech, while it is spoken or from a file: Hibiki's voice and its words"
EXAMPLES = f"""\
examples:
  moshi-mlx-local translate discours.wav -o english.wav
  moshi-mlx-local translate discours.wav -o english.wav --cfg 3   more of the speaker's voice
  moshi-mlx-local translate mic -o english.wav                    while somebody speaks

The models translate French into English (Hibiki-Zero also Spanish, Portuguese
and German) and were trained on two minutes at most. The wav is stereo: the
translation on the left, the speaker on the right, who is a few seconds ahead.
Words and their times go to english.json. With the microphone, Ctrl-C ends the
speech: the translation is then completed, or cut by another Ctrl-C.

Without --model: {DEFAULT}.
"""
_TICK = 0.02
_CLOSING = 9  # frames after the end of the text within which its last word ends, and one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument(
        "source",
        metavar="FILE",
        help=f"a sound file (wav, flac, mp3, ogg, ...), - for standard input, or {MICROPHONE} for the microphone",
    )
    add_output_arguments(parser, name="OUT", mono="the translation")
    parser.add_argument(
        "--cfg",
        type=bounded(float, 0, 100),
        metavar="C",
        help="guidance: above 1 the voice is more like the speaker's, at twice the cost; typical: 3 (default: 1, none)",
    )
    parser.add_argument(
        "--wait",
        type=bounded(float, 0, 3600),
        metavar="SECONDS",
        help="seconds after the speech within which the model should have ended by itself; it is cut there otherwise "
        "(default: 20; Hibiki-Zero: what is left of two minutes)",
    )
    group = parser.add_argument_group("microphone")
    group.add_argument("--input-device", metavar="D", help="microphone: its number or part of its name")
    group.add_argument("--output-device", metavar="D", help="loudspeaker: its number or part of its name")
    group.add_argument("--no-aec", action="store_true", help="no echo cancellation: for headphones")
    group.add_argument("--seconds", type=bounded(float, 0.1, 1e9), metavar="N", help="end the speech after N seconds")
    add_model_options(parser, chosen=DEFAULT)
    add_generation_options(parser)
    add_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Translate one recording or speech. Returns the exit status: 0, or 130 after Ctrl-C."""
    args.model = args.model or DEFAULT
    if args.source == MICROPHONE:
        from moshi_mlx_app.audio.portaudio import devices, find_device

        found = devices()  # report missing devices before a download
        find_device(args.input_device, "input", found)
        find_device(args.output_device, "output", found)
        return answer(args, None, _Speech, _Microphone)
    return answer(args, args.source, _Translation)


class _Translation(Answer):
    """The translation of a file."""

    exact: ClassVar[bool] = False
    left: ClassVar[str] = "the translation"

    def accept(self, name: str, task: type[Moshi] | Moshi) -> None:
        if task.purpose != "translation":
            raise ConfigError(wrong_model(name, task))

    def generation(self, model: Moshi) -> GenerationConfig:
        from moshi_mlx.tasks.dialogue import generation_defaults

        hibiki = _translator(model)
        return hibiki.guided(generation_from(self.args, generation_defaults(model.config)), self.args.cfg)

    def settings(self) -> dict[str, Any]:
        return {"wait": self.args.wait}

    def length(self, model: Moshi) -> int:
        from moshi_mlx.tasks.translate import TRAINED

        recording = self.question.recording
        if recording.duration > TRAINED:
            self.notice(
                f"{recording.name} has {recording.duration:.0f} s, and these models were trained on {TRAINED:.0f} s at "
                "most: the translation may break off. Cut it at pauses"
            )
        wait = _translator(model).patience(recording.duration) if self.args.wait is None else self.args.wait
        return recording.length(model.sample_rate) + round(wait * model.sample_rate) + 2 * model.frame_size

    def played(self, model: Moshi, session: Any) -> Iterator[tuple[Pcm, Pcm, SessionFrame]]:
        frames = self.question.recording.frames(model.sample_rate, model.frame_size)
        whole = yield from _aligned(_translator(model).interpret(session, frames, wait=self.args.wait))
        if not whole:
            self.notice(CUT)


CUT = (
    "the model did not end its translation in time, which was cut there: it may lack its last words. --wait gives it "
    "more time"
)


def _aligned(
    played: Iterator[tuple[Pcm, SessionFrame]],
) -> Generator[tuple[Pcm, Pcm, SessionFrame], None, bool]:
    """What was heard and said, frame by frame; both begin with the speech, as the words' times do.

    A delayed voice comes some frames late. After the end of the translation only words are taken. Returns whether it
    came.
    """
    from moshi_mlx.tasks.translate import finished

    heard: deque[Pcm] = deque()
    whole = False
    for user, frame in played:
        nothing = frame.pcm[:0]
        heard.append(user)
        if whole or not frame.voiced or not len(frame.pcm):
            yield nothing, nothing, frame
        else:
            yield heard.popleft(), frame.pcm, frame
        whole = whole or finished(frame)
    return whole


def _translator(model: Moshi) -> Hibiki:
    from moshi_mlx.tasks.translate import Hibiki

    assert isinstance(model, Hibiki)  # see `accept`
    return model


# ---------------------------------------------------------------------------------------------------------- live


class _Microphone(Question):
    """A speech into the microphone, in place of a recording."""

    def __init__(self) -> None:
        self.words: list[dict[str, Any]] = []
        self.recording: Any = SimpleNamespace(warnings=(), close=lambda: None)

    def about(self) -> dict[str, Any]:
        return {"file": MICROPHONE, "channels": 1}


class _Speech(_Translation):
    """The translation of a speech while it is spoken, on the loudspeaker too."""

    bar: ClassVar[bool] = False

    def length(self, model: Moshi) -> int:
        return 0  # nobody knows

    def session(self, model: Moshi, generation: GenerationConfig) -> AbstractContextManager[Any]:
        from moshi_mlx.realtime import Conversation

        self._said: deque[tuple[Pcm, SessionFrame]] = deque()
        args = self.args
        return Conversation(
            model,
            seed=args.seed,
            generation=generation,
            kv_bits=args.kv_bits,
            tap=lambda heard, frame: self._said.append((heard.copy(), frame)),
            trace=self.trace,
        )

    def played(self, model: Moshi, session: Any) -> Iterator[tuple[Pcm, Pcm, SessionFrame]]:
        from moshi_mlx_app.audio.device import SoundCard
        from moshi_mlx_app.screen.panel import own_errors

        args, self._listening = self.args, True

        def take(pcm: Pcm) -> None:
            if self._listening:
                session.feed(pcm)

        with stop_signals() as stopped, own_errors():
            card = SoundCard(
                take,
                session.read_into,
                model.sample_rate,
                input_device=args.input_device,
                output_device=args.output_device,
                echo=None if args.no_aec else echo_canceller(model.sample_rate),
            )
            with card:
                if not args.quiet:
                    warn("speak; Ctrl-C ends the speech", "microphone")
                whole = yield from _aligned(self._heard(model, session, card, stopped))
        if not whole:
            self.notice(CUT)

    def _heard(
        self, model: Moshi, conversation: Conversation, card: SoundCard, stopped: list[int]
    ) -> Iterator[tuple[Pcm, SessionFrame]]:
        """Frames as they come: of the microphone, then of silence at the same pace, until the model has said all."""
        import numpy as np

        from moshi_mlx.tasks.translate import WAIT, finished

        args, rate = self.args, model.sample_rate
        wait = WAIT if args.wait is None else args.wait
        began, ended, fed, after, left = time.monotonic(), 0.0, 0, 0, _CLOSING
        while left and after <= wait * model.frame_rate:
            conversation.wait(_TICK)
            conversation.events()
            conversation.check()
            card.check()
            for notice in card.notices():
                warn(notice, "notice")
            while self._said and left:
                heard, frame = self._said.popleft()
                yield heard, frame
                after += frame.ended
                left -= left < _CLOSING or finished(frame)
            now = time.monotonic()
            if self._listening and (stopped or (args.seconds is not None and now - began >= args.seconds)):
                self._listening = False
                time.sleep(_TICK)  # the callback that may still be feeding
                conversation.end()
                ended = now
                if not args.quiet:
                    warn(f"the translation is being completed, {wait:g} s at most; Ctrl-C cuts it", "microphone")
            if not self._listening:
                due = round((now - ended) * rate) - fed
                fed += conversation.feed(np.zeros(max(due, 0), np.float32))
                if now - ended > wait + 5:
                    return  # the model does not keep up
