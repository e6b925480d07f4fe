"""Kernels that appear in a replicated model: the same on every rank, and averaged like the rest.

DistributedDataParallel averages the parameters that it found when it was made, and no later ones:
each rank would train a kernel of its own, silently. And it waits, on every rank, for a gradient of
each parameter that it found: a kernel that one rank has isolated would never give it one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors

from esper.continuity.agreement import Ranks
from esper.continuity.sharding import expect_idle_ranks, is_shard, synchronizes
from esper.state.host_parts import is_in_a_seed
from esper.state.layer_record import RECORD, record_of
from esper.state.roster import remember_change
from esper.state.shards import group_of_shards, here, spread_like

if TYPE_CHECKING:
    from esper.continuity.ensemble import AnyOptimizer

BUCKET_BYTES: Final = 25 * 2**20
"""Size of what is averaged at a time; DistributedDataParallel's own default."""

Standing = Literal["known", "late", "appeared"]
"""Whether the replicated model averages a parameter itself, Esper does, or nobody yet."""

SeedKey = tuple[nn.Module, int]
"""A layer and the index of a seed of it."""

OverRanks = Callable[[Sequence[SeedKey], Tensor], Tensor]
"""``(seeds, flags)`` to the flags' maximum over the ranks; shape (seeds, flags of each), bool."""

AverageGradients = Callable[["AnyOptimizer"], None]
"""Replaces the gradients of what an optimizer trains by their means over the ranks."""

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def replicas(model: nn.Module) -> DistributedDataParallel | None:
    """Return the model, or what ``torch.compile`` holds of it, if that is a replicated one."""
    inner: object = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def num_ranks(model: DistributedDataParallel) -> int:
    """Return over how many ranks a model is replicated."""
    return dist.get_world_size(model.process_group)


def is_first(model: nn.Module) -> bool:
    """Say whether this is the first rank of those that train a model; so is one by itself."""
    ranks = ranks_of(model)
    return ranks is None or ranks.is_first


def spread(model: nn.Module) -> nn.Module | None:
    """Return what several ranks train together: a replicated model, or one that FSDP2 has sharded.

    Args:
        model: The model as its owner has it.

    Returns:
        None where there are no ranks, or only this one of a sharded model knows of it.
    """
    replicated = replicas(model)
    if replicated is not None:
        return replicated
    return None if _group_of(model) is None else bare(model)


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the ranks that train a model together; None where there are none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    replicated = replicas(model)
    return group_of_shards(model) if replicated is None else replicated.process_group


def num_apart(model: nn.Module) -> int:
    """Return how many processes of a group each train the model by itself, for all that is known.

    Args:
        model: The live model, which may be replicated.

    Returns:
        1 where there is no group, or where it is known which ranks train the model together.
    """
    is_alone = not (dist.is_available() and dist.is_initialized()) or _group_of(model) is not None
    return 1 if is_alone else dist.get_world_size()


def share_kernels(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    seeds: Mapping[str, SeedKey],
) -> None:
    """Give kernels that came later rank 0's values, and average their gradients from now on.

    Every rank has to call this, and the ranks agree in it on what they all have. The gradients are
    averaged at the end of each backward that synchronizes, before anybody can read them, also for a
    rank whose backward did not reach them; under ``no_sync`` they accumulate, as the others do.

    Args:
        model: What :func:`spread` returned.
        params: Trainable parameters of kernels by their names in the model. Those that the model
            knew when it was replicated or sharded are left to it.
        seeds: Every seed that holds a kernel, by a name that is the same on every rank.
    """
    _replication(model).follow(model, params, seeds)


def worst_of_ranks(model: nn.Module | None) -> OverRanks | None:
    """Return what takes the elementwise maximum of flags over the ranks; None without ranks."""
    if model is None or not _REPLICATIONS:
        return None
    known = _REPLICATIONS.get(replicas(model) or bare(model))
    return None if known is None or known.is_alone else known.worst


