"""Speech from flite, espeak-ng and festival, with phone and word times.

The first two are libraries reached through ctypes, so nothing is compiled and no process is started; festival is a
process that is kept. None of them is thread-safe: every call holds one lock. This module knows voices and phones; it
does not know what is said.

A *speaker* is a voice that a listener would tell from the others. ``HELD_OUT`` speakers are never used in training,
under any rate, pitch or accent, and one synthesizer is left out wholly (`speakers`).
"""

from __future__ import annotations

import ctypes as C
import ctypes.util
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 24000
LABEL_RATE = 25  # phone labels a second: two for each 80 ms frame of codes
LABEL_SAMPLES = SAMPLE_RATE // LABEL_RATE
LEVEL_DB = -23.0  # root mean square of every utterance, dB below full scale

PHONES = (
    "pau aa ae ah ax ao aw ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
).split()
PHONE_INDEX = {name: index for index, name in enumerate(PHONES)}

ANSWERING_VOICE = "flite/slt"  # the model's own voice: repeats exactly

# espeak-ng: <accent>+<variant>. The variant is the speaker, the accent is only how it pronounces.
ESPEAK_ACCENTS = ("en-us", "en-us", "en-us", "en", "en-gb-x-rp")
ESPEAK_TRAINING = (
    "f1 f2 f3 f4 m1 m3 m4 m5 m6 m7 Alex Alicia Andrea Andy Annie Denis Gene Gene2 Hugo Jacky Lee Marco Mario Michael "
    "Mike adam anika antonio aunty belinda benjamin boris david ed edward iven john linda max michel miguel norbert "
    "pablo paul pedro quincy rob robert sandro shelby steph steph2 steph3 travis victor zac"
).split()
ESPEAK_HELD_OUT = "f5 m2 m8".split()

TRAINING = (
    ANSWERING_VOICE,
    "flite/awb",
    "flite/kal16",
    *(f"espeak/{variant}" for variant in ESPEAK_TRAINING),
)
HELD_OUT = ("flite/rms", *(f"espeak/{variant}" for variant in ESPEAK_HELD_OUT))

# What the synthesizers have besides: every accent of English, whispers, old people, Klatt's synthesis, foreign names;
# not the robots. festival's kal is flite's, its slt the answering voice, synthesized in other ways.
ALL_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
ESPEAK_MORE = (
    "AnxiousAndy Diogo Henrique Nguyen RicishayMax RicishayMax2 RicishayMax3 Tweaky caleb croak edward2 grandma "
    "grandpa gustave iven2 iven3 iven4 kaukovalta klatt klatt2 klatt3 klatt4 klatt5 klatt6 marcelo whisper whisperf"
).split()
MORE = ("flite/kal", *(f"espeak/{variant}" for variant in ESPEAK_MORE))
FESTIVAL = ("festival/kal_diphone", "festival/ked_diphone", "festival/cmu_us_slt_arctic_hts")
SYNTHESIZERS = ("flite", "espeak", "festival")
EVERYONE = (*TRAINING, *HELD_OUT, *MORE, *FESTIVAL)  # indices of voices in data are into this

_INSTALL = "install them with 'apt install flite espeak-ng' (Debian, Ubuntu) or 'brew install flite espeak-ng'"
_INSTALL_FESTIVAL = (
    "install it with 'apt install festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts' (Debian, Ubuntu)"
)
_LOCK = threading.RLock()


