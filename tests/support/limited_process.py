"""An update of a twin in a process whose memory ends soon: what the allocator of the CPU raises."""

import gc
import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from esper.growth.live_step import LiveStep
from esper.growth.twins import lockstep_update
from esper.seeds.fitting import Fits
from esper.state.shortage import is_shortage

ROOM_BYTES = 48 << 20


class Keep(torch.optim.SGD):
    """Keeps the gradients of each update, and moves nothing."""

    kept = ()

    def step(self, closure=None):
        found = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        self.kept = (*self.kept, found)


def main():
    torch.manual_seed(0)
    blocks = [part for _ in range(8) for part in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Linear(128, 1)).double()
    x = torch.randn(1 << 13, 128, dtype=torch.float64)  # 8 MiB, of which a pass keeps 16
    optimizer = Keep(model.parameters(), lr=0.1)
    update = lockstep_update(lambda model, x: model(x).square().mean())
    sizes, left = [], []

    def make(fits):
        gc.collect()
        with fits.in_use():
            update(model, optimizer, [x], LiveStep(settings=[]))

    make(Fits(off="for this test"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES,) * 2)
    control = ""
    try:
        make(Fits(off="for this test"))
    except (RuntimeError, MemoryError) as error:
        control = str(error) if is_shortage(error) else ""
    make(Fits(tell=sizes.append, tell_left=lambda work, why: left.append(why)))
    whole, parts = optimizer.kept[0], optimizer.kept[-1]
    largest = max(float(g.abs().max()) for g in whole)
    apart = max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) / largest
    told = {"control": control, "sizes": [s.size for s in sizes], "left": left, "apart": apart}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
