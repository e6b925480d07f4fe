"""Growth under Lightning's Trainer: real fits, real checkpoints, on the CPU."""

import importlib
import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import growing
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import esper

pl = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import (  # noqa: E402 - as above
    EMAWeightAveraging,
    StochasticWeightAveraging,
)

from esper.integrations.lightning import EsperCallback  # noqa: E402 - behind importorskip

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Module(pl.LightningModule):
    """The small host of tests.growing, with everything that Lightning lets a module do."""

    def __init__(self, *, is_manual=False):
        super().__init__()
        self.net = growing.host()
        self.num_logged = 0
        self.automatic_optimization = not is_manual
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        assert self.trainer.max_epochs
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(x, y, **kwargs):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), **kwargs)


def train_loader():
    return loader(growing.X, growing.Y, batch_size=30)  # 30 batches an epoch, in order


def gate_loader():
    return loader(growing.GATE_X, growing.GATE_Y, batch_size=100)


def trainer(folder, callback, **options):
    defaults = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=[callback], **{**defaults, **options})


def growing_callback(**options):
    chosen = {"policy": esper.EveryN(20), "loss": "mse", "horizon": None, **growing.SHORT}
    return EsperCallback(**{**chosen, **options})


def never(**options):
    return growing_callback(policy=esper.Never(), **options)


