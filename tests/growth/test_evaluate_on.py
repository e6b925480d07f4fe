"""A loader as the measure of a run: one loss for each held-out sample, in a fixed order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from growing import SHORT, batches, compute_loss, host
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import esper

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(10) % 3
VALUES = X.sum(dim=1)


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=4, **options)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval()


class Tagger(nn.Module):
    """Scores for each token; its output has logits, and a loss where it is given labels."""

    def __init__(self, shift=None):
        super().__init__()
        torch.manual_seed(1)
        self.scores = nn.Embedding(7, 7)
        self.shift = shift

    def forward(self, tokens, labels=None):
        logits = self.scores(tokens)
        loss = None
        if self.shift is not None:
            end = logits.shape[1] - self.shift
            loss = F.cross_entropy(
                logits[:, :end].reshape(-1, 7), labels[:, self.shift :].flatten()
            )
        return SimpleNamespace(logits=logits, loss=loss)


TOKENS = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(2))


def test_losses_are_those_of_each_sample_in_the_loaders_order():
    """The last batch, which is smaller, included."""
    model = classifier()
    found = esper.evaluate_on(loader(X, CLASSES))(model)
    assert torch.allclose(found, F.cross_entropy(model(X), CLASSES, reduction="none"))
    assert not found.requires_grad


def test_mse_is_the_mean_over_what_a_sample_has():
    """Of one output, whose axis the targets do not have, and of several."""
    torch.manual_seed(0)
    one, several = nn.Linear(4, 1), nn.Linear(4, 4)
    assert torch.allclose(
        esper.evaluate_on(loader(X, VALUES), loss="mse")(one), (one(X)[:, 0] - VALUES).square()
    )
    expected = (several(X) - X).square().mean(dim=1)
    assert torch.allclose(esper.evaluate_on(loader(X, X), loss="mse")(several), expected)


def test_a_function_is_given_the_output_and_the_target():
    """And says itself what a sample's loss is."""
    model = classifier()
    measure = esper.evaluate_on([(X, VALUES)], loss=lambda output, target: output[:, 0] - target)
    assert torch.equal(measure(model), (model(X)[:, 0] - VALUES).detach())


def test_sequences_are_means_over_tokens_that_count():
    """Tokens of -100 are left out; a sequence of nothing else has loss 0."""
    model, labels = Tagger(), TOKENS.clone()
    labels[0, 2:], labels[1] = -100, -100
    found = esper.evaluate_on([{"tokens": TOKENS, "labels": labels}])(model)
    each = F.cross_entropy(model(TOKENS).logits.transpose(1, 2), TOKENS, reduction="none")
    assert torch.allclose(found[0], each[0, :2].mean())
    assert found[1] == 0.0
    assert torch.allclose(found[2:], each[2:].mean(dim=1))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_models_own_loss_says_of_which_tokens_its_labels_are(shift):
    """Of the same ones, or of the next ones, as in language models whose labels are their input."""
    model = Tagger(shift)
    found = esper.evaluate_on([{"tokens": TOKENS, "labels": TOKENS}])(model)
    assert torch.allclose(found.mean(), model(TOKENS, TOKENS).loss)


def test_a_loss_that_is_another_is_refused():
    """Verdicts would be read on a figure that the model is not trained for."""
    model = Tagger(0)
    forward = model.forward
    model.forward = lambda tokens, labels: SimpleNamespace(
        logits=forward(tokens, labels).logits, loss=torch.tensor(9.0)
    )
    with pytest.raises(ValueError, match="gives a loss of 9, which is not the cross entropy"):
        esper.evaluate_on([{"tokens": TOKENS, "labels": TOKENS}])(model)


def test_classes_may_stand_where_torch_has_them():
    """Pixels of an image: classes in the second axis."""
    model = nn.Conv2d(2, 3, 1)
    images, target = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4, 5, 5))
    expected = F.cross_entropy(model(images), target, reduction="none").mean(dim=(1, 2))
    assert torch.allclose(esper.evaluate_on([(images, target)])(model), expected)


