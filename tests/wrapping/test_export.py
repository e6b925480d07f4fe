"""A grown model as readable code and one file of weights."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from wrapping_grown import blueprint, grown_mlp, load_grafts
from wrapping_models import Bottleneck, Mlp, Stack

import esper
from esper.state.layer_call import LayerCall

FRESH_PROCESS = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from safetensors.torch import load_file
from grafts import build
from wrapping_models import Mlp
model = build(Mlp()).eval()
model.load_state_dict(load_file(sys.argv[1] + "/model.safetensors"))
x, expected = torch.load(sys.argv[1] + "/batch.pt")
difference = (model(x) - expected).abs().max() / expected.abs().max()
assert difference <= 1e-6, difference
assert not any(name.partition(".")[0] == "esper" for name in sys.modules)
"""


def rebuild(folder, host):
    model = load_grafts(folder).build(host).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.mark.slow
def test_a_fresh_process_without_esper_predicts_the_same(tmp_path):
    """The code and the weights are enough: esper is never imported."""
    model = grown_mlp()
    x = torch.randn(5, 6)
    esper.export(model, tmp_path)
    torch.save((x, model(x).detach()), tmp_path / "batch.pt")

    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path, Path(__file__).parents[1] / "support"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})

    assert done.stderr == ""


def test_the_model_itself_is_not_changed(tmp_path):
    """Exporting leaves a wrapped model wrapped, with the same parameters and numbers."""
    model = grown_mlp()
    x = torch.randn(5, 6)
    expected, parameters = model(x), list(model.parameters())

    assert esper.export(model, tmp_path / "out") == tmp_path / "out"

    assert len(esper.layers(model)) == 2
    assert torch.equal(model(x), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_the_rebuilt_model_is_equal_bit_for_bit(tmp_path):
    """A fresh host, the generated code and the weights give the very predictions."""
    model = grown_mlp()
    x = torch.randn(5, 6)

    esper.export(model, tmp_path)

    assert torch.equal(rebuild(tmp_path, Mlp())(x), model(x))


def test_an_unwrapped_model_is_exported_the_same(tmp_path):
    """Unwrap before export gives the same weights under the same names."""
    model = grown_mlp()
    x = torch.randn(5, 6)
    expected = model(x)
    esper.export(model, tmp_path / "wrapped")
    esper.export(esper.unwrap(model), tmp_path / "plain")

    assert torch.equal(rebuild(tmp_path / "plain", Mlp())(x), expected)
    files = [tmp_path / name / "model.safetensors" for name in ("wrapped", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    """Two exports are equal, file by file, and there is nothing else in the folder."""
    for name in ("a", "b"):
        esper.export(grown_mlp(), tmp_path / name)

    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["grafts.py", "model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_code_imports_torch_only(tmp_path):
    """Every import of the generated file is of torch."""
    esper.export(grown_mlp(), tmp_path)

    tree = ast.parse((tmp_path / "grafts.py").read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert imported == {"torch"}


def written(folder):
    """Return what a person would have written, and what makes it answer as its hosts."""
    code, between, answering = (folder / "grafts.py").read_text().partition("\n\n\nclass StandIn")
    return f"{code}\n", between + answering


def test_the_code_reads_as_if_written_by_hand(tmp_path):
    """A kernel is a class with named layers and a straight forward; the whole file, as it is."""
    torch.manual_seed(0)
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, blueprint(6, "gelu", out=8), alpha=0.5, example=torch.randn(4, 6))

    esper.export(model, tmp_path)

    code, answering = written(tmp_path)
    assert code == EXPECTED
    assert "its ``host`` answers" in answering


EXPECTED = '''\
"""What was grown into `Mlp`, as plain PyTorch.

    model = build(Mlp())
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

`build` takes a fresh `Mlp` of `wrapping_models`.
Its modules are those of HOST, which `build` checks.
"""

from torch import nn


class Mlp6(nn.Module):
    """A grown kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 4)
        self.bend = nn.GELU()
        self.up = nn.Linear(4, 8)
        self.drop = nn.Dropout()

    def forward(self, x):
        down = self.down(x)
        bend = self.bend(down)
        up = self.up(bend)
        return self.drop(up)


class GraftedLinear(nn.Module):
    """A Linear and what was grown beside it."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.seed_0 = Mlp6()

    def forward(self, input):
        h = self.host(input)
        k_0 = self.seed_0(input)
        return h + 0.5 * k_0


GRAFTS = {
    "fc1": GraftedLinear,
}

HOST = {
    "": "Mlp",
    "fc1": "Linear, weight [8, 6], bias [8]",
    "drop": "Dropout",
    "fc2": "Linear, weight [3, 8], bias [3]",
}


def build(host: nn.Module) -> nn.Module:
    """Turn a fresh `Mlp` into the grown one, in place; its weights are loaded afterwards.

    Raises:
        ValueError: The host is not of the class and size that this was grown in.
    """
    modules = dict(host.named_modules(remove_duplicate=False))
    check(host, modules)
    for name, graft in GRAFTS.items():
        site = modules[name]
        device = next((tensor.device for tensor in site.parameters()), None)
        grafted = standing_for(graft, site)(site).to(device).train(site.training)
        for alias, module in modules.items():
            if module is site and alias:
                parent, _, child = alias.rpartition(".")
                setattr(modules[parent], child, grafted)
            elif module is site:
                host = grafted
    return host


def check(host: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Refuse a host that is not made of the modules in HOST, before anything is changed."""
    missing = [name for name in {**GRAFTS, **HOST} if name not in modules]
    if missing:
        raise ValueError(f"{type(host).__name__} has no module {', '.join(map(repr, missing))}")
    gone = [name for name in GRAFTS if name not in HOST]
    for name, module in host.named_modules():
        if any(name == site or name.startswith(f"{site}.") or not site for site in gone):
            continue
        shapes = [f"{key} {list(p.shape)}" for key, p in module.named_parameters(recurse=False)]
        found = ", ".join([type(module).__name__, *shapes])
        wanted = HOST.get(name, "no module")
        if found != wanted:
            where = f"module {name!r} of the host" if name else "the host"
            raise ValueError(f"{where} is expected to be {wanted}, found {found}")
'''


def test_equal_kernels_share_a_class(tmp_path):
    """Two sites with the same kernel graph use one kernel class and one class of site."""
    model = esper.wrap(Stack(), select="**.fc").eval()
    for block in model.blocks:
        block.fc.graft(0, blueprint(6), alpha=1.0, example=torch.randn(2, 6))

    esper.export(model, tmp_path)

    text, _ = written(tmp_path)
    assert text.count("\nclass ") == 2
    assert list(load_grafts(tmp_path).GRAFTS) == ["blocks.0.fc", "blocks.1.fc"]


def test_build_names_the_module_that_a_host_lacks(tmp_path):
    """A host of another shape is refused before anything is changed."""
    esper.export(grown_mlp(), tmp_path)
    other = nn.Sequential(nn.Linear(6, 8))

    with pytest.raises(ValueError, match="Sequential has no module 'fc1', 'fc2'"):
        load_grafts(tmp_path).build(other)
    assert type(other[0]) is nn.Linear


class Sized(nn.Module):
    """A host with arguments, of which some are attributes and one has its default."""

    def __init__(self, width, depth=2, *, act=nn.ReLU, rate=0.5):
        super().__init__()
        self.width, self.depth = width, depth
        self.drop = nn.Dropout(rate)
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.act, self.scale = act(), nn.Parameter(torch.ones(width))

    def forward(self, x, scale=None):
        for part in self.parts:
            x = self.act(part(x))
        return x * self.scale if scale is None else x * scale


def exported_sized(folder, **options):
    torch.manual_seed(0)
    model = esper.wrap(Sized(6, 3)).eval()
    model.parts[0].graft(0, blueprint(6), alpha=0.5, example=torch.randn(2, 6))
    esper.export(model, folder, **options)
    return model


def test_the_code_says_which_host_it_wants(tmp_path):
    """Class, arguments as far as they can be read off, and the input that it is called with."""
    example = LayerCall((torch.empty(3, 6, device="meta"),), {"scale": torch.zeros(1, 6)})
    model = exported_sized(tmp_path, example=example)
    text = (tmp_path / "grafts.py").read_text()
    assert "model = build(Sized(width=6, depth=3))" in text
    assert f"a fresh `Sized` of `{Sized.__module__}`" in text
    assert "It is called with [N, 6] float32, scale=[N, 6] float32." in text
    x = torch.randn(3, 6)
    assert torch.equal(rebuild(tmp_path, Sized(width=6, depth=3))(x), model(x))


class Other(Sized):
    """Another class of the same parts."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Sized(5, 3),
            r"expected to be Sized, scale \[6\], found Sized, scale \[5",
        ),
        (lambda: Sized(6, 2), "Sized has no module 'parts.2'"),
        (lambda: Sized(6, 4), "'parts.3' of the host is expected to be no module, found Linear"),
        (lambda: Sized(6, 3, act=nn.GELU), "'act' of the host is expected to be ReLU, found GELU"),
        (lambda: Other(6, 3), "the host is expected to be Sized, .*found Other"),
    ],
)
def test_another_host_is_refused_with_what_was_expected(tmp_path, make, words):
    """Another width, depth, activation or class is named, and nothing has changed."""
    exported_sized(tmp_path)
    host = make()
    before = [(name, id(module)) for name, module in host.named_modules()]
    with pytest.raises(ValueError, match=words):
        load_grafts(tmp_path).build(host)
    assert [(name, id(module)) for name, module in host.named_modules()] == before


def test_a_layer_that_a_kernel_has_replaced_is_asked_of_a_host_too(tmp_path):
    """It is not called, and still there to be asked, as for its width."""
    torch.manual_seed(0)
    model = esper.wrap(Sized(6, 2)).eval()
    kernel = Bottleneck(6)
    model.parts[1].graft(0, kernel, alpha=1.0, mode="replace", example=torch.randn(2, 6))
    esper.export(model, tmp_path)
    host, x = Sized(6, 2), torch.randn(3, 6)
    assert torch.equal(rebuild(tmp_path, host)(x), model(x))
    host = Sized(6, 2)
    host.parts[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"'parts.1' of the host is expected to be Linear"):
        rebuild(tmp_path, host)


def test_sites_inside_sites_keep_the_host_s_names(tmp_path):
    """The table names modules as a fresh host has them, also inside a grafted block."""
    torch.manual_seed(0)
    model = esper.wrap(Stack(), select=["blocks.0", "blocks.0.fc"]).eval()
    model.blocks[0].graft(0, Bottleneck(6), alpha=1.0, example=torch.randn(2, 6))
    model.blocks[0].fc.graft(0, Bottleneck(6), alpha=1.0, example=torch.randn(2, 6))
    x = torch.randn(3, 6)

    esper.export(model, tmp_path)

    assert list(load_grafts(tmp_path).GRAFTS) == ["blocks.0", "blocks.0.fc"]
    assert torch.equal(rebuild(tmp_path, Stack())(x), model(x))


def test_shared_and_root_sites_are_rebuilt(tmp_path):
    """A module under two names is grafted under both; a root comes back as the return value."""
    torch.manual_seed(0)

    def make():
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model, root = esper.wrap(make()).eval(), esper.wrap(nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    model[0].graft(0, Bottleneck(4), alpha=1.0, example=x)
    root.graft(0, Bottleneck(4), alpha=1.0, mode="replace", example=x)
    esper.export(model, tmp_path / "shared")
    esper.export(root, tmp_path / "root")

    rebuilt = rebuild(tmp_path / "shared", make())
    assert rebuilt[0] is rebuilt[2]
    assert torch.equal(rebuilt(x), model(x))
    assert torch.equal(rebuild(tmp_path / "root", nn.Linear(4, 4))(x), root(x))


def test_grafts_in_a_transformer_are_not_bypassed(tmp_path):
    """The rebuilt encoder does not take the fused path that reads its children's weights."""
    torch.manual_seed(0)

    def make():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    model = esper.wrap(make()).eval()
    model.layers[0].linear1.graft(0, Bottleneck(8, 16), alpha=1.0, example=torch.randn(2, 3, 8))
    x = torch.randn(2, 3, 8)
    esper.export(model, tmp_path)

    with torch.no_grad():
        assert torch.equal(rebuild(tmp_path, make())(x), model(x))


def test_frozen_parameters_and_dtypes_are_rebuilt(tmp_path):
    """What is frozen in a kernel is frozen in the rebuilt one, in float64 where it was."""
    model = esper.wrap(Mlp().double())
    kernel = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 8)).double()
    kernel[0].requires_grad_(False)
    model.fc1.graft(0, kernel, alpha=1.0, example=torch.randn(2, 6, dtype=torch.float64))

    esper.export(model, tmp_path)

    rebuilt = rebuild(tmp_path, Mlp().double())
    flags = {name: p.requires_grad for name, p in rebuilt.fc1.seed_0.named_parameters()}
    assert flags == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}
    assert rebuilt.fc1.seed_0[0].weight.dtype == torch.float64


def test_tied_weights_are_written_for_each_name(tmp_path):
    """Tensors that share memory, which safetensors refuses, are written out under both names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    esper.wrap(model)

    esper.export(model, tmp_path)

    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["0.weight"], stored["1.weight"])


def test_a_kernel_that_acts_otherwise_in_training_is_refused(tmp_path):
    """A module by hand that looks at self.training cannot be written down; nothing is written."""

    class Moody(Bottleneck):
        def forward(self, x):
            return super().forward(x) * (2.0 if self.training else 1.0)

    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, Moody(6, 8), alpha=1.0, example=torch.randn(2, 6))

    with pytest.raises(ValueError, match="other things in training"):
        esper.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kernel_that_branches_on_its_data_is_refused(tmp_path):
    """A module by hand whose forward cannot be traced is named, with the cure."""

    class Branching(Bottleneck):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(x) * 2

    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, Branching(6, 8), alpha=1.0, example=torch.randn(2, 6))

    with pytest.raises(ValueError, match=r"'fc1\.seed_0' \(Branching\).*BlueprintIR"):
        esper.export(model, tmp_path / "out")


def test_a_model_that_has_grown_nothing_is_exported_too(tmp_path):
    """A dormant model has an empty table of grafts and its own weights."""
    model = esper.wrap(Mlp()).eval()
    x = torch.randn(2, 6)

    esper.export(model, tmp_path)

    assert load_grafts(tmp_path).GRAFTS == {}
    assert torch.equal(rebuild(tmp_path, Mlp())(x), model(x))


def test_a_folder_that_is_no_name_is_refused():
    """What cannot be a folder's name is refused as ``folder``, before the model is copied."""
    with pytest.raises(TypeError, match=r"folder is the name of a folder, a str or a Path; got 5"):
        esper.export(esper.wrap(nn.Sequential(nn.Linear(2, 2))), 5)