def averaging(model: nn.Module) -> AverageGradients | None:
    """Return what averages the gradients of a twin over the ranks of the live run.

    Args:
        model: The live model, which may be replicated or sharded.

    Returns:
        A function of the twin's optimizer, to be called on every rank behind the backward; None
        where there is one rank. It raises RankFailedError where another rank has no gradients.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return None

    def average(optimizer: AnyOptimizer) -> None:
        held = [p for own in optimizer.param_groups for p in own["params"] if p.requires_grad]
        ranks.vote()
        for bucket in _buckets(held):
            _average(bucket, ranks.group)

    return average


def ranks_of(model: nn.Module) -> Ranks | None:
    """Return the ranks that train a model together; None where there is one."""
    group, known_as = _group_of(model), replicas(model) or bare(model)
    if group is None or dist.get_world_size(group) == 1:
        return None
    found = _RANKS.get(known_as)
    if found is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found = _RANKS[known_as] = Ranks(group, device)
    return found


def in_step(model: nn.Module, work: Callable[[], _T]) -> _T:
    """Do what may fail on one rank alone: it returns on every rank, or raises on every rank.

    To be called by all ranks at the same moment, as all that follow.

    Args:
        model: The live model, which may be replicated.
        work: What is done.

    Raises:
        RankFailedError: Another rank failed. On that one its own error is raised.
    """
    ranks = ranks_of(model)
    return work() if ranks is None else ranks.in_step(work)


def go_on(model: nn.Module) -> None:
    """Return where every rank of a model got as far as this.

    Args:
        model: The live model, which may be replicated.

    Raises:
        RankFailedError: Another rank failed on its way here.
    """
    ranks = ranks_of(model)
    if ranks is not None:
        ranks.vote()


def each_rank(model: nn.Module, work: Callable[[], _T]) -> list[_T]:
    """Do something on every rank as :func:`in_step` does; return what each has, in their order.

    Args:
        model: The live model, which may be replicated; where it is not, there is one rank.
        work: Returns plain values, that pickle takes.
    """
    ranks = ranks_of(model)
    return [work()] if ranks is None else ranks.each(work)


def over_ranks(model: nn.Module, value: _T) -> list[_T]:
    """Return what each rank that trains a model says, in their order; the value alone without.

    Args:
        model: The live model, which may be replicated or sharded.
        value: This rank's: plain values, that pickle takes.
    """
    return each_rank(model, lambda: value)


def of_first_rank(model: nn.Module, make: Callable[[], bytes]) -> bytes:
    """Return the bytes that the first rank makes; the others make none, and are sent them.

    Args:
        model: The live model, which may be replicated.
        make: Called on the first rank alone.
    """
    ranks = ranks_of(model)
    return make() if ranks is None else ranks.of_one(0, make)


def all_agree(model: nn.Module, choice: int) -> bool:
    """Say whether every rank of a replicated model made the same choice; True where there is one.

    Args:
        model: The live model, which may be replicated.
        choice: This rank's, a small number.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return True
    least, most = ranks.vote(choice)
    return least == most


class Woken(NamedTuple):
    """What belongs to blocks that wake in a replicated model.

    Attributes:
        params: Their trainable parameters, by names that are the same on every rank: the module
            that holds each, and itself.
        buffers: Their buffers, by name: the module that holds each, and its name there.
        state: What optimizers keep of the parameters: tensors to be the same on every rank.
        frozen: Their other parameters.
    """

    params: dict[str, tuple[nn.Module, nn.Parameter]]
    buffers: dict[str, tuple[nn.Module, str]]
    state: list[Tensor]
    frozen: list[nn.Parameter]


def share_woken(model: DistributedDataParallel, woken: Woken) -> None:
    """Make blocks that wake equal on every rank, and average what they train from now on.

    Every rank has to wake the same blocks. Values, buffers and the optimizer's state become rank
    0's. At the end of each backward that synchronizes, gradients are averaged as DDP does for
    those that it knows, and so are floating buffers, if it is to look after buffers at all.

    Args:
        model: The replicated model, which has ignored the blocks since it was made.
        woken: What is to be shared.

    Raises:
        ValueError: The ranks wake other blocks, or the model does not ignore them.
    """
    _replication(model).wake(model, woken)


