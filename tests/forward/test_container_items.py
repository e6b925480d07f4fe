"""A container that is a site is edited and read as if there were no seeds in it."""

import copy

import pytest
import torch
from torch import nn

import esper


class Stack(nn.Sequential):
    """A sequence that is not made of its items, and reads them as it runs."""

    def __init__(self, size):
        super().__init__(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))

    def forward(self, x):
        for item in self:
            x = item(x)
        return self[0](x) + self[-1](x) + len(self)

    def replace_last(self, item):
        self[-1] = item

    def append(self, module):
        return super().append(module)


class Experts(nn.ModuleList):
    def forward(self, x):
        return sum(expert(x) for expert in self) / len(self) + self[-1](x)


class Named(nn.ModuleDict):
    def forward(self, x):
        for name, item in self.items():
            x = item(x) + len(name)
        return x + sum(item(x) for item in self.values()) + len([*self, *self.keys()])


def three():
    return [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]


MAKE = {
    "sequential": lambda: nn.Sequential(*three()),
    "stack": lambda: Stack(4),
    "list": lambda: Experts(three()),
    "dict": lambda: Named(dict(zip("abc", three(), strict=True))),
}


def made(kind, *, is_grown=True, num_kernels=1):
    """Return a container that is a site, one of its class that is none, and the kernels."""
    torch.manual_seed(0)
    layer = esper.wrap(MAKE[kind](), select="")
    plain = MAKE[kind]()
    plain.load_state_dict(layer.state_dict())
    kernels = [nn.Linear(4, 4) for _ in range(num_kernels if is_grown else 0)]
    for seed_idx, kernel in enumerate(kernels):
        layer.graft(seed_idx, kernel, alpha=0.5, example=torch.randn(2, 4))
    return layer, plain, kernels


def assert_alike(layer, plain, kernels):
    """The items are those of the plain one, and the kernels contribute as before."""
    x = torch.randn(2, 4)
    expected = plain(x) + sum(0.5 * kernel(x) for kernel in kernels)
    torch.testing.assert_close(layer(x), expected)
    assert len(layer) == len(plain)
    assert [str(item) for item in layer] == [str(item) for item in plain]
    names = [name for name in layer._modules if name != "_seeds"]
    assert names == list(plain._modules)
    assert list(layer.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())
    for seed_idx in range(len(kernels)):
        layer.unload_kernel(seed_idx)
    assert list(layer._modules) == list(plain._modules)
    assert torch.equal(layer(x), plain(x))


IN_ORDER = {
    "append": lambda c: c.append(nn.Identity()),
    "append, del -1": lambda c: (c.append(nn.Identity()), c.__delitem__(-1)),
    "append, set -1": lambda c: (c.append(nn.Identity()), c.__setitem__(-1, nn.ReLU())),
    "del 1": lambda c: c.__delitem__(1),
    "del -1": lambda c: c.__delitem__(-1),
    "del slice": lambda c: c.__delitem__(slice(0, 2)),
    "set 1": lambda c: c.__setitem__(1, nn.ReLU()),
    "set -1": lambda c: c.__setitem__(-1, nn.Identity()),
    "insert 0": lambda c: c.insert(0, nn.Identity()),
    "insert at the end": lambda c: c.insert(len(c), nn.Identity()),
    "pop 1": lambda c: c.pop(1),
    "pop -1": lambda c: c.pop(-1),
    "extend": lambda c: c.extend([nn.Identity(), nn.ReLU()]),
    "extend by itself": lambda c: c.extend(list(c)),
    "+=": lambda c: c.__iadd__(nn.Sequential(nn.Identity(), nn.ReLU())),
    "twice": lambda c: (c.insert(1, nn.ReLU()), c.pop(0), c.append(nn.Tanh()), c.pop(-2)),
}
BY_NAME = {
    "set": lambda c: c.__setitem__("d", nn.Identity()),
    "set again": lambda c: c.__setitem__("b", nn.ReLU()),
    "del": lambda c: c.__delitem__("b"),
    "pop": lambda c: c.pop("a"),
    "update": lambda c: c.update({"b": nn.ReLU(), "e": nn.Identity()}),
    "clear, update": lambda c: (c.clear(), c.update({"x": nn.Identity()})),
}
EDITS = [
    *((kind, name) for kind in ("sequential", "stack", "list") for name in IN_ORDER),
    *(("dict", name) for name in BY_NAME),
    ("sequential", "*="),
    ("stack", "method"),
]
EDIT = {
    **IN_ORDER,
    **BY_NAME,
    "*=": lambda c: c.__imul__(2),
    "method": lambda c: c.replace_last(nn.Identity()),
}


