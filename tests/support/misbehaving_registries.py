"""Servers on loopback that do not do what a registry does."""

from __future__ import annotations

import contextlib
import socket
import threading

from flapping_proxy import flapping
from registries import served

from esper.registry.memory import MemoryRegistry

TOKEN = "the token of a run"
"""What a registry here knows its callers by, where it looks at that."""


def black_hole(connection, ends):
    """Take everything and say nothing."""
    ends.wait()


def five_hundred(connection, ends):
    """Fail at once."""
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def one_byte_a_second(connection, ends):
    """Answer, and never come to an end."""
    connection.recv(1 << 16)
    connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    )
    while not ends.wait(1.0):
        connection.sendall(b" ")


@contextlib.contextmanager
def server(behave):
    """Serve one behaviour to every connection; yields the address."""
    ends, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            behave(connection, ends)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ends.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join(10)


@contextlib.contextmanager
def nobody():
    """Yield an address at which every connection is refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def flapping_server():
    """Serve a registry that takes ``TOKEN``, over a network that flaps; yields the address."""
    from esper.registry.book_access import SCOPES

    registry = MemoryRegistry()
    registry.book.tokens.create("run", SCOPES, now_s=0.0, text=TOKEN)
    with served(registry) as address, flapping(address) as proxy:
        yield proxy.address


REGISTRIES = {
    "black hole": lambda: server(black_hole),
    "refused": nobody,
    "500": lambda: server(five_hundred),
    "flapping": flapping_server,
    "one byte a second": lambda: server(one_byte_a_second),
}
