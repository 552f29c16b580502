"""lm-evaluation-harness as a backend: its tasks, its prompts and its scoring on our model. An extra, `lm-eval`.

Its data comes from the hub, so `eval.backend=lm_eval` needs one, or its cache.
"""

import errno
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mixlora import online
from mixlora.config.schema import Answer, Eval, Protocol, Split, Task
from mixlora.errors import ConfigError, DataError, first_line
from mixlora.evaluation.scores import finite
from mixlora.tasks.example import Example

OWN_DATA = (
    "It reads its data from the hub, whatever data.source is: use eval.backend=own with eval.protocol=lm_eval and "
    "data.source=sample or a folder"
)
REMEDY = "pip install 'lm_eval>=0.4.13', or use eval.protocol=lm_eval, which asks and scores alike, on our rows"


def require(tasks: dict[str, Task], options: Eval, source: str) -> None:
    """Raises ConfigError where the harness is not installed, does not have one of the tasks, or reads other rows."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"eval.backend=lm_eval needs lm-evaluation-harness: {REMEDY}")
    if source != "hub":  # results would name the rows of the one and be scores of the other
        raise ConfigError(f"eval.backend=lm_eval with data.source={source}. {OWN_DATA}, or data.source=hub")
    for name, task in tasks.items():
        if not task.train_only and task.answer_kind is not Answer.options:
            raise ConfigError(
                f"eval.backend=lm_eval: task {name} has answer_kind={task.answer_kind.value}, and only options are "
                "scored there. Leave the task out, or use eval.backend=own"
            )
        if not task.train_only and harness_task(task) is None:
            raise ConfigError(
                f"eval.backend=lm_eval: task {name} does not say what the harness calls it. "
                "Give it wordings.lm_eval.harness_task, or use eval.backend=own"
            )
        if not task.train_only and task.metric == "acc_token":
            raise ConfigError(
                f"eval.backend=lm_eval: the harness has no metric acc_token, which is task {name}'s. Set "
                f"tasks.mixture.{name}.metric=acc, or eval.backend=own"
            )
    for key in ("max_length", "fewshot_seed", "temperature"):
        usual = getattr(Eval(), key)
        if getattr(options, key) != usual:
            raise ConfigError(
                f"eval.backend=lm_eval goes by the harness's own, not by eval.{key}={getattr(options, key)}. Set "
                f"eval.{key}={'null' if usual is None else usual}"
            )
    if options.protocol not in (Protocol.auto, Protocol.lm_eval):
        raise ConfigError(
            f"eval.backend=lm_eval asks as the harness does, not by eval.protocol={options.protocol.value}. Set "
            "eval.protocol=auto, or eval.backend=own"
        )
    if options.split is not Split.test:
        raise ConfigError(f"eval.backend=lm_eval scores the harness's own split, not eval.split={options.split.value}")


def require_data(tasks: Iterable[Task]) -> None:
    """The harness's tasks and their data sets, read before a model is loaded.

    Raises:
        ConfigError: one that the harness does not have, a group of tasks, or one that is not scored by options.
        DataError: not here, and not to be had.
    """
    from lm_eval.tasks import TaskManager

    manager, named = TaskManager(), {harness_task(task): task for task in tasks}
    for name, task in named.items():
        if name not in manager.all_subtasks:
            raise unlike(task, "a group of tasks" if name in manager.all_tasks else "no task that it has")
    require_hub()
    with of_the_hub():
        found = manager.load([*named])["tasks"]
    for name, task in named.items():
        if found[name].OUTPUT_TYPE != "multiple_choice":
            raise unlike(task, f"of output_type {found[name].OUTPUT_TYPE}")


def unlike(task: Task, kind: str) -> ConfigError:
    return ConfigError(
        f"eval.backend=lm_eval: {harness_task(task)} is {kind} in the harness, and task {task.name} needs a single one "
        f"of output_type multiple_choice. Mend tasks.mixture.{task.name}.wordings.lm_eval.harness_task, or use "
        "eval.backend=own"
    )


def require_hub() -> None:
    if problem := online.problem():
        raise DataError(f"eval.backend=lm_eval: {problem}. {OWN_DATA}")


@contextmanager
def of_the_hub() -> Iterator[None]:
    """What ends the harness where its data are not to be had."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"eval.backend=lm_eval could not read its data ({first_line(error)}). {OWN_DATA}") from None


def harness_task(task: Task) -> str | None:
    wording = task.wordings.get("lm_eval")
    return None if wording is None else wording.harness_task


def mixture_lm(model: Any, tokenizer: Any, **options: Any) -> Any:
    """The harness's Hugging Face model around one that is already built, adapter and all."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, **options)


@dataclass(frozen=True)
class Harness:
    """Scores a task in the harness; stands where an Evaluator does."""

    model: Any
    tokenizer: Any
    options: Eval

    def __call__(self, task: Task, examples: Sequence[Example], label: str) -> list[dict[str, Any]]:
        """One prediction a document of the harness, with its scores.

        Raises:
            DataError: the hub cannot be reached and nothing is cached.
            ConfigError: the task's metric is none that the harness has for it.
        """
        require_hub()
        import lm_eval

        with of_the_hub():
            found = lm_eval.simple_evaluate(
                model=mixture_lm(self.model, self.tokenizer, batch_size=self.options.batch_size),
                tasks=[harness_task(task)],
                num_fewshot=self.options.num_fewshot,
                limit=self.options.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        made = predictions(task, found["samples"][harness_task(task)])
        if made and task.metric not in made[0]:
            raise ConfigError(
                f"eval.backend=lm_eval: the harness has no metric {task.metric} for {harness_task(task)}. Set "
                f"tasks.mixture.{task.name}.metric to one that it has, or eval.backend=own"
            )
        return made


def predictions(task: Task, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The harness's samples as our predictions."""
    return [
        {
            "id": f"{task.name}/lm_eval/{sample['doc_id']}",
            "prompt": sample["arguments"][0][0],
            "options": [arguments[1] for arguments in sample["arguments"]],
            "log_likelihoods": finite(
                [float(answer[0][0]) for answer in sample["resps"]], f"document {sample['doc_id']}"
            ),
            "target": sample["target"],
            **{name: float(sample[name]) for name in ("acc", "acc_norm") if name in sample},
        }
        for sample in samples
    ]
