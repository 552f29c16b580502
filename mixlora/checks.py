"""What can be seen to be wrong before transformers is imported and any data is read."""

from mixlora import gates, losses
from mixlora.config.load import digest, run_folder
from mixlora.config.schema import Config
from mixlora.evaluation import protocols
from mixlora.records import finished_as
from mixlora.tasks import sources


def check(config: Config) -> None:
    """Raise a ConfigError for the first of gate, losses and protocol that cannot be built."""
    losses.build(config.aux_loss)
    if config.method.gate is not None:
        gates.check(config.method.gate)
    protocols.check(config)


def check_run(config: Config) -> None:
    """`check`, and that the run has a folder of its own and data to read.

    Raises:
        ConfigError: its folder holds a finished run of another configuration.
        DataError: a source that is not there; a finished run is shown without one.
    """
    check(config)
    if not finished_as(run_folder(config), digest(config)):
        sources.require(config.tasks.mixture.values(), config.data.source)
