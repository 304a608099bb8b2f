"""The path of a frame: sound > codes > tokens and text > sound, for any number of conversations.

::

    Engine.encode()    frames of sound > codes       the codec's encoder
    Engine.predict()   codes > codes, text, words    the language model and the tokenizer
    Engine.decode()    codes > frames of sound       the codec's decoder

Each stage owns its part of the state and is used by one thread at a time: the three may run in three threads, or one
after the other. A conversation is a row, with the same number in each stage, that joins and leaves at any time. Its
state is a value, one tree of arrays for the three stages (:meth:`snapshot` of each).

Before its first frame a row has opening steps (:class:`Opening`): position 0 of the model, the silence that some
checkpoints were trained to hear first, the prompts of others. Text that the model chooses in these steps belongs to the
first frame. A frame that is None is the end of the user's sound: its codes are the start codes, which translation
models were trained to read there.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from ..codec.base import Codec, DecoderStream, EncoderStream, MimiCodec
from ..config import UNGENERATED, ModelConfig
from ..errors import CodecError, ConfigError, StateError
from ..models.lm import Lm
from ..models.sampling import GREEDY, Sampling
from ..state import State, put_rows, state_arrays, take_rows
from .generator import GenerationConfig, Generator, Step
from .text import TextTokenizer, Word, WordTracker

__all__ = [
    "Answer",
    "Decode",
    "Encode",
    "Engine",
    "Opening",
    "Predict",
    "SessionFrame",
    "Settings",
    "generation_defaults",
]

Pcm = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Opening:
    """The positions that a conversation runs before its first frame.

    Attributes
    ----------
    text : array [n], int32
        The text token that each position has to predict; -2: the model chooses.
    own : array [n, own_q], int32
        The own codes of the frame with the position's index; -2 where the model chooses.
    user : array [n, user_q], int32
        The user's frame that each position reads; position 0 reads none: -2.
    embedded : array [m, dim], float32
        What the first m positions read in place of tokens.
    pinned : int
        Positions that are still seen when the conversation is longer than the model's context.
    """

    text: Ints
    own: Ints
    user: Ints
    embedded: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    pinned: int = 0

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Settings:
    """The settings of a conversation.

    Attributes
    ----------
    seed : int
        The same seed, settings and sound give the same answer.
    generation : GenerationConfig, optional
        Sampling settings; defaults come from the checkpoint or the reference.
    conditions, null_conditions : mapping, optional
        Values for the model's conditioners; by default what Kyutai's programs use.
    opening : Opening, optional
        Prompts; by default a conversation begins as the checkpoint does without any.
    """

    seed: int = 0
    generation: GenerationConfig | None = None
    conditions: Mapping[str, Any] | None = None
    null_conditions: Mapping[str, Any] | None = None
    opening: Opening | None = None


@dataclass(frozen=True)
class SessionFrame:
    """The result of one frame of a conversation.

    Attributes
    ----------
    index : int
        Frame number, from 0.
    pcm : array [frame_size], float32
        The model's voice; silence while it has none yet.
    text : str
        What the model began to say in this frame, ready for display; mostly empty.
    words : tuple of Word
        Words that ended in this frame, with start and end in seconds of the model's voice.
    step : Step or None
        Tokens and codes behind it.
    voiced : bool
        False if ``pcm`` is silence because the model has no voice, or none yet.
    ended : bool
        Whether the user's sound has ended (:meth:`Session.end`): True from the frame that says so.
    """

    index: int
    pcm: Pcm
    text: str
    words: tuple[Word, ...]
    step: Step | None = None
    voiced: bool = True
    ended: bool = False


@dataclass(frozen=True)
class Answer:
    """The model's output for one frame.

    Attributes
    ----------
    index : int
        Frame number, from 0.
    codes : array [own_q], int32, or None
        Input of the decoder; None if there is no voice, or none yet.
    text, words, step, ended
        As in :class:`SessionFrame`.
    """

    index: int
    codes: Ints | None
    text: str
    words: tuple[Word, ...]
    step: Step | None = None
    ended: bool = False

    def frame(self, pcm: Pcm) -> SessionFrame:
        """This answer with the sound of its codes."""
        return SessionFrame(self.index, pcm, self.text, self.words, self.step, self.codes is not None, self.ended)


class Engine:
    """A model prepared for frames: creates the stages, and the initial state of conversations.

    Parameters
    ----------
    config, lm, codec, tokenizer, name
        As for :class:`~moshi_mlx.tasks.dialogue.Moshi`.
    pinning : bool
        Whether an opening may stay in view beyond the context.

    Attributes
    ----------
    sample_rate, frame_size, frame_rate
        Those of the codec.
    own_q, user_q : int
        Codes per frame that the model produces and hears.
    lead : int
        Frames of silence that a conversation hears first.

    Other Parameters
    ----------------
    warm_up : int
        Frames of silence that only the model hears first: the encoder begins with the user's sound (Hibiki-Zero).
    hears_end : bool
        Whether the encoder hears a frame of silence where the model reads the end of the user's sound (Hibiki-Zero);
        otherwise what follows continues the sound before it (Hibiki).

    Raises
    ------
    ConfigError
        If the model cannot converse.
    """

    def __init__(
        self,
        config: ModelConfig,
        lm: Lm,
        codec: Codec | None,
        tokenizer: TextTokenizer | None,
        name: str = "moshi",
        *,
        warm_up: int = 0,
        hears_end: bool = False,
        pinning: bool = False,
    ):
        if codec is None or not lm.config.n_q:
            raise ConfigError(f"{name} is a text model: it does not converse")
        self.config, self.lm, self.codec, self.tokenizer, self.name = config, lm, codec, tokenizer, name
        self.pinning = pinning
        self.sample_rate, self.frame_size, self.frame_rate = codec.sample_rate, codec.frame_size, codec.frame_rate
        self.own_q, self.user_q = lm.config.own_q, lm.config.user_q
        prefix = float(config.stt_config.get("audio_silence_prefix_seconds", 0.0))
        self.warm_up, self.hears_end = warm_up, hears_end
        self.lead = math.ceil(round(prefix * codec.sample_rate) / codec.frame_size) + warm_up
        self._opening: tuple[Ints, State | None] | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """Itself, so that an engine can be passed in place of a model."""
        return self

    def encode(self) -> Encode:
        """A new first stage."""
        return Encode(self)

    def predict(self, kv_bits: int | None = None) -> Predict:
        """A new second stage; ``kv_bits`` is the precision of its cache."""
        if self.lm.sharding is not None:  # a thread of its own, so that no wait for another machine is endless
            stage: Predict = self.lm.sharding.bounded(lambda: Predict(self, kv_bits))
            return stage
        return Predict(self, kv_bits)

    def decode(self) -> Decode:
        """A new third stage."""
        return Decode(self)

    def opening(self) -> Opening:
        """How a conversation begins without prompts."""
        count = 1 + self.lead
        user = np.concatenate([np.full((1, self.user_q), UNGENERATED, np.int32), self.silence()[0]])
        own = np.full((count, self.own_q), UNGENERATED, np.int32)
        return Opening(np.full(count, UNGENERATED, np.int32), own, user)

    @property
    def audio_start_id(self) -> int:
        """The code of the user that stands where there is no sound."""
        return self.lm.config.audio_start_id

    def silence(self) -> tuple[Ints, State | None]:
        """Codes [lead, user_q] of the silence that is heard first, and the encoder's state after it.

        The state is None where there is no such silence, the encoder does not keep it, or the codec cannot give it.
        """
        with self._lock:
            if self._opening is None:
                codes, state = np.zeros((self.lead, self.user_q), np.int32), None
                if self.lead and self.user_q:
                    stream = self.codec.encoder()
                    if self.warm_up:  # the reference's generator never reads its first frame
                        self.hear_silence(stream)
                    codes[:] = [self.hear_silence(stream)[: self.user_q] for _ in range(self.lead)]
                    try:
                        state = None if self.warm_up else stream.snapshot()
                    except CodecError:
                        pass
                self._opening = codes, state
            return self._opening

    def hear_silence(self, stream: EncoderStream) -> Ints:
        """Codes of one frame of silence."""
        return stream.encode(np.zeros(self.frame_size, np.float32))

    def default_conditions(self) -> dict[str, Any] | None:
        """Default values of the checkpoint's conditioners, as in Kyutai's programs."""
        conditioners = self.lm.config.conditioners
        if not conditioners:
            return None
        usual = {"description": "very_good", "control": "ok", "cfg": "2.0"}
        return {
            name: usual[name] if usual.get(name) in config.possible_values else None
            for name, config in conditioners.items()
        }

    def default_null_conditions(self) -> dict[str, Any] | None:
        """Default values for the unconditioned half of guidance; None if the checkpoint has none."""
        usual = self.default_conditions()
        if usual is None or usual.get("description") is None:
            return None
        return {**usual, "description": "very_bad"}

    def fingerprint(self) -> str:
        """SHA-256 of what a conversation's state depends on: configuration, types, and some values of each weight."""
        about = [self.config.model_type, asdict(self.config.lm), asdict(self.codec.config), self.config.stt_config]
        found = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
        modules = [self.lm, *([self.codec.mimi] if isinstance(self.codec, MimiCodec) else [])]
        whole = {} if self.lm.sharding is None else self.lm.sharding.described  # of weights that are only in part here
        for module in modules:
            weights: Any = tree_flatten(module.parameters())
            few = [(name, value, mx.view(mx.contiguous(value.reshape(-1)[:8]), mx.uint8)) for name, value in weights]
            mx.eval([bits for _, _, bits in few])
            for name, value, bits in few:
                dtype, shape, first = str(value.dtype), list(value.shape), np.array(bits).tobytes()
                if module is self.lm:
                    dtype, shape, first = whole.get(name, (dtype, shape, first))
                found.update(f"{name} {dtype} {shape}\n".encode())
                found.update(first)
        return found.hexdigest()


