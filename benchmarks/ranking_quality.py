"""Whether a ranking knows what helps: its order beside what every candidate really brought.

At several random seeds the demo's host is trained to a fixed update, every candidate auditions
there, and each is then grafted into a copy of the run and trained with it. A ranking is worth what
the correlation of its scores with those gains says, and not shipped if it does not beat random
choice.
"""

import copy
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch import nn

from esper.compiler.catalog import default_catalog
from esper.continuity.placement import Placement
from esper.continuity.warmup import UpdateFactor
from esper.contracts.intervals import Interval, mean_interval
from esper.growth.audition import Audition
from esper.growth.evaluation import Evaluator
from esper.growth.germination import make_candidate
from esper.growth.live_kernel import place_kernel
from esper.growth.ranking import Candidate, FirstOrderGain, GradientNorm, RandomChoice, Ranking
from esper.growth.recording import Recorder
from esper.services.arms import FORK_UPDATE, HostFork, compute_loss, optimizer_for, train_on
from esper.services.digits import LEARNING_RATE, Digits, demo_host, load_digits
from esper.services.findings import spearman
from esper.services.looks import measure_on
from esper.state.kernel import prepare_kernel
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

RANDOM_SEEDS = range(8)
RECORDED_UPDATES = 16
AUDITION_UPDATES, RAMP_UPDATES, JOINT_UPDATES = 50, 100, 250
LOOKS, LOOK_EVERY = 5, 10
"""Gate losses whose mean is the gain's: one look would measure the last update's wobble."""
PUBLISHED = (
    "Spearman correlation of scores and gains, mean and 95 % interval over random seeds; the last "
    "column is what the candidate that a ranking puts first brought (fall of the gate loss)."
)

