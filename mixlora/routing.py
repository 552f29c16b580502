"""python -m mixlora.routing run=RUN_FOLDER [plots=png|pdf]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door


@door("routing")
def main(cfg: DictConfig) -> None:
    from mixlora.tables.routing import show

    show(Path(str(cfg.run)), None if cfg.plots is None else str(cfg.plots))


if __name__ == "__main__":
    main()
