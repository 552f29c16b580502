"""The learning rate as a function of the step alone, so a resumed run has nothing to restore.

The shapes are those of transformers' `get_scheduler` (constant is its constant_with_warmup).
"""

import math

from mixlora.config.schema import Schedule


def factor(kind: Schedule, step: int, *, warmup: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in step 1 .. `steps`: up a line for `warmup` steps, then down."""
    done = step - 1
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    shapes = {
        Schedule.cosine: 0.5 * (1 + math.cos(math.pi * progress)),
        Schedule.linear: 1 - progress,
        Schedule.constant: 1.0,
    }
    return shapes[kind]
