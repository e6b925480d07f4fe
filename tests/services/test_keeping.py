"""What was trained is kept, wherever there is room for it and in whatever form."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.services.keeping import keep_model
from esper.wrapping.wrap import wrap


class Odd(nn.Module):
    """A kernel that cannot be written as code: it branches on its data."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


def grown(kernel=None):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    if kernel is not None:
        model[0].graft(0, kernel, alpha=0.5, example=torch.ones(2, 4))
    return model


def test_model_is_exported(tmp_path):
    """Without trouble there is code and weights, and nothing to say."""
    kept = keep_model(grown(nn.Linear(4, 4)), tmp_path / "model")
    assert kept.folder == tmp_path / "model"
    assert kept.problems == ()
    assert {p.name for p in kept.folder.iterdir()} == {"grafts.py", "model.safetensors"}


def test_model_that_is_no_code_keeps_its_weights(tmp_path):
    """A kernel that cannot be written leaves a state_dict, which loads after ``esper.wrap``."""
    model = grown(Odd())
    kept = keep_model(model, tmp_path / "model")
    assert kept.folder == tmp_path / "model"
    assert "cannot be written as code" in kept.problems[0]
    assert "state_dict.pt" in kept.problems[-1]
    fresh = grown(Odd())
    fresh.load_state_dict(torch.load(tmp_path / "model" / "state_dict.pt"))
    x = torch.randn(5, 4)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kernel", [None, Odd])
def test_model_finds_another_place_where_its_own_takes_nothing(tmp_path, monkeypatch, kernel):
    """A folder that cannot be written is named, and a temporary one takes the model."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "file").write_text("")
    model = grown(None if kernel is None else kernel())
    kept = keep_model(model, tmp_path / "file" / "model")
    assert kept.folder.parent == tmp_path / "elsewhere"
    assert str(tmp_path / "file" / "model") in kept.problems[0]
    assert str(kept.folder) in kept.problems[-1]
    assert list(kept.folder.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_is_named_and_the_model_kept(tmp_path):
    """The file that found no room is named; what is half written is taken away."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / ".model.safetensors.part").symlink_to("/dev/full")
    kept = keep_model(grown(), folder)
    assert str(folder / "model.safetensors") in kept.problems[0]
    assert kept.folder != folder
    assert (kept.folder / "model.safetensors").exists()
    assert list(folder.iterdir()) == []
