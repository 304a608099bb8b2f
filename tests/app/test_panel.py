"""What a person sees during a talk, on terminals of several widths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands.talk import FIGURES
from moshi_mlx_app.screen import panel as tui
from moshi_mlx_app.screen.panel import Panel, State, _panel
from moshi_mlx_app.screen.terminal import AnswerProgress, warn

from tests.helpers.screen import Screen, Terminal

WIDTHS = (60, 80, 120, 200)
STATES = (
    State(),
    State(75.0, 0.1, 0.0, 0.047, 0.12, 3, 1.25, 4, 12.0, False, False),
    State(86_399.0, 1.0, 1.0, 12.345, 3.999, 99_999, 9_999.9, 99_999, 86_399.0, True, False),
)
LONG = (
    "the system's microphone is 'Headset of somebody with a long name' now; opening it: close other programs that use "
    "it, or choose another with --input-device"
)


Look = Callable[[int], Callable[[], Screen]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Puts a terminal of some width in place of standard output and standard error; what it gives tells what is seen.

    To be called in the test itself: pytest changes both streams between a test's fixtures and the test.
    """

    def begin(width: int) -> Callable[[], Screen]:
        stream = Terminal()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        return lambda: stream.screen(width)

    return begin


def whole(screen: Screen, *sentences: str) -> None:
    """Every word stands on one line, and no line was broken by the terminal."""
    assert not screen.broken, screen.lines
    shown = " ".join(line.strip() for line in screen.lines)
    for sentence in sentences:
        assert sentence in shown, (sentence, screen.lines)
    assert max(map(len, screen.lines)) < screen.width


@pytest.mark.parametrize("width", WIDTHS)
def test_words_and_notices_keep_their_order(terminal: Look, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a notice stands above words that came before it, or cuts a word in two."""
    look = terminal(width)
    monkeypatch.setattr(tui.time, "monotonic", lambda: 0.0)
    with Panel() as panel:
        for number, text in enumerate(("The", " cap", "ital", " of", " France")):
            panel.say(2.0 + 0.08 * number, text)
            if text == " cap":
                panel.notice(LONG)
                panel.notice("recorded: talks/one.wav")
            panel.show(STATES[1])
        panel.notice("a new conversation")
        panel.restart()
        panel.say(0.1, "Hello.")
        panel.show(STATES[0])
        whole(look(), "0.1 s  Hello.")
    screen = look()
    said = ["2.0 s  The capital", LONG, "recorded: talks/one.wav", "of France", "a new conversation", "0.1 s  Hello."]
    whole(screen, *said)
    shown = " ".join(line.strip() for line in screen.lines)
    for first, second in pairwise(said):
        assert shown.index(first) < shown.index(second), screen.lines
    assert "latency" not in shown, "the panel leaves with the talk"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_notice_does_not_wait_for_a_model_that_is_silent(
    terminal: Look, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, what is wrong with the devices is said only when the model speaks again."""
    look = terminal(width)
    now = 0.0
    monkeypatch.setattr(tui.time, "monotonic", lambda: now)
    with Panel() as panel:
        panel.say(1.0, "Hel")
        panel.notice("the microphone has gone quiet", "warning")
        panel.say(1.0, "")
        assert "quiet" not in "".join(look().lines)
        now = 1.0
        panel.say(1.0, "")
        whole(look(), "1.0 s  Hel warning: the microphone has gone quiet")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_panel_fits(terminal: Look, width: int, state: State) -> None:
    """If this fails, a narrow terminal shows half a figure, or none."""
    look = terminal(width)
    text = "Ask me for the capital of France, the opposite of hot, two plus three, or the day after Monday, whatever"
    with Panel() as panel:
        panel.say(10.0, text)
        panel.show(state)
        screen = look()
        fields = [field for line in _panel(state, True, 1000) for field in line.split("   ")]
        whole(screen, *(field.strip() for field in fields), "10.0 s  Ask me")
        for word in text.split():
            assert any(word in line.split() for line in screen.lines)
        assert _panel(state, True, width - 1) == screen.lines[-len(_panel(state, True, width - 1)) :]
    assert [line for line in look().lines if line][-1].endswith("whatever")


@pytest.mark.parametrize("width", WIDTHS)
def test_sentences_before_and_after_the_panel_are_whole(terminal: Look, width: int) -> None:
    """If this fails, the terminal breaks the program's sentences inside words."""
    look = terminal(width)
    path = "/a/folder/with/a/very/long/name" * 8
    warn(LONG, "model")
    whole(look(), LONG)
    warn(f"wrote {path} to the disk", "recording")
    assert path in "".join(look().lines), "a path stays in one piece, to be copied"


@pytest.mark.parametrize("width", WIDTHS)
def test_an_answer_to_a_recording_is_whole(terminal: Look, width: int) -> None:
    """If this fails, long lines of an answer are broken inside words."""
    look = terminal(width)
    with AnswerProgress(10.0) as progress:
        for number in range(200):
            progress.frame(0.05 * number, " conversation")
    screen = look()
    whole(screen, "0.0 s  conversation conversation")
    assert {word for line in screen.lines for word in line.split() if word.isalpha() and word != "s"} == {
        "conversation"
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_check_is_whole(terminal: Look, width: int) -> None:
    """If this fails, what check reports is broken inside words."""
    look = terminal(width)
    assert main(["check", "--no-sound", "--frames", "4"]) in (0, 1)
    published = "published models, by what they are for; a step,"
    whole(look(), published, "talk takes  small, the built-in one: no published model")


def test_every_figure_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a figure of the panel is explained nowhere, or what is explained is not shown."""
    figures = _panel(STATES[1], False, 1000)[-1].split("   ")
    assert [field.split()[0] for field in figures] == list(FIGURES)
    assert main(["talk", "--help"]) == 0
    said = capsys.readouterr().out
    for name, text in FIGURES.items():
        assert f"  {name} " in said and text.split(":")[0].split()[-1] in said
    assert "? what the figures mean" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80, "a terminal of 80 columns shows no line broken"
