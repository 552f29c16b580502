"""Hydra's way in: `-m` hands every point of a sweep to mixlora.sweeps. Hydra looks in packages of this name alone."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher


class MixloraLauncher(Launcher):
    """Each point a process, or a job, of its own; see `mixlora.sweeps.launch`."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from mixlora.sweeps.launch import launch  # Hydra imports every plugin at every start

        # Hydra has just written a multirun.yaml. The run folders say more, and a sweep that is refused leaves nothing.
        folder = Path(self.config.hydra.sweep.dir)
        (folder / "multirun.yaml").unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()

        return launch(self.loader, self.config, job_overrides)


target = f"{MixloraLauncher.__module__}.{MixloraLauncher.__name__}"
ConfigStore.instance().store(group="hydra/launcher", name="mixlora", node={"_target_": target}, provider="mixlora")
