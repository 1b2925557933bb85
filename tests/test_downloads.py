"""Files from URLs: local servers that lie, break off, trickle and redirect."""
import hashlib
import io
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import torch
from e2e import Run, refusal
from helpers import sentence

from vision_kan.checkpoints import downloads
from vision_kan.checkpoints.downloads import fetch
from vision_kan.checkpoints.read import load_file

W = torch.arange(6.).view(2, 3)


class Server:
    """Serves `files` {path: (status, body, announced length), or a function of the request's handler} on 127.0.0.1 and
    notes the requests."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                answer = outer.files.get(self.path.partition("?")[0], (404, b"<html>gone</html>", 17))
                if callable(answer):
                    answer(self)
                    return
                status, body, length = answer
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def put(self, path: str, body: bytes, length: int | None = None) -> str:
        return self.answer(path, (200, body, len(body) if length is None else length))

    def answer(self, path: str, answer) -> str:
        self.files[path] = answer
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def trickle(self, handler, content: bytes, first: int = 0) -> None:
        """`first` bytes at once, then one every 20 ms, until the test ends."""
        handler.wfile.write(content[:first])
        for place in range(first, len(content)):
            if self.closing.wait(0.02):
                return
            handler.wfile.write(content[place:place + 1])
        self.closing.wait()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.closing.set()
    server.http.shutdown()
    server.thread.join()
    server.http.server_close()


@pytest.fixture
def body() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": W}}, file)
    return file.getvalue()


def cached(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "torch/hub/checkpoints").glob("*"))


def test_fetch_leaves_files_of_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("some/file.pth") == Path("some/file.pth")
    assert fetch("~/file.pth") == tmp_path / "file.pth"
    assert fetch(f"file://{tmp_path}/a%20b.pth") == tmp_path / "a b.pth"


def test_fetch_checks_the_hash_and_keeps_the_file(server, tmp_path, body):
    name = f"tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    url = server.put(f"/{name}", body)
    first = fetch(url)
    assert first.read_bytes() == body and cached(tmp_path) == [name]
    assert fetch(url) == first and len(server.requests) == 1     # the second time from the cache
    assert torch.equal(load_file(first)["model"]["w"], W)


def test_fetch_refuses_a_file_with_another_hash(server, tmp_path, body):
    url = server.put("/tiny-0123abcd.pth", body)
    text = sentence(fetch, url)
    assert url in text and hashlib.sha256(body).hexdigest() in text and cached(tmp_path) == []


def test_fetch_without_a_hash_keeps_addresses_apart(server, tmp_path, body):
    one, two = server.put("/a/model.pth", body), server.put("/b/model.pth", body + b"x")
    assert fetch(one).read_bytes() == body and fetch(two).read_bytes() == body + b"x"
    assert fetch(one).read_bytes() == body and len(server.requests) == 2 and len(cached(tmp_path)) == 2
    query = fetch(one + "?download=1")
    assert query.name.endswith("-model.pth") and len(server.requests) == 3


@pytest.mark.parametrize("named", [False, True])
def test_fetch_keeps_nothing_of_a_connection_that_breaks_off(server, tmp_path, body, named):
    name = f"/tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth" if named else "/tiny.pth"
    url = server.put(name, body[:len(body) // 2], length=len(body))
    text = sentence(fetch, url)
    assert url in text and cached(tmp_path) == []
    server.put(name, body)
    assert fetch(url).read_bytes() == body


def test_fetch_from_where_there_is_nothing(server, tmp_path):
    url = server.put("/here.pth", b"").replace("here", "missing")
    text = sentence(fetch, url)
    assert url in text and "Not Found" in text and cached(tmp_path) == []

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    text = sentence(fetch, f"http://127.0.0.1:{port}/m.pth")
    assert "refused" in text and "download it elsewhere" in text and cached(tmp_path) == []
    for url in ("http:///m.pth", "http://127.0.0.1:bad/m.pth"):
        assert url in sentence(fetch, url)


def test_fetch_from_what_is_no_web_server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert "cannot be downloaded" in sentence(fetch, f"http://127.0.0.1:{listener.getsockname()[1]}/m.pth")
        thread.join()
    assert cached(tmp_path) == []


def test_fetch_into_a_folder_that_cannot_be_written(server, tmp_path, body, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    text = sentence(fetch, server.put("/m.pth", body))
    assert "cannot be kept in" in text and "TORCH_HOME" in text


def test_fetch_downloads_again_what_was_damaged_in_the_cache(server, tmp_path, body, capsys):
    name = f"tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    url = server.put(f"/{name}", body)
    fetch(url).write_bytes(body[:100])
    assert fetch(url).read_bytes() == body and "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("status, length", [(200, None), (200, 26), (200, 10), (404, 26), (500, 26), (503, None)])
def test_fetch_keeps_no_page_of_html(server, tmp_path, status, length):
    url = server.answer("/tiny.pth", (status, b"<html>Please log in</html>", length))
    text = sentence(fetch, url)
    assert url in text and cached(tmp_path) == []
    assert ("not a complete checkpoint" in text) == (status == 200)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("announced", [None, 0.5])
def test_fetch_notices_a_cut_that_http_does_not_tell(server, tmp_path, body, named, announced):
    """Without a length, or with one that is too small: by the hash, or because it is not a complete checkpoint."""
    name = f"/tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth" if named else "/tiny.pth"
    half = len(body) // 2
    text = sentence(fetch, server.answer(name, (200, body[:half], announced and half)))
    assert ("SHA-256" if named else "not a complete checkpoint") in text and cached(tmp_path) == []
    assert fetch(server.answer(name, (200, body, None))).read_bytes() == body       # a complete one without a length is accepted


def redirecting(target: str):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
    return answer


def test_fetch_follows_redirects_to_web_servers_only(server, tmp_path, body):
    (tmp_path / "own.pth").write_bytes(body)
    for target in (f"file://{tmp_path}/own.pth", "ftp://127.0.0.1/m.pth", "data:text/plain,x", "/start.pth", "//:0/x", "http://[/"):
        url = server.answer("/start.pth", redirecting(target))
        assert url in sentence(fetch, url) and cached(tmp_path) == []
    assert len(server.requests) < 30        # the loop ends
    server.put("/elsewhere.pth", body)
    assert fetch(server.answer("/start.pth", redirecting("/elsewhere.pth"))).read_bytes() == body
    with pytest.raises(URLError, match="not followed"):
        downloads._Redirects().redirect_request(Request("https://a.b/m.pth"), None, 302, "", {}, "http://a.b/m.pth")


@pytest.mark.parametrize("where", ["silence", "headers", "body", "body without a length"])
def test_fetch_gives_up_a_server_that_trickles(server, tmp_path, body, monkeypatch, where):
    monkeypatch.setattr(downloads, "STALL_S", 0.4)
    head = b"HTTP/1.0 200 OK\r\n" + (b"" if where.endswith("a length") else b"Content-Length: 100000\r\n")
    answers = {"silence": lambda h: server.closing.wait(), "headers": lambda h: server.trickle(h, head + b"X: y\r\n" * 1000)}
    url = server.answer("/tiny.pth", answers.get(where, lambda h: server.trickle(h, head + b"\r\n" + body * 10, 500)))
    start = time.monotonic()
    text = sentence(fetch, url)
    assert url in text and cached(tmp_path) == [] and time.monotonic() - start < 5
    assert "bytes in 0.4 s" in text or "timed out" in text


def test_a_slow_server_that_goes_on_is_waited_for(server, body, monkeypatch):
    monkeypatch.setattr(downloads, "STALL_S", 0.3)
    monkeypatch.setattr(downloads, "STALL_BYTES", 5)
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def slowly(handler):
        handler.wfile.write(head)
        for place in range(0, len(body), 100):
            time.sleep(0.05)
            handler.wfile.write(body[place:place + 100])

    assert len(body) > 1200     # twice the limit at least
    assert fetch(server.answer("/tiny.pth", slowly)).read_bytes() == body


def child_fetch(argv: list[str]) -> int:
    try:
        print(fetch(argv[0]))
        return 0
    except downloads.UserError as error:
        print(f"error: {error}")
        return 2


def apart(tmp_path, url: str, **limits) -> Run:
    return Run(tmp_path, url, environment={"TORCH_HOME": str(tmp_path / "torch")}, call=child_fetch, **limits)


def test_two_processes_at_once(server, tmp_path, body):
    both = threading.Barrier(2)

    def slowly(handler):
        both.wait(60)
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body[:500])
        both.wait(60)           # each has a part of the file when the other's ends
        time.sleep(0.1)
        handler.wfile.write(body[500:])

    url = server.answer("/tiny.pth", slowly)
    runs = [apart(tmp_path, url) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.out.read_text() for run in runs]
    assert len(cached(tmp_path)) == 1 and fetch(url).read_bytes() == body


def test_killed_half_way(server, tmp_path, body):
    """What a killed process leaves is never used and removed by the next download; a living process keeps its own."""
    def half(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(2 ** 20))
        server.closing.wait()

    url = server.answer("/tiny.pth", half)
    runs = [apart(tmp_path, url) for _ in range(2)]
    deadline = time.monotonic() + 60
    while len(partial := list((tmp_path / "torch/hub/checkpoints").glob("*.partial.pth"))) < 2 or \
            any(path.stat().st_size < 2 ** 19 for path in partial):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(runs[0].process.pid, signal.SIGKILL)
    assert runs[0].wait() == -signal.SIGKILL
    assert len(cached(tmp_path)) == 2
    server.put("/tiny.pth", body)
    assert fetch(url).read_bytes() == body
    assert len(cached(tmp_path)) == 2       # the file, and the living one's part
    runs[1].kill()
    server.put("/other/tiny.pth", body)
    fetch(url.replace("/tiny", "/other/tiny"))
    assert len(cached(tmp_path)) == 3       # a part is removed by a download of the same file only
    fetch(url).unlink()
    assert fetch(url).read_bytes() == body and not [name for name in cached(tmp_path) if "partial" in name]


def test_a_full_disk(server, tmp_path):
    file = io.BytesIO()
    torch.save({"model": {"w": torch.rand(100_000)}}, file)
    url = server.put("/tiny.pth", file.getvalue())
    run = apart(tmp_path, url, file_limit=100_000)
    assert run.wait() == 2
    text = run.out.read_text()
    assert text.splitlines()[-1].startswith("error: ") and "cannot be kept in" in text and "free some space" in text
    assert cached(tmp_path) == []
    assert load_file(fetch(url))["model"]["w"].shape == (100_000,)


@pytest.mark.parametrize("flags", [["--resume"], ["--eval", "--resume"], ["--finetune"]])
def test_the_program_begins_nothing_with_half_a_file(server, tmp_path, body, capsys, flags):
    url = server.put("/tiny.pth", body[:len(body) // 2], len(body))
    assert url in refusal(capsys, *flags, url, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists() and cached(tmp_path) == []
