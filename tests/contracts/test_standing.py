"""What field reports say together."""

import pytest

from esper.contracts.kernel_reports import FieldReport
from esper.contracts.standing import TYPICAL_EFFECT, pooled


def report(run, contribution, standard_error=0.01, **fields):
    return FieldReport(
        **{
            "artifact_id": "0" * 64,
            "blueprint_digest": "1" * 64,
            "run_id": f"run-{run}",
            "graft_id": "1",
            "site_kind": "linear",
            "in_features": 8,
            "out_features": 8,
            "metric": "gate loss",
            "unit": "relative",
            "contribution": contribution,
            "standard_error": standard_error,
            "num_looks": 100,
            "verdict": "fossilized",
            **fields,
        }
    )


def test_nothing_is_said_where_nothing_was_reported():
    """Nor where reports are in a unit of their run's own."""
    assert pooled([]) is None
    assert pooled([report(1, 0.5, unit="nats")]) is None


def test_the_formula_by_hand():
    """Two runs that differ by less than their errors: the scatter is the prior's share."""
    between = 2 * TYPICAL_EFFECT**2 / 3
    weight = 1 / (0.1**2 + between)
    total = 1 / TYPICAL_EFFECT**2 + 2 * weight
    found = pooled([report(1, 0.1, 0.1), report(2, 0.2, 0.1)])
    assert found.effect == pytest.approx(0.3 * weight / total)
    assert found.standard_error == pytest.approx(total**-0.5)
    assert found.lower == pytest.approx(found.effect - 2.3534 * total**-0.5, rel=1e-3)


def test_more_runs_say_more_and_scatter_says_less():
    """The lower bound rises with runs that agree, and falls where they do not."""
    few, many = (pooled([report(i, 0.05) for i in range(n)]) for n in (2, 20))
    scattered = pooled([report(i, 0.05 + (-1) ** i * 0.2) for i in range(20)])
    assert few.lower < many.lower < 0.05
    assert scattered.lower < 0 < many.lower
    assert scattered.standard_error > 3 * many.standard_error


def test_grafts_of_one_run_are_one_run():
    """Ten reports of one run are no surer than one: they share its luck."""
    one = pooled([report(1, 0.05)])
    assert pooled([report(1, 0.05, graft_id=str(i)) for i in range(10)]) == one


def test_a_report_without_an_error_is_not_the_only_one_that_counts():
    """An error of 0 leaves the scatter between runs."""
    found = pooled([report(1, 1.0, 0.0), *(report(i, 0.0, 0.01) for i in range(2, 8))])
    assert found.effect < 0.2
