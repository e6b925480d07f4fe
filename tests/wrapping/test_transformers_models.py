"""Whole models from transformers: wrapped they are what they were, and they grow."""

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from tiny_transformers import MODELS
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from wrapping_models import Bottleneck

import esper
from esper.growth.policies import ByHand
from esper.state.site import describe_site

pytestmark = pytest.mark.slow

GENERATE = ("gpt2", "llama", "t5")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def make(name, **options):
    """Return a model in training mode, with random weights, and a batch for it."""
    torch.manual_seed(0)
    model, batch = MODELS[name](**options)
    return model.train(), batch


def step(model, batch):
    """Outputs and gradients of a training step with a fixed random state, under all names."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    found = {"loss": output.loss, "logits": output.logits}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        assert torch.equal(found[each], value), each


def prediction(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_wrapped_model_is_what_it_was(name, attention):
    """Loss, logits and every gradient of a training step are equal, bit for bit."""
    if name == "resnet":
        attention = "eager"  # it has none
    model, batch = make(name, attn_implementation=attention)
    expected = step(copy.deepcopy(model), batch)

    esper.wrap(model)

    assert_same(step(model, batch), expected)
    assert len(esper.layers(model)) >= 5


def test_a_wrapped_model_is_saved_and_loaded_as_its_own_class(name, tmp_path):
    """save_pretrained writes what from_pretrained reads, into a model without Esper."""
    model, batch = make(name)
    esper.wrap(model).save_pretrained(tmp_path)

    plain = type(model).from_pretrained(tmp_path)

    assert not esper.layers(plain)
    assert torch.equal(prediction(plain, batch), prediction(model, batch))


def test_a_dormant_model_is_unwrapped_to_its_own_classes(name):
    """Each module's class is what it was."""
    model, batch = make(name)
    classes = [type(module) for module in model.modules()]
    expected = prediction(model, batch)

    plain = esper.unwrap(esper.wrap(model))

    assert plain is model
    assert [type(module) for module in plain.modules()] == classes
    assert torch.equal(prediction(plain, batch), expected)


SITES = {
    "bert": ("bert.encoder.layer.0.intermediate.dense", "classifier"),
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    "llama": ("model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.o_proj"),
    "t5": (
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ),
    "vit": ("vit.layers.0.mlp.fc1", "classifier"),
    "resnet": ("resnet.encoder.stages.1.layers.0.layer.0.convolution", "classifier.1"),
}
"""Of each model a layer for a kernel that bends, and one for a kernel that folds."""


def bent(layer):
    """A kernel by hand for a layer, which no weight of the layer can stand for."""
    if isinstance(layer, nn.Conv2d):
        return nn.Sequential(
            nn.Conv2d(layer.in_channels, 3, 3, stride=layer.stride, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, layer.out_channels, 1),
        )
    return Bottleneck(*sizes(layer))


