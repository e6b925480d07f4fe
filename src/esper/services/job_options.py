"""What a command may change of a user's job, and where its random numbers start."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from esper.contracts.errors import GrowthError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from esper.contracts.ports import Registry
    from esper.growth.budget import Budget
    from esper.growth.job import GrowthJob
    from esper.growth.options import GrowerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What is other than in the job. None leaves what the job says.

    Attributes:
        epochs: Passes over the training data, at least 1.
        overhead: What growing may take, in FLOPs, as a ratio to those of training; at least 0.
        random_seed: Starts the generators of Python, numpy and torch before the job is made, and
            the controller's own.
        budget: Limits of :class:`esper.Budget` by name, the others as the job has them; None
            lifts a limit.
        control: Whether the same job is also trained without growth.
        registry: Where kernels come from and go to.
    """

    epochs: int | None = None
    overhead: float | None = None
    random_seed: int | None = None
    budget: Mapping[str, float | None] = field(default_factory=dict)
    control: bool = False
    registry: Registry | None = None

    def apply(self, job: GrowthJob) -> GrowthJob:
        """Return the job as it is to be trained.

        Raises:
            GrowthError: The budget has no limit of that name.
            ValueError: A value is out of its range.
        """
        from esper.growth.job import with_options

        options: GrowerOptions = {}
        if self.overhead is not None:
            options["overhead"] = self.overhead
        if self.random_seed is not None:
            options["random_seed"] = self.random_seed
        if self.registry is not None:
            options["registry"] = self.registry
        if self.budget:
            options["budget"] = _budget(self.budget, job)
        return with_options(job, epochs=self.epochs, **options)


def parse_budget(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the limits that ``["packages=2", "flops=none"]`` stands for.

    A number alone is the share of the host's parameters that growth may add, by one graft or by
    all of them, however small the host is.

    Raises:
        GrowthError: A text is neither a number nor NAME=NUMBER.
    """
    limits: dict[str, float | None] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        value = _limit(text, number)
        names = (name,) if equals else ("parameters", "total_parameters")
        limits |= dict.fromkeys(names, value)
        if not equals:
            limits["small_host"] = 0.0
    return limits


def _limit(text: str, number: str) -> float | None:
    if number.lower() == "none":
        return None
    try:
        return float(number)
    except ValueError as error:
        msg = (
            f"--budget is a share of the host's parameters, for example 0.2, or NAME=NUMBER, for "
            f"example packages=2 or flops=none; got {text!r}"
        )
        raise GrowthError(msg) from error


def _budget(limits: Mapping[str, float | None], job: GrowthJob) -> Budget:
    from dataclasses import replace

    from esper.growth.budget import Budget
    from esper.growth.job import options_of

    whole = {f.name for f in fields(Budget) if f.name in ("packages", "small_host", "small_graft")}
    known = [f.name for f in fields(Budget)]
    for name, value in limits.items():
        if name not in known:
            msg = f"the budget has no {name!r}; its limits are {', '.join(known)}"
            raise GrowthError(msg)
        if name in whole and value is not None and not value.is_integer():
            msg = f"--budget {name} is a whole number, got {value:g}"
            raise GrowthError(msg)
    typed = {n: int(v) if n in whole and v is not None else v for n, v in limits.items()}
    own = options_of(job.grower).get("budget") or Budget()
    return replace(own, **typed)  # type: ignore[arg-type] # each was checked above


def start_random(random_seed: int) -> None:
    """Start the generators of Python, numpy and torch, on every device."""
    import numpy as np
    import torch

    random.seed(random_seed)
    np.random.seed(random_seed % 2**32)
    torch.manual_seed(random_seed)


def random_start() -> Callable[[], None]:
    """Read where the generators of Python, numpy and torch are.

    Returns:
        A function that puts them back there.
    """
    import numpy as np
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    of_torch = torch.get_rng_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    module = None if accelerator is None else torch.get_device_module(accelerator)
    num_devices = torch.accelerator.device_count()
    of_devices = [module.get_rng_state(i) for i in range(num_devices)] if module else []

    def put_back() -> None:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        for i, state in enumerate(of_devices):
            assert module is not None, "it gave the states"
            module.set_rng_state(state, i)

    return put_back