@pytest.mark.parametrize("num_kernels", [0, 1, 2])
@pytest.mark.parametrize(("kind", "edit"), EDITS)
def test_an_edit_is_one_of_the_items(kind, edit, num_kernels):
    """It does what it does to a container without seeds, which stay where they are."""
    layer, plain, kernels = made(kind, num_kernels=num_kernels)
    EDIT[edit](plain)
    EDIT[edit](layer)
    assert_alike(layer, plain, kernels)


def test_an_edit_that_fails_leaves_the_seeds():
    """An index out of range, a wrong type: what is raised is torch's, and kernels stay."""
    for kind, edit, error in [
        ("sequential", lambda c: c.pop(7), IndexError),
        ("sequential", lambda c: c.insert(9, nn.ReLU()), IndexError),
        ("sequential", lambda c: c.append("no module"), TypeError),
        ("list", lambda c: c.__delitem__(3), IndexError),
        ("dict", lambda c: c.pop("_seeds"), KeyError),
        ("dict", lambda c: c["_seeds"], KeyError),
    ]:
        layer, plain, kernels = made(kind)
        with pytest.raises(error):
            edit(layer)
        assert_alike(layer, plain, kernels)


@pytest.mark.parametrize("num_kernels", [0, 1])
@pytest.mark.parametrize("kind", ["sequential", "list"])
def test_items_are_read_by_place(kind, num_kernels):
    """Negative places, slices and sums are those of the items, and slices are no layers."""
    layer, plain, _ = made(kind, num_kernels=num_kernels)
    items = list(layer)
    assert [layer[i] for i in (-3, -2, -1, 0, 1, 2)] == items * 2
    for place in (3, -4):
        with pytest.raises(IndexError):
            layer[place]
    for part in (slice(1, None), slice(None, -1), slice(None, None, 2)):
        assert type(layer[part]) is type(plain)
        assert list(layer[part]) == items[part]
    assert list(reversed(layer)) == items[::-1]
    assert items[0] in layer
    assert nn.Linear(4, 4) not in layer
    both = layer + nn.Sequential(nn.ReLU())
    assert [*both][:-1] == items
    assert "_seeds" not in both._modules
    if kind == "sequential":
        assert list(layer * 2) == items * 2
        assert list(2 * layer) == items * 2


@pytest.mark.parametrize("num_kernels", [0, 1])
def test_items_are_read_by_name(num_kernels):
    """Keys, values, items and membership are the user's."""
    layer, _, _ = made("dict", num_kernels=num_kernels)
    assert list(layer) == list(layer.keys()) == ["a", "b", "c"]
    assert [layer[name] for name in layer] == list(layer.values())
    assert dict(layer.items()) == {name: layer[name] for name in "abc"}
    assert "a" in layer
    assert "_seeds" not in layer
    assert len(layer) == 3


@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_of_a_container_is_edited_too(kind):
    """Copied, and with telemetry, it hides its seeds as the original does."""
    layer, plain, _ = made(kind)
    layer.telemetry_enabled = True
    copied = copy.deepcopy(layer)
    assert len(copied) == len(plain) == 3
    copied.unload_kernel(0)
    assert [str(item) for item in copied] == [str(item) for item in plain]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_a_container_that_reads_its_items_is_compiled_whole(kind):
    """Reading items is no reason for a graph break."""
    layer, _, _ = made(kind)
    x = torch.randn(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_left_of_an_edited_container_is_unwrapped(kind):
    """An edit before unwrap is part of the plain model."""
    layer, plain, kernels = made(kind)
    edit = EDIT["set again" if kind == "dict" else "set 1"]
    edit(layer)
    edit(plain)
    expected = plain(x := torch.randn(2, 4)) + 0.5 * kernels[0](x)

    found = esper.unwrap(layer)

    torch.testing.assert_close(found(x), expected)
    assert len(found) == len(plain)
    assert [str(item) for item in found] == [str(item) for item in plain]


def test_parameters_in_a_list_are_left_alone():
    """A ParameterList's items are parameters, which a kernel's slot is none of."""

    class Weights(nn.ParameterList):
        def forward(self, x):
            return sum(x @ weight for weight in self)

    torch.manual_seed(0)
    layer = esper.wrap(Weights([torch.randn(4, 4), torch.randn(4, 4)]), select="")
    layer.graft(0, nn.Linear(4, 4), alpha=0.5, example=torch.randn(2, 4))
    layer.append(torch.randn(4, 4))
    layer[-1] = torch.zeros(4, 4)
    assert len(layer) == 3
    assert [tuple(weight.shape) for weight in layer] == [(4, 4)] * 3
    assert layer.seed_kernel(0) is not None
    x = torch.randn(2, 4)
    expected = x @ layer[0] + x @ layer[1] + 0.5 * layer.seed_kernel(0)(x)
    torch.testing.assert_close(layer.forward(x), expected)  # torch refuses its call
