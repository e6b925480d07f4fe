"""``esper.widen``: an MLP gets more hidden units in place, and computes what it did."""

import copy

import pytest
import torch
from torch import nn

import esper


def mlp(width=8, hidden=16, act=nn.GELU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), act(), nn.Linear(hidden, width))


class Gated(nn.Module):
    """An MLP whose hidden units are products."""

    def __init__(self, hidden=16):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(8, hidden), nn.Linear(8, hidden, bias=False)
        self.down = nn.Linear(hidden, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def trained(model, optimizer_class=torch.optim.AdamW, num=3):
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    train(model, optimizer, num)
    return model, optimizer


def train(model, optimizer, num=1):
    for _ in range(num):
        optimizer.zero_grad()
        (model(X) - 1.0).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [mlp, Gated])
@pytest.mark.parametrize("intermediate", [17, 40, 100])
def test_outputs_stay_at_birth(make, intermediate):
    """To rounding: the sum over hidden units is longer, and added up in another order."""
    model, optimizer = trained(make())
    before = model(X)
    assert esper.widen(model, optimizer, "", intermediate=intermediate) == ("",)
    assert torch.allclose(model(X), before, atol=1e-6)
    train(model, optimizer)
    assert not torch.allclose(model(X), before, atol=1e-6)


@pytest.mark.parametrize("make", [mlp, Gated])
def test_the_classes_are_the_owner_s_with_the_larger_width(make):
    """Types, sizes and keys are those of a model that is built wider, and it takes the weights."""
    model, optimizer = trained(make())
    esper.widen(model, optimizer, "", intermediate=40)
    wide = make(hidden=40)
    assert str(model) == str(wide)
    wide.load_state_dict(model.state_dict())
    assert torch.equal(wide(X), model(X))


def test_activations_keep_their_size_and_no_two_units_are_alike():
    """The root mean square of the hidden units is kept, and each unit is one of its own."""
    model = mlp(32, 64)
    nn.init.normal_(model[0].bias, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1000, 32)
    before = model[:2](x).square().mean().sqrt()
    esper.widen(model, optimizer, "", intermediate=256)
    after = model[:2](x).square().mean().sqrt()
    assert torch.allclose(after, before, rtol=0.05)
    assert len(torch.unique(model[0].weight.detach(), dim=0)) == 256


def test_moments_are_padded_with_zeros():
    """What the optimizer knew it knows, at its step; what came begins with nothing."""
    model, optimizer = trained(mlp())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    esper.widen(model, optimizer, "", intermediate=24)
    after = optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, axis in ((0, 0), (1, 0), (2, 1)):
        for name in ("exp_avg", "exp_avg_sq"):
            kept, more = after[number][name].split([16, 8], dim=axis)
            assert torch.equal(kept, before[number][name])
            assert not more.any()
        assert torch.equal(after[number]["step"], before[number]["step"])
    assert all(torch.equal(v, before[3][k]) for k, v in after[3].items())


def test_parameters_are_exchanged_in_their_groups():
    """In their places, with names and settings; the optimizer keeps nothing of the old ones."""
    model = mlp()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    )
    train(model, optimizer)
    esper.widen(model, optimizer, "", intermediate=24)
    own = [[model[0].weight, model[2].weight], [model[0].bias, model[2].bias]]
    for group, params in zip(optimizer.param_groups, own, strict=True):
        assert len(group["params"]) == 2
        assert all(p is q for p, q in zip(group["params"], params, strict=True))
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    train(model, optimizer)