class SpeechUnavailable(RuntimeError):
    """A synthesizer's library or voice is not on this machine. The message says how to get it."""


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence.

    Attributes
    ----------
    pcm : array [samples], float32, 24 kHz, ``LEVEL_DB`` loud
    phones : (name from ``PHONES``, end in seconds), in order
    words : (as written, without punctuation; start in seconds), one for each word of the text, in order
    """

    pcm: NDArray[np.float32]
    phones: tuple[tuple[str, float], ...]
    words: tuple[tuple[str, float], ...]

    def labels(self, count: int, offset: float = 0.0) -> NDArray[np.uint8]:
        """Phone under the middle of each of ``count`` spans of 40 ms, the sentence starting at ``offset`` seconds.

        Returns array [count], uint8, indices into ``PHONES``; silence is ``pau``, 0.
        """
        out = np.zeros(count, np.uint8)
        start = offset
        for name, end in self.phones:
            end += offset
            out[int(start * LABEL_RATE + 0.5) : int(end * LABEL_RATE + 0.5)] = PHONE_INDEX[name]
            start = end
        return out


def speakers(left_out: str = "festival") -> tuple[str, ...]:
    """Every speaker that may be heard in training, the answering voice too: all but ``HELD_OUT`` and ``left_out``."""
    return tuple(voice for voice in EVERYONE if voice not in HELD_OUT and not voice.startswith(f"{left_out}/"))


def unheard(left_out: str = "festival") -> tuple[str, ...]:
    """The speakers of the synthesizer that is left out wholly, to judge by."""
    return tuple(voice for voice in EVERYONE if voice.startswith(f"{left_out}/"))


def load_library(*names: str) -> C.CDLL:
    """The first of these shared libraries that can be loaded; raises SpeechUnavailable naming them."""
    for name in names:
        for path in (f"lib{name}.so.1", ctypes.util.find_library(name)):
            if path is not None:
                try:
                    return C.CDLL(path, mode=C.RTLD_GLOBAL)
                except OSError:
                    continue
    raise SpeechUnavailable(f"no shared library {' or '.join(names)} was found: {_INSTALL}")


def seed_noise(seed: int) -> None:
    """Unvoiced sounds are made with the C library's rand(): seeded, a sentence repeats exactly."""
    C.CDLL(None).srand(seed)


class _Wave(C.Structure):  # flite's cst_wave
    _fields_ = [
        ("type", C.c_char_p),
        ("sample_rate", C.c_int),
        ("num_samples", C.c_int),
        ("num_channels", C.c_int),
        ("samples", C.POINTER(C.c_short)),
    ]


class _Relation(C.Structure):  # flite's cst_relation
    _fields_ = [(name, C.c_void_p) for name in ("name", "features", "utterance", "head", "tail")]


class _Voice(C.Structure):  # the head of flite's cst_voice
    _fields_ = [("name", C.c_char_p), ("features", C.c_void_p)]


@dataclass(frozen=True)
class _Raw:
    sample_rate: int
    pcm: NDArray[np.int16]
    phones: list[tuple[str, float]]
    starts: list[float]  # of the words of ``spans``


def spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand in it: [begin, end) in characters, without punctuation around them."""
    return [match.span() for match in re.finditer(r"\w(?:\S*\w)?", text)]


class Flite:
    """Flite 2.x. Its voices are functions in libraries of their own."""

    def __init__(self) -> None:
        self.lib = lib = load_library("flite")
        load_library("flite_cmulex")
        load_library("flite_usenglish")
        pointer, text = C.c_void_p, C.c_char_p
        for name, result, arguments in (
            ("flite_init", C.c_int, []),
            ("flite_synth_text", pointer, [text, pointer]),
            ("utt_wave", C.POINTER(_Wave), [pointer]),
            ("utt_relation", C.POINTER(_Relation), [pointer, text]),
            ("item_next", pointer, [pointer]),
            ("item_feat_string", text, [pointer, text]),
            ("ffeature_float", C.c_float, [pointer, text]),
            ("delete_utterance", None, [pointer]),
            ("feat_set_float", None, [pointer, text, C.c_float]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.flite_init()
        self.voices: dict[str, Any] = {}

    def voice(self, name: str) -> Any:
        if name not in self.voices:
            library = load_library(f"flite_cmu_us_{name}")
            register = getattr(library, f"register_cmu_us_{name}")
            register.restype, register.argtypes = C.c_void_p, [C.c_char_p]
            pointer = register(None)
            if not pointer:
                raise SpeechUnavailable(f"flite could not make its voice {name!r}: {_INSTALL}")
            self.voices[name] = pointer
        return self.voices[name]

    def say(self, text: str, voice: str, stretch: float) -> _Raw:
        lib, voice_pointer = self.lib, self.voice(voice)
        features = C.cast(voice_pointer, C.POINTER(_Voice)).contents.features
        lib.feat_set_float(features, b"duration_stretch", stretch)  # kept by the voice: set it every time
        utterance = lib.flite_synth_text(text.encode("ascii", "ignore"), voice_pointer)
        if not utterance:
            raise SpeechUnavailable(f"flite could not speak {text!r}")
        try:
            wave = lib.utt_wave(utterance)
            if not wave or wave.contents.num_samples <= 0:
                raise SpeechUnavailable(f"flite spoke nothing for {text!r}")
            samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
            phones = self._items(utterance, b"Segment", b"end")
            # A token is a word as written, its words are how it is read ("what's" is two, a number several). It starts
            # where the segment before its first one ends.
            tokens = self._items(utterance, b"Token", b"daughter1.R:SylStructure.daughter1.daughter1.R:Segment.p.end")
            starts = [start for _, start in tokens]
            if len(starts) != len(spans(text)) or starts != sorted(starts):
                raise SpeechUnavailable(f"flite does not say when the words of {text!r} start")
            return _Raw(wave.contents.sample_rate, samples, phones, starts)
        finally:
            lib.delete_utterance(utterance)

    def _items(self, utterance: Any, relation: bytes, time: bytes) -> list[tuple[str, float]]:
        found = self.lib.utt_relation(utterance, relation)
        item = found.contents.head if found else None
        out = []
        while item:
            name = self.lib.item_feat_string(item, b"name")
            out.append(((name or b"").decode(), float(self.lib.ffeature_float(item, time))))
            item = self.lib.item_next(item)
        return out


class _EventId(C.Union):
    _fields_ = [("number", C.c_int), ("name", C.c_char_p), ("string", C.c_char * 8)]


class _Event(C.Structure):  # espeak_EVENT
    _fields_ = [
        ("type", C.c_int),
        ("unique_identifier", C.c_uint),
        ("text_position", C.c_int),
        ("length", C.c_int),
        ("audio_position", C.c_int),
        ("sample", C.c_int),
        ("user_data", C.c_void_p),
        ("id", _EventId),
    ]


_CALLBACK = C.CFUNCTYPE(C.c_int, C.POINTER(C.c_short), C.c_int, C.POINTER(_Event))
_WORD_EVENT, _PHONE_EVENT = 1, 7
_SYNCHRONOUS, _PHONE_EVENTS, _UTF8 = 2, 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4

# espeak-ng's own phoneme names. Only English ones; anything else is reported by ``espeak_phone``.
_ESPEAK_PHONES = {
    "aa": "A A: A@ A~ A:r",
    "ae": "a & aa a2",
    "ah": "V V2",
    "ax": "@ a# @5 @2 @- 3# @L2",
    "ao": "0 O O: O@ O2 o: 02 0# O:r",
    "aw": "aU aU@ aw",
    "ay": "aI aI@ aI3 aI2 ai",
    "b": "b",
    "ch": "tS",
    "d": "d d#",
    "dh": "D",
    "eh": "E e e@ E2 E#",
    "er": "3 3: 3:r @r",
    "ey": "eI e:",
    "f": "f",
    "g": "g",
    "hh": "h",
    "ih": "I I2 I# I@ i@3 I2#",
    "iy": "i i: i@",
    "jh": "dZ",
    "k": "k x",
    "l": "l @L l# l/",
    "m": "m m-",
    "n": "n n-",
    "ng": "N",
    "ow": "oU o@ oU#",
    "oy": "OI",
    "p": "p",
    "r": "r r- r/ *",
    "s": "s",
    "sh": "S",
    "t": "t t# t2 ?",
    "th": "T",
    "uh": "U U@ U2",
    "uw": "u u: u2",
    "v": "v",
    "w": "w w#",
    "y": "j",
    "z": "z z#",
    "zh": "Z",
}
_FROM_ESPEAK = {name: phone for phone, names in _ESPEAK_PHONES.items() for name in names.split()}
_FROM_FLITE = {"ax": "ax", "dx": "d", "nx": "n", "axr": "er", "el": "l", "em": "m", "en": "n", "ix": "ih"}


def espeak_phone(name: str) -> str:
    """A name from ``PHONES`` for espeak-ng's; stress marks are ignored, pauses and unknown names are ``pau``."""
    name = name.lstrip("',%=_:|")
    while name:
        if name in _FROM_ESPEAK:
            return _FROM_ESPEAK[name]
        name = name[:-1]
    return "pau"


