"""A real server on the loopback: what is sent, what is taken for an answer, and what is not."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_cluster.scoring.http import LARGEST_ANSWER, HttpCall
from rlhf_cluster.scoring.samples import CallFailed, Sample

SAMPLES = [Sample("0/p/0", "2+2=", "4", True, {"answer": "4"}), Sample("0/q/0", "3+3=", "é", False)]


class Server:
    """Answers with (status, body, seconds before and between two halves of it), as it is told; remembers requests."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[Any], tuple[int, bytes, float]] = lambda asked: (200, b'{"scores": [1, null]}', 0.0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, "token": self.headers.get("Authorization"), "body": body})
                status, answer, pause = outer.answer(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                half = len(answer) // 2
                for part in (answer[:half], answer[half:]):
                    time.sleep(pause)
                    self.wfile.write(part)
                    self.wfile.flush()

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that gave up is no error here."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/score"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_samples_go_with_their_columns_and_the_token(server: Server) -> None:
    assert HttpCall(server.url, "s3cret")(SAMPLES, 5.0) == [1, None]
    (asked,) = server.asked
    assert (asked["path"], asked["token"]) == ("/score", "Bearer s3cret")
    first, second = asked["body"]["samples"]
    assert first == {
        "sample_id": "0/p/0",
        "prompt": "2+2=",
        "response": "4",
        "ended": True,
        "columns": {"answer": "4"},
    }
    assert second["response"] == "é"


def test_without_a_token_none_is_sent(server: Server) -> None:
    HttpCall(server.url, "")(SAMPLES, 5.0)
    assert server.asked[0]["token"] is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, b"", 0.0), "answered 500 Internal Server Error"),
        ((302, b"", 0.0), "answered 302 Found"),
        ((200, b"no", 0.0), "answered what is not JSON"),
        ((200, b'{"score": [1]}', 0.0), 'answered without {"scores": [numbers]}'),
        ((200, b'{"scores": ["1"]}', 0.0), 'answered without {"scores": [numbers]}'),
        ((200, b"[1, 2]", 0.0), 'answered without {"scores": [numbers]}'),
        ((200, b'{"scores": [1, 2]}', 0.4), "gave no whole answer within 0.5 s"),  # each half is in time
    ],
)
def test_what_is_no_answer_is_said(server: Server, answer: tuple[int, bytes, float], words: str) -> None:
    server.answer = lambda asked: answer
    with pytest.raises(CallFailed, match=re.escape(words)):
        HttpCall(server.url, "s3cret")(SAMPLES, 0.5)


def test_a_server_that_is_silent_or_not_there_is_said(server: Server) -> None:
    server.answer = lambda asked: (200, b"", time.sleep(1.0) or 0.0)
    with pytest.raises(CallFailed, match=r"gave no whole answer within 0\.3 s"):
        HttpCall(server.url, "")(SAMPLES, 0.3)
    with pytest.raises(CallFailed, match="ClientConnectorError"):
        HttpCall("http://127.0.0.1:1/score", "")(SAMPLES, 0.3)


def test_a_header_that_drips_is_bounded_too() -> None:
    """Each byte is in time; the whole never comes."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not stopped.wait(0.05):
                    connection.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with pytest.raises(CallFailed, match=r"gave no whole answer within 0\.4 s"):
                HttpCall(f"http://127.0.0.1:{listening.getsockname()[1]}/score", "")(SAMPLES, 0.4)
        finally:
            stopped.set()
            listening.shutdown(socket.SHUT_RDWR)  # where nobody came it would wait for ever
            dripping.join()


def test_a_token_that_no_header_can_hold_is_said(server: Server) -> None:
    with pytest.raises(CallFailed, match="ValueError"):
        HttpCall(server.url, "two\nlines")(SAMPLES, 5.0)


def test_an_answer_without_end_is_cut_off(server: Server) -> None:
    server.answer = lambda asked: (200, b" " * (LARGEST_ANSWER + 1), 0.0)
    with pytest.raises(CallFailed, match=f"answered more than {LARGEST_ANSWER} bytes"):
        HttpCall(server.url, "")(SAMPLES, 5.0)
