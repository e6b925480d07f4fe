"""Passes beside the training fit into memory, and into a time; what they find does not change."""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from growing import SHORT, X, Y
from hypothesis import given, settings
from hypothesis import strategies as st
from short_memory import Limited, Memory
from torch import nn
from torch.nn import functional as F

import esper
from esper.contracts.events import BatchFitted
from esper.growth.evaluation import Evaluator
from esper.growth.grower import Grower
from esper.growth.live_step import LiveStep
from esper.growth.policies import EveryN, Never
from esper.growth.ranking import Candidate, rank_candidates
from esper.growth.recording import Recorder, record_beside
from esper.growth.twins import lockstep_update
from esper.observability.event_log import read_events
from esper.observability.replay import replay
from esper.seeds.fitting import Fits
from esper.seeds.sameness import are_alike, nudged
from esper.state.shortage import is_shortage
from esper.wrapping.wrap import layers, wrap

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
GATE = torch.randn(420, 4, generator=torch.Generator().manual_seed(1))
GATE_Y = GATE[:, 0] * GATE[:, 1] + GATE[:, 2] * GATE[:, 3]


def host(memory, *, dropout=0.0, norm=False, dtype=torch.float32, random_seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(random_seed)
        return nn.Sequential(
            Limited(memory),
            nn.Linear(4, 8),
            *([nn.BatchNorm1d(8)] if norm else []),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 1),
            nn.Flatten(0),
        ).to(dtype)


def mean(model, batch):
    return (model(batch["x"]) - batch["y"][0]).square().mean()


def total(model, batch):
    return (model(batch["x"]) - batch["y"][0]).square().sum()


def data(num, dtype=torch.float32, random_seed=3):
    """A nested batch, part of which belongs to all samples alike."""
    generator = torch.Generator().manual_seed(random_seed)
    x = torch.randn(num, 4, generator=generator, dtype=torch.float64).to(dtype)
    return {"x": x, "y": (x[:, 0] * x[:, 1] + x[:, 2], None), "weight": 1.0}


def told():
    """Return sizes to go by, what they tell, and what they leave."""
    sizes, left = [], []
    fits = Fits(tell=sizes.append, tell_left=lambda work, why: left.append((work, why)))
    return fits, sizes, left


def gradients(model, compute_loss, batches, fits, *, random_seed=0):
    """Return the gradients of one update of a twin, and the random state behind it."""
    kept = []

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.extend(p.grad.clone() for g in self.param_groups for p in g["params"])

    optimizer = Keep(model.parameters(), lr=0.1)
    with torch.random.fork_rng(), fits.in_use(undo=lambda: torch.manual_seed(random_seed)):
        torch.manual_seed(random_seed)  # as a twin puts its random state back
        update = lockstep_update(compute_loss)
        update(model, optimizer, batches, LiveStep(settings=[{"lr": 0.1}], loss_scale=1.0))
        return kept, torch.get_rng_state()


