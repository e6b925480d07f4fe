"""From a grown model to plain PyTorch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune
from wrapping_grown import blueprint, grown_mlp
from wrapping_models import Block, Bottleneck, Mlp, Stack, cnn

import esper

LOAD_WITHOUT_ESPER = """
import sys
sys.modules["esper"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
x, expected = torch.load(sys.argv[2])
assert torch.equal(model(x), expected), (model(x) - expected).abs().max()
"""


def no_esper_left(model):
    return all(type(m).__module__.partition(".")[0] != "esper" for m in model.modules())


def test_a_dormant_model_is_what_it_was():
    """Every class, key and number of a model that has grown nothing is the original's."""
    bare = cnn().eval()
    wrapped = esper.wrap(copy.deepcopy(bare))

    plain = esper.unwrap(wrapped)

    assert plain is wrapped
    assert [type(m) for m in plain.modules()] == [type(m) for m in bare.modules()]
    assert [sorted(vars(m)) for m in plain.modules()] == [sorted(vars(m)) for m in bare.modules()]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(plain(x), bare(x))


def test_a_grown_model_predicts_the_same_without_esper():
    """Nothing was folded: predictions are equal bit for bit and no class of Esper is left."""
    model = grown_mlp()
    x = torch.randn(5, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert plain is model
    assert no_esper_left(plain)
    assert torch.equal(plain(x), expected)
    assert isinstance(plain.fc1, fx.GraphModule)
    assert [name for name, _ in plain.fc2.named_children()] == ["host", "seed_0", "seed_3"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_alphas_are_rounded_as_the_layer_rounds_them(dtype):
    """Adding and replacing seeds at crooked alphas give the same bits in every dtype."""
    torch.manual_seed(0)
    model = esper.wrap(Mlp().to(dtype)).eval()
    x = torch.randn(4, 6, dtype=dtype)
    for seed_idx, (alpha, mode) in enumerate([(0.3, "add"), (0.7, "replace"), (0.2, "replace")]):
        kernel = Bottleneck(6, 8).to(dtype)
        model.fc1.graft(seed_idx, kernel, alpha=alpha, mode=mode, example=x)
    expected = model(x)

    assert torch.equal(esper.unwrap(model)(x), expected)


def test_an_unwrapped_model_can_be_wrapped_again():
    """What was grown is plain by then, and its layers are sites like any other."""
    plain = esper.unwrap(grown_mlp())
    x = torch.randn(2, 6)
    expected = plain(x)

    esper.wrap(plain)

    assert {"fc1.host", "fc1.seed_1.down"} <= set(esper.layers(plain))
    assert torch.equal(plain(x), expected)


def test_kernels_are_named_for_their_nodes():
    """The state of a kernel from a blueprint has the names of the blueprint's nodes."""
    plain = esper.unwrap(grown_mlp())

    assert "fc1.seed_1.down.weight" in plain.state_dict()
    assert "fc1.host.weight" in plain.state_dict()


def test_training_goes_on_in_the_same_tensors():
    """The unwrapped model has the same parameter objects, and its modes reach every part."""
    model = grown_mlp()
    before = {id(p) for p in model.parameters()}

    plain = esper.unwrap(model)

    assert {id(p) for p in plain.parameters()} == before
    plain.train()
    assert plain.fc1.seed_1.drop.training
    assert not torch.equal(plain(torch.ones(1, 6)), plain(torch.ones(1, 6)))


def test_modes_and_frozen_parameters_stay():
    """A model in evaluation stays there, part by part, and what was frozen stays frozen."""
    model = grown_mlp()
    model.fc1.weight.requires_grad_(False)
    model.drop.train()

    plain = esper.unwrap(model)

    assert not plain.fc1.training
    assert not plain.fc1.seed_1.drop.training
    assert plain.drop.training
    assert not plain.fc1.host.weight.requires_grad


def test_hooks_see_the_grafted_output():
    """Hooks of a grafted layer go on seeing its output, and their handles still remove them."""
    model = grown_mlp()
    seen = []
    handle = model.fc2.register_forward_hook(lambda module, args, out: seen.append(out))

    plain = esper.unwrap(model)
    y = plain(torch.randn(2, 6))
    handle.remove()
    plain(torch.randn(2, 6))

    assert len(seen) == 1
    assert torch.equal(seen[0], y)


def test_a_seed_at_alpha_zero_is_no_part_of_the_result():
    """A kernel that contributes nothing leaves no trace: the layer is its own class again."""
    model = esper.wrap(Mlp())
    model.fc1.graft(0, Bottleneck(6, 8), alpha=0.0, example=torch.randn(2, 6))

    assert type(esper.unwrap(model).fc1) is nn.Linear


def test_a_host_that_a_kernel_has_replaced_is_not_called():
    """At alpha 1 the host is idle: it is there to be asked, and its weights matter no more."""
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, Bottleneck(6, 8), alpha=1.0, mode="replace", example=torch.randn(2, 6))
    x = torch.randn(3, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert plain.fc1.out_features == 8
    assert "host" not in [node.target for node in plain.fc1.graph.nodes]
    torch.nn.init.constant_(plain.fc1.weight, torch.nan)
    assert torch.equal(plain(x), expected)


def test_a_host_that_a_serial_kernel_reads_stays():
    """A replacing kernel behind the host needs it, also at alpha 1."""
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(
        0, Bottleneck(8), alpha=1.0, mode="replace", position="serial", example=torch.randn(2, 6)
    )
    x = torch.randn(3, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert [name for name, _ in plain.fc1.named_children()] == ["host", "seed_0"]
    assert torch.equal(plain(x), expected)


def test_an_affine_kernel_is_folded_into_the_weights():
    """A parallel linear kernel folds: the layer is an nn.Linear with the same predictions."""
    torch.manual_seed(0)
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, nn.Linear(6, 8), alpha=0.5, example=torch.randn(2, 6))
    x = torch.randn(7, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert type(plain.fc1) is nn.Linear
    assert sorted(plain.state_dict()) == sorted(Mlp().state_dict())
    assert ((plain(x) - expected).norm() / expected.norm()).item() <= 1e-6


def test_a_whole_block_becomes_a_graph_around_the_block():
    """A block of the user's own is called with all of its arguments, keywords and defaults."""
    torch.manual_seed(0)
    model = esper.wrap(Stack(), select=Block).eval()
    model.blocks[1].graft(0, Bottleneck(6), alpha=1.0, example=torch.randn(2, 6))
    x = torch.randn(3, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert torch.equal(plain(x), expected)
    assert type(plain.blocks[1].host) is Block
    assert no_esper_left(plain)


def test_a_site_inside_a_site_is_exchanged_too():
    """A grafted layer inside a grafted block, and the block around it, both become plain."""
    torch.manual_seed(0)
    model = esper.wrap(Stack(), select=["blocks.0", "blocks.0.fc"]).eval()
    model.blocks[0].graft(0, Bottleneck(6), alpha=1.0, example=torch.randn(2, 6))
    model.blocks[0].fc.graft(0, Bottleneck(6), alpha=1.0, example=torch.randn(2, 6))
    x = torch.randn(3, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert torch.equal(plain(x), expected)
    assert no_esper_left(plain)


def test_a_shared_layer_is_exchanged_wherever_it_hangs():
    """A grafted module under two names is one graph module under both."""
    shared = nn.Linear(4, 4)
    model = esper.wrap(nn.Sequential(shared, nn.ReLU(), shared)).eval()
    model[0].graft(0, Bottleneck(4), alpha=1.0, example=torch.randn(2, 4))
    x = torch.randn(3, 4)
    expected = model(x)

    plain = esper.unwrap(model)

    assert plain[0] is plain[2]
    assert torch.equal(plain(x), expected)


def test_a_grafted_root_is_returned_as_a_graph():
    """There is no parent to hang the result in, so the return value is another object."""
    layer = esper.wrap(nn.Linear(4, 4)).eval()
    layer.graft(0, Bottleneck(4), alpha=1.0, example=torch.randn(2, 4))
    x = torch.randn(3, 4)
    expected = layer(x)

    plain = esper.unwrap(layer)

    assert isinstance(plain, fx.GraphModule)
    assert torch.equal(plain(x), expected)
    assert type(layer) is nn.Linear


def test_a_graft_survives_the_fused_path_of_evaluation():
    """An encoder layer reads its children's weights in evaluation; not with a graft inside."""
    torch.manual_seed(0)
    inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = esper.wrap(nn.TransformerEncoder(inner, 1)).eval()
    model.layers[0].linear1.graft(0, Bottleneck(8, 16), alpha=1.0, example=torch.randn(2, 3, 8))
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        model.use_nested_tensor = False
        expected = model(x, src_key_padding_mask=mask)
        model.use_nested_tensor = True
        plain = copy.deepcopy(esper.unwrap(model))

        assert torch.equal(plain(x, src_key_padding_mask=mask), expected)


def test_a_call_that_no_graph_can_pass_on_is_refused_and_nothing_changes():
    """A site of *args that was never seen is no graph; the error says so, the model stays."""

    class Variadic(nn.Linear):
        def forward(self, *args):
            return super().forward(args[0])

    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), Variadic(4, 4), nn.Linear(4, 4))).eval()
    for layer in model:
        layer.graft(0, blueprint(4), alpha=1.0, example=torch.randn(2, 4))
    structure = model[1].structure()
    model[1].unload_kernel(0)
    model[1].build(structure)
    x = torch.randn(3, 4)
    expected, state = model(x), copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=r"takes \(\*args\).*no call of it was seen"):
        esper.unwrap(model)

    assert len(esper.layers(model)) == 3
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_in_a_shadow_pass_is_refused():
    """Inside a shadow pass nothing is unwrapped."""
    model = esper.wrap(Mlp())
    with model.fc2.shadow(0, Bottleneck(8, 3)):
        with pytest.raises(esper.SeedLifecycleError, match="'fc2' is in a shadow pass"):
            esper.unwrap(model)
        assert len(esper.layers(model)) == 2


def test_a_pruned_host_stays_pruned():
    """The hook with which torch prunes works on the host and stays there."""
    torch.manual_seed(0)
    model = Mlp().eval()
    prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    esper.wrap(model)
    model.fc1.graft(0, Bottleneck(6, 8), alpha=1.0, example=torch.randn(2, 6))
    x = torch.randn(3, 6)
    expected = model(x)

    plain = esper.unwrap(model)

    assert torch.equal(plain(x), expected)
    assert prune.is_pruned(plain.fc1.host)


def test_unwrapping_a_plain_model_does_nothing():
    """A model without seeds is returned as it is, also one that was unwrapped before."""
    plain = esper.unwrap(grown_mlp())
    fc1 = plain.fc1

    assert esper.unwrap(plain) is plain
    assert plain.fc1 is fc1


@pytest.mark.slow
def test_the_result_loads_where_esper_is_not_installed(tmp_path):
    """A process in which esper cannot be imported loads the pickled model: the same predictions.

    The control: the wrapped model does not load there.
    """
    model = grown_mlp()
    x = torch.randn(5, 6)
    torch.save((x, model(x).detach()), tmp_path / "batch.pt")
    torch.save(model, tmp_path / "wrapped.pt")
    torch.save(esper.unwrap(model), tmp_path / "plain.pt")

    assert load_elsewhere(tmp_path / "plain.pt").stderr == ""
    assert "esper" in load_elsewhere(tmp_path / "wrapped.pt").stderr


def load_elsewhere(path):
    command = [sys.executable, "-c", LOAD_WITHOUT_ESPER, path, path.parent / "batch.pt"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
