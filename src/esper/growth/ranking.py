"""Where and what to grow: candidates ordered by the gain that their readout could reach.

Tensors are float64 on the CPU. Shape suffixes: R rows (positions of samples, drawn at random),
F features of the kernel's zeroed layer, P features of the host layer (its input patches and a
one), O output features, K splits (disjoint sets of samples), D all else flattened.

A kernel that ends in a zeroed affine layer with weight ``W`` adds ``W f``. The host layer can
learn by itself what its own features ``p`` explain, so the gradient counts only along ``e``, what
ridge regression on ``p`` leaves of ``f``. With ``g`` the gradient of a sample's loss at the
site's output, ``G = sum(g e^T)`` and ``C = sum(f f^T)`` over the sample's positions, the loss
falls to first order along the whitened gradient step ``W = -G C^-1`` by

    gain = tr(G1 C^-1 G2^T),

where ``G1`` and ``G2`` come from disjoint samples, so that the noise of ``g`` does not add to it,
and ``C`` is ridge-regularised. (Frisch, Waugh and Lovell: projecting ``p`` out of ``f`` gives the
same product as projecting it out of ``g``. But ``g`` is almost all noise when a run is at its
plateau: fitted on the same samples, its residuals sum to zero over the splits, and the products
of disjoint splits come out negative for every kernel that resembles the host.)
"""

from __future__ import annotations

import copy
import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from esper.contracts.arguments import Bounds, checked_number, generator_seed, whole_number
from esper.contracts.choices import Position
from esper.contracts.layer_kind import kind_of
from esper.growth.recording import SiteObservation, finite_steps
from esper.resilience.attempt import Done, attempt
from esper.seeds.batch_rows import joined_rows
from esper.seeds.fitting import Cuts, Pass, Rule, fits_in_use, uneven
from esper.seeds.micro_batches import compared, looked
from esper.seeds.sameness import Groups
from esper.state.host_parts import host_parameters
from esper.state.shortage import is_shortage
from esper.state.site import feature_axis, widths

NUM_SPLITS: Final = 8
MAX_ROWS: Final = 8192
MAX_FEATURES: Final = 512
RIDGE: Final = 1e-3

