"""Servers on loopback that do what they should not: one behaviour each."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)

DATA = bytes(range(256)) * 16
DIGEST = hashlib.sha256(DATA).hexdigest()
PATH = f"/api/v1/kernels/{DIGEST}/binary"


class Server(ThreadingHTTPServer):
    """A server on loopback whose answer a test writes, byte by byte if it likes."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.connections = []
        self.is_over = threading.Event()
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self):
        """Accept a connection, and remember it."""
        self.connections.append(super().get_request())
        return self.connections[-1]

    def handle_error(self, request, client_address):
        """Say nothing: that a client leaves is what some tests are about."""

    def end(self):
        """Hang up on everybody, and wait until every thread is over."""
        self.is_over.set()
        self.shutdown()
        for connection, _ in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers, self.client_address))
        self.server.behave(self)

    do_HEAD = do_GET

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_):
        """Print nothing."""

    def answer(self, status=200, body=DATA, length=None, **headers):
        """Send a whole answer, as a server should."""
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("content_type", "application/octet-stream"))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, first, again):
        """Send something, and then the same thing again and again while anyone listens."""
        self.wfile.write(first)
        while not self.server.is_over.wait(0.005):
            self.wfile.write(again)

    def hang_up(self):
        """Close the connection when this answer is over."""
        self.close_connection = True


@contextlib.contextmanager
def serving(behave):
    """Run a server that behaves in one way."""
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join()


def raw(data):
    """Return a behaviour: exactly these bytes, and the end of the connection."""

    def behave(handler):
        handler.wfile.write(data)
        handler.hang_up()

    return behave


def whole(*args, **fields):
    """Return a behaviour: one whole answer."""
    return lambda handler: handler.answer(*args, **fields)


def dripping(first, again):
    """Return a behaviour that never ends."""
    return lambda handler: handler.drip(first, again)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "silence": dripping(b"", b""),
    "headers, byte by byte": dripping(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers, line by line": dripping(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "interim answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body of known length": dripping(OK + b"Content-Length: 4096\r\n\r\n", b"x"),
    "a body in chunks": dripping(CHUNKED, b"1\r\nx\r\n"),
    "a body without end": dripping(OK + b"\r\n", b"x"),
}


BAD = {
    "no such kernel": (whole(404, b""), KernelNotFoundError),
    "gone": (whole(410, b""), KernelNotFoundError),
    "other bytes": (whole(body=DATA[::-1]), KernelCorruptError),
    "no bytes": (whole(body=b""), KernelCorruptError),
    "a failure": (whole(500), KernelSourceUnavailable),
    "overload": (whole(503, Retry_After="1"), KernelSourceUnavailable),
    "no right": (whole(401), KernelSourceRefused),
    "no access": (whole(403), KernelSourceRefused),
    "a bad request": (whole(400), KernelSourceRefused),
    "not implemented": (whole(501), KernelSourceRefused),
    "too many requests": (whole(429, Retry_After="1"), KernelSourceUnavailable),
    "a slow request": (whole(408), KernelSourceUnavailable),
    "a part": (whole(206), KernelSourceUnavailable),
    "a page": (whole(content_type="text/html; charset=utf-8"), KernelSourceRefused),
    "compression": (whole(Content_Encoding="gzip"), KernelSourceRefused),
    "a length of 4,000 digits": (whole(body=b"", length="9" * 4000), KernelSourceUnavailable),
    "two lengths": (raw(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx"), None),
    "half the bytes": (raw(OK + b"Content-Length: 4096\r\n\r\n" + DATA[:2048]), None),
    "half the chunks": (raw(CHUNKED + b"5\r\nxxxxx\r\n"), None),
    "a chunk of negative size": (raw(CHUNKED + b"-1\r\n"), None),
    "nothing": (raw(b""), None),
    "another protocol": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), None),
    "endless headers": (dripping(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536), None),
}


def steady(data, *, part, every_s, **fields):
    """Return a behaviour: a whole answer that comes a part at a time."""

    def behave(handler):
        handler.answer(body=b"", length=len(data), **fields)
        for start in range(0, len(data), part):
            handler.wfile.write(data[start : start + part])
            if handler.server.is_over.wait(every_s):
                return

    return behave


class Cut:
    """A server that gives parts, and hangs up after some bytes of each."""

    def __init__(self, data=DATA, most=300):
        self.data, self.most = data, most
        self.num_sent = self.num_answers = 0

    @property
    def tag(self):
        return f'"{hashlib.sha256(self.data).hexdigest()}"'

    def __call__(self, handler):
        self.num_answers += 1
        asked = handler.headers.get("Range")
        if asked is not None and handler.headers.get("If-Range", self.tag) == self.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            span = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
            handler.send_header("Content-Range", span)
        else:
            start = 0
            handler.send_response(200)
        handler.send_header("ETag", self.tag)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(self.data) - start))
        handler.end_headers()
        part = self.data[start : start + self.most]
        self.num_sent += len(part)
        handler.wfile.write(part)
        handler.hang_up()


class Changed(Cut):
    """The same, but what it has is other bytes from the second answer on."""

    def __call__(self, handler):
        super().__call__(handler)
        self.data, self.most = DATA[::-1], len(DATA)
