"""How many packages of a model were refused: luck is the model's, whoever grows it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

_SPENT: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()


def tries_spent(model: nn.Module) -> int:
    """Return how many packages of a model were refused by a verdict, or rolled back."""
    return _SPENT.get(model, 0)


def spend_try(model: nn.Module) -> int:
    """Count a refusal; return how many there were."""
    _SPENT[model] = tries_spent(model) + 1
    return _SPENT[model]
