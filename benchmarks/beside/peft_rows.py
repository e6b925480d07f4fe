"""PEFT's adapters beside Esper's kernels."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from comparison import Bottleneck, Comparison, held_by, largest, told
from peft import LoraConfig, PeftModel, get_peft_model
from rank_rows import late_under_ranks
from torch import nn

import esper

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def host() -> nn.Sequential:
    """Return a network of two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def lora(**other: Any) -> LoraConfig:
    """Return an adapter for both layers."""
    return LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **other})


def after_the_optimizer() -> Comparison:
    """Count what of an adapter is trained that came after the optimizer."""
    model = get_peft_model(host(), lora())
    optimizer = torch.optim.AdamW(model.parameters())
    model.add_adapter("late", lora(r=2))
    model.set_adapter("late")
    late = [p for name, p in model.named_parameters() if ".late." in name]

    grown = esper.wrap(host())
    own = torch.optim.AdamW(grown.parameters())
    esper.sync_optimizer(grown, own)
    for layer in esper.layers(grown).values():
        layer.graft(0, Bottleneck(16))
    esper.sync_optimizer(grown, own)
    appeared = [p for name, p in grown.named_parameters() if "_seeds" in name]
    return Comparison(
        asked="parameters that appear later are trained",
        source="adapters#260",
        peer=f"{held_by(optimizer, late)} parameters in the optimizer",
        esper=f"{held_by(own, appeared)} after esper.sync_optimizer",
    )


def graphs_over_changes() -> Comparison:
    """Count the graphs that are compiled over changes."""
    counts = []
    model = get_peft_model(host(), lora())
    model.add_adapter("other", lora(r=2))

    def disable() -> None:
        model.base_model.disable_adapter_layers()

    def enable() -> None:
        model.base_model.enable_adapter_layers()

    counts.append(
        _graphs(
            model,
            [
                disable,
                enable,
                lambda: model.set_adapter("other"),
                lambda: model.set_adapter("default"),
            ],
        )
    )
    grown = esper.wrap(host())
    layer = esper.layers(grown)["0"]

    def graft() -> None:
        layer.graft(0, Bottleneck(16))

    def switch() -> None:
        layer.unload_kernel(0)
        layer.graft(0, Bottleneck(16))

    changes = [
        graft,
        lambda: layer.set_alpha(0, 0.5),
        lambda: layer.unload_kernel(0),
        graft,
        switch,
    ]
    counts.append(_graphs(grown, changes))
    return Comparison(
        asked="no recompiles on change",
        source="peft#1199, peft#2177",
        peer=f"{counts[0]} graphs over disable, enable, switch, back",
        esper=f"{counts[1]} graphs over graft, alpha, unload, graft, switch",
    )


def _graphs(model: nn.Module, changes: list[Callable[[], object]]) -> int:
    num = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal num
        num += 1
        return graph.forward

    torch._dynamo.reset()  # noqa: SLF001 - documented, under that name
    compiled = torch.compile(model, backend=backend)
    compiled(X)
    for change in changes:
        change()
        compiled(X)
    return num


