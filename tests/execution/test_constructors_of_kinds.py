"""The specification's constructors of attention and norms, and what their layers promise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from esper.execution import (
    KasminaAttentionLayer,
    KasminaBatchNormLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
)
from esper.execution.host_class import adopt
from esper.execution.kasmina_embedding_layer import KasminaEmbeddingLayer
from esper.seeds.shadow import shadow_pass

MADE = {
    "attention": lambda: KasminaAttentionLayer(6, 2, num_seeds=2),
    "layer_norm": lambda: KasminaLayerNormLayer(6, num_seeds=2),
    "batch_norm": lambda: KasminaBatchNormLayer(6, num_seeds=2),
    "embedding": lambda: KasminaEmbeddingLayer(9, 6, num_seeds=2),
}


@pytest.mark.parametrize("name", sorted(MADE))
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_constructed_layers_copy_and_pickle(name, duplicate):
    """A copy is of the same class, has the same tensors and as many seeds."""
    layer = MADE[name]()
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert twin.num_seeds == 2
    pairs = zip(layer.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_fresh_attention_has_the_settings_that_were_asked_for():
    """Batch first unless said otherwise; further settings of torch's are keywords."""
    layer = KasminaAttentionLayer(6, 2, 0.25, bias=False, kdim=5, vdim=7, num_seeds=3)
    assert isinstance(layer, nn.MultiheadAttention)
    assert layer.batch_first
    assert (layer.embed_dim, layer.num_heads, layer.dropout) == (6, 2, 0.25)
    assert (layer.kdim, layer.vdim, layer.in_proj_bias) == (5, 7, None)
    assert (layer.input_size, layer.output_size, layer.num_seeds) == (6, 6, 3)
    assert not KasminaAttentionLayer(6, 2, batch_first=False).batch_first


@pytest.mark.parametrize("is_active", [False, True])
def test_attention_lets_key_and_value_be_left_out(is_active):
    """The key is then the query and the value the key; None counts as left out."""
    layer = KasminaAttentionLayer(6, 2)
    q, k = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    if is_active:
        layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=q)
    for short, long in [
        (layer(q), layer(q, q, q)),
        (layer(q, k), layer(q, k, k)),
        (layer(query=q, key=None), layer(q, q, q)),
        (layer(q, value=k[:, :4]), layer(q, q, k[:, :4])),
        (layer(q, key=k, need_weights=False), layer(q, k, k, None, False)),
    ]:
        assert torch.equal(short[0], long[0])
        assert (short[1] is None) == (long[1] is None)


def test_attention_returns_output_and_weights_like_its_host():
    """A seed acts on the output alone; masks and the choice of weights reach the host."""
    host = nn.MultiheadAttention(6, 2, kdim=5, vdim=7)
    layer = adopt(copy.deepcopy(host), name="site")
    assert isinstance(layer, KasminaAttentionLayer)
    call = (torch.randn(4, 3, 6), torch.randn(5, 3, 5), torch.randn(5, 3, 7))
    mask = torch.rand(4, 5) < 0.3
    mask[:, 0] = False
    for options in (
        {"attn_mask": mask},
        {"attn_mask": mask, "average_attn_weights": False},
        {"need_weights": False},
    ):
        kernel = nn.Linear(6, 6)
        layer.graft(0, kernel, alpha=0.5, example=call)
        h, weights = host(*call, **options)
        y, same = layer(*call, **options)
        assert torch.equal(y, h + 0.5 * kernel(call[0]))
        assert same is None if weights is None else torch.equal(same, weights)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"normalized_shape": 6}, 6),
        ({"normalized_shape": [5, 6], "eps": 1e-3}, 30),
        ({"normalized_shape": torch.Size([6]), "elementwise_affine": False}, 6),
        ({"normalized_shape": 6, "bias": False}, 6),
    ],
)
def test_a_fresh_layer_norm_has_the_settings_that_were_asked_for(options, size):
    """Ints, lists and sizes are taken, and a norm without parameters grows like any other."""
    layer, x = KasminaLayerNormLayer(**options), torch.randn(3, 5, 6)
    host = nn.LayerNorm(**options)
    assert isinstance(layer, nn.LayerNorm)
    assert (layer.normalized_shape, layer.eps) == (host.normalized_shape, host.eps)
    assert (layer.input_size, layer.output_size) == (size, size)
    assert torch.equal(layer(x), host(x))
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, position="serial", example=x)
    torch.testing.assert_close(layer(x), host(x) + 0.5 * layer.seed_kernel(0)(host(x)))


