"""One file a task: head, loss, prediction, metrics. `TASKS` is the registry."""

from trimtab.tasks import (  # noqa: F401
    answer,
    box_regression,
    captioning,
    classification,
    entailment,
    gqa,
    grounding,
    matching,
    pairs,
    pretraining,
    ranking,
    reranking,
    retrieval,
    set_grounding,
    video_retrieval,
    vqa,
)
from trimtab.tasks.base import TASKS, Task, TaskModel

__all__ = ["TASKS", "Task", "TaskModel"]
