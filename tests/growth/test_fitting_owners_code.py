"""Owners' losses and measures meet passes in parts: nothing of theirs is counted twice or lost."""

import copy
import itertools

import pytest
import torch
from short_memory import Limited, Memory
from torch import nn
from torch.nn import functional as F

import esper
from esper.growth.evaluation import Evaluator
from esper.growth.live_step import LiveStep
from esper.growth.recording import Recorder, record_beside
from esper.growth.twins import lockstep_update
from esper.seeds.fitting import Fits
from esper.seeds.sameness import are_alike
from esper.state.set_aside import Apart
from esper.state.shortage import is_shortage
from esper.wrapping.wrap import layers, wrap

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Ticking:
    """A clock by which each look costs as much as the samples since the last one."""

    def __init__(self, memory):
        self._memory = memory

    def now(self):
        return 1e-3 * sum(self._memory.sizes)


def host(memory, *more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Limited(memory), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), *more)


def told(**options):
    """Return sizes to go by, what they tell, and what they leave."""
    sizes, left = [], []
    tell_left = lambda work, why: left.append((work, why))  # noqa: E731 - of one line
    return Fits(tell=sizes.append, tell_left=tell_left, **options), sizes, left


def mean(model, x):
    return model(x).square().mean()


def gradients(model, compute_loss, batches, fits, *, undo=None):
    """Return the gradients of one update of a twin."""
    kept = []

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.extend(p.grad.clone() for g in self.param_groups for p in g["params"])

    optimizer = Keep(model.parameters(), lr=0.1)
    with fits.in_use(undo=undo):
        lockstep_update(compute_loss)(model, optimizer, batches, LiveStep(settings=[{"lr": 0.1}]))
    return kept


def apart(one, other):
    """Return how far two lists of tensors are apart, relative to the largest figure."""
    largest = max(float(t.abs().max()) for t in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


# ---- losses


def by_calls():
    """Return a loss whose weight falls from call to call, and where it keeps their number."""
    kept = {"calls": 0}

    def compute_loss(model, x):
        kept["calls"] += 1
        return mean(model, x) / kept["calls"]

    return compute_loss, kept


def test_a_loss_that_counts_its_calls_counts_an_update_once():
    """Each part sees the count that the first one saw: the whole is one call."""
    whole = [gradients(host(Memory()), by_calls()[0], [X], Fits()) for _ in range(3)]
    memory, (compute_loss, kept) = Memory(), by_calls()
    model, (fits, sizes, left) = host(memory), told(clock=Ticking(memory), pass_s=0.01)
    parts = []
    for calls in range(3):
        kept["calls"] = 0
        parts = gradients(model, compute_loss, [X], fits)
        assert kept["calls"] == 1, calls
    assert (left, [s.size for s in sizes]) == ([], [8])
    assert apart(whole[0], parts) <= 1e-6


@pytest.mark.parametrize("takes_back", [True, False])
def test_what_a_pass_without_memory_has_counted_is_taken_back(takes_back):
    """As a twin does it; the control counts the passes that did not fit as well."""
    kept, counter, number, model = {"calls": 0}, itertools.count(), 0, host(Memory(8))

    def compute_loss(model, x):
        nonlocal number
        kept["calls"] += 1
        number += 1
        next(counter)
        return mean(model, x)

    def found():
        return kept["calls"], number, int(repr(counter)[6:-1])

    fits, sizes, _ = told()
    copies = Apart(model, (compute_loss,))
    with copies.inside([X]) as back:
        gradients(model, compute_loss, [X], fits, undo=back if takes_back else None)
        assert (found() == (1, 1, 1)) is takes_back
    assert found() == (0, 0, 0)
    with copies.inside([X]):
        assert (found() == (1, 1, 1)) is takes_back
    assert [s.size for s in sizes] == [8]


def test_batches_of_one_update_may_be_of_several_sizes():
    """As the last one of an epoch is."""
    batches = [X[:24], X[24:29], X[29:50]]
    whole = gradients(host(Memory()), mean, batches, Fits())
    fits, sizes, left = told()
    parts = gradients(host(Memory(8)), mean, batches, fits)
    assert (left, [s.size for s in sizes]) == ([], [6])
    assert apart(whole, parts) <= 1e-6


def test_a_sum_that_is_zero_where_it_is_measured_is_not_taken_for_a_mean():
    """Then nothing tells the two apart, and the batch is left whole; the control is told."""

    def hinge(model, x):
        return (model(x).square().sum(1) * (x[:, 0] > 0)).sum()

    zero = X.clone()
    zero[:, 0] = -1.0
    other, (fits, _, left) = X.clone(), told()
    other[:, 0] = 1.0
    with pytest.raises(torch.OutOfMemoryError):
        gradients(host(Memory(8)), hinge, [zero], fits)
    assert "could not be told from a sum" in left[0][1]
    whole = gradients(host(Memory()), hinge, [other], Fits())
    fits, _, left = told()
    assert apart(whole, gradients(host(Memory(8)), hinge, [other], fits)) <= 1e-6
    assert left == []


@pytest.mark.parametrize(
    "labels",
    [
        torch.where(torch.arange(64) < 50, torch.arange(64) % 3, -100),
        torch.where(torch.arange(64) < 40, 0, 2),
        torch.arange(64) // 4 % 2 * 2,
    ],
    ids=["the last are left out", "sorted by class", "in turn"],
)
def test_samples_that_weigh_otherwise_are_found_wherever_they_stand(labels):
    """What is measured are samples from all over a batch, not the first of it."""

    def weighted(model, batch):
        x, labels = batch
        return F.cross_entropy(model(x), labels, weight=torch.tensor([1.0, 1.0, 3.0]))

    fits, sizes, left = told()
    with pytest.raises(torch.OutOfMemoryError):
        gradients(host(Memory(8)), weighted, [(X, labels)], fits)
    assert "weighs them otherwise" in left[0][1]
    assert sizes == []


class Rolled(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.roll(x, 1, 0)


class Sequence(nn.Module):
    """A recurrent net whose samples are in the second axis, or in the first."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.net = nn.GRU(3, 5, batch_first=batch_first)

    def forward(self, x):
        return self.net(x)[0]


class Experts(nn.Module):
    """Two experts, each of which takes half of the samples at most; the others are dropped."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2), nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        shares, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (shares.argmax(-1) == i).nonzero()[: max(1, len(x) // 2), 0]
            out = out.index_add(0, rows, expert(x[rows]) * shares[rows, i : i + 1])
        return out


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (Rolled, None),
        (Experts, None),
        (lambda: Sequence(batch_first=False), None),
        (lambda: Sequence(batch_first=True), 8),
    ],
    ids=["rolled", "experts with a capacity", "sequences first", "samples first"],
)
def test_models_whose_samples_see_one_another_are_left_whole(make, size):
    """Whatever they see them by; a recurrent net, by which axis they are in."""
    batch = X if make in (Rolled, Experts) else X[:, None].expand(-1, 5, -1)
    fits, sizes, left = told()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = host(Memory(8), make())
    if size is None:
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, mean, [batch], fits)
        assert "depends on the others" in left[0][1]
    else:
        gradients(model, mean, [batch], fits)
    assert [s.size for s in sizes] == ([] if size is None else [size])


