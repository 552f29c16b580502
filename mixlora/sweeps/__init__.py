"""Sweeps: every point a run of its own, on this machine's devices or as a SLURM job.

`points` says what is to be run, `running` runs it with any of the `places` (local, slurm), `show` shows it.
"""