Rows = tuple[Tensor, ...]
Block = tuple[Tensor, slice]
_AFFINE: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A kernel that could be grafted at a site.

    Attributes:
        site: Name of the layer.
        blueprint: Name of the blueprint.
        kernel: The kernel with its initial weights; it is copied, never trained or changed.
        zeroed: Name in the kernel of the weight of the affine layer that is zero at birth, for
            example ``"steps.2.weight"``; None where there is none, or where the kernel replaces:
            it gets no score.
        position: ``"parallel"`` (reads the host's input) or ``"serial"`` (its output).
        parameters: Number of parameters.
        flops: FLOPs of a forward of one sample; None where not counted.
    """

    site: str
    blueprint: str
    kernel: nn.Module
    zeroed: str | None
    position: Position
    parameters: int
    flops: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedCandidate:
    """A candidate with its score.

    Attributes:
        candidate: The candidate.
        gain: Its score, in the ranking's own unit, which is no fall of the loss to be expected;
            None where it has none.
        stderr: Standard error of the gain; None where it has none.
        reason: Why there is no score; empty where there is one.
    """

    candidate: Candidate
    gain: float | None
    stderr: float | None
    reason: str = ""

    @property
    def site(self) -> str:
        """Name of the layer."""
        return self.candidate.site

    @property
    def blueprint(self) -> str:
        """Name of the blueprint."""
        return self.candidate.blueprint

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.candidate.parameters

    @property
    def flops(self) -> float | None:
        """FLOPs of a forward of one sample; None where not counted."""
        return self.candidate.flops


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedCandidate:
    """A kernel that was refused before it was ranked.

    Attributes:
        site: Name of the layer.
        blueprint: Name of the kernel's blueprint; empty where it was the site that was refused.
        reason: Why.
    """

    site: str
    blueprint: str
    reason: str


class Ranking(Protocol):
    """Orders candidates. One method: what a candidate may cost is the budget's question."""

    def rank(
        self, observations: Mapping[str, SiteObservation], candidates: Iterable[Candidate]
    ) -> list[RankedCandidate]:
        """Return every candidate once, best first, those without a score last."""
        ...


class FirstOrderGain:
    """Ranks by the first-order gain of the readout beyond the host's own; the default.

    Args:
        ridge: Ridge on second moments, as a share of their mean eigenvalue; above 0.
        random_seed: Starts the generator that draws rows, and the kernels' random numbers.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``ridge`` is not above 0, or not finite.
    """

    def __init__(self, *, ridge: float = RIDGE, random_seed: int = 0) -> None:
        self._ridge = checked_number("ridge", ridge, Bounds(what="a finite number", above=0))
        self._random_seed = generator_seed(whole_number("random_seed", random_seed))

    def rank(
        self, observations: Mapping[str, SiteObservation], candidates: Iterable[Candidate]
    ) -> list[RankedCandidate]:
        """Score every candidate on the observations of its site."""
        return _ranked(observations, candidates, self._score, random_seed=self._random_seed)

    def _score(self, site: _Site, readout: list[Block]) -> tuple[float, float | None]:
        moments = [
            _whitened_moments(
                f_RF, host, site.gradients[:, outputs], site.splits, ridge=self._ridge
            )
            for f_RF, host, outputs in _matched(readout, site.host)
        ]
        gain, stderr = pairwise_gain(torch.cat(moments, dim=1))
        return gain * site.num_positions, stderr * site.num_positions


class GradientNorm:
    """Ranks by the norm of the readout's gradient per parameter of it; for comparison.

    Args:
        random_seed: Starts the generator that draws rows, and the kernels' random numbers.

    Raises:
        TypeError: ``random_seed`` is no whole number.
    """

    def __init__(self, *, random_seed: int = 0) -> None:
        self._random_seed = generator_seed(whole_number("random_seed", random_seed))

    def rank(
        self, observations: Mapping[str, SiteObservation], candidates: Iterable[Candidate]
    ) -> list[RankedCandidate]:
        """Score every candidate on the observations of its site."""
        return _ranked(observations, candidates, self._score, random_seed=self._random_seed)

    def _score(self, site: _Site, readout: list[Block]) -> tuple[float, float | None]:
        moments = [
            (site.gradients[:, outputs].T @ f_RF).flatten() / len(f_RF) for f_RF, outputs in readout
        ]
        gradient_D = torch.cat(moments) * site.num_positions
        return float(gradient_D.norm()) / len(gradient_D), None


class RandomChoice:
    """Ranks in a random order; the control that every ranking has to beat.

    Args:
        random_seed: Starts the generator.

    Raises:
        TypeError: ``random_seed`` is no whole number.
    """

    def __init__(self, random_seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(
            generator_seed(whole_number("random_seed", random_seed))
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return where the generator is."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the scores where another ranking was."""
        self._generator.set_state(state["generator"])

    def rank(
        self,
        observations: Mapping[str, SiteObservation],  # noqa: ARG002 - the protocol's signature
        candidates: Iterable[Candidate],
    ) -> list[RankedCandidate]:
        """Give every candidate a random score in [0, 1)."""
        listed = list(candidates)
        scores = torch.rand(len(listed), generator=self._generator, dtype=torch.float64).tolist()
        return in_order(
            [
                RankedCandidate(candidate=candidate, gain=score, stderr=None)
                for candidate, score in zip(listed, scores, strict=True)
            ]
        )


def rank_candidates(
    observations: Mapping[str, SiteObservation], candidates: Iterable[Candidate]
) -> list[RankedCandidate]:
    """Rank by the default method with its default settings."""
    return FirstOrderGain().rank(observations, candidates)


def in_order(ranked: Iterable[RankedCandidate]) -> list[RankedCandidate]:
    """Sort best first; without a score last; equal scores by site and blueprint's name.

    Raises:
        TypeError: They are no candidates with a score.
    """

    def key(entry: RankedCandidate) -> tuple[float, str, str]:
        return (math.inf if entry.gain is None else -entry.gain, entry.site, entry.blueprint)

    return sorted(_expect_ranked(ranked), key=key)


def _expect_ranked(ranked: object) -> list[Any]:
    found = [*ranked] if isinstance(ranked, Iterable) else [ranked]
    for entry in found:
        if not all(hasattr(entry, name) for name in ("gain", "site", "blueprint")):
            msg = (
                "in_order takes RankedCandidates, as a ranking returns them, or Suggestions; got "
                f"{reprlib.repr(entry)} (a {type(entry).__name__})"
            )
            raise TypeError(msg)
    return found


def pairwise_gain(moments_KD: Tensor) -> tuple[float, float]:
    """Return the mean inner product of distinct rows, and its jackknife standard error.

    The jackknife errs on the safe side: its variance is nearly right where the gain is clear, and
    up to 2.4 times too large where there is none.

    Args:
        moments_KD: float64, shape (splits, dimensions), at least three splits.
    """
    num_splits = len(moments_KD)
    products_KK = moments_KD @ moments_KD.T
    products_KK.fill_diagonal_(0.0)
    per_split_K = 2.0 * products_KK.sum(dim=1)
    total = float(products_KK.sum())
    gain = total / (num_splits * (num_splits - 1))
    without_K = (total - per_split_K) / ((num_splits - 1) * (num_splits - 2))
    spread = float((without_K - without_K.mean()).square().sum())
    return gain, math.sqrt(spread * (num_splits - 1) / num_splits)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Site:
    """What the kernels of a site are judged on.

    Attributes:
        seen: What was recorded there.
        inputs: All samples of the layer's input.
        outputs: All samples of its output.
        rows: Index of each row: its sample, then its position.
        splits: int64, shape (R,): the split that the row's sample belongs to.
        gradients: Shape (R, O).
        host: What the host layer can use by itself.
        num_positions: Positions of a sample.
    """

    seen: SiteObservation
    inputs: Tensor
    outputs: Tensor
    rows: Rows
    splits: Tensor
    gradients: Tensor
    host: list[_HostFeatures]
    num_positions: int


class _HostFeatures:
    """Features that a host layer can use by itself; their second moment is factored once.

    Args:
        p_RP: The features, float64, shape (R, P).
        outputs: The outputs that they are for.
    """

    def __init__(self, p_RP: Tensor, outputs: slice) -> None:
        self.outputs = outputs
        self._p_RP = p_RP
        self._factors: dict[float, Tensor] = {}

    def residual_of(self, f_RF: Tensor, *, ridge: float) -> Tensor:
        """Return what ridge regression on the features leaves of ``f``; ``f`` where P is 0."""
        p_RP = self._p_RP
        if p_RP.shape[1] == 0:
            return f_RF
        if ridge not in self._factors:
            self._factors[ridge] = torch.linalg.cholesky(_second_moment(p_RP, ridge=ridge))
        return f_RF - p_RP @ torch.cholesky_solve(p_RP.T @ f_RF / len(p_RP), self._factors[ridge])


def _ranked(
    observations: Mapping[str, SiteObservation],
    candidates: Iterable[Candidate],
    score: Callable[[_Site, list[Block]], tuple[float, float | None]],
    *,
    random_seed: int,
) -> list[RankedCandidate]:
    """Score each candidate that can be scored; look at each site once."""
    sites: dict[str, _Site | str] = {}
    ranked = []
    for candidate in candidates:
        name = candidate.site
        site = sites.get(name)
        if site is None:
            site = sites[name] = _observe(observations.get(name), random_seed)
        found = site if isinstance(site, str) else _readout_features(site, candidate, random_seed)
        if isinstance(site, str) or isinstance(found, str):
            reason = found if isinstance(found, str) else ""
            ranked.append(
                RankedCandidate(candidate=candidate, gain=None, stderr=None, reason=reason)
            )
        else:
            ranked.append(_scored(candidate, functools.partial(score, site, found)))
    return in_order(ranked)


def _scored(
    candidate: Candidate, score: Callable[[], tuple[float, float | None]]
) -> RankedCandidate:
    """Score a candidate, or say why that cannot be done."""
    try:
        gain, stderr = score()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # torch lists it not
        reason = f"its features cannot be whitened: {error}"
        return RankedCandidate(candidate=candidate, gain=None, stderr=None, reason=reason)
    return finite_score(RankedCandidate(candidate=candidate, gain=gain, stderr=stderr))


def finite_score(entry: RankedCandidate) -> RankedCandidate:
    """Return an entry as it is, or without a score where its score is not finite."""
    if entry.gain is not None and not math.isfinite(entry.gain):
        return replace(entry, gain=None, stderr=None, reason=f"its score is {entry.gain}")
    if entry.stderr is not None and not math.isfinite(entry.stderr):
        return replace(entry, stderr=None)
    return entry


def _observe(seen: SiteObservation | None, random_seed: int) -> _Site | str:
    """Gather a site's rows, or say why there are none."""
    steps = list(finite_steps(seen)) if seen is not None else []
    if seen is not None and seen.inputs and not steps:
        return f"each of {len(seen.inputs)} recorded steps had values that are not finite"
    if seen is None or not steps:
        return "nothing was recorded at the site"
    if len({tuple(value.shape[1:] for value in step) for step in steps}) > 1:
        return "the site's shapes change from step to step"
    inputs, outputs, gradients = (torch.cat(values) for values in zip(*steps, strict=True))
    if len(gradients) < 2 * NUM_SPLITS:
        return f"too little was recorded: {len(gradients)} samples, {2 * NUM_SPLITS} needed"
    rows = _draw_rows(seen, gradients, random_seed)
    gradients_RO = _rows_of(seen.layer, gradients, rows)
    return _Site(
        seen=seen,
        inputs=inputs,
        outputs=outputs,
        rows=rows,
        splits=rows[0] * NUM_SPLITS // len(gradients),
        gradients=gradients_RO,
        host=_host_features(seen.layer, inputs, outputs, rows, random_seed),
        num_positions=gradients[0].numel() // gradients_RO.shape[1],
    )


def _host_features(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, rows: Rows, random_seed: int
) -> list[_HostFeatures]:
    """Return the host's features and a one; none where the host cannot learn.

    A layer that is not affine in its input is taken to learn any matrix on what it gives:
    attention and embeddings end in one, and behind a norm the next layer has it.
    """
    if not any(p.requires_grad for p in host_parameters(layer)):
        return []
    own = list(_features(layer, inputs, rows, random_seed))
    if not own:
        h_RO = _rows_of(layer, outputs, rows)
        own = [(_at_most(h_RO, random_seed), slice(0, h_RO.shape[1]))]
    ones_R1 = torch.ones(len(rows[0]), 1, dtype=torch.float64)
    return [_HostFeatures(torch.cat([p_RP, ones_R1], dim=1), block) for p_RP, block in own]


def _matched(
    readout: list[Block], host: list[_HostFeatures]
) -> Iterator[tuple[Tensor, _HostFeatures, slice]]:
    """Yield readout features, host features and the outputs that both are for.

    Where the host has none, an empty matrix takes their place.
    """
    for f_RF, wanted in readout:
        for own in host or [_HostFeatures(f_RF[:, :0], wanted)]:
            both = own.outputs
            outputs = slice(max(wanted.start, both.start), min(wanted.stop, both.stop))
            if outputs.start < outputs.stop:
                yield f_RF, own, outputs


def readout_of(candidate: Candidate) -> nn.Module | None:
    """Return the affine layer of a candidate's kernel that is zero at birth; None without one."""
    if candidate.zeroed is None:
        return None
    readout = candidate.kernel.get_submodule(candidate.zeroed.rpartition(".")[0])
    return readout if isinstance(readout, _AFFINE) else None


def works_by_position(candidate: Candidate, seen: SiteObservation) -> bool:
    """Return whether a kernel was seen to do with each position what it does with it alone.

    It is tried on one recorded sample; then a ranking runs it on the rows that it looks at, and on
    no others. A kernel that draws random numbers, or takes no single positions, does not.

    Args:
        candidate: The candidate.
        seen: What was recorded at its site, at least one step.
    """
    source = seen.inputs[0] if candidate.position == "parallel" else seen.outputs[0]
    if source.ndim < 3 or feature_axis(seen.layer, source) % source.ndim != source.ndim - 1:
        return False
    if not isinstance(readout_of(candidate), nn.Linear):
        return False
    one, positions = source[:1], source[:1].flatten(0, -2)
    found = [attempt(functools.partial(_run_readout, candidate, x, 0)) for x in (one, positions)]
    features = [f.value[0][0].flatten(0, -2) for f in found if isinstance(f, Done) and f.value]
    return len(features) == 2 and _close(*features)


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether two matrices of features are equal up to the order of their sums."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return False
    scale = float(one.abs().max())
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale)


def _run_readout(
    candidate: Candidate, source: Tensor, random_seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Run a copy of a kernel and return what its zeroed layer was given and gave, by call."""
    assert candidate.zeroed is not None
    kernel = copy.deepcopy(candidate.kernel).to(source.device)
    readout = kernel.get_submodule(candidate.zeroed.rpartition(".")[0])
    calls: list[tuple[Tensor, Tensor]] = []
    handle = readout.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    with handle, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(random_seed)
        kernel(source.to(readout.get_parameter("weight").dtype))
    return calls


def _readout_calls(
    candidate: Candidate, source: Tensor, random_seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Run a kernel as :func:`_run_readout` does, in parts where memory is missing."""

    def look(rule: Rule, some: Tensor) -> str:
        parts = uneven(len(some), rule)
        return compared(
            candidate.kernel,
            lambda: _groups(_run_readout(candidate, some, random_seed)),
            lambda: _groups(_run_parts(candidate, some, random_seed, parts)),
        )

    def measure(num: int, rule: Rule) -> None:
        rule.against = looked(functools.partial(look, rule), source, num, rule)

    return fits_in_use().run(
        lambda: _run_readout(candidate, source, random_seed),
        lambda: Pass(
            work="ranking",
            batch=source,
            device=source.device,
            parted=lambda cuts, _: _run_parts(candidate, source, random_seed, cuts),
            measure=measure,
        ),
    )


def _groups(calls: list[tuple[Tensor, Tensor]]) -> Groups:
    return [[t] for call in calls for t in call]


def _run_parts(
    candidate: Candidate, source: Tensor, random_seed: int, cuts: Cuts
) -> list[tuple[Tensor, Tensor]]:
    """Run a kernel part by part, and join what its zeroed layer was given and gave.

    Raises:
        NoRowsError: What it was given cannot be joined.
    """
    found = [_run_readout(candidate, source[a:b], random_seed) for a, b in cuts]
    calls: list[tuple[Tensor, Tensor]] = joined_rows(found, [b - a for a, b in cuts])
    return calls


def _readout_features(site: _Site, candidate: Candidate, random_seed: int) -> list[Block] | str:
    """Run a kernel up to its zeroed layer and return that layer's features, row by row."""
    if candidate.zeroed is None:
        return "its output is not zeroed by one affine layer"
    readout = readout_of(candidate)
    if readout is None:
        named = candidate.kernel.get_submodule(candidate.zeroed.rpartition(".")[0])
        return f"its zeroed layer is a {type(named).__name__}, not affine"
    source = site.inputs if candidate.position == "parallel" else site.outputs
    rows, wanted = site.rows, site.outputs.shape
    if len(rows[0]) * source.shape[-1] < source.numel() and works_by_position(candidate, site.seen):
        source = source[tuple(index.to(source.device) for index in rows)]
        rows, wanted = (torch.arange(len(source)),), torch.Size((len(source), wanted[-1]))
    try:
        calls = _readout_calls(candidate, source, random_seed)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        return f"there is too little memory to run it on what was recorded: {error}"
    if [output.shape for _, output in calls] != [wanted] or not _is_aligned(readout, site):
        return "its zeroed layer does not give the site's output position by position"
    blocks = list(_features(readout, calls[0][0], rows, random_seed))
    if not all(bool(f_RF.isfinite().all()) for f_RF, _ in blocks):
        return "its features are not finite on what was recorded at the site"
    return blocks


def _is_aligned(readout: nn.Module, site: _Site) -> bool:
    """Return whether a layer's features lie on the site's axis: shapes may agree where they do not.

    A convolution over a sequence has them before the positions, as many as there are or not.
    """
    num_axes = site.outputs.ndim
    axes = (feature_axis(layer, site.outputs) for layer in (readout, site.seen.layer))
    return len({axis % num_axes for axis in axes}) == 1


def _whitened_moments(
    f_RF: Tensor, host: _HostFeatures, g_RO: Tensor, split_R: Tensor, *, ridge: float
) -> Tensor:
    """Return per split the cross moment of features and gradient, whitened and flattened.

    The inner product of two rows of the result is ``tr(G1 C^-1 G2^T)``. ``C`` is of the features
    as they are: whitened by what is left of them, those that the host explains almost wholly
    would be blown up again.
    """
    e_RF = host.residual_of(f_RF, ridge=ridge)
    factor_FF = torch.linalg.cholesky(_second_moment(f_RF, ridge=ridge))
    sizes = torch.bincount(split_R, minlength=NUM_SPLITS).tolist()  # rows are in order of splits
    parts = zip(*(torch.split_with_sizes(x, sizes) for x in (e_RF, g_RO)), sizes, strict=True)
    cross_FKO = torch.stack([e.T @ g / max(1, size) for e, g, size in parts], dim=1)
    wide_FD = cross_FKO.flatten(1)
    white_FD: Tensor = torch.linalg.solve_triangular(factor_FF, wide_FD, upper=False)
    return white_FD.view_as(cross_FKO).transpose(0, 1).flatten(1)


def _second_moment(f_RF: Tensor, *, ridge: float) -> Tensor:
    """Return the second moment, its diagonal raised by a share of its mean (1 if all is 0)."""
    raised = ridge * float(f_RF.square().mean()) or 1.0
    return f_RF.T @ f_RF / len(f_RF) + raised * torch.eye(f_RF.shape[1], dtype=torch.float64)


def most_rows(seen: SiteObservation) -> int:
    """Return how many rows of a site are looked at, where there are so many."""
    return MAX_ROWS if seen.max_rows is None else min(MAX_ROWS, seen.max_rows)


def _draw_rows(seen: SiteObservation, gradients: Tensor, random_seed: int) -> Rows:
    """Draw positions of samples: all of them where they are few."""
    axes = [i for i in range(gradients.ndim) if i != feature_axis(seen.layer, gradients)]
    sizes = [gradients.shape[i] for i in axes]
    total = math.prod(sizes)
    generator = torch.Generator().manual_seed(random_seed)
    flat = torch.randperm(total, generator=generator)[: most_rows(seen)].sort().values
    return torch.unravel_index(flat, sizes)


def _rows_of(layer: nn.Module, values: Tensor, rows: Rows) -> Tensor:
    """Return the feature vectors at the rows, float64 on the CPU."""
    last = values.movedim(feature_axis(layer, values), -1)
    return last[tuple(index.to(values.device) for index in rows)].to("cpu", torch.float64)


def _features(layer: nn.Module, inputs: Tensor, rows: Rows, random_seed: int) -> Iterator[Block]:
    """Yield what an affine layer multiplies with its weight, with the outputs that it is for.

    Wider features are cut to ``MAX_FEATURES`` drawn at random. A layer that is not affine has
    none that is known.
    """
    if kind_of(layer).site == "linear":
        num_outputs = widths(layer)[1]
        yield _at_most(_rows_of(layer, inputs, rows), random_seed), slice(0, num_outputs)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        windows = _windows(layer, inputs)
        index = tuple(i.to(inputs.device) for i in rows)
        width_in = layer.in_channels // layer.groups
        width_out = layer.out_channels // layer.groups
        for group in range(layer.groups):
            part = windows[:, group * width_in : (group + 1) * width_in].movedim(1, len(rows))
            p_RP = part[index].flatten(1).to("cpu", torch.float64)
            outputs = slice(group * width_out, (group + 1) * width_out)
            yield _at_most(p_RP, random_seed), outputs


def _at_most(p_RP: Tensor, random_seed: int) -> Tensor:
    if p_RP.shape[1] <= MAX_FEATURES:
        return p_RP
    generator = torch.Generator().manual_seed(random_seed)
    return p_RP[:, torch.randperm(p_RP.shape[1], generator=generator)[:MAX_FEATURES]]


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Return a view (N, C, *positions, *kernel) of what a convolution sees at each position."""
    padded = _padded(layer, inputs)
    settings = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(settings, start=2):
        padded = padded.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return padded


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Pad the input as the convolution does."""
    amounts: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        amounts += _padding(layer, axis)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, amounts, mode=mode) if any(amounts) else inputs


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, axis: int) -> Sequence[int]:
    """Return the padding before and after along one spatial axis."""
    if layer.padding == "valid":
        return 0, 0
    if isinstance(layer.padding, str):
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return layer.padding[axis], layer.padding[axis]
