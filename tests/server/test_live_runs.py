"""The live page of a run: what it shows, whoever comes when, and what a browser makes of it."""

import contextlib
import json
import os
import shutil
import socket
import threading

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.contracts.events import Evaluated, Noted, RunEnded, RunStarted
from esper.observability import live_page
from esper.observability.event_log import EventLog, read_events
from esper.observability.live_page import WatchedRun
from esper.observability.replay import replay
from esper.observability.report_page import run_page
from esper.server.live_runs import live_server

pytestmark = pytest.mark.network
WITHIN_S = 20.0


def events(num):
    """Return the beginning of a run: its start, and readings of a loss that falls."""
    yield RunStarted(update=0, time_s=0.0, run_id="a-run", seq=0, settings={"horizon": 100})
    for seq in range(1, num):
        loss = {"gate_loss": 2.0 - seq / 10, "train_loss": 1.9 - seq / 10}
        yield Evaluated(update=10 * seq, time_s=float(seq), run_id="a-run", seq=seq, **loss)


def end(seq):
    values = {"grafts_admitted": 0, "grafts_fossilized": 0, "reason": "it is done"}
    return RunEnded(update=10 * seq, time_s=float(seq), run_id="a-run", seq=seq, **values)


@contextlib.contextmanager
def shown(*logs):
    """Serve the pages of runs; yields their address."""
    server = live_server([WatchedRun(log.parent.name, log) for log in logs])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(WITHIN_S)
            assert not thread.is_alive()


def messages(address, num, last=None):
    """Return so many messages of a stream: their ids, and what they say."""
    headers = {"Last-Event-ID": last} if last else {}
    found, key = [], None
    with httpx2.stream("GET", address, headers=headers, timeout=WITHIN_S, trust_env=False) as given:
        assert given.headers["content-type"].startswith("text/event-stream")
        for line in given.iter_lines():
            if line.startswith("id: "):
                key = line.removeprefix("id: ")
            elif line.startswith("data: "):
                found.append((key, json.loads(line.removeprefix("data: "))))
            if len(found) == num:
                return found
    return found


def asked(address):
    return httpx2.get(address, timeout=WITHIN_S, trust_env=False)


@pytest.fixture
def log(tmp_path):
    with EventLog(tmp_path / "run" / "events.jsonl") as made:
        for event in events(6):
            made.publish(event)
        yield made


def main_of(page):
    return page[page.index("<main>") : page.index("</main>") + len("</main>")]


def page_of(path, num=None):
    """Return the main part of the page that a log is replayed to, as far as it goes."""
    found = read_events(path)[:num]
    goes_on = not isinstance(found[-1], RunEnded)
    return main_of(run_page(replay(found, goes_on=goes_on).report))


def test_who_comes_midway_sees_the_past_and_what_comes(log):
    """The page, the stream and the report of the log are one, to the byte; so they are later."""
    with shown(log.path) as address:
        run = f"{address}/runs/0"
        now = page_of(log.path)
        assert main_of(asked(run).text) == now
        ((first, found),) = messages(f"{run}/events", 1)
        assert (found["main"], found["events"], found["ended"]) == (now, 6, False)
        log.publish(end(6))
        ((_, found),) = messages(f"{run}/events", 1, last=first)
        assert found["main"] == main_of(run_page(replay(read_events(log.path)).report)) != now
        assert found["ended"]
        assert "stopped before its end" not in now + found["main"]


def test_control_without_the_past_it_would_be_missed(log, monkeypatch):
    """A page that begins where it is opened shows another run."""

    class FromNow(live_page.LogTail):
        def __init__(self, path):
            super().__init__(path)
            self._read = path.stat().st_size

    monkeypatch.setattr(live_page, "LogTail", FromNow)
    with shown(log.path) as address:
        log.publish(Noted(update=60, time_s=7.0, run_id="a-run", seq=6, text="late"))
        ((_, found),) = messages(f"{address}/runs/0/events", 1)
    assert found["main"] != page_of(log.path)


