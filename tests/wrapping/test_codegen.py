"""Plain modules as source code."""

import pytest
import torch
from torch import nn

from esper.wrapping.codegen import constructor

LAYERS = [
    (nn.Linear(3, 4), "nn.Linear(3, 4)"),
    (nn.Linear(3, 4, bias=False), "nn.Linear(3, 4, bias=False)"),
    (nn.Linear(3, 4, dtype=torch.float64), "nn.Linear(3, 4, dtype=torch.float64)"),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4), "nn.Conv2d(4, 8, 3, padding=1, groups=4)"),
    (nn.Conv2d(4, 8, (3, 5), bias=False), "nn.Conv2d(4, 8, (3, 5), bias=False)"),
    (
        nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular"),
        "nn.Conv1d(4, 4, 3, padding='same', padding_mode='circular')",
    ),
    (nn.LayerNorm(8), "nn.LayerNorm(8)"),
    (nn.LayerNorm((8, 8), elementwise_affine=False), None),
    (nn.RMSNorm(8, eps=1e-5), "nn.RMSNorm(8, eps=1e-05)"),
    (nn.GroupNorm(2, 8), "nn.GroupNorm(2, 8)"),
    (nn.BatchNorm2d(4, affine=False), "nn.BatchNorm2d(4, affine=False)"),
    (nn.Dropout(0.1), "nn.Dropout(p=0.1)"),
    (nn.MaxPool2d(3, stride=2, padding=1), "nn.MaxPool2d(3, stride=2, padding=1)"),
    (nn.AdaptiveAvgPool2d((None, 1)), "nn.AdaptiveAvgPool2d((None, 1))"),
    (nn.Softplus(), "nn.Softplus()"),
    (nn.Tanh(), "nn.Tanh()"),
    (
        nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
        "nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)",
    ),
]


@pytest.mark.parametrize(
    ("layer", "text"), LAYERS, ids=lambda value: "" if isinstance(value, nn.Module) else str(value)
)
def test_a_layer_is_written_as_the_call_that_makes_it(layer, text):
    """The call names what is not a default, and evaluating it gives the same settings."""
    written = constructor(layer)

    made = eval(written, {"nn": nn, "torch": torch})
    assert repr(made) == repr(layer)
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in layer.state_dict().items()
    }
    assert text is None or written == text


def test_a_layer_that_was_changed_after_its_construction_is_refused():
    """A Linear whose weight no longer fits its settings cannot be written as a call."""
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(ValueError, match=r"no call of nn\.Linear"):
        constructor(layer)
