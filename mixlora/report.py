"""python -m mixlora.report run=RUN_FOLDER [plots=png|pdf]"""

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.doors import Report, run_folder
from mixlora.config.typed import typed


@door("report", Report)
def main(cfg: DictConfig) -> None:
    options = typed(Report, cfg)
    run = run_folder(options.run)
    from mixlora.tables.report import show

    show(run, None if options.plots is None else options.plots.value)


if __name__ == "__main__":
    main()
