"""What one optimizer step counts: on each micro-batch, then over all ranks in one reduction.

E experts of a gate   B rows of a micro-batch
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mixlora import gates, ranks
from mixlora.tasks.collate import Batch


class Tally:
    """Cross-entropy, label tokens, real tokens and rows by task; how many tokens chose each expert of each gate.

    What a device computes stays there until `reduce`, so that no micro-batch waits for it.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        zeros = (torch.zeros(len(self.tasks), dtype=torch.float64) for _ in range(4))
        self.nats, self.count, self.rows, self.tokens = zeros
        self.signals = torch.zeros(1, dtype=torch.float64)  # SIGINT and SIGTERM that a rank has received
        self.stacks: dict[tuple[str, ...], Tensor] = {}  # loads of gates that are alike
        self.loads: dict[str, Tensor] = {}  # of each gate, once all is reduced
        self.unread: list[tuple[Tensor, Tensor]] = []  # task and nats of each row

    def add(self, batch: Batch, nats_B: Tensor, chosen: Mapping[str, Tensor]) -> None:
        index_B = torch.tensor([self.tasks.index(task) for task in batch.tasks])
        counted = (self.rows, [1] * len(batch.ids)), (self.tokens, batch.lengths), (self.count, batch.label_tokens)
        for total, values_B in counted:
            total.index_add_(0, index_B, torch.tensor(values_B, dtype=torch.float64))
        self.unread.append((index_B, nats_B))
        for names, load_LE in gates.loads(chosen, batch.mask_BS).items():
            self.stacks[names] = self.stacks[names] + load_LE if names in self.stacks else load_LE

    def reduce(self, device: torch.device) -> None:
        """Sum over all ranks; the gates stand in one order on each of them."""
        index_B, nats_B = (torch.cat(parts) for parts in zip(*self.unread, strict=True))
        self.nats.index_add_(0, index_B, nats_B.double().cpu())
        here, there = [self.nats, self.count, self.rows, self.tokens, self.signals], list(self.stacks.values())
        whole = torch.cat([torch.cat(here).to(device, non_blocking=True), *(load.double().flatten() for load in there)])
        summed = ranks.summed(whole).cpu()
        sizes = [part.numel() for part in (*here, *there)]
        self.nats, self.count, self.rows, self.tokens, self.signals, *loads = summed.split(sizes)
        stacks = {names: load.unflatten(0, (len(names), -1)) for names, load in zip(self.stacks, loads, strict=True)}
        self.loads = gates.by_gate(stacks)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a label token."""
        return float(self.nats.sum() / self.count.sum())

    def task_losses(self) -> dict[str, float]:
        values = zip(self.tasks, self.nats.tolist(), self.count.tolist(), strict=True)
        return {task: nats / count for task, nats, count in values if count}

    def by_task(self, values: Tensor) -> dict[str, int]:
        return {task: int(value) for task, value in zip(self.tasks, values.tolist(), strict=True) if value}

    def balance(self) -> dict[str, float]:
        """Over all gates: variation coefficient of the load (0 is balanced), share of experts that nobody chose."""
        if not self.loads:
            return {}
        stacks = [load_LE for _, load_LE in gates.alike(self.loads)]
        spread_L = torch.cat([load_LE.std(-1, unbiased=False) / load_LE.mean(-1) for load_LE in stacks])
        idle_L = torch.cat([(load_LE == 0).double().mean(-1) for load_LE in stacks])
        return {"cv_mean": float(spread_L.mean()), "cv_max": float(spread_L.max()), "idle": float(idle_L.mean())}
