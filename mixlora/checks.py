"""What a configuration alone shows to be wrong once torch is at hand: the options of its gate, losses and protocol."""

from mixlora import gates, losses
from mixlora.config.schema import Config
from mixlora.evaluation import protocols


def check(config: Config) -> None:
    """Raise a ConfigError for the first part that cannot be built."""
    losses.build(config.aux_loss)
    if config.method.gate is not None:
        gates.check(config.method.gate)
    protocols.check(config)
