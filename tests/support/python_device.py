"""A device that is neither the CPU nor CUDA: torch's back end PrivateUse1, written in Python.

Its tensors are plain ``torch.Tensor`` with shapes of their own; their values lie in host memory, in
a table by storage, and every operation is that of the CPU. To set it up changes the process for
good, so that tests of it run in one of their own.
"""

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "ownpu"

_values = {}
"""By the address of a storage: all values of it, a tensor on the CPU."""

calls = []
"""Names of the operations that have run there."""


_BY_STRIDES = (torch.ops.aten.as_strided.default, torch.ops.aten.view.default)


def there(value):
    """Say whether something is a tensor of the device."""
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _values_of(tensor):
    return _values[tensor.untyped_storage()._cdata]


def _placed(values):
    made = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
    _values[made.untyped_storage()._cdata] = values
    return made


def _on_cpu(op, *args, **kwargs):
    """Do an operation on the values; what it returns of its arguments stays the same object."""
    calls.append(str(op))
    known = {}

    def value_of(given):
        if there(given):
            values = _values_of(given)
            known[id(values)] = given
            return values
        is_device = isinstance(given, torch.device) and given.type == NAME
        return torch.device("cpu") if is_device else given

    def place(given):
        if not isinstance(given, torch.Tensor):
            return given
        same = known.get(id(given))
        if same is None:
            return _placed(given)
        if same.shape != given.shape:  # an output that was made empty
            same.data = _placed(given)
        return same

    args, kwargs = tree_map(value_of, (list(args), kwargs))
    if op in _BY_STRIDES:  # which torch takes from the tensor there: it has those of its shape
        args[0] = args[0].contiguous()
    with torch._C._AutoDispatchBelowAutograd():
        return tree_map(place, op(*args, **kwargs))


def _copy_from(source, target, non_blocking=False):
    values = _values_of(source) if there(source) else source
    (_values_of(target) if there(target) else target).copy_(values)
    return target


def _number(tensor):
    calls.append("aten._local_scalar_dense.default")
    return _values_of(tensor).item()


def _empty(size, *, dtype=None, **_):
    return _placed(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size, stride, *, dtype=None, **_):
    return _placed(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def _convolution(*args):
    return _on_cpu(torch.ops.aten.convolution.default, *args)


def _convolution_backward(gradient, x, weight, *rest):
    *rest, mask = rest
    sizes = [weight.shape[1] * rest[-1] if rest[3] else weight.shape[0]]
    op = torch.ops.aten.convolution_backward.default
    return _on_cpu(op, gradient, x, weight, sizes, *rest, mask)


class _Generators(backend_registration._DummyBackendModule):
    """What ``torch.get_device_module`` gives: one device, with a generator."""

    def __init__(self):
        self._generator = torch.Generator()

    def get_rng_state(self, device=None):
        return self._generator.get_state()

    def set_rng_state(self, state, device=None):
        self._generator.set_state(state)

    def manual_seed(self, seed):
        self._generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def device_count(self):
        return 1

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def _copy_deep():
    """Let copies of tensors that are no parameters be made by ``clone``.

    torch copies their storage, which has no values here.
    """
    of_torch = torch.Tensor.__deepcopy__

    def copied(self, memo):
        if type(self) is not torch.Tensor or not there(self) or id(self) in memo:
            return of_torch(self, memo)
        memo[id(self)] = made = self.detach().clone().requires_grad_(self.requires_grad)
        return made

    torch.Tensor.__deepcopy__ = copied


def set_up():
    """Make the device known to torch; returns what has to be kept as long as it is."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Generators())
    every = torch.library.Library("_", "IMPL")
    every.fallback(_on_cpu, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name, kernel in {
        "_copy_from": _copy_from,
        "_local_scalar_dense": _number,
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }.items():
        aten.impl(name, kernel, "PrivateUse1")
    _copy_deep()
    return every, aten
