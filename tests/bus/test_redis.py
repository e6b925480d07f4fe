"""Events on a real Redis: never lost without a word, never waited for, read at least once."""

import logging
import multiprocessing
import random
import threading
import time

import pytest

pytest.importorskip("redis", reason="needs the extra redis")

import redis
from redis_servers import redis_server

from esper.bus.in_process import EventBus
from esper.bus.redis_groups import GroupReader
from esper.bus.redis_streams import (
    RUNS,
    RedisSink,
    connect,
    follow,
    latest_run,
    shown,
    stream_of,
    trim,
)
from esper.contracts.errors import BusUnavailableError, EsperError
from esper.contracts.events import Noted, RunEnded, event_to_json

pytestmark = [pytest.mark.slow, pytest.mark.network]
RUN = "a-run"


def note(seq, run_id=RUN):
    return Noted(update=seq, time_s=0.0, text=f"note {seq}", run_id=run_id, seq=seq)


def end(seq):
    return RunEnded(
        update=seq,
        time_s=1.0,
        run_id=RUN,
        seq=seq,
        reason="done",
        grafts_admitted=0,
        grafts_fossilized=0,
    )


@pytest.fixture(scope="module")
def module_server():
    with redis_server() as server:
        yield server


@pytest.fixture
def server(module_server):
    connect(module_server.url).flushall()
    return module_server


def written(server, *events):
    with RedisSink(server.url) as sink:
        for event in events:
            sink.publish(event)
    assert sink.num_dropped == sink.num_waiting == 0


def reader(server, name="ann", **options):
    given = {"group": "pages", "idle_s": 0.05, "wait_s": 0.05, **options}
    return GroupReader(server.url, RUN, reader=name, **given)


def seqs(deliveries):
    return [delivery.event.seq for delivery in deliveries]


def test_a_run_is_followed_from_its_first_event_to_its_end(server):
    """What was there before and what comes meanwhile, each once; the last run is known by name."""
    written(server, note(0), note(1))
    assert latest_run(server.url) == RUN
    found = []
    watch = threading.Thread(
        target=lambda: found.extend(follow(server.url, RUN, goes_on=lambda: True, wait_s=0.05))
    )
    watch.start()
    written(server, note(2), note(2), end(3), note(4))
    watch.join(10)
    assert not watch.is_alive()
    assert [event.seq for event in found] == [0, 1, 2, 3]
    assert found[0] == note(0)


def test_a_server_that_is_killed_gets_what_came_meanwhile(caplog):
    """All of it, in order, at least once, with one warning; nobody waits."""
    with redis_server() as server, caplog.at_level(logging.WARNING):
        sink = RedisSink(server.url)
        sink.publish(note(0))
        until(lambda: sink.num_waiting == 0)
        server.kill()
        begin = time.perf_counter()
        for seq in range(1, 50):
            sink.publish(note(seq))
        assert time.perf_counter() - begin < 49 * 0.0005 + 0.05
        until(lambda: caplog.records)
        server.start()
        until(lambda: sink.num_waiting == 0)
        sink.close()
        events = list(follow(server.url, RUN, goes_on=lambda: False, wait_s=0.05))
        assert [event.seq for event in events] == list(range(50))
        assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_server_that_hangs_holds_up_neither_a_publish_nor_the_end():
    """Half a millisecond, two seconds; what was not written is counted, and no more is written."""
    with redis_server() as server:
        sink = RedisSink(server.url)
        sink.publish(note(0))
        until(lambda: sink.num_waiting == 0)
        server.hang()
        times = []
        for seq in range(1, 5_001):
            begin = time.perf_counter()
            sink.publish(note(seq))
            times.append(time.perf_counter() - begin)
        assert sorted(times)[4_950] <= 0.0005
        begin = time.perf_counter()
        sink.close()
        assert time.perf_counter() - begin <= 2.2
        assert sink.num_dropped + sink.num_waiting == 5_000
        server.go_on()
        until(lambda: sink.num_waiting == 0)
        lost = sink.num_dropped
        assert lost >= 4_999  # one was under way
        sink.publish(note(5_001))
        until(lambda: sink.num_waiting == 0)
        assert sink.num_dropped == lost + 1
        events = follow(server.url, RUN, goes_on=lambda: False, wait_s=0.05)
        assert len(list(events)) <= 5  # and what was under way meanwhile


