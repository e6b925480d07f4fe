"""A run that can be forked: arms with the same beginning share it.

What is shared is counted for each of them: FLOPs and seconds are those of a run by itself.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from learners import Feed, Learner, Measure, learner_of
from torch import nn

from esper.growth.flops import counting

Rate = Callable[[int], float]
"""Update, from 0, to the share of the peak rate."""


def warm_then_constant(warmup: int) -> Rate:
    """Rise over so many updates, and stay."""
    return lambda update: min(1.0, (update + 1) / warmup)


def falling(start: int, end: int, rate: Rate) -> Rate:
    """Follow a rate until ``start``, then fall in a straight line to 0 at ``end``."""
    return lambda update: rate(update) * min(1.0, (end - update) / max(1, end - start))


@dataclass(slots=True, kw_only=True, eq=False)
class Training:
    """A model that is trained.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        learner: Its data and its loss.
        batches: The batch of each update.
        watch: Reads the curve.
        peak_rate: The rate that shares refer to.
        updates: Updates done.
        flops: FLOPs of them.
        seconds: Seconds of them.
        curve: Updates, FLOPs and loss, where it was looked at.
        look_every: Updates between two looks.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learner: Learner
    batches: Feed
    watch: Measure
    peak_rate: float
    look_every: int
    updates: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    flops_by_shape: dict[object, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, random_seed: int, settings: Mapping[str, Any]) -> Self:
        """Begin a run with the optimizer that all arms have."""
        learner = learner_of(settings)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings["rate"],
            betas=(0.9, 0.95),
            weight_decay=settings["weight_decay"],
            fused=True,
        )
        return cls(
            model=model,
            optimizer=optimizer,
            learner=learner,
            batches=learner.feed(settings, random_seed),
            watch=learner.gate(settings),
            peak_rate=settings["rate"],
            look_every=settings["look_every"],
        )

    def fork(self) -> Self:
        """Return a copy that goes on by itself."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return type(self)(
            model=model,
            optimizer=optimizer,
            learner=self.learner,
            batches=self.batches,
            watch=self.watch,
            peak_rate=self.peak_rate,
            look_every=self.look_every,
            updates=self.updates,
            flops=self.flops,
            seconds=self.seconds,
            curve=[*self.curve],
            flops_by_shape=self.flops_by_shape,
        )

    def train(self, end: int, rate: Rate) -> Self:
        """Train until so many updates are done."""
        while self.updates < end:
            begin = time.perf_counter()
            self._update(rate)
            self.seconds += time.perf_counter() - begin
            if self.updates % self.look_every == 0:
                self.look()
        return self

    def train_for(self, flops: float, per_update: float) -> Self:
        """Train for so many FLOPs, at a rate that falls in a straight line to 0."""
        end = self.updates + max(1, round(flops / per_update))
        return self.train(end, falling(self.updates, end, lambda _: 1.0))

    def train_falling(self, flops: float, per_update: float, warmup: int) -> Self:
        """Train for so many FLOPs from the start: warm up, and fall in a straight line to 0."""
        end = max(warmup + 1, round(flops / per_update))
        return self.train(end, falling(warmup, end, warm_then_constant(warmup)))

    def look(self) -> float:
        """Read the loss, and keep it."""
        loss = self.watch(self.model)
        self.curve.append((self.updates, self.flops, loss))
        return loss

    def _update(self, rate: Rate) -> None:
        share = rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * share
        batch = self.batches.of_update(self.updates)
        shape = self._shape()
        if shape in self.flops_by_shape:
            self._forward_and_backward(batch)
        else:
            self._try(batch)
            with counting() as counter:
                self._forward_and_backward(batch)
            self.flops_by_shape[shape] = float(counter.get_total_flops())
        self.optimizer.step()
        self.updates += 1
        self.flops += self.flops_by_shape[shape]

    def _try(self, batch: Any) -> None:
        """Call the model once, where nothing is counted: a block that sleeps learns its form."""
        buffers = [b.clone() for b in self.model.buffers()]
        with torch.no_grad():
            self.learner.compute_loss(self.model, batch)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _forward_and_backward(self, batch: Any) -> None:
        loss = self.learner.compute_loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()

    def _shape(self) -> object:
        """Return what the FLOPs of an update depend on: the classes and parameters at work."""
        return tuple(
            (type(m).__qualname__, *(p.shape for p in m.parameters(recurse=False)))
            for m in self.model.modules()
        )