def apart(one, other):
    """Return how far two lists of tensors are apart, relative to the largest figure."""
    largest = max(float(t.abs().max()) for t in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


@settings(max_examples=15, deadline=None)
@given(
    num=st.integers(2, 40),
    most=st.integers(2, 12),
    num_batches=st.integers(1, 3),
    compute_loss=st.sampled_from([mean, total]),
    dropout=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_micro_batches_add_up_to_the_update(num, most, num_batches, compute_loss, dropout, dtype):
    """Of means and sums, of several batches, with the same masks, whatever the size."""
    whole, parts = Memory(), Memory(most)
    batches = [data(num, dtype, random_seed=i) for i in range(num_batches)]
    fits, _, left = told()
    one, after = gradients(host(whole, dropout=dropout, dtype=dtype), compute_loss, batches, fits)
    fits, sizes, left = told()
    other, behind = gradients(
        host(parts, dropout=dropout, dtype=dtype), compute_loss, batches, fits
    )
    assert left == []
    assert apart(one, other) <= TOLERANCE[dtype]
    assert torch.equal(after, behind)
    assert [(size.samples, size.why) for size in sizes] == ([(num, "memory")] if num > most else [])


class Attending(nn.Module):
    """A block of attention, with dropout in it or behind it, over sequences."""

    def __init__(self, memory, dropout, *, inside):
        super().__init__()
        self.limited = Limited(memory)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.block.self_attn.dropout = dropout if inside else 0.0
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(self.limited(x)))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_attention_with_dropout_draws_in_parts_what_it_draws_at_once(inside, dtype):
    """Of heads, and of tensors that lie transposed; with numbers that all samples share."""
    x, y = torch.randn(20, 5, 8, dtype=dtype), torch.randint(3, (20, 5))

    def compute_loss(model, batch):
        inputs, num_items, steps = batch
        logits = model(inputs["x"]).flatten(0, 1)
        losses = F.cross_entropy(logits, inputs["labels"].flatten(), reduction="sum")
        return losses / num_items * steps

    found = []
    for memory in (Memory(), Memory(7)):
        torch.manual_seed(0)
        model = Attending(memory, 0.3, inside=inside).to(dtype)
        batch = ({"x": x, "labels": y}, torch.tensor(100), 1)
        fits, sizes, left = told()
        found.append(gradients(model, compute_loss, [batch], fits))
    (whole, after), (parts, behind) = found
    assert (left, [s.size for s in sizes]) == ([], [5])
    assert apart(whole, parts) <= TOLERANCE[dtype]
    assert torch.equal(after, behind)


def test_where_all_fits_an_update_is_what_it_was():
    """Bit for bit, in one forward of the very batch that was given."""
    memory, given = Memory(), []
    model, batch = host(memory, dropout=0.3), data(24)

    def compute_loss(model, batch):
        given.append(batch)
        return mean(model, batch)

    found, behind = gradients(model, compute_loss, [batch], Fits())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.autograd.grad(mean(model, batch), list(model.parameters()))
        after = torch.get_rng_state()
    assert all(map(torch.equal, found, expected))
    assert torch.equal(behind, after)
    assert given == [batch]
    assert given[0] is batch


def test_without_smaller_sizes_the_update_fails():
    """The control: where nothing may be cut, the lack of memory reaches the caller."""
    fits = Fits(off="for this test")
    with pytest.raises(torch.OutOfMemoryError):
        gradients(host(Memory(8)), mean, [data(24)], fits)


def test_a_size_is_found_once_and_remembered_for_device_and_shapes():
    """Later batches of the shapes, and smaller ones, are cut at once; other shapes are tried."""
    memory = Memory(6)
    model, (fits, sizes, _) = host(memory), told()
    gradients(model, mean, [data(24)], fits)
    assert (memory.num_short > 0, [size.size for size in sizes]) == (True, [6])
    memory.num_short = 0
    gradients(model, mean, [data(24, random_seed=5)], fits)
    gradients(model, mean, [data(20)], fits)
    gradients(model, mean, [data(5)], fits)
    assert (memory.num_short, len(sizes)) == (0, 1)
    assert max(memory.sizes) <= 6


def contrastive(model, batch):
    """A loss in which each sample is held against the others."""
    out = model(batch["x"])
    return (out[:, None] - out[None]).square().mean()


def by_tokens(model, batch):
    """The mean over what counts, of which samples have more or less."""
    counts = (batch["x"][:, 0] > 0).float() + 0.1
    return (model(batch["x"]) * counts).sum() / counts.sum()


class Counting(nn.Module):
    """Keeps how often it was called, as a schedule in a model does."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return x


def of_many(model, batch):
    """A loss that a few samples do not have."""
    if len(batch["x"]) < 4:
        raise ValueError("so few samples")
    return mean(model, batch)


def of_pairs(model, batch):
    """A loss that a single sample does not have, as of code that squeezes its axis away."""
    if len(batch["x"]) < 2:
        raise ValueError("a single sample")
    return mean(model, batch)


@pytest.mark.parametrize(("num", "most", "size"), [(24, 8, 6), (30, 15, 15), (24, 3, None)])
def test_parts_are_pairs_where_a_single_sample_cannot_be_taken(num, most, size):
    """It is measured with two samples where it raises with one, if four fit at once."""
    batch, (fits, sizes, left) = data(num), told()
    whole, _ = gradients(host(Memory()), of_pairs, [batch], Fits())
    memory = Memory(most)
    if size is None:
        with pytest.raises(torch.OutOfMemoryError):
            gradients(host(memory), of_pairs, [batch], fits)
        return
    parts, _ = gradients(host(memory), of_pairs, [batch], fits)
    assert (left, [s.size for s in sizes]) == ([], [size])
    assert apart(whole, parts) <= 1e-6


class DrawingElsewhere(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5))


@pytest.mark.parametrize(
    ("change", "compute_loss", "words"),
    [
        (lambda m: m, contrastive, "depends on the others of the batch"),
        (lambda m: m, by_tokens, "weighs them otherwise"),
        (lambda m: m, of_many, "cannot be made of a few samples alone.*so few samples"),
        (lambda m: m.append(Counting()), mean, "a forward changes 6.num_calls"),
        (lambda m: m.append(DrawingElsewhere()), mean, "random numbers"),
    ],
)
def test_what_looks_at_the_batch_is_left_whole_and_that_is_said_once(change, compute_loss, words):
    """It is measured, not told by a class; the lack of memory reaches who can give up the trial."""
    memory = Memory(8)
    model, (fits, sizes, left) = change(host(memory)), told()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="24 samples do not fit"):
            gradients(model, compute_loss, [data(24)], fits)
    assert [work for work, _ in left] == ["trial"]
    assert re.search(words, left[0][1])
    assert sizes == []


def test_a_batch_norm_in_training_is_left_whole_and_in_evaluation_is_cut():
    """Its name is in the words; no pass is made to find that out."""
    memory, batch = Memory(8), data(24)
    model, (fits, _, left) = host(memory, norm=True), told()
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model, mean, [batch], fits)
    assert left == [("trial", "2 is a batch norm in training mode")]
    assert memory.sizes == []
    model.eval()
    fits, sizes, left = told()
    assert gradients(model, mean, [batch], fits)
    assert (left, sizes[0].size) == ([], 6)


@pytest.mark.parametrize(
    ("also", "words"),
    [
        ({"names": ["a"] * 24}, "is a str"),
        ({"other": torch.zeros(7)}, "ragged"),
    ],
)
def test_batches_that_cannot_be_cut_are_left_whole(also, words):
    """What is ragged, or holds what is no tensor, says so."""
    fits, _, left = told()
    with pytest.raises(torch.OutOfMemoryError):
        gradients(host(Memory(8)), mean, [{**data(24), **also}], fits)
    assert len(left) == 1
    assert words in left[0][1]


def test_a_batch_that_weighs_otherwise_is_found_later():
    """Whether parts add up is measured again after 1, 2, 4 and more updates."""
    fits, _, left = told()

    def compute_loss(model, batch):
        weight = batch["weight_of_each"]
        return (model(batch["x"]) * weight).sum() / weight.sum()

    model = host(Memory(8))
    update = lockstep_update(compute_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = LiveStep(settings=[])
    alike = {"x": data(24)["x"], "weight_of_each": torch.ones(24)}
    unlike = {**alike, "weight_of_each": torch.arange(24.0)}
    with fits.in_use():
        update(model, optimizer, [alike], step)
        with pytest.raises(torch.OutOfMemoryError):
            update(model, optimizer, [unlike], step)
    assert "weighs them otherwise" in left[0][1]


# ---- evaluation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_a_loader_keep_their_order_and_values(dtype):
    """Batches that do not fit are read in parts; the last, smaller one as well."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (50,), generator=generator)
    loader = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 50, 16)]
    memory = Memory()
    model = nn.Sequential(Limited(memory), nn.Linear(4, 3)).to(dtype).eval()
    evaluate = esper.evaluate_on(loader)
    whole = evaluate(model)
    memory.most = 5
    fits, sizes, left = told()
    with fits.in_use():
        parts, again = evaluate(model), evaluate(model)
    assert left == []
    assert [(s.work, s.samples, s.size) for s in sizes] == [("evaluation", 16, 4)]
    assert apart([whole], [parts]) <= 1e-6  # evaluate_on gives float32
    assert torch.equal(parts, again)
    with pytest.raises(torch.OutOfMemoryError), Fits(off="for this test").in_use():
        evaluate(model)


