"""Who may come in: names, origins, tokens, and nothing but the page's own files."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import aiohttp
import pytest
from moshi_mlx_app.server.access import Bucket
from moshi_mlx_app.server.hosts import is_loopback, own_names, reachable
from yarl import URL

from .serving import SOON, Client, Served, install, serving

TOKEN = "a-token-of-some-length"


async def status(served: Served, path: str, **headers: str) -> int:
    async with served.session.get(URL(served.url + path, encoded=True), headers=headers) as answer:
        await answer.read()
        return answer.status


def ask(path: str, host: str = "127.0.0.1", token: str = "", **headers: str) -> int:
    """The status of one request to a server that listens on ``host``."""

    async def run() -> int:
        async with serving(host=host, token=token) as served:
            return await status(served, path, **{name.replace("_", "-"): value for name, value in headers.items()})

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["localhost:8998", "127.0.0.1", "[::1]:8998", "LOCALHOST"])
def test_names_of_this_machine_are_fine(name):
    """If it fails, a link that someone typed, or a forwarded port, does not work."""
    assert ask("/api/info", Host=name) == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example", "evil.example:8998", "localhost.evil.example", "", "192.168.1.9", "[", "a b", "[::1", "::1"]
    + [
        "a;script-src *@localhost",
        "evil@localhost",
        "localhost:8998;",
        "localhost:99999999",
        "localhost/",
        "[localhost]",
    ],
)
def test_foreign_names_are_turned_away(name):
    """If it fails, a site whose name is pointed at this machine (DNS rebinding) can talk through the server."""
    assert ask("/api/info", Host=name) == 403
    assert ask("/", Host=name) == 403


def test_two_names_at_once_are_turned_away():
    """If it fails, this server and a proxy before it may each believe another of the two."""

    async def run() -> bytes:
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.url).port)
            writer.write(b"GET / HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), SOON)
            writer.close()
            return answer

    # The HTTP library refuses it itself in its later versions.
    assert asyncio.run(run()).startswith((b"HTTP/1.0 403", b"HTTP/1.0 400"))


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:3000", "https://{host}", "file://", "http://{host}.evil"],
)
def test_pages_of_other_origins_cannot_open_the_socket(monkeypatch, origin):
    """If it fails, any page that someone looks at can listen and talk through this server."""
    install(monkeypatch)

    async def run() -> None:
        async with serving() as served:
            host = served.url.removeprefix("http://")
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with served.client(headers={"Origin": origin.format(host=host)}):
                    pass
            assert error.value.status == 403
            async with served.client(headers={"Origin": f"http://{host}"}) as client:
                await client.begun()

    asyncio.run(run())


def test_what_the_browser_says_about_a_request_is_believed():
    """If it fails, another site's page can make the browser ask for what is only this page's."""
    assert ask("/api/info", Sec_Fetch_Site="cross-site") == 403
    assert ask("/api/info", Sec_Fetch_Site="same-origin") == 200
    assert ask("/api/chat", Sec_Fetch_Site="none") == 426


@pytest.mark.parametrize("name", ["192.168.1.9:8998", "localhost", "moshi.example"])
def test_elsewhere_a_token_is_asked_for(name):
    """If it fails, everyone in the network can talk on this machine, or nobody with the printed link."""
    options = {"host": "0.0.0.0" if name[0] == "1" else "moshi.example", "token": TOKEN, "Host": name}
    assert ask("/api/info", **options) == 403
    assert ask("/api/info?token=", **options) == 403
    assert ask(f"/api/info?token={TOKEN}x", **options) == 403
    assert ask("/api/info?token=%FF%00", **options) == 403
    assert ask("/api/chat", **options) == 403
    assert ask(f"/api/info?token={TOKEN}", **options) == 200
    assert ask(f"/api/chat?token={TOKEN}", **options) == 426
    assert ask("/api/info", **options, Authorization=f"Bearer {TOKEN}") == 200
    basic = base64.b64encode(f"moshi:{TOKEN}".encode()).decode()
    assert ask("/api/info", **options, Authorization=f"Basic {basic}") == 200
    for wrong in ("Basic ????", "Basic", "Bearer", f"Digest {TOKEN}"):
        assert ask("/api/info", **options, Authorization=wrong) == 403


def test_foreign_names_are_turned_away_elsewhere_too():
    """If it fails, rebinding is only as far away as the token's secrecy."""
    assert ask(f"/api/info?token={TOKEN}", host="0.0.0.0", token=TOKEN, Host="evil.example") == 403


PATHS = [
    "/../server.py", "/..%2fserver.py", "/%2e%2e/server.py", "/static/../../server.py", "//etc/passwd", "/etc/passwd",
    "/%2fetc%2fpasswd", "/..\\server.py", "/page/../../secret.txt", "/secret.txt", "/link.txt", "/out/secret.txt",
    "/.hidden", "/page/.hidden", "/page", "/page/", "/index.html/", "/index.html%00", "/nothing", "/api/",
    "/api/chat/x",
]  # fmt: skip


