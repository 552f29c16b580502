"""python -m mixlora.table recipe=NAME [output_root=runs] [format=all|pins] [to=FOLDER] [include_dirty=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door


@door("table")
def main(cfg: DictConfig) -> None:
    from mixlora.tables import show

    study = show.study_of(
        str(cfg.recipe), str(cfg.output_root), list(cfg.overrides), include_dirty=bool(cfg.include_dirty)
    )
    if cfg.format == show.PINS:
        show.print_pins(study)
        return
    made = show.show(study, str(cfg.format), to := None if cfg.to is None else Path(str(cfg.to)))
    if cfg.report:
        show.report(study, made, to, None if cfg.plots is None else str(cfg.plots))
    if cfg.records is not None:
        show.keep_records(study, Path(str(cfg.records)))


if __name__ == "__main__":
    main()
