"""What a seed remembers of its calls, and how that becomes a list of faults.

Forwards and backwards only append, whole tensors and no numbers; somebody between two steps
reads. What happens in compiled code cannot append: it shifts a ring of tensors, and its backwards
leave their marks as the gradient of a small leaf, the *sink*.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


OBSERVED_CALLS: Final = 256
"""So many calls of a seed are remembered between two readings; older ones are not counted."""

Marks = tuple[Tensor, Tensor]
"""Of the host's output, and of that with the seed's share: 0-dim, on the device, NaN where a host
gave NaN and where a share was not good, else any number."""


CLEAN_MARKS: Final[Marks] = (torch.zeros(()), torch.zeros(()))
"""Of a call whose result was seen to be finite: the host's output and the share were, too."""


class Backward:
    """One backward through a kernel, or through several calls of it at once.

    Attributes:
        incoming: Totals of the gradients that reached its outputs: finite where they are.
        leaving: Totals of the gradients that left towards its parameters.
        is_ending: Whether a parameter has had its gradient.
    """

    __slots__ = ("incoming", "is_ending", "leaving")

    def __init__(self) -> None:
        self.incoming: list[Tensor | float] = []
        self.leaving: list[Tensor | float] = []
        self.is_ending = False


class Call:
    """One eager call of a kernel.

    Attributes:
        shape: Shape of the host's output.
        marks: :data:`Marks` of the host's output and of that with the share, :data:`CLEAN_MARKS`
            where they were seen to be finite; None where the call was clean and had no guard.
        raised: Whether the fence took it; ``marks`` then has the host's only.
        incoming: Total of the gradient that reached its output, if one has.
        leaving: Totals of the gradients that left towards its inputs.
        backward: The backward that came through it, if one has.
    """

    __slots__ = ("backward", "incoming", "leaving", "marks", "raised", "shape")

    def __init__(
        self, shape: torch.Size, marks: tuple[Tensor, ...] | None = None, *, raised: bool = False
    ) -> None:
        self.shape = shape
        self.marks = marks
        self.raised = raised
        self.incoming: Tensor | float | None = None
        self.leaving: list[Tensor | float] = []
        self.backward: Backward | None = None


