"""How words become lines."""

from __future__ import annotations

from moshi_mlx_app.terminal import Lines, printable


def lines(*pieces: tuple[float, str]) -> list[str]:
    """Everything that comes out for these pieces."""
    feed = Lines()
    out = [line for seconds, text in pieces for line in feed.feed(seconds, text)]
    return [*out, *feed.flush()]


def test_a_line_ends_with_its_sentence() -> None:
    """If this fails, the whole answer is one endless line, or breaks inside sentences."""
    said = lines((0.1, " Hello"), (0.2, " there"), (0.3, "."), (0.4, " Fine"), (0.5, " day."))
    assert said == ["    0.1 s  Hello there.", "    0.4 s  Fine day."]


def test_a_dot_inside_a_number_does_not_end_a_line() -> None:
    """If this fails, 3.14 stands on two lines."""
    assert lines((0.0, "3"), (0.1, "."), (0.2, "14")) == ["    0.0 s  3.14"]


def test_a_pause_ends_a_line_as_soon_as_it_is_one() -> None:
    """If this fails, the last words before a long silence appear when it is over."""
    feed = Lines()
    assert feed.feed(1.0, "One") == []
    assert feed.feed(1.5, "") == [] and feed.current == "    1.0 s  One"
    assert feed.feed(2.3, "") == ["    1.0 s  One"]
    assert feed.current == "" and feed.flush() == []


def test_endless_text_is_cut() -> None:
    """If this fails, an untrained model's text grows in memory for ever."""
    assert max(map(len, lines(*((0.0, " word") for _ in range(500))))) < 120
    assert max(map(len, lines(*((0.0, "xxxx") for _ in range(500))))) < 230


def test_control_characters_do_not_reach_the_terminal() -> None:
    """If this fails, a model can clear the screen or retitle the window by what it says."""
    assert printable("a\x1b[2Jb\x07\r\n\u2028c é 你") == "a [2Jb    c é 你"
    assert "\x1b" not in lines((0.0, "\x1b[31mred"))[0]
