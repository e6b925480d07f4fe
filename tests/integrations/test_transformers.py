"""Growth under the Trainer of Transformers: real trainings, real checkpoints, on the CPU."""

import importlib
import sys
import warnings

import growing
import pytest
import torch
from torch import nn

import esper

pytest.importorskip("transformers")
import tiny_transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from esper.integrations.state_files import read_state, write_state
from esper.integrations.transformers import EsperTrainer


class Regressor(nn.Module):
    """The small host of tests.growing, as the Trainer calls a model."""

    def __init__(self):
        super().__init__()
        self.net = growing.host()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return SequenceClassifierOutput(loss=(logits - labels).square().mean(), logits=logits)


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


TRAIN, GATE = Rows(growing.X, growing.Y), Rows(growing.GATE_X, growing.GATE_Y)


def trainer(folder, model=None, esper_options=None, callbacks=(), **arguments):
    chosen = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "per_device_train_batch_size": 30,
        "num_train_epochs": 4,
    }
    options = {"policy": esper.EveryN(20), "horizon": None, **growing.SHORT}
    return EsperTrainer(
        model=Regressor() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**chosen, **arguments}),
        train_dataset=TRAIN,
        eval_dataset=GATE,
        callbacks=list(callbacks),
        esper_options={**options, **(esper_options or {})},
    )


def never(folder, model=None, callbacks=(), esper_options=None, **arguments):
    options = {"policy": esper.Never(), **(esper_options or {})}
    return trainer(folder, model, options, callbacks, **arguments)


def moments(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


def names_by_group(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]


def tensors_of(model):
    """All of a state but the structures, which say where faults are stopped from now on."""
    return {n: v for n, v in growing.state_of(model).items() if not n.endswith("structure")}


class Looking(TrainerCallback):
    """Keeps what a training begins with."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        self.state, self.moments = tensors_of(model), moments(model, optimizer)
        self.groups = names_by_group(model, optimizer)


@pytest.mark.slow
def test_a_training_grows_and_is_resumed(tmp_path):
    """Kernels stand in the groups of their hosts, and come back with their moments, by name."""
    made = trainer(tmp_path, save_strategy="epoch", logging_strategy="epoch")
    made.train()
    assert made.grower.report().trials[0].verdict == "kept", made.grower.report()
    assert any(entry.get("esper/packages") for entry in made.state.log_history)
    decayed, free = names_by_group(made.model, made.optimizer)
    kernels = [name for name in decayed + free if "_seeds" in name]
    assert kernels
    assert all(("bias" in name) == (name in free) for name in kernels)

    looking = Looking()
    again = trainer(tmp_path, callbacks=[looking], num_train_epochs=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no state of growth")
        again.train(resume_from_checkpoint=True)
    assert growing.equal_states(looking.state, tensors_of(made.model))
    assert looking.groups == [decayed, free]
    before = moments(made.model, made.optimizer)
    assert looking.moments.keys() == before.keys()
    assert all(torch.equal(looking.moments[name], before[name]) for name in before)
    assert again.state.global_step == 150


@pytest.mark.slow
def test_a_training_that_does_not_grow_is_the_same_training(tmp_path):
    """Weights are those of a plain Trainer, bit for bit, though a package was tried."""
    from transformers import Trainer

    made = trainer(tmp_path, esper_options={"min_effect": 1e9})
    made.train()
    assert made.grower.report().trials
    plain = Trainer(model=Regressor(), args=made.args, train_dataset=TRAIN)
    plain.train()
    assert growing.equal_states(growing.state_of(made.model), growing.state_of(plain.model))


@pytest.mark.slow
def test_the_best_model_has_the_kernels_that_it_had(tmp_path):
    """Kernels that came after the best checkpoint go when it is loaded."""
    seen = {}

    class Grafting(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 45:
                site = esper.layers(model)["net.0"]
                site.graft(0, "mlp-4x4-w32", alpha=1.0, example=growing.X[:4])
                nn.init.constant_(site.weight, 100.0)

        def on_save(self, args, state, control, model=None, **_):
            seen.setdefault("best", tensors_of(model))

    made = never(
        tmp_path,
        callbacks=[Grafting()],
        save_strategy="epoch",
        eval_strategy="epoch",
        num_train_epochs=2,
        load_best_model_at_end=True,
    )
    made.train()
    assert made.state.best_global_step == 30
    assert growing.equal_states(tensors_of(made.model), seen["best"])


def test_micro_batches_are_one_update(tmp_path):
    """Under accumulation updates are counted, and the loss is that of a whole batch."""
    made = never(tmp_path, gradient_accumulation_steps=3, num_train_epochs=1)
    made.train()
    assert made.grower.updates == 10
    assert made.grower.report().evaluations[-1].train_loss > 0.5  # a third of it would be less


def test_the_horizon_is_the_trainers(tmp_path):
    """It is the number of updates of the whole training."""
    made = EsperTrainer(
        model=Regressor(),
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=7, disable_tqdm=True
        ),
        train_dataset=TRAIN,
        esper_options={"policy": esper.Never()},
    )
    made.train()
    assert made.grower.report().settings["horizon"] == 7


@pytest.mark.torture
def test_label_smoothing_finds_its_labels(tmp_path):
    """A language model is judged by its shifted labels, and twins are trained on smoothed ones."""
    torch.manual_seed(0)
    model, _ = tiny_transformers.gpt2()
    ids = torch.randint(3, 50, (400, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    made = EsperTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            max_steps=75,
            disable_tqdm=True,
            save_strategy="no",
            label_smoothing_factor=0.1,
            gradient_accumulation_steps=2,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        esper_options={
            "policy": esper.EveryN(10),
            "select": ["transformer.h.0.attn.c_proj"],
            **growing.SHORT,
        },
    )
    made.train()
    report = made.grower.report()
    assert report.trials, report
    assert report.evaluations[0].gate_loss == pytest.approx(3.9, abs=0.2)  # ln 50


def test_an_error_in_the_training_closes_the_grower(tmp_path):
    """Hooks are gone after a crash."""

    class Broken(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise RuntimeError("broken")

    made = never(tmp_path, callbacks=[Broken()])
    with pytest.raises(RuntimeError, match="broken"):
        made.train()
    with pytest.raises(esper.GrowthError, match="closed"):
        made.grower.step()


def test_processes_that_growth_does_not_know_are_refused(tmp_path, monkeypatch):
    """Before the first batch: each would grow by itself."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="2 processes train the model as Regressor"):
        never(tmp_path).train()


def test_an_unknown_option_is_refused_at_once(tmp_path):
    """Not when the training starts."""
    with pytest.raises(TypeError, match="did you mean horizon"):
        never(tmp_path, esper_options={"horizn": 3})


def test_a_state_comes_back_from_its_files(tmp_path):
    """Tensors, tuples and keys that are no text included; without files it is empty."""
    state = {"a": [1, (2.5, None)], "t": {3: torch.arange(4)}, "text": "x", "is_so": True}
    assert read_state(tmp_path) == {}
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert torch.equal(found["t"].pop(3), state["t"].pop(3))
    assert found == state
    with pytest.raises(TypeError, match="found <object"):
        write_state(tmp_path, {"a": object()})


def test_without_transformers_the_extra_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "esper.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'esper-morph\[hf\]'"):
        importlib.import_module("esper.integrations.transformers")
