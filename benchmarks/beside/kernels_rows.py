"""Kernels of the Hugging Face hub beside Esper's, from a folder: nothing is downloaded."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from comparison import Comparison, largest, told
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn

import esper
from esper.state.site import describe_site

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
CODE = """\
import torch
from torch import nn


class layers:
    class Host(nn.Module):
        {members}

        def forward(self, x):
            {body}
"""


@use_kernel_forward_from_hub("Host")
class Host(nn.Module):
    """A layer whose forward a kernel of the hub may replace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input twice."""
        return 2 * x


def repository(folder: str, body: str, members: str = "") -> Path:
    """Write a kernel as the hub has it, for every device."""
    build = Path(folder) / "build" / "torch-universal"
    build.mkdir(parents=True, exist_ok=True)
    (build / "__init__.py").write_text(CODE.format(body=body, members=members), encoding="utf-8")
    about = {"id": Path(folder).name, "name": "host", "version": 1, "license": "MIT"}
    about |= {"python-depends": [], "backend": {"type": "cpu"}}
    (build / "metadata.json").write_text(json.dumps(about), encoding="utf-8")
    return Path(folder)


def kernelized(folder: str, body: str, members: str = "") -> nn.Module:
    """Return the host with its forward replaced."""
    layer = LocalLayerRepository(repository(folder, body, members), layer_name="Host")
    with use_kernel_mapping({"Host": {"cpu": layer}}):
        return kernelize(nn.Sequential(Host()), mode=Mode.INFERENCE, device="cpu")


def outcome(call: Callable[[], object]) -> str:
    """Return ``"done"``, or the class of the error and how it begins."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it fails with is the outcome
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return "done"


class Failing(nn.Module):
    """A kernel that raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise on what is not the example of its graft."""
        if len(x) == len(X):
            raise RuntimeError("no such device function")
        return torch.zeros_like(x)


def failing() -> Comparison:
    """Call a layer whose kernel raises, three times."""
    with TemporaryDirectory() as folder:
        model = kernelized(folder, 'raise RuntimeError("no such device function")')
        calls = [outcome(lambda: model(X)) for _ in range(3)]
    bare = nn.Sequential(nn.Linear(8, 8))
    expected = bare(X)
    esper.wrap(bare)
    esper.layers(bare)["0"].graft(0, Failing(), example=torch.randn(5, 8))
    return Comparison(
        asked="a kernel that raises costs its own contribution, and no step",
        source="",
        peer=f"{sum(call != 'done' for call in calls)} of 3 calls raise",
        esper=f"no call raises; the host's output: {largest(bare(X), expected)}",
    )


def trainable() -> Comparison:
    """Load a kernel that has parameters."""
    with TemporaryDirectory() as folder:
        members = "def __init__(self):\n            super().__init__()\n"
        members += "            self.weight = nn.Parameter(torch.ones(8))\n"
        peer = outcome(lambda: kernelized(folder, "return x * self.weight", members))
        peer = peer.replace(f"`{folder}` ", "a kernel ")
    grown = esper.wrap(nn.Sequential(nn.Linear(8, 8)))
    layer = esper.layers(grown)["0"]
    layer.graft(0, esper.default_catalog().blueprints_for(describe_site(layer))[0])
    num = sum(p.numel() for name, p in grown.named_parameters() if "_seeds" in name)
    return Comparison(
        asked="a kernel may have parameters, and be trained",
        source="",
        peer=peer,
        esper=f"{num} parameters of its own are trained with the host's",
    )


def tampered() -> Comparison:
    """Change a stored kernel behind its owner's back, and load it."""
    with TemporaryDirectory() as folder:
        changed = repository(folder, "return 666 * x")
        run = get_local_kernel(changed, backend="cpu").layers.Host.forward(None, torch.ones(1))
    with TemporaryDirectory() as folder:
        registry = esper.open_registry(Path(folder))
        model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), source=registry)
        layer = esper.layers(model)["0"]
        blueprint = esper.default_catalog().blueprints_for(describe_site(layer))[0]
        digest = registry.put(esper.compile_blueprint(blueprint).kernel_binary)
        (stored,) = (path for path in Path(folder).rglob(f"*{digest[4:]}*") if path.is_file())
        data = bytearray(stored.read_bytes())
        data[-1] ^= 1
        stored.chmod(0o644)
        stored.write_bytes(data)
        refused = outcome(lambda: layer.load_kernel_sync(0, digest))
        registry.close()
    return Comparison(
        asked="an artifact that was tampered with is refused at load",
        source="kernels#828",
        peer=f"from a folder, changed code is run, and gives {float(run):.0f}",
        esper=f"one bit changed: {refused.partition(':')[0]}",
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told([failing, trainable, tampered])
