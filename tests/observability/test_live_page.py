"""The page of runs that go on: what it shows, and what a reader is told of it."""

import json
import os
import re

import pytest
from live_pages import Reader, Watched, Writing, lines_of, parts_of_file

from esper.contracts.events import Evaluated, RunStarted, SeedMeasured, event_to_json
from esper.observability.event_log import read_events
from esper.observability.live_page import LivePage, names_of
from esper.observability.replay import replay
from esper.observability.report_files import write_report
from esper.observability.run_folder import EVENTS_FILE
from esper.observability.time_page import page_in_time
from esper.observability.wording import NOT_MEASURED
from esper.resilience.clock import ManualClock


class Forgetful:
    """The control: a page without a backlog, which tells readers only what comes after them."""

    def __init__(self, page):
        self._page = page
        self._begun = page.id

    def since(self, known):
        return self._page.since(known or self._begun)


def followed(run, steps):
    """Return what a page and a reader that was there from the start show after some steps."""
    watched, reader = Watched(run.folder), Reader()
    reader.take(watched.look().since(""))
    for count in steps:
        run.write(count)
        reader.take(watched.look().since(reader.known))
    return watched, reader


def test_a_page_shows_what_happens_while_it_happens(tmp_path):
    """A run that has not begun, that is under way, that is on trial, and that has ended."""
    run = Writing(tmp_path / "run")
    watched, reader = followed(run, [])
    assert "Nothing has happened yet in" in reader.shown
    for count, words in (
        (3, "Under way, at update 10."),
        (6, "package 1, 0 of 5 updates"),
        (6, "trial of package 1"),
        (None, "Of the 2 packages"),
    ):
        run.write(count)
        reader.take(watched.look().since(reader.known))
        told = reader.shown + json.dumps(watched.page._page.told())
        assert words in told
    assert watched.page.has_ended


def test_half_a_line_waits_for_its_other_half(tmp_path):
    """What a run has written half is neither an error nor lost."""
    run = Writing(tmp_path / "run").write(4)
    watched, reader = followed(run, [])
    text = run.lines[4]
    run.raw(text[:30])
    assert watched.look().since(reader.known) is None
    run.raw(text[30:])
    run.num_written += 1
    run.write()
    reader.take(watched.look().since(reader.known))
    assert reader.shown == Reader().take(Watched(run.folder).look().since("")).shown


@pytest.mark.parametrize("has_report", [False, True], ids=["its log alone", "its report too"])
def test_a_page_that_was_live_is_the_file_that_the_run_leaves(tmp_path, has_report):
    """Byte by byte, for a reader who was there all along and one who came when it was over."""
    run = Writing(tmp_path / "run")
    watched, reader = followed(run, [1, 2, 3, 5, 8, 3, None])
    report = run.report() if has_report else replay(read_events(run.folder / EVENTS_FILE)).report
    reader.take(watched.look().since(reader.known))
    late = Reader().take(watched.page.since(""))
    if has_report:
        write_report(report, run.folder)
        file = (run.folder / "report.html").read_text(encoding="utf-8")
    else:
        file = page_in_time(report, read_events(run.folder / EVENTS_FILE))
    assert reader.shown == parts_of_file(file)
    assert late.shown == parts_of_file(file)
    assert ("<dd>77</dd>" in reader.shown) is has_report


def past_is_there(page):
    """Say whether somebody who comes now, and stays, sees what was before."""
    reader = Reader().take(page.since(""))
    return bool(reader.pieces) and "mlp-4x4" in reader.shown


def test_who_comes_midway_sees_the_past(tmp_path):
    """Without a backlog, which is the control, they would not."""
    run = Writing(tmp_path / "run").write(12)
    page = Watched(run.folder).look()
    assert past_is_there(page)
    assert not past_is_there(Forgetful(page))


