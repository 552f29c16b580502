"""Who does what: how often each task's tokens chose each expert of each gate."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mixlora import gates
from mixlora.tasks.collate import Row, collate


@torch.no_grad()
def expert_loads(
    model: nn.Module, rows: Mapping[str, Sequence[Row]], *, batch_size: int, pad_id: int
) -> dict[str, dict[str, list[int]]]:
    """task -> gate -> real tokens that chose each expert. Empty for a method without gates."""
    if not gates.gates_of(model):
        return {}
    device = next(model.parameters()).device
    loads: dict[str, dict[str, list[int]]] = {}
    for task, task_rows in rows.items():
        totals: dict[str, torch.Tensor] = {}
        for start in range(0, len(task_rows), batch_size):
            batch = collate(task_rows[start : start + batch_size], pad_id).to(device)
            model(batch.input_ids_BS, attention_mask=batch.attention_mask_BS, position_ids=batch.position_ids_BS)
            for name, load_E in gates.loads(gates.pop_routings(model), batch.mask_BS).items():
                totals[name] = totals[name] + load_E if name in totals else load_E
        loads[task] = {name: load_E.tolist() for name, load_E in totals.items()}
    return loads
