"""FLOPs of an update, counted where it is made: nothing is run for it, and no bit changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from esper.resilience.attempt import Done, attempt
from esper.seeds.shadow import in_shadow_pass, shadow_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from esper.growth.batch import Batch, LossFunction

FORWARD_AND_BACKWARD: Final = 3
"""FLOPs of a forward and its backward over those of the forward: each matrix product has two."""


class StepFlops:
    """Counts the FLOPs of a model's updates: one is looked at after each change of its depth.

    In that update a forward is counted as it runs, three times for its backward. A model that is
    compiled is not touched: there ``compute_loss`` is run once aside, where there is one.

    Args:
        model: The model, outside of DistributedDataParallel and ``torch.compile``.
        is_compiled: Whether something around it is compiled.
        compute_loss: ``(model, batch)`` to a scalar loss, or None.
    """

    def __init__(
        self, model: nn.Module, *, is_compiled: bool, compute_loss: LossFunction | None
    ) -> None:
        self._model, self._compute_loss = model, compute_loss
        self._is_compiled = is_compiled
        self._handles: list[RemovableHandle] = []
        self._mode: _Counting | None = None
        self._counted = self._num_updates = 0
        self._per_update: float | None = None
        self._may_run_aside = False
        self.begin()

    def begin(self) -> None:
        """Count anew from here: the model's depth is another."""
        self.close()
        self._num_updates, self._per_update, self._counted = 0, None, 0
        self._may_run_aside = self._is_compiled and self._compute_loss is not None
        if not self._is_compiled:
            before = self._model.register_forward_pre_hook(self._enter, prepend=True)
            after = self._model.register_forward_hook(self._leave, always_call=True)
            self._handles = [before, after]

    @property
    def total(self) -> float | None:
        """FLOPs of the updates since :meth:`begin`; None where they could not be counted."""
        return None if self._per_update is None else self._per_update * self._num_updates

    def after_update(self, batches: list[Batch]) -> None:
        """Learn that an update was made, of these batches."""
        self._num_updates += 1
        if self._counted and self._per_update is None:
            self._per_update = float(FORWARD_AND_BACKWARD * self._counted)
            self.close()
        elif self._may_run_aside and batches:
            self._may_run_aside = False
            self._run_aside(batches)

    def state_dict(self) -> list[float | None]:
        """Return what was counted, as JSON can hold it."""
        return [self._num_updates, self._per_update, self._counted, int(self._may_run_aside)]

    def load_state_dict(self, state: Sequence[float | None]) -> None:
        """Go on counting where another model of the same depth was."""
        self.begin()
        self._num_updates, self._per_update = int(state[0] or 0), state[1]
        self._counted, self._may_run_aside = int(state[2] or 0), bool(state[3])
        if self._per_update is not None:
            self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, *_: object) -> None:
        if torch.is_grad_enabled() and self._mode is None and not in_shadow_pass():
            self._mode = _Counting()
            self._mode.__enter__()  # type: ignore[no-untyped-call] # torch has none

    def _leave(self, *_: object) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call] # as above
            self._counted += mode.flops

    def _run_aside(self, batches: list[Batch]) -> None:
        compute_loss, total = self._compute_loss, 0
        assert compute_loss is not None
        for batch in batches:
            apart = shadow_pass(self._model, functions=(compute_loss,), values=(batch,))
            with apart, torch.no_grad(), FlopCounterMode(display=False) as flops:
                compute_loss(self._model, batch)
            total += flops.get_total_flops()
        self._per_update = float(FORWARD_AND_BACKWARD * total)


def is_compiled(model: nn.Module) -> bool:
    """Say whether ``torch.compile`` is around a model, or around or in a part of it."""
    return any(
        m.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in m.__dict__["_modules"]
        for m in model.modules()
    )


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call] # as above
    """Adds up the FLOPs of what runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation as it is, and count it where torch knows how."""
        given = kwargs or {}
        output: Tensor | Any = func(*args, **given)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None and not in_shadow_pass():
            found = attempt(lambda: count(*args, **given, out_val=output))
            self.flops += int(found.value) if isinstance(found, Done) else 0
        return output
