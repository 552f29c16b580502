"""The metric that results are computed by, as an `evaluate.Metric` that needs no hub and no folder."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from mixlora.evaluation.scores import mean_score


class MeanScore(evaluate.Metric):
    """value, stderr, n and interval of one score an example, each in [0, 1]: 1 for a right answer, or pass@k."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float64")})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _build_data_dir(self) -> str:
        return ""  # nothing is written, so a home folder that nobody may write to is no hindrance

    def _compute(self, predictions: Sequence[float]) -> dict[str, Any]:
        return asdict(mean_score(predictions))
