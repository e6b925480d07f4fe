"""Whole models of transformers: asleep they are their class with fewer layers, bit for bit."""

import copy

import pytest
import torch
from tiny_transformers import MODELS
from torch._dynamo.testing import CompileCounter

import esper
from esper.seeds.shallow import depth_state

pytestmark = pytest.mark.slow

DEEP, DEPTH, KEPT = 4, 2, (0, 2)
STACKS = {
    "gpt2": ("transformer.h",),
    "llama": ("model.layers",),
    "bert": ("bert.encoder.layer",),
    "vit": ("vit.layers",),
    "t5": ("encoder.block", "decoder.block"),
}
SIZES = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")
GENERATE = ("gpt2", "llama", "t5")


@pytest.fixture(params=STACKS)
def name(request):
    return request.param


def of_depth(name, num):
    """Return a model with so many layers in each stack, and a batch for it."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    config = copy.deepcopy(model.config)
    for size in SIZES:
        if size in vars(config):
            setattr(config, size, num)
    torch.manual_seed(0)
    return type(model)(config).train(), batch


def renamed(name, key):
    """Return the key in the deep model of what has a key in the smaller one."""
    for path in STACKS[name]:
        if key.startswith(f"{path}."):
            number, _, rest = key.removeprefix(f"{path}.").partition(".")
            return f"{path}.{KEPT[int(number)]}.{rest}"
    return key


def shallow(name):
    """Return a shallow model, a batch, and the model that is built with as many layers."""
    model, batch = of_depth(name, DEEP)
    built, _ = of_depth(name, DEPTH)
    state = model.state_dict()
    built.load_state_dict({key: state[renamed(name, key)] for key in built.state_dict()})
    for path in STACKS[name]:
        esper.shallow(model, path, depth=DEPTH)
    return model, batch, built


def step(model, batch):
    torch.manual_seed(1)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    found = {"loss": output.loss, "logits": output.logits}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_built(name, model, batch, built):
    found, expected = step(model, batch), step(built, batch)
    assert len(found) == len(expected)
    for key, value in expected.items():
        assert torch.equal(found[renamed(name, key)], value), key


def test_a_training_step_is_that_of_the_smaller_class(name):
    """Loss, logits and gradients, from the first step on."""
    model, batch, built = shallow(name)
    for _ in range(2):
        assert_as_built(name, model, batch, built)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing_too(name, reentrant):
    """The checkpointing of each layer that the library has itself."""
    model, batch, built = shallow(name)
    for each in (model, built):
        each.activation_checkpointing_enable({"use_reentrant": reentrant})
        each.config.use_cache = False
    assert_as_built(name, model, batch, built)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("name", GENERATE, indirect=True)
def test_generation_is_that_of_the_smaller_class(name, options):
    """With a cache of keys, greedily, by beams and by chance."""
    model, batch, built = shallow(name)
    found = []
    for each in (model, built):
        torch.manual_seed(1)
        ids = batch["input_ids"][:, :4]
        found.append(each.eval().generate(ids, max_new_tokens=6, **options))
    assert torch.equal(*found)


def test_hidden_states_keep_the_number_of_the_whole_model(name):
    """A sleeping layer's are those of the layer before it."""
    model, batch, _ = shallow(name)
    output = model(**batch, output_hidden_states=True)
    states = output.encoder_hidden_states if name == "t5" else output.hidden_states
    assert len(states) == DEEP + 1
    assert torch.equal(states[1], states[2])


def test_the_state_dict_goes_both_ways(name, tmp_path):
    """Also through ``save_pretrained``, which writes the whole model."""
    model, batch, _ = shallow(name)
    model.save_pretrained(tmp_path)
    whole = type(model).from_pretrained(tmp_path)
    assert whole.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        before = model.eval()(**batch).logits
        model.load_state_dict(whole.state_dict())
        assert torch.equal(model(**batch).logits, before)


def test_awake_is_the_plain_class(name):
    """After two stages in one go: types, attributes, output and gradients of a model by itself."""
    model, batch, _ = shallow(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for path in STACKS[name]:
        esper.deepen(model, optimizer, depth=DEEP, path=path, ramp_updates=3)
    for _ in range(3):
        step(model, batch)
        optimizer.step()
    plain, _ = of_depth(name, DEEP)
    plain.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not [key for m in model.modules() for key in vars(m) if "esper" in key]
    found, expected = step(model, batch), step(plain, batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_layer_of_the_cache_of_a_waking_model_is_its_own():
    """While blocks wake a model generates with its cache as without."""
    model, batch, _ = shallow("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    esper.deepen(model, optimizer, depth=DEEP, ramp_updates=4)
    step(model, batch)
    optimizer.step()
    assert set(depth_state(model).values()) == {0.25}
    ids = batch["input_ids"][:, :4]
    options = {"max_new_tokens": 6, "do_sample": False}
    found = [model.eval().generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "compiled",
    [pytest.param(n, marks=[] if n == "gpt2" else pytest.mark.torture) for n in STACKS],
)
def test_compiled_a_stage_makes_two_graphs(compiled):
    """Of one piece each; T5's blocks give more than one value, and are seen once before."""
    torch.compiler.reset()
    model, batch, built = shallow(compiled)
    del batch["labels"]
    if compiled == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    for each in (model, built):
        each.eval()
        each.config.use_cache = False
    expected = built(**batch).logits
    if compiled == "t5":
        model(**batch)
    counter, graphs = CompileCounter(), []
    fast = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    assert torch.allclose(fast(**batch).logits, expected, atol=1e-5)
    for path in STACKS[compiled]:
        esper.deepen(model, optimizer, depth=DEEP, path=path, ramp_updates=3)
    for _ in range(4):
        optimizer.zero_grad()
        fast(**batch).logits.square().mean().backward()
        optimizer.step()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 3]
    assert not depth_state(model)
