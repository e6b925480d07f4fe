"""``esper watch``, as it is typed beside a run that goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.contracts.events import Noted, RunEnded, event_to_json
from esper.observability.event_log import EventLog

RUN = "a-run"


def note(seq):
    return Noted(update=seq, time_s=0.0, text=f"note {seq}", run_id=RUN, seq=seq)


def end(seq):
    values = {"grafts_admitted": 1, "grafts_fossilized": 1, "reason": "it is done"}
    return RunEnded(update=seq, time_s=1.0, run_id=RUN, seq=seq, **values)


def watched(*words, status=0, **environment):
    """Run the command; return its lines."""
    result = CliRunner().invoke(app, ["watch", *map(str, words)], env=environment)
    assert result.exit_code == status, result.output
    return (result.output if status else result.stdout).splitlines()


class Watching(threading.Thread):
    """The command, beside what the test does; ``lines`` is what it printed, once it has ended."""

    def __init__(self, *words, **environment):
        super().__init__(daemon=True)
        self._words, self._environment, self.lines = words, environment, None

    def run(self):
        self.lines = watched(*self._words, **self._environment)

    def end(self):
        self.join(20)
        assert not self.is_alive(), "it did not end with the run"
        return self.lines


def test_a_run_is_followed_in_its_folder_before_it_begins(tmp_path):
    """Line by line, half a line not before its end; it ends with the run."""
    watching = Watching(tmp_path / "run")
    watching.start()
    time.sleep(0.1)
    with EventLog(tmp_path / "run" / "events.jsonl") as log:
        log.publish(note(0))
        text = event_to_json(note(1)) + "\n"
        for part in (text[:20], text[20:]):
            log._file.write(part)
            log._file.flush()
            time.sleep(0.25)
        log.publish(end(2))
    lines = watching.end()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["0", "1", "2"]
    assert lines[1].endswith("note 1")
    assert "the run ended: it is done" in lines[2]


def test_a_log_that_is_begun_anew_is_read_from_its_start(tmp_path):
    """A shorter file is another one."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(note(0))
        log.publish(note(1))
    watching = Watching(path)
    watching.start()
    time.sleep(0.3)
    with EventLog(path) as log:
        time.sleep(0.3)
        log.publish(end(2))
    assert [line.split()[0] for line in watching.end()] == ["0", "1", "2"]


def test_what_is_there_is_printed_without_waiting(tmp_path):
    """As lines of JSON, which are those of the log."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.publish(note(0))
    (line,) = watched(tmp_path, "--no-follow", "--json")
    assert json.loads(line) == json.loads(path.read_text())
    assert "No such file" in "".join(watched(tmp_path / "none", "--no-follow", status=1))
    path.write_text("no event\n")
    assert "line 1" in "".join(watched(path, "--no-follow", status=2))


def test_an_event_is_one_line_that_no_terminal_obeys(tmp_path):
    """Whatever its text holds: others may have written it."""
    with EventLog(tmp_path / "events.jsonl") as log:
        log.publish(replace(note(0), text="two\nlines\x1b]0;title\x07\r"))
    (line,) = watched(tmp_path, "--no-follow")
    assert "two lines" in line
    assert line.isprintable()


def test_from_now_on_nothing_that_was_before_is_printed(tmp_path):
    """But the end of a run that has ended."""
    with EventLog(tmp_path / "events.jsonl") as log:
        log.publish(note(0))
        watching = Watching(tmp_path, "--from-now")
        watching.start()
        time.sleep(0.5)
        log.publish(note(1))
        log.publish(end(2))
        lines = watching.end()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    (line,) = watched(tmp_path, "--from-now")
    assert line.split()[0] == "2"


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_how_it_ends_without_the_run(tmp_path):
    """With 130 where it is stopped, and without a word where nobody reads any more."""
    command = [sys.executable, "-m", "esper", "watch"]
    stopped = subprocess.Popen(
        [*command, tmp_path / "none"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "waiting for" in stopped.stderr.readline()
    stopped.send_signal(signal.SIGINT)
    assert "stopped" in stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130

    with EventLog(tmp_path / "events.jsonl") as log:
        for seq in range(2_000):
            log.publish(note(seq))
    left = subprocess.Popen([*command, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    left.stdout.readline()
    left.stdout.close()
    assert left.stderr.read() == b""
    assert left.wait(60) == 0
    left.stderr.close()


def test_a_bus_that_does_not_answer_is_an_error_where_nobody_waits():
    """Not a run without events."""
    pytest.importorskip("redis", reason="needs the extra redis")
    words = [RUN, "--bus", "redis://ann:secret@127.0.0.1:1/0", "--no-follow"]
    text = "".join(watched(*words, status=2))
    assert "redis://127.0.0.1:1/0 does not answer" in text
    assert "secret" not in text


def test_who_says_no_run_is_told():
    """Neither a folder nor a bus is known."""
    assert "ESPER_BUS_URL" in "".join(watched(status=2, ESPER_BUS_URL=""))
    assert "redis://" in "".join(watched("--bus", "http://host", status=2))


@pytest.mark.slow
@pytest.mark.network
def test_a_run_is_followed_on_a_bus():
    """By its id and as the latest, from another process than its own."""
    pytest.importorskip("redis", reason="needs the extra redis")
    from redis_servers import redis_server

    from esper.bus.redis_streams import RedisSink

    with redis_server() as server:
        assert "no run" in "".join(watched(status=2, ESPER_BUS_URL=server.url))
        text = "".join(watched(RUN, "--no-follow", status=1, ESPER_BUS_URL=server.url))
        assert f"nothing is known of the run {RUN}" in text
        with RedisSink(server.url) as sink:
            sink.publish(note(0))
            while sink.num_waiting:
                time.sleep(0.01)
            command = [sys.executable, "-m", "esper", "watch"]
            environment = {**os.environ, "ESPER_BUS_URL": server.url}
            watching = [
                subprocess.Popen([*command, *words], env=environment, stdout=subprocess.PIPE)
                for words in ((RUN, "--bus", server.url), ())
            ]
            sink.publish(end(1))
            for each in watching:
                lines = each.communicate(timeout=60)[0].decode().splitlines()
                assert [line.split()[0] for line in lines] == ["0", "1"]
                assert each.returncode == 0
