"""The call of a layer that is kept: what a copy shares, and in which dtype it is."""

import logging

import torch

from esper.state.layer_call import LayerCall


class Uncopied:
    """An argument that refuses to be copied."""

    def __deepcopy__(self, memo):
        raise LookupError("there is one of me")


def test_an_argument_that_cannot_be_copied_is_shared_and_said_once(caplog):
    """By its class, with what it raised; the tensors beside it are copied."""
    x, only = torch.ones(2), Uncopied()
    with caplog.at_level(logging.WARNING, "esper"):
        kept = [LayerCall((x, only), {}).detached() for _ in range(3)]
    assert all(call.args[1] is only and call.x is not x for call in kept)
    (record,) = caplog.records
    assert "Uncopied" in record.message
    assert record.exc_info[0] is LookupError


def test_a_call_is_cast_with_what_is_in_its_containers():
    """Floating tensors only."""
    x, number = torch.ones(2), torch.ones(2, dtype=torch.int64)
    call = LayerCall((x, [x, number]), {"state": {"h": x}}).with_dtype(torch.bfloat16)
    assert call.x.dtype == call.args[1][0].dtype == torch.bfloat16
    assert call.kwargs["state"]["h"].dtype == torch.bfloat16
    assert call.args[1][1].dtype == torch.int64
