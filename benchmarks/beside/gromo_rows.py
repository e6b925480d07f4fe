"""GroMo's growing layers beside Esper's kernels."""

import warnings

import torch
from comparison import Comparison, held_by, told
from gromo.containers.growing_mlp import GrowingMLP
from torch import nn

import esper
from esper.state.site import describe_site

X, Y = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)).split([16, 4], 1)


def ungrown() -> GrowingMLP:
    """Return an MLP of GroMo's, of eight hidden units."""
    return GrowingMLP(16, 4, hidden_size=8, number_hidden_layers=1)


def grow(model: GrowingMLP) -> None:
    """Add hidden units where they lower the loss most, as GroMo's tutorial does."""
    model.set_growing_layers("all")
    model.init_computation()
    (model(X) - Y).square().sum().backward()
    model.update_computation()
    model.compute_optimal_updates()
    model.reset_computation()
    model.select_best_update()
    model.set_scaling_factor(1.0)
    model.apply_change()


def host() -> nn.Sequential:
    """Return the same MLP, of torch's own modules."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.SELU(), nn.Linear(8, 4))


def still_optimized() -> Comparison:
    """Count which parameters of a grown model its optimizer still trains."""
    model = ungrown()
    optimizer = torch.optim.AdamW(model.parameters())
    grow(model)
    own = esper.wrap(host())
    of_own = torch.optim.AdamW(own.parameters())
    esper.sync_optimizer(own, of_own)
    esper.layers(own)["2"].graft(0, nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 4)), alpha=1.0)
    esper.sync_optimizer(own, of_own)
    return Comparison(
        asked="the optimizer still trains what has grown",
        source="adapters#260, avalanche#725",
        peer=f"{held_by(optimizer, model.parameters())} parameters in it",
        esper=f"{held_by(of_own, own.parameters())} parameters in it",
    )


def loads_ungrown() -> Comparison:
    """Load what has grown into a model that has not."""
    model = ungrown()
    grow(model)
    try:
        ungrown().load_state_dict(model.state_dict())
        peer = "loads"
    except RuntimeError as error:
        peer = f"refused: {str(error).splitlines()[1].strip().partition(':')[0]}"
    own, again = _saved(), esper.wrap(nn.Sequential(nn.Linear(16, 16)))
    again.load_state_dict(own.state_dict())
    same = torch.equal(own(X), again(X))
    return Comparison(
        asked="a grown state_dict loads into a model that has not grown",
        source="",
        peer=peer,
        esper=f"loads, its kernels are built first; outputs {'equal' if same else 'differ'}",
    )


def _saved() -> nn.Module:
    model = esper.wrap(nn.Sequential(nn.Linear(16, 16)))
    layer = esper.layers(model)["0"]
    layer.graft(0, esper.default_catalog().blueprints_for(describe_site(layer))[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told([still_optimized, loads_ungrown])