class _CodecStage:
    """One side of the codec, for rows that join and leave.

    The state has a power of two of rows, so that the kernels of a GPU are few; it shrinks when three quarters are free.

    Attributes
    ----------
    batched : bool
        Whether a step that fails has changed no row.
    """

    part: ClassVar[str]

    def __init__(self, engine: Engine, used: bool):
        self._engine, self._codec, self._used = engine, engine.codec, used
        self.batched = self._codec.batched or not used
        self._state: State = {}
        self._total = 0
        self._places: dict[int, int] = {}

    def _begin(self) -> EncoderStream | DecoderStream:
        raise NotImplementedError

    def join(self, row: int, snapshot: State | None = None) -> None:
        """Add a row, or continue one from a conversation's snapshot."""
        if not self._used:
            return
        stream = self._begin()
        if snapshot is not None:
            stream.restore(part_of(snapshot, self.part))
        if len(self._places) == self._total:
            self._resize(len(self._places) + 1, stream.state)
        place = min(set(range(self._total)) - set(self._places.values()))
        if self._total > 1:
            put_rows(self._state, [place], stream.state)
        else:
            self._state = stream.state
        self._places[row] = place
        self._settle()

    def leave(self, row: int) -> None:
        """Forget a row, if it is there."""
        if self._places.pop(row, None) is None:
            return
        if 4 * self._needed(len(self._places)) <= self._total or not self._codec.batched:
            self._resize(len(self._places), self._state)
            self._settle()

    def snapshot(self, row: int) -> State:
        """This stage's part of a conversation's state, as numpy arrays.

        Raises
        ------
        CodecError
            If the codec cannot give its state (Rust).
        """
        if not self._used:
            return {}
        return {self.part: self._codec.export_state(take_rows(self._state, [self._places[row]]))}

    def _at(self, rows: Iterable[int]) -> list[int]:
        """Where rows are in the state."""
        return [self._places[row] for row in rows]

    def _needed(self, count: int) -> int:
        return count if not self._codec.batched or not count else 1 << (count - 1).bit_length()

    def _resize(self, count: int, filler: State) -> None:
        """Move the rows into a state for ``count``; the unused rest is overwritten before it is read."""
        self._total = self._needed(count)
        if not self._total:
            self._state = {}
            return
        index = list(self._places.values())
        source = self._state if index else filler
        self._state = take_rows(source, index + [0] * (self._total - len(index)))
        self._places = {row: place for place, row in enumerate(self._places)}

    def _settle(self) -> None:
        """Evaluate the state: another thread may step, and unevaluated arrays belong to their thread."""
        arrays = [array for array in state_arrays(self._state) if isinstance(array, mx.array)]
        if arrays:
            mx.eval(arrays)


