"""How each implementation of a registry is made, empty: ``make(request, settings)``."""

import contextlib
import threading
import time

from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry


def in_memory(request, settings):
    return MemoryRegistry(**settings)


def in_a_directory(request, settings):
    return DirectoryRegistry(request.getfixturevalue("tmp_path") / "store", **settings)


def of_a_team(request, settings):
    from esper.registry.book import Book
    from esper.registry.shared import SharedRegistry

    book = Book(request.getfixturevalue("database"))
    return SharedRegistry(book, request.getfixturevalue("objects"), **settings)


@contextlib.contextmanager
def served(registry, *, port=0, **settings):
    """Serve a registry on loopback, in a thread; yields its address."""
    from esper.server.running import listen, server_of

    with listen("127.0.0.1", port) as listener:
        server = server_of(registry, **settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive(), "the server has ended"
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.002)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def token_for(registry, *scopes, name="ann"):
    """Return the text of a token with some scopes."""
    return registry.book.tokens.create(name, scopes, now_s=0.0)[0]


@contextlib.contextmanager
def over_http(registry):
    """Serve a registry; yields it as a client sees it that may do everything."""
    from esper.registry.book_access import SCOPES
    from esper.registry.http_registry import HttpRegistry

    with served(registry) as address:
        token = token_for(registry, *SCOPES)
        client = HttpRegistry(address, token=token, timeout_s=30.0)
        yield client
        client.close()


def on_a_server(request, settings):
    request.getfixturevalue("needs_server")
    stack = contextlib.ExitStack()
    request.addfinalizer(stack.close)
    return stack.enter_context(over_http(MemoryRegistry(**settings)))
