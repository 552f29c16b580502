"""python -m mixlora.routing run=RUN_FOLDER [plots=png|pdf]"""

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.doors import Routing, run_folder
from mixlora.config.typed import typed


@door("routing", Routing)
def main(cfg: DictConfig) -> None:
    options = typed(Routing, cfg)
    run = run_folder(options.run)
    from mixlora.tables.routing import show

    show(run, None if options.plots is None else options.plots.value)


if __name__ == "__main__":
    main()
