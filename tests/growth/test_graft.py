"""Grafts: each owns its stage, lets only those follow that may, and is listened to."""

from __future__ import annotations

import pytest

from esper.contracts.lifecycle import ALLOWED_STAGES, GraftStage
from esper.contracts.progress import GraftStatus
from esper.growth.budget import Cost
from esper.growth.graft import NO_COST, Germination, Grafts

COST = Cost(parameters=10, flops=5.0, latency_s=1e-3)
STEPS = {
    GraftStage.TRIAL: lambda graft: graft.begin_trial("probed"),
    GraftStage.AUDITION: lambda graft: graft.begin_audition("probed"),
    GraftStage.BLENDING: lambda graft: graft.admit("it helps", update=7),
    GraftStage.HOLDING: lambda graft: (
        graft.take_over("it helped in a twin", update=7, blueprint="linear-8")
        if graft.stage is GraftStage.TRIAL
        else graft.hold("alpha is 1")
    ),
    GraftStage.FOSSILIZED: lambda graft: graft.fossilize("it helped", update=9, folded=True),
    GraftStage.CULLED: lambda graft: graft.cull(
        "it did not", update=9, verdict="culled at admission"
    ),
}
WAYS = {
    "twin": [GraftStage.TRIAL, GraftStage.HOLDING, GraftStage.FOSSILIZED],
    "shadow": [
        GraftStage.AUDITION,
        GraftStage.BLENDING,
        GraftStage.HOLDING,
        GraftStage.FOSSILIZED,
    ],
}
LEADING_TO = [
    (GraftStage.GERMINATED, []),
    (GraftStage.CULLED, [GraftStage.CULLED]),
    *((stage, way[: index + 1]) for way in WAYS.values() for index, stage in enumerate(way)),
]


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
        "package": 1,
        "cost": COST,
    }
    return Germination(**{**fields, **changes})


def germinated():
    heard = Heard()
    return Grafts(heard).germinate(germination()), heard


@pytest.mark.parametrize(("stage", "way"), LEADING_TO)
@pytest.mark.parametrize("after", list(STEPS))
def test_only_those_stages_follow_that_may(stage, way, after):
    """Every arrow of the table is taken, every other one is refused and changes nothing."""
    graft, heard = germinated()
    for step in way:
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
    """No arrow goes past it, so that no alpha jumps; a trial needs no ramp."""
    assert ALLOWED_STAGES[GraftStage.TRIAL] == {GraftStage.HOLDING, GraftStage.CULLED}
    assert ALLOWED_STAGES[GraftStage.AUDITION] == {GraftStage.BLENDING, GraftStage.CULLED}


def test_the_listener_hears_every_stage_with_its_reason():
    """From germination, with nothing before it, to the verdict."""
    graft, heard = germinated()
    for stage in WAYS["shadow"]:
        STEPS[stage](graft)
    assert heard.stages == [
        (1, None, GraftStage.GERMINATED, "ranked first"),
        (1, GraftStage.GERMINATED, GraftStage.AUDITION, "probed"),
        (1, GraftStage.AUDITION, GraftStage.BLENDING, "it helps"),
        (1, GraftStage.BLENDING, GraftStage.HOLDING, "alpha is 1"),
        (1, GraftStage.HOLDING, GraftStage.FOSSILIZED, "it helped"),
    ]


def test_the_record_has_what_happened():
    """When, with which verdict, what stands in the model, and what it was measured to cost."""
    graft, _ = germinated()
    for stage in WAYS["twin"][:2]:
        STEPS[stage](graft)
    graft.record_dependence(0.5)
    STEPS[GraftStage.FOSSILIZED](graft)
    record = graft.record
    assert (record.germinated_at, record.admitted_at, record.decided_at) == (3, 7, 9)
    assert (record.verdict, record.folded, record.parameters) == ("fossilized", True, 10)
    assert (record.dependence, record.package, record.blueprint) == (0.5, 1, "linear-8")


def test_status_is_a_value_with_names():
    """Where a graft is can be read, compared and printed."""
    graft, _ = germinated()
    where = {"site": "features.0", "seed_idx": 2, "package": 1}
    assert graft.status == GraftStatus(**where, stage=GraftStage.GERMINATED)
    assert str(graft.status) == "features.0.2 germinated"


def test_a_graft_costs_while_it_is_in_the_model():
    """Neither before it is admitted nor after it is culled."""
    for way, expected in (
        ("shadow", [NO_COST, COST, COST, NO_COST]),
        ("twin", [NO_COST, COST, NO_COST]),
    ):
        costs = []
        graft, _ = germinated()
        for stage in [*WAYS[way][:-1], GraftStage.CULLED]:
            STEPS[stage](graft)
            costs.append(graft.added_cost)
        assert costs == expected


def test_all_grafts_are_numbered_and_summed_up():
    """A package counts for good once it was admitted; the cost of what was removed does not."""
    grafts = Grafts(Heard())
    of_packages = enumerate((1, 1, 2, 3))
    one, other, third, fourth = (
        grafts.germinate(germination(site=str(i), package=p)) for i, p in of_packages
    )
    for graft in (one, other, third):
        graft.begin_trial("probed")
        graft.take_over("it helped", update=7, blueprint="mlp-8")
    for graft in (other, third):
        graft.cull("it spiked", update=8, verdict="rolled back", updates_lost=1)
    assert [record.graft for record in grafts.records] == [1, 2, 3, 4]
    assert fourth.record.admitted_at is None
    assert grafts.num_packages_admitted == 2
    assert grafts.added_cost == COST
    unmeasured = grafts.germinate(germination(cost=Cost(parameters=1), package=None))
    unmeasured.begin_audition("probed")
    unmeasured.admit("it helps", update=9)
    assert grafts.num_packages_admitted == 3
    assert grafts.added_cost == Cost(parameters=11, flops=5.0, latency_s=1e-3)
