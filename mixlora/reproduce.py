"""python -m mixlora.reproduce recipe=NAME [launcher=local|slurm] [jobs=N] [dry_run=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.doors import Reproduce
from mixlora.config.load import check_launch
from mixlora.config.schema import Launcher
from mixlora.config.typed import typed


@door("reproduce", Reproduce)
def main(cfg: DictConfig) -> None:
    options = typed(Reproduce, cfg)
    check_launch(options)
    from mixlora.tables import show

    study = show.study_of(options.recipe, options.output_root, options.overrides, include_dirty=options.include_dirty)
    if options.dry_run:
        from mixlora.estimate import print_estimate  # imports torch

        nodes = options.slurm.nodes if options.launcher is Launcher.slurm else 1
        print_estimate(study, options.tflops, options.utilization, options.processes * nodes)
        return
    from mixlora import reproduction

    failed = reproduction.reproduce(study, options)
    made = show.show(study, options.format, to := None if options.to is None else Path(options.to))
    show.report(study, made, to, None)
    reproduction.complain(failed)


if __name__ == "__main__":
    main()
