"""Lightning's loading of models in shards: kernels are built before their tensors are asked for.

Its ``ModelParallelStrategy`` loads what the module asks for by name, once it is sharded: of one
without kernels the host alone, and without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.strategies import ModelParallelStrategy

from esper.continuity.distributed_checkpoint import build_as_saved, build_described

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy


def build_before_loading(strategy: Strategy) -> None:
    """Let a strategy that shards build what a checkpoint has before it loads it; others do not.

    Args:
        strategy: The Trainer's. Doing it twice changes nothing.
    """
    is_done = isinstance(vars(strategy).get("load_checkpoint"), _BuildingLoad)
    if isinstance(strategy, ModelParallelStrategy) and not is_done:
        strategy.load_checkpoint = _BuildingLoad(strategy)  # type: ignore[method-assign] # nothing is called in between


class _BuildingLoad:
    """A strategy's ``load_checkpoint``, behind what builds the kernels.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self._strategy, self._load = strategy, strategy.load_checkpoint

    def __call__(
        self,
        checkpoint_path: str | Path,
        weights_only: bool | None = None,  # noqa: FBT001 - as it is called
    ) -> dict[str, Any]:
        """Build, and load: the module is sharded, and optimizers are made."""
        path = Path(self._strategy.broadcast(checkpoint_path))
        model, optimizers = self._strategy.model, self._strategy.optimizers or None
        assert model is not None, "the strategy is set up"
        if path.is_dir():
            build_as_saved(path, model, optimizers, prefix="state_dict.")
        elif path.is_file():
            reads = self._strategy.checkpoint_io.load_checkpoint  # Lightning's: the file is its own
            saved = reads(path, map_location="cpu", weights_only=weights_only)
            build_described(saved["state_dict"], model, optimizers)
            del saved  # it is read once more, and may be large
        return self._load(checkpoint_path, weights_only)
