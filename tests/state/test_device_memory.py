"""What an accelerator says of its memory, whichever it is."""

import pytest
import torch

from esper.growth.memory import available_bytes
from esper.state.device_memory import device_memory


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator, with a gigabyte of which a quarter is in use."""

    def says(name, value):
        monkeypatch.setattr(torch.accelerator, name, lambda *_: value)

    says("current_accelerator", torch.device("xpu"))
    says("get_memory_info", (700, 1000))
    says("memory_reserved", 150)
    says("memory_allocated", 100)
    return torch.device("xpu", 0)


def test_what_the_allocator_keeps_is_left(accelerator):
    """It is given out again to this process."""
    assert device_memory(accelerator) == (750, 1000)
    assert available_bytes(accelerator) == 750


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_a_back_end_that_does_not_tell_is_not_known(accelerator, error, monkeypatch):
    """However it says that it does not."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(torch.accelerator, "memory_reserved", refuse)
    assert device_memory(accelerator) is None
    assert available_bytes(accelerator) is None


def test_another_device_is_not_asked(accelerator):
    """Only the machine's accelerator has such memory."""
    assert device_memory(torch.device("cpu")) is None
    assert device_memory(torch.device("meta")) is None
    assert device_memory(torch.device("cuda")) is None