@pytest.mark.parametrize("why", ["time", "memory"])
def test_a_part_that_raises_leaves_the_pass_whole(why):
    """A run is not ended by an error that its whole batch does not raise."""

    def compute_loss(model, x):
        if len(x) < len(X) and float(x[-1, 0]) == 7.0:
            raise ValueError("such a part")
        return mean(model, x)

    odd, memory = X.clone(), Memory()
    odd[-1, 0] = 7.0
    model, (fits, sizes, left) = host(memory), told(clock=Ticking(memory), pass_s=0.01)
    for _ in range(2):
        gradients(model, compute_loss, [X], fits)
    assert [s.size for s in sizes] == [8]
    if why == "memory":
        memory.most = 16
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, compute_loss, [odd], fits)
    else:
        expected = gradients(host(Memory()), compute_loss, [odd], Fits())
        assert apart(expected, gradients(model, compute_loss, [odd], fits)) == 0.0
    assert "such a part" in left[0][1]


def test_a_gradient_that_is_no_number_in_parts_alone_is_seen():
    """Wherever it stands among the figures; where the whole has it too, it is no difference."""
    model, one, bad = nn.Linear(1, 1), torch.ones(3), torch.tensor([1.0, 1.0, float("nan")])

    def alike(whole, parts):
        return are_alike(model, ([whole], [parts]), torch.float32, lambda: [whole])

    assert not alike([one, one], [one, bad])
    assert not alike([one, bad], [one, one])
    assert not alike([one, one], [one, one * float("inf")])
    assert alike([one, bad], [one, bad.clone()])
    assert not alike([one, bad], [one, bad * 2])
    assert alike([one], [one.clone()])


