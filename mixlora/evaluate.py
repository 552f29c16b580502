"""python -m mixlora.evaluate run=RUN_FOLDER [tasks=...] [eval.limit=...]        or model=NAME tasks=NAME for a bare model"""

from omegaconf import DictConfig, OmegaConf

from mixlora.config.cli import door


@door("evaluate")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mixlora.config import load
    from mixlora.errors import ConfigError

    run = cfg.run
    composed = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "run"])
    given = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    if run is None:
        if OmegaConf.is_missing(composed.tasks, "name"):
            raise ConfigError("Choose what to score: tasks=NAME, and run=RUN_FOLDER or model=NAME")
        composed.method.name = "base"
    else:
        composed = laid_over(load.read(run), composed, [key for key in given if key != "run"])
    config = load.config_of(composed)
    from mixlora.reevaluation import reevaluate

    reevaluate(config, None if run is None else str(run))


def laid_over(base: DictConfig, composed: DictConfig, keys: list[str]) -> DictConfig:
    """The run's own configuration with the values that were given on the command line."""
    for key in keys:
        OmegaConf.update(
            base,
            key,
            OmegaConf.to_container(composed, resolve=True)[key] if key in composed else OmegaConf.select(composed, key),
            merge=False,
            force_add=True,
        )
    return base


if __name__ == "__main__":
    main()
