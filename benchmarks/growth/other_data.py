"""Two data sets that Esper was not made on: photographs, and files by their kind.

scikit-learn ships two photographs, and a Debian with CPython has the files. Models grow with every
default.
"""

import functools
import hashlib
import itertools
import marshal
import math
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from images import Images, Splits, Subject, accuracy, compute_loss, runs
from task import Task
from torch import Tensor, nn

from esper.growth.evaluation import measuring

Settings = Mapping[str, Any]

CELL: Final = 40
"""Side of a cell of a photograph in pixels; a cell is of one split, with all patches in it."""
PATCH: Final = 7
HIDDEN: Final = 3
"""Sides of a patch, and of its hidden middle, in pixels."""
FAINT: Final = 0.02
"""Contrast in [0, 1] that is added to every ring's, so that noise of flat places stays small."""

_LIBRARY: Final = Path(sysconfig.get_path("stdlib"))
FILES: Final[Mapping[str, tuple[Path, str]]] = {
    "Python sources": (_LIBRARY, "**/*.py"),
    "shared libraries": (Path("/usr/lib"), "*-linux-gnu/*.so*"),
    "Perl modules": (Path("/usr/lib"), "*-linux-gnu/perl-base/**/*.pm"),
    "shell scripts": (Path("/var/lib/dpkg/info"), "*.p*"),
    "copyrights": (Path("/usr/share/doc"), "*/copyright"),
}
"""Kinds of files that no Debian with CPython is without, and where they are."""
LEAST_BYTES: Final = 200
MOST_BYTES: Final = 20_000
"""Shorter files are passed over; of longer ones the middle is read."""
LEAST_FILES: Final = 40
MOST_FILES: Final = 300
"""Of a kind."""
_LEFT_OUT: Final = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
_KINDS: Final = ("train", "train", "train", "gate", "test")
"""Of five cells, or of five files, which are of which split."""


