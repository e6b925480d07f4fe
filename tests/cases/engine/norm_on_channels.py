"""A LayerNorm subclass that works on channels_first maps (ConvNeXt's downsampling norms): the catalog describes it by its class, offers kernels for the last axis, and all of them are refused."""
import sys, torch, torch.nn as nn, esper
from esper.compiler.catalog import default_catalog
from esper.state.site import describe_site
class ChannelsFirst(nn.LayerNorm):
    def forward(self, x): return super().forward(x.movedim(1, -1)).movedim(-1, 1)
m = esper.wrap(nn.Sequential(ChannelsFirst(4))); x = torch.randn(2, 4, 6, 6); h = m(x); ok = 0; bps = default_catalog().blueprints_for(describe_site(m[0], x, h), capacity_only=False)
for bp in bps:
    try: m[0].graft(0, bp, example=x); ok += 1; m[0].unload_kernel(0)
    except Exception as e: print(bp.id, type(e).__name__, str(e)[-110:])
print(ok, "of", len(bps), "offered kernels fit"); sys.exit(ok < len(bps))
