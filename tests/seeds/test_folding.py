"""Folding: exact or not at all, with a certificate either way."""

import copy
import gc
import itertools

import pytest
import torch
from execution_hosts import Block
from folding_checks import assert_folded, assert_kept, fossilize
from torch import nn
from torch.nn.utils import parametrize, prune

from esper.contracts.errors import SeedLifecycleError
from esper.execution.host_class import adopt

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR_KERNELS = {
    "parallel_add": (lambda: nn.Linear(6, 6), "add", "parallel"),
    "parallel_replace": (lambda: nn.Linear(6, 6), "replace", "parallel"),
    "serial_add": (lambda: nn.Linear(6, 6), "add", "serial"),
    "serial_replace": (lambda: nn.Linear(6, 6), "replace", "serial"),
    "without_bias": (lambda: nn.Linear(6, 6, bias=False), "add", "parallel"),
}


@pytest.mark.parametrize("name", sorted(LINEAR_KERNELS))
def test_affine_kernels_fold_into_a_linear_host(name):
    """The host alone gives what host and kernel gave, and its class is dormant again."""
    make, mode, position = LINEAR_KERNELS[name]
    host, x = nn.Linear(6, 6), torch.randn(5, 6)
    weight = host.weight
    folded = fossilize(host, make(), x, mode=mode, position=position)
    assert_folded(*folded)
    assert folded[0].weight is weight


PLAIN_CONVOLUTION = (1, 1, 1, "zeros")


def _convolutions():
    """Yield all settings; those that differ in one are quick, in more take long together."""
    for found in itertools.product((1, 2), (1, 2), (1, 2), ("zeros", "circular")):
        num_others = sum(a != b for a, b in zip(found, PLAIN_CONVOLUTION, strict=True))
        yield pytest.param(*found, marks=[] if num_others < 2 else pytest.mark.torture)


@pytest.mark.parametrize(
    "axes", [2, *(pytest.param(axes, marks=pytest.mark.torture) for axes in (1, 3))]
)
@pytest.mark.parametrize(("stride", "dilation", "groups", "padding_mode"), list(_convolutions()))
def test_parallel_convolutions_fold(axes, stride, dilation, groups, padding_mode):
    """A convolution of the host's stride, dilation, groups and padding mode folds exactly."""
    settings = {"stride": stride, "dilation": dilation, "padding_mode": padding_mode}
    settings |= {"groups": groups, "padding": dilation}
    host, kernel = (CONVS[axes - 1](4, 6, 3, **settings) for _ in range(2))
    assert_folded(*fossilize(host, kernel, torch.randn(2, 4, *(9,) * axes)))


def test_a_smaller_centred_kernel_folds():
    """3x3 in 5x5, and 1x1 with the host's stride, lie on taps of the host."""
    x = torch.randn(2, 3, 8, 8)
    assert_folded(*fossilize(nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 3, padding=1), x))
    strided = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    assert_folded(*fossilize(strided, nn.Conv2d(3, 4, 1, stride=2), x))


def test_serial_1x1_folds():
    """A 1x1 convolution on the host's output folds, strided host or not."""
    x = torch.randn(2, 3, 9, 9)
    host = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    assert_folded(*fossilize(host, nn.Conv2d(4, 4, 1), x, position="serial"))


REFUSED = {
    "activation": (nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), {}, "no affine"),
    "no_bias": (nn.Linear(6, 6, bias=False), nn.Linear(6, 6), {}, "host has none"),
    "block": (Block().eval(), nn.Linear(6, 6), {}, "Block is not known"),
    "parametrized_kernel": (
        nn.Linear(6, 6),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        {},
        "no affine",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_exact_is_kept_in_the_plan(name):
    """The output stays what it was, bit for bit, and the certificate says why."""
    host, kernel, options, reason = copy.deepcopy(REFUSED[name])
    assert_kept(*fossilize(host, kernel, torch.randn(5, 6), **options), reason)


CONV_REFUSED = {
    "larger": (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2), {}, "aligned"),
    "dilation": (
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        {},
        "dilation",
    ),
    "groups": (
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1),
        {},
        "groups",
    ),
    "padding_mode": (
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        {},
        "padding mode",
    ),
    "serial_3x3": (
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        {"position": "serial"},
        "1x1",
    ),
}


@pytest.mark.parametrize("name", sorted(CONV_REFUSED))
def test_convolutions_that_do_not_lie_on_the_host_are_kept(name):
    """Other taps, dilation, groups or padding than the host's: kept, with the reason."""
    host, kernel, options, reason = copy.deepcopy(CONV_REFUSED[name])
    assert_kept(*fossilize(host, kernel, torch.randn(2, 4, 9, 9), **options), reason)


