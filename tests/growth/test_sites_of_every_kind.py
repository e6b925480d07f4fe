"""What the Grower needs of a site that is no linear layer: a record, a ranking, candidates."""

import pytest
import torch
from growing import SHORT
from torch import nn

import esper
from esper.contracts.events import Noted, Ranked
from esper.contracts.site import SiteSpec
from esper.growth.causality import is_causal
from esper.growth.recording import Recorder


class Sequences(nn.Module):
    """Tokens, an encoder layer, a recurrent one, a norm, a readout; (N, 5) to (N, 3)."""

    def __init__(self, *, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.rnn = nn.GRU(8, 8, batch_first=batch_first)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, tokens, *, mask=None):
        x = self.embed(tokens if self.batch_first else tokens.T)
        y = self.encoder(x, src_mask=mask)
        y, _ = self.rnn(y)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(self.norm(y.transpose(1, 2)).mean(-1))


def tokens(num, random_seed=0):
    return torch.randint(9, (num, 5), generator=torch.Generator().manual_seed(random_seed))


def recorded(model, sites):
    """Train nothing, record a few steps, return the observations."""
    layers = esper.layers(model)
    with Recorder({name: layers[name] for name in sites}) as recorder:
        for step in range(4):
            loss = model(tokens(32, step)).square().mean()
            loss.backward()
    return recorder.observations


SITES = ["embed", "encoder", "encoder.self_attn", "encoder.norm1", "rnn", "norm", "head"]


def wrapped(**options):
    torch.manual_seed(0)
    model = Sequences(**options)
    return esper.wrap(model, select=SITES)


def test_every_kind_of_site_is_recorded():
    """Integers in, a tuple out, keywords: input, output and gradient are kept by samples."""
    for name, seen in recorded(wrapped(), SITES).items():
        assert seen.num_samples == 128, name
        assert all(len(x) == len(h) == 32 for x, h in zip(seen.inputs, seen.outputs, strict=True))
        assert all(g.shape == h.shape for g, h in zip(seen.gradients, seen.outputs, strict=True))


def test_an_attention_is_recorded_with_its_whole_call():
    """Kernels are probed with query, key, value and keywords; one argument needs no such record."""
    seen = recorded(wrapped(), SITES)
    call = seen["encoder.self_attn"].example
    assert len(call.args) == 3
    assert "need_weights" in call.kwargs
    assert seen["head"].call is None


def test_samples_of_an_attention_with_the_length_first_are_its_columns():
    """The batch is the second axis there; what is kept has it first."""
    seen = recorded(wrapped(batch_first=False), ["encoder.self_attn"])["encoder.self_attn"]
    assert seen.inputs[0].shape == (32, 5, 8)
    assert seen.num_samples == 128


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_a_layer_that_looks_ahead_is_told_from_one_that_does_not(looks_ahead):
    """By a mask that only the caller knows; a layer by positions counts as causal."""
    model = wrapped()
    mask = None if looks_ahead else nn.Transformer.generate_square_subsequent_mask(5)
    seen = esper.layers(model)["encoder"]
    with Recorder({"encoder": seen}) as recorder:
        model(tokens(32), mask=mask).sum().backward()
    assert is_causal(seen, recorder.observations["encoder"].example) != looks_ahead
    assert is_causal(esper.layers(model)["head"], torch.randn(2, 5, 8))


def grower_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return optimizer, esper.Grower(
        model,
        optimizer,
        compute_loss=lambda model, batch: model(batch).square().mean(),
        evaluate=lambda model: model(tokens(300, 7)).square().mean(1),
        budget=esper.Budget(parameters=5.0, flops=50.0, latency=None),
        **SHORT,
    )


def test_the_grower_ranks_kernels_at_every_kind_of_site():
    """There are rows for attention, norms and the block, depth among them; none for the table."""
    model = wrapped()
    optimizer, grower = grower_of(model)
    for step in range(30):
        batch = tokens(32, step)
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step(loss, batch=batch)
    rows = grower.suggest()
    grower.close()
    assert {row.site for row in rows} == {*SITES} - {"embed"}
    depth = [row for row in rows if row.blueprint.startswith("block-")]
    assert {row.site for row in depth} == {"encoder", "rnn"}
    assert {row.site for row in depth if "causal" in row.blueprint} == {"rnn"}
    assert all(row.gain is not None for row in rows)


def test_a_layer_that_cannot_be_run_again_counts_as_causal_and_is_named():
    """Nothing fails, kernels that look ahead are not offered there, and the owner is told why."""
    model = wrapped()
    optimizer, grower = grower_of(model)

    def fail(*_args):
        if esper.in_shadow_pass() and not torch.is_grad_enabled():
            raise RuntimeError("only once")

    model.encoder.dropout.register_forward_hook(fail)
    loss = model(tokens(32)).square().mean()
    loss.backward()
    optimizer.step()
    grower.step(batch=tokens(32))
    rows = grower.suggest()
    blocks = [row.blueprint for row in rows if row.site == "encoder" and "block-" in row.blueprint]
    assert blocks
    assert all(name.endswith("-causal") for name in blocks)
    (note,) = [note for note in grower.report().notes if "could not be run again" in note]
    assert note.startswith("encoder could not")
    assert note.endswith("RuntimeError: only once")
    grower.close()


class Unequal(nn.Sequential):
    """A convolution that pads more behind than before, and a readout; (N, 3, 4, 4) to (N, 2)."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 2, padding="same"), nn.Flatten(), nn.Linear(64, 2))


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


def trained(policy):
    """Train a model with a site that cannot be described; return the model and the events."""
    model, kept = esper.wrap(Unequal()), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def loss_of(model, x):
        return model(x).square().mean(1)

    with esper.Grower(
        model,
        optimizer,
        policy=policy,
        compute_loss=lambda model, x: loss_of(model, x).mean(),
        evaluate=lambda model: loss_of(model, torch.ones(300, 3, 4, 4)),
        sink=kept,
        **SHORT,
    ) as grower:
        for _ in range(12):
            x = torch.randn(16, 3, 4, 4, generator=generator)
            optimizer.zero_grad()
            loss = loss_of(model, x).mean()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=x)
    return model, kept.events


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch says so once
def test_a_site_that_cannot_be_described_is_in_the_ranking_as_refused():
    """With its reason, and the other sites are ranked."""
    _, events = trained(esper.EveryN(3))
    (ranked, *_) = [event for event in events if isinstance(event, Ranked)]
    (row,) = [row for row in ranked.refused if row["site"] == "0"]
    assert row["blueprint"] == ""
    assert "pads unequally" in row["reason"]
    assert {row["site"] for row in ranked.rows} <= {"2"}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch says so once
@pytest.mark.parametrize("site", ["0", "2"])
def test_what_cannot_germinate_by_hand_is_said_and_training_goes_on(site):
    """A site that cannot be described; a blueprint for another width."""
    other = SiteSpec(kind="linear", in_features=5, out_features=5)
    wrong = esper.default_catalog().blueprints_for(other)[0]
    _, events = trained(esper.ByHand([(site, "any" if site == "0" else wrong)]))
    words = "pads unequally" if site == "0" else "was refused"
    assert any(isinstance(e, Noted) and site in e.text and words in e.text for e in events)
