"""Which modules become sites, and what is said about the others."""

import pytest
import torch
from torch import nn
from wrapping_models import Block, Mlp, Stack, cnn

import esper


def reasons(model):
    return {entry.name: entry.reason for entry in esper.skipped(model)}


def every_kind():
    """Return a model with one module of each kind that is taken by default, and two others."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            **{f"conv{n}d": getattr(nn, f"Conv{n}d")(4, 4, 1) for n in (1, 2, 3)},
            "lift": nn.ConvTranspose2d(4, 4, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "layer_norm": nn.LayerNorm(4),
            "rms_norm": nn.RMSNorm(4),
            "group_norm": nn.GroupNorm(2, 4),
            **{f"batch_norm{n}d": getattr(nn, f"BatchNorm{n}d")(4) for n in (1, 2, 3)},
            **{name: getattr(nn, name)(4, 4) for name in ("LSTM", "GRU", "RNN")},
            "embedding": nn.Embedding(5, 4),
            "prelu": nn.PReLU(),
        }
    )


def test_layers_of_the_usual_kinds_are_taken_by_default():
    """The default takes each of these kinds and says why the others were left."""
    model = esper.wrap(every_kind())

    assert list(esper.layers(model)) == [n for n in model if n not in ("embedding", "prelu")]
    assert "not of a kind" in reasons(model)["embedding"]
    assert "not of a kind" in reasons(model)["prelu"]


def test_an_embedding_is_taken_when_it_is_named():
    """What the default leaves for its kind is a site like any other."""
    model = esper.wrap(every_kind(), select=["embedding", "prelu"])

    assert list(esper.layers(model)) == ["embedding", "prelu"]


def test_the_conv1d_of_transformers_is_taken():
    """A class of that name and package is known for a linear layer; of another package not."""
    linear = stand_in("Conv1D", "transformers.pytorch_utils", Transposed)()
    other = stand_in("Conv1D", "somebody.elses", Transposed)()

    assert list(esper.layers(esper.wrap(nn.Sequential(linear, other)))) == ["0"]


class Transposed(nn.Module):
    """A linear layer with the weight the other way round."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        return x @ self.weight


def test_a_container_is_no_site():
    """Nobody calls a ModuleList: naming it is refused with that, a glob passes over it."""
    model = Stack()
    with pytest.raises(ValueError, match=r"'blocks' .*has no forward"):
        esper.wrap(model, select="blocks")

    assert list(esper.layers(esper.wrap(model, select="*"))) == ["head"]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("fc1", ["fc1"]),
        (["fc2", "fc1"], ["fc1", "fc2"]),
        ("fc*", ["fc1", "fc2"]),
        (nn.Linear, ["fc1", "fc2"]),
        ((nn.Dropout, "fc2"), ["drop", "fc2"]),
        (lambda name, module: name.endswith("2"), ["fc2"]),
        ("", [""]),
    ],
)
def test_select_takes_names_globs_types_and_predicates(select, names):
    """Each form of select= takes what it describes, in the model's order."""
    model = esper.wrap(Mlp(), select=select)

    assert list(esper.layers(model)) == names


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("*.0", ["blocks.0"]),
        ("**.fc", ["blocks.0.fc", "blocks.1.fc"]),
        ("blocks.?.fc", ["blocks.0.fc", "blocks.1.fc"]),
    ],
)
def test_a_glob_works_on_the_parts_of_a_name(glob, names):
    """One star stays within a part, two cross dots, and whole blocks can be matched."""
    assert list(esper.layers(esper.wrap(Stack(), select=glob))) == names


def test_a_glob_passes_over_modules_without_parameters():
    """A star that meets an activation does not make it a site."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    assert list(esper.layers(esper.wrap(model, select="*"))) == ["0", "2"]


def test_a_whole_block_is_a_site():
    """A type that the user wrote can be one site, its inner layers left out."""
    model = esper.wrap(Stack(), select=Block)

    assert list(esper.layers(model)) == ["blocks.0", "blocks.1"]
    assert reasons(model)["blocks.0.fc"] == "left out by select="
    assert torch.isfinite(model(torch.randn(2, 6))).all()


def test_a_site_inside_a_site_has_seeds_of_its_own():
    """Block and inner layer both grow; the block's serial kernel reads what the inner one gave."""
    model = esper.wrap(Stack(), select=["blocks.0", "blocks.0.fc"]).eval()
    block, x = model.blocks[0], torch.randn(3, 6)
    bare = block(x)
    inner, outer = nn.Linear(6, 6), nn.Linear(6, 6)
    block.fc.graft(0, inner, alpha=1.0, example=x)
    block.graft(0, outer, alpha=1.0, position="serial", example=x)

    grown_inside = bare + inner(block.norm(x))
    torch.testing.assert_close(block(x), grown_inside + outer(grown_inside))
    block.fc.unload_kernel(0)
    torch.testing.assert_close(block(x), bare + outer(bare))


def test_a_select_that_matches_nothing_lists_close_names():
    """A misspelt name is refused with the names that look like it, and nothing is wrapped."""
    model = Mlp()

    with pytest.raises(ValueError, match=r"no module is named 'fc3'; close names are 'fc"):
        esper.wrap(model, select=["fc1", "fc3"])
    assert type(model.fc1) is nn.Linear


