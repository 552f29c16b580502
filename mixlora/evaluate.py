"""python -m mixlora.evaluate run=RUN_FOLDER [tasks=...] [eval.limit=...], or model=NAME tasks=NAME for a bare model."""

from omegaconf import DictConfig, OmegaConf

from mixlora.config import load
from mixlora.config.cli import door
from mixlora.config.doors import Evaluate, run_folder
from mixlora.config.typed import literal

OF_TRAINING = frozenset({"train", "method", "aux_loss", "dry_run", "resume", "tracker", "report"})


@door("evaluate", Evaluate)
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mixlora.errors import ConfigError

    run = None if cfg.run is None else str(cfg.run)
    composed = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "run"])
    given = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    for key in given:
        if key.partition(".")[0] in OF_TRAINING and key != "method.compute":
            raise ConfigError(f"{key} is of training, which is over when a model is scored. Leave it out")
    if run is not None:
        composed = laid_over(load.read(run_folder(run)), composed, [key for key in given if key != "run"])
    elif OmegaConf.is_missing(composed.tasks, "name"):
        raise ConfigError("Choose what to score: tasks=NAME, and run=RUN_FOLDER or model=NAME")
    else:
        composed.method.name = "base"
    config = load.config_of(composed)
    if run is not None and ("model" not in given or "model.path" in given):
        load.require_trust(config.model, run, {*given})
    from mixlora.reevaluation import reevaluate

    reevaluate(config, run, config.run_dir if "run_dir" in given else None)


def laid_over(run: DictConfig, composed: DictConfig, keys: list[str]) -> DictConfig:
    """The run's own configuration with the values that were given on the command line.

    `model.path=NEW`, which the door spells `model=path model.path=NEW`, says where the run's model lies now: all else
    that the run knows of it stays.
    """
    if {"model", "model.path"} <= {*keys}:
        keys = [key for key in keys if key != "model"]
        run.model.update(load.of_path(composed.model.path, run.model.gguf_file))
    for key in keys:
        OmegaConf.update(run, key, literal(OmegaConf.select(composed, key)), merge=False, force_add=True)
    return run


if __name__ == "__main__":
    main()
