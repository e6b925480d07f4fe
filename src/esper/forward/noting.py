"""What a layer with a waiting graft does in a forward: it notes its input, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from esper.contracts.call_stack import frames
from esper.state.layer_call import LayerCall

if TYPE_CHECKING:
    from types import FrameType

    from esper.state.layer_record import LayerRecord
    from esper.state.waiting import Note

CHECKPOINT_FILE: Final = torch.utils.checkpoint.__file__

_PLAIN: Final = (bool, int, float, str, type(None))


def take_note(record: LayerRecord, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Keep a copy of the first call, for the probe to come; nothing else is done with it.

    Args:
        record: The layer's.
        args: Positional arguments of the call.
        kwargs: Its keyword arguments.
    """
    note = record.note
    if note is None or record.in_shadow:
        return
    if torch.compiler.is_compiling():
        if note.call is None:
            _note_compiled(note, args, kwargs)
        return
    _count_recomputation(note)
    if note.call is None and _are_numbers((*args, *kwargs.values())):
        with temporarily_clear_interpreter_stack():
            note.call = LayerCall(args, kwargs).with_tensors(_outside_transforms).detached()
        note.is_autocast = any(
            torch.is_autocast_enabled(t.device.type) for t in note.call.tensors()
        )


def _count_recomputation(note: Note) -> None:
    """Count calls that a backward will run again: until it has, the layer must stay as it is."""
    if torch._C._current_graph_task_id() != -1:  # noqa: SLF001 - a backward is running; no public one
        note.num_to_recompute = max(0, note.num_to_recompute - 1)
    elif any(_will_run_again(frame) for frame in frames()):
        note.num_to_recompute += 1


def _will_run_again(frame: FrameType) -> bool:
    """Return whether a frame is of a checkpoint; a reentrant one has gradients off inside."""
    if frame.f_code.co_filename != CHECKPOINT_FILE:
        return False
    return torch.is_grad_enabled() or frame.f_code.co_name == "forward"


def _note_compiled(note: Note, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Keep the call where dynamo can follow: what a graph gives is stored when it has run."""
    if torch.compiler.is_exporting():
        return
    for value in (*args, *kwargs.values()):
        if not isinstance(value, (Tensor, *_PLAIN)):
            return
    kept = LayerCall(args, kwargs).with_tensors(lambda t: t.detach().clone())
    note.call = kept


def _are_numbers(values: tuple[object, ...]) -> bool:
    """Say whether a call is one with numbers: what traces a model hands stand-ins through it."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # noqa: SLF001 - there is no public one
    if mode is not None:
        return False
    return not any(
        isinstance(value, torch.fx.Proxy)
        or (isinstance(value, Tensor) and value.device.type == "meta")
        for value in values
    )


def _outside_transforms(tensor: Tensor) -> Tensor:
    """Return what a tensor of ``torch.func`` wraps; of a batch that is mapped over, one sample."""
    functorch = torch._C._functorch  # noqa: SLF001 - there is no public way out
    while functorch.is_functorch_wrapped_tensor(tensor):
        axis = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor if axis < 0 else tensor.select(axis, 0)
    return tensor
