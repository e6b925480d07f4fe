"""Growth in PyTorch Lightning: a callback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from esper.continuity.following import follow
from esper.continuity.optimizer import sync_optimizer
from esper.continuity.replicas import ranks_of
from esper.growth.evaluate_on import evaluate_on
from esper.growth.grower import Grower
from esper.growth.options import check_options
from esper.integrations.growth_state import Hearing, metrics_of, resume, state_of
from esper.integrations.missing import missing_framework
from esper.state.shards import unsharded_around
from esper.wrapping.wrap import layers, wrap

try:
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

    from esper.integrations.sharded_loading import build_before_loading
except ImportError as error:
    raise missing_framework("pytorch_lightning", "lightning") from error

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.evaluate_on import Loss
    from esper.growth.options import GrowerOptions
    from esper.wrapping.select import Select

_LOGS: Final = ("log", "log_dict", "print")
"""Methods of a LightningModule that a pass beside the training must not reach."""


class EsperCallback(pl.Callback):
    """Grows the LightningModule that a Trainer fits.

    The module is wrapped in ``setup``, before its optimizers are made; a Grower is made when the
    training starts and closed when it ends, also by an error. By default ``horizon`` is the
    Trainer's number of updates; ``compute_loss`` calls ``training_step`` (under automatic
    optimization; nothing is logged twice) under the Trainer's precision; and ``evaluate`` reads
    the Trainer's validation batches, where ``loss`` says how. Every keyword of
    :class:`esper.Grower` is an option. A Trainer's checkpoint has the kernels in the model's state
    and their moments in the optimizer's, by name: ``ckpt_path=`` brings both back. The averages of
    Lightning's own callbacks grow with the module. Parameters, packages kept
    and the gate loss are logged as ``esper/...``.

    Args:
        module: Dotted name of the part of the module that grows; None for all of it.
        select: Which layers may grow, as in :func:`esper.wrap`.
        loss: For held-out batches ``(inputs, targets)``, as :func:`esper.evaluate_on` takes both:
            ``"cross_entropy"``, ``"mse"``, or a function ``(output, target)`` to losses of shape
            (samples,). The output is what the module, or the part that grows, returns.
        options: Those of :class:`esper.Grower`.

    Attributes:
        grower: The Grower of the fit under way, or of the last one; None before.

    Raises:
        TypeError, ValueError: An option is none of the Grower's, or out of its range.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        select: Select | None = None,
        loss: Loss | None = None,
        **options: Unpack[GrowerOptions],
    ) -> None:
        check_options(options)
        self._path = module or ""
        self._select = select
        if loss is not None:
            evaluate_on((), loss=loss)  # a loss that it does not take is refused at once
        self._loss = loss
        self._options = options
        self._hearing = Hearing(options.get("sink"))
        self._loaded: Mapping[str, Any] | None = None
        self.grower: Grower | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the module, so that a checkpoint's kernels can be loaded, whatever is to be done.

        Raises:
            ValueError: Processes are to fit it of which only the weights come back.
        """
        build_before_loading(trainer.strategy)
        if stage == "fit" and not layers(pl_module.get_submodule(self._path)):
            _check_comes_back(trainer)
        for module in (pl_module, *_averages(trainer)):
            model = module.get_submodule(self._path)
            if not layers(model):
                wrap(model, select=self._select)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the optimizers load by names what a checkpoint may have; averages go along."""
        model = pl_module.get_submodule(self._path)
        named = pl_module if trainer.world_size > 1 else model  # as the Grower will name them
        sync_optimizer(named, trainer.optimizers)
        for averaged in _averages(trainer):
            follow(model, averaged.get_submodule(self._path))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the Grower: model and optimizers are those of the checkpoint by now."""
        self.close()
        given = _of_ranks(trainer, pl_module)
        adapter = _Adapter(trainer, pl_module, self._path, self._loss, is_whole=given is not None)
        options: dict[str, Any] = {
            "horizon": adapter.horizon(is_resumed=not self._loaded),
            "compute_loss": adapter.compute_loss if pl_module.automatic_optimization else None,
            "evaluate": None if self._loss is None else adapter.evaluate,
            **self._options,
            "sink": self._hearing,
        }
        model = pl_module.get_submodule(self._path) if given is None else given
        trained = trainer.optimizers
        self.grower = Grower(model, trained[0] if len(trained) == 1 else trained, **options)
        loaded, self._loaded = self._loaded, None
        resume(self.grower, loaded, at_update=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tell the Grower of a batch, and log what happened."""
        del batch_idx
        grower = self._open()
        shares = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        loss = loss_in(outputs)
        grower.step(None if loss is None else loss * shares, batch=batch)
        self._log(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the Grower that an epoch ended; let ``monitor=`` see what growth measured."""
        grower = self._open()
        grower.end_epoch()
        self._log(trainer)
        if not trainer.barebones:
            several = trainer.world_size > 1
            pl_module.log_dict(metrics_of(grower), logger=False, sync_dist=several)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the Grower."""
        del pl_module
        self.close()
        self._log(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the Grower, and say why; on a rank that has raised alone, too."""
        del trainer, pl_module
        self.close(f"{type(exception).__name__} was raised", by_error=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the Grower where nothing else did."""
        del trainer, pl_module, stage
        self.close()

    def close(self, reason: str = "the run ended", *, by_error: bool = False) -> None:
        """Close the Grower, if one is open, as its own ``close``. Closing twice does nothing."""
        if self.grower is not None:
            self.grower.close(reason, by_error=by_error)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of growth for a checkpoint; empty where a Grower has none to give."""
        state = state_of(self.grower)
        return {"grower": state} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of growth until there is a Grower to give it to."""
        self._loaded = state_dict.get("grower")

    def _open(self) -> Grower:
        assert self.grower is not None, "on_train_start came before"
        return self.grower

    def _log(self, trainer: pl.Trainer) -> None:
        """Log what growth measured, where something happened."""
        if self._hearing.has_heard and self.grower is not None:
            self._hearing.has_heard = False
            found = metrics_of(self.grower)
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)


def _check_comes_back(trainer: pl.Trainer) -> None:
    """Refuse processes whose weights go into the module of the one that started them.

    Raises:
        ValueError: They are such, and that module is not wrapped: what has grown would be left out.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    msg = (
        "the Trainer fits in processes of its own (ddp_spawn, ddp_fork, ddp_notebook), and brings "
        "weights back into a module that has no place for kernels: call esper.wrap(module) before "
        'trainer.fit, or start a script with strategy="ddp"'
    )
    raise ValueError(msg)


def _of_ranks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
    """Return the module as ranks train it together; None where there is one process.

    Raises:
        ValueError: Ranks train it in a way that growth knows nothing of, or the module steps by
            itself inside of the forward that they share.
    """
    if trainer.world_size == 1:
        return None
    model = trainer.strategy.model
    if model is None or ranks_of(model) is None:
        msg = (
            f"several processes train the module by {type(trainer.strategy).__name__}, and growth "
            'needs DDP, or FSDP2 with whole twins (twin=): pass strategy="ddp"'
        )
        raise ValueError(msg)
    if isinstance(model, DistributedDataParallel) and not pl_module.automatic_optimization:
        msg = (
            "under manual optimization a training_step steps inside of DDP's forward, before the "
            "ranks have averaged the gradients of kernels: use automatic optimization, one "
            "process, or a loop of your own"
        )
        raise ValueError(msg)
    return model


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the averages that Lightning's callbacks keep of the module; others than theirs, none.

    Theirs are updated pair by pair, and so have to grow with the module. A callback that is set up
    behind this one makes its average later, of the module as it is wrapped.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # the Trainer's, set elsewhere
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            averaged = callback._average_model  # noqa: SLF001 - it is kept nowhere else
            if averaged is not None:
                yield averaged.module if isinstance(averaged, AveragedModel) else averaged


def loss_in(outputs: object) -> Tensor | None:
    """Return the loss in what a ``training_step`` gave; None where there is none."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return found if isinstance(found, Tensor) else None


class _Adapter:
    """What the Grower asks of a Trainer that fits a module.

    Args:
        trainer: The Trainer.
        pl_module: The module that it fits.
        path: Dotted name of the part that grows; empty for the module itself.
        loss: Of held-out batches, as :func:`esper.evaluate_on` takes it.
        is_whole: Whether passes are made of the whole module although a part of it grows: DDP has
            the whole.
    """

    __slots__ = ("_loss", "_part", "_path", "_pl_module", "_trainer")
    # what a part of the module keeps is looked into by the slots, and put back after each pass

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        path: str,
        loss: Loss | None,
        *,
        is_whole: bool,
    ) -> None:
        self._trainer, self._pl_module, self._loss = trainer, pl_module, loss
        self._path, self._part = ("", path) if is_whole else (path, "")

    def horizon(self, *, is_resumed: bool) -> int | None:
        """Return the updates that the fit will make from now on; None where that is not known."""
        if not self._pl_module.automatic_optimization:
            return None
        try:
            found = self._trainer.estimated_stepping_batches
        except MisconfigurationException:  # accumulation that changes from epoch to epoch
            return None
        left = found - (self._trainer.global_step if is_resumed else 0)
        return int(left) if left > 0 and math.isfinite(left) else None

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what ``training_step`` gives for a batch, of the module or of a copy of it.

        Raises:
            TypeError: It gave no loss.
        """
        with self._standing_in(model) as module, self._trainer.precision_plugin.forward_context():
            given = [batch]  # by position, as the Trainer does: names are the owner's
            if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
                given.append(self._trainer.fit_loop.epoch_loop.batch_idx)
            found = loss_in(module.training_step(*given))
        if found is None:
            msg = (
                f"{type(module).__name__}.training_step gave no loss for this batch, while growth "
                "needs one for each; give EsperCallback compute_loss=, a function (model, batch)"
            )
            raise TypeError(msg)
        return found

    def evaluate(self, model: nn.Module) -> Tensor:
        """Return the losses of every held-out sample, in the loader's order."""
        return torch.cat([self._held_out(model, batch) for batch in self._held_out_batches()])

    def _held_out(self, model: nn.Module, batch: Any) -> Tensor:
        plugin = self._trainer.precision_plugin
        batch = plugin.convert_input(batch)
        batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        assert self._loss is not None, "without a loss there is no evaluate"
        part = model.get_submodule(self._part)
        around = unsharded_around(part, model)
        with self._standing_in(model), plugin.forward_context(), around:
            return evaluate_on([batch[:2]], loss=self._loss)(part)

    def _held_out_batches(self) -> Iterator[Any]:
        if self._trainer.val_dataloaders is None:
            self._trainer.fit_loop.epoch_loop.val_loop.setup_data()
        found = self._trainer.val_dataloaders
        if found is None:
            msg = (
                "EsperCallback(loss=...) reads the Trainer's validation batches, and there are "
                "none; pass val_dataloaders to fit, or give EsperCallback evaluate="
            )
            raise ValueError(msg)
        first = found[0] if isinstance(found, (list, tuple)) else found
        return iter(first)

    @contextmanager
    def _standing_in(self, model: nn.Module) -> Iterator[pl.LightningModule]:
        """Let the module stand where it can be asked for its loss, and log nothing.

        A copy has no Trainer of its own; a part is put into the module for the while.
        """
        if not self._path:
            assert isinstance(model, pl.LightningModule), "it is the module, or a copy of it"
            module = model
        else:
            module = self._pl_module
        parent_path, _, name = self._path.rpartition(".")
        parent = module.get_submodule(parent_path)
        part = parent._modules.get(name)  # noqa: SLF001 - past a module's own __setattr__
        before, held = module._trainer, dict(module.__dict__)  # noqa: SLF001 - its property asks fabric
        module._trainer = self._trainer  # noqa: SLF001 - as above
        try:
            module.__dict__.update(dict.fromkeys(_LOGS, _nothing))
            if self._path:
                parent._modules[name] = model  # noqa: SLF001 - as above
            yield module
        finally:
            module._trainer = before  # noqa: SLF001 - as above
            for log in _LOGS:
                module.__dict__.pop(log, None)
                if log in held:
                    module.__dict__[log] = held[log]
            if self._path:
                parent._modules[name] = part  # noqa: SLF001 - as above


def _nothing(*_: object, **__: object) -> None:
    """Stand for a method that logs."""
