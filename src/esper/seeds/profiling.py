"""Profiles: the work of every seed under its name, in torch's traces and in a table."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from esper.forward.class_change import choose_forward
from esper.forward.recompilation import allow_graph_for, uncompiled
from esper.state.host_parts import check_module
from esper.state.layer_record import RECORD, record_of
from esper.state.range_sums import WORKS, RangeSums, Work
from esper.state.ranges import range_name
from esper.state.roster import where_kernels_stand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from torch import nn

    from esper.state.layer_record import LayerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRange:
    """What one seed did of one kind while its model was profiled.

    Attributes:
        layer: Name of the layer.
        seed_idx: Index of the seed.
        work: ``"forward"``, ``"backward"``, ``"probe"``, ``"trial"`` or ``"verdict"``.
        calls: How often, at least 1 unless a backward was entered in its middle.
        total_us: Time on the threads that did it, in microseconds: where an accelerator computes,
            the time to ask it. The trial and the verdict of a package count whole for each seed.
    """

    layer: str
    seed_idx: int
    work: Work
    calls: int
    total_us: float

    @property
    def name(self) -> str:
        """What it is called in traces."""
        return range_name(self.layer, self.seed_idx, self.work)

    @property
    def mean_us(self) -> float:
        """Time of a call, in microseconds."""
        return self.total_us / max(1, self.calls)


class Profile:
    """What :func:`profile` has seen; it can be read inside, and afterwards.

    Attributes:
        rows: What each seed did, by layer, seed and work.
        compiled: Names of the layers that stand in compiled code, whose kernels have no ranges of
            their own; empty where nothing is compiled, or ``eager=True`` was given.
    """

    def __init__(self, compiled: tuple[str, ...] = ()) -> None:
        self.compiled = compiled
        self._sums = RangeSums()

    @property
    def rows(self) -> tuple[ProfiledRange, ...]:
        """What each seed did, by layer, seed and work."""
        found = [
            ProfiledRange(layer=layer, seed_idx=i, work=work, calls=calls, total_us=seconds * 1e6)
            for (layer, i, work), (calls, seconds) in self._sums.sums().items()
        ]
        return tuple(sorted(found, key=lambda r: (r.layer, r.seed_idx, WORKS.index(r.work))))

    def __str__(self) -> str:
        """Return a table, a line for each row, and what it cannot show."""
        rows = self.rows
        width = max([len("range"), *(len(row.name) for row in rows)])
        lines = [f"{'range':<{width}}  {'calls':>8}  {'total ms':>12}  {'mean us':>12}"]
        lines += [
            f"{row.name:<{width}}  {row.calls:>8,}  {row.total_us / 1e3:>12,.3f}  "
            f"{row.mean_us:>12,.1f}"
            for row in rows
        ]
        if not rows:
            lines.append("no seed has run outside of compiled code")
        if self.compiled:
            lines.append(
                "Inside compiled code kernels are part of its graphs and have no ranges: "
                f"{', '.join(name or '(root)' for name in self.compiled)}. With "
                "esper.profile(model, eager=True) it runs eagerly, and they have."
            )
        return "\n".join(lines)


class _Profiling:
    """The context manager of one profile; entered once."""

    def __init__(self, model: nn.Module, *, eager: bool) -> None:
        check_module("profile", model)
        self._model = model
        self._eager = eager
        self._exits = ExitStack()
        self._has_begun = False

    def __enter__(self) -> Profile:
        if self._has_begun:
            msg = "this profile was entered already; call esper.profile(model) for another one"
            raise RuntimeError(msg)
        self._has_begun = True
        layers = [m for m in self._model.modules() if RECORD in m.__dict__]
        compiled = () if self._eager else _in_graphs(self._model, layers)
        profile = Profile(tuple(record_of(layer).name for layer in compiled))
        with ExitStack() as exits:
            if self._eager:
                exits.enter_context(uncompiled(self._model))
                exits.enter_context(torch.compiler.set_stance("force_eager"))
            allow_graph_for("profiled")
            left = {id(layer) for layer in compiled}
            for layer in layers:
                sums = profile._sums  # noqa: SLF001 - its maker
                exits.enter_context(_named(layer, sums, names_calls=id(layer) not in left))
            self._exits = exits.pop_all()
        return profile

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exits.__exit__(kind, error, trace)


def _in_graphs(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the layers that stand in compiled code, as far as anybody can know."""
    dynamo = sys.modules.get("torch._dynamo")  # takes seconds to import; without it nothing is
    compiled = () if dynamo is None else dynamo.OptimizedModule
    inside = {
        id(module)
        for outer in model.modules()
        if isinstance(outer, compiled) or outer.__dict__.get("_compiled_call_impl")
        for module in outer.modules()
    }
    return [
        layer
        for layer in layers
        if id(layer) in inside or any(s.runs_compiled for s in record_of(layer).seeds.values())
    ]


@contextmanager
def _named(layer: nn.Module, sums: RangeSums, *, names_calls: bool) -> Iterator[None]:
    """Let a layer's seeds work under their names; of calls only where no graph has them."""
    record = record_of(layer)
    record.profiles += (sums,)
    record.num_naming += names_calls
    _follow(layer, record)
    try:
        yield
    finally:
        record.profiles = tuple(each for each in record.profiles if each is not sums)
        record.num_naming -= names_calls
        _follow(layer, record)


def _follow(layer: nn.Module, record: LayerRecord) -> None:
    """Choose a layer's forward; its kernels may have moved, or been unwrapped, meanwhile."""
    stands_in = where_kernels_stand(layer)
    if stands_in.__dict__.get(RECORD) is record and record.plan:
        choose_forward(stands_in)


def profile(model: nn.Module, *, eager: bool = False) -> _Profiling:
    """Name the work of a model's seeds while a ``with`` block runs.

    ``with esper.profile(model) as p:`` lets each contributing seed's forward and backward, and the
    probes, trials and verdicts of seeds, run in ranges ``esper/<layer>/<seed>/<work>``. They are in
    the trace of a ``torch.profiler.profile`` that runs around it, and summed in ``p.rows``, which
    ``print(p)`` shows as a table. Outside of the block the forwards are the ones that there were,
    and cost what they did. Blocks may be nested, and seeds may come and go inside.

    Kernels inside compiled code (``torch.compile(model)``, ``module.compile()``) are part of its
    graphs, which stay as they are: they have no ranges, and ``p.compiled`` names them. With
    ``eager=True`` nothing compiled runs inside the block, and the times are those of eager code. A
    function of the owner's that is compiled, and calls the model, is recognised once
    :func:`esper.maintain` has seen it; before that a graph is made for the block.

    Args:
        model: A model with wrapped layers, which may be inside DDP or ``torch.compile``.
        eager: Whether what is compiled runs eagerly inside the block.

    Raises:
        TypeError: ``model`` is no module.
    """
    return _Profiling(model, eager=eager)