def test_several_optimizers_keep_their_parts():
    """Each has what came in the place of its own."""
    model = mlp()
    optimizers = [
        torch.optim.Muon([model[0].weight, model[2].weight]),
        torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1, momentum=0.9),
    ]
    for _ in range(2):
        model(X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    esper.widen(model, optimizers, "", intermediate=24)
    assert optimizers[0].state[model[0].weight]["momentum_buffer"].shape == (24, 8)
    assert optimizers[1].state[model[0].bias]["momentum_buffer"].shape == (24,)


def test_gradients_that_wait_are_padded():
    """An accumulation that is under way goes on."""
    model, optimizer = trained(mlp())
    model(X).sum().backward()
    before = model[0].weight.grad.clone()
    esper.widen(model, optimizer, "", intermediate=24)
    assert torch.equal(model[0].weight.grad[:16], before)
    optimizer.step()


def test_a_pattern_takes_several_mlps():
    """All of them are made wider, or none."""
    model = nn.ModuleDict({"a": mlp(), "b": mlp(), "head": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert esper.widen(model, optimizer, ["a", "b"], intermediate=24) == ("a", "b")
    assert esper.widen(model, optimizer, "[ab]", intermediate=32) == ("a", "b")
    assert model["b"][0].out_features == 32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "is no MLP"),
        (lambda: nn.Sequential(*mlp(), *mlp()), "is no MLP: .* found"),
        (
            lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)),
            r"1\.weight is of shape \(16,\)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 8)),
            "are not each by itself",
        ),
        (lambda: mlp(hidden=24), "has 24 hidden units"),
    ],
)
def test_what_is_no_mlp_is_refused(make, said):
    """With nothing changed."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    text = str(model)
    with pytest.raises(ValueError, match=said):
        esper.widen(model, optimizer, "", intermediate=24)
    assert str(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(X)


def test_weights_that_are_not_the_mlp_s_own_are_refused():
    """Shared ones, those with kernels, and those that another optimizer trains."""
    model = nn.ModuleDict({"mlp": mlp(), "other": nn.Linear(8, 16)})
    model["other"].weight = model["mlp"][0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"mlp\.0\.weight and other\.weight .*: it is shared"):
        esper.widen(model, optimizer, "mlp", intermediate=24)
    model = esper.wrap(mlp())
    model[0].graft(0, nn.Linear(8, 16), alpha=0.5, example=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds kernels"):
        esper.widen(model, optimizer, "", intermediate=24)
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2\.weight .* in no param group"):
        esper.widen(model, optimizer, "", intermediate=24)


def test_a_replicated_model_is_refused():
    """DDP holds the parameters that would be exchanged."""
    model = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = mlp()
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is in DistributedDataParallel"):
        esper.widen(model, optimizer, "", intermediate=24)


def test_wrong_paths_types_and_configs_are_refused():
    """With the name of the argument, and nothing changed."""
    model, optimizer = trained(mlp())
    with pytest.raises(ValueError, match="no module of this model is at 'mlp'"):
        esper.widen(model, optimizer, "mlp", intermediate=24)
    with pytest.raises(TypeError, match="intermediate is a whole number"):
        esper.widen(model, optimizer, "", intermediate=24.0)
    with pytest.raises(ValueError, match="config='hidden' names an attribute"):
        esper.widen(model, optimizer, "", intermediate=24, config="hidden")
    assert model[0].out_features == 16


def test_torch_s_encoder_layer_has_an_mlp():
    """Its block is enough of a name; its fast path in evaluation sees the wider weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 5, 8)
    before = layer.eval()(x)
    esper.widen(layer, optimizer, "", intermediate=24)
    with torch.no_grad():
        assert torch.allclose(layer(x), before, atol=1e-5)


MODELS = {
    "gpt2": ("transformer.h.*.mlp", "n_inner"),
    "llama": ("model.layers.*.mlp", "intermediate_size"),
    "bert": (["bert.encoder.layer.0", "bert.encoder.layer.1"], "intermediate_size"),
    "vit": ("vit.layers.*.mlp", "intermediate_size"),
    "t5": ("*coder.block.*.DenseReluDense", "d_ff"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_loaded_into_their_wider_class(name):
    """Gated and plain ones, with ``Conv1D`` and ``Linear``: config, keys and numbers."""
    from tiny_transformers import MODELS as MADE

    torch.manual_seed(0)
    model, batch = MADE[name]()
    path, config = MODELS[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        before = model.eval()(**batch).logits
        esper.widen(model, optimizer, path, intermediate=96, config=config)
        assert torch.allclose(model(**batch).logits, before, atol=1e-6)
        assert getattr(model.config, config) == 96
        wide = type(model)(model.config).eval()
        wide.load_state_dict(model.state_dict())
        assert torch.equal(wide(**batch).logits, model(**batch).logits)
        assert str(wide) == str(model)
    model.train()(**batch).loss.backward()
    optimizer.step()


def test_a_path_that_is_no_name_is_refused():
    """What names no MLP by its type is refused as ``path``."""
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"path is the name of an MLP, .*; got 5"):
        esper.widen(model, torch.optim.SGD(model.parameters(), lr=0.1), 5, intermediate=8)
