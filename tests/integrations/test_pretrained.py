"""A grown model of transformers comes back by ``from_pretrained``, or is refused in words."""

import copy
import importlib
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import esper

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402 - behind importorskip

from esper.integrations.module_form import built_module, described_module  # noqa: E402 - as above

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SITE = "transformer.h.0.attn.c_proj"
IDS = torch.arange(16).view(2, 8)


def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def by_hand():
    return nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 16, bias=False))


def grown(kernel=None, **options):
    made = esper.wrap(model()).eval()
    site = esper.layers(made)[SITE]
    kernel = by_hand() if kernel is None else kernel
    site.graft(0, kernel, alpha=0.7, example=torch.randn(2, 8, 16), **options)
    return made


KERNELS = {
    "by hand": grown,
    "by hand, serial": lambda: grown(position="serial"),
    "by hand, replacing": lambda: grown(mode="replace"),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_plain", [False, True], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_comes_back(tmp_path, kernel, is_plain):
    """The same logits, bit for bit, from the folder; and again from a folder of what came back."""
    made = KERNELS[kernel]()
    made = esper.unwrap(made) if is_plain else made
    wanted = made(IDS).logits
    assert not torch.equal(wanted, model().eval()(IDS).logits)
    for folder in ("one", "two"):
        made.save_pretrained(tmp_path / folder)
        made = GPT2LMHeadModel.from_pretrained(tmp_path / folder)
        assert torch.equal(made(IDS).logits, wanted)
        assert bool(esper.layers(made)) is not is_plain
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(auto(IDS).logits, wanted)


@pytest.mark.slow
def test_what_esper_grew_comes_back(tmp_path):
    """A kernel of the catalog, wrapped: it is built from its blueprint; every site stays one."""
    torch.manual_seed(1)
    made = esper.wrap(model()).eval()
    site = esper.layers(made)[SITE]
    with pytest.raises(ValueError, match="it has ") as refused:
        site.graft(0, "none such", example=torch.randn(2, 8, 16))
    name = str(refused.value).partition("it has ")[2].partition(",")[0]
    site.graft(0, name, alpha=1.0, example=torch.randn(2, 8, 16))
    with torch.no_grad():
        for p in (p for n, p in made.named_parameters() if "_seeds" in n):
            p.normal_(std=0.1)
    made.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert esper.layers(again).keys() == esper.layers(made).keys()
    assert not getattr(again, "is_quantized", False)


@pytest.mark.slow
def test_the_base_model_of_a_grown_model_is_grown(tmp_path):
    """``GPT2Model`` of a ``GPT2LMHeadModel``'s folder has the kernels, under its own names."""
    made = grown()
    made.save_pretrained(tmp_path)
    base = transformers.GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, made.transformer(IDS).last_hidden_state)


@pytest.mark.slow
def test_without_esper_it_is_refused(tmp_path):
    """A process that has not imported Esper's adapter gets an error that says what to import."""
    grown().save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        "try: transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: said = str(error)\n"
        "else: raise SystemExit('it was loaded')\n"
        "assert 'import esper.integrations.transformers' in said\n"
        "import esper.integrations.transformers, esper\n"
        "made = transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1])\n"
        f"assert 0 in [s['seed'] for s in esper.layers(made)[{SITE!r}].structure()]\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


DOORS = {
    "trainer": """
from esper.integrations.transformers import EsperTrainer
args = transformers.TrainingArguments(sys.argv[1], use_cpu=True, report_to=[])
made = EsperTrainer(model=made, args=args).model
""",
    "unpickled": """
import esper
made = torch.load(sys.argv[2], weights_only=False)
esper.Grower(made, torch.optim.SGD(made.parameters(), lr=0.1)).close()
""",
}
"""How a model comes to be wrapped where its owner has no use for ``esper.wrap``."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "door", [pytest.param(d, marks=[] if d == "trainer" else pytest.mark.torture) for d in DOORS]
)
def test_a_config_says_what_has_grown_whatever_wrapped_the_model(tmp_path, door):
    """A process in which nobody has said ``esper.wrap`` saves what comes back with its kernels."""
    torch.save(esper.wrap(model()), tmp_path / "wrapped.pt")
    code = f"""
import sys, torch, transformers
made = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
{DOORS[door]}
kernel = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 16))
made.get_submodule({SITE!r}).graft(0, kernel, alpha=0.7, example=torch.randn(2, 8, 16))
made.save_pretrained(sys.argv[1])
"""
    folder = tmp_path / "saved"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, folder, tmp_path / "wrapped.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    importlib.import_module("esper.integrations.transformers")
    there = GPT2LMHeadModel.from_pretrained(folder)
    assert 0 in [seed["seed"] for seed in esper.layers(there)[SITE].structure()]


def test_a_config_says_nothing_while_nothing_stands_in_the_model(tmp_path):
    """Wrapped, it is the host's; it changes with the first kernel, and back with the last."""
    made = esper.wrap(model())
    before = json.loads(made.config.to_json_string(use_diff=False))
    assert not {"fusion_config", "quantization_config"} & before.keys()
    site = esper.layers(made)[SITE]
    site.graft(0, by_hand(), alpha=0.5, example=torch.randn(2, 8, 16))
    assert made.config.quantization_config["quant_method"] == "esper"
    site.unload_kernel(0)
    assert json.loads(made.config.to_json_string(use_diff=False)) == before


def test_what_no_config_can_describe_is_refused(tmp_path):
    """A class of the owner's is never built from data; the error names other ways."""

    class Own(nn.Linear):
        pass

    grown(Own(16, 16)).save_pretrained(tmp_path)
    with pytest.raises(esper.KernelLoadError, match=r"written by hand.*torch.save or esper.export"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_quantised_model_is_refused_in_words():
    """Its config keeps its own quantisation; loading stops, and says how to save instead."""
    made = esper.wrap(model())
    made.config.quantization_config = {"quant_method": "another"}
    made.config.fusion_config = {"patch_embeddings": True}
    esper.layers(made)[SITE].graft(0, by_hand(), alpha=0.5, example=torch.randn(2, 8, 16))
    assert made.config.quantization_config == {"quant_method": "another"}
    said = [name for name in made.config.fusion_config if name.startswith("esper")]
    assert "torch.save or esper.export" in said[0]
    assert made.config.fusion_config["patch_embeddings"] is True


def test_a_module_is_built_from_its_form():
    """Through JSON; with the arguments it was made with, and nothing but the classes named."""
    made = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding="same", bias=False), nn.GELU("tanh"), nn.Dropout(0.1)
    )
    again = built_module(json.loads(json.dumps(described_module(made))))
    assert str(again) == str(made)
    assert described_module(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))) is None
    with pytest.raises(ValueError, match="found 'system'"):
        built_module({"class": "system", "arguments": {}})


def test_a_copy_of_a_grown_model_says_so_too():
    """A deep copy is made while its parts are told of kernels, and its config is its own."""
    made = grown()
    copied = copy.deepcopy(made)
    assert copied.config.quantization_config == made.config.quantization_config
    esper.layers(copied)[SITE].unload_kernel(0)
    assert not hasattr(copied.config, "quantization_config")
    assert made.config.quantization_config["quant_method"] == "esper"
