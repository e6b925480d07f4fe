"""Unwrapping with ``fuse=True``: several kernels of a layer become one plain module."""

import copy

import pytest
import torch
from torch import nn

import esper

FEATURES = 6


def mlp(hidden=4, between=nn.GELU, bias=True):
    """A kernel of two linear layers."""
    ends = nn.Linear(FEATURES, hidden, bias=bias), nn.Linear(hidden, FEATURES, bias=bias)
    return nn.Sequential(ends[0], *([between()] if between else []), ends[1])


def grown(*kernels, dtype=torch.float32, **options):
    """A model with kernels at alphas of their own, and an input of it."""
    model = esper.wrap(nn.Sequential(nn.Linear(FEATURES, FEATURES)).to(dtype), num_seeds=8)
    x = torch.randn(5, FEATURES, dtype=dtype)
    for i, kernel in enumerate(kernels):
        model[0].graft(i, kernel.to(dtype), alpha=1 / (i + 1), example=x, **options)
    return model, x


def kernels_of(plain):
    return sorted(name for name, _ in plain[0].named_children() if name != "host")


@pytest.mark.parametrize("between", [nn.GELU, nn.ReLU, nn.Softplus])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("position", ["parallel", "serial"])
def test_kernels_side_by_side_become_one(between, bias, position):
    """Kernels of several widths are one MLP, which gives what they gave within 1e-6."""
    kernels = [mlp(hidden, between, bias) for hidden in (30, 40, 50)]
    model, x = grown(*kernels, dtype=torch.float64, position=position)
    expected = model(x)
    plain = esper.unwrap(model, fuse=True)
    assert kernels_of(plain) == ["seed_0"]
    assert plain[0].seed_0[0].out_features == 120
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)


def test_without_the_word_every_kernel_stays():
    """The control: by default each kernel is a module with the parameters that it had."""
    kernels = [mlp(), mlp()]
    model, _ = grown(*kernels)
    plain = esper.unwrap(model)
    assert kernels_of(plain) == ["seed_0", "seed_1"]
    assert plain[0].seed_1[0].weight is kernels[1][0].weight


def test_float32_is_within_a_millionth():
    """In float32 the model differs by rounding."""
    model, x = grown(*(mlp(32) for _ in range(8)))
    expected = model(x)
    drawn = torch.get_rng_state()
    found = esper.unwrap(model, fuse=True)(x)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-6


def test_what_is_unlike_stays_by_itself():
    """Other activations, shapes, positions and modes are not merged; those that are alike are."""
    model, x = grown(mlp(), mlp(40, nn.ReLU), mlp(), mlp(bias=False))
    model[0].graft(4, mlp(), alpha=0.5, position="serial", example=x)
    model[0].graft(5, mlp(), alpha=0.5, mode="replace", example=x)
    frozen = mlp().requires_grad_(False)
    model[0].graft(6, frozen, alpha=0.5, example=x)
    expected = model(x)
    plain = esper.unwrap(model, fuse=True)
    assert kernels_of(plain) == ["seed_0", "seed_1", "seed_3", "seed_4", "seed_5", "seed_6"]
    torch.testing.assert_close(plain(x), expected)


def test_kernels_that_cancel_stay_by_themselves():
    """Where rounded weights of one module would not give the same, nothing is merged."""
    first = mlp()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second[2].parameters():
            parameter.mul_(-0.3 / 0.7)
    model, x = grown(first, second)
    model[0].set_alpha(0, 0.3)
    model[0].set_alpha(1, 0.7)
    expected = model(x)
    plain = esper.unwrap(model, fuse=True)
    assert kernels_of(plain) == ["seed_0", "seed_1"]
    assert torch.equal(plain(x), expected)


def test_a_fused_model_is_written_and_read(tmp_path):
    """Its state loads into its copy, and the module is made of torch alone."""
    model, x = grown(mlp(), mlp())
    plain = esper.unwrap(model, fuse=True)
    torch.save(plain, tmp_path / "plain.pt")
    read = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert torch.equal(read(x), plain(x))
    modules = {type(module).__module__.partition(".")[0] for module in plain.modules()}
    assert "esper" not in modules


@pytest.mark.parametrize("fuse", ["no", 1, None])
def test_a_fuse_that_is_no_boolean_is_refused(fuse):
    """Only True and False say whether kernels are fused; ``"no"`` is not taken for a yes."""
    with pytest.raises(TypeError, match="fuse is True or False; got"):
        esper.unwrap(esper.wrap(nn.Sequential(nn.Linear(2, 2))), fuse=fuse)