def test_several_inputs_are_several_arguments():
    """And a dict of them keywords."""
    model = nn.Bilinear(4, 4, 3)
    expected = F.cross_entropy(model(X, X), CLASSES, reduction="none")
    for inputs in ((X, X), {"input1": X, "input2": X}):
        assert torch.allclose(esper.evaluate_on([(inputs, CLASSES)])(model), expected)


@pytest.mark.parametrize(
    "sampler", [RandomSampler, lambda of: WeightedRandomSampler(torch.ones(10), 10)]
)
def test_a_loader_that_draws_is_refused(sampler):
    """Paired tests would compare the loss of one sample with that of another."""
    with pytest.raises(ValueError, match=r"draws its samples at random .* make it with shuffle=F"):
        esper.evaluate_on(loader(X, CLASSES, sampler=sampler(range(10))))


def test_a_loader_for_one_pass_is_refused():
    """It would be empty at the second evaluation."""
    with pytest.raises(ValueError, match=r"can be gone through once.*list\(loader\)"):
        esper.evaluate_on(iter(loader(X, CLASSES)))


@pytest.mark.parametrize(
    ("batch", "loss", "message"),
    [
        ((X, CLASSES, X), "cross_entropy", r"a batch is a pair \(inputs, targets\).*of 3 parts"),
        ({"input": X}, "cross_entropy", r"a batch is a pair.*a dict of 'input'"),
        ((X, VALUES), "mse", r"mse takes targets of the output's shape, got \(10, 3\) and \(10,\)"),
        ((X, CLASSES[:9]), "cross_entropy", r"got \(10, 3\) and \(9,\)"),
        ((X, VALUES), lambda output, _: output.mean(), r"loss gave \(\), expected .*\(10,\)"),
    ],
)
def test_what_does_not_fit_is_refused(batch, loss, message):
    """By name, with what was expected."""
    with pytest.raises(ValueError, match=message):
        esper.evaluate_on([batch], loss=loss)(classifier())


def test_an_output_that_may_be_meant_in_two_ways_is_refused():
    """Classes last or second: a guess would be wrong without a word."""
    with pytest.raises(ValueError, match="may have its classes in its last axis or"):
        esper.evaluate_on([(torch.randn(2, 3, 3), torch.zeros(2, 3).long())])(nn.Identity())


def test_an_unknown_loss_is_refused():
    """At once, and not at the first evaluation."""
    with pytest.raises(ValueError, match="loss is 'cross_entropy', 'mse' or a function"):
        esper.evaluate_on([], loss="l1")


def test_an_empty_loader_is_refused():
    """No samples are no evidence."""
    with pytest.raises(ValueError, match="gave no batch"):
        esper.evaluate_on([])(classifier())


def test_a_grower_reads_it():
    """As its evaluate=; modes are as before afterwards."""
    from growing import GATE_X, GATE_Y

    model = esper.wrap(host())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    held_out = DataLoader(TensorDataset(GATE_X, GATE_Y), batch_size=64)
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=esper.evaluate_on(held_out, loss="mse"),
        horizon=1000,
        policy=esper.Never(),
        **SHORT,
    )
    with grower:
        for batch in batches(11):
            optimizer.zero_grad()
            loss = compute_loss(model, batch)
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=batch)
        assert model.training
        model.eval()
        expected = (model(GATE_X) - GATE_Y).square().mean()
        assert len(grower.report().evaluations) >= 1
        assert expected.isfinite()


def test_what_a_model_concludes_of_its_labels_is_left_to_its_owner():
    """As by classifiers of transformers, of which one knows its problem, and one does not yet."""

    class Classifier(nn.Module):
        def __init__(self, problem):
            super().__init__()
            self.scores, self.config = classifier(), SimpleNamespace(problem_type=problem)

        def forward(self, inputs, labels):
            self.config.problem_type = self.config.problem_type or "single_label_classification"
            return SimpleNamespace(logits=self.scores(inputs))

    for problem in (None, "single_label_classification"):
        model = Classifier(problem)
        evaluate = esper.evaluate_on([{"inputs": X, "labels": CLASSES}])
        assert torch.equal(evaluate(model), esper.evaluate_on([(X, CLASSES)])(model.scores))
        assert model.config.problem_type == problem
