"""The live page of a run that is on a bus, for those who do not see its folder."""

import json
import logging
import os
import subprocess
import sys

import pytest

pytest.importorskip("redis", reason="needs the extra redis")

import httpx2
from live_pages import Reader, Watched, Writing
from redis_servers import redis_server
from told_runs import told_run

from esper.bus.redis_streams import RedisSink, connect, stream_of
from esper.bus.redis_tail import RunTail
from esper.contracts.errors import EsperError

pytestmark = [pytest.mark.slow, pytest.mark.network]
RUN = "0" * 32
EVENTS = list(told_run(2))


@pytest.fixture(scope="module")
def module_server():
    with redis_server() as server:
        yield server


@pytest.fixture
def server(module_server):
    connect(module_server.url).flushall()
    return module_server


def publish(server, events):
    with RedisSink(server.url) as sink:
        for event in events:
            sink.publish(event)


def shown_from_now(url):
    """The control: a tail that begins at what is still to come."""
    tail = RunTail(url, RUN)
    tail.take()
    return tail


def test_a_run_on_a_bus_has_the_page_that_its_folder_has(server, tmp_path):
    """For who was there from the start, and for who comes when it is over; each event once."""
    in_folder = Writing(tmp_path / "run").write()
    watched, reader = Watched(RunTail(server.url, RUN)), Reader()
    reader.take(watched.look().since(""))
    assert f"Nothing has happened yet in {RUN}." in reader.shown
    for events in (EVENTS[:12], EVENTS[10:12], EVENTS[12:]):
        publish(server, events)
        reader.take(watched.look().since(reader.known))
    whole = Reader().take(Watched(in_folder.folder).look().since("")).shown
    assert reader.shown == whole
    late = Watched(RunTail(server.url, RUN)).look()
    assert Reader().take(late.since("")).shown == whole
    assert late.has_ended
    assert late._page.heard is not None


def test_control_a_tail_that_begins_now_lacks_the_past(server):
    """What was told before it is on no page."""
    publish(server, EVENTS[:12])
    watched = Watched(shown_from_now(server.url))
    publish(server, EVENTS[12:])
    late = Reader().take(watched.look().since(""))
    whole = Reader().take(Watched(RunTail(server.url, RUN)).look().since(""))
    assert late.shown != whole.shown


def test_a_bus_that_is_away_is_said_on_the_page_and_asked_again(caplog):
    """What was there stays, and goes on once it is back; the terminal has one warning."""
    with redis_server() as server, caplog.at_level(logging.WARNING, "esper.bus.redis_tail"):
        publish(server, EVENTS[:12])
        watched, reader = Watched(RunTail(server.url, RUN)), Reader()
        reader.take(watched.look().since(""))
        server.kill()
        for _ in range(3):
            reader.take(watched.look().since(reader.known))
        assert "Nothing comes for now" in reader.shown
        assert "mlp-4x4" in reader.shown
        server.start()
        publish(server, EVENTS[12:])
        reader.take(watched.look().since(reader.known))
    assert "Nothing comes for now" not in reader.shown
    assert "Of the 2 packages" in reader.shown
    assert len(caplog.records) == 1


def test_what_cannot_be_read_is_said_in_place_of_the_run(server):
    """An entry that is no event, as of a run of another program."""
    publish(server, EVENTS[:12])
    connect(server.url).xadd(stream_of(RUN), {"event": "{}"})
    watched = Watched(RunTail(server.url, RUN))
    for _ in range(2):
        shown = Reader().take(watched.look().since("")).shown
    assert "This run cannot be shown: the entry" in shown


def test_a_server_that_refuses_is_an_error_and_no_outage(server):
    """A key of another kind is not waited for."""
    connect(server.url).set(stream_of(RUN), "no stream")
    with pytest.raises(EsperError, match="refuses"):
        RunTail(server.url, RUN).take()


def test_the_command_shows_the_latest_run_of_a_bus(server, tmp_path):
    """Alone, and beside a folder; without a bus it says what to name."""
    publish(server, EVENTS)
    assert "Of the 2 packages" in page_of([], server.url)
    beside = page_of([RUN, str(tmp_path / "not" / "there")], server.url)
    assert "1 ended, 1 not begun" in beside
    refused = dashboard([], "")
    assert b"ESPER_BUS_URL" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2


def dashboard(words, bus):
    command = [sys.executable, "-m", "esper", "dashboard", *words, "--json", "--port", "0"]
    environment = {**os.environ, "ESPER_BUS_URL": bus}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **streams)


def page_of(words, bus):
    """Return the page that the command serves."""
    process = dashboard(words, bus)
    try:
        address = json.loads(process.stdout.readline())["address"]
        return httpx2.get(address, trust_env=False, timeout=30.0).text
    finally:
        process.kill()
        process.communicate()
