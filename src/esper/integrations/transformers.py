"""Growth under the Trainer of Transformers: a mixin, as its callbacks see no batch and no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from esper.continuity.optimizer import remove_parameters, sync_optimizer
from esper.growth.evaluate_on import evaluate_on
from esper.growth.grower import Grower
from esper.growth.options import check_options
from esper.integrations.growth_state import Hearing, check_together, metrics_of, resume, state_of
from esper.integrations.missing import missing_framework
from esper.integrations.state_files import read_state, write_state
from esper.seeds.rebuilding import build
from esper.seeds.structure import structure
from esper.state.host_parts import SEEDS
from esper.state.layer_record import record_of
from esper.wrapping.wrap import layers, wrap

try:
    from transformers import Trainer, TrainerCallback

    from esper.integrations.pretrained_loading import register
except ImportError as error:
    raise missing_framework("transformers", "hf") from error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.growth.batch import Batch
    from esper.growth.evaluate_on import Loss

register()


class EsperTrainerMixin:
    """Lets a Trainer grow its model; put it before the Trainer's class.

    ``esper_options`` are the keywords of :class:`esper.Grower`, and ``select`` of
    :func:`esper.wrap`. By default ``horizon`` is the Trainer's number of updates, ``compute_loss``
    the Trainer's own, label smoothing and the weights of micro-batches included, and ``evaluate``
    reads ``eval_dataset`` (its first, where it is a dict) in its order: cross entropy of logits and
    ``labels`` for each sample, the mean of its tokens where there are several; the square of the
    difference where labels are floats. A checkpoint has kernels in the model's file, their moments
    in the optimizer's, and growth in files of its own; ``resume_from_checkpoint`` brings all of it
    back. Parameters, packages kept and the gate loss are logged as ``esper/...``. Growth under FSDP
    and DeepSpeed is refused.

    Attributes:
        grower: The Grower of the training under way, or of the last one; None before.

    Raises:
        TypeError, ValueError: An option is none of the Grower's, or out of its range; the Trainer
            shards its model.
    """

    def __init__(
        self, *args: Any, esper_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        options = dict(esper_options or {})
        self._esper_select = options.pop("select", None)
        check_options(options)
        self._esper_options = options
        self._esper_hearing = Hearing(options.get("sink"))
        self._esper_loaded: dict[str, Any] = {}
        self._esper_step: tuple[Tensor, Batch] | None = None
        self.grower: Grower | None = None
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            msg = (
                "the Trainer is set to FSDP or DeepSpeed, which shard the model: growth needs "
                "whole layers; train with DDP or on one device, or with a plain Trainer"
            )
            raise ValueError(msg)
        self._esper_wrap(trainer.model)
        trainer.add_callback(_Moments(self))

    def _esper_wrap(self, model: nn.Module) -> None:
        if not layers(model):
            wrap(model, select=self._esper_select)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return the owner's model, wrapped."""
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc] # the Trainer's
        self._esper_wrap(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer; kernels that were loaded are placed as those that are grown."""
        trainer: Any = self
        is_made = trainer.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc] # the Trainer's
        if is_made:
            remove_parameters(optimizer, _kernel_parameters(trainer.model))
            sync_optimizer(trainer.model, optimizer, group_for=self._esper_options.get("group_for"))
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Train on a batch, and keep it until the optimizer has stepped."""
        trainer: Any = self
        given = dict(inputs)  # label smoothing takes the labels out
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc] # the Trainer's
        steps = int(trainer.current_gradient_accumulation_steps)
        self._esper_step = loss * steps, (given, num_items_in_batch, steps)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the Grower is closed at the end, also by an error."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc] # the Trainer's
        except BaseException as error:
            self._esper_close(f"{type(error).__name__} was raised", by_error=True)
            raise
        finally:
            self._esper_close()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        trainer: Any = self
        _drop_others(trainer.model if model is None else model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc] # the Trainer's

    def _load_best_model(self) -> None:
        trainer: Any = self
        self._esper_close()
        if trainer.state.best_model_checkpoint is not None:
            _drop_others(trainer.model, Path(trainer.state.best_model_checkpoint))
        super()._load_best_model()  # type: ignore[misc] # the Trainer's

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc] # the Trainer's
        state = state_of(self.grower)
        trainer: Any = self
        if state and trainer.args.should_save:
            write_state(Path(output_dir), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc] # the Trainer's
        self._esper_loaded = {} if checkpoint is None else read_state(Path(checkpoint))

    def _esper_begin(self) -> None:
        """Make the Grower: model and optimizer are those of the checkpoint by now."""
        trainer: Any = self
        self._esper_close()
        check_together(trainer.model_wrapped, trainer.args.world_size)
        asked = _Asked(trainer)
        done = trainer.state.global_step
        left = trainer.state.max_steps - (0 if self._esper_loaded else done)
        options: dict[str, Any] = {
            "horizon": left if left > 0 else None,
            "compute_loss": asked.compute_loss,
            "evaluate": None if trainer.eval_dataset is None else asked.evaluate,
            **self._esper_options,
            "sink": self._esper_hearing,
        }
        self.grower = Grower(trainer.model_wrapped, trainer.optimizer, **options)
        loaded, self._esper_loaded = self._esper_loaded, {}
        resume(self.grower, loaded, at_update=done)

    def _esper_stepped(self) -> None:
        """Tell the Grower of a micro-batch, or of an update."""
        step, self._esper_step = self._esper_step, None
        if step is not None and self.grower is not None:
            self.grower.step(step[0], batch=step[1])
            self._esper_log()

    def _esper_epoch_ended(self) -> None:
        if self.grower is not None:
            self.grower.end_epoch()
            self._esper_log()

    def _esper_log(self) -> None:
        trainer: Any = self
        is_wanted = trainer.args.logging_strategy != "no"
        if is_wanted and self._esper_hearing.has_heard and self.grower is not None:
            self._esper_hearing.has_heard = False
            trainer.log(metrics_of(self.grower))

    def _esper_close(self, reason: str = "the run ended", *, by_error: bool = False) -> None:
        if self.grower is not None:
            self.grower.close(reason, by_error=by_error)


