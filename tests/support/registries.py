"""How each implementation of a registry is made, empty: ``make(request, settings)``."""

import contextlib
import itertools
import secrets
import threading
import time

import pytest

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


WITHOUT_HISTORY = "there is no history of tags"
WITHOUT_GUARD = "tags move without a guard"
WITHOUT_REPORTS = "there are no reports"
COLLECTS_ITSELF = "nothing is collected by us"
NOT_OF_THE_HUB = {
    "test_a_graft_is_reported_once": WITHOUT_REPORTS,
    "test_validations_are_kept": WITHOUT_REPORTS,
    "test_what_has_worked_comes_first": WITHOUT_REPORTS,
    "test_what_has_worked_comes_in_pages": WITHOUT_REPORTS,
    "test_a_standing_is_of_the_kind_of_site_that_is_asked_for": WITHOUT_REPORTS,
    "test_a_report_is_about_the_blueprint_of_its_artifact": WITHOUT_REPORTS,
    "test_verify_goes_on_where_it_stopped": COLLECTS_ITSELF,
    "test_bytes_go_after_two_collections_a_grace_period_apart": COLLECTS_ITSELF,
    "test_publishing_again_saves_bytes_from_collection": COLLECTS_ITSELF,
    "test_a_withdrawal_undone_between_two_collections_starts_anew": COLLECTS_ITSELF,
}
NOT_OF_IMAGES = NOT_OF_THE_HUB | {
    "test_of_two_promotions_one_is_told_that_it_lost": WITHOUT_GUARD,
    "test_a_tag_moves_and_remembers": WITHOUT_HISTORY,
    "test_a_tag_needs_a_published_artifact": WITHOUT_HISTORY,
    "test_the_longest_name_is_taken": "there is less room in a tag",
}
"""Tests of what registries that others run do not do; that they say so is tested beside them."""


def of_images(request, settings):
    """Return a repository of this test's own in a registry of images; time passes there."""
    from esper.registry.oci_registry import OciRegistry

    name = request.node.originalname
    if name in NOT_OF_IMAGES:
        pytest.skip(f"a registry of images: {NOT_OF_IMAGES[name]}")
    ticks, wall_s = itertools.count(), settings["wall_s"]
    return OciRegistry(
        f"oci://{request.getfixturevalue('images')}/{secrets.token_hex(8)}",
        max_artifact_bytes=settings["max_artifact_bytes"],
        wall_s=lambda: wall_s() + next(ticks) * 1e-6,
        timeout_s=30.0,
    )


def of_the_hub(request, settings):
    """Return a registry in a repository of a Hub in memory."""
    import fake_hub

    from esper.registry.hub_registry import HubRegistry

    name = request.node.originalname
    if name in NOT_OF_THE_HUB:
        pytest.skip(f"a repository of the Hub: {NOT_OF_THE_HUB[name]}")
    return HubRegistry("hf://team/kernels", hub=fake_hub.FakeHub(), **settings)
