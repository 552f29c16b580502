"""Hydra's way in: `-m` hands every point of a sweep to mixlora.sweeps. Hydra looks in packages of this name alone."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict


class MixloraLauncher(Launcher):
    """Each point a process, or a job, of its own; see `mixlora.sweeps.launch`."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        # Hydra writes a multirun.yaml before a point is looked at. The run folders say more, and a sweep that is
        # refused leaves nothing: so it is written where it goes away with this process.
        scratch = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        with open_dict(config):
            config.hydra.sweep.dir = scratch

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from mixlora.sweeps.launch import launch  # Hydra imports every plugin at every start

        return launch(self.loader, self.config, job_overrides)


target = f"{MixloraLauncher.__module__}.{MixloraLauncher.__name__}"
ConfigStore.instance().store(group="hydra/launcher", name="mixlora", node={"_target_": target}, provider="mixlora")