@pytest.mark.parametrize("select", [nn.Conv2d, lambda name, module: False, "conv*"])
def test_any_select_that_matches_nothing_is_refused(select):
    """Types, predicates and globs that fit no module are refused too."""
    with pytest.raises(ValueError, match="matches nothing"):
        esper.wrap(Mlp(), select=select)


@pytest.mark.parametrize("select", [3, [], ["fc1", 3]])
def test_a_select_of_another_type_is_refused(select):
    """Something that names no module is a TypeError."""
    with pytest.raises(TypeError, match="select="):
        esper.wrap(Mlp(), select=select)


def test_a_tied_weight_is_left_with_the_name_of_the_other():
    """Layers that share a Parameter with another module are skipped and both names are said."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "x": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embed"].weight

    esper.wrap(model)

    assert list(esper.layers(model)) == ["x"]
    assert reasons(model)["head"] == "its weight is tied to that of 'embed'"


def test_a_tied_layer_is_taken_when_it_is_asked_for():
    """select= takes what the default would rather leave."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight = model["b"].weight

    assert list(esper.layers(esper.wrap(model, select="a"))) == ["a"]


def test_a_shared_module_is_one_site():
    """A module under two names is wrapped once, under the first, whichever is asked for."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})

    assert list(esper.layers(esper.wrap(model, select="b"))) == ["a"]
    assert model["a"] is model["b"]


def test_the_projection_of_an_attention_is_no_site():
    """MultiheadAttention never calls its out_proj, so a seed there would do nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16)

    esper.wrap(model)

    assert list(esper.layers(model)) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    assert "never calls its forward" in reasons(model)["self_attn.out_proj"]


def test_a_module_that_cannot_be_a_site_is_refused_by_name():
    """Naming out_proj raises the reason instead of leaving it out silently."""
    with pytest.raises(ValueError, match=r"'self_attn\.out_proj'.* never calls its forward"):
        esper.wrap(nn.TransformerEncoderLayer(8, 2, 16), select=["linear1", "self_attn.out_proj"])


def test_a_lazy_layer_is_left_until_its_first_forward():
    """A LazyLinear has no shape yet; it is skipped with the reason and can be taken later."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))

    esper.wrap(model)
    assert "lazy" in reasons(model)["0"].lower()

    model(torch.randn(1, 3))
    assert list(esper.layers(esper.wrap(model, select="0"))) == ["0", "1"]


def stand_in(name, module, *bases):
    """Return a class that looks as if a package that is not installed here had made it."""
    return type(name, bases, {"__module__": module})


def test_layers_of_a_peft_tuner_are_left():
    """What is below a PEFT tuner layer belongs to PEFT; the model around it is free."""
    tuner_layer = stand_in("BaseTunerLayer", "peft.tuners.tuners_utils", nn.Module)
    tuned = stand_in("Linear", "peft.tuners.lora.layer", tuner_layer)()
    tuned.base_layer = nn.Linear(4, 4)
    tuned.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
    tuner = stand_in("LoraModel", "peft.tuners.lora.model", nn.Module)()
    tuner.model = nn.Sequential(tuned, nn.Linear(4, 4))

    esper.wrap(tuner)

    assert list(esper.layers(tuner)) == ["model.1"]
    assert reasons(tuner)["model.0.base_layer"] == "owned by PEFT's Linear"


@pytest.mark.parametrize("package", ["bitsandbytes.nn.modules", "torch.ao.nn.qat.modules.linear"])
def test_quantised_layers_are_left(package):
    """A subclass of Linear that a quantisation package made is skipped."""
    quantised = stand_in("Linear4bit", package, nn.Linear)
    model = nn.Sequential(quantised(4, 4), nn.Linear(4, 4))

    esper.wrap(model)

    assert list(esper.layers(model)) == ["1"]
    assert "quantised" in reasons(model)["0"]


def test_a_layer_with_integer_weights_is_left():
    """A Linear whose weight holds integers is quantised, whoever made it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    integers = torch.zeros(4, 4, dtype=torch.int8)
    model[0].weight = nn.Parameter(integers, requires_grad=False)

    esper.wrap(model)

    assert reasons(model)["0"] == "quantised (a parameter holds integers)"


def test_a_layer_inside_a_parametrization_is_left():
    """A Linear that computes another layer's weight is no place for a graft."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, weight):
            return self.mix(weight)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Mixed(), unsafe=True)

    esper.wrap(model)

    assert list(esper.layers(model)) == ["0"]
    assert "parameter of a" in reasons(model)["0.parametrizations.weight.0.mix"]


def test_a_model_without_such_layers_is_refused_with_reasons():
    """There is nothing to wrap in an embedding, and the error says what was looked at."""
    with pytest.raises(ValueError, match=r"no layer to wrap: '0' \(Embedding\): not of a kind"):
        esper.wrap(nn.Sequential(nn.Embedding(3, 4), nn.ReLU()))


def test_skipped_holds_for_copies():
    """The list is worked out from the model, so a deep copy gives the same."""
    import copy

    model = esper.wrap(cnn(), select="3")

    assert esper.skipped(copy.deepcopy(model)) == esper.skipped(model)
    assert reasons(model)["0"] == "left out by select="