def fit(tmp_path, callback, module=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = Module() if module is None else module
    made = trainer(tmp_path, callback, **options)
    made.fit(module, train_loader(), gate_loader(), ckpt_path=ckpt_path)
    return module, made


def kernels_of(module):
    return {n: p for n, p in module.named_parameters() if "_seeds" in n}


def tensors_of(module):
    """All of a state but the structures, which say where faults are stopped from now on."""
    return {n: v for n, v in growing.state_of(module).items() if not n.endswith("structure")}


def moments(module, optimizer):
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


@pytest.mark.slow
def test_a_fit_grows(tmp_path):
    """A package is tried in a twin of the LightningModule and taken over."""
    callback = growing_callback()
    module, made = fit(tmp_path, callback)
    (trial,) = callback.grower.report().trials[:1]
    assert trial.verdict == "kept", callback.grower.report()
    assert kernels_of(module)
    assert made.callback_metrics["esper/packages"] == 1
    assert made.callback_metrics["esper/gate_loss"] < made.callback_metrics["val_loss"] + 1


@pytest.mark.slow
def test_a_fit_that_does_not_grow_is_the_same_fit(tmp_path):
    """Weights and logged metrics are those of a fit without the callback, bit for bit."""
    module, made = fit(tmp_path, growing_callback(policy=esper.EveryN(20), min_effect=1e9))
    other, plain = fit(tmp_path, pl.Callback())
    assert growing.equal_states(growing.state_of(module), growing.state_of(other))
    assert made.callback_metrics["train_loss"] == plain.callback_metrics["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_it_grows_in_the_trainers_precision(tmp_path, precision):
    """Twins and evaluations run in the dtype that the fit runs in."""
    callback = growing_callback()
    module, _ = fit(tmp_path, callback, precision=precision)
    report = callback.grower.report()
    assert report.trials, report
    assert {p.dtype for p in kernels_of(module).values()} <= {next(module.parameters()).dtype}


@pytest.mark.slow
def test_the_parameters_of_a_training_step_have_names_of_the_owners(tmp_path):
    """They are given by position, as the Trainer does."""

    class Named(Module):
        def training_step(self, pairs, i):
            assert i == self.trainer.fit_loop.epoch_loop.batch_idx
            return super().training_step(pairs, i)

    callback = growing_callback()
    fit(tmp_path, callback, Named(), max_epochs=3)
    assert callback.grower.report().trials[0].verdict == "kept"


@pytest.mark.slow
def test_a_part_of_a_module_grows(tmp_path):
    """``module=`` names what grows; the loss is still that of ``training_step``."""
    callback = growing_callback(module="net")
    module, _ = fit(tmp_path, callback)
    assert callback.grower.report().trials[0].verdict == "kept"
    assert all(name.startswith("net.") for name in kernels_of(module))


@pytest.mark.slow
def test_what_has_grown_is_resumed_by_ckpt_path(tmp_path):
    """Kernels, and their moments by name, are those of the checkpoint in a fresh Trainer."""
    module, made = fit(tmp_path, growing_callback())
    saved = tmp_path / "grown.ckpt"
    made.save_checkpoint(saved)
    assert kernels_of(module)
    before = moments(module, made.optimizers[0])

    class Looking(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = moments(pl_module, trainer.optimizers[0])
            self.state = tensors_of(pl_module)

    looking, torch_module = Looking(), Module()
    resumed = trainer(tmp_path, growing_callback(), max_epochs=5)
    resumed.callbacks.append(looking)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no state of growth")
        resumed.fit(torch_module, train_loader(), gate_loader(), ckpt_path=saved)
    assert growing.equal_states(looking.state, tensors_of(module))
    assert looking.found.keys() == before.keys()
    assert all(torch.equal(looking.found[name], before[name]) for name in before)
    assert resumed.global_step == 150


class Following(pl.Callback):
    """Counts the batches behind which an average without a memory is not the module."""

    def __init__(self, averages):
        self.averages, self.num_seen, self.num_apart = averages, 0, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        average = self.averages._average_model.module
        self.num_apart += not growing.equal_states(tensors_of(average), tensors_of(pl_module))
        self.num_seen += bool(kernels_of(average))


def fit_with(tmp_path, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(0)
    module, made = Module(), trainer(tmp_path, callbacks[0], **options)
    made.callbacks += callbacks[1:]
    made.fit(module, train_loader(), gate_loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False])
def test_an_average_of_lightnings_grows_with_the_module(tmp_path, is_first):
    """In whichever order the callbacks stand; without the kernels it could not be updated."""
    averages = EMAWeightAveraging(decay=0.0)
    seen, grows = Following(averages), growing_callback()
    fit_with(tmp_path, *([averages, grows] if is_first else [grows, averages]), seen)
    assert seen.num_seen > 20
    assert seen.num_apart == is_first  # the run is taken over behind the average's update


@pytest.mark.slow
def test_an_equal_average_is_taken_over_at_the_end(tmp_path):
    """That of Lightning's older callback, of epochs with the kernels and of epochs without."""
    averages = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, device=None)
    module = fit_with(tmp_path, growing_callback(), averages)
    averaged = dict(averages._average_model.named_parameters())
    assert kernels_of(module)
    assert growing.equal_states(averaged, dict(module.named_parameters()))


@pytest.mark.slow
def test_an_average_is_resumed_by_ckpt_path(tmp_path):
    """With the kernels in it: the resumed fit ends with the average of one that was not stopped."""

    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "ema.ckpt")

    whole = fit_with(tmp_path, growing_callback(), EMAWeightAveraging(decay=0.9), Saving())
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert any("_seeds" in name for name in saved["state_dict"])
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    callbacks = growing_callback(), EMAWeightAveraging(decay=0.9)
    resumed = fit_with(tmp_path, *callbacks, ckpt_path=tmp_path / "ema.ckpt")
    assert growing.equal_states(tensors_of(resumed), tensors_of(whole))


def test_a_checkpoint_is_tested_in_a_fresh_module(tmp_path):
    """``test(ckpt_path=)`` loads kernels too: the module is wrapped for every stage."""
    module = esper.wrap(Module())
    site = esper.layers(module)["net.0"]
    site.graft(0, "mlp-4x4-w32", alpha=1.0, example=growing.X[:4])
    saved = tmp_path / "model.ckpt"
    made = trainer(tmp_path, never())
    made.strategy.connect(module)
    made.save_checkpoint(saved)

    class Fresh(Module):
        def test_step(self, batch, batch_idx):
            self.seen.append(self(batch[0]))

    fresh = Fresh()
    trainer(tmp_path, never()).test(fresh, gate_loader(), ckpt_path=saved, verbose=False)
    with torch.no_grad():
        wanted = module.eval()(growing.GATE_X)
    assert torch.equal(torch.cat(fresh.seen), wanted)


def test_micro_batches_are_one_update(tmp_path):
    """Under ``accumulate_grad_batches`` updates are counted, and the loss is the batch's own."""
    callback = never()
    fit(tmp_path, callback, max_epochs=1, accumulate_grad_batches=3)
    assert callback.grower.updates == 10
    last = callback.grower.report().evaluations[-1]
    assert last.train_loss > 0.5  # a third of it would be less


def test_the_horizon_is_the_trainers(tmp_path):
    """It is what is left of the fit, in updates, and the owner's where one is given."""
    callback = EsperCallback(policy=esper.Never())
    fit(tmp_path, callback, max_epochs=2, limit_train_batches=5)
    assert callback.grower.report().settings["horizon"] == 10


def test_manual_optimization_needs_a_loss_of_its_own(tmp_path):
    """A ``training_step`` that steps is never called beside the training; updates are counted."""
    callback = never()
    fit(tmp_path, callback, Module(is_manual=True), max_epochs=1)
    assert callback.grower.updates == 30


def test_an_error_in_the_fit_closes_the_grower(tmp_path):
    """Hooks are gone after a crash, and the report says what ended the run."""
    callback = never()

    class Broken(Module):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, callback, Broken(), max_epochs=1)
    with pytest.raises(esper.GrowthError, match="closed"):
        callback.grower.step()


