"""Faults of a launch that goes on, and of phases that draw, which the machine must see."""

import shutil

import numpy as np
import pytest

from pykv import cuda
from pykv.cuda import KERNELS
from pykv.ops.phase_program import PhaseProgram
from tests.ops.test_resident_program import all_of, chain
from tests.simt import machine
from tests.test_draw_phases import ROWS, draw_of

pytestmark = pytest.mark.simt

ARRIVE = "        __syncthreads();\n        grid_arrive(counters);\n"
BEGIN, END = "        if (talks) advance", "        grid_wait(counters, ++over);\n"
# What stands in the kernel, and what stands there in a kernel with a fault.
FAULTS = {
    "the first block does not wait for what the others drew": [
        (END + BEGIN, "        ++over;\n" + BEGIN)
    ],
    "blocks do not wait for the next token's inputs": [
        (END + "        goes_on", "        ++over;\n        goes_on")
    ],
    "the signal before its data": [
        (ARRIVE + END + "        goes_on", END + "        goes_on"),
        (END + BEGIN, END + ARRIVE + BEGIN),
    ],
}


def plant(folder, monkeypatch, file, faults):
    """Kernels with what stands in a file replaced."""
    for path in KERNELS.glob("*.cu"):
        shutil.copy(path, folder)
    text = (KERNELS / file).read_text()
    for right, wrong in faults:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (folder / file).write_text(text)
    monkeypatch.setattr(machine, "ARCH", "sm_90")
    monkeypatch.setattr(cuda.launch, "_kernel", cuda.launch._kernel.__wrapped__)  # keeps no fault


@pytest.mark.parametrize("device", ["simt"], indirect=True)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(device, kernel_folder, monkeypatch, rng, name):
    plant(kernel_folder, monkeypatch, "resident_program.cu", FAULTS[name])
    made = chain(device, rng, [1, 1])
    seen = r"(reads|writes) byte \d+ of |waits in load_acquire .* for a change that nobody"
    with pytest.raises(machine.SimtError, match=seen):
        for seed in range(8):
            monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
            made.program.launch(3, [10**6] * 2, [[], []])
            all_of(made.program)


LAST = "atomic_inc_acq_rel(counter, tiles - 1) == (u32)tiles - 1"
FAULTS_OF_DRAWS = {
    "the last block of a row sees too little": [(LAST, LAST.replace("_inc_acq_rel", "Inc"))],
    "a block signals before its threads are done": [
        (
            "    __syncthreads();\n    if (threadIdx.x == 0) {\n        shared.is_last",
            "    if (threadIdx.x == 0) {\n        shared.is_last",
        )
    ],
    "each block takes itself for the last": [(LAST, LAST + " || true")],
}


@pytest.mark.parametrize("device", ["simt"], indirect=True)
@pytest.mark.parametrize("name", FAULTS_OF_DRAWS)
def test_planted_faults_of_draws_are_caught(device, kernel_folder, monkeypatch, rng, name):
    plant(kernel_folder, monkeypatch, "phase_draw.cuh", FAULTS_OF_DRAWS[name])
    logits = device.asarray(rng.standard_normal((1, 300)).astype(np.float32))
    draw = draw_of(device.asarray, logits, ROWS[5:6], np.full(1, 3, np.int32))
    program = PhaseProgram([draw], blocks=4)
    with pytest.raises(machine.SimtError, match=r"(reads|writes|changes) byte \d+ of "):
        for seed in range(8):
            monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
            program()
