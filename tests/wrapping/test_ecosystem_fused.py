"""Fused paths, which bypass a layer's forward: kept while dormant, off while a seed contributes."""

import copy

import pytest
import torch
from ecosystem_hosts import Bottleneck
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper.contracts.lifecycle import SeedLifecycleState

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"  # torch's own use
)

ENCODER_LAYER = "aten._transformer_encoder_layer_fwd.default"
ATTENTION = "aten._native_multi_head_attention.default"
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run(model, *args, **kwargs):
    """Return the output of a call, and the operations that it was made of."""
    with torch.no_grad(), _Recorder() as recorder:
        y = model(*args, **kwargs)
    return y, recorder.names


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()


def encoder():
    return nn.TransformerEncoder(encoder_layer(), 2).eval()


class SelfAttention(nn.Module):
    """Attention over linear layers of its own, as most models write it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))


CASES = {"encoder_layer": (encoder_layer, ENCODER_LAYER), "attention": (SelfAttention, FLASH)}


@pytest.mark.parametrize("name", CASES)
def test_a_dormant_model_keeps_the_fused_path(name):
    """The same operations run, the fused one among them, and give the same bits."""
    make, fused = CASES[name]
    bare, x = make().eval(), torch.randn(3, 5, 8)
    expected, operations = run(bare, x)
    assert fused in operations

    y, found = run(esper.wrap(bare), x)

    assert found == operations
    assert torch.equal(y, expected)


def test_attention_stays_fused_beside_contributing_seeds():
    """What a seed does not bypass is left alone."""
    model, x = esper.wrap(SelfAttention().eval()), torch.randn(3, 5, 8)
    model.qkv.graft(0, Bottleneck(8, 24), alpha=0.5, example=x)

    assert FLASH in run(model, x)[1]


def unfused(model, *args, **kwargs):
    """What a model computes without its fused paths: those are for evaluation only."""
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        return twin(*args, **kwargs)


SITES = ("linear1", "linear2")


@pytest.mark.parametrize("site", SITES)
def test_a_contributing_seed_turns_the_fused_path_off(site):
    """The encoder layer calls its children, and its output is that without the fused path."""
    model, x = esper.wrap(encoder_layer()), torch.randn(3, 5, 8)
    before, operations = run(model, x)
    layer = model.get_submodule(site)
    layer.graft(
        0, Bottleneck(layer.in_features, layer.out_features), alpha=1.0, example=given(layer)
    )

    y, found = run(model, x)

    assert ENCODER_LAYER not in found
    assert torch.allclose(y, unfused(model, x), atol=1e-5)
    assert not torch.allclose(y, before, atol=1e-3)
    layer.unload_kernel(0)
    again, found = run(model, x)
    assert found == operations
    assert torch.equal(again, before)


def given(layer):
    return torch.randn(4, layer.in_features)


@pytest.mark.parametrize("site", SITES)
def test_a_waiting_graft_sees_the_next_forward(site):
    """A graft that waits for an example is not bypassed either."""
    model, x = esper.wrap(encoder_layer()), torch.randn(3, 5, 8)
    layer = model.get_submodule(site)
    layer.graft(0, Bottleneck(layer.in_features, layer.out_features), alpha=1.0)

    run(model, x)

    assert layer.state_layout.state(0) == SeedLifecycleState.ACTIVE


def test_a_shadow_turns_the_fused_path_off_while_it_lasts():
    """An auditioned kernel is run in evaluation, and afterwards the path is fused again."""
    model, x = esper.wrap(encoder_layer()), torch.randn(3, 5, 8)
    before, operations = run(model, x)

    with model.linear1.shadow(0, Bottleneck(8, 16)):
        y, found = run(model, x)
    again, afterwards = run(model, x)

    assert ENCODER_LAYER not in found
    assert not torch.allclose(y, before, atol=1e-3)
    assert afterwards == operations
    assert torch.equal(again, before)


def padded():
    """Sequences of which the first ends early."""
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    return x, mask


def test_a_dormant_encoder_keeps_nested_tensors():
    """Padding is left out of the computation as in the bare model."""
    bare = encoder()
    x, mask = padded()
    expected, operations = run(bare, x, src_key_padding_mask=mask)
    assert any("_nested_tensor_from_mask" in name for name in operations)

    y, found = run(esper.wrap(bare), x, src_key_padding_mask=mask)

    assert found == operations
    assert torch.equal(y, expected)


@pytest.mark.parametrize("site", ["layers.0.linear1", "layers.1.linear2"])
def test_a_seed_contributes_in_nested_tensors(site):
    """Where an encoder leaves padding out, a seed gives what it gives on padded sequences."""
    model = esper.wrap(encoder())
    x, mask = padded()
    layer = model.get_submodule(site)
    layer.graft(
        0, Bottleneck(layer.in_features, layer.out_features), alpha=1.0, example=given(layer)
    )

    y, _ = run(model, x, src_key_padding_mask=mask)

    expected = unfused(model, x, src_key_padding_mask=mask)
    assert torch.allclose(y[~mask], expected[~mask], atol=1e-5)
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_a_projection_that_nobody_calls_is_refused():
    """An attention reads its out_proj's weight and calls no forward: a seed would never run."""
    reason = "its parent, a MultiheadAttention, never calls its forward"
    with pytest.raises(ValueError, match=f"'self_attn.out_proj'.*cannot be a site: {reason}"):
        esper.wrap(encoder_layer(), select="self_attn.out_proj")
    left = {entry.name: entry.reason for entry in esper.skipped(esper.wrap(encoder_layer()))}
    assert left["self_attn.out_proj"] == reason
