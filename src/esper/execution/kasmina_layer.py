"""The layer: a host object with seeds, of which each may hold a kernel."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

import torch
from torch import nn

from esper.contracts.errors import KernelLoadError, SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.statistics import layer_statistics
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache, shared_cache
from esper.fetching.error_recovery import ErrorRecoveryManager
from esper.fetching.kernel_cache import KernelCache
from esper.forward.class_change import adopt_class, choose_forward, refusal, return_class
from esper.forward.generated_class import generated_base, reduce_layer
from esper.forward.host_view import host_view
from esper.forward.written_alphas import take_written_alphas
from esper.running.kernel_executor import RealKernelExecutor, shared_executor
from esper.seeds import folding, grafting, maintenance, rebuilding, shadow
from esper.seeds.layer_health import monitor_of
from esper.seeds.structure import structure as structure_of
from esper.state.host_parts import SEEDS_PREFIX
from esper.state.kernel import Kernel, prepare_kernel, reference_tensor
from esper.state.layer_record import RECORD, LayerRecord
from esper.state.roster import tell_of_building
from esper.state.site import widths
from esper.state.state_layout import KasminaStateLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import SupportsIndex, Unpack

    from torch import Tensor

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.choices import Guard, Mode, Position
    from esper.contracts.ports import KernelSource
    from esper.forward.generated_class import CompleteCall, OpenRun
    from esper.resilience.health_monitor import HealthMonitor
    from esper.seeds.folding import FoldCertificate
    from esper.seeds.structure import SeedStructure
    from esper.state.layer_call import Example
    from esper.state.waiting import GraftOptions


class LayerOptions(TypedDict, total=False):
    """What every layer's constructor takes beside its host's arguments, by name.

    Attributes:
        num_seeds: Number of seeds, at least 1.
        cache_size_mb: Budget in MiB of a kernel cache of the layer's own.
        telemetry_enabled: Whether calls are counted and kernels are timed.
        source: Where :meth:`KasminaLayer.load_kernel` fetches from.
    """

    num_seeds: int
    cache_size_mb: int
    telemetry_enabled: bool
    source: KernelSource | None


class _ConstructorSignature:
    """What ``inspect.signature`` and ``help`` show of a class whose ``__new__`` passes all on."""

    def __get__(self, layer: KasminaLayer | None, family: type[KasminaLayer]) -> inspect.Signature:
        if layer is not None:  # calling a layer is its host's forward, not its constructor
            raise AttributeError("__signature__")
        return inspect.signature(family._construct)  # noqa: SLF001 - its own module


class KasminaLayer(nn.Module):
    """A layer with seeds; by default over a linear host.

    It is the host object itself: calling this class builds a host, or takes ``original_layer``,
    and changes that object's class to one made from this class and the host's. So parameters,
    names, hooks and ``isinstance`` are the host's. While no seed contributes, its forward is the
    host class's function.

    Args:
        input_size: Input features of a fresh host; ignored where ``original_layer`` is given.
        output_size: Output features of a fresh host; ignored where ``original_layer`` is given.
        num_seeds: Number of seeds, at least 1.
        cache_size_mb: Budget in MiB of a kernel cache of the layer's own; used only where
            ``source`` is given.
        telemetry_enabled: Whether calls are counted and kernels are timed.
        original_layer: The host; taken as it is, not copied.
        source: Where :meth:`load_kernel` fetches from.

    Raises:
        ValueError: ``num_seeds`` is less than 1, or ``original_layer`` cannot be a site.
    """

    LEFT_TO_HOST: ClassVar[frozenset[str]] = frozenset()
    """Names of the layer that the host has too and keeps, meaning the same by them."""
    complete_call: ClassVar[CompleteCall | None] = None
    """``(args, kwargs) -> (args, kwargs)``: fills in what a caller may leave out; None: nothing."""
    open_run: ClassVar[OpenRun | None] = None
    """``(record, call) -> run``: begins a call, returns what runs kernels; None: ``run_kernel``.
    """

    __signature__ = _ConstructorSignature()

    _kasmina: LayerRecord

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a host object whose class is one made from ``cls``."""
        if generated_base(cls) is not None:  # copying and FSDP2 make an empty object
            return object.__new__(cls)
        return cls._construct(*args, **kwargs)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the object is complete when ``__new__`` returns it."""

    @classmethod
    def _construct(
        cls,
        input_size: int,
        output_size: int,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        original_layer: nn.Module | None = None,
        source: KernelSource | None = None,
    ) -> nn.Module:
        host = nn.Linear(input_size, output_size) if original_layer is None else original_layer
        return cls.adopt_as(
            host,
            name="",
            num_seeds=num_seeds,
            telemetry_enabled=telemetry_enabled,
            source=source,
            cache_size_mb=cache_size_mb,
        )

    @classmethod
    def adopt_as(
        cls,
        module: nn.Module,
        *,
        name: str,
        num_seeds: int = 4,
        telemetry_enabled: bool = False,
        source: KernelSource | None = None,
        cache_size_mb: int | None = None,
    ) -> KasminaLayer:
        """Make ``module`` a layer of this class and return it; see ``host_class.adopt``.

        Raises:
            ValueError: ``num_seeds`` is less than 1, or the module cannot be a site.
        """
        reason = refusal(module, cls)
        if reason is not None:
            msg = f"{type(module).__name__} cannot be a site: {reason}"
            raise ValueError(msg)
        record = LayerRecord(
            name=name,
            num_seeds=num_seeds,
            device=reference_tensor(module).device,
            telemetry_enabled=telemetry_enabled,
            source=source,
            cache_size_mb=cache_size_mb,
        )
        module.__dict__[RECORD] = record
        try:
            adopt_class(module, cls)
            choose_forward(module)
        except BaseException:
            return_class(module)
            raise
        return cast("KasminaLayer", module)

    # ---- the specification's attributes

    @property
    def name(self) -> str:
        """Name of the layer in its model, for people."""
        return self._kasmina.name

    @property
    def input_size(self) -> int:
        """Input features of the host, for convolutions its channels; 0 where it does not say."""
        return widths(self)[0]

    @property
    def output_size(self) -> int:
        """Output features or channels of the host; 0 where it does not say."""
        return widths(self)[1]

    @property
    def num_seeds(self) -> int:
        """Number of seeds."""
        return self._kasmina.layout.num_seeds

    @property
    def default_layer(self) -> nn.Module:
        """The host: an object of its class over this object's own state."""
        return host_view(self)

    @property
    def state_layout(self) -> KasminaStateLayout:
        """State of the seeds."""
        self.take_written_alphas()
        return self._kasmina.layout

    @property
    def telemetry_enabled(self) -> bool:
        """Whether calls are counted and kernels are timed; may be set."""
        return self._kasmina.telemetry_enabled

    @telemetry_enabled.setter
    def telemetry_enabled(self, enabled: bool) -> None:
        self._kasmina.telemetry_enabled = enabled
        choose_forward(self)

    @property
    def forward_count(self) -> int:
        """Calls since birth, counted while telemetry is on and outside of torch.compile."""
        return self._kasmina.forward_count

    @property
    def kernel_execution_count(self) -> int:
        """Kernel calls since birth, counted as :attr:`forward_count` is."""
        return self._kasmina.kernel_execution_count

    @property
    def kernel_cache(self) -> KernelCache:
        """Where artifacts are kept: the process's cache of the layer's source.

        Without a source nothing can be loaded through it, and it says so.
        """
        record = self._kasmina
        cache = record.shared.find(KernelCache)
        if cache is None:
            cache = record.shared.keep(KernelCache, _cache(record.source, record.cache_size_mb))
        return cache

    @property
    def error_recovery(self) -> ErrorRecoveryManager:
        """What tries failed loads again; layers of one source share the budget of retries."""
        shared = self._kasmina.shared
        manager = shared.find(ErrorRecoveryManager)
        if manager is None:
            budget = getattr(self.kernel_cache, "retry_budget", None)
            manager = shared.keep(
                ErrorRecoveryManager,
                ErrorRecoveryManager(max_retries=3, budget=budget, source=self._kasmina.source),
            )
        return manager

    @property
    def health_monitor(self) -> HealthMonitor:
        """Health of the calls of the layer's kernels, as ``esper.maintain`` has read them."""
        return monitor_of(self._kasmina)

    @property
    def kernel_executor(self) -> RealKernelExecutor:
        """What executes kernels by themselves: one for the process. A seed runs its own kernel."""
        return shared_executor()

    # ---- kernels in seeds

    def graft(
        self,
        seed_idx: int,
        kernel: Kernel | str,
        alpha: float | None = None,
        mode: Mode | None = None,
        position: Position | None = None,
        guard: Guard = "always",
        example: Example | None = None,
    ) -> None:
        """Put a kernel into a seed. A kernel that is there works until this one is ready.

        Args:
            seed_idx: The seed, in [0, num_seeds): DORMANT, LOADING (reserved), ACTIVE (the kernel
                is exchanged) or ERROR_RECOVERY.
            kernel: A module (taken, not copied), a blueprint, an artifact, a prepared kernel, or
                the name that a kernel of the default catalog has for this layer, as
                ``grower.suggest()`` prints it.
            alpha: In [0, 1]; None means 1 where the layer's output at alpha 1 equals the host's,
                else 0, so that nothing changes at birth.
            mode: ``"add"``, ``"replace"``, or None for what the kernel carries.
            position: ``"parallel"``, ``"serial"``, or None for what the kernel carries.
            guard: ``"always"``, ``"step"`` (needs :meth:`enable_step_guard`) or ``"off"``.
            example: An input of the layer for the probe: a tensor, a tuple of positional
                arguments, or a ``LayerCall``. None: a kernel that has been in shadow at this layer
                and whose alpha is given was seen to work; otherwise an input is made from what the
                layer says it takes (linear, convolution, norm, attention, recurrent, embedding).
                Where it does not say, the seed waits in LOADING: the next forward only notes its
                input, and the kernel is probed and made live behind the outermost forward (under
                activation checkpointing before the one that follows its backward), or at
                ``esper.maintain``, ``esper.sync_optimizer`` or the Grower's next step.

        Raises:
            KernelRefusedError: The probe refused the kernel; nothing was inserted.
            SeedLifecycleError: The seed is a fossil.
            ValueError: An argument is out of range, contradicts the kernel, the catalog has no
                kernel of that name, or the replacing alphas of the layer would sum to more than 1;
                or the kernel is, or holds, a module of the model. It may share the model's weights.
            TypeError: ``kernel`` is no kernel.
        """
        grafting.graft(
            self,
            seed_idx,
            kernel,
            alpha=alpha,
            mode=mode,
            position=position,
            guard=guard,
            example=example,
        )
        self._kasmina.loads[seed_idx].supersede()

    async def load_kernel(
        self, seed_idx: int, artifact_id: str, **options: Unpack[GraftOptions]
    ) -> bool:
        """Fetch an artifact, verify it, and graft it; training goes on meanwhile.

        A kernel that the seed holds works on until the new one is ready, and a failure changes
        nothing. What may help is tried again by :attr:`error_recovery`.

        Args:
            seed_idx: The seed, in [0, num_seeds).
            artifact_id: sha256 of the artifact.
            options: As for :meth:`graft`.

        Returns:
            False where the source answered that it has no such artifact, else True.

        Raises:
            KernelSourceUnavailable: There is no source, or it did not answer.
            KernelCorruptError: The bytes are not what their id promises.
            KernelRefusedError: The probe refused the kernel.
            SeedLifecycleError: The seed is a fossil, or was unloaded, cancelled or given a kernel
                that was asked for later meanwhile.
            ValueError: An argument is out of range; told before anything is fetched.
            TypeError: An argument is unknown or of the wrong type; as above.
        """
        grafting.check_options(self, seed_idx, options, asked="load_kernel")
        load = functools.partial(self.kernel_cache.load_kernel, artifact_id)
        with self._loading(seed_idx) as number:
            if self.kernel_cache.source is None:  # another try does not give it one
                artifact = await load()
            else:
                artifact = await self.error_recovery.run(load, self._context(seed_idx, artifact_id))
            return self._graft_loaded(seed_idx, number, artifact, options)

    def load_kernel_sync(
        self, seed_idx: int, artifact_id: str, **options: Unpack[GraftOptions]
    ) -> bool:
        """Do what :meth:`load_kernel` does, and wait for it; another thread tries again."""
        grafting.check_options(self, seed_idx, options, asked="load_kernel_sync")
        load = functools.partial(self.kernel_cache.load_kernel_sync, artifact_id)
        with self._loading(seed_idx) as number:
            if self.kernel_cache.source is None:  # another try does not give it one
                artifact = load()
            else:
                artifact = self.error_recovery.run_sync(load, self._context(seed_idx, artifact_id))
            return self._graft_loaded(seed_idx, number, artifact, options)

    def _context(self, seed_idx: int, artifact_id: str) -> dict[str, object]:
        return {"layer": self.name, "seed_idx": seed_idx, "artifact_id": artifact_id}

    @contextmanager
    def _loading(self, seed_idx: int) -> Iterator[int]:
        """Keep a dormant seed in LOADING; the last load gives it back where nothing came of any.

        Yields the load's number in the seed's :class:`~esper.state.load_order.LoadOrder`.
        """
        record = self._kasmina
        is_dormant = record.layout.state(seed_idx) == SeedLifecycleState.DORMANT
        loads = record.loads[seed_idx]
        if is_dormant:
            self.reserve(seed_idx)
            loads.is_reserved = True
        number = loads.begin()
        try:
            yield number
        finally:
            loads.num_under_way -= 1
            if loads.is_reserved and not loads.num_under_way:
                loads.is_reserved = False
                if seed_idx not in record.waiting:
                    grafting.cancel(self, seed_idx)

    def _graft_loaded(
        self,
        seed_idx: int,
        number: int,
        artifact: CompiledKernelArtifact | None,
        options: GraftOptions,
    ) -> bool:
        loads = self._kasmina.loads[seed_idx]
        if not loads.is_wanted(number):
            msg = (
                f"seed {seed_idx} of layer {self.name!r} was given up while it loaded, or holds a "
                "kernel that was asked for later"
            )
            raise SeedLifecycleError(msg)
        if artifact is not None:
            grafting.graft(self, seed_idx, artifact, **options)
            loads.settle(number)
            waiting = self._kasmina.waiting.get(seed_idx)
            user = self.seed_kernel(seed_idx) if waiting is None else waiting.request.kernel.module
            self.kernel_cache.pin_while(artifact.artifact_id, user)
        return artifact is not None

    def unload_kernel(self, seed_idx: int) -> bool:
        """Make a seed dormant and drop its kernel; the host's weights are not touched.

        Returns:
            False where the seed was dormant already.

        Raises:
            SeedLifecycleError: The seed is a fossil.
            ValueError: ``seed_idx`` is not in [0, num_seeds).
        """
        return grafting.unload(self, seed_idx)

    def set_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set how much an ACTIVE seed contributes.

        Args:
            seed_idx: The seed, in [0, num_seeds).
            alpha: In [0, 1], kept in float32; at 0 the kernel is not run.

        Raises:
            SeedLifecycleError: The seed is not ACTIVE; a fossil's alpha is frozen.
            ValueError: An argument is out of range, or the replacing alphas of the layer would
                sum to more than 1.
        """
        grafting.set_alpha(self, seed_idx, alpha)

    def set_guard(self, seed_idx: int, guard: Guard) -> None:
        """Set where the faults of a contributing seed are stopped.

        Raises:
            SeedLifecycleError: The seed does not contribute.
            ValueError: ``guard`` is unknown, or ``"step"`` without :meth:`enable_step_guard`.
        """
        grafting.set_guard(self, seed_idx, guard)

    def enable_step_guard(self, keep_buffers: Callable[[], None] | None = None) -> None:
        """Allow ``guard="step"``: an optimizer's pre-hook promises to read the flags.

        Args:
            keep_buffers: Called where a seed comes under ``guard="step"``, so that its first step
                can be undone already.
        """
        self._kasmina.has_step_guard = True
        self._kasmina.keep_buffers = keep_buffers

    def reserve(self, seed_idx: int) -> None:
        """Move a DORMANT seed to LOADING, so that nobody else takes it.

        Raises:
            SeedLifecycleError: The seed is neither DORMANT nor in ERROR_RECOVERY.
        """
        grafting.reserve(self, seed_idx)

    def cancel(self, seed_idx: int) -> None:
        """Move a LOADING seed back to DORMANT.

        Raises:
            SeedLifecycleError: The seed is not LOADING.
        """
        if not grafting.cancel(self, seed_idx):
            state = self.state_layout.state(seed_idx)
            msg = f"seed {seed_idx} of layer {self.name!r} is {state.name}, expected LOADING"
            raise SeedLifecycleError(msg)
        self._kasmina.loads[seed_idx].give_up()

    def fossilize(self, seed_idx: int) -> FoldCertificate:
        """Make an ACTIVE seed permanent; fold it into the host's weights where that is exact.

        Returns:
            Whether it was folded, the measured relative difference, and the reason if not.

        Raises:
            SeedLifecycleError: The seed is not ACTIVE.
        """
        return folding.fossilize(self, seed_idx)

    def shadow(
        self, seed_idx: int, kernel: Kernel, alpha: float = 1.0
    ) -> AbstractContextManager[None]:
        """Let a kernel contribute while it is no part of the model.

        Args:
            seed_idx: The seed; a kernel that stands there makes room meanwhile.
            kernel: As for :meth:`graft`; hand over a prepared kernel to train it.
            alpha: In (0, 1].

        Raises:
            ValueError: An argument is out of range, or the seed is in shadow already.
        """
        return shadow.shadow(self, seed_idx, prepare_kernel(self, kernel), alpha)

    def take_written_alphas(self) -> None:
        """Let state and plan follow the alphas that others have written to the buffers.

        Averaged models, loads in place and broadcasts do. Whoever asks the layer gets the alpha
        that its forward multiplies with; a forward that passes by kernels at alpha 0 looks too.
        """
        take_written_alphas(self)

    # ---- what there is

    def seed_kernel(self, seed_idx: int) -> nn.Module | None:
        """Return the kernel that a seed holds (ACTIVE, isolated, or an unfolded fossil)."""
        self.state_layout.check_index(seed_idx)
        seed = self._kasmina.seeds.get(seed_idx)
        return None if seed is None else seed.slot.kernel

    def alpha(self, seed_idx: int) -> float:
        """Return a seed's alpha, in [0, 1]; 0 for one without a kernel."""
        return self.state_layout.alpha(seed_idx)

    def structure(self) -> list[SeedStructure]:
        """Return the seeds that are not dormant as JSON values, for :meth:`build`."""
        self.take_written_alphas()
        return structure_of(self)

    def build(self, structure: Sequence[SeedStructure]) -> None:
        """Make the seeds those of a structure; see ``rebuilding.build``."""
        rebuilding.build(self, structure)

    def get_stats(self) -> dict[str, Any]:
        """Return the layer's statistics, as the specification lists them.

        Reads the device's counters first. What has happened is told by the next ``esper.maintain``
        or step of a Grower, as if nobody had asked.
        """
        maintenance.read_calls(self)
        return layer_statistics(self)

    # ---- copying, saving, loading

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Return a reduction that makes the class anew from the host's, which can be imported."""
        self.take_written_alphas()
        return reduce_layer(cast("tuple[object, ...]", super().__reduce_ex__(protocol)), type(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        """Follow the model; a host without tensors has no other way to know device and dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch has none
        before = self._kasmina.surroundings
        here = torch.empty(0) if before is None else before
        moved = fn(here)
        if moved is not here:
            self._kasmina.surroundings = moved
        self.take_written_alphas()
        return self

    def __copy__(self) -> KasminaLayer:
        """Return a layer that shares tensors, kernels included, and has seeds of its own."""
        self.take_written_alphas()
        copied: KasminaLayer = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        rebuilding.share_kernels(self, copied)
        return copied

    def _replicate_for_data_parallel(self) -> KasminaLayer:
        """Make a replica for another device, where kernels would not follow.

        Raises:
            SeedLifecycleError: A seed holds a kernel.
        """
        if self._kasmina.seeds:
            msg = (
                f"layer {self.name!r} holds kernels, which torch.nn.DataParallel does not "
                "replicate: use torch.nn.parallel.DistributedDataParallel"
            )
            raise SeedLifecycleError(msg)
        replica: KasminaLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call] # torch has none
        return replica

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of a copy, and put hooks where the original has them."""
        super().__setstate__(state)  # type: ignore[no-untyped-call] # torch has none
        rebuilding.attach_hooks(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Build the seeds that the dict has, then load as the host does; or load nothing here."""
        missing_keys, unexpected_keys, error_messages = args[-3:]
        before = dict(self._kasmina.seeds)
        try:
            left = rebuilding.build_from_state_dict(self, state_dict, f"{prefix}{SEEDS_PREFIX}")
        except (KernelLoadError, ValueError) as error:
            error_messages.append(str(error))
            self._keep_own_state(state_dict, prefix)
        else:
            unexpected_keys += left
            for key in left:  # of a load that is not strict torch says nothing
                warnings.warn(key.reason, stacklevel=2)
            if self._kasmina.seeds != before:
                tell_of_building(self, missing_keys)
        self._kasmina.is_loading = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._kasmina.is_loading = False

    def _keep_own_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Exchange what a dict, torch's own copy of it, has for this layer by what is there."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))


def _cache(source: KernelSource | None, cache_size_mb: int | None) -> KernelCache:
    if cache_size_mb is None:
        return shared_cache(source)
    return EnhancedKernelCache(max_cache_size_mb=cache_size_mb, source=source)