def test_what_a_run_waits_for_in_vain_is_not_waited_for_again():
    """The end of a run flushes, and then closes: two seconds for both."""
    with redis_server() as server:
        sink = RedisSink(server.url)
        bus = EventBus([EventBus([sink])])
        bus.publish(note(0))
        assert bus.flush()
        assert sink.num_waiting == 0
        server.hang()
        begin = time.perf_counter()
        bus.publish(note(1))
        assert not bus.flush()
        sink.close()
        assert time.perf_counter() - begin <= 2.7


def test_control_with_the_defaults_of_the_client_a_hanging_server_holds_its_caller():
    """So the test above would notice."""
    with redis_server() as server:
        client = redis.Redis.from_url(server.url)
        client.ping()
        server.hang()
        call = threading.Thread(target=lambda: client.xadd("stream", {"id": "1"}), daemon=True)
        call.start()
        call.join(2.2)
        assert call.is_alive()
        server.go_on()
        call.join(10)


def until(is_so, within_s=20.0):
    end_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end_s, "in vain"
        time.sleep(0.01)


def test_each_event_goes_to_one_of_a_group_and_to_every_group(server):
    """Two readers share what is there; another group gets all of it."""
    written(server, *(note(seq) for seq in range(6)))
    ann, ben, other = reader(server), reader(server, "ben"), reader(server, group="mail")
    first, second = ann.take(3), ben.take(3)
    assert seqs(first) + seqs(second) == list(range(6))
    assert seqs(other.take()) == list(range(6))


def test_what_a_dead_reader_had_is_taken_over(server):
    """After a while, and what was done is not given again, though it is twice in the stream."""
    written(server, note(0), note(0), note(1))
    dead, ben = reader(server), reader(server, "ben")
    had = dead.take()
    assert seqs(had) == [0, 1]
    dead.done(had[:1])
    assert ben.take() == []
    time.sleep(0.06)
    assert seqs(ben.take()) == [1]


def test_what_nobody_gets_done_is_a_dead_letter(server):
    """After so many deliveries it is put aside with their number, and comes no more."""
    written(server, note(0), note(1))
    ann = reader(server, deadly=3)
    for _ in range(3):
        bad, *others = ann.take()
        assert bad.event.seq == 0
        ann.done(others)
        time.sleep(0.06)
    assert ann.take() == []
    (letter,) = connect(server.url).xrange(ann.dead_letters)
    assert letter[1]["event"] == event_to_json(note(0))
    assert int(letter[1]["deliveries"]) >= 3


def test_a_stream_is_trimmed_below_its_slowest_group_only(server):
    """Nothing that a group has not done goes, and what all of them are done with does."""
    written(server, *(note(seq) for seq in range(10)))
    slow, quick = reader(server, group="slow"), reader(server, group="quick")
    quick.done(quick.take())
    slow.done(slow.take(4))
    client = connect(server.url)
    trim(client, RUN, kept=100)
    assert client.xlen(stream_of(RUN)) == 10
    trim(client, RUN, kept=5)
    assert client.xlen(stream_of(RUN)) == 7  # the last that was done marks where
    assert seqs(slow.take()) == list(range(4, 10))


def test_control_a_limit_on_the_length_takes_what_was_not_read(server):
    """Silently: what a group had yet to read is gone."""
    written(server, *(note(seq) for seq in range(10)))
    slow = reader(server, group="slow")
    slow.done(slow.take(1))
    connect(server.url).xtrim(stream_of(RUN), maxlen=3, approximate=False)
    assert seqs(slow.take()) == [7, 8, 9]


def test_an_entry_that_is_no_event_costs_others_nothing(server):
    """It is a dead letter at once, with the reason; who follows is told which one it is."""
    client = connect(server.url)
    written(server, note(0))
    client.xadd(stream_of(RUN), {"id": "other", "event": "no event"})
    client.xadd(stream_of(RUN), {b"foreign": b"\xff"})
    written(server, note(1))
    ann = reader(server, deadly=2)
    for _ in range(3):
        assert seqs(ann.take()) in ([0, 1], [])
    letters = [fields for _, fields in client.xrange(ann.dead_letters)]
    assert all("no event" in letter["reason"] for letter in letters[:2])
    with pytest.raises(ValueError, match=r"the entry .* is no event"):
        list(follow(server.url, RUN, goes_on=lambda: False, wait_s=0.05))


def test_a_server_that_has_lost_everything_is_gone_on_with(server):
    """As one that was killed and keeps nothing: the run is known again, and so is the group."""
    ann = reader(server)
    with RedisSink(server.url) as sink:
        sink.publish(note(0))
        until(lambda: sink.num_waiting == 0)
        connect(server.url).flushall()
        assert ann.take() == []
        sink.publish(note(1))
    assert latest_run(server.url) == RUN
    assert seqs(ann.take()) == [1]


