"""The verb ``web`` as a program: what it prints, how it ends, and its encryption."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands import web
from moshi_mlx_app.models import fetch as fetching
from moshi_mlx_app.server import certificates, places
from moshi_mlx_app.server.links import links, qr_svg, qr_text

from moshi_mlx.errors import ConfigError
from tests.helpers.parrot import Parrot

from .serving import SOON, Client, install, serving, tone

ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def program(*arguments: str, state: Path, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """The program with the parrot; its state and caches in a folder of the test's. It does not outlive the ``with``."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "HOME": str(state), "XDG_CACHE_HOME": str(state)}
    environment.update(PYTHONUTF8="1", TERM="xterm", COLUMNS="100")
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (ROOT, ROOT / "app", ROOT / "quantize"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.parrot", "web", "--port", "0", "--no-browser", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def printed(process: subprocess.Popen[str], form: str) -> str:
    """The link that it prints."""
    assert process.stdout is not None
    link = process.stdout.readline().strip()  # empty where it ended before
    if not re.fullmatch(form, link):
        process.kill()
        raise AssertionError((link, process.communicate()[1]))
    return link


def test_ctrl_c_closes_everything_with_a_reason(tmp_path):
    """If it fails, ending the server hangs, prints a traceback, or leaves clients without a word."""

    async def talk(link: str, process: subprocess.Popen[str]) -> tuple[str, int]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{link}api/chat?audio=pcm") as socket:
            client = Client(socket)
            await client.begun()
            assert (await client.say(tone(2)) == tone(2)).all()
            process.send_signal(signal.SIGINT)
            return await client.end()

    with program("--places", "1", state=tmp_path) as process:
        link = printed(process, r"http://localhost:\d+/")
        assert asyncio.run(talk(link, process)) == ("", 1001)
        _, told = process.communicate(timeout=SOON)
        assert process.returncode == 130
        assert "1 can talk at once" in told and "Traceback" not in told


def test_elsewhere_there_is_a_token_and_with_tls_a_certificate(tmp_path):
    """If it fails, what others can reach is open, or its link does not work."""

    async def look(link: str, trusted: ssl.SSLContext) -> list[int]:
        found = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session:
            origin, _, query = link.partition("/?")
            for path in (f"/api/info?{query}", "/api/info", f"/api/info?{query}x"):
                async with session.get(origin + path) as answer:
                    found.append(answer.status)
        return found

    with program("--places", "1", "--host", "0.0.0.0", "--tls", state=tmp_path) as process:
        link = printed(process, r"https://[^/]+:\d+/\?token=[\w-]{32}")
        if "//localhost:" not in link:  # a machine with a network
            here = printed(process, r"https://localhost:\d+/\?token=[\w-]{32}")
            assert here.partition("?")[2] == link.partition("?")[2]
        made = next(tmp_path.rglob("certificate.pem"))
        assert made.stat().st_mode & 0o777 == 0o600
        trusted = ssl.create_default_context(cafile=str(made))
        assert asyncio.run(look(re.sub(r"//[^/]+:", "//localhost:", link), trusted)) == [200, 403, 403]
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=SOON)
        assert process.returncode == 0
        fingerprint = re.search(r"SHA-256 is ([0-9A-F:]{95})", told)
        assert fingerprint and "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--key", "k.pem"], "--key goes with --cert"),
        (["--tls", "--cert", "c.pem"], "leave it out"),
        (["--cert", "nothing.pem"], "nothing.pem: No such file"),
        (["--places", "0"], "--places"),
        (["--port", "70000"], "--port"),
        (["--places", "1", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--places", "1", "--host", "192.0.2.1"], "--host takes a name or an address of this machine"),
        (["--record", __file__], "name a folder"),
        (["--kv-bits", "7"], "--kv-bits"),
    ],
)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, arguments, said):
    """If it fails, a wrong option ends in a traceback, or in a line that does not name it."""
    monkeypatch.setattr(fetching, "load_model", lambda *_, **__: Parrot())
    assert main(["web", "--no-browser", *arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_a_port_in_use_is_named(monkeypatch, capsys):
    """If it fails, a second server ends in a traceback, or takes the port from the first."""
    monkeypatch.setattr(fetching, "load_model", lambda *_, **__: Parrot())

    async def run() -> str:
        async with serving() as served:
            port = served.url.rpartition(":")[2]
            arguments = ["web", "--no-browser", "--places", "1", "--host", "127.0.0.1", "--port", port]
            assert await asyncio.to_thread(main, arguments) == 1
            return port

    port = asyncio.run(run())
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}: " in told and told.rstrip().endswith("--port N takes another")


def test_links_with_their_keys_and_a_code():
    """If it fails, the printed link leads this computer or a phone to a page without its key."""
    assert links("http", "localhost", 8998, "") == ["http://localhost:8998/"]
    assert links("https", "192.168.1.5", 1, "key") == ["https://192.168.1.5:1/?token=key"]
    assert links("https", "::1", 1, "") == ["https://[::1]:1/"]
    far, *near = links("https", "0.0.0.0", 8998, "key")
    assert far.endswith(":8998/?token=key") and near in ([], ["https://localhost:8998/?token=key"])
    assert qr_svg(far).startswith(b"<svg") and b"#fff" in qr_svg(far)

    class Terminal(io.StringIO):
        encoding = "utf-8"

    drawn = qr_text("https://192.168.178.123:8998/?token=" + 32 * "a", Terminal()).splitlines()
    assert len(drawn) <= 22 and len({len(line) for line in drawn}) == 1 and len(drawn[0]) < 72
    Terminal.encoding = "ascii"
    assert qr_text(far, Terminal()) == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_code_for_the_phone_on_a_terminal(tmp_path):
    """If it fails, a link of 70 letters has to be typed into a phone."""
    near, far = os.openpty()
    with program("--places", "1", "--host", "0.0.0.0", state=tmp_path, stderr=far) as process:
        os.close(far)
        printed(process, r"http://[^/]+:\d+/\?token=[\w-]{32}")
        told = b""
        while b"Ctrl-C" not in told:
            told += os.read(near, 65536)
    os.close(near)
    assert "▀" in told.decode() and told.count(b"\x1b[38;5;231;48;5;16m") > 15 and b"--tls" in told


def test_own_certificate(tmp_path, monkeypatch):
    """If it fails, the browser asks at every start, or a certificate without this machine's name is used."""
    first, printed = certificates.own("moshi.example", tmp_path)
    path = tmp_path / "certificate.pem"
    kept = path.read_bytes()
    assert certificates.own("moshi.example", tmp_path)[1] == printed and path.read_bytes() == kept
    names = x509.load_pem_x509_certificate(kept).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "moshi.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert "127.0.0.1" in map(str, names.get_values_for_type(x509.IPAddress))
    assert path.stat().st_mode & 0o777 == 0o600 and b"PRIVATE KEY" in kept
    certificates.own("other.example", tmp_path)
    other = path.read_bytes()
    assert other != kept
    path.write_bytes(b"damaged")
    certificates.own("other.example", tmp_path)
    monkeypatch.setattr(certificates, "_RENEW_BEFORE", datetime.timedelta(days=398))
    before = path.read_bytes()
    certificates.own("other.example", tmp_path)
    assert path.read_bytes() != before and first is not None
    with pytest.raises(ConfigError, match="cannot be used"):
        path.write_bytes(b"nothing")
        certificates.given(str(path), None)


def test_a_conversation_over_tls(monkeypatch, tmp_path):
    """If it fails, the microphone of a phone cannot be used: browsers want encryption for it."""
    install(monkeypatch)
    tls, _ = certificates.own("localhost", tmp_path)
    trust = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python does from 3.13

    async def run() -> None:
        async with serving(tls=tls, trust=trust) as served:
            origin = served.url.replace("https://", "http://")
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with served.client(headers={"Origin": origin}):
                    pass
            async with served.client(headers={"Origin": served.url}) as client:
                await client.begun()
                assert (await client.say(tone(4)) == tone(4)).all()

    asyncio.run(run())


def test_places_are_measured_with_what_talks_will_use(monkeypatch):
    """If it fails, --kv-bits, which costs time on a CPU, promises more places than the machine has the time for."""
    used: list[Any] = []

    def measure_places(model: Any, room: float, *, kv_bits: int | None) -> places.Places:
        used.append(kv_bits)
        return places.Places(3, {1: 0.01})

    monkeypatch.setattr(places, "measure_places", measure_places)
    assert web._places(Parrot(), 8) == 3 and used == [8]
