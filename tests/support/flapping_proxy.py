"""A network that flaps: a relay on loopback that refuses, stalls and cuts connections in turn."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter

FLAPPING = ("pass", "refuse", "pass", "cut", "pass", "stall", "pass", "pass", "cut late", "pass")
"""What is done to one connection after the other; fewer than half of the calls fail."""
SHUT = ("refuse",)
_LIVES_BYTES = {"cut": 0, "cut late": 300}
"""Bytes of answers after which a connection is cut; the first is before any byte."""
_PASSES_BYTES = 6_000
"""The same of one that passes: what is kept open does not escape the schedule."""
_STALL_S = 0.4
"""How long one that stalls says nothing before it is cut."""
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Relays connections to a port of this machine; ``num_done`` counts what was done to them."""

    def __init__(self, port, schedule):
        self.num_done = Counter()
        self._to, self._turns = ("127.0.0.1", port), itertools.cycle(schedule)
        self._ends, self._threads, self._open = threading.Event(), [], []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._run(self._accept)

    def close(self):
        """Cut everything, and wait until nothing is relayed any more."""
        self._ends.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _run(self, relay, *args):
        thread = threading.Thread(target=relay, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._open.append(connection)
                self._run(self._serve, connection, next(self._turns))

    def _serve(self, connection, turn):
        self.num_done[turn] += 1
        with connection, contextlib.suppress(OSError):
            if turn == "stall":
                self._ends.wait(_STALL_S)
            elif turn != "refuse":
                with socket.create_connection(self._to) as server:
                    self._relay(connection, server, _LIVES_BYTES.get(turn, _PASSES_BYTES))

    def _relay(self, connection, server, num_left):
        """Relay until one side has ended, or so many bytes have come back."""
        self._open.append(server)
        self._run(_pump, connection, server)
        while data := server.recv(max(1, min(num_left, 1 << 16))):
            connection.sendall(data[:num_left])
            num_left -= len(data)
            if num_left <= 0:
                break
        for each in (connection, server):
            each.shutdown(socket.SHUT_RDWR)


def _pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def flapping(address, schedule=FLAPPING):
    """Relay to an address; yields the proxy."""
    proxy = Proxy(int(address.rpartition(":")[2]), schedule)
    try:
        yield proxy
    finally:
        proxy.close()
