"""Loading a state_dict (strict=False, or a strict load that fails) into a model whose other seed holds a replacing kernel: the shares sum to 1.4, the host enters with weight -0.4."""
import dataclasses, sys, torch, torch.nn as nn, esper
from esper.compiler.catalog import default_catalog
from esper.state.site import describe_site
def make(): torch.manual_seed(0); return esper.wrap(nn.Sequential(nn.Linear(4, 4)), num_seeds=3)
a, b, x = make(), make(), torch.randn(2, 4)
bp = dataclasses.replace(default_catalog().blueprints_for(describe_site(a[0]))[0], mode="replace")
a[0].graft(0, bp, alpha=.7, example=x); b[0].graft(1, bp, alpha=.7, example=x)
r = b.load_state_dict(a.state_dict(), strict=False)
total = sum(b[0].alpha(i) for i in range(3))
h = b[0].default_layer(x); k0, k1 = b[0].seed_kernel(0)(x), b[0].seed_kernel(1)(x)
print(r, "sum of replacing alphas:", total, "| output == -0.4 h + 0.7 k0 + 0.7 k1:", torch.allclose(b(x), -0.4 * h + .7 * k0 + .7 * k1, atol=1e-6))
sys.exit(total > 1 + 1e-6)
