"""Faults of a launch that goes on, which the machine must see."""

import shutil

import pytest

from pykv import cuda
from pykv.cuda import KERNELS
from tests.ops.test_resident_program import all_of, chain
from tests.simt import machine

pytestmark = pytest.mark.simt

ARRIVE = "        __syncthreads();\n        grid_arrive(counters);\n"
BEGIN, END = "        if (talks) {\n            advance", "        grid_wait(counters, ++over);\n"
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


@pytest.mark.parametrize("device", ["simt"], indirect=True)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(device, kernel_folder, monkeypatch, rng, name):
    for file in KERNELS.glob("*.cu"):
        shutil.copy(file, kernel_folder)
    text = (KERNELS / "resident_program.cu").read_text()
    for right, wrong in FAULTS[name]:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (kernel_folder / "resident_program.cu").write_text(text)
    monkeypatch.setattr(machine, "ARCH", "sm_90")
    monkeypatch.setattr(cuda.launch, "_kernel", cuda.launch._kernel.__wrapped__)  # keeps no fault
    made = chain(device, rng, [1, 1])
    with pytest.raises(machine.SimtError, match=r"(reads|writes) byte \d+ of "):
        for seed in range(8):
            monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
            made.program.launch(3, [10**6] * 2, [[], []])
            all_of(made.program)
