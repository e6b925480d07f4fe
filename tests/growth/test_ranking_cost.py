"""What a ranking takes: foretold, kept to, and no more than it needs."""

from __future__ import annotations

import pytest
import torch
from growing import growing, train, wrapped
from torch import nn

from esper.compiler.catalog import default_catalog
from esper.compiler.graph import plan
from esper.compiler.lowering import lower
from esper.contracts.site import SiteSpec
from esper.growth.budget import count_parameters, forward_flops
from esper.growth.flops import counting
from esper.growth.policies import EveryN, Never
from esper.growth.ranking import Candidate, FirstOrderGain, rank_candidates, works_by_position
from esper.growth.ranking_cost import LEAST_SAMPLES, affordable_ranking
from esper.growth.recording import Recorder

LINEAR = SiteSpec(kind="linear", in_features=16, out_features=16, is_sequence=True)
CONV = SiteSpec(
    kind="conv2d",
    in_features=4,
    out_features=6,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
)


def observed(layers, shape, *, num_steps=16):
    """Record a loss without updates at some layers."""
    generator = torch.Generator().manual_seed(0)
    with Recorder(layers, max_samples=10_000) as recorder:
        for _ in range(num_steps):
            for layer in layers.values():
                x = torch.randn(shape, generator=generator).requires_grad_()
                layer(x).square().sum().backward()
    return recorder.observations


def candidates_at(site, spec, shape):
    found = []
    for blueprint in default_catalog().blueprints_for(spec):
        kernel, made = lower(blueprint), plan(blueprint)
        zeroed = [i for i, step in enumerate(made.steps) if step is made.zeroed_step]
        found.append(
            Candidate(
                site=site,
                blueprint=blueprint.id,
                kernel=kernel,
                zeroed=f"steps.{zeroed[0]}.weight" if zeroed else None,
                position=blueprint.position,
                parameters=count_parameters(kernel),
                flops=forward_flops(kernel, torch.zeros(1, *shape[1:])),
            )
        )
    return found


def sequences(length=300):
    """Two linear layers over sequences, and what the catalog offers there."""
    layers = {name: nn.Linear(16, 16) for name in ("a", "b")}
    shape = (32, length, 16)
    return observed(layers, shape), [c for n in layers for c in candidates_at(n, LINEAR, shape)]


def images():
    """A convolution, and what the catalog offers there."""
    shape = (32, 4, 8, 8)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    return observed({"a": layer}, shape), candidates_at("a", CONV, shape)


def ranked_flops(observations, candidates):
    with counting() as counter:
        rank_candidates(observations, candidates)
    return counter.get_total_flops()


@pytest.mark.parametrize("setting", [sequences, images])
@pytest.mark.parametrize("stride", [1, 4])
def test_what_a_ranking_takes_is_foretold(setting, stride):
    """Within a fifth, whole and cut."""
    observations, candidates = setting()
    whole = affordable_ranking(observations, candidates, float("inf")).flops
    cut = affordable_ranking(observations, candidates, whole / stride)
    taken = ranked_flops(cut.observations, cut.candidates)
    assert cut.flops <= whole / stride
    assert taken == pytest.approx(cut.flops, rel=0.2)


def test_samples_are_cut_before_candidates():
    """As long as each split keeps some; what was cut is told."""
    observations, candidates = sequences()
    whole = affordable_ranking(observations, candidates, float("inf"))
    assert whole.text is None
    assert whole.observations == observations
    cut = affordable_ranking(observations, candidates, 0.7 * whole.flops)
    assert cut.candidates == candidates
    assert LEAST_SAMPLES <= cut.observations["a"].num_samples < observations["a"].num_samples
    assert f"{cut.share:.1%} of what was recorded" in cut.text
    assert rank_candidates(cut.observations, cut.candidates)[0].gain is not None


