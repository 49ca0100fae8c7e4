"""The model that ships, loaded and asked as a user does: right answers about its sample pictures."""

from __future__ import annotations

from typing import Any

import torch

from gpu_checks.machine import Machine
from gpu_checks.store import Json

SPREAD = {"llm.model.layers.1": "cpu", "llm.model.layers.2": "disk", "vision_tower": "disk"}


def answers(machine: Machine, spread: bool = False) -> Json:
    """All questions about the samples, by the CUDA kernels; a dry run asks one, in float32 on the CPU.

    With `spread` parts of the model lie in RAM and on disk, and the GPU computes with them all the same.
    """
    try:
        from tinychat.core import Finished, Image, Message, Request, Text
        from tinychat.engine.engine import Engine
        from tinychat.eval.demo import correct
        from tinychat.eval.demo.showcase import QUESTIONS
        from tinychat.load import EMBEDDED, load_folder
        from tinychat.placement import Placement
    except ImportError as error:
        return {"missing": str(error)}
    dtype = torch.float32 if machine.dry else torch.float16
    if spread:
        placement = Placement(dtype, device_map={"": "cpu" if machine.dry else 0, **SPREAD})
    else:
        placement = Placement(dtype, machine.device, dequantize=machine.dry)
    ready = load_folder(EMBEDDED, placement)
    engine, asked = Engine(ready.model, ready.processor), QUESTIONS[:1] if machine.dry else QUESTIONS
    for one in asked:
        pictures = [Image(path=str(EMBEDDED.parent / "samples" / name)) for name in one.pictures]
        *_, end = engine.run([Request("r", (Message("user", (*pictures, Text(one.question))),))])
        said: Any = end.text if isinstance(end, Finished) else end
        if not isinstance(end, Finished) or not correct(end.text, one.answer, one.task):
            return {"right": False, "said": f"{one.question!r} about {one.pictures} is answered by {said!r}"}
    if not machine.dry and ready.model.can_draw is spread:
        how = "ran its decoder as a whole, parts of which lie elsewhere" if spread else "did not run its decoder"
        return {"right": False, "said": f"the CUDA kernels {how}"}
    return {"right": True, "said": f"{len(asked)} questions"}