def test_ranks_that_growth_does_not_know_are_refused():
    """Whatever else shards or copies the module: each rank would grow by itself."""
    module = Module()
    ranks = SimpleNamespace(world_size=2, strategy=SimpleNamespace(model=module))
    with pytest.raises(ValueError, match='pass strategy="ddp"'):
        EsperCallback().on_train_start(ranks, module)


def test_manual_optimization_is_refused_under_ddp(monkeypatch):
    """A training_step that steps inside of DDP's forward would do so before gradients are equal."""
    module, model = Module(), DistributedDataParallel.__new__(DistributedDataParallel)
    module.automatic_optimization = False
    monkeypatch.setattr("esper.integrations.lightning.ranks_of", lambda _: object())
    ranks = SimpleNamespace(world_size=2, strategy=SimpleNamespace(model=model))
    with pytest.raises(ValueError, match="under manual optimization"):
        EsperCallback().on_train_start(ranks, module)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_kernels_that_would_not_come_back_are_refused(tmp_path, strategy):
    """Weights of such processes go into the module here, which would leave out kernels unseen."""
    callback, module = never(), Module()
    made = trainer(tmp_path, callback, strategy=strategy, devices=1)
    with pytest.raises(ValueError, match=r"call esper.wrap\(module\) before trainer.fit"):
        callback.setup(made, module, "fit")
    assert not esper.layers(module)
    callback.setup(made, module, "validate")  # brings nothing back


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
def test_a_module_that_was_wrapped_has_what_grew_in_another_process(tmp_path):
    """Under ddp_fork, as in a notebook: the weights that come back have their kernels."""
    module = esper.wrap(Module())
    fit(tmp_path, growing_callback(), module, strategy="ddp_fork", devices=1)
    assert kernels_of(module)


def test_an_unknown_option_is_refused_at_once():
    """Not when the training starts."""
    with pytest.raises(TypeError, match="did you mean horizon"):
        EsperCallback(horizn=3)


def test_without_lightning_the_extra_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "esper.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'esper-morph\[lightning\]'"):
        importlib.import_module("esper.integrations.lightning")


@pytest.mark.slow
def test_importing_esper_imports_no_framework():
    """Nobody pays for a framework that is not used, wrapping included."""
    frameworks = {"pytorch_lightning", "transformers", "accelerate"}
    code = f"import sys, esper; esper.wrap; sys.exit(bool({frameworks} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