def test_a_call_of_a_pass_without_memory_is_not_kept_as_an_example():
    """It would hold the memory that the parts need."""

    class Two(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    class Model(nn.Module):
        def __init__(self, memory):
            super().__init__()
            self.first, self.limited = Two(4, 3), Limited(memory)

        def forward(self, x):
            return self.limited(self.first(x, x[:, :1]))

    model = wrap(Model(Memory(8)), select=["first"])
    with Recorder(layers(model), records_shadow_passes=True) as recorder, told()[0].in_use():
        record_beside(recorder, model, mean, X)
    (seen,) = recorder.observations.values()
    assert len(seen.call.x) == 8


# ---- measures


@pytest.mark.parametrize("pass_s", [None, 1e3])
def test_labels_that_a_model_does_not_take_are_not_handed_to_it(pass_s):
    """Also where calls of the model are made in parts, which have its signature."""

    class Takes(nn.Module):
        def __init__(self, memory):
            super().__init__()
            self.inner = host(memory)

        def forward(self, x):
            return self.inner(x)

    loader = [{"x": X, "labels": torch.arange(64) % 3}]
    measure = Evaluator(esper.evaluate_on(loader))
    whole = measure(Takes(Memory())).per_sample
    fits, sizes, left = told(pass_s=pass_s)
    model = Takes(Memory(10))
    with fits.in_use():
        parts = [measure(model).per_sample for _ in range(2)]
    assert (left, [s.size for s in sizes]) == ([], [8])
    assert all(abs(whole - each).max() <= 1e-6 * abs(whole).max() for each in parts)


def test_a_metric_that_is_reset_behind_its_measure_counts_each_batch_once():
    """Memory that is missing for the last batch does not begin the measure anew."""
    seen = []

    def evaluate(model):
        for x in (X[:8], X[8:16], X):
            seen.extend(model(x).square().mean(1))
        value = torch.stack(seen)
        seen.clear()
        return value

    whole = Evaluator(evaluate)(host(Memory())).per_sample
    fits, sizes, _ = told()
    with fits.in_use():
        parts = Evaluator(evaluate)(host(Memory(10))).per_sample
    assert [s.size for s in sizes] == [8]
    assert len(parts) == len(whole) == 80
    assert abs(whole - parts).max() <= 1e-6 * abs(whole).max()


@pytest.mark.parametrize("off", ["for this test", ""])
def test_a_measure_is_made_once_where_nothing_may_be_cut(off):
    """Ranks of a sharded model wait for each other in every call; the control is cut."""
    memory, fits = Memory(10), Fits(off=off)
    measure = Evaluator(lambda model: model(X).square().mean(1))
    with fits.in_use():
        if off:
            with pytest.raises(torch.OutOfMemoryError):
                measure(host(memory))
            assert memory.num_short == 1
        else:
            assert len(measure(host(memory)).per_sample) == 64


def test_a_kernel_without_memory_is_no_fault_in_a_measure():
    """Its share is not left out of the losses of the first measure, nor of any other."""
    memory = Memory()
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)))
    kernel = nn.Sequential(Limited(memory), nn.Linear(4, 8))
    layers(model)["0"].graft(0, kernel, alpha=0.5, example=X[:4])
    whole = Evaluator(lambda model: model(X))(model).per_sample
    memory.most = 10
    fits, sizes, _ = told()
    with fits.in_use():
        parts = Evaluator(lambda model: model(X))(model).per_sample
    assert [s.size for s in sizes] == [8]
    assert abs(whole - parts).max() <= 1e-6 * abs(whole).max()


def test_a_copy_that_a_measure_makes_runs_its_own_weights():
    """As one in another precision, or with fused layers."""

    def evaluate(model):
        twin = copy.deepcopy(model).double()
        return twin(X.double()).mean(1)

    model = host(Memory())
    with told()[0].in_use():
        found = Evaluator(evaluate)(model).per_sample
    assert found == pytest.approx(copy.deepcopy(model).double()(X.double()).mean(1).tolist())
    assert "forward" not in vars(model)


def test_looking_at_parts_does_not_move_random_numbers_of_a_measure():
    """A model that draws in evaluation is left whole, and so is what it draws next."""

    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    def evaluate(model):
        return torch.cat([model(X).mean(1) for _ in range(4)])

    def read(fits, memory):
        model = host(memory, Noisy())
        with torch.random.fork_rng(), torch.no_grad(), fits.in_use():
            torch.manual_seed(0)
            return Evaluator(evaluate)._read(model)

    memory = Memory()
    fits, sizes, left = told(clock=Ticking(memory), pass_s=0.01)
    assert (read(fits, memory).per_sample == read(Fits(), Memory()).per_sample).all()
    assert (sizes, len(left)) == ([], 1)


class Scores(nn.Module):
    """Gives a loss of its own, as models of sequences do, which is NaN where nothing counts."""

    def __init__(self, memory):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.limited = Limited(memory)

    def forward(self, ids, labels):
        logits = self.out(self.embed(self.limited(ids)))
        pairs = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return Output(logits=logits, loss=F.cross_entropy(*pairs))


class Output(dict):
    """An output with names, as of ``transformers``."""

    __getattr__ = dict.__getitem__


def test_a_part_of_which_no_token_counts_has_a_loss_of_zero():
    """As it has among the others."""
    ids = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[3:9] = -100
    measure = Evaluator(esper.evaluate_on([{"ids": ids, "labels": labels}]))
    whole = measure(Scores(Memory())).per_sample
    fits, sizes, left = told()
    with fits.in_use():
        parts = measure(Scores(Memory(3))).per_sample
    assert (left, [s.size for s in sizes]) == ([], [3])
    assert (parts[3:9] == 0).all()
    assert abs(whole - parts).max() <= 1e-6 * abs(whole).max()


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("std::bad_alloc", True),
        ("DataLoader worker is killed: it is out of shared memory", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_libraries_say_of_a_lack_of_memory(words, is_one):
    """None of them has a class of error for it."""
    assert is_shortage(RuntimeError(words)) is is_one