class Encode(_CodecStage):
    """Frames of sound into codes."""

    part = "encoder"

    def __init__(self, engine: Engine):
        super().__init__(engine, used=engine.user_q > 0)

    def _begin(self) -> EncoderStream:
        stream, lead = self._codec.encoder(), self._engine.lead
        if lead and not self._engine.warm_up:
            _, after = self._engine.silence()
            if after is not None:
                stream.restore(after)
            else:
                for _ in range(lead):
                    self._engine.hear_silence(stream)
        return stream

    def step(self, rows: Sequence[int], frames: Sequence[Pcm | None]) -> list[Ints]:
        """Codes [user_q] of the next frame [frame_size] of each row; None is the end of the user's sound."""
        engine = self._engine
        if not self._used:
            return [np.zeros(0, np.int32)] * len(rows)
        codes: NDArray[np.int32] = np.full((len(rows), engine.user_q), engine.audio_start_id, np.int32)
        heard = {index: frame for index, frame in enumerate(frames) if frame is not None}
        if engine.hears_end:
            silence = np.zeros(engine.frame_size, np.float32)
            pcm = np.stack([silence if frame is None else frame for frame in frames])
            encoded = self._codec.encode_step(pcm, self._state, self._at(rows))
            codes[list(heard)] = encoded[list(heard), : engine.user_q, 0]
        elif heard:
            at = self._at(rows[index] for index in heard)
            encoded = self._codec.encode_step(np.stack(list(heard.values())), self._state, at)
            codes[list(heard)] = encoded[:, : engine.user_q, 0]
        return list(codes)