Batch = tuple[torch.Tensor, torch.Tensor]
Gains = dict[tuple[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """A mean correlation with its interval."""

    interval: Interval

    def __str__(self) -> str:
        mean, low, high = self.interval.mean, self.interval.low, self.interval.high
        numbers = (mean, low, high)
        return "{} [{}, {}]".format(*("-" if n is None else f"{n:+.2f}" for n in numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRow:
    """One ranking over all random seeds.

    Attributes:
        ranking: Its class.
        auditioned: Its correlation with the gains at admission.
        realised: Its correlation with the gains after joint training.
        first_gain: Mean realised gain of the candidate that it puts first.
    """

    ranking: str
    auditioned: Correlation
    realised: Correlation
    first_gain: float

    def to_document(self) -> dict[str, object]:
        """Return the row for JSON."""
        return {
            "ranking": self.ranking,
            "auditioned": asdict(self.auditioned.interval),
            "realised": asdict(self.realised.interval),
            "first_gain": self.first_gain,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """What one random seed showed: scores of each ranking in its order, and the gains."""

    scores: dict[str, Gains]
    auditioned: Gains
    realised: Gains


def measure_rankings(*, quick: bool = False) -> list[RankingRow]:
    """Try every ranking; ``quick`` at two random seeds and with hardly any training."""
    digits = load_digits()
    passes, joint = (2, 10) if quick else (AUDITION_UPDATES, JOINT_UPDATES)
    random_seeds = RANDOM_SEEDS[:2] if quick else RANDOM_SEEDS
    trials = [_trial(digits, seed, passes=passes, joint=joint) for seed in random_seeds]
    return [_row(name, trials) for name in trials[0].scores]


def _row(name: str, trials: list[Trial]) -> RankingRow:
    firsts = [trial.realised[next(iter(trial.scores[name]))] for trial in trials]
    return RankingRow(
        ranking=name,
        auditioned=_correlation([(t.scores[name], t.auditioned) for t in trials]),
        realised=_correlation([(t.scores[name], t.realised) for t in trials]),
        first_gain=sum(firsts) / len(firsts),
    )


def _correlation(columns: list[tuple[Gains, Gains]]) -> Correlation:
    found = (spearman([(score, gains[key]) for key, score in s.items()]) for s, gains in columns)
    return Correlation(interval=mean_interval([value for value in found if value is not None]))


def _trial(digits: Digits, random_seed: int, *, passes: int, joint: int) -> Trial:
    fork = _fork(digits, random_seed)
    model, optimizer = fork.copy()
    feed = fork.batches_after(digits)
    with Recorder(layers(model), random_seed=random_seed) as recorder:
        for batch in islice(feed, RECORDED_UPDATES):
            train_on(model, optimizer, batch)
    candidates, auditions = _candidates(model, optimizer, recorder, random_seed)
    for batch in islice(feed, passes):
        train_on(model, optimizer, batch)
        for audition in auditions.values():
            audition.shadow_update(model, batch, compute_loss)
    rankings: list[Ranking] = [
        FirstOrderGain(random_seed=random_seed),
        GradientNorm(random_seed=random_seed),
        RandomChoice(random_seed),
    ]
    return Trial(
        scores={type(r).__name__: _scores(r, recorder, candidates) for r in rankings},
        auditioned=_auditioned(model, auditions, digits),
        realised=_realised(model, optimizer, auditions, digits, list(islice(feed, joint))),
    )


def _fork(digits: Digits, random_seed: int) -> HostFork:
    """Train the demo's host for a while."""
    model = demo_host(random_seed)
    optimizer = optimizer_for(model)
    begun = HostFork.of(model, optimizer, random_seed=random_seed, update=0)
    for batch in islice(begun.batches_after(digits), FORK_UPDATE):
        train_on(model, optimizer, batch)
    return HostFork.of(model, optimizer, random_seed=random_seed, update=FORK_UPDATE)


def _candidates(
    model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, random_seed: int
) -> tuple[list[Candidate], dict[tuple[str, str], Audition]]:
    candidates, auditions, placement = [], {}, Placement(model, optimizer)
    for site, layer in layers(model).items():
        for offered in default_catalog().blueprints_for(describe_site(layer)):
            blueprint = replace(offered, init_seed=random_seed)
            seen = recorder.observations[site]
            candidates.append(make_candidate(layer, site, blueprint, seen))
            kernel = prepare_kernel(layer, blueprint)
            auditions[site, blueprint.id] = Audition.begin(
                layer,
                0,
                kernel,
                placement=placement,
                rates=[LEARNING_RATE],
                random_seed=random_seed,
                example=seen.example,
            )
    return candidates, auditions


def _scores(ranking: Ranking, recorder: Recorder, candidates: list[Candidate]) -> Gains:
    ranked = ranking.rank(recorder.observations, candidates)
    return {(e.site, e.blueprint): e.gain for e in ranked if e.gain is not None}


def _auditioned(
    model: nn.Module, auditions: dict[tuple[str, str], Audition], digits: Digits
) -> Gains:
    evaluator = Evaluator(measure_on(digits.gate))
    without = evaluator(model).loss
    return {k: without - a.evaluate(model, evaluator).loss for k, a in auditions.items()}


def _realised(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    auditions: dict[tuple[str, str], Audition],
    digits: Digits,
    feed: list[Batch],
) -> Gains:
    """Train a copy of the run with each kernel, and one without, on the same batches."""
    alone = _joint_loss(model, optimizer, None, "", digits, feed)
    return {
        key: alone - _joint_loss(model, optimizer, audition, key[0], digits, feed)
        for key, audition in auditions.items()
    }


def _joint_loss(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    audition: Audition | None,
    site: str,
    digits: Digits,
    feed: list[Batch],
) -> float:
    model = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = optimizer_for(model)
    optimizer.load_state_dict(state)
    live = None
    if audition is not None:
        assert audition.example is not None
        live = place_kernel(
            layers(model)[site],
            audition.seed_idx,
            audition.kernel,
            example=audition.example,
            alpha=0.0,
            placement=Placement(model, optimizer),
            factor=UpdateFactor(optimizer),
            peaks=[LEARNING_RATE],
            state=None if audition.optimizer is None else audition.optimizer.state,
        )
    evaluator, losses = Evaluator(measure_on(digits.gate)), []
    for update, batch in enumerate(feed):
        if live is not None:
            live.set_alpha(update, RAMP_UPDATES)
        train_on(model, optimizer, batch)
        left = len(feed) - 1 - update
        if left % LOOK_EVERY == 0 and left < LOOKS * LOOK_EVERY:
            losses.append(evaluator(model).loss)
    return sum(losses) / len(losses)