def test_a_measure_of_ones_own_fits_by_calls_of_the_model():
    """Per-sample losses are those of the whole, whatever else the function does."""
    memory = Memory()
    model = host(memory, norm=True, dropout=0.5)
    measure = Evaluator(lambda model: (model(GATE) - GATE_Y).square())
    whole = measure(model).per_sample
    memory.most, state = 100, torch.get_rng_state()
    fits, sizes, left = told()
    with fits.in_use():
        parts, again = measure(model).per_sample, measure(model).per_sample
    assert left == []
    assert [(s.work, s.samples, s.size) for s in sizes] == [("evaluation", 420, 52)]
    assert abs(whole - parts).max() <= 1e-6 * abs(whole).max()
    assert (parts == again).all()
    assert "forward" not in vars(model)
    assert torch.equal(state, torch.get_rng_state())


def test_a_measure_that_looks_at_the_batch_is_left_whole():
    """A model that centres its outputs over the batch gives other losses in parts."""

    class Centred(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            return out - out.mean()

    memory = Memory(100)
    model = Centred(Limited(memory), nn.Linear(4, 1), nn.Flatten(0))
    measure = Evaluator(lambda model: (model(GATE) - GATE_Y).square())
    fits, _, left = told()
    with fits.in_use(), pytest.raises(torch.OutOfMemoryError):
        measure(model)
    assert "depends on the others" in left[0][1]


# ---- ranking and suggestions


def recorded(memory, *, fits, compute_loss=mean, dropout=0.0, dtype=torch.float32):
    model = wrap(host(memory, dropout=dropout, dtype=dtype))
    recorder = Recorder(layers(model), records_shadow_passes=True)
    with recorder, fits.in_use(), torch.random.fork_rng():
        torch.manual_seed(0)
        for i in range(3):
            record_beside(recorder, model, compute_loss, data(60, dtype, random_seed=i))
    return recorder.observations


@pytest.mark.parametrize(
    ("compute_loss", "dropout", "dtype"),
    [(mean, 0.4, torch.float64), (total, 0.4, torch.float32), (mean, 0.0, torch.float32)],
)
def test_what_a_ranking_looks_at_does_not_depend_on_the_size(compute_loss, dropout, dtype):
    """The same samples are drawn, and their gradients are those of the whole batch."""
    options = {"compute_loss": compute_loss, "dropout": dropout, "dtype": dtype}
    whole = recorded(Memory(), fits=Fits(), **options)
    fits, sizes, left = told()
    parts = recorded(Memory(13), fits=fits, **options)
    assert (left, [s.size for s in sizes]) == ([], [7])
    for name, seen in whole.items():
        for kind in ("inputs", "outputs", "gradients"):
            one, other = getattr(seen, kind), getattr(parts[name], kind)
            assert len(one) == 3
            assert apart(one, other) <= TOLERANCE[dtype]


def test_a_pass_that_fails_leaves_nothing_recorded():
    """The control: where it is left whole, what its first layers gave is not kept either."""
    fits, _, left = told()
    with pytest.raises(torch.OutOfMemoryError):
        recorded(Memory(13), fits=fits, compute_loss=contrastive)
    assert left


def test_a_kernel_that_is_short_of_memory_is_scored_in_parts():
    """Its features are those of one run over all samples; without parts it gets no score."""
    observations = recorded(Memory(), fits=Fits())
    site, seen = next(iter(observations.items()))
    memory = Memory()
    kernel = nn.Sequential(Limited(memory), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))
    nn.init.zeros_(kernel[3].weight)
    candidate = Candidate(
        site=site,
        blueprint="limited",
        kernel=kernel,
        zeroed="3.weight",
        position="parallel",
        parameters=1,
    )
    (whole,) = rank_candidates({site: seen}, [candidate])
    memory.most = 20
    fits, sizes, _ = told()
    with fits.in_use():
        (parts,) = rank_candidates({site: seen}, [candidate])
    with Fits(off="for this test").in_use():
        (none,) = rank_candidates({site: seen}, [candidate])
    assert parts.gain == pytest.approx(whole.gain, rel=1e-6)
    assert parts.stderr == pytest.approx(whole.stderr, rel=1e-6)
    assert [s.size for s in sizes] == [12]
    assert none.gain is None
    assert "too little memory" in none.reason


