"""Hosts for the conformance suites: add a row, and every promise is checked on it.

``tests/test_layer_kinds.py`` wants one at least for each row of ``LAYER_KINDS``.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from esper.contracts.layer_kind import LayerKind, kind_of
from esper.state.layer_call import Example, LayerCall


class Block(nn.Module):
    """A host of the user's own: two layers, a skip and a buffer that a forward changes."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.down = nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class ReadsTheCall(nn.Module):
    """A kernel of attention that reads query, key and mask, by the names that its host has."""

    def __init__(self, embed_dim, kdim):
        super().__init__()
        self.keys = nn.Linear(kdim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, query, key, *, key_padding_mask):
        seen = self.keys(key) * ~key_padding_mask.T.unsqueeze(-1)
        return self.out(torch.tanh(query + seen.sum(0)))


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host of some kind, and what it is tested with.

    Attributes:
        make_host: Makes a host; random weights.
        make_input: Makes an input for it: a tensor, or a call.
        make_kernel: Makes a kernel with two trainable layers and a non-zero output, parallel
            unless the kind takes serial ones only.
        make_serial: Makes the same for the serial position.
        is_native: Whether its dormant forward is the host class's own function; not so where
            arguments may be left out that the host needs.
    """

    make_host: Callable[[], nn.Module]
    make_input: Callable[[], Example]
    make_kernel: Callable[[], nn.Module]
    make_serial: Callable[[], nn.Module]
    is_native: bool = True

    @cached_property
    def kind(self) -> LayerKind:
        """Its row in the table of kinds."""
        with torch.random.fork_rng(devices=[]):
            return kind_of(self.make_host())

    @property
    def is_serial_only(self) -> bool:
        """Whether it takes no parallel kernels."""
        return self.kind.positions == ("serial",)


def run(module, x):
    """Call a host or layer on an input of its kind; return its output, the first of several."""
    call = LayerCall.of(x)
    y = module(*call.args, **call.kwargs)
    return y[0] if isinstance(y, tuple) else y


def run_kernel(kind, kernel, x, h):
    """Call a kernel of ``make_kernel`` on what its layer would give it.

    Args:
        kind: Its kind.
        kernel: The kernel.
        x: An input of the layer.
        h: The host's output for it.
    """
    call = LayerCall.of(x)
    if kind.is_serial_only:
        return kernel(h)
    if isinstance(kernel, ReadsTheCall):
        return kernel(*call.args[:2], key_padding_mask=call.kwargs["key_padding_mask"])
    return kernel(call.x)


def in_dtype(x, dtype):
    """Return an input with its floating tensors in a dtype."""
    call = LayerCall.of(x)
    return call.with_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 5), nn.Tanh(), nn.Linear(5, n_out))


def pointwise(axes, n_in, n_out):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(conv(n_in, 5, 1), nn.Tanh(), conv(5, n_out, 1))


def _conv(axes):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return Host(
        make_host=lambda: conv(2, 4, 3, stride=2, padding=1),
        make_input=lambda: torch.randn(3, 2, *(7,) * axes),
        make_kernel=lambda: nn.Sequential(
            conv(2, 5, 3, stride=2, padding=1), nn.Tanh(), conv(5, 4, 1)
        ),
        make_serial=lambda: pointwise(axes, 4, 4),
    )


def _square(make_host, *shape):
    """A host that keeps (.., 6) features."""
    return _giving_six(make_host, lambda: torch.randn(shape or (7, 6)))


def _giving_six(make_host, make_input):
    """A host that gives (.., 6) features, whatever it takes; its kernels read six too."""
    return Host(
        make_host=make_host,
        make_input=make_input,
        make_kernel=lambda: mlp(6, 6),
        make_serial=lambda: mlp(6, 6),
    )


def _channels(make_host, axes):
    """A host that keeps four channels, (3, 4, ..)."""
    make_kernel = (lambda: mlp(4, 4)) if axes == 0 else (lambda: pointwise(axes, 4, 4))
    return Host(
        make_host=make_host,
        make_input=lambda: torch.randn(6, 4, *(3,) * axes),
        make_kernel=make_kernel,
        make_serial=make_kernel,
    )


def _self_attention():
    x = torch.randn(3, 4, 6)
    return LayerCall((x, x.clone(), x.clone()), {})


def _cross_attention():
    q, k, v = torch.randn(4, 3, 6), torch.randn(5, 3, 7), torch.randn(5, 3, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    return LayerCall((q, k, v), {"key_padding_mask": mask, "need_weights": False})


def _lift():
    return nn.Sequential(
        nn.ConvTranspose2d(2, 5, 3, stride=2, output_padding=1), nn.Tanh(), nn.Conv2d(5, 4, 1)
    )


def _conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 6)


KINDS = {
    "linear": Host(
        make_host=lambda: nn.Linear(6, 4),
        make_input=lambda: torch.randn(7, 6),
        make_kernel=lambda: mlp(6, 4),
        make_serial=lambda: mlp(4, 4),
    ),
    "linear_without_bias": _square(lambda: nn.Linear(6, 6, bias=False)),
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "conv3d": _conv(3),
    "conv_transpose2d": Host(
        make_host=lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1),
        make_input=lambda: torch.randn(3, 2, 4, 4),
        make_kernel=_lift,
        make_serial=lambda: pointwise(2, 4, 4),
    ),
    "attention": Host(
        make_host=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        make_input=_self_attention,
        make_kernel=lambda: mlp(6, 6),
        make_serial=lambda: mlp(6, 6),
        is_native=False,
    ),
    "cross_attention": Host(
        make_host=lambda: nn.MultiheadAttention(6, 2, kdim=7, vdim=8),
        make_input=_cross_attention,
        make_kernel=lambda: ReadsTheCall(6, 7),
        make_serial=lambda: mlp(6, 6),
        is_native=False,
    ),
    "layer_norm": _square(lambda: nn.LayerNorm(6)),
    "layer_norm_without_affine": _square(lambda: nn.LayerNorm(6, elementwise_affine=False)),
    "rms_norm": _square(lambda: nn.RMSNorm(6)),
    "group_norm": _channels(lambda: nn.GroupNorm(2, 4), 2),
    "batch_norm1d": _channels(lambda: nn.BatchNorm1d(4), 0),
    "batch_norm2d": _channels(lambda: nn.BatchNorm2d(4), 2),
    "batch_norm3d": _channels(lambda: nn.BatchNorm3d(4), 3),
    "embedding": _giving_six(lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (3, 4))),
    "embedding_bag": _giving_six(lambda: nn.EmbeddingBag(9, 6), lambda: torch.randint(9, (3, 4))),
    "lstm": _giving_six(lambda: nn.LSTM(5, 6, batch_first=True), lambda: torch.randn(3, 4, 5)),
    "lstm_of_two_layers": _giving_six(
        lambda: nn.LSTM(5, 6, num_layers=2), lambda: torch.randn(4, 3, 5)
    ),
    "gru_both_ways": _giving_six(
        lambda: nn.GRU(5, 3, bidirectional=True),
        lambda: LayerCall((torch.randn(4, 3, 5), torch.randn(2, 3, 3)), {}),
    ),
    "rnn_without_batch": _giving_six(lambda: nn.RNN(5, 6, bias=False), lambda: torch.randn(4, 5)),
    "block": _square(Block),
    "sequential": _square(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))),
    "encoder_layer": _square(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 3, 4, 6
    ),
}
if importlib.util.find_spec("transformers"):  # a peer, not a dependency
    KINDS["conv1d_of_transformers"] = Host(
        make_host=_conv1d_of_transformers,
        make_input=lambda: torch.randn(7, 6),
        make_kernel=lambda: mlp(6, 4),
        make_serial=lambda: mlp(4, 4),
    )


def zero_last_(kernel):
    """Zero the last layer of a kernel, so that it contributes nothing; return the kernel."""
    with torch.no_grad():
        for p in list(kernel.children())[-1].parameters():
            p.zero_()
    return kernel
