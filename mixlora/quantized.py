"""What bitsandbytes is told of 4-bit weights: to leave them as they were loaded."""

from torch import nn

from mixlora.errors import ConfigError

# bitsandbytes (0.50) packs 4-bit weights anew when a CPU with bfloat16 products first scores with them. Products with
# such weights have no gradient, so what is trained after a scoring would not learn through them.
REPACKS = "support_avx512bf16_for_cpu"


def never_repacked(model: nn.Module) -> None:
    """Switch that off.

    Raises:
        ConfigError: weights that are packed already, for they cannot be had back: some scales were rounded.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, REPACKS)}
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ConfigError(
                f"bitsandbytes has packed the 4-bit weights of '{name}' anew when this model scored, and nothing could "
                "be trained through them. Load the model again, and attach before it scores"
            )
        setattr(layer, REPACKS, False)
