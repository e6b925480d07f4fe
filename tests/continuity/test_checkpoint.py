"""A run in one file: it goes on as if nobody had stopped it, or it is not loaded at all."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import resumed_runs
import safetensors.torch
import torch
from faulty_disk import Crash, FaultyDisk, ForgetfulDisk
from kernel_blueprints import mlp_blueprint
from resumed_runs import RUNS, UPDATES, WIDTH, Run, fresh, same, two_grafts
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import esper
from esper.continuity.checkpoint import read_checkpoint, write_checkpoint
from esper.contracts.lifecycle import SeedLifecycleState


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.esper"


def plain(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2))


def round_trip(path, value):
    esper.save_checkpoint(path, plain(), extra=value)
    return esper.load_checkpoint(path, plain())


# ---- a run goes on


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(path, name):
    """Bit by bit: weights, moments, averages, rates, scale and draws, for as many updates again."""
    run = RUNS[name]()
    run.save(path)
    expected = run.train(UPDATES).state()
    again = fresh(name)
    again.load(path)
    assert same(expected, again.train(UPDATES))


@pytest.mark.slow
def test_a_run_goes_on_in_another_process(tmp_path):
    """What it needs is in the file, and nothing of it was left in the process."""
    names = ["adamw", "scaled", "waking", "folded", "unfolded"]
    runs = {name: RUNS[name]() for name in names}
    for name, run in runs.items():
        run.save(tmp_path / f"{name}.esper")
        runs[name] = run.train(UPDATES).state()
    program = Path(resumed_runs.__file__)
    subprocess.run([sys.executable, program, tmp_path, *names], check=True, timeout=100)
    for name, run in runs.items():
        found = torch.load(tmp_path / f"{name}.resumed")
        assert list(found) == list(run), name
        assert all(torch.equal(found[key], value) for key, value in run.items()), name


def test_control_without_random_state_a_run_goes_another_way(path):
    """So that the comparison would notice a state that was left out."""
    run = two_grafts()
    run.save(path)
    expected = run.train(UPDATES).state()
    again = Run()
    before = torch.get_rng_state()
    again.load(path)
    torch.set_rng_state(before)
    found = again.train(UPDATES).state()
    assert not torch.equal(found["0.weight"], expected["0.weight"])


def test_saving_does_not_change_a_run(path):
    """A run that is saved at every update is one that is never saved."""
    expected = two_grafts().train(3).state()
    run = two_grafts()
    for _ in range(3):
        run.train(1).save(path)
    assert same(expected, run)


def test_a_run_that_went_on_can_go_back(path):
    """Into the objects that it has; kernels that came since are taken out again."""
    run = Run().train(2)
    run.graft(4, WIDTH)
    run.train(2).save(path)
    expected = copy.deepcopy(run.train(3).state())
    run.graft(0, 6)
    run.model[4].unload_kernel(0)
    run.train(2)
    run.load(path)
    assert same(expected, run.train(3))


def test_seeds_come_back_in_the_order_in_which_they_stand(path):
    """A norm of all gradients adds them up in the parameters' order."""
    torch.manual_seed(0)
    model = esper.wrap(plain(), num_seeds=2)
    for seed_idx in (1, 0):
        model[0].graft(seed_idx, mlp_blueprint(4), example=torch.randn(3, 4))
    esper.save_checkpoint(path, model)
    again = esper.wrap(plain(), num_seeds=2)
    esper.load_checkpoint(path, again)
    assert list(again.state_dict()) == list(model.state_dict())


def test_kernels_are_in_the_groups_that_they_had(path):
    """Also where the owner had chosen them by a function, which no file has."""

    def built():
        model = esper.wrap(plain())
        groups = [{"params": list(model[i].parameters()), "lr": 0.1 * (i + 1)} for i in (0, 2)]
        return model, torch.optim.SGD(groups)

    model, optimizer = built()
    model[0].graft(0, mlp_blueprint(4), example=torch.randn(3, 4))
    esper.sync_optimizer(model, optimizer, group_for=lambda _name, _parameter: 1)
    esper.save_checkpoint(path, model, optimizer)
    again, other = built()
    esper.load_checkpoint(path, again, other)
    kernel = {id(p) for p in again[0].seed_kernel(0).parameters()}
    assert kernel < {id(p) for p in other.param_groups[1]["params"]}


