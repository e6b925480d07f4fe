"""The Trainer of Transformers, with Esper's in its place: digits, stopped half-way and resumed.

Run it with ``python examples/transformers_digits.py``; ``pip install 'esper-morph[hf,demo]'``. The
line that grows the model is the one that makes an ``EsperTrainer``, where ``Trainer`` stood. A
checkpoint of the Trainer's own takes kernels, their moments and the state of growth along, and
``resume_from_checkpoint=`` brings them back.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import esper
from esper.integrations.transformers import EsperTrainer


class Digits(nn.Module):
    """A small MLP, in the form in which the Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return scores, shape (samples, 10), and the loss."""
        logits = self.net(x)
        return SequenceClassifierOutput(
            loss=nn.functional.cross_entropy(logits, labels), logits=logits
        )


class Crash(TrainerCallback):
    """Ends a training as a machine that goes down does.

    Args:
        epoch: When.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Raise at the epoch."""
        del args, control
        if round(state.epoch) == self.epoch:
            raise ConnectionError("the machine went down")


def splits() -> list[list[dict[str, Tensor]]]:
    """Return data to train on, data that growing is decided on, and a test split."""
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [[{"x": x[i], "labels": y[i]} for i in part] for part in order.split([896, 450, 451])]


def trainer(epochs: int, folder: str, *others: TrainerCallback) -> EsperTrainer:
    """Return a Trainer of a fresh model."""
    train, gate, _ = splits()
    return EsperTrainer(
        model=Digits(),
        args=TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=gate,
        callbacks=list(others),
    )


def main(epochs: int = 40) -> float:
    """Train, crash half-way, resume, and return the test accuracy of what is plain torch then."""
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(epochs, folder, Crash(epochs // 2))
        try:
            first.train()
        except ConnectionError as error:
            print(f"{error} behind update {first.grower.updates}")
        grows = trainer(epochs, folder)
        grows.train(resume_from_checkpoint=True)
    print(grows.grower.report())
    plain, test = esper.unwrap(grows.model).eval(), splits()[2]
    x, y = (torch.stack([row[name] for row in test]) for name in ("x", "labels"))
    accuracy = float((plain(x, y).logits.argmax(1) == y).float().mean())
    print(f"Test accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
