"""A site without parameters (affine=False norm) in a float64 or bfloat16 model: a blueprint is built in float32 and refused, although the layer's buffers and the example say the dtype (and the device)."""
import sys, torch, torch.nn as nn, esper
from esper.compiler.catalog import default_catalog
from esper.state.site import describe_site
bad = 0
for dt in (torch.float64, torch.bfloat16):
    for host, x in ((nn.BatchNorm2d(4, affine=False), torch.randn(3, 4, 5, 5)), (nn.LayerNorm(4, elementwise_affine=False), torch.randn(3, 4))):
        m = esper.wrap(nn.Sequential(host).to(dt), select=["0"]); x = x.to(dt)
        try: m[0].graft(0, default_catalog().blueprints_for(describe_site(m[0], x, m(x)))[0], example=x); print(dt, type(host).__name__, "ok")
        except Exception as e: bad += 1; print(dt, type(host).__name__, f"{type(e).__name__}: {str(e)[:140]}")
sys.exit(bad > 0)
