"""What the page says where it cannot talk, on screens of any size; and its parts that count samples."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from moshi_mlx_app.server.server import STATIC

import moshi_mlx
from tests.helpers.parrot import Parrot

from .browser import ELSEWHERE, Page, launched, site, unavailable, visit
from .serving import RATE

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
QUESTIONS = Path(moshi_mlx.__file__).parent / "assets" / "questions.wav"
NO_MICROPHONE = """
navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("not found", "NotFoundError"))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched(QUESTIONS) as browser:
        yield browser


@pytest.fixture(scope="module")
def bench(browser) -> Iterator[Any]:
    """A page whose parts are tried out one by one."""
    with site() as here, visit(browser, here.url) as page:
        yield page.page


def failed(page: Page, press: bool = True) -> str:
    """Everything that the page says once it has failed."""
    if press:
        page.state("ready")
        page.page.click("#main")
    page.state("failed")
    assert page.text("#main-name") == "Try again" and page.page.is_enabled("#main")
    return page.text("#lead")


def test_the_microphone_is_refused(browser):
    """If it fails, someone who pressed the wrong button does not learn how to undo it."""
    with site() as here, visit(browser, here.url, allow=False) as page:
        assert "Moshi cannot hear you" in failed(page) and "beside the address" in page.text("#steps")
        page.page.context.grant_permissions(["microphone"])
        page.page.click("#main")
        page.state("talking")
        assert page.complaints == []


def test_there_is_no_microphone(browser):
    """If it fails, a computer without a microphone gets a blank page or a wrong reason."""
    with site() as here, visit(browser, here.url, script=NO_MICROPHONE) as page:
        assert "There is no microphone" in failed(page) and page.complaints == []


def test_an_address_that_browsers_do_not_trust(browser):
    """If it fails, who opens the page from another device without TLS is not told what to do."""
    with site(host=ELSEWHERE) as here, visit(browser, here.url.replace("127.0.0.1", ELSEWHERE)) as page:
        said = failed(page, press=False)
        assert "--tls" in said and f"http://localhost:{here.url.rsplit(':', 1)[1]}" in said


def test_the_token_of_the_link(browser):
    """If it fails, a link without its token is not explained, or one with it does not let in."""
    with site(token="secret") as here, visit(browser, here.url) as page:
        assert "missing its key" in failed(page, press=False)
        page.page.goto(f"{here.url}/?token=secret")
        page.state("ready")
        page.page.click("#main")
        page.state("talking")


def test_busy_and_in_line(browser):
    """If it fails, whoever comes second is not told, never gets a turn, or holds a place after giving up."""
    with site(places=1, longest=1) as here, visit(browser, here.url) as page:
        with here.occupied():
            page.state("ready")
            page.page.click("#main")
            page.state("waiting")
            assert page.text("#headline") == "You are next"
            page.page.keyboard.press("Escape")
            page.state("ready")
            page.wait(lambda: here.served.server.line.waiting == 0)
            page.page.click("#main")
            page.state("waiting")
            with visit(browser, here.url) as third:
                assert "Everyone is talking" in failed(third)
        page.state("talking")
        assert page.complaints == []


def test_the_server_goes_away(browser, tmp_path):
    """If it fails, a page whose server was stopped pretends to talk, or loses what was recorded."""
    with site() as here, visit(browser, here.url) as page:
        page.state("ready")
        page.page.click("#main")
        page.state("talking")
        page.until("document.querySelector('#elapsed').textContent >= '0:02'")
        here.close()
        page.state("failed")
        assert "server is gone" in page.text("#headline") and "moshi-mlx-local web" in page.text("#steps")
        both, rate = sf.read(page.saved("#save-sound", tmp_path))
        assert rate == RATE and len(both) >= 1.5 * RATE


def test_a_fault_of_the_model_is_said(browser):
    """If it fails, a conversation that broke ends without a reason."""
    with site(Parrot(fails_at=4)) as here, visit(browser, here.url) as page:
        assert "broken on purpose" in failed(page)


def test_it_fits_on_the_screen(browser):
    """If it fails, a button lies outside of a phone's screen or is too small for a finger, or the page can be pushed
    sideways."""
    with site() as here, visit(browser, here.url) as page:
        for state in ("ready", "talking", "ended"):
            page.state(state)
            for size in [(320, 568), (390, 844), (844, 390), (1280, 800)]:
                page.page.set_viewport_size({"width": size[0], "height": size[1]})
                whole = page.page.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                )
                assert whole[0] <= size[0] and whole[1] <= size[1], (state, size, whole)
                for button in page.page.locator("button:visible").all():
                    box = button.bounding_box()
                    assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], (state, size, box)
                    assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], (state, size, box)
                    assert box["width"] >= 44 and box["height"] >= 44, (state, size, box)
            page.page.click("#main")


