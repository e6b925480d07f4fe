"""Packages that have no capacity, put through a real trial, and through a naive gate beside it.

Everything here starts from one host at one fixed update and never touches the arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from esper.compiler import catalog
from esper.compiler.compile import compile_blueprint
from esper.compiler.linear_form import linear_form
from esper.compiler.lowering import kernel_tensors, lower
from esper.continuity.optimizer import sync_optimizer
from esper.growth.evaluation import measuring
from esper.growth.gates import read_gate
from esper.growth.grower import Grower
from esper.growth.policies import ByHand
from esper.growth.settings import LEAST_RECORDED
from esper.registry.memory import MemoryRegistry
from esper.services.arms import compute_loss, inputs_of, train_on
from esper.services.looks import measure_on
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.report import ControlKind, TrialRecord
    from esper.contracts.site import SiteSpec
    from esper.growth.options import GrowerOptions
    from esper.services.arms import HostFork, Tell
    from esper.services.digits import Digits

SITES: Final = ("3", "7")
"""The second convolution and the readout; each random seed takes one of them."""
TRIAL_UPDATES: Final = 200
HOLD_UPDATES: Final = 100
GERMINATED_BY: Final = 5
"""Updates within which what is named by hand is chosen, recorded and germinated."""
RAMP_UPDATES: Final = 100
PLENTY: Final = 1e6
"""An overhead that buys every trial: a control is not there to save work."""
NAIVE_LEVEL: Final = 0.05


def _linear_package(site: SiteSpec) -> BlueprintIR:
    """Return the smallest kernel that a site is offered, with its activations taken out."""
    kernel = catalog.CONTROLS[site.kind].features(site, catalog.widths_for(site)[0])
    assert kernel is not None, "these families fit every site of their kinds"
    return linear_form(kernel)


BUILDERS: Final[dict[ControlKind, Callable[[SiteSpec], BlueprintIR]]] = {
    "noop": catalog.noop,
    "noise": catalog.noise_readout,
    "random_features": catalog.random_features,
    "linear": _linear_package,
}
"""What is tried, by kind."""
USELESS: Final[tuple[ControlKind, ...]] = ("random_features", "noise", "noop")
"""Kinds that help nothing at all; random seeds take them in turn, since each has its price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """What became of one control.

    Attributes:
        kind: Its kind.
        site: Where it was tried.
        trial: Its trial; None where it came to none.
        naive_accepted: Whether a naive on/off gate would have kept it.
    """

    kind: ControlKind
    site: str
    trial: TrialRecord | None
    naive_accepted: bool

    @property
    def was_admitted(self) -> bool:
        """Whether the live run took it over, as it was or made linear."""
        return self.trial is not None and bool(self.trial.taken)

    @property
    def was_kept(self) -> bool:
        """Whether it was still there after its watch."""
        return self.trial is not None and self.trial.verdict == "kept"

    @property
    def claims_capacity(self) -> bool:
        """Whether it was taken over and shown to be better than itself made linear."""
        trial = self.trial
        return trial is not None and trial.taken == "candidate" and bool(trial.capacity_shown)


def _with_other_numbers(blueprint: BlueprintIR) -> bytes:
    """Compile a kernel that begins with other random numbers than its blueprint's.

    The null of a package is its linear form, begun with the blueprint's numbers. Of a package that
    is linear itself that would be the same run twice, and no capacity would be claimed however
    loose the test is. Begun apart, the two differ as much as equal runs do.
    """
    tensors = kernel_tensors(lower(replace(blueprint, init_seed=blueprint.init_seed + 1)))
    return compile_blueprint(blueprint, tensors=tensors).kernel_binary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Package:
    """One kernel to be tried.

    Attributes:
        site: Where.
        blueprint: What.
        binary: The kernel itself where it begins with other numbers than its blueprint's.
    """

    site: str
    blueprint: BlueprintIR
    binary: bytes | None


def run_controls(digits: Digits, fork: HostFork, tell: Tell) -> tuple[ControlResult, ...]:
    """Try two controls at one site, by the trial's gates and by a naive on/off gate.

    One is useless, of the kind whose turn it is; the other is a linear package.
    """
    kinds: tuple[ControlKind, ...] = (USELESS[fork.random_seed % len(USELESS)], "linear")
    site = SITES[fork.random_seed % len(SITES)]
    spec = describe_site(fork.copy()[0].get_submodule(site))
    results = []
    for kind in kinds:
        blueprint = replace(BUILDERS[kind](spec), init_seed=fork.random_seed)
        binary = _with_other_numbers(blueprint) if kind == "linear" else None
        package = _Package(site=site, blueprint=blueprint, binary=binary)
        results.append(
            ControlResult(
                kind=kind,
                site=site,
                trial=_tried(digits, fork, package, tell),
                naive_accepted=_accepted_naively(digits, fork, package),
            )
        )
    return tuple(results)


def _tried(digits: Digits, fork: HostFork, package: _Package, tell: Tell) -> TrialRecord | None:
    """Let a package named by hand go the way of every other one; return what became of it."""
    model, optimizer = fork.copy()
    registry = MemoryRegistry()
    named = package.blueprint if package.binary is None else registry.put(package.binary)
    options: GrowerOptions = {
        "compute_loss": compute_loss,
        "evaluate": measure_on(digits.gate),
        "registry": registry,
        "policy": ByHand([(package.site, named)]),
        "horizon": 2 + LEAST_RECORDED + TRIAL_UPDATES + HOLD_UPDATES,  # chosen after one update
        "trial_updates": TRIAL_UPDATES,
        "hold_updates": HOLD_UPDATES,
        "overhead": PLENTY,
        "evaluate_every": 2 * (TRIAL_UPDATES + HOLD_UPDATES),
        "random_seed": fork.random_seed,
    }
    with Grower(model, optimizer, **options) as grower:
        for batch in fork.batches_after(digits):
            grower.step(train_on(model, optimizer, batch), batch=batch)
            if grower.updates >= GERMINATED_BY and not grower.stages:
                break
            tell()
    return next(iter(grower.report().trials), None)


def _accepted_naively(digits: Digits, fork: HostFork, package: _Package) -> bool:
    """Join a kernel at once, train both, and switch it off: what an on/off gate would say."""
    model, optimizer = fork.copy()
    layer = layers(model)[package.site]
    feed = fork.batches_after(digits)
    example = inputs_of(model, layer, digits)
    layer.graft(0, package.blueprint, alpha=1 / RAMP_UPDATES, example=example)
    sync_optimizer(model, optimizer)
    for update in range(1, TRIAL_UPDATES + 1):
        layer.set_alpha(0, min(1.0, update / RAMP_UPDATES))
        train_on(model, optimizer, next(feed))
    measure, losses = measure_on(digits.gate), []
    for alpha in (0.0, 1.0):
        layer.set_alpha(0, alpha)
        with measuring(model):
            losses.append(measure(model)[0].double().numpy())
    return read_gate(losses[0], losses[1], level=NAIVE_LEVEL).passed
