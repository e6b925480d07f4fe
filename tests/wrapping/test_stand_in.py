"""What stands in a host's place after unwrap answers as the host."""

import abc
import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem_hosts import HOSTS, graft, result, wrapped
from safetensors.torch import load_file
from torch import fx, nn
from torch.nn import functional as F
from wrapping_grown import load_grafts

import esper


def bend(n_in=4, n_out=4):
    return nn.Sequential(nn.Linear(n_in, 3), nn.Tanh(), nn.Linear(3, n_out))


class Bent(nn.Module):
    """A strided convolution that no weight of another can stand for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, stride=2)

    def forward(self, x):
        return torch.tanh(self.conv(x))


class ReadsDtype(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x):
        return self.site(x.to(self.site.weight.dtype))


class ReadsStride(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Conv1d(4, 4, 3, stride=2)

    def forward(self, x):
        return self.site(x)[..., : x.shape[-1] // self.site.stride[0]]


class ReadsWeight(nn.Module):
    """Uses the weights themselves, as tied heads do."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.site(x), self.site.weight.t(), self.site.bias)


class AsksForItsClass(nn.Module):
    """Calls its items by what they are, as diffusion models do."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x):
        return self.site(x) if isinstance(self.site, nn.Linear) else x


class Scaled(nn.Module):
    """A block with a state and methods of its own."""

    gain = 2.0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.num_calls = 0

    @property
    def width(self):
        return self.fc.out_features

    @staticmethod
    def halved(x):
        return x / 2

    def forward(self, x):
        return self.gain * self.fc(x)

    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def embed(self, x):
        self.num_calls += 1
        return self(self.halved(x)) + self.width


class Deeper(Scaled):
    def embed(self, x):
        return super().embed(x) + 1.0


class CallsMethods(nn.Module):
    def __init__(self, block=Scaled):
        super().__init__()
        self.site = block()

    def forward(self, x):
        return self.site.embed(x) + self.site.fc.weight.sum()


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x):
        return self.site.forward(x)


class WritesState(nn.Module):
    """Keeps a state in its layer, as caches do."""

    def __init__(self):
        super().__init__()
        self.site = Scaled()

    def forward(self, x):
        self.site.num_calls = self.site.num_calls + 1
        return self.site(x)


class WalksThrough(nn.Module):
    """Reads the items of a sequence that it also calls."""

    def __init__(self):
        super().__init__()
        self.site = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        assert len(list(self.site)) == len(self.site) == 2
        assert isinstance(self.site[-1], nn.Tanh)
        return self.site(x) + self.site[0].weight.sum()


VECTORS = lambda: torch.randn(3, 4)  # noqa: E731 - one line each
MODELS = {
    "dtype": (ReadsDtype, VECTORS, bend),
    "stride": (ReadsStride, lambda: torch.randn(2, 4, 9), Bent),
    "weight": (ReadsWeight, VECTORS, bend),
    "class": (AsksForItsClass, VECTORS, bend),
    "method": (CallsMethods, VECTORS, bend),
    "inherited method": (lambda: CallsMethods(Deeper), VECTORS, bend),
    "forward": (CallsForward, VECTORS, bend),
    "state": (WritesState, VECTORS, bend),
    "items": (WalksThrough, VECTORS, bend),
}


def grown(name, **options):
    """Return a wrapped model with a kernel at its site, an input, and its output for that."""
    make_model, make_input, make_kernel = MODELS[name]
    torch.manual_seed(0)
    model, x = esper.wrap(make_model().eval(), select="site"), make_input()
    options = {"alpha": 0.5} | options
    example = torch.randn(2, 4, 9) if name == "stride" else torch.randn(2, 4)
    model.site.graft(0, make_kernel(), example=example, **options)
    return model, x, model(x)


@pytest.mark.parametrize("options", [{}, {"mode": "replace"}, {"mode": "replace", "alpha": 1.0}])
@pytest.mark.parametrize("name", MODELS)
def test_an_owner_that_asks_its_layer_runs_unwrapped(name, options):
    """What it runs wrapped it runs unwrapped, copied, and pickled, to the same numbers."""
    model, x, expected = grown(name, **options)

    plain = esper.unwrap(model)

    assert isinstance(plain.site, fx.GraphModule)
    for each in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(each(x), expected)
        again = pickle.loads(pickle.dumps(copy.deepcopy(each)))
        torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("options", [{}, {"mode": "replace", "alpha": 1.0}])
@pytest.mark.parametrize("name", MODELS)
def test_an_owner_that_asks_its_layer_runs_exported(name, options, tmp_path, monkeypatch):
    """So does a fresh model with the exported grafts, also copied and pickled."""
    model, x, expected = grown(name, **options)
    make_model = MODELS[name][0]

    esper.export(model, tmp_path)

    grafts = load_grafts(tmp_path)
    monkeypatch.setitem(sys.modules, "grafts", grafts)
    rebuilt = grafts.build(make_model()).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for each in (rebuilt, copy.deepcopy(rebuilt), pickle.loads(pickle.dumps(rebuilt))):
        torch.testing.assert_close(each(x), expected)


def test_the_host_answers_with_what_it_has_now():
    """Moved to another dtype, loaded in place or assigned, tied: its owner reads the present."""
    plain = esper.unwrap(grown("dtype")[0])
    plain.to(torch.float64)
    assert plain.site.weight.dtype == torch.float64
    state = {name: torch.zeros_like(value) for name, value in plain.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    assert plain.site.weight is plain.site.host.weight
    assert not plain.site.weight.any()
    tied = nn.Parameter(torch.ones(4, 4))
    plain.site.weight = tied
    assert plain.site.host.weight is tied
    assert [name for name, p in plain.named_parameters() if p is tied] == ["site.host.weight"]


def test_answers_add_no_tensor():
    """The state_dict has each tensor once, under the names of host and kernels."""
    plain = esper.unwrap(grown("weight")[0])
    parts = {name.split(".")[1] for name in plain.state_dict()}
    assert parts == {"host", "seed_0"}
    assert plain.site.weight is plain.site.host.weight


def test_what_nobody_has_is_an_attribute_error():
    """An attribute that neither graph nor host has is missing, and named."""
    site = esper.unwrap(grown("dtype")[0]).site
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = site.nonesuch
    assert not hasattr(site, "nonesuch")
    site.nonesuch = 3
    assert "nonesuch" not in vars(site.host)


def test_a_site_without_items_has_no_length():
    """Only what stands for a container is one: a layer is true, and cannot be iterated."""
    site = esper.unwrap(grown("dtype")[0]).site
    assert site
    with pytest.raises(TypeError):
        len(site)


def test_batch_norms_stay_convertible():
    """convert_sync_batchnorm replaces the host and leaves what was grown behind it."""
    model = esper.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    x = torch.randn(2, 3, 6, 6)
    kernel = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
    model[1].graft(0, kernel, alpha=0.5, example=torch.randn(2, 4, 4, 4))
    expected = model(x)

    plain = nn.SyncBatchNorm.convert_sync_batchnorm(esper.unwrap(model))

    assert isinstance(plain[1].host, nn.SyncBatchNorm)
    assert plain[1].num_features == 4
    torch.testing.assert_close(plain(x), expected)


def test_a_layer_that_was_grown_twice_answers():
    """Wrapped again and grown again, at the same site, it is asked through both."""
    model, x, _ = grown("weight")
    plain = esper.unwrap(model)
    esper.wrap(plain, select="site")
    plain.site.graft(1, bend(), alpha=0.5, example=torch.randn(2, 4))
    expected = plain(x)

    twice = esper.unwrap(plain)

    assert isinstance(twice.site, nn.Linear)
    for each in (twice, copy.deepcopy(twice), pickle.loads(pickle.dumps(twice))):
        torch.testing.assert_close(each(x), expected)


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_every_kind_of_site_answers_with_all_that_its_host_has(name):
    """Tensors are the host's own objects, settings its values, and its class is the host's."""
    host = HOSTS[name]
    layer = graft(wrapped(host), host)
    plain = esper.unwrap(nn.ModuleDict({"site": layer}))["site"]
    if not isinstance(plain, fx.GraphModule):
        pytest.skip("its kernel folds")
    for each in (plain, copy.deepcopy(plain)):
        is_a_batch_norm = isinstance(each.host, nn.modules.batchnorm._BatchNorm)
        assert isinstance(each, type(each.host)) or is_a_batch_norm
        tensors = {**each.host._parameters, **each.host._buffers}
        assert all(getattr(each, name) is tensor for name, tensor in tensors.items())
        settings = {k: v for k, v in vars(each.host).items() if k not in each.OWN_NAMES}
        assert {name: getattr(each, name) for name in settings} == settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_training", "is_causal"),
    [
        (False, True),
        pytest.param(True, False, marks=pytest.mark.torture),
        *(pytest.param(both, both, marks=pytest.mark.torture) for both in (False, True)),
    ],
)
@pytest.mark.parametrize("select", [None, "*coder.layers.*", "*coder", "**"])
def test_a_grown_transformer_of_torch_runs_unwrapped(select, is_training, is_causal):
    """Layers read batch_first and more of their attention, stacks read their layers."""
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).train(is_training)
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(5) if is_causal else None
    given = (x, torch.randn(2, 5, 8))
    options = {"tgt_mask": mask, "src_key_padding_mask": None if is_causal else padding}
    esper.wrap(model, select=select)
    for layer in esper.layers(model).values():
        size = layer.output_size or 8
        layer.graft(0, bend(size, size), alpha=0.5, position="serial")
    model(*given, **options)
    expected = model(*given, **options)
    grafted = [layer for layer in esper.layers(model).values() if layer.seed_kernel(0) is not None]
    assert grafted

    plain = esper.unwrap(model)

    for each in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(each(*given, **options), expected)


@pytest.mark.slow
def test_answers_need_no_esper(tmp_path):
    """A process without Esper loads the pickle, and is answered as here."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = esper.wrap(nn.TransformerEncoder(layer, 1).eval(), select="**.self_attn")
    x = torch.randn(2, 5, 8)
    model.layers[0].self_attn.graft(0, bend(8, 8), alpha=0.5, position="serial")
    model(x)
    torch.save((esper.unwrap(model), x, model(x)), tmp_path / "model.pt")
    code = """
import sys
sys.modules["esper"] = None
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(x), expected)
assert isinstance(model.layers[0].self_attn, torch.nn.MultiheadAttention)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "model.pt").exists()


def test_a_plain_model_that_asks_is_compiled_and_exported():
    """torch.compile, torch.export and torch.fx follow the answers."""
    model, x, expected = grown("weight")
    plain = esper.unwrap(model)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), expected)
    torch.testing.assert_close(fx.symbolic_trace(plain)(x), expected)
    file = io.BytesIO()
    torch.export.save(torch.export.export(plain, (x,)), file)


class Mixin:
    tag = "mixed"

    def describe(self):
        return f"{self.tag} {self.size}"


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def width(self):
        """Return a number."""


class Peculiar(Mixin, Abstract):
    """A host that does all that a class of a module may do."""

    size = 3

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def __getattr__(self, name):
        return 42 if name == "magic" else super().__getattr__(name)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

    def width(self):
        return self.fc.out_features

    def train(self, mode=True):
        super().train(mode)
        self.fc.eval()
        return self

    def forward(self, x):
        return self.fc(x) * self.scale


def test_a_peculiar_host_is_answered_for():
    """Mixins, abstract bases, attributes made up, calls and modes of one's own."""
    torch.manual_seed(0)
    model, x = esper.wrap(nn.ModuleDict({"site": Peculiar()}), select="site"), torch.randn(3, 4)
    model["site"].graft(0, bend(), alpha=0.5, example=x)
    expected = model["site"](x)
    site = esper.unwrap(model)["site"]
    for each in (site, copy.deepcopy(site), copy.copy(site), pickle.loads(pickle.dumps(site))):
        assert isinstance(each, Peculiar)
        assert (each.describe(), each.magic, each.width(), each.scale.item()) == (
            "mixed 3",
            42,
            4,
            2,
        )
        assert not each.train().fc.training
        torch.testing.assert_close(each(x), expected)


def test_hooks_still_see_what_the_owner_sees():
    """Hooks of the layer are the graph's, and the answer to a caller is theirs."""
    model, x, expected = grown("dtype")
    seen = []
    model.site.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = esper.unwrap(model)
    assert torch.equal(plain(x), expected)
    assert torch.equal(result(seen[-1]), expected)