def test_who_was_away_is_told_what_they_missed_and_no_more(tmp_path):
    """By the id of the last message; where the server is another one, everything."""
    run = Writing(tmp_path / "run").write(4)
    watched, reader = followed(run, [])
    for count in (4, 4, 4):
        run.write(count)
        watched.look()
    missed = watched.page.since(reader.known)
    reader.take(missed)
    assert reader.shown == Reader().take(watched.page.since("")).shown
    (column,) = json.loads(missed.text)["columns"]
    assert "part-settings" in column["order"]
    assert "part-settings" not in column["html"]  # it has not changed
    assert watched.page.since(reader.known) is None
    other = Watched(run.folder).look()
    (column,) = json.loads(other.since(reader.known).text)["columns"]
    assert set(column["html"]) == set(column["order"])


def test_a_log_that_is_begun_anew_is_another_run(tmp_path):
    """Nothing of the run before is left on the page."""
    run = Writing(tmp_path / "run").write()
    watched, reader = followed(run, [])
    assert "Of the 2 packages" in reader.shown
    lines = "".join(lines_of(1)[:3])
    (run.folder / EVENTS_FILE).write_text(lines, encoding="utf-8")
    reader.take(watched.look().since(reader.known))
    assert "Under way, at update 10." in reader.shown
    assert "mlp-4x4" not in reader.shown


def test_a_report_of_another_run_is_not_shown_for_this_one(tmp_path):
    """A folder may still hold what a run before has left."""
    run = Writing(tmp_path / "run", lines_of(2, run_id="f" * 32)).write(5)
    run.report()
    reader = Reader().take(Watched(run.folder).look().since(""))
    assert "Under way" in reader.shown


