"""Generated pictures and dialogues for the demo model's training and evaluation.

`sample_at(split, index)` is the data set; `build_tokenizer()` the tokenizer; `task_questions` the evaluation.
Turn.pictures says how many pictures come with a question: all come with the first, but for samples whose second
picture comes later, after which the questions are about that one.
"""

from __future__ import annotations

from demo_data.dialogues import TASKS
from demo_data.evaluation import correct, export_task_set, task_questions
from demo_data.questions import Turn
from demo_data.samples import SPLITS, Sample, Split, sample, sample_at
from demo_data.scenes import CENTRE_CLASSES, COLOUR_CLASSES, DENSE_CLASSES, GRID, IMAGE_SIZE, PATCH, SHAPE_CLASSES
from demo_data.showcase import draw_samples
from demo_data.tokenizer import build_tokenizer

__all__ = [
    "CENTRE_CLASSES",
    "COLOUR_CLASSES",
    "DENSE_CLASSES",
    "GRID",
    "IMAGE_SIZE",
    "PATCH",
    "SHAPE_CLASSES",
    "SPLITS",
    "TASKS",
    "Sample",
    "Split",
    "Turn",
    "build_tokenizer",
    "correct",
    "draw_samples",
    "export_task_set",
    "sample",
    "sample_at",
    "task_questions",
]
