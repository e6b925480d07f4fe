"""Streams that record what is launched where, for a machine that has none.

`RecordingStreams` implements the port of `esper.streams.device_streams` on the CPU: everything
runs at once, and the schedule that a device would have been given is kept. `races` replays it
through torch's own data-race detector; `unkept` looks for memory that could be reused too early.

A backward is recorded as torch's engine orders it on a device: each operation on the stream of
its forward, which waits for the gradients that come from other streams; a gradient that comes
from several operations is summed on the stream of the one that takes it; at the end the calling
stream waits for the streams of the leaves.
"""

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch.cuda._sanitizer import FACTORY_FUNCTION_REGEX, ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Stream:
    """A stream by its number; 0 is the current one at the start."""

    number: int
    device: torch.device = CPU


@dataclass
class Launch:
    """An operation: the storages that it reads and writes, by address."""

    stream: Stream | None
    operator: str
    read: set[int]
    written: set[int]
    is_backward: bool


@dataclass(frozen=True)
class Record:
    stream: Stream
    event: int


@dataclass(frozen=True)
class Wait:
    """A wait; `by` is "layer" or "autograd"."""

    stream: Stream
    event: int
    by: str


@dataclass(frozen=True)
class Keep:
    storage: int
    stream: Stream


class RecordingStreams(TorchDispatchMode):
    """The port, and the mode under which operations are recorded.

    Attributes:
        schedule: What was launched, recorded, waited for and kept, in order.
    """

    is_inline = False

    def __init__(self):
        super().__init__()
        self.schedule = []
        self._numbers, self._events = count(1), count()
        self._current = Stream(0)
        self._switches = [(-1, self._current)]
        self._alive = []  # an address stands for one storage only while nothing is released
        self._backward = None

    # ---- the port

    def current(self, device):
        return self._current

    def side(self, device):
        return Stream(next(self._numbers), device)

    def record(self, stream):
        event = next(self._events)
        self.schedule.append(Record(stream, event))
        return event

    def wait(self, stream, event, by="layer"):
        self.schedule.append(Wait(stream, event, by))

    def keep(self, tensor, stream):
        self.schedule.append(Keep(_address(tensor), stream))

    @contextmanager
    def on(self, stream):
        before = self._current
        self._switch(stream)
        try:
            yield
        finally:
            self._switch(before)

    def is_capturing(self, device):
        return False

    # ---- the record

    def _switch(self, stream):
        self._current = stream
        self._switches.append((torch.autograd._get_sequence_nr(), stream))

    def stream_at(self, sequence_nr):
        """The stream on which the operation of a forward with this number was launched."""
        return next(s for at, s in reversed(self._switches) if at <= sequence_nr)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_factory = bool(FACTORY_FUNCTION_REGEX.match(func._schema.name))
        access = _Access()
        access.parse_inputs(func._schema, args, kwargs, is_factory=is_factory)
        outputs = func(*args, **kwargs)
        access.parse_outputs(func._schema, outputs, is_factory=is_factory)
        self._alive.append((args, kwargs, outputs))
        written = access.dataptrs_written
        stream = self._backward.stream_of(func) if self._backward else self._current
        name, is_backward = func._schema.name, self._backward is not None
        launch = Launch(stream, name, access.dataptrs_read - written, written, is_backward)
        self.schedule.append(launch)
        return outputs

    def backward(self, loss):
        """Run a backward from the current stream."""
        self._backward = _Backward(self, loss.grad_fn, self._current)
        loss.backward()
        self._backward.finish()
        self._backward = None

    def waits(self, by=("layer", "autograd")):
        return [i for i, e in enumerate(self.schedule) if isinstance(e, Wait) and e.by in by]

    def keeps(self):
        return [i for i, entry in enumerate(self.schedule) if isinstance(entry, Keep)]


class _Access(ArgumentHandler):
    """Torch's, without the question whether a tensor is on a CUDA device."""

    def _handle_argument(self, value, is_write, metadata_only, name=None, is_output=False):
        if isinstance(value, torch.Tensor):
            if is_write:
                self.dataptrs_written.add(_address(value))
            elif not metadata_only:
                self.dataptrs_read.add(_address(value))


