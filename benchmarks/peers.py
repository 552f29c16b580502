"""A training step of moe_peft 2.0.2 against ours: MixLoRA and MoLA on a LLaMA of hidden 512, 8 layers, ff 1536.

Theirs runs in a process with a Python of its own (`--peer`), for it needs an old transformers; a round asks each side
for one step in turn. Same shapes: 8 rows of 256 tokens without padding, every token a label, rank 8, 8 experts, top-2,
every linear, dropout 0.05, the balance loss, AdamW, float32. Theirs is timed as its own loop runs it (every block is
computed again in backward) and without that; ours never computes a block again.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from common import Row, arguments, interleaved, ratio, rounds_within, write

LLAMA = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY, ROWS, LENGTH = 4096, 8, 256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("mixlora", "mola")


def main() -> None:
    options = arguments(__doc__, peer="", budget=120.0, worker="")
    if options.clock == "cpu":
        sys.exit("peers.py: --clock=cpu counts this process alone, and the peer is another one; use --clock=wall")
    options.device = "cpu"  # where the peer runs
    if options.worker:
        answer(their_step(*options.worker.split(","), SMALL if options.quick else LLAMA))
        return
    if not options.peer:
        sys.exit("peers.py: --peer=PYTHON, an environment with moe_peft 2.0.2 (benchmarks/README.md says how)")
    rows = [row for method in METHODS for row in measure(method, options)]
    print(f"written: {write('peers', rows, options, peer=versions(options.peer))}")


def measure(method: str, options) -> list[Row]:
    theirs = {recompute: Peer(method, recompute, options) for recompute in ("recompute", "none")}
    variants: dict[str, Callable] = {name: peer.step for name, peer in theirs.items()}
    variants["ours"] = our_step(method, SMALL if options.quick else LLAMA, options.device)
    seconds = interleaved(variants, rounds_within(options.budget, variants, 31, options.device), options.device)
    for peer in theirs.values():
        peer.close()
    setting = f"float32, {ROWS} x {LENGTH} tokens"
    forms = {"recompute": "as its own loop runs it", "none": "computing nothing again"}
    return [
        ratio(f"step: moe_peft {method} {how} / ours", setting, seconds[name], seconds["ours"], goal=2.0, at_least=True)
        for name, how in forms.items()
    ]


def our_step(method: str, sizes: dict[str, int], device: str) -> Callable[[], None]:
    from training import RANDOM, ours, trainer

    from mixlora.config.schema import Compute
    from mixlora.tasks.collate import Row as Example

    RANDOM["peer"] = {"model_type": "llama", "vocab_size": VOCABULARY, "tie_word_embeddings": False, **sizes}
    overrides = ["method.r=8", "method.num_experts=8", "method.top_k=2", "method.lora_alpha=16"]
    parts = ours("peer", device, "float32", method, Compute.fast, *overrides)
    ids = token_ids()
    loop = trainer(parts, [Example(str(i), "a", tuple(row[:1]), tuple(row[1:])) for i, row in enumerate(ids)], ROWS)
    loop.model.train()
    counted = iter(range(1, 10**9))
    return lambda: loop.step(next(counted)) and None


def their_step(method: str, recompute: str, sizes: dict[str, int]) -> Callable[[], None]:
    """moe_peft's own forward, loss, backward and optimizer, as its `train` calls them."""
    import moe_peft
    from moe_peft import trainer
    from moe_peft.models import LlamaForCausalLM
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM as Base

    torch.manual_seed(0)
    # Eager attention is its default; its only other one, flash_attn, needs a GPU.
    config = LlamaConfig(vocab_size=VOCABULARY, attn_implementation="eager", pad_token_id=0, **sizes)
    model = moe_peft.LLMModel(LlamaForCausalLM.from_pretrained(Base(config).requires_grad_(False), device="cpu"))
    adapter = moe_peft.adapter_factory(
        peft_type=method.upper(), adapter_name=method, task_name="casual", r=8, lora_alpha=16, lora_dropout=0.05,
        target_modules=list(LINEARS), num_experts=8, top_k=2, routing_strategy=method, router_loss=True,
    )  # fmt: skip
    model.init_adapter(adapter)
    training = moe_peft.TrainConfig(
        adapter_name=method,
        task_name="casual",
        num_epochs=1,
        batch_size=ROWS,
        micro_batch_size=ROWS,
        learning_rate=1e-6,
    )
    training.prepare(model.get_adapter_weight_dict(method))
    training.prepare_lr_scheduler(10**6)
    ids = token_ids()

    def step() -> None:
        batch = moe_peft.LLMModelInput(
            batch_configs_=[moe_peft.LLMBatchConfig(method, 0, ROWS)],
            batch_tokens_=[list(row) for row in ids],
            batch_labels_=[list(row) for row in ids],
            batch_masks_=[[1] * LENGTH for _ in ids],
            gradient_checkpoint_=recompute,
        )
        trainer._compute_loss({method: training}, model.forward(batch)).backward()
        training.step()

    return step


def token_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator).tolist()


def answer(step: Callable[[], None]) -> None:
    """A step for every line of standard input; a line of standard output when it is done."""
    print("ready", flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


class Peer:
    """A process with the peer's Python, which makes one step when asked."""

    def __init__(self, method: str, recompute: str, options):
        command = [options.peer, __file__, "--worker", f"{method},{recompute}", "--threads", str(options.threads)]
        self.process = subprocess.Popen(
            command + ["--quick"] * options.quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL if not os.environ.get("PEER_LOG") else None,
            env={**os.environ, "MOE_PEFT_EXECUTOR_TYPE": "CPU"},
        )  # fmt: skip
        self.wait("ready")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait("done")

    def wait(self, word: str) -> None:
        # moe_peft writes to standard output as well, so what is not our word is passed over.
        for line in self.process.stdout:
            if line.strip() == word:
                return
        sys.exit(f"peers.py: the peer's process ended with status {self.process.wait()}; PEER_LOG=1 shows what it says")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def versions(python: str) -> dict[str, str]:
    """What the peer's environment holds."""
    code = "from importlib.metadata import version as v; print(*[v(p) for p in ('moe_peft', 'torch', 'transformers')])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("moe_peft", "torch", "transformers"), found, strict=True))


if __name__ == "__main__":
    main()
