"""`dsv4 chat`: with the local engine, and with a server that speaks server-sent events."""

import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dsv4_plugin.tools.cli import main


def say(monkeypatch, capsys, target, *lines, options=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, ""])))
    code = main(["chat", str(target), *options])
    return code, capsys.readouterr()


def test_the_local_engine_remembers_the_conversation(monkeypatch, capsys, mini):
    code, out = say(
        monkeypatch, capsys, mini, "Hello, I am Anna.", "/new", "Hi, I am Paul.",
        options=["--effort", "none"],
    )  # fmt: skip
    assert code == 0
    assert out.out.splitlines() == [
        "Hello, Anna! How can I help?",
        "Hello, Paul! How can I help?",
    ]


def test_reasoning_is_set_apart(monkeypatch, capsys, mini):
    for colour, marks in (("never", "[]"), ("always", ("\x1b[2m", "\x1b[0m"))):
        _, out = say(
            monkeypatch, capsys, mini, "Hello, I am Anna.",
            options=["--colour", colour],
        )  # fmt: skip
        expected = f"{marks[0]}A greeting from Anna.{marks[1]}\nHello, Anna! How can I help?\n"
        assert out.out == expected


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send("application/json", json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body["messages"][-1]["content"] == "bad":
            self.send_error(400, "no such thing")
            return
        deltas = [{"reasoning_content": "Hm"}, {"reasoning": "m."}, {"content": "Yes"}]
        chunks = [{"choices": [{"delta": d}]} for d in deltas]
        chunks.append({"choices": [{"delta": {"content": "!"}, "finish_reason": "stop"}]})
        lines = [f"data: {json.dumps(c)}\n\n" for c in chunks] + ["data: [DONE]\n\n"]
        self._send("text/event-stream", "".join(lines))

    def _send(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.bodies = []
    thread = Thread(target=http.serve_forever)
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_server(monkeypatch, capsys, server):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    code, out = say(
        monkeypatch, capsys, url, "one", "bad", "two", options=["--system", "Be brief."]
    )
    assert code == 0
    assert out.out == "[Hmm.]\nYes!\n" * 2
    assert "answered 400" in out.err
    assert [m["content"] for m in server.bodies[-1]["messages"]] == [
        "Be brief.", "one", "Yes!", "two",
    ]  # fmt: skip
    assert server.bodies[0]["stream"] is True


def test_no_server(monkeypatch, capsys):
    code, out = say(monkeypatch, capsys, "http://127.0.0.1:9/v1", "one")
    assert code == 2
    assert "cannot be reached" in out.err
