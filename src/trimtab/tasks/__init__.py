"""One file a task: head, loss, prediction, metrics. `TASKS` is the registry."""

from trimtab.tasks import (  # noqa: F401
    captioning,
    gqa,
    grounding,
    matching,
    pretraining,
    ranking,
    reranking,
    retrieval,
    vqa,
)
from trimtab.tasks.base import TASKS, Task, TaskModel

__all__ = ["TASKS", "Task", "TaskModel"]