@pytest.mark.parametrize("other", [{"position": "serial"}, {"mode": "replace"}])
def test_beside_serial_or_replacing_seeds_nothing_folds(other):
    """Folding would change what another seed reads or weighs, so it does not happen."""
    host, x = nn.Linear(6, 6), torch.randn(5, 6)
    layer = adopt(host, name="site")
    layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=x, **other)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    before = layer(x)
    certificate = layer.fossilize(0)
    assert not certificate.folded
    assert "another contributing seed" in certificate.reason
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("other", [{"position": "serial"}, {"mode": "replace"}])
def test_a_seed_at_alpha_zero_counts_as_another(other):
    """It does not run now, but it may; then the fold would have changed what it does."""
    layer, x = adopt(nn.Linear(6, 6), name="site"), torch.randn(5, 6)
    layer.graft(1, nn.Linear(6, 6), alpha=0.0, example=x, **other)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    assert "another contributing seed" in layer.fossilize(0).reason


def test_a_shared_weight_is_not_folded_into():
    """Where another module has the same parameter, folding would change that module too."""
    host, x = nn.Linear(6, 6), torch.randn(5, 6)
    other = nn.Linear(6, 6)
    other.weight = host.weight
    assert_kept(*fossilize(host, nn.Linear(6, 6), x), "shared")
    assert torch.equal(other.weight, host.weight)


def test_who_shares_a_weight_is_asked_last(monkeypatch):
    """The question takes as long as the process has objects; no affine kernel, no question."""
    asked = []
    monkeypatch.setattr(gc, "get_referrers", lambda *_: asked.append(1) or [])
    layer, x = adopt(nn.Linear(6, 6), name="site"), torch.randn(5, 6)
    layer.graft(0, nn.Sequential(nn.Linear(6, 6), nn.ReLU()), alpha=0.5, example=x)
    layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=x)
    assert not layer.fossilize(0).folded
    assert not asked
    assert layer.fossilize(1).folded
    assert asked


def test_a_parametrized_host_is_not_folded_into():
    """A weight that is computed cannot be written."""
    host = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    assert not fossilize(host, nn.Linear(6, 6), torch.randn(5, 6))[1].folded


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, tensor):
        return 2.0 * tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
        lambda layer: prune.l1_unstructured(layer, "bias", amount=1),
        lambda layer: prune.l1_unstructured(layer, "weight", amount=1),
    ],
    ids=["parametrized bias", "pruned bias", "pruned weight"],
)
def test_a_computed_tensor_of_the_host_is_not_folded_into(change):
    """What is written into a bias that is computed would be lost with the next call."""
    layer, x = adopt(nn.Linear(6, 6), name="site"), torch.randn(5, 6)
    change(layer)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    with torch.no_grad():
        before = layer(x)
        certificate = layer.fossilize(0)
        assert_kept(layer, certificate, before, layer(x), "computed")


def test_optimizer_lists_and_dicts_of_parameters_are_no_owners():
    """A weight that stands in an optimizer and in a dict of the user's folds all the same."""
    host, x = nn.Linear(6, 6), torch.randn(5, 6)
    optimizer = torch.optim.AdamW(host.parameters())
    host(x).sum().backward()
    optimizer.step()
    named = dict(host.named_parameters())
    assert_folded(*fossilize(host, nn.Linear(6, 6), x))
    assert named["weight"] is host.weight


def test_a_fold_that_misses_is_measured_and_refused():
    """Where the sum does not fit the host's dtype the weights stay as they were."""
    host, kernel = nn.Linear(6, 6).half(), nn.Linear(6, 6).half()
    with torch.no_grad():
        for layer in (host, kernel):
            layer.weight.zero_()[0, 0] = 3.5e4
    x = torch.rand(5, 6).half() * 1e-3
    layer, certificate, before, after = fossilize(host, kernel, x, alpha=1.0)
    assert_kept(layer, certificate, before, after, "exceeds")
    assert torch.isfinite(layer.weight).all()


def test_bfloat16_has_its_own_tolerance():
    """In bfloat16 the tolerance is the dtype's epsilon."""
    host, x = nn.Linear(6, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    _, certificate, _, _ = fossilize(host, nn.Linear(6, 6).bfloat16(), x)
    assert certificate.folded
    assert certificate.tolerance == torch.finfo(torch.bfloat16).eps


def test_a_fossil_cannot_be_changed():
    """Neither alpha, nor kernel, nor state of a fossil changes."""
    layer, _, _, _ = fossilize(nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(5, 6))
    for change in (
        lambda: layer.unload_kernel(0),
        lambda: layer.set_alpha(0, 0.1),
        lambda: layer.graft(0, nn.Linear(6, 6), example=torch.randn(5, 6)),
        lambda: layer.fossilize(0),
    ):
        with pytest.raises(SeedLifecycleError):
            change()