REFUSED = {
    "a newer format": '{"format_version": "2.0", "kind": "noted"}\n',
    "a word for an update": lines_of()[4].replace('"update": 10', '"update": "ten"'),
    "no JSON": "{\n",
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
def test_a_log_that_is_refused_ends_no_page(tmp_path, line):
    """It says so, and other runs go on."""
    run, other = Writing(tmp_path / "a").write(4), Writing(tmp_path / "b").write(4)
    assert line not in run.lines
    run.raw(line)
    reader, watched = Reader(), Watched(run.folder, other.folder)
    reader.take(watched.look().since(""))
    reader.take(watched.look().since(reader.known))
    shown = {name: "".join(column.values()) for name, column in reader.pieces.items()}
    assert "cannot be shown" in shown["column-1"]
    assert "line 5" in shown["column-1"]
    assert "Under way, at update 10." in shown["column-2"]
    assert "1 refused" in shown["column-0"]


def test_a_report_that_is_refused_leaves_the_log(tmp_path):
    """Of a folder without a log the page says what is wrong with the report."""
    run = Writing(tmp_path / "run").write()
    (run.folder / "report.json").write_text('{"format_version": "9.0"}')
    assert "Of the 2 packages" in Reader().take(Watched(run.folder).look().since("")).shown
    (run.folder / EVENTS_FILE).unlink()
    watched = Watched(run.folder)
    for _ in range(2):
        shown = Reader().take(watched.look().since("")).shown
        assert "run report format &#x27;9.0&#x27; is not known" in shown


def test_a_report_without_a_log_has_a_page(tmp_path):
    """It cannot go back in time, and is shown."""
    run = Writing(tmp_path / "run").write()
    run.report()
    (run.folder / EVENTS_FILE).unlink()
    page = Watched(run.folder).look()
    assert page.has_ended
    assert "<dd>77</dd>" in Reader().take(page.since("")).shown
    assert (
        json.loads(page.at(3))["columns"][0]["html"]
        == Reader().take(page.since("")).pieces["column-0"]
    )


def test_runs_stand_beside_each_other_with_ids_of_their_own(tmp_path):
    """Every id is there once, and what refers to one finds it."""
    runs = [Writing(tmp_path / name).write() for name in ("small", "large")]
    html = Watched(*[run.folder for run in runs]).look().html()
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    links = re.findall(r' href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)
    links += [
        one for found in re.findall(r' aria-labelledby="([^"]*)"', html) for one in found.split()
    ]
    assert set(links) <= set(ids)
    assert html.count("<h1>") == 1
    for name in ("small", "large"):
        assert f"<h2>{name}</h2>" in html


def test_a_page_goes_back_to_any_update(tmp_path):
    """It shows what was known then, and at its end what is known now."""
    run = Writing(tmp_path / "run").write()
    page = Watched(run.folder).look()

    def at(update):
        return Reader().take_text("", page.at(update)) or json.loads(page.at(update))["columns"][0]

    early, late = at(12)["html"], at(10_000)["html"]
    assert "Under way, at update 12 of 35." in early["part-top"]
    assert "part-faults-and-health" not in early
    assert "package 2" not in "".join(early.values())
    assert late == Reader().take(page.since("")).pieces["column-0"]


def test_a_page_is_looked_at_four_times_a_second_at_most(tmp_path):
    """However many readers it has."""
    run, clock = Writing(tmp_path / "run").write(4), ManualClock()
    page = LivePage([run.folder], clock)
    page.look()
    known = page.id
    run.write(4)
    clock.advance(0.2)
    page.look()
    assert page.id == known
    clock.advance(0.1)
    page.look()
    assert page.id != known


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    """Not by the whole of their paths."""
    (tmp_path / "x").mkdir()
    names = names_of([tmp_path / "x" / "a", tmp_path / "y"])
    assert names == [f"x{os.sep}a", "y"]
    assert names_of([tmp_path / "only"]) == ["only"]


@pytest.mark.parametrize("is_begun", [False, True], ids=["not begun", "refused"])
def test_a_folder_whose_name_is_no_text_has_a_page(tmp_path, is_begun):
    """Alone, and as one of several; bytes that are no letter stand there as a sign for one."""
    folder = tmp_path / os.fsdecode(b"r\xffn")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs a file system with names that are no UTF-8")
    if is_begun:
        Writing(folder).write(2).raw("{}\n")
    for folders in ([folder], [folder, tmp_path / "other"]):
        watched = Watched(*folders)
        watched.look()
        html = watched.look().html()
        assert ("This run cannot be shown" in html) is is_begun
        assert "r\ufffdn" in html
        assert html.encode("utf-8")


def running(parameters=None):
    """Return the lines of a run that goes on, of which the parameters may be told."""
    at = {"run_id": "0" * 32}
    told = [
        RunStarted(**at, seq=0, update=0, time_s=0.0, settings={}, parameters=parameters),
        SeedMeasured(
            **at,
            seq=1,
            update=100,
            time_s=61.0,
            site="fc",
            seed_idx=1,
            state="active",
            calls=77,
            faults=3,
            latency_us=12.5,
            size_bytes=2048,
        ),
        Evaluated(
            **at,
            seq=2,
            update=100,
            time_s=62.5,
            gate_loss=0.5,
            train_loss=None,
            work={"training": 1e9},
            parameters=None if parameters is None else parameters + 34,
        ),
    ]
    return [event_to_json(event) + "\n" for event in told]


def facts_of(page):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_what_events_know_of_time_and_size_is_on_the_page_while_a_run_goes_on(tmp_path):
    """And of what only its report will tell, where that will be."""
    run = Writing(tmp_path / "run", running(1000)).write()
    shown = Reader().take(Watched(run.folder).look().since("")).shown
    facts = facts_of(shown)
    assert facts["Time since its start"] == "1:03"
    assert (facts["Parameters before"], facts["Parameters now"]) == ("1,000", "1,034")
    assert "report.json" in facts["Wall time by work"]
    assert "report.json" in facts["Growing may take"]


def test_control_what_a_log_does_not_tell_is_not_known(tmp_path):
    """As one that was written before parameters were told."""
    run = Writing(tmp_path / "run", running()).write()
    facts = facts_of(Reader().take(Watched(run.folder).look().since("")).shown)
    assert (facts["Parameters before"], facts["Parameters now"]) == (NOT_MEASURED,) * 2


def test_how_each_seed_is_doing_is_on_the_page(tmp_path):
    """As it was told last; a run that told of none has no such part."""
    run = Writing(tmp_path / "run", running()).write()
    shown = Reader().take(Watched(run.folder).look().since("")).shown
    (section,) = re.findall(r'<section id="part-seeds-at-work".*?</section>', shown, re.DOTALL)
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", section)
    assert {"fc, seed 1", "77", "3", "12", "2 KiB"} <= set(cells)
    assert "at update 100" in section
    other = Writing(tmp_path / "other").write()
    shown = Reader().take(Watched(other.folder).look().since("")).shown
    assert "part-seeds-at-work" not in shown
