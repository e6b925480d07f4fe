"""The file that a run leaves, which can be moved back to any update."""

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace

import pytest
from told_runs import told_run

from esper.observability.event_log import EventLog
from esper.observability.replay import replay
from esper.observability.report_files import write_report
from esper.observability.report_page import run_page
from esper.observability.run_folder import EVENTS_FILE
from esper.observability.time_page import LEAST_MOMENTS, changes_of, page_in_time

HOSTILE = "</script><script>alert(1)</script>"


def page_data(html):
    """Return what a page tells its script."""
    text = re.search(r'id="page-data">(.*?)</script>', html, flags=re.DOTALL)[1]
    return json.loads(text)


def unpacked(html):
    """Return the moments of a file: update and markup of each piece."""
    found = json.loads(zlib.decompress(base64.b64decode(page_data(html)["packed"])))
    return [
        (update, {name: found["texts"][text] for name, text in order})
        for update, order in found["moments"]
    ]


@pytest.fixture
def events():
    """A whole run, with a package that is kept and one that is refused."""
    return list(told_run(2))


def test_a_file_has_what_its_page_showed(events):
    """At each update at which something happened, and markup that stays only once."""
    html = page_in_time(replay(events).report, events)
    moments = dict(unpacked(html))
    assert list(moments) == sorted({event.update for event in events})
    assert "Under way, at update 10 of 35." in moments[10]["part-top"]
    assert "part-faults-and-health" not in moments[10]
    assert "it raised" in moments[20]["part-faults-and-health"]
    settings = {pieces["part-settings"] for pieces in moments.values()}
    assert len(settings) <= 2
    found = json.loads(zlib.decompress(base64.b64decode(page_data(html)["packed"])))
    assert len(found["texts"]) == len(set(found["texts"]))


def test_a_large_page_keeps_fewer_moments(monkeypatch):
    """Evenly over the run, so that a file stays small and is soon written."""
    events = list(told_run(12))
    html = page_in_time(replay(events).report, events)
    moments = [update for update, _ in unpacked(html)]
    assert moments == sorted({event.update for event in events})
    monkeypatch.setattr("esper.observability.time_page.MOST_LETTERS", 1)
    html = page_in_time(replay(events).report, events)
    few = [update for update, _ in unpacked(html)]
    assert LEAST_MOMENTS / 2 <= len(few) <= LEAST_MOMENTS + 1
    assert (few[0], few[-1] > moments[-1] / 2) == (moments[0], True)


def test_a_page_may_run_its_own_script_and_nothing_else(events):
    """The policy names script and style by their digests, which hold."""
    html = page_in_time(replay(events).report, events)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    policy = policy.replace("&#x27;", "'")
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in text]
        assert [f"{rule} 'sha256-{d}'" in policy for d in digests] == [True]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_no_text_of_a_run_becomes_script(events):
    """Neither in the page nor in what its script is told."""
    last = replace(events[-1], reason=HOSTILE)
    html = page_in_time(replay([*events[:-1], last]).report, [*events[:-1], last])
    assert html.count("<script") == 2
    assert page_data(html)["changes"][-1][1].count(f"the run ended: {HOSTILE}") == 1


def test_a_run_leaves_a_page_with_its_past_where_it_has_a_log(events, tmp_path):
    """A log of another run, or none that can be read, leaves the page of the report."""
    report = replay(events).report
    with EventLog(tmp_path / EVENTS_FILE) as log:
        for event in events:
            log.publish(event)
    _, page = write_report(report, tmp_path)
    assert page.read_text(encoding="utf-8") == page_in_time(report, events)
    for text in ("", "no event\n", log.path.read_text().replace("0" * 32, "1" * 32)):
        log.path.write_text(text)
        _, page = write_report(report, tmp_path)
        assert page.read_text(encoding="utf-8") == run_page(report)


def test_changes_are_told_by_their_updates(events):
    """What is read every few updates is none."""
    changes = dict(changes_of(events))
    assert "trial of package 1 started" in changes[10]
    assert "the run goes on as candidate" in changes[15]
    assert not any("gate loss" in text for text in changes.values())