class _Backward:
    """One backward: where its operations go, and the waits that torch's engine adds."""

    def __init__(self, streams, root, caller):
        self._streams, self._caller = streams, caller
        self._nodes = _reachable(root)
        self._users = {node: [] for node in self._nodes}  # whose gradients a node takes
        for node in self._nodes:
            for taker in _takers(node):
                self._users[taker].append(node)
        self._stream = {node: self._stream_of_node(node) for node in self._nodes}
        self._events, self._waited = {}, set()
        self._received, self._sums = set(), deque()  # nodes with a gradient; those to add to next
        self._running, self._latest, self._gap = None, None, len(streams.schedule)
        self._handles = [
            handle
            for node in self._nodes
            for handle in (
                node.register_prehook(partial(self._begin, node)),
                node.register_hook(partial(self._end, node)),
            )
        ]

    def _stream_of_node(self, node):
        """A leaf's gradient is added up on the stream of its first use."""
        first = min(self._users[node], key=_number) if _is_leaf(node) else node
        return self._streams.stream_at(_number(first))

    def stream_of(self, func):
        """The stream of the operation that is being launched; None where the next node decides."""
        if self._running is not None:
            return self._stream[self._running]
        if self._latest is None:
            return self._caller
        if not self._sums or func not in _SUMS:  # a hook of the node that comes next
            return None
        taker = self._sums.popleft()
        self._wait_for_users(taker)
        return self._stream[taker]

    def _begin(self, node, gradients):
        if self._latest is None:  # first in the queue, so that it comes before all others
            torch.autograd.Variable._execution_engine.queue_callback(self._wait_for_leaves)
            self._events[None] = (self._caller, self._streams.record(self._caller))
        schedule = self._streams.schedule
        undecided = [i for i in range(self._gap, len(schedule)) if _is_undecided(schedule[i])]
        tail = schedule[undecided[0] :] if undecided else []
        del schedule[len(schedule) - len(tail) :]
        self._wait_for_users(node)
        for entry in tail:
            if _is_undecided(entry):
                entry.stream = self._stream[node]
        schedule.extend(tail)
        self._running = node
        self._streams._current = self._stream[node]

    def _end(self, node, gradients, _):
        if any(self._stream[taker] != self._stream[node] for taker in _takers(node)):
            self._events[node] = (self._stream[node], self._streams.record(self._stream[node]))
        for (taker, _), gradient in zip(node.next_functions, gradients, strict=False):
            if taker is not None and gradient is not None:
                if taker in self._received:
                    self._sums.append(taker)
                self._received.add(taker)
        self._running, self._latest = None, node
        self._gap = len(self._streams.schedule)

    def _wait_for_users(self, node):
        stream = self._stream[node]
        for user in self._users[node] or [None]:
            if user in self._events and self._events[user][0] != stream:
                self._wait(stream, self._events[user][1])

    def _wait(self, stream, event):
        if (stream, event) not in self._waited:
            self._waited.add((stream, event))
            self._streams.wait(stream, event, by="autograd")

    def _wait_for_leaves(self):
        self._streams._current = self._caller
        leaves = {self._stream[node] for node in self._nodes if _is_leaf(node)} - {self._caller}
        for stream in sorted(leaves, key=lambda s: s.number):
            self._wait(self._caller, self._streams.record(stream))

    def finish(self):
        for handle in self._handles:
            handle.remove()
        self._streams._current = self._caller


def _reachable(root):
    nodes, todo = {}, [root]
    while todo:
        node = todo.pop()
        if node not in nodes:
            nodes[node] = None
            todo.extend(_takers(node))
    return list(nodes)


def _takers(node):
    return [taker for taker, _ in node.next_functions if taker is not None]


def _is_leaf(node):
    return node.name() == "torch::autograd::AccumulateGrad"


def _number(node):
    return node._sequence_nr()


def _is_undecided(entry):
    return isinstance(entry, Launch) and entry.stream is None


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def without(schedule, index):
    """The schedule without one entry."""
    return schedule[:index] + schedule[index + 1 :]


def races(schedule):
    """What torch's sanitizer finds in a schedule: the operators of unordered accesses."""
    handler, found = EventHandler(), []
    for entry in schedule:
        if isinstance(entry, Record):
            handler._handle_event_record(entry.event, entry.stream.number)
        elif isinstance(entry, Wait):
            handler._handle_event_wait(entry.event, entry.stream.number)
        elif isinstance(entry, Launch):
            found += _launch(handler, entry)
    return found


def _launch(handler, launch):
    names = {address: [] for address in launch.read | launch.written}
    number, name = launch.stream.number, launch.operator
    errors = handler._handle_kernel_launch(number, launch.read, launch.written, set(), name, names)
    return [f"{e.previous_access.operator} / {e.current_access.operator}" for e in errors]


def unkept(schedule):
    """Storages made in a forward and used on another stream that they are not kept for.

    What was there before (parameters) is not released meanwhile; gradients autograd keeps itself.
    """
    home, kept, seen, found = {}, set(), set(), []
    for entry in schedule:
        if isinstance(entry, Keep):
            kept.add((entry.storage, entry.stream))
        elif isinstance(entry, Launch):
            if not entry.is_backward:
                home.update(dict.fromkeys(entry.written - seen, entry.stream))
            seen |= entry.read | entry.written
            found += [
                (address, entry.operator)
                for address in entry.read | entry.written
                if home.get(address, entry.stream) != entry.stream
                and (address, entry.stream) not in kept
            ]
    return found
