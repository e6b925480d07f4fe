"""`esper.wrap` succeeds or changes nothing, wherever it fails."""

import inspect

import pytest
import torch
from torch import nn

import esper


def refuses(num_subclasses, error):
    """Return a host class that raises when so many classes have been made from it.

    The first is the dormant one; the second, for telemetry, is made when the object's class is
    ours already.
    """

    class Refusing(nn.Linear):
        subclasses = 0

        def __init_subclass__(cls):
            Refusing.subclasses += 1
            if Refusing.subclasses == num_subclasses:
                raise error

    return Refusing


def picture(model):
    """Everything about a model's modules that a change of class touches."""
    return [
        (name, type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def model_that_breaks_at(index, host_class):
    sites = [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)]
    sites[index] = host_class(2, 2)
    return nn.Sequential(*sites[:2], nn.Sequential(sites[2], nn.ReLU()), sites[3])


NAMES = ["0", "1", "2.0", "3"]


def wrap_all(model):
    """Wrap with telemetry, so that each layer takes two of our classes one after the other."""
    esper.wrap(model, telemetry_enabled=True)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("num_subclasses", [1, 2])
def test_a_failure_at_any_layer_changes_nothing(num_subclasses, index):
    """Classes and dicts of all modules are as before, and the error names the layer and why."""
    cause = TypeError("this class takes no subclass")
    model = model_that_breaks_at(index, refuses(num_subclasses, cause))
    before = picture(model)

    with pytest.raises(ValueError, match=rf"'{NAMES[index]}' \(Refusing\).*takes no sub") as caught:
        wrap_all(model)

    assert picture(model) == before
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("num_subclasses", [1, 2])
def test_an_interruption_changes_nothing(num_subclasses, index):
    """Control-C goes through as it is, and leaves the model as it was."""
    model = model_that_breaks_at(index, refuses(num_subclasses, KeyboardInterrupt()))
    before = picture(model)

    with pytest.raises(KeyboardInterrupt):
        wrap_all(model)

    assert picture(model) == before


def test_a_model_is_wrapped_after_what_broke_has_gone():
    """Nothing of the failure is left behind: without the bad layer the same model is wrapped."""
    model = model_that_breaks_at(3, refuses(1, TypeError()))
    with pytest.raises(ValueError, match="leave it out with select="):
        wrap_all(model)

    esper.wrap(model, select=["0", "1", "2.0"])

    assert list(esper.layers(model)) == ["0", "1", "2.0"]
    assert torch.equal(model[0](torch.ones(2)), model[0].default_layer(torch.ones(2)))


@pytest.mark.parametrize("num_subclasses", [1, 2])
def test_a_constructor_that_fails_leaves_its_host_alone(num_subclasses):
    """KasminaLayer(original_layer=...) changes the host or nothing."""
    host = refuses(num_subclasses, TypeError("this class takes no subclass"))(2, 2)
    before = picture(host)

    with pytest.raises(TypeError, match="takes no subclass"):
        esper.KasminaLayer(2, 2, original_layer=host)

    assert picture(host) == before


def test_tools_may_walk_a_wrapped_layer():
    """Every attribute of a dormant layer can be read, as debuggers and tracers do."""
    names = dict(inspect.getmembers(esper.wrap(nn.Linear(2, 2))))

    assert names["in_features"] == 2
    assert names["num_seeds"] == 4
