"""The ring of a kernel that stays on the GPU: from a command of the host to its result."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pykv.bench import Work
from pykv.ops.mailbox import Mailbox

CASES = [dict(n=n, trips=1000) for n in (0, 2048)]
QUICK = [dict(n=n, trips=20) for n in (0, 2048)]


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    """Round trips of jobs of n elements, one after another; of a call the median trip in seconds.
    A host has no kernel to talk to."""
    if xp is np:
        return None
    x = xp.zeros((1, 2048), np.float32)
    facts: dict[str, Any] = {}

    def run() -> float:
        seconds = []
        with Mailbox(x, silence=60.0) as box:
            for _ in range(case["trips"] + 1):
                begin = time.perf_counter()
                box.wait(box.submit(0, 1.0, 1.0, n=case["n"]))
                seconds.append(time.perf_counter() - begin)
        del seconds[0]  # the first job includes the launch
        facts.update(least_us=1e6 * min(seconds), p95_us=1e6 * float(np.quantile(seconds, 0.95)))
        return float(np.median(seconds))

    def check() -> bool:
        x.fill(0)
        run()
        values = x.get()[0]
        return bool(
            (values[: case["n"]] == case["trips"] + 1).all() and not values[case["n"] :].any()
        )

    return Work(run, check, bytes=8 * case["n"], clocked=True, facts=facts)
