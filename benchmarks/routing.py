"""On a bfloat16 base: how many tokens go to the experts that a float32 router would choose."""

import torch
from common import Row, arguments, say, write
from layers import Linear, gated

from mixlora.adapters.dropout import Whole
from mixlora.adapters.fused import Project


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__, tokens=100_000)
    d, tokens = (256, 2000) if options.quick else (4096, options.tokens)
    torch.manual_seed(0)
    layer = gated(Linear(d).to(options.device, torch.bfloat16), 8).lin
    router_ED, same, rounded = layer.gate.router.weight, 0, 0
    for _ in range(0, tokens, 1000):
        x_TD = torch.randn(1000, d, device=options.device, dtype=torch.bfloat16)
        expected_TE = layer.gate.decide(layer.gate.router(x_TD.float())).chosen_TE
        same += int((chosen_by(layer, x_TD) == expected_TE).all(-1).sum())
        rounded_TE = (x_TD @ router_ED.to(torch.bfloat16).T).float()
        rounded += int(
            (rounded_TE.topk(2).indices.sort().values == expected_TE.nonzero()[:, 1].view(-1, 2)).all(-1).sum()
        )
    setting = f"bfloat16 d {d}, {tokens} tokens"
    rows = [
        Row("routing: same experts as a float32 router", setting, same / tokens, 0.9999, at_least=True),
        Row("routing: the same, of a bfloat16 router", setting, rounded / tokens),
    ]
    for row in rows:
        say(row)
    print(f"written: {write('routing', rows, options)}")


def chosen_by(layer, x_TD: torch.Tensor) -> torch.Tensor:
    """The layer's own path to its gate, with a base of one row: the base's product has no part in the routing."""
    factors = layer.base_layer.weight[:1], None, layer.delta.A_RD
    *_, z_TE = Project.apply(x_TD, (Whole(),), *factors, layer.gate.weight(x_TD.dtype))
    return layer.gate.decide(z_TE).chosen_TE


if __name__ == "__main__":
    main()