def test_colours_can_be_read():
    """If it fails, text is too faint for its background, light or dark (WCAG 2.2, 1.4.3: 4.5 to 1)."""
    style = (STATIC / "style.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    )

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        for text, ground in [("ink", "paper"), ("soft", "paper"), ("moshi", "paper"), ("user-text", "paper")] + [
            ("warn", "paper"),
            ("moshi-ink", "moshi"),
            ("ink", "raised"),
        ]:
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground, theme[text], theme[ground])


def test_nothing_is_fetched_from_elsewhere():
    """If it fails, the page does not work offline, or breaks the content policy that the server sends."""
    for path in STATIC.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "").replace("http://localhost${", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]+/", text), path.name
        assert not re.search(r"\son\w+=|\sstyle=|<script>|<style", text), path.name


PLAY = """async ([late, stall]) => {
  const { Jitter } = await import("/jitter.js");
  const rate = 24000, frame = 1920, jitter = new Jitter(rate, frame);
  // Frames of a ramp that never repeats within a second, arriving by the given lateness in ms.
  let made = 0, worst = 0, before = null, held = [];
  const out = new Float32Array(128);
  for (let now = 0; now < 60 * rate; now += 128) {
    const due = () => (made + 1) * frame + 24 * (late[made % late.length] + (made >= 400 && made < 420 ? stall : 0));
    while (made < 750 && now >= due()) {
      const samples = new Float32Array(frame);
      for (let i = 0; i < frame; i += 1) samples[i] = 0.5 * Math.sin((made * frame + i) * 2 * Math.PI * 200 / rate);
      jitter.push(samples);
      made += 1;
    }
    jitter.pull(out);
    for (const value of out) {
      if (before !== null) worst = Math.max(worst, Math.abs(value - before));
      before = value;
    }
    if (now % (rate * 5) < 128) held.push(jitter.written - jitter.read);
  }
  return { worst, held, underruns: jitter.underruns, dropped: jitter.dropped, trimmed: jitter.trimmed };
}"""


def test_playback_is_gapless_and_bounded(bench):
    """If it fails, Moshi's voice clicks, runs dry on a steady line, or comes later and later after a stall.

    A sine of 200 Hz and amplitude 0.5 moves at most 0.026 a sample; a click is a larger step."""
    steady = bench.evaluate(PLAY, [[0, 5, 12, 3, 20], 0])
    assert (steady["underruns"], steady["dropped"]) == (0, 0) and steady["worst"] < 0.03
    assert max(steady["held"]) <= 1920 + 0.06 * RATE
    # Twenty frames come 1.5 s late, all at once: one gap, then the delay is back where it was.
    stalled = bench.evaluate(PLAY, [[0, 5, 12], 1500])
    assert 1 <= stalled["underruns"] <= 2 and stalled["dropped"] > 0.5 * RATE
    assert stalled["worst"] < 0.05 and stalled["held"][-2] <= 0.35 * RATE
    shaky = bench.evaluate(PLAY, [[0, 10, 90, 20, 0, 130, 40], 0])
    assert shaky["underruns"] <= 6 and shaky["worst"] < 0.05


RESAMPLE = """async ([from, to, hertz]) => {
  const { Resampler } = await import("/resample.js");
  const resampler = new Resampler(from, to), all = [];
  for (let start = 0; start < from; start += 128) {
    const block = new Float32Array(128);
    for (let i = 0; i < 128; i += 1) block[i] = 0.5 * Math.sin(2 * Math.PI * hertz * (start + i) / from);
    all.push(...resampler.push(block));
  }
  return all;
}"""


@pytest.mark.parametrize("rates", [(48000, 24000), (44100, 24000), (24000, 48000), (24000, 44100)])
def test_resampling(bench, rates):
    """If it fails, browsers that refuse 24 kHz distort both voices, or fold high sounds down into speech."""
    sound = np.array(bench.evaluate(RESAMPLE, [*rates, 1000]))
    assert abs(len(sound) - rates[1]) < 150
    middle = sound[2000:-2000]
    angle = 2 * np.pi * 1000 * np.arange(len(middle)) / rates[1]
    parts = np.stack([np.sin(angle), np.cos(angle)], 1)
    fit = parts @ np.linalg.lstsq(parts, middle, rcond=None)[0]
    snr = 10 * np.log10(np.sum(fit**2) / np.sum((middle - fit) ** 2))
    assert snr > 70 and abs(np.abs(fit).max() - 0.5) < 0.005
    if rates[0] > rates[1]:
        folded = np.array(bench.evaluate(RESAMPLE, [*rates, 15000]))[2000:-2000]
        assert np.abs(folded).max() < 0.5e-3  # 60 dB down


