"""Grafts: each owns its stage, lets only those follow that may, and is listened to."""

from __future__ import annotations

import pytest

from esper.contracts.lifecycle import ALLOWED_STAGES, GraftStage
from esper.contracts.progress import GraftStatus
from esper.growth.budget import Cost
from esper.growth.graft import NO_COST, Germination, Grafts

COST = Cost(parameters=10, flops=5.0, latency_s=1e-3)
STEPS = {
    GraftStage.AUDITION: lambda graft: graft.begin_audition("probed"),
    GraftStage.BLENDING: lambda graft: graft.admit("it helps", update=7),
    GraftStage.HOLDING: lambda graft: graft.hold("alpha is 1"),
    GraftStage.FOSSILIZED: lambda graft: graft.fossilize("it helped", update=9, folded=True),
    GraftStage.CULLED: lambda graft: graft.cull(
        "it did not", update=9, verdict="culled at admission"
    ),
}
WAY = [GraftStage.AUDITION, GraftStage.BLENDING, GraftStage.HOLDING, GraftStage.FOSSILIZED]
LEADING_TO = {
    GraftStage.GERMINATED: [],
    **{stage: WAY[: index + 1] for index, stage in enumerate(WAY)},
    GraftStage.CULLED: [GraftStage.CULLED],
}


class Heard:
    def __init__(self):
        self.stages = []

    def stage_changed(self, record, before):
        self.stages.append((record.graft, before, record.stage, record.reason))


def germination(**changes):
    fields = {
        "site": "features.0",
        "seed_idx": 2,
        "blueprint": "mlp-8",
        "artifact_id": "sha256:0",
        "reason": "ranked first",
        "update": 3,
        "cost": COST,
    }
    return Germination(**{**fields, **changes})


def germinated():
    heard = Heard()
    return Grafts(heard).germinate(germination()), heard


@pytest.mark.parametrize("stage", list(LEADING_TO))
@pytest.mark.parametrize("after", list(STEPS))
def test_only_those_stages_follow_that_may(stage, after):
    """Every arrow of the table is taken, every other one is refused and changes nothing."""
    graft, heard = germinated()
    for step in LEADING_TO[stage]:
        STEPS[step](graft)
    assert graft.stage is stage
    record, num_heard = graft.record, len(heard.stages)
    if after in ALLOWED_STAGES[stage]:
        STEPS[after](graft)
        assert graft.stage is after
        assert heard.stages[-1][1:3] == (stage, after)
    else:
        with pytest.raises(ValueError, match=f"graft 1 at 'features.0' is {stage.value}, after"):
            STEPS[after](graft)
        assert graft.record == record
        assert len(heard.stages) == num_heard


def test_an_audition_leads_into_the_model_by_blending_only():
    """No arrow goes past it, so that no alpha jumps."""
    assert ALLOWED_STAGES[GraftStage.AUDITION] == {GraftStage.BLENDING, GraftStage.CULLED}


def test_the_listener_hears_every_stage_with_its_reason():
    """From germination, with nothing before it, to the verdict."""
    graft, heard = germinated()
    for stage in WAY:
        STEPS[stage](graft)
    assert heard.stages == [
        (1, None, GraftStage.GERMINATED, "ranked first"),
        (1, GraftStage.GERMINATED, GraftStage.AUDITION, "probed"),
        (1, GraftStage.AUDITION, GraftStage.BLENDING, "it helps"),
        (1, GraftStage.BLENDING, GraftStage.HOLDING, "alpha is 1"),
        (1, GraftStage.HOLDING, GraftStage.FOSSILIZED, "it helped"),
    ]


def test_the_record_has_what_happened():
    """When, with which verdict, and what was measured on the way."""
    graft, _ = germinated()
    for stage in WAY[:3]:
        STEPS[stage](graft)
    graft.record_dependence(0.5)
    graft.record_contribution(0.25, stderr=0.1, host_only=0.75)
    STEPS[GraftStage.FOSSILIZED](graft)
    record = graft.record
    assert (record.germinated_at, record.admitted_at, record.decided_at) == (3, 7, 9)
    assert (record.verdict, record.folded, record.parameters) == ("fossilized", True, 10)
    assert (record.dependence, record.contribution, record.contribution_stderr) == (0.5, 0.25, 0.1)
    assert record.host_only_contribution == 0.75


def test_status_is_a_value_with_names():
    """Where a graft is can be read, compared and printed."""
    graft, _ = germinated()
    assert graft.status == GraftStatus(site="features.0", seed_idx=2, stage=GraftStage.GERMINATED)
    assert str(graft.status) == "features.0.2 germinated"


def test_a_graft_costs_while_it_is_in_the_model():
    """Neither before it is admitted nor after it is culled."""
    costs = []
    graft, _ = germinated()
    for stage in [*WAY[:3], GraftStage.CULLED]:
        STEPS[stage](graft)
        costs.append(graft.added_cost)
    assert costs == [NO_COST, COST, COST, NO_COST]


def test_all_grafts_are_numbered_and_summed_up():
    """An admission counts for good; the cost of what was removed does not."""
    grafts = Grafts(Heard())
    one, other, third = (grafts.germinate(germination(site=str(i))) for i in range(3))
    for graft in (one, other):
        graft.begin_audition("probed")
        graft.admit("it helps", update=7)
    other.cull("it spiked", update=8, verdict="culled after admission", updates_lost=1)
    assert [record.graft for record in grafts.records] == [1, 2, 3]
    assert third.record.admitted_at is None
    assert grafts.num_admitted == 2
    assert grafts.added_cost == COST
    unmeasured = grafts.germinate(germination(cost=Cost(parameters=1)))
    unmeasured.begin_audition("probed")
    unmeasured.admit("it helps", update=9)
    assert grafts.added_cost == Cost(parameters=11, flops=5.0, latency_s=1e-3)
