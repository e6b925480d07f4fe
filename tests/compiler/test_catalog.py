"""Every kernel of the catalog fits its host, is nothing at birth, and can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from catalog_sites import (
    ALL,
    BEHIND,
    GRID_2D,
    LIFTS,
    LINEARS,
    OTHERS,
    SMALL,
    example_of,
    host_of,
    name_of,
)
from torch import nn

from esper.compiler import catalog
from esper.compiler.compile import compile_blueprint
from esper.compiler.graph import plan
from esper.compiler.lowering import kernel_tensors, lower
from esper.contracts.site import SiteSpec
from esper.growth.budget import Budget

DEFAULT = catalog.default_catalog()
CONTROLS = (
    catalog.noop,
    catalog.noise,
    catalog.noise_readout,
    catalog.capacity_free,
    catalog.random_features,
    catalog.own_shape_zeroed,
)


def _all(site):
    return DEFAULT.blueprints_for(site, capacity_only=False)


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_every_kernel_gives_the_shape_of_itshost_of(site):
    """For each entry and control, and for inputs of two sizes."""
    host = host_of(site)
    assert _all(site)
    for odd in (0, 1):
        x = example_of(site, odd)
        h = host(x)
        for blueprint in [*_all(site), *(control(site) for control in CONTROLS)]:
            read = h if blueprint.position == "serial" else x
            assert lower(blueprint)(read).shape == h.shape, blueprint.id


@pytest.mark.slow
def test_every_kernel_gives_the_shape_of_its_host_over_a_grid():
    """Kernel size, stride, padding and dilation in all combinations, as one test."""
    for site in GRID_2D:
        test_every_kernel_gives_the_shape_of_itshost_of(site)


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_catalog_kernels_are_exactly_zero_at_birth_by_one_layer(site):
    """The output is exactly zero, by the tensors of the last layer alone."""
    for blueprint in _all(site):
        kernel = lower(blueprint)
        assert not kernel(example_of(site)).any()
        zero = {name for name, tensor in kernel_tensors(kernel).items() if not tensor.any()}
        born_zero = {n for n in zero if n.startswith(("norm", "attention.")) and "bias" in n}
        assert zero - born_zero == {"out.weight", "out.bias"} & kernel_tensors(kernel).keys()
        behind = (site in BEHIND and site.kind != "attention") or "behind" in blueprint.id
        assert (blueprint.mode, blueprint.position) == ("add", "serial" if behind else "parallel")


@pytest.mark.parametrize("site", SMALL, ids=name_of)
def test_catalog_kernels_learn(site):
    """The last layer gets a gradient at birth and every other layer after one update."""
    for blueprint in _all(site):
        kernel, x = lower(blueprint), example_of(site)
        target = torch.randn(host_of(site)(x).shape, generator=torch.Generator().manual_seed(1))
        for names in ({"out.weight"}, kernel_tensors(kernel).keys()):
            (kernel(x) - target).square().mean().backward()
            tensors = kernel_tensors(kernel)
            assert all(tensors[name].grad.abs().sum() > 0 for name in names), blueprint.id
            with torch.no_grad():
                for parameter in kernel.parameters():
                    parameter.sub_(0.5 * parameter.grad)
                    parameter.grad = None


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_capacity_is_claimed_exactly_where_the_kernel_is_not_affine(site):
    """A kernel that is affine in the host's input adds nothing to a trainable affine host.

    Nor does any kernel behind an embedding: its table could hold what comes out.
    """
    for blueprint in _all(site):
        can_add = not plan(blueprint).is_affine and site.kind != "embedding"
        assert blueprint.adds_capacity == can_add


def test_kernels_without_capacity_are_offered_to_frozen_hosts_only():
    """A trainable host is offered capacity; a frozen one everything."""
    for site in SMALL:
        frozen = replace(site, host_is_trainable=False)
        assert all(b.adds_capacity for b in DEFAULT.blueprints_for(site))
        assert (
            not all(
                b.adds_capacity
                for b in DEFAULT.blueprints_for(replace(frozen, in_features=64, out_features=64))
            )
            or site in LIFTS + BEHIND
        )


def test_each_family_offers_at_most_two_sizes_with_names_of_their_own():
    """Ids are unique within a site, and the smaller fits the budget of a small host."""
    for site in SMALL:
        ids = [blueprint.id for blueprint in DEFAULT.blueprints_for(site)]
        assert len(set(ids)) == len(ids)
        for entry in DEFAULT.entries:
            sizes = [plan(b).parameter_count for b in entry.blueprints_for(site)]
            assert len(sizes) <= 2
            assert min(sizes, default=0) <= Budget().small_graft


@pytest.mark.slow
def test_artifacts_name_the_zeroed_tensor_of_their_entry():
    """What the catalog says and what the metadata say is the same tensor."""
    for site in SMALL:
        for entry in DEFAULT.entries:
            for blueprint in entry.blueprints_for(site):
                assert compile_blueprint(blueprint).metadata.zeroed == entry.zeroed


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_the_noop_contributes_exactly_nothing_and_trains_nothing(site):
    """Zero for any finite input, without parameters."""
    kernel = lower(catalog.noop(site))
    assert not kernel(host_of(site)(example_of(site))).any()
    assert list(kernel.parameters()) == []


@pytest.mark.parametrize("site", SMALL, ids=name_of)
def test_the_noise_is_noise_and_ignores_its_input(site):
    """Two forwards differ, the spread is as asked, and the blueprint declares it."""
    blueprint = catalog.noise(site, std=0.5)
    kernel = lower(blueprint).eval()
    h = torch.full((400, *host_of(site)(example_of(site)).shape[1:]), 7.0)
    torch.manual_seed(0)
    first, second = kernel(h), kernel(h)
    assert not torch.equal(first, second)
    assert abs(first.mean()) < 0.05
    assert abs(first.std() - 0.5) < 0.05
    assert blueprint.draws_random


@pytest.mark.parametrize("site", LINEARS + OTHERS + LIFTS, ids=name_of)
def test_own_shape_kernels_are_the_hosts_own_layer(site):
    """With the host's weights in it, the kernel computes what the host does."""
    host, x = host_of(site), example_of(site)
    for control in (catalog.capacity_free, catalog.own_shape_zeroed):
        kernel = lower(control(site))
        assert not any(p.any() for p in kernel.parameters())
        assert all(p.requires_grad for p in kernel.parameters())
        assert not control(site).adds_capacity
        kernel.steps[0].load_state_dict(host.state_dict())
        assert torch.equal(kernel(x), host(x))


