"""Faults of a launch that goes on, and of phases that draw, which the machine must see."""

import shutil
import time
from functools import partialmethod

import numpy as np
import pytest

from pykv import cuda
from pykv.cuda import KERNELS
from pykv.errors import DeviceError
from pykv.ops.phase_program import PhaseProgram
from pykv.ops.resident_program import ResidentProgram
from pykv.programs.host_rings import SLOTS, Rings
from pykv.programs.resident_commands import PAGES
from tests.ops.test_resident_program import LENGTHS, all_of, chain, start_again
from tests.programs.test_draw_phases import ROWS, draw_of
from tests.programs.test_resident_commands import hold, lack_pages
from tests.simt import machine

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


ALL = "__all_sync(FULL_MASK, !has_word || (u32)(word >> 32) == number)"
ANY = "__any_sync(FULL_MASK, has_word && (u32)(word >> 32) == number)"
# A file, what stands in it, and what stands there in a kernel with a fault.
FAULTS_OF_STARTS = {
    "an old result taken for the new sequence's": (
        "resident_program.cu",
        ("talk.epochs[row] = epoch;", ""),
    ),
    "a sequence that begins while blocks compute": (
        "resident_program.cu",
        ("if (kind >= PARAMS && !is_between) break;", ""),
    ),
    "a stop of the last sequence ends the new one": (
        "resident_program.cu",
        ("stopped &= ~(1u << row);", ""),
    ),
    "a command of which not all words have come": ("host_ring.cuh", (ALL, ANY)),
}
SEEN = AssertionError, DeviceError, machine.SimtError


def post_slowly(rings, number, payload, pause=0.005):
    """A command of which the kernel sees parts first."""
    for i, word in enumerate([*payload, *[0] * (8 - len(payload))]):
        time.sleep(pause)
        rings._words[32 + number % SLOTS * 8 + i] = number << 32 | word


@pytest.mark.parametrize("device", ["simt"], indirect=True)
@pytest.mark.parametrize("name", FAULTS_OF_STARTS)
def test_planted_faults_of_starts_are_caught(device, kernel_folder, monkeypatch, rng, name):
    file, fault = FAULTS_OF_STARTS[name]
    plant(kernel_folder, monkeypatch, file, [fault])
    with pytest.raises(SEEN):
        for pause in (0.005, 0.02, 0.08, 0.3):  # a token takes longer on a busy machine
            if file == "host_ring.cuh":
                monkeypatch.setattr(Rings, "post", partialmethod(post_slowly, pause=pause))
            start_again(chain(device, rng, LENGTHS))


def tell_late(program, command, tell=ResidentProgram._tell):
    """A sequence first, and its pages some tokens later."""
    if command[0] == PAGES:
        program.late = command
        return True
    while program._receive():
        pass
    told, kernel = tell(program, command), program._kernel
    while not kernel.has_ended() and kernel.rings.result(program._number + 2) is None:
        time.sleep(0.01)
    tell(program, program.late)
    return told


@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_a_sequence_ahead_of_its_data_is_caught(device, monkeypatch, hopper, rng):
    """The words that it starts with written after its number."""
    monkeypatch.setattr(ResidentProgram, "_tell", tell_late)
    made = chain(device, rng, [5, 0])
    made.inputs.page_table[1] = -1
    with pytest.raises(AssertionError):
        lack_pages(made)


@pytest.mark.sweep
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_words_of_commands_that_come_one_by_one(device, monkeypatch, hopper, rng):
    monkeypatch.setattr(Rings, "post", post_slowly)
    start_again(chain(device, rng, LENGTHS))


@pytest.mark.sweep
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_params_that_blocks_read_meanwhile_are_caught(device, kernel_folder, monkeypatch):
    fault = "if (kind >= PARAMS && !is_between)", "if (kind >= START && !is_between)"
    plant(kernel_folder, monkeypatch, "resident_program.cu", [fault])
    with pytest.raises(machine.SimtError, match=r"(reads|writes) byte \d+ of .*params"):
        for seed in range(4):
            hold(device, seed, 2, 7)


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