class Decode(_CodecStage):
    """Codes into frames of sound."""

    part = "decoder"

    def __init__(self, engine: Engine):
        super().__init__(engine, used=engine.own_q > 0)

    def _begin(self) -> DecoderStream:
        return self._codec.decoder()

    def step(self, rows: Sequence[int], codes: Sequence[Ints | None]) -> list[Pcm]:
        """Samples [frame_size] of each row's codes; silence, and nothing changes, where there are none."""
        sound = [np.zeros(self._engine.frame_size, np.float32) for _ in rows]
        speaking = {index: one for index, one in enumerate(codes) if one is not None}
        if speaking:
            columns = np.stack(list(speaking.values()))[:, :, None]
            pcm = self._codec.decode_step(columns, self._state, self._at(rows[index] for index in speaking))
            for index, one in zip(speaking, pcm, strict=True):
                sound[index] = one
        return sound


@dataclass
class _Row:
    """The second stage's data of a conversation, apart from the generator.

    Attributes
    ----------
    name : int
        In the generator.
    opening : Opening
    opened : int
        How many of its positions have run.
    early : tuple
        Text and words that the first frame will bring.
    ended : bool
        Whether the user's sound has ended.
    """

    name: int
    text: _Text
    opening: Opening
    opened: int = 0
    frames: int = 0
    early: tuple[str, tuple[Word, ...]] = field(default=("", ()))
    ended: bool = False

    @property
    def coming(self) -> int | None:
        """The position of the opening that comes next; None when all have run."""
        return self.opened if self.opened < len(self.opening) else None


