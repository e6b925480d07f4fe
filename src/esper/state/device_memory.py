"""How much memory an accelerator has left, whichever it is."""

from __future__ import annotations

import torch


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Return what is left of an accelerator's memory and all of it, in bytes.

    What the allocator of torch keeps for later counts as left.

    Args:
        device: Any device.

    Returns:
        None on the CPU, on ``meta``, and where the accelerator's back end does not tell.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return None
    try:
        free, total = torch.accelerator.get_memory_info(device)
        free += torch.accelerator.memory_reserved(device)
        free -= torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError, AttributeError):  # as back ends without either say
        return None
    return free, total
