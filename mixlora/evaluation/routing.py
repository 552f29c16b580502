"""Who does what: how often each task's tokens chose each expert of each gate."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mixlora import gates
from mixlora.config.schema import Eval, Method
from mixlora.evaluation.batches import batches
from mixlora.tasks.collate import Row, collate


@torch.no_grad()
def expert_loads(
    model: nn.Module, rows: Mapping[str, Sequence[Row]], options: Eval, pad_id: int, *, pads: bool
) -> dict[str, dict[str, list[int]]]:
    """task -> gate -> real tokens that chose each expert. Without `pads` only rows of one length share a batch."""
    device = next(model.parameters()).device
    spare = None if pads else 0
    loads: dict[str, dict[str, list[int]]] = {}
    for task, task_rows in rows.items():
        totals: dict[str, torch.Tensor] = {}
        for places in batches([len(row) for row in task_rows], options.batch_size, options.batch_tokens, spare):
            batch = collate([task_rows[i] for i in places], pad_id).to(device)
            model(batch.input_ids_BS, attention_mask=batch.attention_mask_BS, position_ids=batch.position_ids_BS)
            chosen = {name: routing.chosen_TE for name, routing in gates.pop_routings(model).items()}
            found = gates.by_gate(gates.loads(chosen, batch.mask_BS))
            for name in chosen:
                totals[name] = totals[name] + found[name] if name in totals else found[name]
        loads[task] = {name: load_E.tolist() for name, load_E in totals.items()}
    return loads


def least_experts(model: nn.Module, method: Method) -> dict[str, int]:
    """gate -> experts that a token uses at the least. Only the gate knows: without a top_k they are one, or all."""
    found = gates.gates_of(model).items()
    return {name: gate.top_k or (gate.num_experts if gate.uses_every(method) else 1) for name, gate in found}
