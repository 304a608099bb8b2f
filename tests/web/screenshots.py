"""Pictures of every state of the page, light and dark, at a desk and on a phone, to be looked at by a person.

    python -m tests.web.screenshots DIR
    python -m tests.web.screenshots DIR --only talking ended

The conversation is one with the built-in model, which is asked the recorded questions; the other states need no model.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moshi_mlx

from .browser import ELSEWHERE, Page, launched, site, unavailable, visit

QUESTIONS = Path(moshi_mlx.__file__).parent / "assets" / "questions.wav"
SIZES = {"desk": (1280, 800), "phone": (390, 844), "side": (844, 390)}
HANGS = "navigator.mediaDevices.getUserMedia = () => new Promise(() => {})"
NO_MICROPHONE = """
navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("not found", "NotFoundError"))
"""


class Camera:
    """Takes pictures of one state after the other.

    Parameters
    ----------
    folder : Path
    only : list of str
        States; empty: all.
    sizes : list of str
    scale : float
        Pixels of a picture for one of CSS.
    """

    def __init__(self, folder: Path, only: list[str], sizes: list[str], scale: float):
        self.folder, self.only, self.sizes, self.scale = folder, only, sizes, scale
        folder.mkdir(parents=True, exist_ok=True)

    def wants(self, *states: str) -> bool:
        return not self.only or any(state in self.only for state in states)

    def take(self, page: Page, state: str) -> None:
        """Every picture of a state; the page is left as it was."""
        if not self.wants(state):
            return
        for size in self.sizes:
            page.page.set_viewport_size(dict(zip(("width", "height"), SIZES[size])))
            for scheme in ("light", "dark"):
                page.page.emulate_media(color_scheme=scheme)
                page.page.wait_for_timeout(300)
                page.page.screenshot(path=str(self.folder / f"{state}-{size}-{scheme}.png"))
        print(state, flush=True)


@contextlib.contextmanager
def arrived(camera: Camera, url: str, state: str, browser: Any, **options: Any) -> Iterator[Page]:
    """A visitor who waits for a state."""
    with visit(browser, url, scale=camera.scale, **options) as page:
        page.state(state)
        yield page


def plain(camera: Camera, browser: Any) -> None:
    """States that come before a conversation, and instead of one."""
    cases: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
        ("asking", {}, "asking", {"script": HANGS}),
        ("denied", {}, "failed", {"allow": False}),
        ("nomic", {}, "failed", {"script": NO_MICROPHONE}),
        ("busy", {"places": 1, "longest": 0}, "failed", {}),
        ("waiting", {"places": 1}, "waiting", {}),
        ("token", {"token": "secret"}, "failed", {}),
        ("insecure", {"host": ELSEWHERE}, "failed", {}),
        ("link", {"token": "secret", "link": "https://192.168.178.23:8998/?token=" + 32 * "a"}, "ready", {}),
        ("recorded", {"record": Path("unused")}, "asking", {"script": HANGS}),
        ("still", {}, "talking", {}),
    ]
    for state, server, reached, visitor in cases:
        if not camera.wants(state):
            continue
        with site(**server) as here, contextlib.ExitStack() as others:
            at_once = state in ("token", "insecure", "link")
            if "places" in server:
                others.enter_context(here.occupied())
            url = here.url.replace("127.0.0.1", server.get("host", "127.0.0.1"))
            url += "/?token=secret" if "link" in server else ""
            with arrived(camera, url, reached if at_once else "ready", browser, **visitor) as page:
                if not at_once:
                    page.page.click("#main")
                    page.state(reached)
                if state == "still":
                    page.page.wait_for_timeout(2000)
                    go_on = here.held_up()
                    others.callback(go_on.set)
                    page.until("document.querySelector('#delay').textContent === '–'")
                camera.take(page, state)


def conversation(camera: Camera, browser: Any, words: int, seconds: float) -> None:
    """Ready, talking, muted, the settings, ended, and a server that goes away: with the built-in model."""
    from moshi_mlx.tasks.dialogue import generation_defaults

    model = moshi_mlx.load("small")
    spoken = "document.querySelectorAll('#log span').length >= {}"
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(site(model, generation=generation_defaults(model.config)))
        page = stack.enter_context(arrived(camera, here.url, "ready", browser))
        camera.take(page, "ready")
        if not camera.wants("talking", "muted", "settings", "ended", "gone"):
            return
        page.page.click("#main")
        page.state("talking")
        page.until(spoken.format(words), seconds)
        camera.take(page, "talking")
        page.page.keyboard.press("Space")
        page.page.wait_for_timeout(500)
        camera.take(page, "muted")
        page.page.click("#open-settings")
        camera.take(page, "settings")
        page.page.keyboard.press("Escape")
        page.page.keyboard.press("Escape")
        page.state("ended")
        camera.take(page, "ended")
        if camera.wants("gone"):
            page.page.click("#main")
            page.state("talking")
            page.until(spoken.format(1), seconds)
            here.close()
            page.state("failed")
            camera.take(page, "gone")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="STATE")
    parser.add_argument("--sizes", nargs="*", default=["desk", "phone"], choices=list(SIZES))
    parser.add_argument("--scale", type=float, default=2.0, help="pixels of a picture for one of CSS")
    parser.add_argument("--words", type=int, default=12, help="of Moshi's before the picture of a conversation")
    parser.add_argument("--seconds", type=float, default=60.0, help="for them")
    args = parser.parse_args(arguments)
    if unavailable():
        print(unavailable(), file=sys.stderr)
        return 1
    camera = Camera(args.folder, args.only, args.sizes, args.scale)
    with launched(QUESTIONS) as browser:
        if camera.wants("ready", "talking", "muted", "settings", "ended", "gone"):
            conversation(camera, browser, args.words, args.seconds)
        plain(camera, browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
