"""The page in headless Chromium, with a fake microphone that plays a file, before a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from .serving import FRAME, RATE, SOON, Served, serving

__all__ = ["ELSEWHERE", "Page", "Site", "chromium", "launched", "quiet_wav", "site", "unavailable", "visit"]


ELSEWHERE = "moshi.test"


def chromium() -> str:
    """The browser's path; empty if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return os.environ.get("MOSHI_CHROMIUM") or next((path for path in map(shutil.which, names) if path), "")


@functools.cache
def unavailable() -> str:
    """Why the browser cannot be driven; empty if it can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package playwright is not installed"
    if not chromium():
        return "there is no Chromium (Debian: apt-get install chromium)"
    # Ubuntu's package is a program that says where else to look.
    try:
        works = subprocess.run([chromium(), "--version"], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return "" if works else f"{chromium()} does not run"


class Site:
    """A server in a thread of its own.

    Attributes
    ----------
    served : Served
        To be looked at only: it lives in its own loop.
    url : str
    """

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop, over: asyncio.Event):
        self.served, self.url, self._loop, self._over = served, served.url, loop, over

    def close(self) -> None:
        """Let the server end."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._over.set)

    def held_up(self) -> threading.Event:
        """Let the server stand still, as if its process were suspended, until the event is set."""
        go_on = threading.Event()
        self._loop.call_soon_threadsafe(lambda: go_on.wait(SOON))
        return go_on

    @contextlib.contextmanager
    def occupied(self) -> Iterator[None]:
        """Somebody else talks meanwhile."""
        begun, over = threading.Event(), asyncio.Event()

        async def talk() -> None:
            async with self.served.client() as client:
                await client.begun()
                begun.set()
                while not over.is_set():  # a place needs sound
                    await client.socket.send_bytes(b"\x10" + bytes(2 * FRAME))
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(over.wait(), FRAME / RATE)

        task = asyncio.run_coroutine_threadsafe(talk(), self._loop)
        try:
            assert begun.wait(SOON)
            yield
        finally:
            self._loop.call_soon_threadsafe(over.set)
            task.result(timeout=SOON)


@contextlib.contextmanager
def site(model: Any = None, *, generation: Any = None, **options: Any) -> Iterator[Site]:
    """A server in a thread; see :func:`tests.web.serving.serving`."""
    begun: Future[Site] = Future()

    async def run() -> None:
        async with serving(model, **options) as served:
            if generation is not None:
                served.server.generation = generation
            over = asyncio.Event()
            begun.set_result(Site(served, asyncio.get_running_loop(), over))
            await over.wait()

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            if not begun.done():
                begun.set_exception(error)
            raise

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    here = begun.result(timeout=SOON)
    try:
        yield here
    finally:
        here.close()
        thread.join(timeout=SOON)


class Page:
    """A visited page.

    Attributes
    ----------
    page : playwright.sync_api.Page
    complaints : list of str
        What the console said as an error, and what threw.
    requests : list of str
        Addresses that were asked for.
    """

    def __init__(self, page: Any):
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))

    def state(self, *names: str, seconds: float = SOON) -> str:
        """Wait until the page is in one of these states."""
        chosen = ",".join(f'body[data-state="{name}"]' for name in names)
        self.page.wait_for_selector(chosen, timeout=seconds * 1e3)
        return str(self.page.evaluate("document.body.dataset.state"))

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def until(self, expression: str, seconds: float = SOON) -> Any:
        """Wait until an expression in the page is true; its value. The page's policy forbids it to evaluate strings, so
        the browser is asked from outside, again and again."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.page.evaluate(expression)
            if value:
                return value
            assert time.monotonic() < deadline, f"never true: {expression}"
            self.page.wait_for_timeout(50)

    def wait(self, happened: Callable[[], bool], seconds: float = SOON) -> None:
        """Wait until something outside of the page is true."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, "it never happens"
            self.page.wait_for_timeout(50)

    def saved(self, button: str, folder: Path) -> Path:
        """Press a button that saves a file; the file."""
        with self.page.expect_download() as waiting:
            self.page.click(button)
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path


@contextlib.contextmanager
def launched(question: Path | None = None) -> Iterator[Any]:
    """A browser without pages. While it is there, this thread cannot run an event loop of its own.

    Parameters
    ----------
    question : path, optional
        A wav that the microphone plays once, from when a page opens it; else it is silent. ``ELSEWHERE`` is a name of
        this machine that the browser does not trust.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        wav = question or quiet_wav(Path(folder, "quiet.wav"))
        flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
        flags += ["--mute-audio", "--autoplay-policy=user-gesture-required", "--use-fake-device-for-media-stream"]
        flags += [f"--use-file-for-fake-audio-capture={wav}%noloop", f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
        browser = driver.chromium.launch(
            executable_path=chromium(),
            args=flags,
            timeout=2e3 * SOON,
            chromium_sandbox=getattr(os, "geteuid", lambda: 1)() != 0,
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(
    browser: Any,
    url: str,
    *,
    allow: bool = True,
    size: tuple[int, int] = (900, 700),
    dark: bool = False,
    calm: bool = True,
    scale: float = 1.0,
    script: str = "",
) -> Iterator[Page]:
    """A person with a browser profile of their own comes to the page.

    Parameters
    ----------
    browser : playwright.sync_api.Browser
    url : str
    allow : bool
        Whether the person allows the microphone.
    size : tuple of int
        CSS pixels.
    dark, calm : bool
        The person's wishes: a dark page, little motion (which costs less, too).
    scale : float
        Device pixels for one of CSS.
    script : str
        Runs in the page before the page's own.
    """
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce" if calm else "no-preference",
        device_scale_factor=scale,
        accept_downloads=True,
        permissions=["microphone"] if allow else [],
    )
    context.set_default_timeout(1e3 * SOON)
    try:
        if script:
            context.add_init_script(script)
        page = Page(context.new_page())
        page.page.goto(url)
        yield page
    finally:
        context.close()


def quiet_wav(path: Path, seconds: float = 1.0) -> Path:
    """A wav of digital silence."""
    sf.write(path, np.zeros(round(seconds * RATE), np.float32), RATE)
    return path