@pytest.mark.parametrize(
    ("input_shape", "host_class"),
    [
        ((8, 6, 4, 4), nn.BatchNorm2d),
        ([8, 6, 4, 4, 4], nn.BatchNorm3d),
        ((8, 6), nn.BatchNorm1d),
        ((8, 6, 4), nn.BatchNorm1d),
        ((), nn.BatchNorm1d),
    ],
)
def test_the_input_shape_chooses_the_batch_norm(input_shape, host_class):
    """Four dimensions, five, or anything else; the settings are torch's."""
    layer = KasminaBatchNormLayer(6, momentum=0.5, affine=False, input_shape=input_shape)
    assert isinstance(layer, host_class)
    assert (layer.num_features, layer.momentum, layer.affine) == (6, 0.5, False)
    assert (layer.input_size, layer.output_size) == (6, 6)
    if len(input_shape) > 1:
        assert layer(torch.randn(*input_shape)).shape == torch.Size(input_shape)


def test_a_batch_norm_counts_a_training_forward_once():
    """Probe, shadow pass and kernel leave the statistics to the host's own forward."""
    host, x = nn.BatchNorm1d(6), torch.randn(8, 6)
    layer = KasminaBatchNormLayer(6, original_layer=copy.deepcopy(host))
    layer.graft(0, nn.Linear(6, 6), example=x)
    layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=x)
    with shadow_pass(layer), layer.shadow(2, nn.Linear(6, 6)):
        layer(x)
    for _ in range(2):
        h = host(x)
        torch.testing.assert_close(layer(x), h + 0.5 * layer.seed_kernel(1)(h))
    assert int(layer.num_batches_tracked) == 2
    assert torch.equal(layer.running_mean, host.running_mean)
    assert torch.equal(layer.running_var, host.running_var)


def test_a_kernel_behind_a_batch_norm_trains_and_runs_in_both_modes():
    """In training it gets a gradient, and evaluation runs it too."""
    layer, x = KasminaBatchNormLayer(6), torch.randn(8, 6)
    kernel = nn.Linear(6, 6)
    layer.graft(0, kernel, alpha=0.5, example=x)
    layer(x).square().sum().backward()
    assert kernel.weight.grad.any()
    layer.eval()
    assert not torch.equal(layer(x), layer.default_layer(x))


@pytest.mark.parametrize("name", ["batch_norm", "embedding"])
def test_a_parallel_kernel_is_refused_where_none_can_be(name):
    """The error says what the kind takes."""
    with pytest.raises(ValueError, match="takes serial kernels only"):
        MADE[name]().graft(0, nn.Linear(6, 6), position="parallel", example=torch.randn(8, 6))


def test_a_wrapped_layer_is_of_its_family():
    """Wrapping and constructing give instances of the same classes; the rest are plain layers."""
    for host, family in [
        (nn.MultiheadAttention(6, 2), KasminaAttentionLayer),
        (nn.LayerNorm(6), KasminaLayerNormLayer),
        (nn.BatchNorm2d(6), KasminaBatchNormLayer),
        (nn.SyncBatchNorm(6), KasminaBatchNormLayer),
        (nn.Embedding(9, 6), KasminaEmbeddingLayer),
        (nn.EmbeddingBag(9, 6), KasminaEmbeddingLayer),
        (nn.GroupNorm(2, 6), KasminaLayer),
    ]:
        assert type(adopt(host, name="site")).__mro__[1] is family
