"""The page in a browser: a spoken question goes in at the microphone, Moshi's words and sound come out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile as sf
from moshi_mlx_app.recording.transcript import Transcript, read_json
from moshi_mlx_app.server.connection import Talk

import moshi_mlx
from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import generation_defaults
from tests.helpers import ear

from .browser import Page, launched, site, unavailable, visit
from .serving import RATE

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
QUESTIONS = Path(moshi_mlx.__file__).parent / "assets" / "questions.wav"
WORDS = "[...document.querySelectorAll('#log span')].map((word) => word.textContent).join(' ')"
SECONDS = "document.querySelector('#elapsed').textContent.split(':').reduce((m, s) => 60 * m + Number(s), 0)"
PATIENCE = 150.0  # seconds for a conversation, which a busy machine may not hold in time


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched(QUESTIONS) as browser:
        yield browser


def talk(page: Page) -> None:
    """Press the button, and wait until the conversation has begun."""
    page.state("ready")
    page.page.click("#main")
    page.state("talking")


@dataclass
class Talked:
    """What remains of one conversation."""

    url: str
    words: str = ""
    announced: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    spoken: list[np.ndarray] = field(default_factory=list)
    heard: list[np.ndarray] = field(default_factory=list)
    in_time: bool = False
    wav: bytes = b""
    text: str = ""
    json: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Moshi and the user, int16."""
        both, rate = sf.read(io.BytesIO(self.wav), dtype="int16")
        assert rate == RATE and both.ndim == 2 and both.shape[1] == 2
        return both[:, 0], both[:, 1]


@pytest.fixture(scope="module")
def talked(browser, tmp_path_factory) -> Talked:
    """A conversation with the built-in model, which hears the recorded questions."""
    folder = tmp_path_factory.mktemp("saved")
    model = moshi_mlx.load("small")
    tap = Talk._tap

    with pytest.MonkeyPatch.context() as patch, site(model, generation=generation_defaults(model.config)) as here:
        result = Talked(here.url)

        def listening(self: Talk, heard: Any, frame: Any) -> None:
            result.heard.append(heard.copy())
            result.spoken.append(frame.pcm.copy())
            tap(self, heard, frame)

        patch.setattr(Talk, "_tap", listening)
        with visit(browser, here.url) as page:
            talk(page)
            # Three answers, and the pause behind the last; on a machine that misses questions, whatever it says.
            sentences = f"({WORDS}.match(/[.?!]/g) ?? []).length"
            page.until(f"{sentences} >= 4 || ({sentences} >= 1 && {SECONDS} > 45)", PATIENCE)
            page.page.wait_for_timeout(1500)
            page.page.keyboard.press("Escape")
            page.state("ended")
            result.figures = {name: page.text(f"#{name}") for name in ("delay", "late", "dropped", "elapsed", "model")}
            result.in_time = (result.figures["late"], result.figures["dropped"]) == ("0", "0.0 s")
            result.words = " ".join(page.page.locator("#log span").all_text_contents())
            result.announced = " ".join(page.page.locator("#announcer p").all_text_contents())
            sound, text, words = (page.saved(f"#save-{what}", folder) for what in ("sound", "text", "json"))
            result.wav, result.text = sound.read_bytes(), text.read_text("utf-8")
            result.json = json.loads(words.read_text("utf-8"))
            result.names = {"sound": sound.name, "json": words.name}
            result.complaints, result.requests = page.complaints, page.requests
    return result


def to16(frames: list[np.ndarray]) -> np.ndarray:
    return np.clip(np.rint(np.concatenate(frames) * 32768), -32768, 32767).astype("<i2")


def found(stream: np.ndarray, sound: np.ndarray, window: int = 192) -> tuple[int, int]:
    """How many of the stream's loud windows are in the sound, bit for bit and in order; and of how many. What was still
    on its way at the end, and is in one of them only, does not count."""
    inside, place, loud, until, hits = sound.astype("<i2").tobytes(), 0, 0, 0, 0
    for start in range(0, len(stream) - window + 1, window):
        piece = stream[start : start + window].astype("<i2")
        if np.abs(piece.astype(np.int32)).max() < 1000:
            continue
        loud += 1
        at = inside.find(piece.tobytes(), place)
        if at >= 0:
            hits, place, until = hits + 1, at + 2 * window, loud
    assert until > 20, f"of {loud} loud windows {hits} are there: too few to compare"
    return hits, until


def faded(figures: dict[str, str]) -> int:
    """How many windows of 8 ms may hold a fade: two for each gap, and for each backlog that was left out."""
    return 2 * (int(figures["late"]) + round(float(figures["dropped"].split()[0]) / 0.3))