@pytest.mark.parametrize("site", BEHIND, ids=name_of)
def test_own_shape_kernels_behind_a_host_are_affine_and_zero(site):
    """Behind what is no affine layer of its input: one affine layer, which claims no capacity."""
    for control in (catalog.capacity_free, catalog.own_shape_zeroed):
        made = plan(control(site))
        assert made.is_affine
        assert [step.op_type for step in made.steps] == [
            "diagonal" if "norm" in site.kind else "conv2d" if site.axes else "linear"
        ]
        assert not any(p.any() for p in lower(control(site)).parameters())
        assert control(site).position == "serial"
        assert control(site).adds_capacity == (site.kind in ("block", "recurrent"))


def test_a_block_sees_later_inputs_only_where_the_host_does():
    """By default a block's kernel cannot look ahead; it offers none where samples are no rows."""
    site = BEHIND[7]
    for known in (site, replace(site, is_causal=False)):
        block = next(b for b in _all(known) if b.id.startswith("block"))
        kernel, x = lower(block), example_of(known)
        nn.init.normal_(kernel.steps[-1].weight)
        changed = x.clone()
        changed[:, -1] += torch.randn(8, generator=torch.Generator().manual_seed(1))
        is_same = torch.equal(kernel(x)[:, :-1], kernel(changed)[:, :-1])
        assert is_same == known.is_causal
    for other in (replace(site, is_sequence=False), replace(site, in_features=3)):
        assert not any(b.id.startswith("block") for b in _all(other))


def test_a_layer_whose_output_is_not_known_is_offered_nothing():
    """A block or a norm that was never seen has no kernels, and no error either."""
    for kind in ("block", "channel_norm"):
        assert _all(SiteSpec(kind=kind, in_features=4, out_features=0)) == []


@pytest.mark.parametrize("site", ALL, ids=name_of)
def test_random_features_are_random_and_frozen_to_the_last_tensor(site):
    """The readout too is random and frozen, so that training can bring nothing."""
    kernel = lower(catalog.random_features(site))
    assert kernel(example_of(site)).any()
    assert all(p.any() and not p.requires_grad for p in kernel.parameters())


def test_the_dtype_of_the_site_is_the_dtype_of_its_kernels():
    """A bfloat16 host gets bfloat16 kernels."""
    site = replace(SMALL[0], dtype="bfloat16")
    for blueprint in DEFAULT.blueprints_for(site):
        assert {p.dtype for p in lower(blueprint).parameters()} == {torch.bfloat16}


def test_an_unknown_kind_of_layer_is_offered_nothing():
    """The catalog says nothing about layers that it does not know."""
    site = SiteSpec(kind="fourier", in_features=4, out_features=4)
    assert DEFAULT.blueprints_for(site) == []