def sizes(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf  # transformers' Conv1D


def grown(name, alpha=0.5):
    """Return a wrapped model with a kernel in each of its two sites, and a batch."""
    model, batch = make(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # transformers' own are too small to see
    esper.wrap(model)
    first, second = (model.get_submodule(site) for site in SITES[name])
    first.graft(0, bent(first), alpha=alpha)
    second.graft(1, nn.Linear(*sizes(second), bias=False), alpha=alpha)
    prediction(model, batch)
    return model, batch


def without(model):
    return esper.restore(copy.deepcopy(model)).model


def test_grafts_contribute_and_train(name):
    """Kernels at two layers change the prediction, learn, and have no fault to their name."""
    model, batch = grown(name)
    assert not torch.allclose(prediction(model, batch), prediction(without(model), batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())

    losses = []
    for _ in range(4):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    after = model.state_dict()
    kernels = [key for key in after if "._seeds." in key and ".kernel." in key]
    assert len(kernels) == 5
    assert not any(torch.equal(after[key], before[key]) for key in kernels)
    assert losses[-1] < losses[0]
    faults = [layer.get_stats()["execution_stats"]["fault_count"] for layer in sites(model)]
    assert faults == [0, 0]


def sites(model):
    return [layer for layer in esper.layers(model).values() if layer.structure()]


def test_a_grown_model_is_unwrapped_to_its_own_class(name):
    """What folds has its own class again, the rest is a graph; predictions are the same."""
    model, batch = grown(name)
    own_class = type(model)
    classes = {n: type(module) for n, module in without(model).named_modules()}
    expected = prediction(model, batch)
    graphs = list(SITES[name])
    if esper.layers(model)[graphs[1]].fossilize(1).folded:
        graphs.pop()

    plain = esper.unwrap(model)

    assert type(plain) is own_class
    assert len(graphs) == 1 or name == "gpt2"  # whose layers are no nn.Linear
    found = {n: type(module) for n, module in plain.named_modules()}
    assert all(issubclass(found.pop(graph), fx.GraphModule) for graph in graphs)
    inside = tuple(f"{graph}." for graph in graphs)
    assert {n: c for n, c in found.items() if not n.startswith(inside)} == {
        n: c for n, c in classes.items() if n not in graphs
    }
    assert torch.allclose(prediction(plain, batch), expected, atol=1e-5)


def test_a_grown_model_is_saved_and_loaded(name, tmp_path):
    """Safetensors keeps seeds and all; a model grown alike loads it, strictly, tied or not."""
    model, batch = grown(name)
    save_model(model, tmp_path / "model.safetensors")
    other, _ = grown(name, alpha=0.25)
    torch.nn.init.zeros_(next(other.parameters()))

    load_model(other, tmp_path / "model.safetensors")

    assert torch.equal(prediction(other, batch), prediction(model, batch))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet"])
def test_activation_checkpointing_of_a_grown_model(name):
    """Blocks that are run again in the backward give the same gradients."""
    model, batch = grown(name)
    expected = step(model.train(), batch)

    model.activation_checkpointing_enable()

    assert_same(step(model, batch), expected)


SHORT = {
    "trial_updates": 50,
    "hold_updates": 3,
    "warmup_updates": 3,
    "record_updates": 2,
    "attribution": "none",
    "evaluate_every": 5,
    "overhead": 1000.0,
}


def per_sample(model, batch):
    """Cross entropy of each sequence or image, (N,)."""
    logits, labels = model(**batch).logits, batch["labels"]
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    each = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return each.mean(dim=1)


def train(name, **settings):
    """Train for 60 updates, with a controller that tries a kernel if there are settings."""
    model, batch = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held_out = {key: value.repeat(200, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    grower = None
    if settings:
        site = SITES[name][0]
        described = describe_site(esper.wrap(model).get_submodule(site))
        kernels = [k for k in esper.default_catalog().blueprints_for(described) if k.adds_capacity]
        grower = esper.Grower(
            model,
            optimizer,
            compute_loss=lambda model, batch: model(**batch).loss,
            evaluate=lambda model: per_sample(model, held_out),
            policy=ByHand([(site, kernels[0])]),
            **SHORT,
            **settings,
        )
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if grower is not None:
            grower.step(loss, batch=batch)
    return model, grower


@pytest.mark.torture
def test_a_trial_leaves_no_trace_in_a_whole_model(name):
    """A run whose package is refused ends in the bits of one without a Grower."""
    expected, _ = train(name)

    model, grower = train(name, min_effect=1e9)
    grower.close()

    (trial,) = grower.report().trials
    assert trial.verdict == "refused"
    assert_same(model.state_dict(), expected.state_dict())


def generate(model, batch, **options):
    return model.eval().generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        **options,
    )


@pytest.mark.parametrize("name", GENERATE)
def test_a_wrapped_model_generates_what_it_did(name):
    """Dormant, greedy generation gives the bare model's tokens."""
    model, batch = make(name)
    expected = generate(model, batch)

    assert torch.equal(generate(esper.wrap(model), batch), expected)


@pytest.mark.parametrize("name", GENERATE)
def test_a_grown_model_generates_with_and_without_a_cache(name):
    """Kernels see one token at a time where keys and values are cached; the tokens are equal."""
    model, batch = grown(name)
    cached = generate(model, batch)

    assert torch.equal(generate(model, batch, use_cache=False), cached)
    assert torch.equal(generate(esper.unwrap(model), batch), cached)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_attention_stays_fused(name):
    """A wrapped model calls the fused attention that the bare one calls."""
    model, batch = make(name, attn_implementation="sdpa")
    expected = operations(model, batch)
    assert any("scaled_dot_product_flash" in operation for operation in expected)

    assert operations(esper.wrap(model), batch) == expected


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(model, batch):
    with _Recorder() as recorder:
        prediction(model, batch)
    return recorder.names


def test_tied_embeddings_stay_tied():
    """T5's embeddings are one tensor, wrapped and unwrapped, and its head is left alone."""
    model, batch = make("t5")

    esper.wrap(model)

    left = {entry.name: entry.reason for entry in esper.skipped(model)}
    assert "tied" in left["lm_head"]
    step(model, batch)
    for each in (model, esper.unwrap(model)):
        assert each.lm_head.weight is each.shared.weight
        assert each.encoder.embed_tokens.weight is each.shared.weight


BLOCKS = {
    "bert": "bert.encoder.layer.0",
    "gpt2": "transformer.h.1",
    "llama": "model.layers.0",
    "t5": "encoder.block.0",
    "vit": "vit.layers.1",
    "resnet": "resnet.encoder.stages.0.layers.0",
}


def grown_at_block(name):
    """Return a model with a kernel beside one whole block, and a batch."""
    model, batch = make(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    esper.wrap(model, select=BLOCKS[name])
    block = model.get_submodule(BLOCKS[name])
    beside = nn.Conv2d(8, 8, 3, padding=1) if name == "resnet" else Bottleneck(16)
    block.graft(0, nn.Sequential(beside, nn.Tanh()), alpha=0.5)
    prediction(model, batch)
    return model, batch


def test_a_whole_block_is_a_site(name):
    """A kernel beside a block changes the prediction, gets gradients, and comes off again."""
    model, batch = grown_at_block(name)
    block = model.get_submodule(BLOCKS[name])
    plain = without(model)
    assert not torch.allclose(prediction(model, batch), prediction(plain, batch))

    step(model.train(), batch)

    assert all(p.grad.abs().sum() > 0 for p in block.seed_kernel(0).parameters())
    assert block.get_stats()["execution_stats"]["fault_count"] == 0
    block.unload_kernel(0)
    assert_same(step(model.train(), batch), step(plain.train(), batch))


def test_a_grown_block_is_unwrapped(name):
    """The block becomes a graph that takes the calls it was seen to get; the model its class."""
    model, batch = grown_at_block(name)
    own_class, expected = type(model), prediction(model, batch)

    plain = esper.unwrap(model)

    assert type(plain) is own_class
    assert isinstance(plain.get_submodule(BLOCKS[name]), fx.GraphModule)
    assert torch.allclose(prediction(plain, batch), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_with_a_grown_block_generates(name):
    """Keys and values are cached through the graft, wrapped and unwrapped."""
    model, batch = grown_at_block(name)
    cached = generate(model, batch)

    assert torch.equal(generate(model, batch, use_cache=False), cached)
    assert torch.equal(generate(esper.unwrap(model), batch), cached)