@functools.cache
def _photographs() -> Sequence[Tensor]:
    """Return both photographs, shape (height, width, 3), in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [
        torch.from_numpy(image.astype(np.float32) / 255) for image in load_sample_images().images
    ]


def cells(images: Sequence[Tensor], kind: str) -> Tensor:
    """Cut images into cells, and return those of a split, shape (N, CELL, CELL, channels)."""
    found = [
        image[top : top + CELL, left : left + CELL]
        for image in images
        for top in range(0, image.shape[0] - CELL + 1, CELL)
        for left in range(0, image.shape[1] - CELL + 1, CELL)
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    taken = [at for number, at in enumerate(order) if _KINDS[number % len(_KINDS)] == kind]
    return torch.stack([found[at] for at in taken])


def _patches(kind: str, num: int, random_seed: int) -> Images:
    """Return rings of pixels and the middles that they surround, in contrast to the ring."""
    cells_MHWC = cells(_photographs(), kind)
    generator = torch.Generator().manual_seed(random_seed)
    at_N, top_N, left_N = (
        torch.randint(high, (num,), generator=generator)
        for high in (len(cells_MHWC), CELL - PATCH + 1, CELL - PATCH + 1)
    )
    span = torch.arange(PATCH)
    rows, columns = top_N[:, None, None] + span[:, None], left_N[:, None, None] + span
    patches_NHWC = cells_MHWC[at_N[:, None, None], rows, columns]
    is_ring = torch.ones(PATCH, PATCH, dtype=torch.bool)
    edge = (PATCH - HIDDEN) // 2
    is_ring[edge : edge + HIDDEN, edge : edge + HIDDEN] = False
    ring_NPC = patches_NHWC[:, is_ring]
    mean_N1C = ring_NPC.mean(1, keepdim=True)
    contrast_N1 = (ring_NPC - mean_N1C).flatten(1).std(1, keepdim=True) + FAINT
    middle_NC = patches_NHWC[:, PATCH // 2, PATCH // 2] - mean_N1C[:, 0]
    return Images(x=(ring_NPC - mean_N1C).flatten(1) / contrast_N1, y=middle_NC / contrast_N1)


@functools.cache
def _photograph_splits(train: int, gate: int, test: int) -> Splits:
    sizes = {"train": train, "gate": gate, "test": test}
    parts = {kind: _patches(kind, num, seed) for seed, (kind, num) in enumerate(sizes.items())}
    scale = parts["train"].y.std()
    return Splits(**{k: Images(x=part.x, y=part.y / scale) for k, part in parts.items()})


def photograph_splits(settings: Settings) -> Splits:
    """Return rings and middles, scaled so that a middle has variance 1 over the training split."""
    return _photograph_splits(*(settings[f"{kind}_patches"] for kind in ("train", "gate", "test")))


def photograph_host(random_seed: int) -> nn.Module:
    """Build a network of 2,259 parameters."""
    num_values = 3 * (PATCH**2 - HIDDEN**2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return nn.Sequential(
            nn.Linear(num_values, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )


def _squared_errors(split: Images) -> Callable[[nn.Module], Tensor]:
    return lambda model: (model(split.x) - split.y).square().mean(1)


def _squared_error(model: nn.Module, split: Images) -> dict[str, float]:
    with measuring(model):
        return {"loss": 100 * float(F.mse_loss(model(split.x), split.y))}


def no_photographs() -> str | None:
    """Say why the photographs cannot be had, or nothing."""
    try:
        _photographs()
    except ImportError:
        return (
            "scikit-learn (the extra demo has it) and Pillow, which decodes, are not both installed"
        )
    return None


@functools.cache
def _files() -> Mapping[str, Sequence[bytes]]:
    """Return what each split reads of each kind, as ``FILES`` has them; bytecode is the last."""
    parts: dict[str, list[bytes]] = {"train": [], "gate": [], "test": []}
    for contents in _contents().values():
        for kind, part in parts.items():
            of_kind = [c for n, c in enumerate(contents) if _KINDS[n % len(_KINDS)] == kind]
            part.append(b"".join(map(_middle, of_kind)))
    return parts


def _contents() -> Mapping[str, Sequence[bytes]]:
    """Return files by kind; a source and its bytecode have one place."""
    found = {name: _read(*where) for name, where in FILES.items()}
    code = [marshal.dumps(compile(data, "", "exec")) for data in found["Python sources"]]
    return {**found, "Python bytecode": code}


def _read(folder: Path, pattern: str) -> Sequence[bytes]:
    """Return files that differ, as many as ``MOST_FILES``, from all over the folder."""
    files = [p for p in sorted(folder.glob(pattern)) if p.is_file() and not p.is_symlink()]
    files = [p for p in files if not {*p.relative_to(folder).parts} & {*_LEFT_OUT}]
    files = [p for p in files if p.stat().st_size >= LEAST_BYTES]
    taken = files[:: math.ceil(len(files) / MOST_FILES)]
    return list(dict.fromkeys(p.read_bytes() for p in taken))


def _middle(data: bytes) -> bytes:
    begin = max(0, (len(data) - MOST_BYTES) // 2)
    return data[begin : begin + MOST_BYTES]


def _windows(kind: str, num: int, length: int, random_seed: int) -> Images:
    """Return as many windows of each class."""
    generator = torch.Generator().manual_seed(random_seed)
    texts = _files()[kind]
    each, found = num // len(texts), []
    for text in texts:
        bytes_L = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
        starts_N = torch.randint(len(text) - length + 1, (each,), generator=generator)
        found.append(bytes_L[starts_N[:, None] + torch.arange(length)])
    return Images(x=torch.cat(found), y=torch.arange(len(texts)).repeat_interleave(each))


@functools.cache
def _file_splits(train: int, gate: int, test: int, length: int) -> Splits:
    sizes = {"train": train, "gate": gate, "test": test}
    return Splits(**{k: _windows(k, n, length, seed) for seed, (k, n) in enumerate(sizes.items())})


def file_splits(settings: Settings) -> Splits:
    """Return windows of bytes, int64, and the kinds of the files that they are from."""
    sizes = (settings[f"{kind}_windows"] for kind in ("train", "gate", "test"))
    return _file_splits(*sizes, settings["bytes"])


class ChannelsFirst(nn.Module):
    """Puts the features of an embedding where a convolution has its channels."""

    def forward(self, x_NLC: Tensor) -> Tensor:
        """Return shape (N, C, L)."""
        return x_NLC.transpose(1, 2)


def file_host(random_seed: int) -> nn.Module:
    """Build a network of 1,574 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return nn.Sequential(
            nn.Embedding(256, 4),
            ChannelsFirst(),
            nn.Conv1d(4, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(8, 8, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 6),
        )


def _cross_entropies(split: Images) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model(split.x), split.y, reduction="none")