def test_a_server_that_refuses_for_the_moment_is_asked_again(server, caplog):
    """As one that lacks its replicas, or whose disk is full: nothing is lost."""
    client = connect(server.url)
    client.config_set("min-replicas-to-write", 1)
    with RedisSink(server.url) as sink:
        sink.publish(note(0))
        until(lambda: caplog.records)
        client.config_set("min-replicas-to-write", 0)
        until(lambda: sink.num_waiting == 0)
    assert sink.num_dropped == 0
    assert client.xlen(stream_of(RUN)) == 1


def test_where_nothing_may_be_removed_events_are_written_all_the_same(server, caplog):
    """A user without the right to trim loses none, and is told once; not with the password."""
    connect(server.url).acl_setuser(
        "ann", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-xinfo"]
    )
    with RedisSink(server.url.replace("//", "//ann:secret@")) as sink:
        for seq in range(1_000):
            sink.publish(note(seq))
        until(lambda: sink.num_waiting == 0)
    assert sink.num_dropped == 0
    (record,) = caplog.records
    assert "none is removed" in record.getMessage()
    assert "secret" not in caplog.text


def test_a_server_that_is_away_draws_no_random_number_of_the_run(caplog):
    """The waits between tries are of the sink's own generator: a watched run is the same run."""
    before = random.getstate()
    with RedisSink("redis://127.0.0.1:1/0") as sink:
        sink.publish(note(0))
        until(lambda: caplog.records)
    assert sink.num_dropped == 1
    assert random.getstate() == before
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_forked_process_writes_its_own(server):
    """With a connection of its own, and counts that begin at 0."""

    def act():
        sink.publish(note(1))
        sink.close()
        raise SystemExit(sink.num_dropped + sink.num_waiting)

    with RedisSink(server.url) as sink:
        sink.publish(note(0))
        until(lambda: sink.num_waiting == 0)
        child = multiprocessing.get_context("fork").Process(target=act)
        child.start()
        child.join(20)
        assert child.exitcode == 0
        sink.publish(note(2))
    events = follow(server.url, RUN, goes_on=lambda: False, wait_s=0.05)
    assert [event.seq for event in events] == [0, 1, 2]


@pytest.mark.parametrize(
    "url",
    [
        "redis://:se/cret@host:1/0",
        "redis://:se?cret@host:1/0",
        "redis://:se#cret@host",
        "redis://host:1/0?password=se@cret",
        "redis://:secret",
        "ann:secret@host",
    ],
)
def test_an_address_in_which_a_password_may_end_anywhere_is_not_shown(url):
    """Nothing of it but its kind."""
    assert not any(part in shown(url) for part in ("se", "cret", "ann"))


def test_an_error_of_an_address_hides_what_the_client_said():
    """It would name a part of the password as a port."""
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        connect("redis://:se/cret@host:1/0")
    assert "cret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_addresses_are_shown_without_secrets_and_wrong_ones_refused():
    """An error names the address, not the password; one that says no says why."""
    assert shown("redis://ann:secret@host:1/0?password=x") == "redis://host:1/0"
    assert shown("rediss://ann:s@cret@[::1]:1") == "rediss://[::1]:1"
    assert shown("unix://ann:secret@/run/redis.sock?db=1") == "unix:///run/redis.sock"
    with pytest.raises(ValueError, match=r"redis://, rediss:// or unix://"):
        RedisSink("http://ann:secret@host")
    with pytest.raises(BusUnavailableError, match="does not answer") as caught:
        latest_run("redis://ann:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)
    assert caught.value.may_pass
    with pytest.raises(BusUnavailableError, match="does not answer"):
        list(follow("redis://127.0.0.1:1/0", RUN, goes_on=lambda: False))


def test_a_server_that_says_no_is_asked_once(server, caplog):
    """A key that is something else is no outage: the event counts as lost, the next is tried."""
    connect(server.url).set(stream_of(RUN), "taken")
    with RedisSink(server.url) as sink:
        sink.publish(note(0))
        until(lambda: sink.num_waiting == 0)
    assert sink.num_dropped == 1
    assert "refuses" in caplog.text
    with pytest.raises(BusUnavailableError, match="refuses"):
        list(follow(server.url, RUN, goes_on=lambda: False, wait_s=0.05))
    connect(server.url).delete(RUNS)
    with pytest.raises(EsperError, match="no run"):
        latest_run(server.url)