class Observations:
    """What was seen of one seed since the last reading.

    Args:
        device: Where the seed's kernel is.
        like: Others there, whose ring and sink are unused and serve these, too.

    Attributes:
        calls: Recent eager calls, oldest first.
        latest: The eager call whose backward is under way or was the last; None in compiled code.
        ring: ``[OBSERVED_CALLS, 2]`` float32: for recent compiled calls whether the host's output
            and that with the seed's share were finite: 0 for yes, NaN for no, infinity for no call.
        sink: ``[2]`` float32 leaf; its gradient counts, over compiled backwards, gradients not
            finite that reached the kernel's output, and that left towards its inputs.
        leaving: Per parameter, totals of gradients that left in compiled backwards.
        carried: What :meth:`step_flags` said of calls that were read before the optimizer's step.
        skipped: Calls that went on without the kernel for no fault of its own, by the reason.
    """

    def __init__(self, device: torch.device, *, like: Observations | None = None) -> None:
        if like is None:
            with torch.inference_mode(mode=False):
                self._unused = torch.full((OBSERVED_CALLS, 2), torch.inf, device=device)
                self.sink = torch.zeros(2, device=device, requires_grad=True)
        else:
            self._unused, self.sink = like.ring, like.sink
        self.ring: Tensor = self._unused
        self.calls: deque[Call] = deque(maxlen=OBSERVED_CALLS)
        self.latest: Call | None = None
        self.leaving: dict[int, list[Tensor | float]] = {}
        self.carried: Tensor | None = None
        self.skipped: Counter[str] = Counter()

    @property
    def is_unused(self) -> bool:
        """Whether nothing compiled has left anything in the ring or the sink."""
        return self.ring is self._unused and self.sink.grad is None

    def anew(self) -> Observations:
        """Return what has seen nothing; whoever has these goes on with them."""
        return Observations(self.ring.device, like=self if self.is_unused else None)

    def skip(self, reason: str) -> None:
        """Count a call that goes on without the kernel, which is not at fault."""
        self.skipped[reason] += 1

    def come_in(self, call: Call, total: Tensor | float) -> None:
        """Remember the total of a gradient that reached a call's output."""
        backward = None if self.latest is None else self.latest.backward
        if backward is None or backward.is_ending or len(backward.incoming) >= OBSERVED_CALLS:
            backward = Backward()
        backward.incoming.append(total)
        call.incoming, call.backward = total, backward
        self.latest = call

    def leave(self, place: int, total: Tensor | float) -> None:
        """Remember the total of a gradient that left.

        Args:
            place: Number of the parameter, or -1 for an input of an eager call.
            total: What is finite where the gradient is.
        """
        backward = None if self.latest is None else self.latest.backward
        if backward is not None and place >= 0:
            backward.is_ending = True
        if isinstance(total, float) and math.isfinite(total):
            return
        if self.latest is None or backward is None:
            sums = self.leaving.setdefault(place, [])
        else:
            sums = self.latest.leaving if place < 0 else backward.leaving
        if len(sums) < OBSERVED_CALLS:
            sums.append(total)

    def rows(self) -> Tensor:
        """Return ``[n, 2]``, one row a call that was marked, in the code of :attr:`ring`."""
        pairs = [
            call.marks
            for call in tuple(self.calls)
            if not (call.marks is None or call.marks is CLEAN_MARKS or call.raised)
        ]
        if not pairs:
            return self.ring.detach()
        like = self.ring
        marks = [mark.tanh().to(like.dtype) for pair in pairs for mark in pair]
        rows = torch.stack(marks).view(-1, 2)
        return torch.cat((like, rows - rows))

    def step_flags(self) -> Tensor:
        """Return ``[2]`` bool: an output was at fault, a host's output was not finite."""
        if self.ring is self._unused and all(
            call.marks is CLEAN_MARKS for call in tuple(self.calls)
        ):
            clean = torch.zeros(2, dtype=torch.bool, device=self.ring.device)
            return clean if self.carried is None else self.carried
        rows = self.rows()
        output_bad = ((rows[:, 0] == 0) & (rows[:, 1] != 0)).any()
        flags = torch.stack((output_bad, rows[:, 0].isnan().any()))
        return flags if self.carried is None else flags | self.carried


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the calls since the last reading have shown.

    Attributes:
        outcomes: Of the calls that show anything of the kernel, oldest first; True at fault.
        reason: What the last fault was; empty where there was none.
        skipped: Calls without the kernel that show nothing of it, by the reason.
        works_on_batches: Whether a call of several samples has ever been clean.
        num_compiled: Calls that were made in compiled code, of the latest ``OBSERVED_CALLS``.
        has_compiled: Whether some of them show anything of the kernel.
    """

    outcomes: list[bool]
    reason: str
    skipped: Counter[str]
    works_on_batches: bool
    has_compiled: bool
    num_compiled: int = 0


def read(seen: Observations, *, works_on_batches: bool = False) -> Reading:
    """Read what was seen. One transfer from the device.

    A call whose host gave NaN counts neither way, and a gradient counts only where all that reached
    the kernel's output was finite. Nor does a fault in a call of one sample count where the kernel
    works on several: statistics over one, as of the rest of an epoch, are none.

    Args:
        seen: What was seen.
        works_on_batches: What the reading before has said.
    """
    calls = tuple(seen.calls)  # a forward of another thread may be under way
    if _shows_no_fault(seen, calls):
        return Reading(
            outcomes=[False] * len(calls),
            reason="",
            skipped=Counter(),
            works_on_batches=works_on_batches or any(call.shape[:1] != (1,) for call in calls),
            has_compiled=False,
        )
    numbers = _Numbers(seen)
    outcomes, reason = _compiled_outcomes(seen, numbers)
    has_compiled = bool(outcomes)
    blamed: set[int] = set()
    skipped = seen.skipped.copy()
    for call in calls:
        fault = _outcome(call, numbers, blamed)
        if fault is None:
            continue
        is_single = call.shape[:1] == (1,)
        if fault and is_single and works_on_batches:
            skipped["one sample is too little for its statistics"] += 1
            continue
        works_on_batches |= not fault and not is_single
        outcomes.append(bool(fault))
        reason = fault or reason
    return Reading(
        outcomes=outcomes,
        reason=reason,
        skipped=skipped,
        works_on_batches=works_on_batches,
        has_compiled=has_compiled,
        num_compiled=sum(row[0] != math.inf for row in numbers.ring),
    )


def _shows_no_fault(seen: Observations, calls: Sequence[Call]) -> bool:
    """Say whether all was seen to be finite when it happened, as in most steps of most seeds."""
    if seen.leaving or seen.skipped or not seen.is_unused:
        return False
    for call in calls:
        is_clean = call.marks is None or (call.marks is CLEAN_MARKS and call.incoming is None)
        if call.raised or not is_clean:
            return False
    return True


def _outcome(call: Call, numbers: _Numbers, blamed: set[int]) -> str | None:
    """Return what was wrong with a call, "" if nothing was, None if it says nothing."""
    if call.marks is None:
        return ""
    if not numbers.finite(call.marks[0]):
        return None
    if call.raised:
        return "raised"
    if not numbers.finite(call.marks[1]):
        return "its output was not finite where its host's was"
    if call.incoming is None or call.backward is None:
        return ""
    if numbers.finite(call.incoming) and not numbers.all_finite(call.leaving):
        return _BAD_GRADIENT
    backward = call.backward
    if id(backward) in blamed or not numbers.all_finite(backward.incoming):
        return ""
    blamed.add(id(backward))
    return "" if numbers.all_finite(backward.leaving) else _BAD_GRADIENT


_BAD_GRADIENT: Final = "its gradient was not finite where the incoming one was"


def _compiled_outcomes(seen: Observations, numbers: _Numbers) -> tuple[list[bool], str]:
    known = [row for row in numbers.ring if row[0] == 0]
    outcomes = [row[1] != 0 for row in known]
    reason = "its output was not finite where its host's was" if any(outcomes) else ""
    came_bad, left_bad = numbers.sink
    of_parameters = [
        sum(not numbers.finite(total) for total in sums) for sums in seen.leaving.values()
    ]
    num_faulty = 0 if came_bad else max([int(left_bad > 0), *of_parameters])
    clean = [i for i, bad in enumerate(outcomes) if not bad]
    for i in clean[max(0, len(clean) - num_faulty) :]:
        outcomes[i] = True
        reason = _BAD_GRADIENT
    return outcomes, reason


class _Numbers:
    """Every tensor of a reading, brought over at once."""

    def __init__(self, seen: Observations) -> None:
        tensors = {id(t): t.detach() for t in _totals(seen)}
        known = (call.marks or () for call in tuple(seen.calls) if call.marks is not CLEAN_MARKS)
        tensors |= {
            id(m): m.detach().tanh() for marks in known for m in marks
        }  # infinity is no news
        if not tensors and seen.is_unused:
            self.ring, self.sink, self._known = [], [0.0, 0.0], {}
            return  # the usual case in host memory: all that was seen are numbers
        sink = torch.zeros(2) if seen.sink.grad is None else seen.sink.grad
        device = seen.ring.device
        flat = [(t - t).to(device, torch.float32) for t in tensors.values()]
        parts = [seen.ring.detach().flatten(), sink.to(device)]
        if flat:
            stacked = torch.stack(flat)
            parts.append(stacked)
        values = torch.cat(parts).tolist()
        size = 2 * OBSERVED_CALLS
        self.ring = list(zip(values[0:size:2], values[1:size:2], strict=True))
        self.sink = values[size : size + 2]
        self._known = dict(zip(tensors, values[size + 2 :], strict=True))

    def finite(self, total: Tensor | float) -> bool:
        """Say whether what was remembered is finite; what came since says nothing."""
        known = total if isinstance(total, float) else self._known.get(id(total), 0.0)
        return math.isfinite(known)

    def all_finite(self, totals: Sequence[Tensor | float]) -> bool:
        """Say so of several."""
        return all(self.finite(total) for total in totals)


def _totals(seen: Observations) -> list[Tensor]:
    found: list[Tensor | float] = [total for sums in seen.leaving.values() for total in sums]
    for call in tuple(seen.calls):
        found += call.leaving
        if call.backward is not None:
            found += call.backward.incoming
            found += call.backward.leaving
    return [total for total in found if isinstance(total, Tensor)]