def forget_woken(model: DistributedDataParallel, blocks: Iterable[nn.Module]) -> None:
    """Average nothing more for blocks that were put to sleep again.

    Args:
        model: The replicated model.
        blocks: The blocks.
    """
    _replication(model).forget({id(part) for block in blocks for part in block.modules()})


def any_rank(model: nn.Module, *, here: bool) -> bool:
    """Say whether something is so on any rank that trains the model; every rank has to ask.

    Args:
        model: The model as its owner has it: replicated, sharded by FSDP2, or neither.
        here: Whether it is so on this rank.
    """
    ranks = ranks_of(model)
    return here if ranks is None else bool(ranks.vote(here)[1])


class _AndSeeds(set[str]):
    """Names of what a replicated model leaves alone, and every name in a seed."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_in_a_seed(str(name))


def _leave_seeds_alone(model: DistributedDataParallel) -> None:
    """Let the model send no buffers of seeds: ranks that hold other seeds would not understand.

    The list is made anew at once; DDP does so only where it was not empty before, and fails where
    it then is.
    """
    if not isinstance(model.parameters_to_ignore, _AndSeeds):
        model.parameters_to_ignore = _AndSeeds(model.parameters_to_ignore)
        make_list = model._assign_modules_buffers  # noqa: SLF001 - DDP has no other way
        make_list()  # type: ignore[no-untyped-call] # torch has none


def _synchronizes(model: nn.Module) -> bool:
    """Say whether the backward of a forward that is under way averages gradients."""
    if isinstance(model, DistributedDataParallel):
        return bool(model.require_backward_grad_sync)
    return synchronizes(model)


class _Told(NamedTuple):
    """What one rank tells the others: its kernels' parameters by name, and names of its seeds."""

    params: dict[str, Standing]
    seeds: list[str]


