"""python -m mixlora.train +method=smora +tasks=commonsense [overrides]; with -m, or sweep=NAME, a sweep over them"""

import shlex
import sys

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.environment import world_size


@door("train")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mixlora.config.load import config_of, refuse_launcher

    config = config_of(cfg)
    refuse_launcher(config, sys.argv)
    from mixlora.checks import check_run  # torch is imported only when all that needs no torch is right

    check_run(config, world_size=world_size())
    from mixlora.experiment import Experiment  # and transformers, datasets, accelerate only then

    Experiment(config, command(sys.argv), HydraConfig.get().overrides.task).run()


def command(argv: list[str]) -> str:
    """What to type to get this run again."""
    return shlex.join(["python", "-m", "mixlora.train", *argv[1:]])


if __name__ == "__main__":
    main()