def test_words_appear(talked):
    """If it fails, a person who speaks to the page does not see what Moshi says."""
    assert len(talked.words.split()) >= (5 if talked.in_time else 2)
    assert all(letter.isprintable() for letter in talked.words)
    assert talked.announced.split() == talked.words.split()  # for screen readers


def test_the_sound_that_plays_is_moshis(talked):
    """If it fails, what the loudspeaker plays is not what the server said: damaged, out of order, or not there.

    The saved recording is taken where the loudspeaker is fed. On a machine too slow for the moment, sound runs dry in
    the middle of speech, which fades edges, and backlogs are dropped."""
    played, _ = talked.sides
    right, count = found(played, to16(talked.spoken))
    print(f"{right} of {count} loud pieces of 8 ms that were played are the engine's, bit for bit: {talked.figures}")
    assert right >= count - faded(talked.figures) - 1
    right, count = found(to16(talked.spoken), played)
    print(f"{right / count:.1%} of {count} loud pieces that the engine said were played")
    if talked.in_time:
        assert right > 0.97 * count


def test_the_sound_that_plays_is_recognised(talked):
    """If it fails, what the loudspeaker plays cannot be understood, or is not what the page writes."""
    if ear.unavailable():
        pytest.skip(ear.unavailable())
    played, _ = talked.sides
    sound = played.astype(np.float32) / 32768
    judge = ear.Ear()
    # Where sound ran dry, words have holes; but Moshi's own pauses are of zeros, too, and part its answers.
    phrases = ear.phrases(sound, RATE) + ear.phrases(ear.without_gaps(sound, RATE), RATE)
    heard = {judge.hear(phrase, RATE) for phrase in phrases}
    print(f"written: {talked.words}\nheard: {heard}")
    right = [phrase for phrase in heard if phrase and phrase in ear.same(talked.words)]
    if not right and float(talked.figures["dropped"].split()[0]) > 2:
        pytest.skip(f"too slow a machine to understand a question, or to be understood: {talked.figures}")
    assert len(right) >= (2 if talked.in_time else 1)


def test_what_the_server_hears_is_the_microphone(talked):
    """If it fails, Moshi hears something else than what the recording shows, or not the question."""
    _, user = talked.sides
    # What is dropped, on a slow machine, is whole frames.
    right, count = found(to16(talked.heard), user)
    assert right == count
    # Echo cancellation and the like may change the sound, not when there is speech. The microphone was open before the
    # conversation began, so the question may be some seconds ahead; a busy browser may stammer now and then.
    question, _ = sf.read(QUESTIONS, dtype="float32", stop=len(user) + 10 * RATE)
    was, is_now = (
        np.array([np.abs(sound[i : i + 2400]).max() for i in range(0, len(sound) - 2400, 2400)])
        for sound in (question, user)
    )
    score = 0.0
    for start in range(0, len(is_now) - 50, 5):
        one = is_now[start : start + 50]
        for ahead in range(-8, 100):  # tenths of a second
            other = was[max(0, start + ahead) :][:50]
            if start + ahead >= 0 and len(other) == 50 and one.std() > 0 and other.std() > 0:
                score = max(score, float(np.corrcoef(one, other)[0, 1]))
    print(f"five seconds that lie on the question: correlation of loudness {score:.2f}")
    assert score > 0.8


def test_the_recording_has_the_length_of_the_conversation(talked):
    """If it fails, the saved wav lies about time, or its header is wrong."""
    played, user = talked.sides
    assert len(played) == len(user) == (len(talked.wav) - 44) // 4
    minutes, seconds = talked.figures["elapsed"].split(":")
    assert abs(len(user) / RATE - (60 * int(minutes) + int(seconds))) < 3
    assert abs(talked.json["duration"] - len(user) / RATE) < 0.2


def test_saved_words_carry_their_times(talked):
    """If it fails, the transcript cannot be laid beside the recording."""
    words = talked.json["words"]
    assert " ".join(word["text"] for word in words) == talked.words == talked.json["text"]
    assert all(0 <= word["start"] <= word["end"] <= word["start"] + 4 for word in words)
    assert [word["start"] for word in words] == sorted(word["start"] for word in words)
    assert talked.json["alignments"][0] == [words[0]["text"], [words[0]["start"], words[0]["end"]], "SPEAKER_MAIN"]
    assert (talked.json["model"], talked.json["sample_rate"]) == ("small", RATE)
    assert all(line.startswith("[") for line in talked.text.strip().split("\n"))
    # A word is shown a little before its sound: something of Moshi's is heard soon after the first one.
    played, _ = talked.sides
    after = played[round(words[0]["start"] * RATE) :][: (2 if talked.in_time else 60) * RATE]
    assert np.abs(after.astype(np.int32)).max() > 1000


