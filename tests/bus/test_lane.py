"""A sink that is slow, or hangs, costs its publisher next to nothing and others nothing at all."""

import logging
import multiprocessing
import threading
import time

import pytest

from esper.bus.in_process import EventBus
from esper.contracts.events import AlphaChanged, Noted, StageChanged
from esper.contracts.lifecycle import GraftStage


class Held:
    """A sink that takes nothing before it is let go."""

    def __init__(self):
        self.events = []
        self.go, self.entered = threading.Event(), threading.Event()

    def publish(self, event):
        self.entered.set()
        self.go.wait()
        self.events.append(event)


class Notebook:
    """A sink that writes down what it takes, and by whom it was called."""

    def __init__(self):
        self.events, self.threads = [], []

    def publish(self, event):
        self.events.append(event)
        self.threads.append(threading.current_thread())


class Prompt(Notebook):
    """A sink that promises never to wait."""

    never_waits = True


def note(number):
    return Noted(update=number, time_s=0.0, text=str(number))


def moved(number):
    return StageChanged(
        update=number,
        time_s=0.0,
        graft=1,
        site="0",
        seed_idx=0,
        blueprint="mlp",
        artifact_id="",
        before="",
        after=GraftStage.GERMINATED,
        reason="",
    )


@pytest.fixture
def held():
    sink = Held()
    yield sink
    sink.go.set()


def test_a_sink_that_hangs_is_waited_for_once(held, caplog):
    """The first event costs the publisher its patience, later ones nothing; it is said once."""
    notebook = Notebook()
    bus = EventBus([held, notebook], patience_s=0.3)
    with caplog.at_level(logging.WARNING):
        for number in range(50):
            bus.publish(note(number))

    assert held.events == []
    assert notebook.events == [note(number) for number in range(50)]
    assert [r.message for r in caplog.records] == [
        "Held took longer than 0.3 s to take a 'noted' event; from now on nothing waits for it"
    ]
    held.go.set()
    assert bus.flush()
    assert held.events == notebook.events


def test_control_a_publisher_without_a_lane_is_held(held):
    """Called as it is, the same sink would hold its publisher for as long as it likes."""
    held.never_waits = True
    bus = EventBus([held], patience_s=0.01)
    publisher = threading.Thread(target=bus.publish, args=(note(0),), daemon=True)
    publisher.start()
    assert held.entered.wait(10)
    publisher.join(0.05)
    assert publisher.is_alive()


def test_a_full_ring_gives_up_what_tells_least(held):
    """Of more events than there is room for, the oldest alpha goes first, then the oldest word."""
    bus = EventBus([held], patience_s=0.0, room=3)
    bus.publish(note(0))
    assert held.entered.wait(10)  # under way, and no longer in the ring
    alpha = AlphaChanged(update=2, time_s=0.0, graft=1, alpha=0.5)
    for event in (moved(1), note(2), alpha, moved(3), moved(4)):
        bus.publish(event)

    assert (bus.num_dropped, bus.num_waiting) == (2, 4)
    held.go.set()
    assert bus.flush()
    assert held.events == [note(0), moved(1), moved(3), moved(4)]
    assert (bus.num_dropped, bus.num_waiting, bus.num_published) == (2, 0, 6)


def test_every_event_is_accounted_for_under_threads(held):
    """Published is taken, dropped and waiting, at every instant and at the end."""
    notebook = Notebook()
    bus = EventBus([held, notebook], patience_s=0.0, room=7)
    publishers = [
        threading.Thread(target=lambda: [bus.publish(note(n)) for n in range(100)])
        for _ in range(4)
    ]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    held.go.set()
    assert bus.flush()

    assert bus.num_published == 400
    assert len(held.events) + len(notebook.events) + bus.num_dropped == 800
    assert bus.num_waiting == 0


def test_flush_gives_up_in_time_and_says_so(held, caplog):
    """The end of a run does not wait for a sink that hangs."""
    bus = EventBus([held], patience_s=0.0)
    bus.publish(note(0))
    with caplog.at_level(logging.WARNING):
        assert not bus.flush(timeout_s=0.01)
    assert "Held has not taken every event" in caplog.text


