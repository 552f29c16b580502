"""python -m mixlora.table recipe=NAME [output_root=runs] [format=all|pins] [to=FOLDER] [include_dirty=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.doors import Format, Table
from mixlora.config.typed import typed


@door("table", Table)
def main(cfg: DictConfig) -> None:
    options = typed(Table, cfg)
    from mixlora.tables import show

    study = show.study_of(options.recipe, options.output_root, options.overrides, include_dirty=options.include_dirty)
    if options.format is Format.pins:
        show.print_pins(study)
        return
    made = show.show(study, options.format, to := None if options.to is None else Path(options.to))
    if options.report:
        show.report(study, made, to, None if options.plots is None else options.plots.value)
    if options.records is not None:
        show.keep_records(study, Path(options.records))


if __name__ == "__main__":
    main()
