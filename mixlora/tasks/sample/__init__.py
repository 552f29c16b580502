"""The embedded sample: small sets in the hub's own schema, written by this project, the same on every machine.

They show that a run works and that training teaches something, without a hub or a licence to ask for. They are not the
data sets whose places they take, and their scores compare with nothing but each other.

draw        the random stream, and what of a table is trained on and what is tested on
facts, places, purposes, options   questions with options: ARC, OpenBookQA, CommonsenseQA, ScienceQA
social      Social IQa       scenes    HellaSwag       pairs     PIQA, WinoGrande       passages  BoolQ
arithmetic  GSM8K            clinic    MedQA           programs  MBPP, HumanEval        glue      CoLA, SST-2, RTE, MRPC
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mixlora.tasks.sample import arithmetic, clinic, glue, options, pairs, passages, programs, scenes, social
from mixlora.tasks.sample.draw import Draw, Row


@dataclass(frozen=True)
class Sample:
    """One set: how its rows are made, and how many each split has."""

    build: Callable[[Draw, int], list[Row]]
    sizes: Mapping[str, int]


# Small enough that one pass over the eight commonsense sets, scored before and after, takes minutes on a laptop.
THREE = {"train": 40, "validation": 20, "test": 32}
TWO = {"train": 40, "validation": 32}
SETS: Mapping[tuple[str, str], Sample] = {
    ("allenai/ai2_arc", "ARC-Easy"): Sample(options.arc_easy, THREE),
    ("allenai/ai2_arc", "ARC-Challenge"): Sample(options.arc_challenge, THREE),
    ("allenai/openbookqa", "main"): Sample(options.openbookqa, THREE),
    ("google/boolq", "default"): Sample(passages.boolq, TWO),
    ("baber/piqa", "default"): Sample(pairs.piqa, TWO),
    ("lighteval/siqa", "default"): Sample(social.siqa, TWO),
    ("Rowan/hellaswag", "default"): Sample(scenes.hellaswag, TWO),
    ("allenai/winogrande", "winogrande_xl"): Sample(pairs.winogrande, {"train": 60, "validation": 32}),
    ("allenai/winogrande", "winogrande_debiased"): Sample(pairs.winogrande, TWO),
    ("tau/commonsense_qa", "default"): Sample(options.commonsense_qa, TWO),
    ("derek-thomas/ScienceQA", "default"): Sample(options.scienceqa, THREE),
    ("openai/gsm8k", "main"): Sample(arithmetic.gsm8k, {"train": 300, "test": 100}),
    ("GBaker/MedQA-USMLE-4-options", "default"): Sample(clinic.medqa, {"train": 200, "test": 100}),
    ("google-research-datasets/mbpp", "full"): Sample(programs.mbpp, {"train": 60, "validation": 10, "test": 20}),
    ("openai/openai_humaneval", "openai_humaneval"): Sample(programs.humaneval, {"test": 20}),
    ("nyu-mll/glue", "cola"): Sample(glue.cola, TWO),
    ("nyu-mll/glue", "sst2"): Sample(glue.sst2, TWO),
    ("nyu-mll/glue", "rte"): Sample(glue.rte, TWO),
    ("nyu-mll/glue", "mrpc"): Sample(glue.mrpc, TWO),
}


def rows(path: str, config: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split, none where the sample has no such set or split."""
    return list(built(path, config, split))


@cache
def built(path: str, config: str, split: str) -> tuple[Row, ...]:
    found = SETS.get((path, config))
    if found is None or split not in found.sizes:
        return ()
    # Without a split of its own for tuning, all that is held out is for the test, whatever the split is called.
    scored_once = len(found.sizes) == 2 and split != "train"
    return tuple(found.build(Draw.of(path, "both" if scored_once else split), found.sizes[split]))