def word_starts(text: str, events: Sequence[tuple[int, float]], seconds: float) -> list[float]:
    """When each word of ``spans(text)`` starts, from espeak-ng's word events: (character of the text, start).

    Events and words are not one to one. espeak-ng says some pairs as one word and sends one event for "of the", or two
    that both point into the first ("it is"); the word left over begins inside, by its share of the letters. Up to
    version 1.51 it also sends a word of no length in the pause after a clause, where a sentence before had a word: it
    uses its list of phonemes again and does not reset the flag of the last one. The caller leaves those out.
    """
    places = spans(text)
    starts: list[float | None] = [None] * len(places)
    last = -1
    for at, start in events:
        index = max((i for i, (begin, _) in enumerate(places) if begin <= at), default=0)
        index = max(index, last + 1)
        if index < len(places):
            starts[index], last = start, index
    starts[0] = starts[0] or 0.0
    known = [i for i, start in enumerate(starts) if start is not None]
    out: list[float] = []
    for i, j in zip(known, [*known[1:], len(places)], strict=True):
        begin = starts[i]
        end = starts[j] if j < len(places) else seconds
        assert begin is not None and end is not None
        letters = np.cumsum([0, *(b - a for a, b in places[i:j])])
        out += (begin + (end - begin) * letters[:-1] / letters[-1]).tolist()
    return out


class Espeak:
    """espeak-ng, in synchronous mode: audio and events arrive through a callback before ``say`` returns."""

    def __init__(self) -> None:
        self.lib = lib = load_library("espeak-ng")
        lib.espeak_Initialize.argtypes = [C.c_int, C.c_int, C.c_char_p, C.c_int]
        lib.espeak_SetVoiceByName.argtypes = [C.c_char_p]
        lib.espeak_SetParameter.argtypes = [C.c_int, C.c_int, C.c_int]
        lib.espeak_Synth.argtypes = [
            C.c_char_p, C.c_size_t, C.c_uint, C.c_int, C.c_uint, C.c_uint, C.c_void_p, C.c_void_p,
        ]  # fmt: skip
        self.sample_rate = lib.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONE_EVENTS)
        if self.sample_rate <= 0:
            raise SpeechUnavailable(f"espeak-ng did not find its data files: {_INSTALL}")
        self.audio: list[NDArray[np.int16]] = []
        self.events: list[tuple[int, int, int, int, bytes]] = []
        self.callback = _CALLBACK(self._receive)  # held here: the library keeps only its address
        lib.espeak_SetSynthCallback.argtypes = [_CALLBACK]
        lib.espeak_SetSynthCallback(self.callback)

    def _receive(self, wave: Any, count: int, events: Any) -> int:
        try:
            if wave and count > 0:
                self.audio.append(np.ctypeslib.as_array(wave, (count,)).copy())
            index = 0
            while events and events[index].type != 0:
                event = events[index]
                self.events.append(
                    (event.type, event.text_position, event.length, event.sample, bytes(event.id.string))
                )
                index += 1
        except Exception:  # an exception cannot cross the library: stop speaking, say() sees no audio
            self.audio.clear()
            return 1
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int, intonation: int) -> _Raw:
        lib = self.lib
        self.audio.clear()
        self.events.clear()
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechUnavailable(f"espeak-ng has no voice {voice!r}: {_INSTALL}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, intonation)):
            lib.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        if lib.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None) != 0 or not self.audio:
            raise SpeechUnavailable(f"espeak-ng could not speak {text!r}")
        samples = np.concatenate(self.audio)
        starts = [(e[4].split(b"\0")[0].decode("utf8", "ignore"), e[3] / self.sample_rate) for e in self.events
                  if e[0] == _PHONE_EVENT]  # fmt: skip
        ends = [start for _, start in starts[1:]] + [len(samples) / self.sample_rate]
        phones = [(name, end) for (name, _), end in zip(starts, ends, strict=True)]
        events = [(p - 1, s / self.sample_rate) for k, p, n, s, _ in self.events if k == _WORD_EVENT and n > 0]
        return _Raw(self.sample_rate, samples, phones, word_starts(text, events, len(samples) / self.sample_rate))


