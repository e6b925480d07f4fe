"""What a run tells a registry of its grafts, once each of them is decided.

What was measured is a package against the live run, on held-out data, read once. Each of its
kernels is said to have brought its equal share, with the standard error of the whole: how it is
shared out was not measured. A passenger, and what was rolled back, brought nothing. Refused ones
are reported like those that were kept, so that reports are not of the lucky alone. A kernel that
was auditioned by itself has no twin, and without one there is nothing to report.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.errors import SiteDescriptionError
from esper.contracts.kernel_reports import FieldReport
from esper.contracts.standing import UNIT
from esper.state.site import describe_site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.report import GraftRecord, TrialRecord
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.graft import Grafts
    from esper.growth.journal import Journal
    from esper.growth.recording import SiteObservation

METRIC: Final = "gate loss"
_BROUGHT_NOTHING: Final = ("removed as a passenger", "rolled back")


class FieldReports:
    """Which grafts are to be reported, and of what.

    A graft is told of under the id of the run that germinated first: one that goes on in another
    process tells what the first did, and the registry takes it once.
    """

    def __init__(self) -> None:
        self._about: dict[int, dict[str, Any]] = {}

    def germinated(
        self, graft: int, blueprint: BlueprintIR, layer: KasminaLayer, seen: SiteObservation
    ) -> None:
        """Remember what a graft is of, and where it is.

        Args:
            graft: Its number.
            blueprint: Its kernel's blueprint.
            layer: Its site.
            seen: What was recorded there.
        """
        try:
            spec = describe_site(layer, seen.inputs[0], seen.outputs[0])
        except SiteDescriptionError:
            return  # it was named by hand, at a site that no registry can be asked about
        self._about[graft] = {
            "blueprint_digest": blueprint.digest,
            "site_kind": spec.kind,
            "in_features": spec.in_features,
            "out_features": spec.out_features,
        }

    def decided(self, grafts: Grafts, journal: Journal, run_id: str) -> list[FieldReport]:
        """Return a report of every graft that has been decided since the last call.

        Args:
            grafts: Those of the run.
            journal: What was measured of them.
            run_id: The run that germinated first.
        """
        found = []
        for number in list(self._about):
            record = grafts.numbered(number).record
            if record.decided_at is not None:
                found.append(_report(journal, run_id, record, self._about.pop(number)))
        return [report for report in found if report is not None]

    def state_dict(self) -> list[list[Any]]:
        """Return what is to be reported yet."""
        return [[number, dict(about)] for number, about in self._about.items()]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Go on with what was to be reported."""
        self._about = {number: dict(about) for number, about in state}


def _report(
    journal: Journal, run_id: str, record: GraftRecord, about: Mapping[str, Any]
) -> FieldReport | None:
    trial = next((t for t in journal.trials if t.package == record.package), None)
    if trial is None or trial.effect is None or trial.stderr is None or not record.artifact_id:
        return None
    before = _loss_before(journal, trial)
    if not before:
        return None
    share = trial.effect / len(trial.grafts)
    contribution = 0.0 if record.verdict in _BROUGHT_NOTHING else share / before
    error = trial.stderr / before
    if not (math.isfinite(contribution) and math.isfinite(error)):
        return None
    return FieldReport(
        artifact_id=record.artifact_id,
        run_id=run_id,
        graft_id=str(record.graft),
        metric=METRIC,
        unit=UNIT,
        contribution=contribution,
        standard_error=error,
        num_looks=max(1, trial.samples),
        verdict=record.verdict,
        **about,
    )


def _loss_before(journal: Journal, trial: TrialRecord) -> float:
    """Return how large the loss was at the verdict, by the last reading before it; 0: unknown."""
    decided = trial.decided_at or 0
    read = [e.gate_loss for e in journal.evaluations if e.update <= decided]
    return abs(read[-1]) if read else 0.0