def test_a_probe_is_made_of_as_many_samples_as_fit():
    """A kernel is let in by fewer of them; by hand as well."""
    memory = Memory(4)
    (layer,) = layers(wrap(nn.Sequential(nn.Linear(4, 8)))).values()
    kernel = nn.Sequential(Limited(memory), nn.Linear(4, 8))
    fits, sizes, _ = told()
    with fits.in_use():
        layer.graft(0, kernel, alpha=0.5, example=torch.randn(32, 4))
    assert [(s.work, s.samples, s.size) for s in sizes] == [("probe", 32, 4)]
    other = nn.Sequential(Limited(memory), nn.Linear(4, 8))
    with pytest.raises(torch.OutOfMemoryError), Fits(off="for this test").in_use():
        layer.graft(0, other, alpha=0.5, example=torch.randn(32, 4))


def test_a_kernel_without_memory_is_no_fault_where_fewer_samples_fit():
    """In a twin the fence does not take its share away: the update is made in parts."""
    memory = Memory()
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)))
    kernel = nn.Sequential(Limited(memory), nn.Linear(4, 8))
    layers(model)["0"].graft(0, kernel, alpha=0.5, example=torch.randn(4, 4))
    whole, _ = gradients(model, mean, [data(24)], Fits())
    memory.most = 8
    fits, sizes, left = told()
    parts, _ = gradients(model, mean, [data(24)], fits)
    assert (left, [s.size for s in sizes]) == ([], [6])
    assert apart(whole, parts) <= 1e-6
    assert any(float(g.abs().max()) > 0 for g in parts)


