"""How events reach those who subscribed."""

import logging
import threading

import pytest

from esper.bus.in_process import EventBus
from esper.contracts.events import Noted


class Notebook:
    """A sink that writes down what it takes."""

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


class Broken:
    """A sink that raises."""

    def __init__(self, error):
        self.error = error

    def publish(self, event):
        raise self.error


def note(text="hello"):
    return Noted(update=1, time_s=0.5, text=text)


def test_every_sink_takes_every_event_in_order():
    """Sinks given at the start and sinks that subscribe later take the same events in order."""
    first, second = Notebook(), Notebook()
    bus = EventBus([first])
    bus.subscribe(second)
    events = [note("a"), note("b")]
    for event in events:
        bus.publish(event)

    assert first.events == second.events == events
    assert (bus.num_published, bus.num_failures) == (2, 0)


def test_a_sink_that_raises_is_counted_and_costs_nobody_anything(caplog):
    """The publisher and the sinks behind it go on; the failure is counted and logged."""
    notebook = Notebook()
    bus = EventBus([Broken(RuntimeError("disk full")), notebook])

    with caplog.at_level(logging.ERROR):
        bus.publish(note())

    assert notebook.events == [note()]
    assert bus.num_failures == 1
    assert "Broken failed on a 'noted' event" in caplog.text
    assert "disk full" in caplog.text


def test_an_interrupt_is_not_a_sink_s_failure():
    """Ctrl-C while a sink works reaches the publisher."""
    bus = EventBus([Broken(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        bus.publish(note())
    assert bus.num_failures == 0


def test_unsubscribing_ends_one_subscription():
    """Who subscribed twice takes events twice, and leaves once; leaving again does nothing."""
    notebook, bus = Notebook(), EventBus()
    leave = bus.subscribe(notebook)
    bus.subscribe(notebook)
    bus.publish(note())
    leave()
    leave()
    bus.publish(note())

    assert len(notebook.events) == 3


def test_a_sink_may_leave_while_it_takes_an_event():
    """A sink may use the bus from inside; the others still take the event at hand."""
    notebook, bus = Notebook(), EventBus()

    class Once:
        def publish(self, event):
            leave()

    leave = bus.subscribe(Once())
    bus.subscribe(notebook)
    bus.publish(note())
    bus.publish(note())

    assert len(notebook.events) == 2
    assert bus.num_failures == 0


class Behind:
    """A sink that takes its time, and is waited for by nobody."""

    is_slow = True

    def __init__(self):
        self.events, self.go_on = [], threading.Event()

    def publish(self, event):
        self.go_on.wait(5.0)
        self.events.append(event)


def test_what_a_bus_in_a_bus_is_behind_with_is_waited_for():
    """The outer bus is flushed when all have it, and says so where one in the inner has not."""
    behind = Behind()
    outer = EventBus([EventBus([behind])])
    outer.publish(note())
    assert outer.num_waiting == 0  # control: the outer bus itself has nothing left
    assert not outer.flush(0.05)
    threading.Timer(0.05, behind.go_on.set).start()
    assert outer.flush(5.0)
    assert behind.events == [note()]


def test_a_flush_of_a_sink_that_raises_ends_nothing(caplog):
    """It counts as one that has not taken every event."""

    class Keeps(Notebook):
        never_waits = True

        def flush(self, timeout_s):
            raise OSError("no room")

    notebook = Keeps()
    bus = EventBus([notebook])
    bus.publish(note())
    assert not bus.flush()
    assert notebook.events == [note()]


def test_buses_may_be_chained():
    """A bus is a sink."""
    notebook = Notebook()
    EventBus([EventBus([notebook])]).publish(note())
    assert notebook.events == [note()]


@pytest.mark.parametrize("sinks", ["events.jsonl", [print]])
def test_what_cannot_take_an_event_is_refused_when_it_subscribes(sinks):
    """A file's name and a function are no sinks; the bus says so before anything is published."""
    with pytest.raises(TypeError, match=r"a sink has the method publish\(\); got"):
        EventBus(sinks)