class Predict:
    """Codes into codes, text and words: the language model, one position of each row at a time.

    Parameters
    ----------
    engine : Engine
    kv_bits : {None, 8}
        Precision of the cache.
    """

    batched = True
    """Whether a step that fails has changed no row."""

    def __init__(self, engine: Engine, kv_bits: int | None = None):
        self._engine = engine
        self._generator = Generator(
            engine.lm, generation_defaults(engine.config), seeds=None, kv_bits=kv_bits, pinning=engine.pinning
        )
        self._rows: dict[int, _Row] = {}

    def join(self, row: int, settings: Settings | None = None, snapshot: State | None = None) -> None:
        """Add a row, or continue one from a conversation's snapshot. Its opening steps come first."""
        if snapshot is not None:
            self._rows[row] = self._resume(snapshot)
            return
        settings, engine = settings or Settings(), self._engine
        null = settings.null_conditions
        if null is None and settings.generation is not None and settings.generation.cfg_coef != 1.0:
            null = engine.default_null_conditions()
        opening = settings.opening or engine.opening()
        name = self._generator.join(
            settings.seed,
            config=settings.generation,
            condition=engine.default_conditions() if settings.conditions is None else settings.conditions,
            null_condition=null,
            pinned=opening.pinned,
        )
        self._rows[row] = _Row(name, _Text(engine, len(opening) - 1), opening)

    def leave(self, row: int) -> None:
        """Forget a row, if it is there."""
        held = self._rows.pop(row, None)
        if held is not None:
            self._generator.leave(held.name)

    def fill(self, row: int) -> None:
        """Let a row that has opened cost what a long conversation costs, as :meth:`Batch.fill`."""
        self._generator.fill(self._rows[row].name)

    def opening(self, row: int) -> bool:
        """Whether the row's next step is one before its first frame."""
        return self._rows[row].coming is not None

    def opened(self, row: int) -> tuple[int, int]:
        """How many of a row's opening positions have run, and how many there are."""
        held = self._rows[row]
        return held.opened, len(held.opening)

    def frames(self, row: int) -> int:
        """Frames that the row has answered."""
        return self._rows[row].frames

    def open(self, row: int) -> None:
        """Run all that comes before a row's first frame."""
        while self.opening(row):
            self.step([row], [None])

    def step(self, rows: Sequence[int], codes: Sequence[Ints | None]) -> list[Answer | None]:
        """Advance each row by one position: with codes [user_q], or with None if it is opening.

        Returns
        -------
        list of Answer or None
            None for the rows that are opening.
        """
        held = [self._rows[row] for row in rows]
        heard = [
            code if one.coming is None else one.opening.user[one.coming] for one, code in zip(held, codes, strict=True)
        ]
        given = np.stack([np.asarray(code) for code in heard]) if self._engine.user_q else None
        for one, code in zip(held, heard, strict=True):  # no codec gives start codes
            one.ended = one.ended or _is_start(code, self._engine.lm.config.audio_start_id)
        steps = self._generator.step_rows([one.name for one in held], given, **self._prompts(held))
        return [self._read(one, step) for one, step in zip(held, steps, strict=True)]

    def _prompts(self, held: Sequence[_Row]) -> dict[str, Any]:
        """What rows that are opening have to predict, and read in place of tokens."""
        opening = [(index, one.coming, one) for index, one in enumerate(held) if one.coming is not None]
        text = np.full(len(held), UNGENERATED, np.int32)
        own = np.full((len(held), self._engine.own_q), UNGENERATED, np.int32)
        embedded: dict[int, NDArray[np.float32]] = {}
        for index, at, one in opening:
            text[index], own[index] = one.opening.text[at], one.opening.own[at]
            if at < len(one.opening.embedded):
                embedded[one.name] = one.opening.embedded[at]
        if (text == UNGENERATED).all() and (own == UNGENERATED).all():
            return {"embedded": embedded}
        return {"text": text, "own_codes": own if own.size else None, "embedded": embedded}

    def _read(self, row: _Row, step: Step) -> Answer | None:
        at = row.coming
        given = at is not None and row.opening.text[at] != UNGENERATED
        text, words = ("", ()) if given else row.text.step(step)
        text, words = row.early[0] + text, row.early[1] + words
        if at is not None:
            row.opened, row.early = at + 1, (text, words)
            return None
        index, row.frames, row.early = row.frames, row.frames + 1, ("", ())
        spoken = step.codes is not None and step.codes.min() >= 0
        codes = step.codes[0] if spoken and step.codes is not None else None
        return Answer(index, codes, text, words, step, row.ended)

    def flush(self, row: int) -> tuple[str, tuple[Word, ...]]:
        """The last text and words of a row, which are complete only at its end."""
        return self._rows[row].text.flush()

    def snapshot(self, row: int) -> State:
        """This stage's part of a conversation's state.

        Raises
        ------
        StateError
            If the row is still opening.
        """
        held = self._rows[row]
        if held.coming is not None:
            raise StateError("this conversation has not begun yet: there is nothing to save")
        words = [[word.text, word.start, word.end] for word in held.early[1]]
        early = json.dumps([held.early[0], words, *[True] * held.ended])  # the last only where the sound has ended
        return {
            "generator": self._generator.snapshot([held.name]),
            "text": held.text.snapshot(),
            "early": np.frombuffer(early.encode(), np.uint8)[None].copy(),
            "frames": np.array([held.frames], np.int32),
        }

    def _resume(self, snapshot: State) -> _Row:
        try:
            said, words, *ended = json.loads(np.array(snapshot["early"], np.uint8).tobytes())
            early = str(said), tuple(Word(str(word), float(start), float(end)) for word, start, end in words)
            frames = int(np.array(snapshot["frames"]).reshape(()))
        except (KeyError, ValueError, TypeError) as error:
            raise StateError("the snapshot is damaged: it does not say what came before its next frame") from error
        if frames < 0:
            raise StateError("the snapshot is damaged: it counts fewer than no frames")
        part = part_of(snapshot, "generator")
        names = self._generator.adopt(part)
        if len(names) != 1:
            for name in names:
                self._generator.leave(name)
            raise StateError(f"a snapshot of one conversation is needed, found {len(names)}")
        opening = self._engine.opening()
        try:
            text = _Text(self._engine, self._generator.position_of(names[0]) - frames - 1)
            if self._engine.tokenizer is not None:
                text.restore(part_of(snapshot, "text"))
        except StateError:
            self._generator.leave(names[0])
            raise
        return _Row(names[0], text, opening, len(opening), frames, early, ended=ended == [True])