def test_who_comes_back_gets_only_what_is_new(log):
    """With the id of the last message nothing comes until something happens."""
    with shown(log.path) as address:
        stream = f"{address}/runs/0/events"
        ((last, _),) = messages(stream, 1)
        timer = threading.Timer(0.7, lambda: log.publish(end(6)))
        timer.start()
        ((_, found),) = messages(stream, 1, last=last)
        timer.join()
        assert found["events"] == 7


def test_the_past_is_shown_as_it_was(log):
    """After each number of events; of others it is told which there are."""
    with shown(log.path) as address:
        for number in (1, 4):
            assert asked(f"{address}/runs/0/at/{number}").text == page_of(log.path, number)
        assert asked(f"{address}/runs/0/at/7").status_code == 404
        assert "from 0" in asked(f"{address}/runs/9").text


def test_a_run_that_has_not_begun_and_a_log_that_is_none_are_said(tmp_path, log):
    """Beside others, each under its name; a log that was begun anew is another run."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "events.jsonl").write_text("no event\n")
    later = tmp_path / "later" / "events.jsonl"
    with shown(log.path, later, tmp_path / "odd" / "events.jsonl") as address:
        assert asked(address).status_code == 307
        assert "has not begun" in asked(f"{address}/runs/1").text
        assert "line 1" in asked(f"{address}/runs/2").text
        for name in ("run", "later", "odd"):
            assert f">{name}</a>" in asked(f"{address}/runs/1").text
        with EventLog(later) as made:
            for event in events(3):
                made.publish(event)
        assert messages(f"{address}/runs/1/events", 1)[0][1]["events"] == 3
        with EventLog(later) as made:
            made.publish(next(events(1)))
        assert messages(f"{address}/runs/1/events", 1)[0][1]["events"] == 1


def channel(value):
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def contrast(one, other):
    """Return the contrast of two colours as WCAG 2 has it."""
    lights = sorted(
        sum(w * channel(c) for w, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True))
        for colour in (one, other)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


COLOURS = """() => [...document.querySelectorAll('h1,h2,p,a,th,td,output,label,figcaption')]
  .filter(e => e.innerText.trim() && e.getClientRects().length).map(e => {
    let at = e, back = 'rgba(0, 0, 0, 0)';
    while (at && back === 'rgba(0, 0, 0, 0)') {
      back = getComputedStyle(at).backgroundColor; at = at.parentElement;
    }
    return [e.tagName, getComputedStyle(e).color, back];
  })"""


def rgb(text):
    return [float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_browser_shows_it_live_and_moves_it_back(log, tmp_path):
    """On a desktop, a phone, and in the dark: no error, no request elsewhere, by the keyboard."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs the program chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with shown(log.path) as address, driver.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        wrong, elsewhere = [], []
        for name, options in {
            "desktop": {"viewport": {"width": 1280, "height": 900}},
            "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True},
            "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
        }.items():
            page = browser.new_page(**options)
            page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on(
                "request",
                lambda r: elsewhere.append(r.url) if not r.url.startswith(address) else None,
            )
            page.goto(f"{address}/runs/0")
            page.locator("#said", has_text="live").wait_for()
            low = [
                row for row in page.evaluate(COLOURS) if contrast(rgb(row[1]), rgb(row[2])) < 4.5
            ]
            assert low == [], name
            width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert width <= 0, f"{name} scrolls sideways"
            if os.environ.get("ESPER_SCREENSHOTS"):
                page.screenshot(path=f"{os.environ['ESPER_SCREENSHOTS']}/{name}.png")
        slider = page.locator("#at")
        page.keyboard.press("Tab")
        while not slider.evaluate("e => e === document.activeElement"):
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowLeft")
        page.locator("#said", has_text="event 5 of 6").wait_for()
        page.wait_for_timeout(100)
        assert page.locator("dd", has_text="40").count()
        page.keyboard.press("End")
        log.publish(end(6))
        page.locator("#said", has_text="ended").wait_for()
        browser.close()
    assert (wrong, elsewhere) == ([], [])
