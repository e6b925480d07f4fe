"""The peers that the table names: PEFT's adapters around the same host, and LoRA by hand."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import Prepare
from subjects import HIDDEN, sharing
from torch import Tensor, nn


class LoraByHand(nn.Module):
    """A low-rank adapter as a person would write it."""

    def __init__(self, host: nn.Linear, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.host, self.down, self.up = host, down, up

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's share to the host."""
        return self.host(x) + self.up(self.down(x))


class Named(nn.Module):
    """A model that holds the host under a name, which PEFT asks for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer."""
        return self.layer(x)


class Lora:
    """A model with one linear layer under PEFT's LoRA, which shares the host's parameters.

    PEFT freezes them; they are made trainable again, as they are for all others.

    Attributes:
        model: PEFT's model.
        layer: PEFT's layer, around the host.
    """

    def __init__(self, host: nn.Linear, rank: int = HIDDEN) -> None:
        self.config = _peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
        self.model: Any = _peft().get_peft_model(Named(sharing(host)), self.config)
        self.layer: Any = self.model.base_model.model.layer
        host.requires_grad_(requires_grad=True)

    def disabled(self) -> "Lora":
        """Switch the adapter off."""
        self.model.base_model.disable_adapter_layers()
        return self

    def merged(self) -> "Lora":
        """Add the adapter to the host's weight."""
        self.model.merge_adapter()
        return self

    def by_hand(self) -> LoraByHand:
        """Return the same arithmetic over the same parameters."""
        down, up = self.layer.lora_A["default"], self.layer.lora_B["default"]
        return LoraByHand(self.layer.base_layer, down, up)

    def hotswap(self) -> Callable[[], object]:
        """Return what exchanges the adapter's weights for others that are in memory."""
        hotswap = _peft().utils.hotswap.hotswap_adapter_from_state_dict
        state = _peft().get_peft_model_state_dict(self.model)
        named = {key.replace(".weight", ".default.weight"): v for key, v in state.items()}
        return lambda: hotswap(self.model, named, "default", self.config)

    def hotswap_from(self, folder: str) -> Callable[[], object]:
        """Save the adapter to a directory; return what exchanges its weights for those there."""
        hotswap = _peft().utils.hotswap.hotswap_adapter
        self.model.save_pretrained(folder)
        return lambda: hotswap(self.model, folder, adapter_name="default", torch_device="cpu")

    def live_load(self, folder: str) -> Prepare:
        """Save the adapter to a directory; return what loads it from there and makes it active."""
        self.model.save_pretrained(folder)

        def load() -> None:
            self.model.load_adapter(folder, "loaded")
            self.model.set_adapter("loaded")

        def prepare() -> Callable[[], object]:
            if "loaded" in self.model.peft_config:
                self.model.set_adapter("default")
                self.model.delete_adapter("loaded")
            return load

        return prepare

    def another(self, rank: int) -> None:
        """Add an adapter of another rank and make it the active one."""
        config = _peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
        self.model.add_adapter(f"rank{rank}", config)
        self.model.set_adapter(f"rank{rank}")


def _peft() -> Any:
    import peft
    import peft.utils.hotswap

    return peft


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what peers warn of, and torch's word on each recompilation, out of the table."""
    torch._logging.set_logs(dynamo=logging.ERROR)  # noqa: SLF001 - documented, under that name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
