"""Growing models that are compiled in place, checkpointed, frozen in part, or stepped by hooks."""

import pytest
import torch
from growing import batches, compute_loss, growing, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.growth.policies import ByHand, EveryN
from esper.growth.recording import Recorder, record_beside
from esper.seeds.shadow import shadow_pass


@pytest.fixture(autouse=True)
def hosts_that_are_drawn_alike():
    """Seed the parts of a host too, which tests make before they put them together."""
    torch.manual_seed(0)


class Bent(nn.Module):
    """A block, which says nothing of what it takes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.inner(x))


class Checkpointed(nn.Module):
    """A block that is run again in the backward."""

    def __init__(self, inner, *, reentrant):
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def network(first=None, *middle):
    """Return a wrapped model and an optimizer of what is trainable in it."""
    model = nn.Sequential(first or nn.Linear(4, 4), *middle, nn.Linear(4, 1), nn.Flatten(0))
    esper.wrap(model, select=lambda name, _: name in ("0", "1.inner", str(1 + len(middle))))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def by_hand(site="0", blueprint="mlp-4x4-w32"):
    return {"policy": ByHand([(site, blueprint)])}


def is_run_to_a_verdict(grower):
    return any(graft.verdict != "in progress" for graft in grower.report().grafts)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks for it
@pytest.mark.parametrize(
    ("site", "how"),
    [
        (nn.Linear, "model"),
        pytest.param(Bent, "layers", marks=pytest.mark.slow),
        pytest.param(nn.Linear, "layers", marks=pytest.mark.slow),
        pytest.param(Bent, "model", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_is_compiled_in_place_grows(how, site):
    """Kernels are recorded, tried and grafted, and the model is compiled still."""
    model, optimizer = network(Bent() if site is Bent else nn.Linear(4, 4))
    for module in [model] if how == "model" else list(model):
        module.compile(backend="eager")
    with growing(model, optimizer, policy=EveryN(6)) as grower:
        train(model, optimizer, 120, grower)
        assert is_run_to_a_verdict(grower)
    compiled = model if how == "model" else model[0]
    assert compiled._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of shadow passes
@pytest.mark.parametrize("trial", ["twin", "shadow"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_grows(reentrant, trial):
    """Shadow passes ask for the gradients of single parameters, under both ways to checkpoint."""
    block = Checkpointed(nn.Linear(4, 4), reentrant=reentrant)
    model, optimizer = network(nn.Linear(4, 4), block, nn.ReLU())
    with growing(model, optimizer, trial=trial, **by_hand("1.inner")) as grower:
        train(model, optimizer, 70, grower)
        assert is_run_to_a_verdict(grower)


def test_a_shadow_pass_checkpoints_to_the_same_gradients():
    """What is asked for in one is what a reentrant backward gives outside of it."""
    x = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(Bent(), reentrant=True))
    with shadow_pass(model):
        ours = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model(x).sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(ours, model.parameters(), strict=True))


# ---- frozen layers


def frozen(first, *middle):
    first.requires_grad_(False)
    return network(first, *middle)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blueprint", ["mlp-4x4-w32", "mlp-behind-4x4-w32"])
def test_a_kernel_is_grown_into_a_frozen_layer(blueprint, inplace):
    """What it gives gets a gradient in a pass beside the run, though no step has a use for one."""
    first = Bent() if "behind" in blueprint else nn.Linear(4, 4)
    model, optimizer = frozen(first, nn.ReLU(inplace=inplace))
    before = [p.clone() for p in model[0].parameters()]
    with growing(model, optimizer, **by_hand(blueprint=blueprint)) as grower:
        train(model, optimizer, 58, grower)
        assert "0" in {graft.site for graft in grower.report().grafts}
        assert is_run_to_a_verdict(grower) or grower.stages[0].stage.name == "HOLDING"
    host = [p for name, p in model[0].named_parameters() if "_seeds" not in name]
    assert all(torch.equal(a, b) for a, b in zip(before, host, strict=True))


def test_looking_at_a_frozen_layer_leaves_no_trace():
    """No parameter and no input has come to want a gradient, and none has one."""
    model, _ = frozen(nn.Identity(), nn.ReLU())
    x = torch.randn(8, 4)
    recorder = Recorder({"0": model[0]}, records_shadow_passes=True)
    with recorder:
        record_beside(recorder, model, lambda m, batch: m(batch).square().mean(), x)
    assert recorder.observations["0"].num_samples == 8
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


class Cut(nn.Module):
    """A block whose output takes no part in the loss's gradient."""

    def __init__(self, how):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.how = how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.inner(x)
        if self.how == "detached":
            return self.inner(x).detach()
        return x if self.how == "uncalled" else self.inner(x[0]).expand(len(x), 4)


REASONS = {
    "no_grad": "without gradients only",
    "detached": "no gradient of the loss reached",
    "uncalled": "it was not called",
    "one_row": "not one tensor each with a row a sample",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_site_that_cannot_be_recorded_says_why(how):
    """The note is about this layer, and not that it was not called where it was."""
    model, optimizer = network(nn.Linear(4, 4), Cut(how))
    policy = ByHand([("1.inner", "mlp-4x4-w32")])
    with growing(model, optimizer, policy=policy) as grower:
        train(model, optimizer, 20, grower)
        (note,) = [note for note in grower.report().notes if "1.inner" in note]
    assert REASONS[how] in note
    assert ("not called" in note) == (how == "uncalled")


# ---- hooks of the optimizer


def test_hooks_of_the_owner_run_at_every_step_of_a_growing_run():
    """Also those that were put on in the middle of it, behind ours."""
    model, optimizer = network(nn.Linear(4, 4), nn.ReLU())
    grower = growing(model, optimizer, **by_hand())
    ran = []
    for number, batch in enumerate(batches(100)):
        if number % 20 == 0:
            optimizer.register_step_post_hook(lambda *_, number=number: ran.append(number))
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=batch)
    assert len(ran) == 100 + 80 + 60 + 40 + 20
    assert is_run_to_a_verdict(grower)
    grower.close()


def test_a_grower_may_be_stepped_and_closed_in_a_hook():
    """An owner whose loop belongs to a framework has no other place to call it from."""
    model, optimizer = network(nn.Linear(4, 4), nn.ReLU())
    grower = growing(model, optimizer, **by_hand())
    now, ran = {}, []

    def after_step(*_):
        grower.step(now["loss"], batch=now["batch"])
        if grower.updates == 100:
            grower.close()

    optimizer.register_step_post_hook(after_step)
    optimizer.register_step_post_hook(lambda *_: ran.append(True))
    for batch in batches(100):
        now.update(batch=batch, loss=compute_loss(model, batch))
        optimizer.zero_grad()
        now["loss"].backward()
        optimizer.step()
    assert grower.updates == len(ran) == 100
    assert is_run_to_a_verdict(grower)
