"""Collectors of traces on loopback that take what they are sent, refuse it, or never answer."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collecting(http.server.ThreadingHTTPServer):
    """Answers each request with a status; with None it holds them until it is told to let go."""

    daemon_threads = True

    def __init__(self, status=200):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.requests, self.headers = status, [], []
        self.let_go = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self):
        """All spans that came, by name."""
        found = {}
        for request in self.requests:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.setdefault(span.name, []).append(span)
        return found

    def handle_error(self, request, client_address):
        """One that left is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.headers.append(dict(self.headers.items()))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        if self.server.status is None:
            self.server.let_go.wait(60)
            return
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Nothing is printed."""


@contextlib.contextmanager
def collecting(status=200):
    """Run a collector until the end of the block."""
    server = Collecting(status)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()
