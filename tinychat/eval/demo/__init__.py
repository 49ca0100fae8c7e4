"""Generated pictures and dialogues for the demo model's training and evaluation.

`sample_at(split, index)` is the data set, `task_questions` the evaluation.
Turn.pictures says how many pictures come with a question: all come with the first, but for samples whose second
picture comes later, after which the questions are about that one.
"""

from __future__ import annotations

from tinychat.eval.demo.dense import CLASSES
from tinychat.eval.demo.dialogues import TASKS
from tinychat.eval.demo.evaluation import correct, export_task_set, task_questions
from tinychat.eval.demo.questions import Turn
from tinychat.eval.demo.samples import SPLITS, Sample, Split, sample, sample_at
from tinychat.eval.demo.scenes import GRID, IMAGE_SIZE, PATCH
from tinychat.eval.demo.showcase import draw_samples

__all__ = [
    "CLASSES",
    "GRID",
    "IMAGE_SIZE",
    "PATCH",
    "SPLITS",
    "TASKS",
    "Sample",
    "Split",
    "Turn",
    "correct",
    "draw_samples",
    "export_task_set",
    "sample",
    "sample_at",
    "task_questions",
]
