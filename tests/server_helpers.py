"""A real address on this machine, in a thread: it speaks as OpenAI's servers do, and says what a test tells it to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """An address that speaks as much of OpenAI's protocol as is heard. `answer` decides what it says to a text.

    `respond` decides what it says to a whole request: a text, a status and a text, or all of a choice.
    """

    def __init__(self, port: int = 0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Any = lambda text: "Score: 7"
        self.respond: Any = lambda body: self.answer(body["messages"][0]["content"])
        self.busy = self.most = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append({"path": self.path, **body})
                    outer.headers.append(dict(self.headers))
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                answer = outer.respond(body)
                with lock:
                    outer.busy -= 1
                status, text = answer if isinstance(answer, tuple) else (200, answer)
                choice = text if isinstance(text, dict) else {"message": {"role": "assistant", "content": text}}
                content = {"choices": [choice]} if status == 200 else text
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