WORDS = """async (pieces) => {
  const { Words, Recording } = await import("/keep.js");
  const words = new Words();
  for (const [piece, time] of pieces) words.add(piece, time);
  const recording = new Recording(24000);
  const side = (value, count) => new Int16Array(count).fill(value);
  for (let i = 0; i < 2000; i += 1) recording.add(side(i, 384), side(-i, 384));
  const bytes = new Uint8Array(await recording.wav().arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return [words.timed(), words.text(), btoa(text)];
}"""


def test_words_and_recording(bench):
    """If it fails, pieces become wrong words or times, or a recording of more than 30 s is put together wrongly."""
    pieces = [[" Hel", 1.0], ["lo", 1.08], [",", 1.16], [" I", 1.4], [" am Mo", 1.48], ["shi.", 1.56], [" Yes", 61.0]]
    words, text, wav = bench.evaluate(WORDS, pieces)
    assert [word["text"] for word in words] == ["Hello,", "I", "am", "Moshi.", "Yes"]
    assert words[0] == {"text": "Hello,", "start": 1.0, "end": 1.4}
    assert words[-1] == {"text": "Yes", "start": 61.0, "end": 61.48}
    assert text == "[0:01] Hello, I am Moshi.\n[1:01] Yes\n"
    both, rate = sf.read(io.BytesIO(base64.b64decode(wav)), dtype="int16")
    assert rate == RATE and both.shape == (2000 * 384, 2)
    np.testing.assert_array_equal(both[::384, 0], np.arange(2000))
    np.testing.assert_array_equal(both[383::384, 1], -np.arange(2000))


def test_a_link_for_another_device(browser):
    """If it fails, the page of a server that others can reach leads them nowhere, or to a link without its key."""
    link = "https://192.168.1.5:8998/?token=secret"
    with site(token="secret", link=link) as here, visit(browser, f"{here.url}/?token=secret") as page:
        page.state("ready")
        assert page.text("#elsewhere-link") == link and "phone" in page.text("#elsewhere")
        size = page.until("document.querySelector('#elsewhere-code').naturalWidth")
        assert size > 100 and page.complaints == []
        page.page.click("#main")
        page.state("talking")
        assert not page.page.is_visible("#elsewhere")
    with site() as here, visit(browser, here.url) as page:
        page.state("ready")
        assert not page.page.is_visible("#elsewhere")
    with site(host=ELSEWHERE, token="secret") as here:
        url = here.url.replace("127.0.0.1", ELSEWHERE)
        with visit(browser, f"{url}/?token=secret") as page:  # without TLS: no microphone there
            said = failed(page, press=False)
            assert f"http://localhost:{here.url.rsplit(':', 1)[1]}/?token=secret" in said


def test_it_says_that_the_server_records(browser, tmp_path):
    """If it fails, people are recorded without their knowing."""
    with site(record=tmp_path) as here, visit(browser, here.url) as page:
        page.state("ready")
        assert "keeps a recording" in page.text("#notice")
        page.page.click("#main")
        page.state("talking")
        assert "keeps a recording" in page.text("#log")


COUNTED = """
const send = WebSocket.prototype.send;
Object.defineProperty(window, "sent", { value: { bytes: 0 } });
WebSocket.prototype.send = function (message) {
  window.sent.bytes += message.byteLength;
  return send.call(this, message);
};
"""


def test_a_server_that_stands_still(browser):
    """If it fails, a server that is suspended for some seconds is a page that shows a growing delay, sends on, and is
    thrown out when the server goes on."""
    with site() as here, visit(browser, here.url, script=COUNTED) as page:
        page.state("ready")
        page.page.click("#main")
        page.state("talking")
        page.until("document.querySelector('#elapsed').textContent >= '0:02'")
        go_on = here.held_up()
        try:
            page.until("document.querySelector('#notice').textContent.includes('Nothing comes')")
            assert page.text("#delay") == "–"
            page.page.wait_for_timeout(500)
            sent = page.page.evaluate("window.sent.bytes")
            page.page.wait_for_timeout(4000)
            assert page.page.evaluate("window.sent.bytes") == sent  # nothing that would only be heard too late
        finally:
            go_on.set()
        page.until("document.querySelector('#notice').textContent.includes('catching up')")
        page.until("parseInt(document.querySelector('#delay').textContent) < 1500", 20)
        page.page.wait_for_timeout(2000)
        assert page.state("talking") == "talking" and page.complaints == []
        assert "does not keep up" not in page.text("#notice")