def test_several_optimizers_and_schedulers_come_back(path):
    """Each gets its own state."""

    def built():
        model = esper.wrap(plain())
        optimizers = [torch.optim.AdamW(model[i].parameters(), lr=0.1) for i in (0, 2)]
        return model, optimizers, [LambdaLR(each, lambda epoch: 0.9**epoch) for each in optimizers]

    def train(model, optimizers, schedulers):
        model.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        for each in (*optimizers, *schedulers):
            each.step()

    run = built()
    train(*run)
    run[0][0].graft(0, mlp_blueprint(4), example=torch.randn(3, 4))
    esper.sync_optimizer(run[0], run[1])
    train(*run)
    esper.save_checkpoint(path, run[0], run[1], scheduler=run[2])
    again = built()
    esper.load_checkpoint(path, again[0], again[1], scheduler=again[2])
    train(*again)
    found = again[0].state_dict()
    esper.load_checkpoint(path, run[0], run[1], scheduler=run[2])
    train(*run)
    assert all(torch.equal(found[name], value) for name, value in run[0].state_dict().items())


def test_what_is_known_of_seeds_comes_back(path):
    """Counters, faults and states; a kernel that is out of use with its weights."""
    model = esper.wrap(plain(), telemetry_enabled=True)
    model[0].graft(0, mlp_blueprint(4), example=torch.randn(3, 4), alpha=0.5)
    model(torch.randn(2, 4))
    kernel = copy.deepcopy(model[0].seed_kernel(0))
    model[0].state_layout.isolate(0)
    esper.maintain(model)
    esper.save_checkpoint(path, model)
    again = esper.wrap(plain(), telemetry_enabled=True)
    esper.load_checkpoint(path, again)
    layout = again[0].state_layout
    assert layout.state(0) == model[0].state_layout.state(0)
    assert again[0].forward_count == model[0].forward_count
    assert layout.num_transitions == model[0].state_layout.num_transitions
    found = again[0]._kasmina.seeds[0].slot.kernel.state_dict()
    assert all(torch.equal(found[name], value) for name, value in kernel.state_dict().items())


def test_a_graft_in_loading_is_dormant_afterwards(path):
    """Whoever loaded it is gone."""
    model = esper.wrap(plain())
    model[0].reserve(0)
    esper.save_checkpoint(path, model)
    again = esper.wrap(plain())
    esper.load_checkpoint(path, again)
    assert again[0].state_layout.state(0) == SeedLifecycleState.DORMANT


def test_an_average_that_follows_follows_on(path):
    """Also where it was made anew without a word to Esper."""
    run = two_grafts()
    run.save(path)
    again = Run()
    again.ema = AveragedModel(again.model)
    again.load(path)
    again.graft(4, WIDTH)
    assert again.ema.state_dict().keys() >= {f"module.{k}" for k in again.model.state_dict()}


# ---- models that are not wrapped


def test_a_plain_model_and_its_optimizer_can_be_saved(path):
    """Esper is not needed in a model for that."""
    model = plain()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).mean().backward()
    optimizer.step()
    esper.save_checkpoint(path, model, optimizer)
    again = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    other = torch.optim.Adam(again.parameters())
    esper.load_checkpoint(path, again, other)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(
        other.state[again[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"]
    )


def test_a_wrapped_model_without_kernels_loads_into_a_plain_one(path):
    """And the other way round."""
    model = esper.wrap(plain())
    esper.save_checkpoint(path, model)
    esper.load_checkpoint(path, plain())
    esper.save_checkpoint(path, plain())
    esper.load_checkpoint(path, model)


def test_kernels_in_a_plain_model_are_refused(path):
    """By the layer's name, with the cure."""
    model = esper.wrap(plain())
    model[2].graft(0, "mlp-4x2-w32", example=torch.randn(3, 4))
    esper.save_checkpoint(path, model)
    with pytest.raises(ValueError, match=r"kernel at layer '2' .* call esper.wrap on the model"):
        esper.load_checkpoint(path, plain())


def test_the_tensors_of_a_checkpoint_are_a_state_dict(path):
    """Anybody's safetensors reads them, and a wrapped model loads them, kernels and all."""
    model = esper.wrap(plain())
    model[0].graft(0, mlp_blueprint(4), example=torch.randn(3, 4))
    esper.save_checkpoint(path, model, extra={"more": torch.zeros(2)})
    found = safetensors.torch.load_file(path)
    weights = {k.removeprefix("model."): v for k, v in found.items() if k.startswith("model.")}
    again = esper.wrap(plain())
    again.load_state_dict(weights)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))


