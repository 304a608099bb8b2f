"""``moshi-mlx-local web``: the page in the browser, and Kyutai's protocol for other clients."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_mlx.printable import printable
from moshi_mlx_app.commands.file import UNTRAINED
from moshi_mlx_app.options import (
    add_cache_option,
    add_generation_options,
    add_model_options,
    add_role_options,
    bounded,
    generation_from,
    role_from,
)
from moshi_mlx_app.recording.outputs import check_folder
from moshi_mlx_app.screen.terminal import Loading, is_terminal, say, warn

if TYPE_CHECKING:
    from moshi_mlx.tasks.dialogue import Moshi
    from moshi_mlx_app.server.server import Service
    from moshi_mlx_app.server.speech import SpeechService

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "talk in the browser; also serves Kyutai's own clients"
EXAMPLES = """\
examples:
  moshi-mlx-local web                                opens the page
  moshi-mlx-local web --no-browser --port 9000       only serves it
  moshi-mlx-local web --host 0.0.0.0 --tls           for a phone: prints a link with a token, and its QR code
  moshi-mlx-local web --record talks                 keeps every conversation: talks/*.wav, *.json

The browser gives a page the microphone on this machine, or over TLS. With --tls
a certificate is made once and kept; the browser asks whether to trust it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options and the shared ones."""
    add_model_options(parser, chosen="the best one that this machine can hold and run in time")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="localhost", metavar="H", help="name or address to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=bounded(int, 0, 65535), default=8998, metavar="N", help="port; 0: any (default: %(default)s)"
    )
    group.add_argument("--no-browser", action="store_true", help="do not open the page")
    group.add_argument(
        "--max-sessions",
        type=bounded(int, 1, 1000),
        metavar="N",
        help="how many may talk at once (default: what this machine's speed and memory allow, measured at the start)",
    )
    group.add_argument("--places", type=bounded(int, 1, 1000), dest="max_sessions", help=argparse.SUPPRESS)
    group.add_argument("--tls", action="store_true", help="encrypt, with a certificate made here")
    group.add_argument("--cert", metavar="FILE", help="encrypt with this certificate (PEM, with its chain)")
    group.add_argument("--key", metavar="FILE", help="and this key")
    group.add_argument("--record", metavar="DIR", help="record every conversation into this folder; the page says so")
    group.add_argument(
        "--stt", metavar="M", help="a speech-to-text model beside it, for Kyutai's clients of /api/asr-streaming"
    )
    group.add_argument(
        "--tts", metavar="M", help="a text-to-speech model beside it, for Kyutai's clients of /api/tts_streaming"
    )
    group.add_argument(
        "--voices",
        default="kyutai/tts-voices",
        metavar="R",
        help="the repository or folder of its voices (default: %(default)s)",
    )
    group.add_argument("--quiet", action="store_true", help="do not say who comes and goes")
    add_role_options(parser)
    add_generation_options(parser)
    add_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until someone stops it. Returns the exit status: 0, or 130 after Ctrl-C."""
    from moshi_mlx.tasks.dialogue import generation_defaults
    from moshi_mlx_app.models.fetch import load_model
    from moshi_mlx_app.server import certificates
    from moshi_mlx_app.server.access import Guard
    from moshi_mlx_app.server.engine import Engine
    from moshi_mlx_app.server.hosts import is_loopback
    from moshi_mlx_app.server.links import links, qr_text
    from moshi_mlx_app.server.protocols.kyutai import opus_missing
    from moshi_mlx_app.server.queue import Line
    from moshi_mlx_app.server.roles import Roles
    from moshi_mlx_app.server.server import Server, serve

    if args.key and not args.cert:
        args.parser.error("--key goes with --cert")
    if args.tls and args.cert:
        args.parser.error("--tls makes a certificate: leave it out where --cert gives one")
    tls, fingerprint = None, ""
    if args.cert:
        tls = certificates.given(args.cert, args.key)
    elif args.tls:
        tls, fingerprint = certificates.own(args.host)
    record = None if args.record is None else Path(args.record)
    if record is not None:
        check_folder(record, "--record")
    model = load_model(args, shown=not args.quiet)
    stt = None if args.stt is None else _stt(args)
    roles = Roles(model, role_from(args), args.voice, not args.no_pin)
    tts = None if args.tts is None else _tts(args)
    with Loading(shown=not args.quiet) as loading:
        loading("measuring how many can talk at once")
        places = int(args.max_sessions or _places(model, args.kv_bits))
    if not model.trained:
        warn(UNTRAINED.format(name=model.name), "notice")
    if opus_missing():
        warn(opus_missing(), "notice")
    token = "" if is_loopback(args.host) else secrets.token_urlsafe(24)
    if token and tls is None:
        warn("browsers give a page from another machine the microphone over TLS only: add --tls", "notice")
    if fingerprint:
        warn(f"the browser will ask whether to trust a certificate made here; its SHA-256 is {fingerprint}", "notice")
    server = Server(
        Engine(model, args.kv_bits, record, alone=places == 1),
        Guard(args.host, token),
        Line(places),
        generation_from(args, generation_defaults(model.config)),
        seed=args.seed,
        stt=stt,
        roles=roles,
        tts=tts,
        on_talk=_silent if args.quiet else _tell,
        on_fault=lambda text: warn(text, "fault"),
    )

    def ready(port: int) -> None:
        found = links("http" if tls is None else "https", args.host, port, token)
        for link in found:
            say(link)
        if token:
            server.link = found[0]
        if not args.quiet:
            if len(found) > 1:
                _tell("the first link is for other devices in this network, the second for this computer")
            if token and is_terminal(sys.stderr):
                print(qr_text(found[0], sys.stderr), file=sys.stderr, end="", flush=True)
            _tell(f"{places} can talk at once; Ctrl-C ends it")
        if not args.no_browser and _has_screen():
            # In a thread: some browsers come back only when they are closed.
            threading.Thread(target=webbrowser.open, args=(found[-1],), daemon=True).start()

    stopped = asyncio.run(serve(server, args.host, int(args.port), tls=tls, ready=ready))
    return 130 if stopped == signal.SIGINT else 0


def _stt(args: argparse.Namespace) -> Service:
    """The speech-to-text model, and as many places as it keeps up with."""
    from moshi_mlx.errors import ConfigError
    from moshi_mlx.tasks.transcribe import SpeechToText
    from moshi_mlx_app.models.fetch import load_model
    from moshi_mlx_app.server.engine import Engine
    from moshi_mlx_app.server.queue import Line
    from moshi_mlx_app.server.server import Service

    model = load_model(argparse.Namespace(**{**vars(args), "model": args.stt}), shown=not args.quiet)
    if not isinstance(model, SpeechToText):
        raise ConfigError(f"--stt {args.stt} is a model for {model.purpose}: name a speech-to-text model")
    return Service(Engine(model, args.kv_bits), Line(int(args.max_sessions or _places(model, args.kv_bits))))


def _tts(args: argparse.Namespace) -> SpeechService:
    """The text-to-speech model, for as many at once as --max-sessions says, or 32."""
    from moshi_mlx.errors import ConfigError
    from moshi_mlx.tasks.speak import TextToSpeech
    from moshi_mlx_app.models.fetch import load_model
    from moshi_mlx_app.server.speech import SpeechService

    model = load_model(argparse.Namespace(**{**vars(args), "model": args.tts}), shown=not args.quiet)
    if not isinstance(model, TextToSpeech):
        raise ConfigError(f"--tts {args.tts} is a model for {model.purpose}: name a text-to-speech model")
    return SpeechService(model, int(args.max_sessions or 32), args.kv_bits, args.voices)


def _places(model: Moshi, kv_bits: int | None) -> int:
    """How many conversations at once this machine has time and memory for, one at least."""
    import mlx.core as mx

    from moshi_mlx_app.models.catalog import room
    from moshi_mlx_app.models.measure import machine
    from moshi_mlx_app.server.places import measure_places

    found = measure_places(model, room(machine()) - mx.get_active_memory(), kv_bits=kv_bits)
    alone, frame = found.ticks[1], 1 / model.frame_rate
    if alone > 3 * frame:  # one alone has its three stages side by side
        warn(
            f"this machine takes {alone * 1e3:.0f} ms for {frame * 1e3:.0f} ms of sound: Moshi will not keep up with "
            "anyone (moshi-mlx-local check says more)"
        )
    return found.count


def _has_screen() -> bool:
    """Whether a browser could open a window; without one, a text browser would take the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass
