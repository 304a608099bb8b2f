"""How words become lines."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

from moshi_mlx_app.screen.terminal import Lines

from moshi_mlx.printable import printable


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
    assert max(map(len, lines(*((0.0, " word") for _ in range(500))))) < 90
    assert max(map(len, lines(*((0.0, "xxxx") for _ in range(500))))) < 190


def test_control_characters_do_not_reach_the_terminal() -> None:
    """If this fails, a model can clear the screen or retitle the window by what it says."""
    assert printable("a\x1b[2Jb\x07\r\n\u2028c é 你") == "a [2Jb    c é 你"
    assert printable("safe\u202egnp.exe \u2066x\u2069 \ud800") == "safe gnp.exe  x   "
    assert "\x1b" not in lines((0.0, "\x1b[31mred"))[0]


PROGRAM = """
import sys, time, moshi_mlx
from tests.app.conftest import FakeModel
fake = FakeModel()
fake.on_frame = lambda index: time.sleep(0.004)
moshi_mlx.load = fake.load
from moshi_mlx_app.cli import main
sys.exit(main(['file', '--demo', '-o', 'a.wav']))
"""


def on_a_terminal(folder: Path, stop_at: bytes | None = None) -> tuple[str, int]:
    """Run the program on a terminal of its own; ``stop_at`` presses Ctrl-C once that was shown."""
    root = Path(__file__).resolve().parents[2]
    child, master = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm", COLUMNS="100", LINES="24", PYTHONPATH=f"{root}{os.pathsep}{root / 'app'}")
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if not select.select([master], [], [], 1)[0]:
            continue
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
        if stop_at is not None and stop_at in shown:
            os.write(master, b"\x03")
            stop_at = None
    os.close(master)
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_on_a_terminal_there_is_a_bar_and_every_line(tmp_path: Path) -> None:
    """If this fails, the bar writes over the words, or a person sees nothing until the end."""
    shown, status = on_a_terminal(tmp_path)
    assert status == 0
    assert re.search(r"of 42\.6 s .*RTF \d\.\d\d", shown) and "\x1b[" in shown
    # What stays: a line that is followed by a line break, and not by the cursor going back over it.
    for start in ("    0.1 s  Hello there.", "    1.7 s  Fine day."):
        assert re.search(re.escape(start) + r"\s*\r\n", shown), start
    assert "a.wav: 42.6 s" in shown.splitlines()[-2] and (tmp_path / "a.wav").exists()


def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    """If this fails, Ctrl-C leaves a hidden cursor, a traceback, or half a file under the final name."""
    shown, status = on_a_terminal(tmp_path, stop_at=b"Fine day.")
    assert status == 130 and "Traceback" not in shown
    assert "stopped: the first" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert {path.name for path in tmp_path.iterdir()} == {"a.partial.wav", "a.partial.json"}
