"""pass@k: the chance that at least one of k samples is right.

pass@k = 1 - C(n - c, k) / C(n, k)      n samples of a problem, c of them right (arXiv:2107.03374, equation 1)
"""

import math
from collections.abc import Iterable, Sequence

KS = (1, 10, 100)  # that the field reports


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimator for one problem. Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(counts: Iterable[tuple[int, int]], ks: Sequence[int]) -> dict[str, float]:
    """(n, c) of every problem -> {"pass@1": mean, ...} for each k that every problem has enough samples for."""
    counts = list(counts)
    usable = [k for k in ks if counts and all(n >= k for n, _ in counts)]
    return {f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in usable}
