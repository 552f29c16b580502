"""The files that take longest come first, so that no worker is left with one of them when the others are done; and a
test's random numbers are its own, whatever ran before it."""

import gc

import pytest
import torch

# The tests import a million objects that stay, and Hydra copies trees of them: with Python's own thresholds a seventh
# of the time goes into looking for garbage there.
gc.set_threshold(100_000, 50, 100)

LONG = (
    "test_methods", "test_sweeps", "test_resume", "test_distributed", "test_tiny_recipe", "test_door", "test_tables",
    "test_tasks_configs", "test_sandbox", "test_train", "test_configs", "test_evaluation", "test_fused", "test_loop",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
