"""Growth in a loop under Accelerate: prepared, accumulated, clipped, saved and loaded."""

import importlib
import sys

import growing
import pytest
import torch

import esper

pytest.importorskip("accelerate")
from accelerate import Accelerator, tracking

from esper.integrations.accelerate import esper_prepare


def compute_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def loader():
    data = torch.utils.data.TensorDataset(growing.X, growing.Y)
    return torch.utils.data.DataLoader(data, batch_size=30)


def prepared(accelerator, **options):
    model = growing.host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    chosen = {
        "policy": esper.EveryN(20),
        "compute_loss": compute_loss,
        "evaluate": growing.evaluate,
        **growing.SHORT,
    }
    return esper_prepare(accelerator, model, optimizer, loader(), **{**chosen, **options})


def train(accelerator, model, optimizer, batches, grower, epochs):
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = compute_loss(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
            grower.step(loss, batch=batch)
        grower.end_epoch()


def moments(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


def tensors_of(model):
    """All of a state but the structures, which say where faults are stopped from now on."""
    return {n: v for n, v in growing.state_of(model).items() if not n.endswith("structure")}


class Seen(tracking.GeneralTracker):
    """A tracker as an owner may give one to ``log_with``."""

    name = "seen"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.logged, self.is_finished = {}, False

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **_):
        assert not self.is_finished
        self.logged.update({(step, name): value for name, value in values.items()})

    def finish(self):
        self.is_finished = True


@pytest.mark.parametrize("is_before", [True, False])
def test_the_trackers_of_log_with_have_the_growth(is_before):
    """They are started before the Grower is made or after it; the owner's sink has all as well."""
    seen, kinds = Seen(), []
    own = type("Own", (), {"publish": lambda _, event: kinds.append(event.kind)})()
    accelerator = Accelerator(cpu=True, log_with=seen)
    if is_before:
        accelerator.init_trackers("digits")
    model, optimizer, batches, grower = prepared(accelerator, sink=own, evaluate_every=5)
    if not is_before:
        accelerator.init_trackers("digits")
    train(accelerator, model, optimizer, batches, grower, epochs=1)
    grower.close()
    accelerator.end_training()
    assert {step for step, name in seen.logged if name == "esper/gate_loss"} >= {1, 6, 11}
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")


class Words(Seen):
    """One that takes words, as W&B does."""

    name = "wandb"


def ends_training(end):
    """Train under a tracker, end as ``end`` does, and return the kinds that it was told."""
    seen = Words()
    accelerator = Accelerator(cpu=True, log_with=seen)
    accelerator.init_trackers("digits")
    model, optimizer, batches, grower = prepared(accelerator, evaluate_every=5)
    train(accelerator, model, optimizer, batches, grower, epochs=1)
    end(accelerator, grower)
    assert seen.is_finished
    return {name for _, name in seen.logged}


def test_the_end_of_the_training_closes_the_grower_before_its_trackers():
    """Whoever calls it first loses nothing of the run's end; closing again is fine."""

    def end(accelerator, grower):
        accelerator.end_training()
        grower.close()

    assert "esper/run_ended" in ends_training(end)


def test_control_trackers_that_are_finished_first_lack_the_end():
    """As they did: accelerate's own method finishes them while the run goes on."""

    def end(accelerator, grower):
        type(accelerator).end_training(accelerator)
        grower.close()

    assert "esper/run_ended" not in ends_training(end)


@pytest.mark.slow
def test_it_grows_under_accumulation_and_clipping_and_is_resumed(tmp_path):
    """Kernels and their moments, by name, come back by ``load_state`` in a fresh run."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, batches, grower = prepared(accelerator)
    train(accelerator, model, optimizer, batches, grower, epochs=9)
    report = grower.report()
    assert report.updates == 9 * 15
    assert report.trials[0].verdict == "kept", report
    accelerator.save_state(tmp_path / "state")

    other = Accelerator(cpu=True, gradient_accumulation_steps=2)
    again, its_optimizer, batches, its_grower = prepared(other)
    if hasattr(its_grower, "load_state_dict"):
        other.load_state(tmp_path / "state")
    else:
        with pytest.warns(UserWarning, match="no state of growth"):
            other.load_state(tmp_path / "state")

    assert growing.equal_states(tensors_of(again), tensors_of(model))
    before, found = moments(model, optimizer), moments(again, its_optimizer)
    assert any("_seeds" in name for name in before)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    train(other, again, its_optimizer, batches, its_grower, epochs=1)
    its_grower.close()


def test_micro_batches_are_one_update():
    """Steps of the optimizer that only gathered gradients are not counted."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer, batches, grower = prepared(accelerator, policy=esper.Never())
    train(accelerator, model, optimizer, batches, grower, epochs=1)
    assert grower.updates == 10
    grower.close()


def test_several_optimizers_are_given_as_a_sequence():
    """They come back prepared, as a list, in their order."""
    accelerator = Accelerator(cpu=True)
    model = growing.host()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 4)]
    _, given, grower = esper_prepare(accelerator, model, optimizers, policy=esper.Never())
    assert [member.optimizer for member in given] == optimizers
    grower.close()


def test_processes_that_growth_does_not_know_are_refused(monkeypatch):
    """Whatever else shards or copies the model: each would grow by itself."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    model = growing.host()
    with pytest.raises(ValueError, match="2 processes train the model as Sequential"):
        esper_prepare(Accelerator(cpu=True), model, torch.optim.AdamW(model.parameters()))


def test_an_unknown_option_changes_nothing():
    """The model is not wrapped where the options are refused."""
    model = growing.host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="did you mean horizon"):
        esper_prepare(Accelerator(cpu=True), model, optimizer, horizn=3)
    assert not esper.layers(model)


def test_without_accelerate_the_extra_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "esper.integrations.accelerate")
    with pytest.raises(ImportError, match=r"pip install 'esper-morph\[hf\]'"):
        importlib.import_module("esper.integrations.accelerate")
