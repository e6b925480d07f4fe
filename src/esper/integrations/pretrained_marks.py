"""The names that a grown model's config has, and what they tell who cannot load it."""

from __future__ import annotations

from typing import Final

METHOD: Final = "esper"
"""Stands in ``quantization_config``, as the method."""
REFUSED: Final = (
    "esper. This model has grown kernels: `import esper.integrations.transformers` "
    "(pip install esper-morph) before from_pretrained"
)
"""Stands in ``fusion_config``; transformers writes it into its error."""
CANNOT: Final = (
    "esper. This model has grown kernels, and is quantised too, so that from_pretrained cannot "
    "build it; save it by torch.save or esper.export"
)
"""Stands there where the config has a quantisation of its own."""
