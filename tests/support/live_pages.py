"""A live page on loopback, a run that is written beside it, and a reader that keeps what it saw."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from dataclasses import replace

from told_runs import told_run

from esper.contracts.events import event_to_json
from esper.observability.live_page import LivePage
from esper.observability.replay import replay
from esper.observability.run_folder import EVENTS_FILE
from esper.resilience.clock import ManualClock, MonotonicClock

PATIENCE_S = 20.0


def lines_of(num_packages=2, **other):
    """Return the lines of a log of a whole run."""
    return [event_to_json(event) + "\n" for event in told_run(num_packages, **other)]


class Writing:
    """A run that is written line by line."""

    def __init__(self, folder, lines=None):
        self.folder, self.lines, self.num_written = folder, lines or lines_of(), 0

    def write(self, count=None):
        """Write so many lines more; all that are left where nothing is said."""
        more = self.lines[self.num_written :][:count]
        self.raw("".join(more))
        self.num_written += len(more)
        return self

    def raw(self, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(text)

    def report(self):
        """Write the report, as a run does at its end; with work, which no event tells."""
        known = {"work": {"training": 2e9, "evaluation": 1e9}, "parameters_after": 77}
        known["test_metrics"] = {"loss": 0.25, "accuracy": 0.75}
        report = replace(replay(list(told_run(2))).report, **known)
        (self.folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        return report


class Reader:
    """Does with messages what a page does; ``pieces`` is what it shows, by column."""

    def __init__(self):
        self.pieces, self.known = {}, ""

    def take(self, message):
        """Take what :meth:`LivePage.since` gave."""
        if message is not None:
            self.take_text(message.id, message.text)
        return self

    def take_text(self, known, text):
        self.known = known
        for column in json.loads(text)["columns"]:
            before, html = self.pieces.get(column["id"], {}), column["html"]
            self.pieces[column["id"]] = {
                name: html[name] if name in html else before[name] for name in column["order"]
            }

    @property
    def shown(self):
        """What the only column shows."""
        (column,) = self.pieces.values()
        return "".join(column.values())


class Watched:
    """The live page of some runs, which looks whenever it is asked to."""

    def __init__(self, *folders):
        self._clock = ManualClock()
        self.page = LivePage(folders, self._clock)

    def look(self):
        """Look at the files, and return the page."""
        self._clock.advance(60.0)
        self.page.look()
        return self.page


def parts_of_file(html):
    """Return the head and the sections of a page as bytes have them, one after the other."""
    main = html[html.index("<main>") + len("<main>") : html.index("</main>")]
    inner = re.fullmatch(r'<div id="column-0">(.*)</div>', main, flags=re.DOTALL)
    return main if inner is None else inner[1]


@contextmanager
def on_loopback(*folders, port=0):
    """Serve the page of runs; yields its address."""
    from esper.server.dashboard import dashboard_server
    from esper.server.running import listen

    page = LivePage(folders, MonotonicClock())
    with listen("127.0.0.1", port) as listener:
        server = dashboard_server(page, host="127.0.0.1")
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server did not end"
