"""A web server on this machine with all the habits of others: ranges, redirects, broken answers."""

import contextlib
import hashlib
import http.server
import json
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit


@dataclass
class Server:
    """What is served, and what was asked.

    `files` are bodies by path, `redirects` are targets. `behave` maps a path to a list of what
    becomes of its next answers, one after another: "cut" closes the connection half-way, a status
    such as 503 is an error, "no ranges" ignores a Range header, "range" sends another one,
    "version" exchanges body and headers for those of `replace`. After each 64 KiB of a body come a
    pause of `slow` seconds and, if there is one, a wait for `gate`. Paths in `unsized` come without
    their length. `asked` lists (path, Range header, Authorization header).
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    replace: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    behave: dict[str, list] = field(default_factory=dict)
    unsized: set[str] = field(default_factory=set)
    slow: float = 0.0
    gate: threading.Event | None = None
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def add_wheel(self, wheel, data, *, as_json=True):
        """Serve a wheel and its page of the index, whose address is `url`/simple."""
        self.files[f"/files/{wheel.file}"] = data
        page = f"/simple/{wheel.project}/"
        if as_json:
            link = {"filename": wheel.file, "url": f"{self.url}/files/{wheel.file}"}
            self.files[page] = json.dumps({"files": [link]}).encode()
            kind = "application/vnd.pypi.simple.v1+json"
        else:
            link = f'<a href="../../files/{wheel.file}#sha256={wheel.sha256}">{wheel.file}</a>'
            self.files[page] = link.encode()
            kind = "text/html"
        self.headers[page] = {"Content-Type": kind}

    def add_repository_file(self, name, data):
        """Serve a file as Hugging Face does: a redirect that states the SHA-256 leads to it."""
        name = quote(name)
        path = f"/owner/repo/resolve/main/{name}"
        self.redirects[path] = f"/cdn/{name}?signature=secret"
        self.headers[path] = {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.files[f"/cdn/{name}"] = data

    def bodies(self, path):
        """The Range headers of requests for a path."""
        return [span for asked, span, _ in self.asked if asked == path]


@contextlib.contextmanager
def serve():
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, span = urlsplit(self.path).path, self.headers["Range"]
            state.asked.append((path, span, self.headers["Authorization"]))
            habit = state.behave[path].pop(0) if state.behave.get(path) else None
            if habit == "version":
                state.files[path], state.headers[path] = state.replace[path]
            if isinstance(habit, int):
                self.send_error(habit)
            elif path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[path])
                self.end(path, 0)
            elif path not in state.files:
                self.send_error(404)
            else:
                self.send_body(path, span if habit != "no ranges" else None, habit)

        def end(self, path, size):
            for name, value in state.headers.get(path, {}).items():
                self.send_header(name, value)
            if path not in state.unsized:
                self.send_header("Content-Length", str(size))
            self.end_headers()

        def send_body(self, path, span, habit):
            body, start = state.files[path], 0
            if span:
                start = int(span.removeprefix("bytes=").rstrip("-")) + (habit == "range")
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.end(path, len(body) - start)
            end = (start + len(body)) // 2 if habit == "cut" else len(body)
            with contextlib.suppress(OSError):  # the client was interrupted
                for at in range(start, end, 1 << 16):
                    self.wfile.write(body[at : min(end, at + (1 << 16))])
                    time.sleep(state.slow)
                    if state.gate:
                        state.gate.wait()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
