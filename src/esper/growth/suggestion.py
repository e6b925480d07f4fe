"""What growing would bring, said and not done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, SupportsIndex, overload

from esper.contracts.errors import GrowthError
from esper.contracts.report_text import flops_text, with_error
from esper.growth.budget import forward_latency_s
from esper.growth.germination import open_sites, rank
from esper.growth.recording import Recorder, record_beside
from esper.growth.sizing import FORWARD_BACKWARD
from esper.observability.wording import number_text, table_lines
from esper.seeds.fitting import of_parts
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.growth.batch import Batch
    from esper.growth.ranking import RankedCandidate
    from esper.growth.recording import SiteObservation
    from esper.growth.run import GrowthRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One row of what :meth:`esper.Grower.suggest` returns.

    Attributes:
        site: Name of the layer.
        blueprint: Name of the kernel.
        gain: Score of the ranking, to compare kernels by; None without one. The default ranking's
            is the first-order gain: what the training loss would fall by if it kept the slope that
            it has now along a whole whitened step of the kernel's readout. It does not, so that
            the score may exceed the loss itself, and is no fall to be expected.
        stderr: Its standard error; None where it has none.
        parameters: Parameters that the kernel adds.
        flops: FLOPs that it adds to a forward of one sample.
        latency_us: Microseconds of a forward of the kernel on a recorded batch.
        reason: Why there is no score; empty where there is one.
        going_on: Fall of the held-out loss that simply going on would bring for the FLOPs that a
            trial with the kernel takes, by the run's own curve: where it is large, training is
            missing, and not capacity. None where too little was measured.
        going_on_stderr: Its standard error; None as ``going_on`` is.
    """

    site: str
    blueprint: str
    gain: float | None
    stderr: float | None
    parameters: int
    flops: float | None
    latency_us: float
    reason: str
    going_on: float | None = None
    going_on_stderr: float | None = None

    @classmethod
    def of(cls, entry: RankedCandidate, seen: SiteObservation, run: GrowthRun) -> Suggestion:
        """Time the candidate's kernel and put the row together."""
        parallel = entry.candidate.position == "parallel"
        example = seen.inputs[0] if parallel else seen.outputs[0]
        kernel = entry.candidate.kernel
        latency_s = of_parts(example, lambda part: forward_latency_s(kernel, part, clock=run.clock))
        each = FORWARD_BACKWARD * (entry.flops or 0.0) * len(example) + run.ledger.update_flops
        beside = run.going_on(run.settings.trial_updates * each)
        return cls(
            site=entry.site,
            blueprint=entry.blueprint,
            gain=entry.gain,
            stderr=entry.stderr,
            parameters=entry.parameters,
            flops=entry.flops,
            latency_us=latency_s * 1e6,
            reason=entry.reason,
            going_on=None if beside is None else beside.gain,
            going_on_stderr=None if beside is None else beside.stderr,
        )


TITLE: Final = (
    "Where and what to grow (a score compares kernels; it is no fall of the loss to expect)"
)
_HEADS: Final = (
    *("site", "kernel", ">score", ">std. error", ">parameters", ">FLOPs", ">us", "remark"),
)


class Suggestions(list[Suggestion]):
    """A list of suggestions, best first, which prints as a table: so does a slice of it."""

    def __repr__(self) -> str:
        """Return the table that ``esper suggest`` prints."""
        return "\n".join(self.lines())

    @overload
    def __getitem__(self, index: SupportsIndex) -> Suggestion: ...

    @overload
    def __getitem__(self, index: slice) -> Suggestions: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Suggestion | Suggestions:
        """Return a suggestion, or some of them as a table of their own."""
        if isinstance(index, slice):
            return Suggestions(super().__getitem__(index))
        return super().__getitem__(index)

    def lines(self) -> Iterator[str]:
        """Yield the table, and under it what it does not say."""
        if not self:
            yield f"{TITLE}: none"
            return
        yield TITLE
        yield from table_lines(_HEADS, [_cells(row) for row in self])
        first = next((row for row in self if row.going_on is not None), None)
        if first is not None:
            yield (
                "Going on without growing, for the FLOPs of a trial of the first: held-out loss "
                f"lower by {with_error(first.going_on, first.going_on_stderr)}, by the run's own "
                "curve. Where that is much, training is missing, and not capacity"
            )
        yield (
            "To put one in: esper.layers(model)[site].graft(0, kernel, example=...), then "
            "esper.sync_optimizer(model, optimizer), so that it is trained"
        )


def _cells(row: Suggestion) -> Sequence[str]:
    return (
        row.site,
        row.blueprint,
        number_text(row.gain, ".3g"),
        number_text(row.stderr, ".2g"),
        f"{row.parameters:,}",
        flops_text(row.flops),
        f"{row.latency_us:,.0f}",
        row.reason,
    )


def suggestions(run: GrowthRun, batches: Sequence[Batch]) -> Suggestions:
    """Rank every kernel on offer on some batches; the run does not notice.

    What that takes is told, and neither bounded nor taken off what growing may: it was asked for.

    Returns:
        Best first; those that the ranking cannot score come last.

    Raises:
        GrowthError: There is no ``compute_loss``, no batch, or the model's seeds were taken out.
    """
    run.follow_exchanges()
    gone = sorted(run.layers.keys() - layers(run.model).keys())
    if gone:
        msg = (
            "suggest() ranks what could stand in the model's seeds, of which there are none "
            f"any more at {', '.join(gone)}: call it before esper.unwrap or esper.restore"
        )
        raise GrowthError(msg)
    compute_loss = run.compute_loss
    if compute_loss is None or not batches:
        msg = (
            "suggest() ranks on recent batches: give the Grower compute_loss= and call "
            "step(loss, batch=batch) in the training loop first"
        )
        raise GrowthError(msg)
    recorder = Recorder(
        open_sites(run),
        random_seed=run.settings.generator_seed,
        records_shadow_passes=True,
    )
    with recorder, run.fits.in_use(), run.ledger.measured("ranking") as work:
        for batch in batches:
            record_beside(recorder, run.model, compute_loss, batch)
        ranked = rank(run, recorder.observations, is_bounded=False)
    run.ledger.asked += work.flops
    with run.fits.in_use():
        return Suggestions(
            Suggestion.of(entry, recorder.observations[entry.site], run) for entry in ranked.order
        )