def not_a_number() -> Comparison:
    """Ask what an adapter that is not finite does to the output."""
    model = get_peft_model(host(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(torch.nan)
    bare = host()
    grown = esper.wrap(host())
    kernel = Bottleneck(16)
    esper.layers(grown)["0"].graft(0, kernel)
    nn.init.constant_(kernel.up.bias, torch.nan)
    return Comparison(
        asked="a faulty adapter does not spoil the output",
        source="",
        peer=f"{float(model(X).isnan().float().mean()):.0%} of the output is NaN",
        esper=f"the host's output: {largest(grown(X), bare(X))}",
    )


def bare_class() -> Comparison:
    """Load what was merged, whole, into the host's own class."""
    model = get_peft_model(host(), lora())
    model.merge_adapter()
    found = host().load_state_dict(model.state_dict(), strict=False)
    own = len(host().state_dict())

    grown = esper.wrap(host())
    layer = esper.layers(grown)["0"]
    layer.graft(0, nn.Linear(16, 16), alpha=1.0)
    layer.fossilize(0)
    taken = host()
    taken.load_state_dict(grown.state_dict())
    return Comparison(
        asked="a whole state_dict goes back into the host's class",
        source="",
        peer=f"merged, {own - len(found.missing_keys)} of {own} keys are found",
        esper=f"folded, all of them, strictly; outputs {largest(taken(X), grown(X))}",
    )


def disabled_attention() -> Comparison:
    """Ask whether what is switched off is the host, bit for bit."""
    torch.manual_seed(0)
    bare = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=True)}).eval()
    x = torch.randn(2, 5, 16)
    expected = bare["attention"](x, x, x)[0]
    model = get_peft_model(
        copy.deepcopy(bare), LoraConfig(r=4, target_modules=["attention"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    attention = model.base_model.model["attention"]
    attention(x, x, x)
    model.base_model.disable_adapter_layers()
    off = attention(x, x, x)[0]

    grown = esper.wrap(copy.deepcopy(bare)).eval()
    layer = esper.layers(grown)["attention"]
    layer.graft(0, Bottleneck(16), position="serial", mode="replace", alpha=0.5)
    grown["attention"](x, x, x)
    layer.unload_kernel(0)
    dormant = grown["attention"](x, x, x)[0]
    return Comparison(
        asked="used and switched off, attention is the host's",
        source="",
        peer=largest(off, expected),
        esper=largest(dormant, expected),
    )


def batch_norm() -> Comparison:
    """Save and load after training that moved running statistics."""

    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))

    def train(model: nn.Module) -> None:
        model.train()
        for _ in range(5):
            model(3 * X + 1)
        model.eval()

    model = get_peft_model(normed(), lora())
    train(model)
    grown = esper.wrap(normed())
    esper.layers(grown)["0"].graft(0, Bottleneck(16))
    train(grown)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = PeftModel.from_pretrained(normed(), folder).eval()
        esper.save_checkpoint(f"{folder}/run", grown, classes=[Bottleneck])
        again = esper.wrap(normed())
        esper.load_checkpoint(f"{folder}/run", again, classes=[Bottleneck])
    return Comparison(
        asked="batch-norm statistics survive save and load",
        source="peft#1732",
        peer=f"outputs {largest(back(X), model(X))}",
        esper=f"outputs {largest(again.eval()(X), grown(X))}",
    )


def evaluation_mode() -> Comparison:
    """Add to a model in evaluation mode, and count what trains all the same."""
    model = get_peft_model(host(), lora(lora_dropout=0.5)).eval()
    model.add_adapter("late", lora(r=2, lora_dropout=0.5))
    grown = esper.wrap(host()).eval()
    esper.layers(grown)["0"].graft(0, nn.Sequential(nn.Dropout(0.5), Bottleneck(16)))

    def training(model: nn.Module) -> str:
        return f"{sum(m.training for m in model.modules())} modules in training mode"

    return Comparison(
        asked="evaluation mode is kept",
        source="peft#3753",
        peer=training(model),
        esper=training(grown),
    )


def grouped_convolution() -> Comparison:
    """Make what was added to a grouped convolution permanent."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=4), torch.randn(2, 8, 6, 6)
    try:
        model = get_peft_model(
            nn.ModuleDict({"conv": copy.deepcopy(conv)}), LoraConfig(r=4, target_modules=["conv"])
        )
        model.merge_adapter()
        merged = "merged"
    except Exception as error:  # noqa: BLE001 - whatever it refuses with is the outcome
        merged = f"{type(error).__name__}: {str(error).split('. ')[0][:70]}"
    grown = esper.wrap(nn.Sequential(copy.deepcopy(conv)))
    layer = esper.layers(grown)["0"]
    layer.graft(0, nn.Conv2d(8, 8, 3, padding=1, groups=4), alpha=1.0, example=x)
    before = grown(x)
    folded = layer.fossilize(0).folded
    return Comparison(
        asked="a grouped convolution can be merged",
        source="",
        peer=merged,
        esper=f"{'folded' if folded else 'kept beside it'}, outputs {largest(grown(x), before)}",
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told(
        [
            after_the_optimizer,
            graphs_over_changes,
            not_a_number,
            bare_class,
            disabled_attention,
            batch_norm,
            evaluation_mode,
            grouped_convolution,
            late_under_ranks,
        ]
    )
