"""Kernels that start before the one ahead has ended: planted faults are caught."""

import numpy as np
import pytest

from tests.simt import cupy as simt
from tests.simt import machine
from tests.simt.test_machine import add_kernel, both

pytestmark = pytest.mark.simt

WAIT = "await_previous();"
FAULTS = {  # a body with a fault and without, and its error
    "a write ahead of the wait": (
        f"«|{WAIT}» out[t] = in[t]; «{WAIT}|»",
        r"writes byte \d+ of out before await_previous at faulty.cu:\d+",
    ),
    "a read of what is written": (
        f"«|{WAIT}» const int x = out[t]; «{WAIT}|» out[t] = in[t] + 1 + x;",
        r"reads byte \d+ of out before await_previous at faulty.cu:\d+",
    ),
    "a warp that does not wait": (
        f"«|{WAIT}» if (t >= 128) return; «{WAIT}|» out[t] = in[t];",
        r"thread \(\d+, 0, 0\) ends without await_previous",
    ),
    "constants are read before it": (
        f"const int x = in[t]; «|{WAIT}» out[t] = x; «{WAIT}|»",
        "writes .* before await_previous",
    ),
}


def run(folder, body, early):
    head = 'extern "C" __global__ void faulty(int* out, const int* in)'
    text = f"{head} {{ const int t = threadIdx.x; {body} }}"
    out, given = simt.asarray(np.full(160, -1, np.int32)), simt.asarray(np.arange(160, dtype="i4"))
    machine.launch(add_kernel(folder, text), 1, 160, out, given, early=early)
    return out.get()[:128]


@pytest.mark.parametrize("body, error", FAULTS.values(), ids=FAULTS)
def test_faults_of_early_kernels(kernel_folder, monkeypatch, body, error):
    wrong, right = both(body)
    monkeypatch.setattr(machine, "ARCH", "sm_90")
    with pytest.raises(machine.SimtError, match=error):
        run(kernel_folder, wrong, True)
    assert (run(kernel_folder, right, True) == np.arange(128)).all()
    assert (run(kernel_folder, wrong, False) == np.arange(128)).all()
    monkeypatch.setattr(machine, "ARCH", "sm_80")  # where no kernel starts early
    assert (run(kernel_folder, wrong, True) == np.arange(128)).all()