def test_a_prompt_sink_is_called_by_its_publisher():
    """One that never waits is called at once, on the same thread; any other beside it."""
    prompt, other = Prompt(), Notebook()
    EventBus([prompt, other]).publish(note(0))
    assert prompt.threads == [threading.current_thread()]
    assert other.events == [note(0)]
    assert other.threads != [threading.current_thread()]


def test_a_quick_sink_leaves_no_thread():
    """Once everything is delivered there is nobody left who waits for more."""
    bus = EventBus([Notebook()])
    bus.publish(note(0))
    assert bus.flush()
    left = [t for t in threading.enumerate() if t.name == "esper sink"]
    for thread in left:
        thread.join(5)  # the one that is about to end
    assert not any(thread.is_alive() for thread in left)


def test_a_sink_may_publish_from_inside():
    """An event that a sink publishes comes after the one at hand, and nothing waits for itself."""
    notebook = Notebook()

    class Answers:
        def publish(self, event):
            notebook.publish(event)
            if event.update == 0:
                bus.publish(note(1))

    bus = EventBus([Answers()])
    bus.publish(note(0))
    assert bus.flush()
    assert notebook.events == [note(0), note(1)]


def test_a_full_ring_costs_a_publisher_no_search(held):
    """Of a ring with room for a hundred times as much, one more is given up as quickly."""

    def fastest_s(room):
        bus = EventBus([held], patience_s=0.0, room=room)
        for number in range(room + 1):
            bus.publish(note(number))
        times = []
        for number in range(200):
            begin = time.perf_counter()
            bus.publish(note(number))
            times.append(time.perf_counter() - begin)
        assert bus.num_dropped >= 199
        return min(times)

    assert fastest_s(4_000) <= 10 * fastest_s(40)


def test_where_no_thread_starts_an_event_waits_for_the_next():
    """A publish raises nothing, and what it kept is delivered once a thread does start."""
    notebook = Notebook()
    bus = EventBus([notebook])
    before = threading.stack_size(2**45)  # more than any address space has
    try:
        with pytest.raises(RuntimeError, match="start new thread"):
            threading.Thread(target=print).start()
        bus.publish(note(0))
        assert not bus.flush()
    finally:
        threading.stack_size(before)
    assert bus.num_waiting == 1
    bus.publish(note(1))
    assert bus.flush()
    assert notebook.events == [note(0), note(1)]


def _publish_in_child(bus, sink, told):
    sink.go.set()
    bus.publish(note(9))
    told.put(bus.flush())
    told.put([event.text for event in sink.events])
    told.put((bus.num_published, bus.num_waiting, bus.num_dropped))


def test_a_forked_process_begins_with_an_empty_lane(held):
    """What the parent's ring holds is the parent's to deliver; the child's own event arrives."""
    context = multiprocessing.get_context("fork")
    bus, told = EventBus([held], patience_s=0.0), context.Queue()
    for number in range(2):
        bus.publish(note(number))
    child = context.Process(target=_publish_in_child, args=(bus, held, told))
    child.start()

    found = [told.get(timeout=20) for _ in range(3)]
    assert found == [True, ["9"], (1, 0, 0)]
    child.join()
    held.go.set()
    assert bus.flush()
    assert held.events == [note(0), note(1)]


def _forked_while_held(lock, act):
    """Fork while a lock is held, as by a thread that the child has not; return its exit status."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=act, daemon=True)
    with lock:
        child.start()
    child.join(2)
    status = child.exitcode
    child.kill()
    child.join()
    return status


@pytest.mark.parametrize("which", ["bus", "counts"])
def test_a_fork_while_another_thread_publishes_leaves_no_lock_behind(which):
    """The child publishes, whatever a thread of its parent was about."""
    bus = EventBus([Notebook()])
    lock = bus._lock if which == "bus" else bus._deliveries._lock
    assert _forked_while_held(lock, lambda: bus.publish(note(0))) == 0


@pytest.mark.slow
def test_control_a_lock_that_is_held_at_a_fork_stays_held():
    """One that nobody makes anew holds the child for ever."""
    lock = threading.Lock()
    assert _forked_while_held(lock, lock.acquire) is None