class Festival:
    """Festival, as a process that reads Scheme and is kept; sound comes through a file."""

    _SAY = """(define (speak text file)
      (let ((utt (utt.synth (eval (list 'Utterance 'Text text)))))
        (utt.save.wave utt file 'riff)
        (mapcar (lambda (s) (format t "phone %s %f\\n" (item.name s) (item.feat s "end")))
          (utt.relation.items utt 'Segment))
        (mapcar (lambda (s) (if (not (item.parent s)) (format t "word %f\\n" (item.feat s
          "daughter1.R:SylStructure.daughter1.daughter1.R:Segment.p.end")))) (utt.relation.items utt 'Token))))"""
    _END = "that is all"

    def __init__(self) -> None:
        try:
            self.process = subprocess.Popen(
                ["festival", "--pipe"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="latin-1",
            )
        except OSError as error:
            raise SpeechUnavailable(f"festival cannot be started ({error.strerror}): {_INSTALL_FESTIVAL}") from None
        self.folder = tempfile.TemporaryDirectory(prefix="festival-")
        self.voice = ""
        self.run(self._SAY)

    def run(self, scheme: str) -> list[list[str]]:
        """What festival prints, by line and word."""
        assert self.process.stdin is not None and self.process.stdout is not None
        lines: list[list[str]] = []
        wrong = ""
        try:
            self.process.stdin.write(f'{scheme}\n(format t "\\n{self._END}\\n") (fflush nil)\n')
            self.process.stdin.flush()
        except OSError:
            raise SpeechUnavailable("festival has ended") from None
        for line in self.process.stdout:
            if line.strip() == self._END:
                if wrong:
                    raise SpeechUnavailable(f"festival: {wrong}")
                return lines
            if "SIOD ERROR" in line:
                wrong = line.strip()
            lines.append(line.split())
        raise SpeechUnavailable("festival has ended")

    def say(self, text: str, voice: str, stretch: float, pitch: float) -> _Raw:
        if voice != self.voice:
            try:
                self.run(f"(voice_{voice})")
            except SpeechUnavailable:
                raise SpeechUnavailable(f"festival has no voice {voice!r}: {_INSTALL_FESTIVAL}") from None
            self.voice = voice
        mean = round(105 * pitch)  # of diphone voices; an HTS voice has its own
        self.run(f"(Parameter.set 'Duration_Stretch {stretch:.3f})")
        self.run(f"(set! int_lr_params '((target_f0_mean {mean}) (target_f0_std {mean // 7})"
                 " (model_f0_mean 170) (model_f0_std 34)))")  # fmt: skip
        path = os.path.join(self.folder.name, "said.wav")
        quoted = text.encode("ascii", "ignore").decode().replace("\\", "").replace('"', "")
        lines = self.run(f'(speak "{quoted}" "{path}")')
        import soundfile

        samples, rate = soundfile.read(path, dtype="int16")
        phones = [(line[1], float(line[2])) for line in lines if line[:1] == ["phone"]]
        starts = [float(line[1]) for line in lines if line[:1] == ["word"]]
        if len(starts) != len(spans(text)) or starts != sorted(starts):
            raise SpeechUnavailable(f"festival does not say when the words of {text!r} start")
        return _Raw(int(rate), samples, phones, starts)


@cache
def festival() -> Festival:
    with _LOCK:
        return Festival()


@cache
def flite() -> Flite:
    with _LOCK:
        return Flite()


@cache
def espeak() -> Espeak:
    with _LOCK:
        return Espeak()


def resample(pcm: NDArray[np.floating[Any]], rate: int, to: int = SAMPLE_RATE) -> NDArray[np.float32]:
    """pcm [samples] at ``rate`` Hz as ``to`` Hz; float32."""
    return pcm.astype(np.float32) if rate == to else soxr.resample(pcm.astype(np.float32), rate, to)


def say(
    text: str,
    voice: str = ANSWERING_VOICE,
    rng: np.random.Generator | None = None,
    accents: Sequence[str] = ESPEAK_ACCENTS,
) -> Utterance:
    """Speak a sentence.

    Parameters
    ----------
    text : English
    voice : ``flite/<name>``, ``espeak/<variant>`` or ``festival/<name>``
    rng : varies rate, pitch, intonation and vocal tract (of the answering voice, only the noise in its breath);
        None speaks plainly and repeats exactly
    accents : of espeak-ng, of which ``rng`` draws one

    Raises
    ------
    SpeechUnavailable : the library or the voice is missing, or it spoke nothing
    """
    engine, _, name = voice.partition("/")
    vary = rng is not None and voice != ANSWERING_VOICE
    r = rng if rng is not None else np.random.default_rng(0)
    with _LOCK:
        if engine == "flite":
            stretch = float(r.uniform(0.85, 1.25)) if vary else 1.0
            seed_noise(int(r.integers(1 << 30)))
            raw = flite().say(text, name, stretch)
            phones = [(_FROM_FLITE.get(p, p) if p in _FROM_FLITE or p in PHONE_INDEX else "pau", t)
                      for p, t in raw.phones]  # fmt: skip
        elif engine == "espeak":
            accent = accents[int(r.integers(len(accents)))] if vary else "en-us"
            rate, pitch, intonation = r.integers((125, 30, 30), (191, 71, 71)) if vary else (155, 50, 50)
            if name not in (
                *ESPEAK_TRAINING,
                *ESPEAK_HELD_OUT,
                *ESPEAK_MORE,
            ):  # espeak-ng itself ignores a variant it does not know
                raise SpeechUnavailable(f"no speaker {voice!r}: {', '.join((*TRAINING, *HELD_OUT, *MORE))}")
            seed_noise(int(r.integers(1 << 30)))
            raw = espeak().say(text, f"{accent}+{name}", int(rate), int(pitch), int(intonation))
            phones = [(espeak_phone(p), t) for p, t in raw.phones]
        elif engine == "festival":
            stretch, pitch = r.uniform((0.85, 0.85), (1.25, 1.35)) if vary else (1.0, 1.0)
            raw = festival().say(text, name, float(stretch), float(pitch))
            phones = [(_FROM_FLITE.get(p, p) if p in _FROM_FLITE or p in PHONE_INDEX else "pau", t)
                      for p, t in raw.phones]  # fmt: skip
        else:
            raise SpeechUnavailable(
                f"no synthesizer {engine!r} (voice {voice!r}): use flite/<name>, espeak/<variant> or festival/<name>"
            )
    # A shorter or longer vocal tract is the same sound played at another rate: it moves pitch and formants together.
    warp = int(r.integers(46, 56)) if vary else 50
    rate_in = raw.sample_rate * warp // 50
    seconds = raw.sample_rate / rate_in
    pcm = resample(raw.pcm / 32768.0, rate_in)
    pcm = pcm * np.float32(10 ** (LEVEL_DB / 20) / max(1e-4, float(np.sqrt(np.mean(pcm**2)))))
    return Utterance(
        np.clip(pcm, -1, 1).astype(np.float32),
        tuple((p, t * seconds) for p, t in phones),
        tuple((text[a:b], start * seconds) for (a, b), start in zip(spans(text), raw.starts, strict=True)),
    )
