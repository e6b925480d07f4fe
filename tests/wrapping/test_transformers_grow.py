"""The controller on whole models of transformers: grown, they come back as their own class."""

import pytest
import torch
from torch.nn import functional as F

import esper
from esper.growth.policies import EveryN

pytest.importorskip("transformers")
import tiny_transformers

pytestmark = pytest.mark.slow

NUM_TRAIN, NUM_GATE, NUM_UPDATES = 512, 300, 120


def data(model, num, seed):
    """Inputs as the model takes them, and one label each that follows from its input."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size") or model.config.model_type == "resnet":
        size = getattr(model.config, "image_size", 16)
        x = torch.randn(num, 3, size, size, generator=generator)
        left, right = x[..., : size // 2].mean((1, 2, 3)), x[..., size // 2 :].mean((1, 2, 3))
        return {"pixel_values": x}, (left * right > 0).long()
    ids = torch.randint(3, tiny_transformers.VOCABULARY, (num, 6), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "t5":
        given["decoder_input_ids"] = ids[:, :1]
    return given, ((ids[:, 0] > 25) ^ (ids[:, 1] > 25)).long()


def losses(model, given, labels):
    """One loss per sample: of the class, or of the token that stands for it at the last place."""
    logits = (
        model(**given, use_cache=False).logits if "input_ids" in given else model(**given).logits
    )
    return F.cross_entropy(logits if logits.dim() == 2 else logits[:, -1], labels, reduction="none")


LONG = ("vit", "t5", "bert", "resnet", "llama")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.torture] if n in LONG else [])
        for n in tiny_transformers.MODELS
    ],
)
def test_a_whole_model_grows_and_comes_back_as_its_own_class(name):
    """Kernels are ranked, tried and judged; unwrapped, the class and the outputs stay."""
    torch.manual_seed(0)
    model, _ = tiny_transformers.MODELS[name]()
    own_class = type(model)
    train, gate = data(model, NUM_TRAIN, 1), data(model, NUM_GATE, 2)
    esper.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def at(model, rows):
        return losses(model, {k: v[rows] for k, v in train[0].items()}, train[1][rows]).mean()

    with esper.Grower(
        model,
        optimizer,
        compute_loss=at,
        evaluate=lambda m: losses(m, *gate),
        policy=EveryN(30),
        budget=esper.Budget(parameters=0.5, packages=2),
        trial_updates=50,
        hold_updates=10,
        warmup_updates=10,
        record_updates=4,
        evaluate_every=10,
        overhead=100.0,
    ) as grower:
        for rows in torch.randint(NUM_TRAIN, (NUM_UPDATES, 16)):
            loss = at(model, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=rows)
    report = grower.report()
    assert report.grafts
    model.eval()
    grown = losses(model, *gate)
    plain = esper.unwrap(model)
    assert type(plain) is own_class
    assert torch.allclose(losses(plain, *gate), grown, atol=1e-5)
