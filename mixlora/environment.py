"""What launchers (torchrun, accelerate launch, srun) say of this process in its environment."""

import os
from collections.abc import Mapping


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of the job."""
    return int(environment.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this one speaks for the job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def switched_on(name: str, default: str = "false", environment: Mapping[str, str] = os.environ) -> bool:
    """A switch as Accelerate writes it."""
    return environment.get(name, default).lower() in ("1", "true", "yes")
