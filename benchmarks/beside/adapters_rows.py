"""AdapterHub's adapters beside Esper's kernels."""

import logging
import warnings

import adapters
import torch
from comparison import Comparison, largest, told
from transformers import BertConfig, BertModel

import esper

TOKENS = torch.arange(14).reshape(2, 7)


def bert() -> BertModel:
    """Return a small BERT, in evaluation mode."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
    )
    return BertModel(config).eval()


def read(model: torch.nn.Module) -> torch.Tensor:
    """Return a model's last hidden states."""
    return model(TOKENS).last_hidden_state.detach()


def with_adapter() -> BertModel:
    """Return the BERT with a bottleneck adapter."""
    model = bert()
    adapters.init(model)
    model.add_adapter("one", config="seq_bn")
    model.set_active_adapters("one")
    return model.eval()


def grafted() -> BertModel:
    """Return the BERT with a bottleneck behind each output of its blocks."""
    model = esper.wrap(bert(), select="**.output.dense")
    for layer in esper.layers(model).values():
        layer.graft(0, bottleneck(layer))
    return model


def bottleneck(layer: torch.nn.Linear) -> torch.nn.Module:
    """Return a kernel of four hidden units, the identity at birth by its zeroed last layer."""
    kernel = torch.nn.Sequential(
        torch.nn.Linear(layer.in_features, 4),
        torch.nn.ReLU(),
        torch.nn.Linear(4, layer.out_features),
    )
    torch.nn.init.zeros_(kernel[2].weight)
    torch.nn.init.zeros_(kernel[2].bias)
    return kernel


def insertion() -> Comparison:
    """Insert bottlenecks, and see what that alone changes."""
    expected = read(bert())
    return Comparison(
        asked="inserting a bottleneck changes no output",
        source="",
        peer=f"outputs {largest(read(with_adapter()), expected)}",
        esper=f"outputs {largest(read(grafted()), expected)}",
    )


def merging() -> Comparison:
    """Merge what cannot be merged, and see what is left of it."""
    model = with_adapter()
    active = read(model)
    model.merge_adapter("one")
    model.set_active_adapters(None)
    own = grafted()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.01)
    before = read(own)
    certificates = [layer.fossilize(0) for layer in esper.layers(own).values()]
    folded = sum(certificate.folded for certificate in certificates)
    return Comparison(
        asked="a bottleneck that is made permanent stays, or says that it cannot",
        source="",
        peer=f"merged without a word, and gone: outputs {largest(read(model), active)}",
        esper=(
            f"{folded} of {len(certificates)} folded, the rest kept with the reason; outputs "
            f"{largest(read(own), before)}"
        ),
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    told([insertion, merging])