def _accuracy_and_loss(model: nn.Module, split: Images) -> dict[str, float]:
    with measuring(model):
        loss = float(F.cross_entropy(model(split.x), split.y))
    return {**accuracy(model, split), "loss": loss}


def no_files() -> str | None:
    """Say which kind of files cannot be had, or nothing."""
    for name, (folder, pattern) in FILES.items():
        found = sum(1 for _ in itertools.islice(folder.glob(pattern), LEAST_FILES))
        if found < LEAST_FILES:
            return f"{found} {name} are at {folder / pattern}; a Debian has {LEAST_FILES} and more"
    return None


def _digest() -> str:
    parts = (part for kind in _files().values() for part in kind)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


_PHOTOGRAPHS = Subject(
    splits=photograph_splits,
    host=photograph_host,
    compute_loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
    measure=_squared_errors,
    look=_squared_error,
)
_FILE_TYPES = Subject(
    splits=file_splits,
    host=file_host,
    compute_loss=compute_loss,
    measure=_cross_entropies,
    look=_accuracy_and_loss,
    digest=_digest,
)
_PHOTOGRAPHS_RUN: Settings = {
    "epochs": 60,
    "batch": 128,
    "samples_an_epoch": 10_240,
    "rate": 1e-3,
    "train_patches": 51_200,
    "gate_patches": 3_000,
    "test_patches": 6_000,
}
_FILE_TYPES_RUN: Settings = {
    "epochs": 60,
    "batch": 128,
    "samples_an_epoch": 6_400,
    "rate": 3e-3,
    "bytes": 64,
    "train_windows": 24_000,
    "gate_windows": 2_004,
    "test_windows": 4_002,
}
_ARMS = ("host", "grown", "random", "scratch")
_ARMS_TOLD = """\
Nothing is named but model, optimizer, `compute_loss`, `evaluate` and `horizon`, so `grown` is what
an owner gets. `random` takes random kernels in the same way; `scratch` has the shape that `grown`
ended with from its first update (where nothing was taken over, it is the host). An epoch takes some
samples at random; figures are means over the last ten epochs. Host, rate and horizon were chosen
once, by the host alone."""

TASKS = (
    Task(
        name="photographs",
        arms=_ARMS,
        random_seeds=tuple(range(70, 76)),
        settings=_PHOTOGRAPHS_RUN,
        quick={**_PHOTOGRAPHS_RUN, "samples_an_epoch": 1_280},
        runs=functools.partial(runs, "photographs", _PHOTOGRAPHS),
        title="Photographs, defaults only: a regression by 2,259 parameters",
        told=f"""\
The two photographs that scikit-learn ships, in patches of 7 x 7 pixels whose middle 3 x 3 are
hidden: the pixel at the centre is predicted from the ring around it, both in contrast to that ring.
Of five cells of 40 x 40 pixels three are trained on, one decides, and one is the test split; what
is given is the squared error over the variance of the centres that are trained on.
{_ARMS_TOLD}""",
        section="other data",
        figure="loss",
        unit="squared error, % of the variance, test split",
        digits=2,
        tried="""\
hosts without any growing at random seed 90: patches without their contrast (2 rates, which
overfit); then widths 12, 16 and 24, two rates for 24, twice the patches for 16: 7 variants.""",
        missing=no_photographs,
    ),
    Task(
        name="file types",
        arms=_ARMS,
        random_seeds=tuple(range(70, 76)),
        settings=_FILE_TYPES_RUN,
        quick={**_FILE_TYPES_RUN, "samples_an_epoch": 640},
        runs=functools.partial(runs, "file types", _FILE_TYPES),
        title="File types, defaults only: a classifier of 1,574 parameters",
        told=f"""\
What kind of file 64 bytes come from: Python sources, their bytecode, shared libraries, Perl
modules, shell scripts or copyrights, as a Debian has them. Of five files three are trained on, one
decides, and one is the test split.
{_ARMS_TOLD}""",
        section="other data",
        figure="accuracy",
        unit="accuracy, %, test split",
        digits=2,
        tried="""\
hosts without any growing at random seed 90: packages of the standard library as classes (3
variants, which overfit, since a package has few files); file types with 12,000 windows (2 hosts),
with 24,000 (2 hosts): 7 variants.""",
        missing=no_files,
    ),
)