# ---- whole runs


def run_with(memory, *, num=90, dropout=0.0, seen=None, least_in_trial=None, **options):
    """Train with a Grower, or without; return the model, the report and the Grower."""
    model = esper.wrap(host(memory, dropout=dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def mean_loss(model, rows):
        return (model(X[rows]) - Y[rows]).square().mean()

    def measure(model):
        return (model(GATE) - GATE_Y).square()

    compute_loss = options.pop("compute_loss", mean_loss)
    defaults = {"compute_loss": compute_loss, "evaluate": measure, "policy": EveryN(10), **SHORT}
    grower = Grower(model, optimizer, **{**defaults, **options})
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    with grower:
        for _ in range(num):
            rows = torch.randint(len(X), (32,), generator=generator)
            with memory.live():
                loss = compute_loss(model, rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            memory.most = least_in_trial if grower.stages and least_in_trial else memory.most
            grower.step(loss, batch=rows)
            if seen is not None:
                seen.append([p.detach().clone() for p in model.parameters()])
    return model, grower.report(), grower


def figures(report):
    """Return what a run has come to, as far as equal runs agree."""
    trials = [(t.sites, t.blueprints, t.verdict, t.taken, t.samples) for t in report.trials]
    return trials, [e.update for e in report.evaluations]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run that is short of memory from its first update on: its report and its Grower."""
    _, report, grower = run_with(Memory(10), run_dir=tmp_path_factory.mktemp("short") / "run")
    return report, grower


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)

    def sizes(self):
        return [event for event in self.events if isinstance(event, BatchFitted)]


@pytest.mark.slow
def test_a_run_that_is_short_of_memory_comes_to_what_one_with_enough_comes_to(short_run):
    """The same verdicts; each size is told once, stands in the log, and a replay reads it.

    The control: nothing is said, logged or cut where memory is enough.
    """
    memory, sink = Memory(), Kept()
    _, plenty, _ = run_with(memory, sink=sink)
    assert sink.sizes() == []
    assert set(memory.sizes) >= {32, 420}
    short, grower = short_run
    assert plenty.trials[0].effect is not None
    assert figures(short) == figures(plenty)
    for one, other in zip(plenty.trials, short.trials, strict=True):
        if one.effect is None:  # the run ended before its verdict
            continue
        assert other.effect == pytest.approx(one.effect, rel=0.05)
        assert other.z == pytest.approx(one.z, rel=0.05)
    events = read_events(grower.run_dir / "events.jsonl")
    chosen = [(e.work, e.samples, e.size, e.why) for e in events if isinstance(e, BatchFitted)]
    assert chosen == [
        ("ranking", 32, 8, "memory"),
        ("trial", 32, 8, "memory"),
        ("evaluation", 420, 6, "memory"),
    ]
    said = [note for note in short.notes if "did not fit into its memory" in note]
    assert len(said) == 3
    assert replay(events).report.notes == short.notes


@pytest.mark.slow
def test_the_live_run_does_not_notice_that_memory_is_short():
    """Bit for bit the run without growth, with its draws, while a trial is cut up."""
    alone, beside = [], []
    run_with(Memory(), num=60, dropout=0.3, seen=alone, policy=Never())
    memory = Memory(10)
    run_with(memory, num=60, dropout=0.3, seen=beside)
    assert memory.num_short
    for one, other in zip(alone[:60], beside, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.slow
def test_a_trial_of_a_model_that_looks_at_the_batch_is_given_up_and_the_run_goes_on():
    """Said once; the live run is untouched, and no try is spent."""

    def compute_loss(model, rows):
        out = model(X[rows])
        return (out - Y[rows]).square().mean() + 0.01 * out.std()

    with pytest.warns(UserWarning, match="the trial of package 1 was given up"):
        _, report, _ = run_with(Memory(), num=20, compute_loss=compute_loss, least_in_trial=30)
    assert report.trials[0].verdict == "refused"
    assert "32 samples do not fit" in report.trials[0].reason
    assert sum("for trial are left whole" in note for note in report.notes) == 1
    assert report.updates == 20


# ---- a clock


class Ticking:
    """A clock by which each look costs as much as the samples since the last one."""

    def __init__(self, memory):
        self._memory = memory

    def now(self):
        return 1e-3 * sum(self._memory.sizes)


def test_a_pass_that_takes_too_long_is_made_in_parts_from_then_on():
    """After two passes, of which the first may warm up; the figures stay."""
    memory = Memory()
    model, sizes = host(memory), []
    fits = Fits(Ticking(memory), pass_s=0.01, tell=sizes.append)
    found = [gradients(model, mean, [data(32)], fits)[0] for _ in range(3)]
    assert [(s.size, s.why) for s in sizes] == [(8, "time")]
    assert memory.sizes[:2] == [32, 32]
    assert memory.sizes[-4:] == [8, 8, 8, 8]
    assert apart(found[0], found[2]) <= 1e-6


def test_no_clock_is_read_where_no_time_is_given():
    """So that a run decides by its FLOPs alone."""

    class Broken:
        def now(self):
            raise AssertionError

    assert gradients(host(Memory(8)), mean, [data(32)], Fits(Broken()))


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["twin", pytest.param("shadow", marks=pytest.mark.torture)])
def test_a_run_that_is_short_of_time_comes_to_what_one_with_time_comes_to(trial):
    """Each pass of trials takes at most what it may; what was chosen is in the log."""
    sink, memory = Kept(), Memory()
    options = {"trial": trial, "num": 110}
    _, plenty, _ = run_with(Memory(), **options)
    _, short, _ = run_with(memory, clock=Ticking(memory), pass_s=0.01, sink=sink, **options)
    assert figures(short) == figures(plenty)
    chosen = {e.work: (e.size, e.why) for e in sink.sizes()}
    assert chosen["trial"] == (8, "time")
    assert chosen["evaluation"] == (6, "time")


@pytest.mark.slow
def test_an_audition_that_does_not_fit_is_given_up_and_the_run_goes_on():
    """What cannot be cut ends the try, and not the training."""
    memory = Memory()

    def compute_loss(model, rows):
        out = model(X[rows])
        return (out - Y[rows]).square().mean() + 0.01 * out.std()

    with pytest.warns(UserWarning, match="an audition was given up"):
        _, report, _ = run_with(
            memory, num=30, trial="shadow", compute_loss=compute_loss, least_in_trial=30
        )
    assert report.updates == 30
    assert "32 samples do not fit" in report.grafts[0].reason


@pytest.mark.slow
def test_auditions_and_suggestions_fit_as_well():
    """The same table, and the same verdict of a kernel that learns in shadow passes."""
    _, plenty, grower = run_with(Memory(), trial="shadow", num=110)
    expected = grower.suggest()
    _, short, grower = run_with(Memory(10), trial="shadow", num=110)
    found = grower.suggest()
    ends = [[(g.site, g.blueprint, g.verdict) for g in r.grafts] for r in (plenty, short)]
    assert ends[0] == ends[1]
    assert len(ends[0]) > 0
    by_name = {(row.site, row.blueprint): row for row in expected}
    for row in found:
        other = by_name[row.site, row.blueprint]
        assert (row.gain is None) is (other.gain is None)
        if row.gain is not None:
            assert row.gain == pytest.approx(other.gain, rel=1e-2, abs=1e-5)


# ---- replay, resume, ranks


@pytest.mark.slow
def test_a_run_takes_the_sizes_of_another_from_its_log(short_run):
    """Where they were chosen; with all the memory it needs, it comes to the same bits."""
    first, grower = short_run
    memory = Memory()
    _, second, _ = run_with(memory, fit_like=grower.run_dir)
    assert figures(first) == figures(second)
    assert [t.effect for t in first.trials] == [t.effect for t in second.trials]
    assert [e.gate_loss for e in first.evaluations] == [e.gate_loss for e in second.evaluations]
    assert max(memory.sizes) <= 10
    assert memory.num_short == 0


def test_a_resumed_run_goes_by_the_sizes_that_were_saved():
    """They are part of the Grower's state, as plain values; states of before have none."""
    _, _, grower = run_with(Memory(10), num=4, policy=Never())
    state = grower.state_dict()
    assert sorted(state["sizes"].values()) == [6, 8]
    older = {name: part for name, part in state.items() if name != "sizes"}
    for saved, largest in ((state, 8), (older, 420)):
        memory = Memory()
        model = esper.wrap(host(memory))
        resumed = Grower(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            compute_loss=mean,
            evaluate=lambda model: (model(GATE) - GATE_Y).square(),
            **{**SHORT, "policy": Never()},
        )
        with resumed:
            resumed.load_state_dict(saved)
            resumed._run.measure()
        assert max(memory.sizes) <= largest
        assert max(memory.sizes) > largest // 2


def test_of_two_sizes_the_smaller_one_stands():
    """As ranks agree on the smallest of all."""
    one, other = Fits(), Fits()
    one.take({"a": 8, "b": 4})
    other.take({"a": 2, "c": 1})
    for fits in (one, other):
        for sizes in ({"a": 8, "b": 4}, {"a": 2, "c": 1}):
            fits.take(sizes)
        assert fits.state_dict() == {"a": 2, "b": 4, "c": 1}


# ---- what a lack of memory is


def test_the_allocator_of_the_cpu_is_understood():
    """It raises a RuntimeError with words of its own; others are none of it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 48, dtype=torch.float64)
    assert is_shortage(caught.value)
    assert is_shortage(MemoryError())
    assert is_shortage(torch.OutOfMemoryError())
    assert not is_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_shortage(ValueError("out of memory"))


def test_weights_that_were_moved_by_their_last_bit_are_put_back():
    """To the bit, also where what is looked at raises."""
    model = host(Memory())
    before = [p.detach().clone() for p in model.parameters()]
    moved = []

    def look():
        with nudged(model, 1.2e-7):
            moved.extend(p.detach().clone() for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert not any(map(torch.equal, moved, before))
    assert apart(before, moved) <= 2.5e-7
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("noise", [0.0, 3e-6, 1e-3])
def test_what_is_left_of_large_terms_may_differ_as_much_as_rounding_makes_it(noise):
    """A residual of a hundredth of its terms; what is more than rounding is not allowed."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 0.7)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    target = (model(x) * (1 + 1e-2 * torch.sin(x[:, :1] * 9))).detach()

    def figures():
        return [[model(x) - target]]

    whole = figures()
    parts = [[whole[0][0] + noise * whole[0][0].abs().max() * torch.cos(x[:, :1] * 7)]]
    assert are_alike(model, (whole, parts), torch.float32, figures) is (noise < 1e-4)
    assert not are_alike(model, (whole, [[parts[0][0][:5]]]), torch.float32, figures)


@pytest.mark.parametrize(("moved_by", "is_alike"), [((0.0, 1e-6), True), ((0.0,), False)])
def test_rounding_that_happens_to_cancel_out_once_is_looked_at_again(moved_by, is_alike):
    """Weights are moved in several ways; where no way moves a figure, no more is allowed."""
    model, whole, ways = nn.Linear(4, 1), [[torch.ones(3)]], itertools.cycle(moved_by)
    found = are_alike(
        model,
        (whole, [[torch.ones(3) + 2e-6]]),
        torch.float32,
        lambda: [[torch.ones(3) + next(ways)]],
    )
    assert found is is_alike


@pytest.mark.torture
def test_a_real_process_that_is_short_of_memory():
    """An update that the allocator of the CPU refuses is made in parts; the control is refused."""
    script = Path(__file__).parents[1] / "support" / "limited_process.py"
    command = [sys.executable, str(script)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "allocate memory" in found["control"]
    assert found["left"] == []
    assert found["sizes"][0] < 1 << 13
    assert found["apart"] <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_that_is_short_of_memory():
    """An update whose activations are larger than what the process may take is made in parts."""
    layers_of = [part for _ in range(4) for part in (nn.Linear(1024, 1024), nn.Tanh())]
    model = nn.Sequential(*layers_of, nn.Linear(1024, 1)).double().cuda()
    x = torch.randn(1 << 15, 1024, device="cuda", dtype=torch.float64)

    def compute_loss(model, x):
        return model(x).square().mean()

    whole, _ = gradients(model, compute_loss, [x], Fits())
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 30)
    fits, sizes, left = told()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total_bytes)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, compute_loss, [x], Fits(off="for this test"))
        gc.collect()
        torch.cuda.empty_cache()
        parts, _ = gradients(model, compute_loss, [x], fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert left == []
    assert sizes[0].size < len(x)
    assert apart(whole, parts) <= 1e-12