class _Text:
    """Text of a conversation: tokens in, display text and timed words out.

    ``before``: indices of its tokens before that of its first frame.
    """

    def __init__(self, engine: Engine, before: int):
        tokenizer = engine.tokenizer
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer()
        self._tracker = None if tokenizer is None else WordTracker(tokenizer, frame_seconds=1 / engine.frame_rate)
        self._delay = engine.lm.config.delays[0]
        # Speech-to-text writes a word some time after its sound; and there are the frames before the first. Those that
        # warm a translation model up belong to the stream.
        before -= engine.warm_up
        self._shift = float(engine.config.stt_config.get("audio_delay_seconds", 0.0)) + before / engine.frame_rate

    def step(self, step: Step) -> tuple[str, tuple[Word, ...]]:
        """The text that starts at a position, and the words that end there."""
        token = int(step.text[0])
        index = step.index + 1 - self._delay
        if self._detokenizer is None or self._tracker is None or token < 0 or index < 0:
            return "", ()
        return self._detokenizer.step(token), self._shifted(self._tracker.step(index, token))

    def flush(self) -> tuple[str, tuple[Word, ...]]:
        """The rest, which is complete only at the end."""
        if self._detokenizer is None or self._tracker is None:
            return "", ()
        return self._detokenizer.flush(), self._shifted(self._tracker.flush())

    def snapshot(self) -> State:
        if self._detokenizer is None or self._tracker is None:
            return {}
        return {"shown": self._detokenizer.snapshot(), "words": self._tracker.snapshot()}

    def restore(self, snapshot: State) -> None:
        assert self._detokenizer is not None and self._tracker is not None
        try:
            self._detokenizer.restore(part_of(snapshot, "shown"))
            self._tracker.restore(part_of(snapshot, "words"))
        except KeyError as error:
            raise StateError(f"the snapshot of a text is damaged: {error} is missing") from error

    def _shifted(self, words: Sequence[Word]) -> tuple[Word, ...]:
        if not self._shift:
            return tuple(words)
        return tuple(
            replace(word, start=max(word.start - self._shift, 0.0), end=max(word.end - self._shift, 0.0))
            for word in words
        )


def _is_start(codes: Ints | None, start: int) -> bool:
    return codes is not None and len(codes) > 0 and bool((codes == start).all())


def part_of(snapshot: State, name: str) -> State:
    """One part of a conversation's snapshot; StateError if it is missing."""
    part = snapshot.get(name)
    if not isinstance(part, dict):
        raise StateError(f"the snapshot does not fit this model: it has no part {name!r}")
    return part


def generation_defaults(config: ModelConfig, base: GenerationConfig | None = None) -> GenerationConfig:
    """The checkpoint's ``lm_gen_config`` applied to ``base``, the reference's defaults. Speech-to-text is greedy."""
    base = base or GenerationConfig()
    if config.model_type == "stt":
        return replace(base, text=GREEDY)
    saved = config.lm_gen_config
    text, audio = base.text, base.audio
    temperature = saved.get("temp_text", saved.get("text_temp"))
    text = Sampling(
        text.temperature if temperature is None else float(temperature), int(saved.get("top_k_text", text.top_k))
    )
    audio = Sampling(float(saved.get("temp", audio.temperature)), int(saved.get("top_k", audio.top_k)))
    return replace(base, text=text, audio=audio)