def test_the_json_is_the_form_that_everything_here_writes(talked, tmp_path):
    """If it fails, what the page saves cannot be asked again with the verb `file`, or lacks what others' files have."""
    model = moshi_mlx.load("small")
    about = Transcript.of(model, 0, generation_defaults(model.config)).as_dict()
    assert set(talked.json) == set(about)
    assert set(talked.json["generation"]) == set(about["generation"])
    assert talked.json["complete"] is True and talked.json["channels"] == ["moshi", "user"]
    assert all(
        word["speaker"] == "moshi" and set(word) == {"text", "start", "end", "speaker"} for word in talked.json["words"]
    )
    name = talked.json["answer"]["file"]
    assert name == talked.names["sound"] and talked.names["json"] == name.replace(".wav", ".json")
    (tmp_path / name).write_bytes(talked.wav)
    path = (tmp_path / name).with_suffix(".json")
    path.write_text(json.dumps(talked.json))
    assert read_json(path) == talked.json


def test_figures_are_shown(talked):
    """If it fails, nobody sees that the conversation lags."""
    assert talked.figures["model"] == "small"
    assert talked.figures["delay"].endswith(" ms")
    assert int(talked.figures["delay"].split()[0]) >= (80 if talked.figures["dropped"] == "0.0 s" else 0)
    assert talked.figures["late"].isdigit() and talked.figures["dropped"].endswith(" s")


def test_nothing_leaves_the_origin_and_nothing_complains(talked):
    """If it fails, the page needs the internet, breaks its own content policy, or throws."""
    hosts = {urlsplit(url).netloc for url in talked.requests if not url.startswith("blob:")}
    assert hosts == {urlsplit(talked.url).netloc}
    assert talked.complaints == []


def test_keys(browser):
    """If it fails, the page cannot be used without a mouse: Tab and Space start, Space mutes, Esc ends."""
    with site() as here, visit(browser, here.url) as page:
        page.state("ready")
        for _ in range(5):
            page.page.keyboard.press("Tab")
            if page.page.evaluate("document.activeElement.id") == "main":
                break
        ring = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid"
        page.page.keyboard.press("Space")
        page.state("talking")
        page.page.keyboard.press("Space")  # the button for it has the focus
        page.until("document.querySelector('#mute').getAttribute('aria-pressed') === 'true'")
        assert "Muted" in page.text("#notice")
        page.page.evaluate("document.activeElement.blur()")
        page.page.keyboard.press("Space")  # nothing has
        page.until("document.querySelector('#mute').getAttribute('aria-pressed') === 'false'")
        page.page.click("#open-settings")
        page.page.keyboard.press("Escape")  # closes the panel alone
        page.until("!document.querySelector('#settings').open")
        assert page.state("talking") == "talking"
        page.page.keyboard.press("Escape")
        page.state("ended")
        page.page.keyboard.press("Enter")  # the focus is on the way on
        page.state("talking")
        assert page.complaints == []


def test_mute_sends_silence(browser, tmp_path):
    """If it fails, someone who pressed mute is heard."""
    heard: list[float] = []
    tap = Talk._tap

    def listening(self: Talk, frame: Any, said: Any) -> None:
        heard.append(float(np.abs(frame).max()))
        tap(self, frame, said)

    with pytest.MonkeyPatch.context() as patch, site() as here, visit(browser, here.url) as page:
        patch.setattr(Talk, "_tap", listening)
        # The server, told of it, hears nothing either; what the page sends is looked at below.
        patch.setattr(Conversation, "mute", lambda self, muted=True: None)
        talk(page)
        page.wait(lambda: max(heard, default=0) > 0.02)  # the question is heard
        page.page.click("#mute")
        page.until("document.querySelector('#mute').getAttribute('aria-pressed') === 'true'")
        captured = page.page.evaluate("document.querySelector('#elapsed').textContent")
        page.until(f"document.querySelector('#elapsed').textContent !== '{captured}'")
        count = len(heard)
        page.wait(
            lambda: len(heard) >= count + 50
        )  # more than what can be on its way, and four seconds of the question
        assert max(heard[-25:]) == 0
        page.page.click("#main")
        page.state("ended")
        both, _ = sf.read(page.saved("#save-sound", tmp_path), dtype="int16")
        assert not both[-RATE:, 1].any()