# ---- kernels by hand


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.by


class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return self.linear(x)


def by_hand(kernel):
    model = esper.wrap(plain())
    model[0].graft(0, kernel, example=torch.randn(3, 4), alpha=0.5)
    return model


def test_a_kernel_by_hand_is_built_by_its_class(path):
    """And gets its weights."""
    model = by_hand(Scale())
    esper.save_checkpoint(path, model, classes=[Scale])
    again = esper.wrap(plain())
    esper.load_checkpoint(path, again, classes=[Scale])
    assert torch.equal(again[0].seed_kernel(0).by, model[0].seed_kernel(0).by)
    assert again[0].alpha(0) == 0.5


def test_a_kernel_by_hand_that_needs_arguments_is_grafted_first(path):
    """Then it is that object which gets the weights; without it the load is refused."""
    model = by_hand(Sized(4))
    esper.save_checkpoint(path, model, classes=[Sized])
    with pytest.raises(ValueError, match=r"cannot be built without arguments .* graft one there"):
        esper.load_checkpoint(path, esper.wrap(plain()), classes=[Sized])
    kernel = Sized(4)
    esper.load_checkpoint(path, by_hand(kernel))
    assert torch.equal(kernel.linear.weight, model[0].seed_kernel(0).linear.weight)


def test_a_kernel_by_hand_is_refused_without_its_class(path):
    """On saving, where there is still something to save, and on loading."""
    model = by_hand(Scale())
    with pytest.raises(ValueError, match=r"seed 0 of layer '0' is a Scale .* classes=\[Scale\]"):
        esper.save_checkpoint(path, model)
    assert not path.exists()
    esper.save_checkpoint(path, model, classes=[Scale])
    with pytest.raises(ValueError, match=r"a .*:Scale written by hand: pass classes="):
        esper.load_checkpoint(path, esper.wrap(plain()))


def test_a_class_that_cannot_be_imported_is_refused(path):
    """A file has its name alone."""

    class Local(Scale):
        pass

    with pytest.raises(ValueError, match="cannot be imported by that name"):
        esper.save_checkpoint(path, by_hand(Local()), classes=[Local])


def test_a_graft_that_waits_is_refused(path):
    """It would be lost without a word."""
    model = esper.wrap(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), select=["0"])
    model[0].graft(0, Scale())
    with pytest.raises(ValueError, match="the graft at seed 0 of layer '0' waits for a call"):
        esper.save_checkpoint(path, model)


# ---- values


VALUES = {
    "numbers": [0, -1, 1 << 63, -(1 << 127), 0.1, -0.0, math.inf, -math.inf, 1j, True, None],
    "text": ["", "ä\n\0", b"", b"\x00\xff"],
    "nested": [(), [], {}, ((1,), [2, {"a": (3,)}])],
    "keys": {0: "a", "0": "b", (1, "k"): "c", 2.5: "d", None: "e", b"x": "f"},
    "kinds": [OrderedDict(b=1, a=2), Counter({4: 2}), torch.Size([1, 2]), torch.bfloat16],
    "device": torch.device("cpu"),
    "arrays": [np.arange(6).reshape(2, 3).astype(">i2"), np.array(["a", "bc"]), np.zeros((0, 3))],
    "scalars": [np.float32(0.1), np.int64(3), np.bool_(1)],
    "drawn": [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()],
}
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert_same(list(one), list(other))
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, (np.ndarray, np.generic)):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert repr(one) == repr(other)


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(path, name):
    """Types, those of keys too, their order, and every bit of a number."""
    assert_same(round_trip(path, VALUES[name]), VALUES[name])


