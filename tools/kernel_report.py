"""Registers, shared memory, stack and spills of every kernel, read from its cubins.

    python tools/kernel_report.py [STEM ...] [--arch SM]

Needs NVRTC, but no GPU. A line for each kernel and entry of `VARIANTS`, a column for each SM. The
stack of a thread holds what found no register: spills, and arrays whose index is known only at run
time. A kernel file that needs some says so in its header, `// Stack: N bytes, why`; where a kernel
uses more than that, the exit code is 1. A dash stands where an SM has no such kernel.
"""

import argparse
import dataclasses
import io
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda.core import Program  # here, because threads must not import it side by side

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pykv import cuda

# The SMs that each line of NVRTC answers for: the oldest it targets, and every GPU we name.
ARCHS = {
    "12": ["sm_52", "sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_90"],
    "13": ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"],
}

# Attributes in section .nv.info of a cubin, by cuobjdump's names: a symbol and its value.
MIN_STACK_SIZE = 0x12  # stack of the kernel and of all that it calls
REGCOUNT = 0x2F


class Usage(NamedTuple):
    """What a kernel takes: registers and stack of a thread, static shared memory of a block, and
    the bytes that its code moves to and from the stack for want of registers."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    def __str__(self):
        return re.sub("(/0)+$", "", "/".join(map(str, self)))


def archs():
    """The SMs that the loaded NVRTC answers for."""
    return ARCHS[cuda.nvrtc_version().split(".")[0]]


def measure(stem, arch, defines):
    """The `Usage` of every kernel in one cubin, by name."""
    sizes, attributes = read_cubin(bytes(cuda.compile(stem, arch, **defines).code))
    # Functions inside a kernel, such as the slow path of a division, have a stack and no registers.
    kernels = [name for kind, name in attributes if kind == REGCOUNT]
    stacks = {name: attributes[MIN_STACK_SIZE, name] for name in kernels}
    # Spilled registers lie on the stack, and only ptxas's log tells them from arrays there.
    spills = read_spills(ptxas_log(stem, arch, defines)) if any(stacks.values()) else {}
    usages = {}
    for name, stack in stacks.items():
        shared = sizes.get(f".nv.shared.{name}", 0)
        if shared and int(arch[3:]) >= 90:
            shared -= 1024  # the system keeps these bytes for itself in every block
        registers = attributes[REGCOUNT, name]
        usages[name] = Usage(registers, shared, stack, *spills.get(name, (0, 0)))
    return usages


def read_cubin(elf):
    """The size of every section by name, and the value of every (attribute, kernel)."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]

    def text(section, offset):
        start = section[4] + offset
        return elf[start : elf.index(b"\0", start)].decode()

    sections = {text(headers[names], header[0]): header for header in headers}
    symbols = sections[".symtab"]
    attributes = {}
    offset, length = sections[".nv.info"][4:6]
    end = offset + length
    while offset < end:
        form, attribute, value = struct.unpack_from("<BBH", elf, offset)
        offset += 4
        if form == 4:  # `value` bytes follow; the other forms end here
            if attribute in (MIN_STACK_SIZE, REGCOUNT):
                symbol, number = struct.unpack_from("<II", elf, offset)
                (name,) = struct.unpack_from("<I", elf, symbols[4] + 24 * symbol)
                attributes[attribute, text(headers[symbols[6]], name)] = number
            offset += value
    return {name: header[5] for name, header in sections.items()}, attributes


def ptxas_log(stem, arch, defines):
    """What ptxas -v says of one variant."""
    options = dataclasses.replace(cuda.compiler._key(stem, arch, defines)[1], ptxas_options=["-v"])
    log = io.StringIO()
    Program(cuda.source(stem), "c++", options).compile("cubin", logs=log)
    return log.getvalue()


def read_spills(log):
    """Bytes of spill stores and spill loads in the code of each kernel."""
    lines = re.findall(
        r"Function properties for (\S+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    return {name: (int(stores), int(loads)) for name, stores, loads in lines}


def declared_stack(stem):
    """Bytes of stack that the header of a kernel file allows each of its kernels."""
    text = (cuda.KERNELS / f"{stem}.cu").read_text(encoding="utf-8")
    found = re.search(r"^// Stack: +(\d+) bytes, \S", text, re.MULTILINE)
    return int(found[1]) if found else 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stems", nargs="*", metavar="STEM", help="kernel files; all without one")
    parser.add_argument(
        "--arch", action="append", choices=archs(), help="this SM; may be repeated; all without one"
    )
    given = parser.parse_args(argv)
    stems, sms = given.stems, given.arch or archs()
    if unknown := set(stems) - set(cuda.stems()):
        sys.exit(f"{', '.join(sorted(unknown))}: no such kernel file, expected {cuda.stems()}")
    jobs = [
        (stem, arch, defines)
        for stem, defines in cuda.variants()
        for arch in sms
        if not stems or stem in stems
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = list(pool.map(lambda job: measure(*job), jobs))

    rows, faults = {}, []
    for (stem, arch, defines), usages in zip(jobs, measured, strict=True):
        macros = "".join(
            f" {name}={value}" for name, value in defines.items() if not callable(value)
        )
        for kernel, usage in usages.items():
            row = f"{stem}.cu {kernel}{macros}"
            rows.setdefault(row, {})[arch] = str(usage)
            if usage.stack_bytes > declared_stack(stem):
                faults.append(
                    f"{row} on {arch} has {usage.stack_bytes} bytes of stack and spills "
                    f"{usage.spill_store_bytes}; the header declares {declared_stack(stem)}"
                )

    print(
        f"NVRTC {cuda.nvrtc_version()}: registers/shared/stack/spill stores/spill loads, all but "
        "the first in bytes, without the zeros at the end"
    )
    cells = [cell for row in rows.values() for cell in row.values()]
    width = max(map(len, [*sms, *cells])) + 1
    for row, usages in {"kernel": {arch: arch for arch in sms}, **rows}.items():
        print(*(f"{usages.get(arch, '-'):{width}}" for arch in sms), row, sep="")
    print(f"{len(cells)} kernels, {len(faults)} with a stack that no header declares")
    print("\n".join(faults), end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
