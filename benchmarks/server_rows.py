"""Row 17: what a registry's server takes to say what it knows of a kernel."""

import json
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Figure, take_turns
from subjects import blueprint

import esper
from esper.registry.directory import DirectoryRegistry


def metadata(rounds: int) -> Figure:
    """Row 17: requests over one connection, beside a route that asks SQLite and knows no rights."""
    with TemporaryDirectory() as folder, ExitStack() as servers:
        registry = DirectoryRegistry(folder)
        digest = registry.put(esper.compile_blueprint(blueprint()).kernel_binary)
        token, _ = registry.book.tokens.create("bench", ["read"], now_s=0.0)
        registry.close()
        calls = {
            name: servers.enter_context(_asked(serve, folder, digest, token))
            for name, serve in (("ours", _serve), ("bare", _serve_bare))
        }
        took = take_turns(calls, rounds=2 * rounds, number=100)
    beside = f"a bare route {took['bare'].median_s * 1e6:.0f} us"
    return took["bare"].ratio(took["ours"], "metadata", beside=beside)


@contextmanager
def _asked(
    serve: Callable[[str, "Queue[int]"], None], folder: str, digest: str, token: str
) -> Iterator[Callable[[], object]]:
    """Run a server in a process of its own; yields what asks it once over a kept connection."""
    context = get_context("spawn")
    ports: Queue[int] = context.Queue()
    process = context.Process(target=serve, args=(folder, ports), daemon=True)
    process.start()
    try:
        with socket.create_connection(("127.0.0.1", ports.get(timeout=60))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = f"GET /api/v1/kernels/{digest} HTTP/1.1\r\nHost: here\r\n"
            request = f"{head}Authorization: Bearer {token}\r\n\r\n".encode()

            def ask() -> None:
                connection.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65_536)
                if not answer.startswith(b"HTTP/1.1 200 "):
                    raise RuntimeError(answer)

            ask()  # code is loaded
            yield ask
    finally:
        process.terminate()
        process.join()


def _serve(folder: str, ports: "Queue[int]") -> None:
    from esper.server.running import listen, server_of

    with listen("127.0.0.1", 0) as listener:
        ports.put(listener.getsockname()[1])
        server_of(DirectoryRegistry(folder)).run(sockets=[listener])


def _serve_bare(folder: str, ports: "Queue[int]") -> None:
    import uvicorn
    from fastapi import FastAPI

    from esper.server.running import listen

    book = sqlite3.connect(Path(folder) / "index.sqlite", check_same_thread=False)
    app = FastAPI()
    columns = "digest, size_bytes, metadata, record"

    @app.get("/api/v1/kernels/{digest}")
    def look(digest: str) -> dict[str, object]:
        asked = f"SELECT {columns} FROM artifacts WHERE digest = ?"  # noqa: S608 - our own names
        found, size_bytes, said, record = book.execute(asked, (digest,)).fetchone()
        texts = {"metadata": json.loads(said), "record": json.loads(record)}
        return {"id": found, "size_bytes": size_bytes, **texts}

    config = uvicorn.Config(app, http="h11", lifespan="off", log_level="warning", access_log=False)
    with listen("127.0.0.1", 0) as listener:
        ports.put(listener.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listener])
