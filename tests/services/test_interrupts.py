"""Ctrl-C while something is trained and kept."""

import os
import signal
import threading

import pytest

from esper.services.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("ctrl_c")


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_only_the_first_ctrl_c_comes_through():
    """The first one raises; the later ones are counted, said, and change nothing."""
    said = []
    with Interrupts(lambda: said.append(None)) as interrupts:
        with pytest.raises(KeyboardInterrupt):
            press()
        press()
        press()
        assert interrupts.num_held == len(said) == 2
    with pytest.raises(KeyboardInterrupt):
        press()


def test_none_comes_through_while_a_model_is_written():
    """After ``hold`` not even the first one raises."""
    with Interrupts() as interrupts:
        interrupts.hold()
        press()
        assert interrupts.num_held == 1


def test_handler_of_somebody_else_is_left_alone(monkeypatch):
    """A process that handles SIGINT itself goes on doing so."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(None))
    try:
        with Interrupts():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [None]


def test_thread_can_be_without_it():
    """Outside of the main thread, where no handler can be set, it does nothing."""
    failures = []

    def work():
        try:
            with Interrupts():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
