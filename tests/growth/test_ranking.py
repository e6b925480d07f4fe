"""The ranking: it finds planted gains, gives the host what is the host's, and is unbiased."""

import math

import pytest
import torch
from torch import nn

from esper.compiler.catalog import capacity_free, default_catalog, noise, noop, random_features
from esper.compiler.graph import plan
from esper.compiler.lowering import lower
from esper.contracts.site import SiteSpec
from esper.growth.budget import count_parameters
from esper.growth.ranking import (
    Candidate,
    FirstOrderGain,
    GradientNorm,
    RandomChoice,
    _features,
    pairwise_gain,
    rank_candidates,
)
from esper.growth.recording import Recorder

SPEC = SiteSpec(kind="linear", in_features=6, out_features=3)
CONV = SiteSpec(
    kind="conv2d",
    in_features=2,
    out_features=3,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
)


def candidate_for(site, blueprint):
    kernel, made = lower(blueprint), plan(blueprint)
    zeroed = [i for i, step in enumerate(made.steps) if step is made.zeroed_step]
    return Candidate(
        site=site,
        blueprint=blueprint.id,
        kernel=kernel,
        zeroed=f"steps.{zeroed[0]}.weight" if zeroed else None,
        position=blueprint.position,
        parameters=count_parameters(kernel),
    )


def readout(candidate):
    return candidate.kernel.get_submodule(candidate.zeroed.removesuffix(".weight"))


def linear(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(6, 3)


def observe(layer, target, *, num_steps=16, shape=(32, 6), seed=0):
    """Record a regression of ``layer`` on ``target(x)`` with some noise, without updates."""
    generator = torch.Generator().manual_seed(seed)
    with Recorder({"site": layer}, max_samples=32 * num_steps) as recorder:
        for _ in range(num_steps):
            x = torch.randn(shape, generator=generator)
            y = target(x)
            y = y + 0.5 * torch.randn(y.shape, generator=generator)
            (0.5 * (layer(x.requires_grad_()) - y).square().sum() / len(x)).backward()
    return recorder.observations


def blueprint(name, spec=SPEC):
    entry = next(entry for entry in default_catalog().entries if entry.name == name)
    return entry.blueprints_for(spec)[0]


def test_features_that_explain_the_error_rank_first():
    """Of two kernels the one whose features the target is made of has the greater gain."""
    layer = linear()
    wanted = candidate_for("site", blueprint("gated-mlp"))
    features = []
    handle = readout(wanted).register_forward_pre_hook(lambda _, args: features.append(args[0]))

    def target(x):
        wanted.kernel(x)
        return (layer(x) + features.pop()[:, :3] * 4.0).detach()

    observations = observe(layer, target)
    handle.remove()
    other = candidate_for("site", blueprint("mlp"))
    first, second = rank_candidates(observations, [other, wanted])
    assert first.candidate is wanted
    assert first.gain > 3 * first.stderr > 0
    assert first.gain > second.gain


def test_gain_is_what_the_readout_explains_beyond_the_host():
    """The gain is the mean square that the features explain of what the host leaves of g."""
    layer = linear()
    candidate = candidate_for("site", blueprint("mlp"))
    observations = observe(layer, lambda x: layer(x).detach() + 3.0 * x[:, :3].abs(), num_steps=250)
    (ranked,) = FirstOrderGain(ridge=1e-9).rank(observations, [candidate])
    seen = observations["site"]
    x, g = torch.cat(seen.inputs).double(), torch.cat(seen.gradients).double()
    kernel = candidate.kernel.double()
    hidden = []
    readout(candidate).register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    kernel(x)
    host = torch.cat([x, torch.ones(len(x), 1)], 1)
    left = g - host @ torch.linalg.lstsq(host, g).solution
    explained = hidden[0] @ torch.linalg.lstsq(hidden[0], left).solution
    assert ranked.gain == pytest.approx(float(explained.square().sum()) / len(x), rel=0.05)


def test_what_the_host_can_learn_itself_is_no_gain():
    """Linear kernels gain nothing at a trainable linear host, though the host is far off."""
    layer = linear()
    observations = observe(layer, lambda x: 5.0 * x[:, :3])
    (ranked,) = rank_candidates(observations, [candidate_for("site", capacity_free(SPEC))])
    layer.requires_grad_(requires_grad=False)
    (frozen,) = rank_candidates(observations, [candidate_for("site", capacity_free(SPEC))])
    assert abs(ranked.gain) < 1e-3 * frozen.gain


@pytest.mark.parametrize("name", ["mlp", "gated-mlp"])
def test_pure_noise_is_no_gain_on_average(name):
    """At a host that is right, gains are scattered around 0 within their standard errors."""
    candidate = candidate_for("site", blueprint(name))
    scores = []
    for seed in range(30):
        layer = linear(seed)
        observations = observe(layer, lambda x, layer=layer: layer(x).detach(), seed=seed)
        (ranked,) = rank_candidates(observations, [candidate])
        scores.append(ranked.gain / ranked.stderr)
    assert abs(sum(scores) / len(scores)) < 4 / math.sqrt(len(scores))


@pytest.mark.parametrize(("mean", "most"), [(0.0, 1.6), (2.0, 1.1)])
def test_pairwise_gain_is_unbiased_and_knows_its_error(mean, most):
    """The mean of distinct products is the squared mean; the error is never too small."""
    generator = torch.Generator().manual_seed(0)
    found = [
        pairwise_gain(mean + torch.randn(8, 3, generator=generator, dtype=torch.float64))
        for _ in range(4000)
    ]
    gains, errors = (torch.tensor(values) for values in zip(*found, strict=True))
    spread = float(gains.std())
    assert float(gains.mean()) == pytest.approx(3 * mean**2, abs=4 * spread / 63)
    assert 0.95 * spread < float(errors.square().mean().sqrt()) < most * spread


@pytest.mark.parametrize(
    "control", [noop, noise, random_features], ids=["noop", "noise", "random-features"]
)
def test_kernel_without_a_zeroed_layer_gets_no_score(control):
    """Controls have no readout to predict a gain for; they come last, with the reason."""
    layer = linear()
    observations = observe(layer, lambda x: x[:, :3])
    scored = candidate_for("site", blueprint("mlp"))
    last = rank_candidates(observations, [candidate_for("site", control(SPEC)), scored])[-1]
    assert last.gain is None
    assert "zeroed" in last.reason


def test_site_without_observations_gets_no_score():
    """What was not observed, or too little, has no score and says so."""
    candidate = candidate_for("site", blueprint("mlp"))
    (unseen,) = rank_candidates({}, [candidate])
    assert unseen.gain is None
    assert "nothing was recorded" in unseen.reason
    few = observe(linear(), lambda x: x[:, :3], num_steps=1, shape=(15, 6))
    (ranked,) = rank_candidates(few, [candidate])
    assert "15 samples, 16 needed" in ranked.reason


def test_candidates_are_left_as_they_were():
    """Ranking runs kernels on copies and moves no random state."""
    candidate = candidate_for("site", blueprint("mlp"))
    weights = [p.detach().clone() for p in candidate.kernel.parameters()]
    observations = observe(linear(), lambda x: x[:, :3])
    state = torch.get_rng_state()
    first = rank_candidates(observations, [candidate])[0]
    second = rank_candidates(observations, [candidate])[0]
    assert (first.gain, first.stderr) == (second.gain, second.stderr)
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(weights, candidate.kernel.parameters(), strict=True)
    )


