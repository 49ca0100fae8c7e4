"""`tinychat doctor --kernels`: every CUDA op on this machine's GPU, on numbers whose results are known."""

from __future__ import annotations

import math
from typing import Any

Json = dict[str, Any]


def report() -> Json:
    """{device, reason, results}; without such a GPU, the reason and what compiles. Takes a minute."""
    import torch

    from tinychat_kernels.cuda_compilers import compilers_here
    from tinychat_kernels.cuda_gpu import gpu
    from tinychat_kernels.errors import KernelError

    try:
        device = gpu(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    except KernelError as error:
        return {"device": None, "reason": f"{error}; {compilers_here()}", "results": []}
    name = f"{torch.cuda.get_device_name(device.index)}, {device.target.arch}, {device.made_by}"
    return {"device": name, "reason": "every op was run on it", "results": _results(device)}


def _results(device: Any) -> list[Json]:
    import torch

    from tinychat_kernels import cuda, cuda_golden

    place = torch.device("cuda", device.index)
    found: list[Json] = []
    for dtype in cuda.DTYPES:
        if cuda.obstacle(dtype, place) is not None:
            continue
        where = cuda_golden.Place(device, place, dtype, device.processors)
        found += [_result(one) for one in cuda_golden.results(where)]
    return found


def _result(found: Any) -> Json:
    return {
        "op": found.op,
        "dtype": str(found.dtype).removeprefix("torch."),
        "right": found.right,
        "worst": found.worst if math.isfinite(found.worst) else None,
        "bound": found.bound,
        "case": found.case,
        "error": found.error or None,
    }


def lines(found: Json) -> list[str]:
    """The report as lines of text."""
    if found["device"] is None:
        return [f"there is no GPU that the CUDA kernels run on: {found['reason']}"]
    rows = [_line(one) for one in found["results"]]
    wrong = sum(not one["right"] for one in found["results"])
    verdict = "all are right" if not wrong else f"{wrong} of {len(rows)} are WRONG: models run on plain torch there"
    return [found["device"], *rows, verdict]


def _line(one: Json) -> str:
    head = f"{one['op']} {one['dtype']}: {'right' if one['right'] else 'WRONG'}"
    if one["error"]:
        return f"{head}, {one['error']}"
    worst = "not a number" if one["worst"] is None else f"{one['worst']:.1e}"
    return f"{head}, off by {worst} at most ({one['case']}), {one['bound']:.1e} is allowed"