def test_no_file_outside_the_page(tmp_path: Path):
    """If it fails, a link can read files of this machine."""
    static = tmp_path / "static"
    (static / "page").mkdir(parents=True)
    (static / "index.html").write_text("<p>page")
    (static / "page" / "a.js").write_text("1")
    (static / ".hidden").write_text("secret")
    (static / "page" / ".hidden").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    (static / "link.txt").symlink_to(tmp_path / "secret.txt")
    (static / "out").symlink_to(tmp_path)

    async def run() -> None:
        async with serving(static=static) as served:
            for path, kind in (("/", "text/html"), ("/index.html", "text/html"), ("/page/a.js", "text/javascript")):
                async with served.session.get(served.url + path) as answer:
                    assert (answer.status, answer.content_type) == (200, kind)
            # Below the client library, which would tidy these paths up.
            for path in PATHS:
                reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.url).port)
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                answer = await reader.read()
                writer.close()
                assert answer.startswith((b"HTTP/1.0 404", b"HTTP/1.0 400")), (path, answer[:200])
                assert b"secret" not in answer and b"import" not in answer
            for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
                async with served.session.request(method, served.url + "/index.html") as answer:
                    assert answer.status in (404, 405)

    asyncio.run(run())


def test_every_answer_is_strict(tmp_path: Path):
    """If it fails, something slipped into the page could load or send what it likes, or another site could frame it."""
    (tmp_path / "index.html").write_text("<p>page")

    async def run() -> None:
        async with serving(static=tmp_path) as served:
            for path, expected in (("/", 200), ("/nothing", 404), ("/api/info", 200), ("/api/chat", 426)):
                async with served.session.get(served.url + path) as answer:
                    assert answer.status == expected
                    headers = answer.headers
                    policy = headers["Content-Security-Policy"]
                    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
                    assert "unsafe" not in policy and "*" not in policy and "http:" not in policy
                    assert f"ws://{served.url.removeprefix('http://')}" in policy
                    assert headers["X-Content-Type-Options"] == "nosniff"
                    assert headers["Referrer-Policy"] == "no-referrer"
                    assert "Access-Control-Allow-Origin" not in headers
                    assert headers["Server"] == "moshi-mlx-local"  # and no versions
            for host in ("evil.example; script-src *", "a;script-src *@localhost", "evil;@127.0.0.1"):
                async with served.session.get(served.url, headers={"Host": host}) as answer:
                    policy = answer.headers["Content-Security-Policy"]
                    assert answer.status in (400, 403) and "evil" not in policy and "*" not in policy

    asyncio.run(run())


def test_idle_connections_make_room(monkeypatch):
    """If it fails, connections that say nothing keep everyone else out."""
    install(monkeypatch)
    monkeypatch.setattr("moshi_mlx_app.server.listener._CONNECTIONS", 5)

    async def run() -> None:
        async with serving() as served, served.client() as client:
            await client.begun()
            idle = [await asyncio.open_connection("127.0.0.1", URL(served.url).port) for _ in range(12)]
            assert (await served.info())["free"] == 1
            assert (await asyncio.wait_for(idle[0][0].read(), SOON)) == b""  # the oldest had to go
            await client.socket.send_bytes(b"\x10" + bytes(3840))
            await client.until(0x10)  # the conversation did not
            for _, writer in idle:
                writer.close()

    asyncio.run(run())


def test_bucket():
    """If it fails, a limit lets everything through, or stops someone who keeps to it."""
    now = [0.0]
    bucket = Bucket(10, 20, clock=lambda: now[0])
    assert all(bucket.take(1) for _ in range(20)) and not bucket.take(1)
    now[0] = 0.5
    assert all(bucket.take(1) for _ in range(5)) and not bucket.take(1)
    for _ in range(1000):
        now[0] += 0.1
        taken = bucket.take(1)
    assert taken
    now[0] += 3600
    assert bucket.take(20) and not bucket.take(1)  # long silence saves up no more than it holds


def test_names():
    """If it fails, a server that others can reach is taken for one that they cannot."""
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.168.1.1", "moshi.example", "localhost.example")))
    assert reachable("::1") == "[::1]" and reachable("moshi.example") == "moshi.example"
    assert set(own_names("localhost")) == {"localhost", "127.0.0.1", "::1"}
    assert "moshi.example" in own_names("Moshi.Example")


def test_a_token_in_front_of_the_host(monkeypatch):
    """If it fails, Kyutai's Python client, whose --url leaves no room for a query, cannot give the token."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(host="0.0.0.0", token=TOKEN) as served:
            link = served.url.replace("http://", f"ws://moshi:{TOKEN}@")
            async with served.session.ws_connect(f"{link}/api/chat?audio=pcm") as socket:
                client = Client(socket)
                await client.begun()
                await client.close()

    asyncio.run(run())
