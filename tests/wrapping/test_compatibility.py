"""docs/compatibility.md says what works with what, and each of its lines is so."""

import copy
import functools
import math
import operator
import pickle
import re
import types
import warnings
from pathlib import Path

import pytest
import sleepers
import torch
import torch.distributed.checkpoint as dcp
import torch.utils.checkpoint
from kernel_blueprints import mlp_blueprint
from torch import fx, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import esper

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (.+?) \| (works|told|refused) \|", PAGE, flags=re.MULTILINE))
CHECKS = {}


class Net(nn.Module):
    """A host with a convolution, a norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 6)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def check(line):
    """Register what is to be tried for a line of the page; it returns whether numbers held."""
    return lambda tried: CHECKS.setdefault(line, tried)


def grown(*, at=("conv", "norm", "head")):
    """Return a wrapped model in evaluation with kernels, an input, and its output."""
    torch.manual_seed(0)
    model, x = esper.wrap(Net()).eval(), torch.randn(2, 3, 5, 5)
    model.norm.running_var.fill_(4.0)
    kernels = {
        "conv": (nn.Conv2d(3, 4, 1), x),
        "norm": (nn.Conv2d(4, 4, 1), torch.randn(2, 4, 5, 5)),
        "head": (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6)), torch.randn(2, 4)),
    }
    for name in at:
        kernel, example = kernels[name]
        model.get_submodule(name).graft(0, kernel, alpha=0.5, example=example)
    return model, x, model(x)


def of_blueprints():
    """Return a model whose kernels can be built from what is saved, an input and its output."""
    torch.manual_seed(0)
    model, x = (
        esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        torch.ones(2, 6),
    )
    model[0].graft(0, mlp_blueprint(6), alpha=0.5, example=x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, x, model(x)


def is_same(model, x, y, tolerance=1e-5):
    return torch.allclose(model(x).to(y.dtype), y, atol=tolerance)


@check("`copy.deepcopy`")
def _(tmp_path):
    model, x, y = grown()
    copied = copy.deepcopy(model)
    model.head.set_alpha(0, 0.25)
    return is_same(copied, x, y)


@check("`copy.copy` of a layer")
def _(tmp_path):
    model, _, _ = grown()
    x = torch.randn(2, 4)
    y, copied = model.head(x), copy.copy(model.head)
    held = torch.equal(copied(x), y) and copied.weight is model.head.weight
    copied.set_alpha(0, 1.0)
    copied.graft(1, nn.Linear(4, 6), alpha=0.5, example=x)
    copied.unload_kernel(0)
    is_alone = model.head.alpha(0) == 0.5 and model.head.seed_kernel(1) is None
    return held and is_alone and torch.equal(model.head(x), y)


@check("`pickle`")
def _(tmp_path):
    model, x, y = grown()
    return is_same(pickle.loads(pickle.dumps(model)), x, y)


@check("`.to`, `.half()`, `.double()`")
def _(tmp_path):
    model, x, y = grown()
    is_held = is_same(model.double(), x.double(), y)
    model.half()
    return is_held and is_same(model.float(), x, y, 1e-2) and model.head.alpha(0) == 0.5


@check('`.to("meta")`, `to_empty`')
def _(tmp_path):
    model, x, y = grown()
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    is_kept = model.head.alpha(0) == 0.5
    model.load_state_dict(state)
    return is_kept and is_same(model, x, y)


@check("`share_memory`")
def _(tmp_path):
    model, x, y = grown()
    model.share_memory()
    return all(t.is_shared() for t in model.state_dict().values()) and is_same(model, x, y)


@check("`load_state_dict`")
def _(tmp_path):
    model, x, y = of_blueprints()
    loaded = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    loaded.load_state_dict(model.state_dict())
    return is_same(loaded, x, y)


@check("`load_state_dict(assign=True)`")
def _(tmp_path):
    model, x, y = of_blueprints()
    loaded = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))).eval()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return is_same(loaded, x, y) and not esper.maintain(loaded).faults


@check("`torch.distributed.checkpoint`, the same grafts")
def _(tmp_path):
    model, x, y = of_blueprints()
    loaded = copy.deepcopy(model)
    loaded[0].set_alpha(0, 0.0)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    dcp.load({"model": loaded.state_dict()}, checkpoint_id=tmp_path)
    return is_same(loaded, x, y) and loaded[0].alpha(0) == 0.5


@check("`torch.distributed.checkpoint`, no grafts")
def _(tmp_path):
    model, x, y = of_blueprints()
    trained_by = torch.optim.AdamW(model.parameters())
    esper.sync_optimizer(model, trained_by)
    state = get_state_dict(model, trained_by)
    dcp.save(dict(zip(("model", "optim"), state, strict=True)), checkpoint_id=tmp_path)
    loaded = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    optimizer, recipe = torch.optim.AdamW(loaded.parameters()), {}
    exec(PAGE.split("```python\n")[1].split("```")[0], recipe)
    recipe["load_grown"](loaded, optimizer, tmp_path)
    return is_same(loaded, x, y) and len(optimizer.state) == len(list(loaded.parameters()))


@check("`AveragedModel` made after growth")
def _(tmp_path):
    model, x, _ = grown()
    average = AveragedModel(model, use_buffers=True, avg_fn=lambda old, now, n: now)
    model.head.set_alpha(0, 1.0)
    average.update_parameters(model)
    average.update_parameters(model)
    return is_same(average, x, model(x))


@check("writes to the alpha buffer")
def _(tmp_path):
    model, x, y = grown(at=("head",))
    model.head.set_alpha(0, 0.0)
    model.get_buffer("head._seeds.0.alpha").fill_(0.5)
    return is_same(model, x, y) and model.head.alpha(0) == 0.5


@check("setting attributes of a layer")
def _(tmp_path):
    model, x, y = grown(at=("norm",))
    model.norm.eps = 1.0
    return not is_same(model, x, y) and model.norm.default_layer.eps == 1.0


@check("`torch.func.functional_call`")
def _(tmp_path):
    model, x, y = grown()
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return torch.equal(torch.func.functional_call(model, tensors, (x,)), y)


@check("`torch.compile`")
def _(tmp_path):
    model, x, y = grown()
    return is_same(torch.compile(model, backend="eager"), x, y)


@check("`torch.export`")
def _(tmp_path):
    model, x, y = grown()
    return is_same(torch.export.export(model, (x,)).module(), x, y)


@check("`torch.fx.symbolic_trace`")
def _(tmp_path):
    model, x, y = grown()
    traced = fx.symbolic_trace(model)
    model.head.set_alpha(0, 0.25)
    return torch.equal(traced(x), model(x)) and not is_same(traced, x, y)


@check("`torch.jit.trace`")
def _(tmp_path):
    model, x, y = grown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: it is old, and what it finds
        plain = torch.jit.trace(esper.unwrap(copy.deepcopy(model)), x)
        if not is_same(plain, x, y):
            return "wrong"
        return torch.jit.trace(model, x)


@check("`parametrize`, `weight_norm`, `spectral_norm`")
def _(tmp_path):
    model, x, y = grown()
    parametrizations.weight_norm(model.conv)
    is_held = is_same(model, x, y)
    parametrizations.spectral_norm(model.head)
    return is_held and model.head.alpha(0) == 0.5 and not esper.maintain(model).faults


@check("`prune`")
def _(tmp_path):
    model, x, _ = grown()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    prune.remove(model.head, "weight")
    with torch.no_grad():
        features = torch.relu(model.norm(model.conv(x))).mean((2, 3))
        expected = model.head.default_layer(features) + 0.5 * model.head.seed_kernel(0)(features)
    return is_same(model, x, expected)


@check("`convert_sync_batchnorm`")
def _(tmp_path):
    model, x, y = grown()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    is_held = isinstance(model.norm, nn.SyncBatchNorm) and is_same(model, x, y)
    plain = esper.unwrap(model)
    return is_held and is_same(plain, x, y) and not _of_esper(plain)


@check("a layer of the same kind in its place")
def _(tmp_path):
    model, x, y = grown()
    taken = nn.Linear(4, 6)
    taken.load_state_dict({k: model.head.state_dict()[k] for k in ("weight", "bias")})
    model.head = taken
    return is_same(model, x, y) and list(esper.layers(model)) == ["conv", "norm", "head"]


@check("another kind of layer in its place")
def _(tmp_path):
    model, x, _ = grown()
    model.head = nn.Sequential(nn.Linear(4, 6))
    return _is_told(model, "head", x)


@check("`resize_token_embeddings`")
def _(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    model = esper.wrap(transformers.GPT2LMHeadModel(config).eval(), select="lm_head")
    model.lm_head.graft(0, nn.Linear(8, 20), alpha=0.5, example=torch.randn(2, 4, 8))
    model.resize_token_embeddings(24)
    return _is_told(model, "lm_head", torch.zeros(2, 4, dtype=torch.int64))


@check("`layer.forward = ...`")
def _(tmp_path):
    model, x, _ = grown()
    model.head.forward = types.MethodType(nn.Linear.forward, model.head)
    is_told = _is_told(model, "head", x, unwraps=False)
    del model.head.forward
    return is_told if not esper.maintain(model).faults else None


@check("accelerate's hooks after a graft")
def _(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x, y = grown()
    hooks.add_hook_to_module(model.head, hooks.ModelHook())
    return is_same(model, x, y) and not esper.maintain(model).faults


@check("`fuse_conv_bn_eval`")
def _(tmp_path):
    model, x, _ = grown(at=("conv",))
    model.conv = nn.utils.fuse_conv_bn_eval(model.conv, model.norm)
    model.norm = nn.Identity()
    return _is_told(model, "conv", x)


@check("`fuse_modules`")
def _(tmp_path):
    model, _, _ = grown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: it has moved
        torch.ao.quantization.fuse_modules(model, [["conv", "norm"]])


@check("`quantize_dynamic`")
def _(tmp_path):
    model, x, y = grown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: it has moved
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        plain = torch.ao.quantization.quantize_dynamic(esper.unwrap(model), {nn.Linear})
    is_held = is_same(quantised, x, y, 0.1) and not esper.maintain(quantised).faults
    return is_held and is_same(plain, x, y, 0.1)


def _with_adapters(targets):
    peft = pytest.importorskip("peft")
    model, x, y = grown()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    ).eval()
    is_changed = not is_same(adapted, x, y)
    with adapted.disable_adapter():
        return is_changed and is_same(adapted, x, y) and not esper.maintain(model).faults


@check("PEFT, targets by name")
def _(tmp_path):
    return _with_adapters(["head"])


@check("PEFT, `all-linear`")
def _(tmp_path):
    return _with_adapters("all-linear")


@check("`torch.nn.DataParallel`")
def _(tmp_path):
    model, _, _ = grown()
    for module in model.modules():
        module._replicate_for_data_parallel()


def shallow():
    """Return a model of which blocks sleep, its optimizer and an input."""
    model = sleepers.made("list", 3)
    esper.shallow(model, "blocks", depth=1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 4)


def woken(model, optimizer, x, ramp_updates=1):
    esper.deepen(model, optimizer, depth=3, ramp_updates=ramp_updates)
    for _ in range(ramp_updates):
        sleepers.update(model, optimizer, x)
    return not esper.asleep(model) and type(model.blocks[1]) is sleepers.Residual


@check("blocks that sleep: `copy.deepcopy`, `pickle`")
def _(tmp_path):
    model, _, x = shallow()
    model.call = operator.call
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    same = [esper.asleep(c) == esper.asleep(model) for c in copies]
    wakes = [woken(c, torch.optim.SGD(c.parameters(), lr=0.1), x) for c in copies]
    return all((*same, *wakes, len(esper.asleep(model)) == 2))


@check("blocks that sleep: `load_state_dict`")
def _(tmp_path):
    model, _, x = shallow()
    whole, y = sleepers.made("list", 3), model.eval()(x)
    whole.load_state_dict(model.state_dict())
    model.load_state_dict(whole.state_dict())
    return torch.equal(model(x), y)


@check("blocks that sleep: `AveragedModel`")
def _(tmp_path):
    model, optimizer, x = shallow()
    average = esper.follow(model, AveragedModel(model))
    is_woken = woken(model, optimizer, x)
    average.update_parameters(model)
    return is_woken and not esper.asleep(average)


@check("blocks that sleep: `torch.compile`")
def _(tmp_path):
    torch.compiler.reset()
    model, optimizer, x = shallow()
    fast = torch.compile(model.eval(), backend="eager", fullgraph=True)
    held = is_same(fast, x, model(x))
    return held and woken(model, optimizer, x) and is_same(fast, x, model(x))


@check("blocks that sleep: checkpointing of each")
def _(tmp_path):
    model, optimizer, x = shallow()
    checkpoint = torch.utils.checkpoint.checkpoint
    model.call = functools.partial(checkpoint, use_reentrant=True)
    is_woken = woken(model, optimizer, x, ramp_updates=2)
    model.call = functools.partial(checkpoint, use_reentrant=False)
    return is_woken and math.isfinite(sleepers.update(model, optimizer, x).detach())


@check("blocks that sleep: `fully_shard` of one")
def _(tmp_path):
    model, _, _ = shallow()
    type("FSDPBlock", (torch.distributed.fsdp.FSDPModule, type(model.blocks[1])), {})


@check("blocks that sleep: `parametrize` of one")
def _(tmp_path):
    model, optimizer, x = shallow()
    model.blocks[1].scale = nn.Parameter(torch.ones(1))
    parametrizations.parametrize.register_parametrization(model.blocks[1], "scale", nn.Identity())
    woken(model, optimizer, x)


@check("blocks that sleep: `esper.wrap` of one")
def _(tmp_path):
    model, _, _ = shallow()
    esper.wrap(model, select="blocks.1")


@check("blocks that sleep: `esper.export`")
def _(tmp_path):
    model, _, _ = shallow()
    esper.export(model, tmp_path)


def _of_esper(model):
    return [m for m in model.modules() if type(m).__module__.partition(".")[0] == "esper"]


def _is_told(model, layer, x, *, unwraps=True):
    """Say whether a loss is named by maintain, and what is left runs, wrapped and unwrapped."""
    model(x)
    named = {fault.layer for fault in esper.maintain(model).faults}
    if unwraps:
        plain = esper.unwrap(copy.deepcopy(model))
        plain(x)
        assert not _of_esper(plain)
    return "told" if named == {layer} else None


def test_the_page_has_a_line_for_each_check_and_no_other():
    """Nothing is claimed that is not tried."""
    assert list(ROWS) == list(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("line", ROWS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_is_as_the_page_says(line, tmp_path):
    """What the page says works, is told or is refused."""
    try:
        outcome = CHECKS[line](tmp_path)
    except Exception:
        if ROWS[line] != "refused":
            raise
        return
    assert {True: "works"}.get(outcome, outcome) == ROWS[line]