def test_where_few_samples_are_left_the_dearest_candidates_are_left_out():
    """By name, and the ranking stays within what it may take."""
    observations, candidates = sequences()
    least = affordable_ranking(observations, candidates, 0.0)
    assert not least.candidates
    assert len(least.refused) == len(candidates)
    few = affordable_ranking(observations, candidates, 3e7)
    assert 0 < len(few.candidates) < len(candidates)
    assert {c.blueprint for c in few.candidates}.isdisjoint(
        r.blueprint for r in few.refused if r.site == few.candidates[0].site
    )
    assert max(c.flops for c in few.candidates) <= max(c.flops for c in candidates)
    assert ranked_flops(few.observations, few.candidates) < 3.6e7
    assert f"{len(few.candidates)} of {len(candidates)} candidates" in few.text


def test_a_kernel_that_works_by_position_runs_on_the_rows_alone():
    """With the same gains, for a part of the FLOPs; the control runs it on everything."""
    observations, candidates = sequences(length=600)
    seen = observations["a"]
    mlps = [c for c in candidates if c.site == "a" and c.blueprint.startswith("mlp")]
    assert all(works_by_position(c, seen) for c in mlps)
    taken = ranked_flops(observations, mlps)
    everywhere = sum(c.flops * seen.num_samples for c in mlps)
    assert taken < 0.25 * everywhere


class Shifted(nn.Module):
    """A kernel that gives each position the one before it."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 16)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        return self.out(x.roll(1, dims=1))


def candidate_of(kernel, zeroed="out.weight"):
    return Candidate(
        site="a", blueprint="own", kernel=kernel, zeroed=zeroed, position="parallel", parameters=0
    )


def test_a_kernel_that_looks_at_other_positions_does_not():
    """Found by trying it, whatever it is made of."""
    observations, _ = sequences(length=10)
    assert not works_by_position(candidate_of(Shifted()), observations["a"])


def test_rows_of_a_kernel_by_position_are_those_of_the_whole():
    """Ranked on the rows alone, the gain is what it is on everything."""

    class Whole(nn.Module):
        """The same numbers, from a kernel that refuses single positions."""

        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def forward(self, x):
            assert x.ndim == 3
            return self.kernel(x)

    observations, candidates = sequences(length=600)
    mlp = next(c for c in candidates if c.blueprint.startswith("mlp"))
    whole = candidate_of(Whole(mlp.kernel), f"kernel.{mlp.zeroed}")
    assert not works_by_position(whole, observations["a"])
    gains = [rank_candidates(observations, [c])[0].gain for c in (mlp, whole)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-4)


def test_features_that_lie_on_another_axis_get_no_score():
    """A convolution over a sequence, where there are as many positions as features."""

    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Conv1d(4, 16, 1)

        def forward(self, x):
            return self.out(x[..., :4].transpose(1, 2))

    observations = observed({"a": nn.Linear(16, 16)}, (32, 16, 16))
    (ranked,) = FirstOrderGain().rank(observations, [candidate_of(Across())])
    assert ranked.gain is None
    assert "position by position" in ranked.reason


def test_rankings_of_a_run_take_at_most_a_fifth_of_the_overhead():
    """However often the policy says yes, and it is said once that they were cut."""
    model, optimizer = wrapped()
    short = {"trial": "shadow", "audition_updates": 2, "ramp_updates": 1, "hold_updates": 1}
    settings = {"policy": EveryN(10), "overhead": 100.0, "horizon": 80, "tries": 50, **short}
    grower = growing(model, optimizer, min_effect=1e9, **settings)
    train(model, optimizer, 80, grower)
    report = grower.report()
    assert 0 < report.work["ranking"] <= 0.2 * 100.0 * report.work["training"]
    assert sum("a ranking was cut" in note for note in report.notes) == 1


def test_a_suggestion_is_asked_for_and_not_cut():
    """It has every site, though the overhead allows nothing; it is counted all the same."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, overhead=0.0, policy=Never())
    train(model, optimizer, 10, grower)
    assert {row.site for row in grower.suggest()} == {"0", "1", "4"}
    assert grower.report().work["ranking"] > 0