class _Replication:
    """What Esper does for one replicated model; its hook. A copy of the model has an empty one."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._device = torch.device("cpu")
        self._buckets: list[list[nn.Parameter]] = []
        self._late: dict[int, nn.Parameter] = {}
        self._woken: dict[int, tuple[nn.Module, nn.Parameter]] = {}
        self._buffers: list[tuple[nn.Module, str]] = []
        self._awaited: list[nn.Parameter] = []
        self._rows: dict[SeedKey, int] = {}
        self._num_rows = 0
        self._is_queued = False

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, _: object) -> None:
        self.__init__()  # type: ignore[misc] # a copy begins anew

    def follow(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        seeds: Mapping[str, SeedKey],
    ) -> None:
        """Agree with the other ranks on the kernels that there are."""
        self._group = _group_of(model)
        self._device = next(model.parameters()).device
        known = self._known(model, params)
        mine = {name: self._standing(p, known) for name, p in params.items()}
        of_ranks = over_ranks(model, _Told(mine, sorted(seeds)))
        self._share([told.params for told in of_ranks], params)
        names = sorted({name for told in of_ranks for name in told.seeds})
        self._rows = {seeds[name]: row for row, name in enumerate(names) if name in seeds}
        self._num_rows = len(names)
        remember_change()

    def _known(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> set[int]:
        """Return the parameters of kernels that the model averages itself, and waits for."""
        if not isinstance(model, DistributedDataParallel):
            known = {id(p) for p in params.values() if is_shard(p)}
            expect_idle_ranks(model, known)
            return known
        _leave_seeds_alone(model)
        known = {id(p) for p in model._module_parameters}  # noqa: SLF001 - the list is told to nobody
        self._await(p for p in params.values() if id(p) in known)
        return known

    def _standing(self, p: nn.Parameter, known: set[int]) -> Standing:
        if id(p) in known:
            return "known"
        return "late" if id(p) in self._late else "appeared"

    @property
    def is_alone(self) -> bool:
        """Whether no other rank trains the model, as far as it is followed."""
        return self._num_rows == 0 or dist.get_world_size(self._group) == 1

    def _share(
        self, of_ranks: Sequence[Mapping[str, Standing]], params: Mapping[str, nn.Parameter]
    ) -> None:
        """Average from now on what came late on every rank; what has just come is made equal."""
        everywhere = [name for name in of_ranks[0] if all(name in told for told in of_ranks)]
        shared = [n for n in everywhere if all(told[n] != "known" for told in of_ranks)]
        for name in shared:
            if any(told[name] == "appeared" for told in of_ranks):
                with torch.no_grad():
                    dist.broadcast(here(params[name]), group=self._group, group_src=0)
        self._late = {id(params[name]): params[name] for name in shared}
        self._make_buckets()
        apart = sorted({name for told in of_ranks for name in told}.difference(everywhere))
        if apart:
            _logger.warning(
                "%s: not on every rank, so each rank that has it trains it apart; make the same "
                "grafts on every rank, and unload on all what one has given up",
                ", ".join(apart),
            )

    def _make_buckets(self) -> None:
        woken = {key: p for key, (_, p) in self._woken.items()}
        self._buckets = list(_buckets((self._late | woken).values()))

    def wake(self, model: DistributedDataParallel, woken: Woken) -> None:
        """Take over what wakes, equal on every rank."""
        self._group = model.process_group
        self._device = next(model.parameters()).device
        names = [*woken.params, *woken.buffers]
        of_ranks = over_ranks(model, names)
        known = {id(p) for p in model._module_parameters}  # noqa: SLF001 - as in follow
        if any(each != names for each in of_ranks):
            msg = "the ranks wake other blocks; make the same call of esper.deepen on every rank"
            raise ValueError(msg)
        params = [p for _, p in woken.params.values()]
        if any(id(p) in known for p in params):
            msg = (
                "DistributedDataParallel was made before the blocks were put to sleep, or of a "
                "module around the model: call esper.shallow before it, with root= that module"
            )
            raise ValueError(msg)
        buffers = [getattr(module, name) for module, name in woken.buffers.values()]
        with torch.no_grad():
            for tensor in (*params, *woken.frozen, *buffers, *woken.state):
                _broadcast(tensor, self._device, self._group)
        self._woken |= {id(entry[1]): entry for entry in woken.params.values()}
        if getattr(model, "broadcast_buffers", True):
            self._buffers += woken.buffers.values()
        self._make_buckets()

    def forget(self, modules: set[int]) -> None:
        """Average nothing more for what some modules hold, by their ids."""
        self._woken = {k: entry for k, entry in self._woken.items() if id(entry[0]) not in modules}
        self._buffers = [entry for entry in self._buffers if id(entry[0]) not in modules]
        self._make_buckets()

    def _await(self, known: Iterable[nn.Parameter]) -> None:
        """Remember what the model waits for, also when it is not in the model any more."""
        awaited = {id(p): p for p in (*self._awaited, *known)}
        self._awaited = list(awaited.values())

    def worst(self, seeds: Sequence[SeedKey], flags: Tensor) -> Tensor:
        """Return the maximum over the ranks, which may not have the same seeds under the guard."""
        if not self._num_rows:
            return flags
        counts = torch.zeros(self._num_rows, flags.shape[1], dtype=torch.int32, device=self._device)
        rows = [self._rows[seed] for seed in seeds if seed in self._rows]
        mine = [i for i, seed in enumerate(seeds) if seed in self._rows]
        counts[rows] = flags[mine].to(counts)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._group)
        worst = flags.clone()
        worst[mine] = counts[rows].to(flags)
        return worst

    @torch.compiler.disable  # type: ignore[untyped-decorator] # torch has no types here
    def __call__(self, model: nn.Module, _: object, output: object) -> None:
        """Prepare the backward of a forward that synchronizes, as the model's forward hook."""
        self._is_queued = False  # a backward that failed has not ended
        if torch.is_grad_enabled() and _synchronizes(model):
            idle = self._idle(model)
            found = _find_tensors(output)  # type: ignore[no-untyped-call] # as above
            tensors = [t for t in found if t.requires_grad]
            for tensor in tensors or [p for p in model.parameters() if p.requires_grad]:
                tensor.register_hook(_Begin(self, idle))

    def begin(self, idle: Sequence[nn.Parameter]) -> None:
        """Ask for the end of the backward that is under way, once; give what it would wait for."""
        if self._is_queued:
            return
        self._is_queued = True
        Variable._execution_engine.queue_callback(self._finish)  # noqa: SLF001 - as DDP itself does
        for p in idle:
            torch.autograd.backward([p], [torch.zeros_like(p)])

    def _idle(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what the model waits for although no forward of this rank uses it now."""
        if not self._awaited or getattr(model, "find_unused_parameters", False):
            return []
        used = {id(p) for p in _used_parameters(model)}
        return [p for p in self._awaited if p.requires_grad and id(p) not in used]

    def _finish(self) -> None:
        self._is_queued = False
        if (self._buckets or self._buffers) and dist.get_world_size(self._group) > 1:
            for bucket in self._buckets:
                _average(bucket, self._group)
            _average_buffers(self._buffers, self._group)


class _Begin:
    """The hook of a tensor that a backward comes through early."""

    def __init__(self, replication: _Replication, idle: Sequence[nn.Parameter]) -> None:
        self._replication, self._idle = replication, idle

    def __call__(self, _: Tensor) -> None:
        self._replication.begin(self._idle)


def _used_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the model but for those of seeds that do not contribute."""
    silent = {
        id(p)
        for layer in model.modules()
        if RECORD in layer.__dict__
        for i, seed in record_of(layer).seeds.items()
        if seed not in record_of(layer).plan
        for p in seed.slot.parameters()
    }
    return (p for p in model.parameters() if id(p) not in silent)


def _buckets(params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one dtype and device together, up to a size."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in params:
        bucket = by_kind.setdefault((p.dtype, p.device), [])
        bucket.append(p)
        if sum(q.nbytes for q in bucket) >= BUCKET_BYTES:
            yield by_kind.pop((p.dtype, p.device))
    yield from by_kind.values()


@torch.no_grad()
def _average(bucket: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Replace gradients by their means over the ranks; one that no rank has stays None."""
    present = [float(p.grad is not None) for p in bucket]
    gradients = [here(torch.zeros_like(p) if p.grad is None else p.grad) for p in bucket]
    flags = torch.tensor(present, dtype=bucket[0].dtype, device=bucket[0].device)
    flat = torch.cat([*(g.flatten() for g in gradients), flags])
    dist.all_reduce(flat.div_(dist.get_world_size(group)), group=group)
    *means, flags = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
    somewhere = flags.tolist() if not all(present) else present
    for p, gradient, mean, is_there in zip(bucket, gradients, means, somewhere, strict=True):
        if is_there:
            gradient.copy_(mean.view_as(gradient))
            p.grad = spread_like(gradient, p) if p.grad is None else p.grad


@torch.no_grad()
def _average_buffers(
    buffers: Sequence[tuple[nn.Module, str]], group: dist.ProcessGroup | None
) -> None:
    """Replace floating buffers by their means over the ranks; the others are as they are."""
    for module, name in buffers:
        buffer = getattr(module, name)
        if buffer.is_floating_point():
            mean = buffer / dist.get_world_size(group)
            dist.all_reduce(mean, group=group)
            buffer.copy_(mean)


def _broadcast(tensor: Tensor, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Give a tensor rank 0's values; one on the CPU goes by the device that the ranks talk on."""
    sent = tensor.detach().to(device)
    dist.broadcast(sent, group=group, group_src=0)
    tensor.copy_(sent)


_RANKS: Final[weakref.WeakKeyDictionary[nn.Module, Ranks]] = weakref.WeakKeyDictionary()
_REPLICATIONS: Final[weakref.WeakKeyDictionary[nn.Module, _Replication]] = (
    weakref.WeakKeyDictionary()
)


def _replication(model: nn.Module) -> _Replication:
    found = _REPLICATIONS.get(model)
    if found is None:
        found = _REPLICATIONS[model] = _Replication()
        model.register_forward_hook(found)
    return found