def test_every_catalog_kernel_of_a_convolution_is_scored():
    """Every blueprint that the catalog offers at a convolution has a gain and an error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 3, 3, padding=1)
    observations = observe(
        layer, lambda x: x[:, :1].abs().expand(-1, 3, -1, -1), shape=(32, 2, 6, 6)
    )
    candidates = [candidate_for("site", b) for b in default_catalog().blueprints_for(CONV)]
    ranked = rank_candidates(observations, candidates)
    assert len(ranked) > 4
    assert all(entry.stderr > 0 for entry in ranked)
    assert [e.gain for e in ranked] == sorted((e.gain for e in ranked), reverse=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": 2, "padding": 2, "dilation": 2},
        {"padding": "same", "dilation": 3, "padding_mode": "circular"},
        {"padding": (0, 1), "groups": 2, "padding_mode": "reflect"},
        {"padding": "valid", "kernel_size": (2, 3)},
    ],
    ids=["plain", "strided", "same-circular", "grouped-reflect", "valid"],
)
def test_features_of_a_convolution_are_what_its_weight_multiplies(settings):
    """Weights times the features of any convolution are its output, at every row."""
    layer = nn.Conv2d(4, 6, **{"kernel_size": 3, "bias": False, **settings}).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = layer(x)
    rows = torch.unravel_index(torch.arange(0, 3 * out[0, 0].numel(), 7), (3, *out.shape[2:]))
    for f_RF, outputs in _features(layer, x, rows, 0):
        wanted = out.movedim(1, -1)[rows][:, outputs]
        torch.testing.assert_close(f_RF @ layer.weight[outputs].flatten(1).T, wanted)


def test_random_choice_repeats_with_its_random_seed():
    """The same random seed gives the same order, another one another."""
    candidates = [candidate_for(f"site{i}", blueprint("mlp")) for i in range(8)]
    orders = [
        [entry.site for entry in RandomChoice(random_seed=seed).rank({}, candidates)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_gradient_norm_divides_by_the_parameters_of_the_readout():
    """The comparison ranking is the norm of the readout's gradient over its size."""
    layer = linear()
    observations = observe(layer, lambda x: layer(x).detach() + x.abs()[:, :3])
    candidate = candidate_for("site", blueprint("mlp"))
    (ranked,) = GradientNorm().rank(observations, [candidate])
    seen = observations["site"]
    x, g = torch.cat(seen.inputs).detach(), torch.cat(seen.gradients)
    weight = readout(candidate).weight
    (grad,) = torch.autograd.grad(candidate.kernel(x), weight, g / len(x))
    assert ranked.gain == pytest.approx(float(grad.norm()) / grad.numel(), rel=1e-4)


def test_what_the_layer_behind_a_norm_can_do_is_no_gain():
    """A matrix on a norm's output is the next layer's to learn; behind a frozen norm it counts."""
    spec = SiteSpec(kind="norm", in_features=6, out_features=6)
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    gains = []
    for trainable in (True, False):
        norm = nn.LayerNorm(6).requires_grad_(trainable)
        seen = observe(norm, lambda x, norm=norm: norm(x).detach() @ matrix)
        (ranked,) = rank_candidates(seen, [candidate_for("site", blueprint("mlp-behind", spec))])
        gains.append(ranked.gain)
    assert gains[0] < 0.1 * gains[1]
