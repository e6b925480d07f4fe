"""The fence around foreign code tells what came of it, and lets an interrupt through."""

import asyncio

import pytest

from esper.resilience.attempt import Done, Failed, attempt, attempt_async


def test_a_value_comes_back_as_done():
    """What foreign code returns, None included, is told apart from a failure."""
    assert attempt(lambda: 3) == Done(3)
    assert attempt(lambda: None) == Done(None)


def test_an_error_comes_back_with_its_class_and_traceback():
    """The error itself is kept, and says in words what it was."""
    outcome = attempt(lambda: 1 // 0)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ZeroDivisionError)
    assert outcome.error.__traceback__ is not None
    assert str(outcome) == "ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_answer(error):
    """Somebody who wants to stop the program is not kept from it."""

    def interrupted():
        raise error

    with pytest.raises(error):
        attempt(interrupted)


def test_awaited_code_has_the_same_fence():
    """A value, an error and a cancellation come through as they do around a plain function."""

    async def returns():
        return 3

    async def fails():
        raise ConnectionError("gone")

    async def is_cancelled():
        raise asyncio.CancelledError

    assert asyncio.run(attempt_async(returns)) == Done(3)
    assert str(asyncio.run(attempt_async(fails))) == "ConnectionError: gone"
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(attempt_async(is_cancelled))
