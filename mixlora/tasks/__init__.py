"""Tasks: one YAML each. From a data set's rows to examples, prompts, and the mixture's draws. Knows no model.

template       "{question}" over a row's columns
table          rows with their origin
sources        a folder, the embedded sample; the rest in hub and own (a user's files)
parse          rows to examples, strictly
data           the tasks of a mixture: rows to train on, to tune on, to test on
overlap        rows that are trained on and tested on
prompts, chat  examples to token ids, the same for training and scoring
mixture        which row of which task each draw takes
collate        token ids to tensors
"""

from mixlora.tasks.data import TaskData, load, load_task

__all__ = ["TaskData", "load", "load_task"]
