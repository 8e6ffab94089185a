"""One file a task: head, loss, prediction, metrics. `TASKS` is the registry."""

from trimtab.tasks import answer, captioning, grounding, matching, pretraining, retrieval, vqa  # noqa: F401
from trimtab.tasks.base import TASKS, Task, TaskModel

__all__ = ["TASKS", "Task", "TaskModel"]
