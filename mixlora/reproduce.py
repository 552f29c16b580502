"""python -m mixlora.reproduce recipe=NAME [launcher=local|slurm] [jobs=1] [dry_run=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.load import launch_of


@door("reproduce")
def main(cfg: DictConfig) -> None:
    from mixlora.tables import show

    study = show.study_of(
        str(cfg.recipe), str(cfg.output_root), list(cfg.overrides), include_dirty=bool(cfg.include_dirty)
    )
    if cfg.dry_run:
        from mixlora.estimate import print_estimate  # imports torch

        print_estimate(study, float(cfg.tflops), float(cfg.utilization))
        return
    from mixlora import reproduction

    failed = reproduction.reproduce(study, launch_of(cfg))
    made = show.show(study, str(cfg.format), to := None if cfg.to is None else Path(str(cfg.to)))
    show.report(study, made, to, None)
    reproduction.complain(failed)


if __name__ == "__main__":
    main()