def test_not_a_number_comes_back(path):
    """It is equal to nothing, itself included."""
    assert math.isnan(round_trip(path, {"loss": math.nan})["loss"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_as_they_were(path, dtype):
    """Of any dtype, without elements too, and where they are views of others."""
    whole = (torch.randn(4, 6) * 3).to(dtype)
    tensors = [whole, whole[1:3, ::2].t(), whole[0, 0], whole[:0]]
    for mine, theirs in zip(tensors, round_trip(path, tensors), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert (
            mine.contiguous().numpy(force=True).tobytes() == theirs.numpy().tobytes()
            if (dtype not in (torch.bfloat16, torch.float8_e4m3fn))
            else torch.equal(mine.float(), theirs.float())
        )


class Odd:
    """What no file can have."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: 0, r"extra.a.1 is a builtins.function.*a function is code"),
        (Odd(), r"extra.a.1 is a .*Odd.*take out of it"),
        ({1}, r"extra.a.1 is a builtins.set.*sorted\(value\)"),
        (nn.Parameter(torch.zeros(1)), r"extra.a.1 is a .*Parameter.*value.detach\(\)"),
        (torch.zeros(1, requires_grad=True), r"extra.a.1 is a tensor that requires a gradient"),
        (torch.zeros(1, device="meta"), "extra.a.1 is a tensor without data"),
        (torch.zeros(2, 2).to_sparse(), r"extra.a.1 is a tensor of layout .*to_dense"),
        (np.array([None]), r"extra.a.1 is an array of dtype object.*tolist"),
        ("\ud800", "extra.a.1 is no text that UTF-8 can write"),
        ({Odd: 1}, "extra.a.1: the key .* is a builtins.type"),
    ],
)
def test_what_cannot_be_written_is_refused(path, value, message):
    """By the way to it, before anything is written."""
    with pytest.raises(ValueError, match=message):
        esper.save_checkpoint(path, plain(), extra={"a": [0, value]})
    assert list(path.parent.iterdir()) == []


def test_a_value_in_itself_is_refused(path):
    """It would take a file without end."""
    value = []
    value.append(value)
    with pytest.raises(ValueError, match="nest 64 deep at most; is a value in itself"):
        esper.save_checkpoint(path, plain(), extra=value)


def test_a_function_in_a_schedulers_state_is_named(path):
    """An object whose attributes a LambdaLR saves may hold one."""

    class Rate:
        def __init__(self):
            self.curve = math.sqrt

        def __call__(self, epoch):
            return 1.0

    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"scheduler.states.0.lr_lambdas.0.curve is a .*function"):
        esper.save_checkpoint(path, model, optimizer, scheduler=LambdaLR(optimizer, Rate()))


# ---- a Grower


class Journal:
    """Stands in for a Grower: plain values out, the same in."""

    def __init__(self):
        self.kept = {"updates": 0}

    def state_dict(self):
        return dict(self.kept)

    def load_state_dict(self, state):
        if state["updates"] < 0:
            raise RuntimeError("a number of updates is at least 0")
        self.kept = state


def test_a_grower_gets_its_state_back(path):
    """Any nesting of plain values."""
    grower, again = Journal(), Journal()
    grower.kept = {"updates": 3, "losses": (0.5, np.float64(0.25)), 1: torch.ones(2)}
    esper.save_checkpoint(path, plain(), grower=grower)
    esper.load_checkpoint(path, plain(), grower=again)
    assert_same(again.kept, grower.kept)


# ---- all or nothing


def test_a_load_that_fails_late_changes_nothing(path):
    """Everything is put back: kernels, weights, moments, averages, rates and draws."""
    run = two_grafts()
    grower = Journal()
    grower.kept = {"updates": -1}
    run.save(path, grower=grower)
    again = Run().train(2)
    again.graft(4, WIDTH, seed_idx=1)
    again.train(2)
    before, kernel = copy.deepcopy(again.state()), again.model[4].seed_kernel(1)
    with pytest.raises(RuntimeError, match="at least 0"):
        again.load(path, grower=Journal())
    assert same(before, again)
    assert again.model[4].seed_kernel(1) is kernel
    expected = again.train(2).state()
    twin = Run().train(2)
    twin.graft(4, WIDTH, seed_idx=1)
    assert same(expected, twin.train(4))


MISFITS = {
    "model": (
        lambda run: {"model": esper.wrap(plain())},
        r"is of another model than the model: .* only the checkpoint has 1.bias, .* and 6 more",
    ),
    "dtype": (lambda run: {"model": run.model.double()}, r"was float32 .* and is float64"),
    "seeds": (
        lambda run: {"model": esper.wrap(resumed_runs.mlp(), num_seeds=1)},
        r"layer '0' of the model had 4 seeds and has 1 here: wrap the model with num_seeds=4",
    ),
    "no optimizer": (lambda run: {"optimizer": None}, "the state of optimizer, which is not given"),
    "no scheduler": (lambda run: {"scheduler": None}, "the state of scheduler, which is not given"),
    "no average": (lambda run: {"ema": None}, "the state of ema, which is not given"),
    "grower": (
        lambda run: {"grower": Journal()},
        "grower is given, and the checkpoint has nothing",
    ),
    "optimizer": (
        lambda run: {"optimizer": torch.optim.SGD(run.model.parameters())},
        "optimizer was AdamW when the checkpoint was saved, and is SGD here",
    ),
    "parameters": (
        lambda run: {"optimizer": torch.optim.AdamW(run.model[0].parameters())},
        r"group 0 of the optimizer trained other .* differs in 1.bias, 1.weight, 4.bias and 3 more",
    ),
    "groups": (
        lambda run: {
            "optimizer": torch.optim.AdamW([{"params": [p]} for p in run.model.parameters()])
        },
        "the optimizer had 1 param groups and has 8 here",
    ),
    "scaler": (
        lambda run: {"scaler": torch.amp.GradScaler("cpu")},
        "scaler was disabled when the checkpoint was saved, and is enabled here",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_before_anything_is_changed(path, name):
    """And the message says how the run was built."""
    two_grafts().save(path)
    run = Run()
    make, message = MISFITS[name]
    given = {"model": run.model, "optimizer": run.optimizer, **run.parts, **make(run)}
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=message):
        esper.load_checkpoint(path, **given)
    assert same(before, run)


# ---- files


def changed(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_changed_file_is_refused(path):
    """Wherever a bit is another: length, header, content or tensors."""
    esper.save_checkpoint(path, plain(), extra={"epoch": 3})
    data = path.read_bytes()
    for at in [*range(0, len(data), 211), len(data) - 1]:
        path.write_bytes(changed(data, at))
        with pytest.raises(ValueError, match=f"cannot load {path}: "):
            esper.load_checkpoint(path, plain())


def test_a_torn_file_is_refused(path):
    """Wherever it ends."""
    esper.save_checkpoint(path, plain())
    data = path.read_bytes()
    for end in [0, 5, 8, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"it is torn|it is no checkpoint|was changed"):
            esper.load_checkpoint(path, plain())


def test_a_file_of_another_kind_is_refused(path):
    """It is told from one that was damaged."""
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no checkpoint of Esper's"):
        esper.load_checkpoint(path, plain())


def test_a_newer_format_is_refused(path, monkeypatch):
    """With what to do about it."""
    with monkeypatch.context() as newer:
        newer.setattr("esper.contracts.checkpoint_format.CHECKPOINT_FORMAT_VERSION", 2)
        esper.save_checkpoint(path, plain())
    with pytest.raises(ValueError, match=r"its format 2 is newer than this Esper.*a newer Esper"):
        esper.load_checkpoint(path, plain())


def test_equal_runs_are_equal_files(tmp_path):
    """There is one spelling."""
    for name in ("one", "other"):
        two_grafts().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_missing_folder_is_named(tmp_path):
    """As the machine says it."""
    with pytest.raises(OSError, match="nowhere"):
        esper.save_checkpoint(tmp_path / "nowhere" / "run.esper", plain())


# ---- failures of the disk


@pytest.fixture
def old_and_new(tmp_path):
    """Return the content of two checkpoints, told apart by their extra."""
    for name in ("old", "new"):
        esper.save_checkpoint(tmp_path / name, plain(), extra=name)
    return [read_checkpoint(tmp_path / name) for name in ("old", "new")]


def prepared(tmp_path, old):
    folder = tmp_path / "runs"
    folder.mkdir(exist_ok=True)
    for each in folder.iterdir():
        each.unlink()
    write_checkpoint(FaultyDisk(), folder / "run.esper", old)
    return folder / "run.esper"


def num_calls(tmp_path, old, new):
    disk = FaultyDisk()
    disk.arm()
    write_checkpoint(disk, prepared(tmp_path, old), new)
    return disk.num_calls


@pytest.mark.slow
@pytest.mark.parametrize("way", ["before", "after", "torn", "crash", "torn crash"])
def test_a_failed_call_leaves_a_whole_checkpoint(tmp_path, old_and_new, way):
    """Whichever call to the machine fails, the old one is there, or all of the next."""
    found = []
    for point in range(num_calls(tmp_path, *old_and_new)):
        path = prepared(tmp_path, old_and_new[0])
        disk = FaultyDisk()
        disk.arm(point, way)
        with contextlib.suppress(OSError, Crash):
            write_checkpoint(disk, path, old_and_new[1])
        disk.disarm()
        disk.die()
        found.append(esper.load_checkpoint(path, plain()))
        assert len(list(path.parent.iterdir())) == 1 or "crash" in way
        esper.save_checkpoint(path, plain(), extra="next")
        assert esper.load_checkpoint(path, plain()) == "next"
        assert list(path.parent.iterdir()) == [path]
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def survivors(tmp_path, old_and_new, write):
    """Cut the power after every call, and return what was left each time."""
    path = prepared(tmp_path, old_and_new[0])
    memory, found, place = ForgetfulDisk(path.parent), [], tmp_path / "left"
    memory.note(path)

    def cut():
        for names_kept in (False, True):
            data = memory.left_in(path.parent, names_kept=names_kept).get(path.name)
            place.write_bytes(data or b"")
            try:
                found.append(esper.load_checkpoint(place, plain()))
            except ValueError:
                found.append("torn")

    write(FaultyDisk(memory, after_call=cut), path, old_and_new[1])
    return found


def test_a_checkpoint_survives_a_power_failure(tmp_path, old_and_new):
    """At any moment the old one or the new one is left, and once it was saved the new one."""
    found = survivors(tmp_path, old_and_new, write_checkpoint)
    assert set(found) == {"old", "new"}
    assert found[-2:] == ["new", "new"]


def unsynced(disk, path, content):
    """Write as one might who trusts the machine: no sync before the rename."""

    class Hasty:
        def __getattr__(self, name):
            return (lambda *_: None) if name == "sync" else getattr(disk, name)

    write_checkpoint(Hasty(), path, content)


def test_control_without_a_sync_a_power_failure_is_seen(tmp_path, old_and_new):
    """The judge finds a file that is not whole where the order is another."""
    assert "torn" in survivors(tmp_path, old_and_new, unsynced)


def test_a_device_that_is_not_there_is_told(path, caplog):
    """Its random state cannot go on; the rest is loaded."""
    esper.save_checkpoint(path, plain(), extra=1)
    content = read_checkpoint(path)
    content["random"]["devices"]["cuda:99"] = torch.zeros(16, dtype=torch.uint8)
    write_checkpoint(FaultyDisk(), path, content)
    with caplog.at_level(logging.WARNING, logger="esper"):
        assert esper.load_checkpoint(path, plain()) == 1
    assert "cuda:99: random numbers were drawn there" in caplog.text


@pytest.mark.parametrize("path", [None, 5, b"run.esper", ""])
@pytest.mark.parametrize("door", [esper.save_checkpoint, esper.load_checkpoint])
def test_a_path_that_names_no_file_is_refused_by_name(door, path):
    """What cannot be a file's name is refused as ``path``, with what was given."""
    with pytest.raises(
        (TypeError, ValueError),
        match=re.escape(f"path is the name of a file, a str or a Path; got {path!r}"),
    ):
        door(path, esper.wrap(nn.Sequential(nn.Linear(2, 2))))


@pytest.mark.parametrize(
    "classes", ["Linear", nn.Linear, [nn.Linear(2, 2)]], ids=["text", "class", "module"]
)
@pytest.mark.parametrize("door", [esper.save_checkpoint, esper.load_checkpoint])
def test_classes_that_are_none_are_refused_by_name(door, classes, tmp_path):
    """A name, one class alone and a module are refused as ``classes``."""
    with pytest.raises(TypeError, match="classes is a list of classes of modules"):
        door(tmp_path / "run.esper", esper.wrap(nn.Sequential(nn.Linear(2, 2))), classes=classes)