def test_a_browser_that_refuses_24_khz(browser, tmp_path):
    """If it fails, Firefox has no sound: there the audio thread must resample both ways."""
    refusing = """
    const make = AudioContext.prototype.createMediaStreamSource;
    AudioContext.prototype.createMediaStreamSource = function (stream) {
      if (this.sampleRate === 24000) throw new DOMException("different sample-rate", "NotSupportedError");
      window.rate = this.sampleRate;
      return make.call(this, stream);
    };
    """
    heard: list[float] = []
    tap = Talk._tap

    def listening(self: Talk, frame: Any, said: Any) -> None:
        heard.append(float(np.abs(frame).max()))
        tap(self, frame, said)

    with (
        pytest.MonkeyPatch.context() as patch,
        site() as here,
        visit(browser, here.url, script=refusing) as page,
    ):
        patch.setattr(Talk, "_tap", listening)
        talk(page)
        assert page.page.evaluate("window.rate") in (44100, 48000)
        page.wait(lambda: sum(loud > 0.05 for loud in heard) >= 15)
        page.page.wait_for_timeout(1000)
        figures = {name: page.text(f"#{name}") for name in ("late", "dropped")}
        page.page.click("#main")
        page.state("ended")
        both, rate = sf.read(page.saved("#save-sound", tmp_path), dtype="int16")
        assert rate == RATE and page.complaints == []
        # The parrot says back what it heard.
        assert np.abs(both[:, 1].astype(np.int32)).max() > 1000
        right, count = found(both[:, 0], both[:, 1])
        print(f"{right} of {count} loud pieces came back bit for bit: {figures}")
        assert right >= count - faded(figures) - 1


def test_settings_are_used_and_remembered(browser):
    """If it fails, temperature, top-k or seed do nothing, are lost, or are sent where nobody asked for them."""
    made: list[dict[str, Any]] = []
    from tests.helpers import parrot as birds

    with pytest.MonkeyPatch.context() as patch, site() as here, visit(browser, here.url) as page:
        patch.setattr(birds.Parrot, "begun", made)
        talk(page)
        before = made[-1]
        page.page.click("#open-settings")
        for name, value in (("text_topk", "7"), ("audio_topk", "9"), ("seed", "42")):
            page.page.fill(f"#{name}", value)
        page.page.locator("#text_temperature").fill("0.5")
        page.page.click("#anew")
        page.until("document.body.dataset.state === 'talking' && !document.querySelector('#settings').open")
        page.wait(lambda: len(made) == 2)
        now = made[-1]
        assert (now["generation"].text.top_k, now["generation"].audio.top_k, now["seed"]) == (7, 9, 42)
        assert now["generation"].text.temperature == 0.5
        assert now["generation"].audio.temperature == before["generation"].audio.temperature
        page.page.keyboard.press("Escape")
        page.page.reload()
        page.state("ready")
        page.page.click("#open-settings")
        assert page.page.input_value("#text_topk") == "7"
        page.page.click("#defaults")
        assert page.page.input_value("#text_topk") == str(before["generation"].text.top_k)
        assert page.complaints == []


WATCHED = """
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wishes) => {
  window.wishes = wishes.audio;
  return (window.stream = await ask(wishes));
};
"""
NO_SINK = "delete AudioContext.prototype.setSinkId;"


@pytest.mark.parametrize("script", [WATCHED, WATCHED + NO_SINK], ids=["context", "element"])
def test_devices_can_be_changed_while_talking(browser, script):
    """If it fails, another microphone or speaker needs a new conversation or breaks this one, or a headset that is
    pulled out ends it."""
    with site() as here, visit(browser, here.url, script=script) as page:
        talk(page)
        assert page.page.evaluate("window.wishes.echoCancellation && window.wishes.noiseSuppression")
        page.page.click("#open-settings")
        page.until("document.querySelector('#microphone').options.length > 2")
        page.until("document.querySelector('#speaker').options.length > 1")
        page.page.select_option("#microphone", index=2)
        page.until("document.querySelector('#notice').textContent.includes('microphone now')")
        page.page.select_option("#speaker", index=1)
        page.page.uncheck("#noise")
        page.until("window.wishes.noiseSuppression === false && window.wishes.deviceId.exact.length > 0")
        page.page.click("#settings .top button")
        page.page.evaluate("window.stream.getAudioTracks()[0].dispatchEvent(new Event('ended'))")
        page.until("document.querySelector('#notice').textContent.includes('unplugged')")
        assert "deviceId" not in page.page.evaluate("window.wishes")
        page.until(f"{SECONDS} > {page.page.evaluate(SECONDS) + 1}")
        assert page.complaints == [] and page.state("talking") == "talking"
