"""The live page over HTTP, on loopback."""

import json
import os
import signal
import subprocess
import sys

import httpx2
import pytest
from live_pages import Reader, Watched, Writing, on_loopback

pytest.importorskip("fastapi", reason="needs the extra server")

pytestmark = pytest.mark.network

PATIENCE_S = 8.0
"""Less than the 15 s after which a silent stream says that it is there: then one never gives up."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is under way."""
    return Writing(tmp_path_factory.mktemp("runs") / "run").write(12)


@pytest.fixture(scope="module")
def client(run):
    """Somebody who asks the server of its page."""
    with on_loopback(run.folder) as address, asking(address) as client:
        yield client


def asking(address):
    return httpx2.Client(base_url=address, trust_env=False, timeout=PATIENCE_S)


def messages(lines):
    """Yield the messages of a stream: id and text."""
    found = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            found[name] = value
        elif "data" in found:
            yield found.pop("id"), found.pop("data")


def heard(client, *, until, **options):
    """Return what a reader shows, once it shows some words."""
    reader = Reader()
    with client.stream("GET", "/events", **options) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for known, text in messages(answer.iter_lines()):
            reader.take_text(known, text)
            if until in reader.shown:
                return reader
    raise AssertionError("the stream ended")


def test_the_page_comes_whole_and_may_ask_only_where_it_came_from(client):
    """With the headers that hold it to that."""
    answer = client.get("/")
    assert answer.status_code == 200
    assert "mlp-4x4" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_a_stream_tells_the_past_and_then_what_happens(tmp_path):
    """And who comes back says what they know, and is told the rest only."""
    run = Writing(tmp_path / "run").write(12)
    with on_loopback(run.folder) as address, asking(address) as client:
        reader = heard(client, until="mlp-4x4")
        known = reader.known
        run.write()
        whole = heard(client, until="Of the 2 packages")
        with client.stream("GET", "/events", headers={"Last-Event-ID": known}) as answer:
            _, text = next(messages(answer.iter_lines()))
        (column,) = json.loads(text)["columns"]
        assert "part-settings" not in column["html"]
        reader.take_text("", text)
        assert reader.shown == whole.shown
        assert whole.shown == Reader().take(Watched(run.folder).look().since("")).shown


def test_any_update_can_be_asked_for(client):
    """As the page would have shown it; what is no update is refused."""
    told = client.get("/at", params={"update": 0}).json()
    assert "at update 0 of 20" in told["columns"][0]["html"]["part-top"]
    assert client.get("/at", params={"update": -1}).status_code == 422
    assert client.get("/at", params={"update": "x"}).status_code == 422


def test_only_its_own_address_leads_to_a_page(client):
    """A name that somebody made to point to this machine does not; nor is anything written."""
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
    for name in ("localhost", "127.0.0.1:8050", "[::1]:8050"):
        assert client.get("/", headers={"Host": name}).status_code == 200
    assert client.post("/").status_code == 405
    assert client.get("/../../etc/passwd").status_code == 404


@pytest.mark.slow
def test_the_command_says_where_it_listens_and_ends_at_ctrl_c(run, ctrl_c):
    """With a reader that is still there, and of a run that has not begun."""
    command = [sys.executable, "-m", "esper", "dashboard", str(run.folder), "not-there", "--json"]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    try:
        address = json.loads(process.stdout.readline())["address"]
        assert address.startswith("http://127.0.0.1:")
        with asking(address) as client, client.stream("GET", "/events") as answer:
            _, text = next(messages(answer.iter_lines()))
            assert "1 not begun" in text
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert errors.count(b"\n") <= 2