class EsperTrainer(EsperTrainerMixin, Trainer):
    """A Trainer that grows its model: see :class:`EsperTrainerMixin`."""


class _Moments(TrainerCallback):
    """Tells a mixin where its Trainer is.

    Args:
        trainer: The mixin.
    """

    def __init__(self, trainer: EsperTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is loaded."""
        self._trainer._esper_begin()  # noqa: SLF001 - of this file

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """A micro-batch is done."""
        self._trainer._esper_stepped()  # noqa: SLF001 - of this file

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        self._trainer._esper_stepped()  # noqa: SLF001 - of this file

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """An epoch is done."""
        self._trainer._esper_epoch_ended()  # noqa: SLF001 - of this file


class _Asked:
    """What the Grower asks of a Trainer.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the Trainer's loss of a micro-batch, as large as if it were the whole batch."""
        trainer, (inputs, num_items, steps) = self._trainer, batch
        inputs = trainer._prepare_inputs(dict(inputs))  # noqa: SLF001 - as training_step does
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        return loss.mean() * (steps if self._is_share(num_items) else 1)

    def _is_share(self, num_items: object) -> bool:
        """Say whether losses of micro-batches are shares of the whole batch's, to be summed."""
        trainer = self._trainer
        told = getattr(trainer, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        is_divided = trainer.model_accepts_loss_kwargs and num_items is not None
        return bool(is_divided) or trainer.compute_loss_func is not None

    def evaluate(self, model: nn.Module) -> Tensor:
        """Return the loss of each sample of ``eval_dataset``, in its order."""
        return torch.cat([self._losses(model, batch) for batch in self._held_out()])

    def _held_out(self) -> torch.utils.data.DataLoader[Any]:
        trainer = self._trainer
        dataset = trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        collate = trainer.data_collator
        if hasattr(dataset, "column_names"):
            dataset = trainer._remove_unused_columns(dataset, description="evaluation")  # noqa: SLF001 - as its loader does
        else:
            collate = trainer._get_collator_with_removed_columns(collate, "evaluation")  # noqa: SLF001 - as its loader does
        size = trainer.args.eval_batch_size
        return torch.utils.data.DataLoader(dataset, batch_size=size, collate_fn=collate)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        trainer = self._trainer
        inputs = trainer._prepare_inputs(batch)  # noqa: SLF001 - as prediction_step does
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            msg = (
                f"losses of single samples need labels in eval_dataset, found {sorted(inputs)}; "
                "give esper_options evaluate=, a function (model) to per-sample losses"
            )
            raise TypeError(msg)
        with trainer.compute_loss_context_manager():
            loss: Loss = "mse" if labels.is_floating_point() else "cross_entropy"
            return evaluate_on([inputs], loss=loss)(model)


def _kernel_parameters(model: nn.Module) -> list[nn.Parameter]:
    marked = f"{SEEDS}."
    return [p for name, p in model.named_parameters() if marked in name]


def _drop_others(model: nn.Module, folder: Path) -> None:
    """Drop kernels that a checkpoint does not have: loading leaves what it does not name."""
    keys = _keys_in(folder)
    if keys is None:
        return
    for name, layer in layers(model).items():
        prefix = f"{name}.{SEEDS}." if name else f"{SEEDS}."
        held = {
            key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)
        }
        if any(str(seed_idx) not in held for seed_idx in record_of(layer).seeds):
            build(layer, [entry for entry in structure(layer) if str(entry["seed"]) in held])


def _keys_in(folder: Path) -> set[str] | None:
    """Return the names of the tensors in a checkpoint; None where it is not of safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    file = folder / "model.safetensors"
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())
