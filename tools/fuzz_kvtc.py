"""Read damaged KVTC streams; see fuzz.py.

    python tools/fuzz_kvtc.py [COUNT] [--seed N] [--keep FOLDER]

Bytes, numbers, lengths and order of v0 streams change. What is refused must leave the blocks as
they were; what passes must have the headers of its config. Exits with 1 if there is a fault; --keep
writes the inputs that are faults.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import fuzz  # noqa: I001 - first, as it sets the number of threads

import numpy as np

from pykv.errors import FormatError
from pykv.kvtc import stream_v0, v0
from pykv.kvtc.v0 import KvtcConfig, Range

N, F = 3, 24
PLANS = (
    [Range(0, 20, "intx", 4)],
    [Range(9, 20, "intx", 2), Range(0, 1), Range(1, 9, "intx", 8)],
    [*(Range(i, i + 1, "intx", 1) for i in range(8)), Range(8, 20, "fp8", 8)],
)


def make_config(plan: list[Range]) -> KvtcConfig:
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.standard_normal((F, 20)))[0]
    return KvtcConfig(np.zeros(F, np.float32), basis.astype(np.float32), plan)


def make_stream(config: KvtcConfig) -> bytes:
    blocks = np.random.default_rng(8).standard_normal((N, F)).astype(np.float16)
    return bytes(v0.compress(blocks, config).tobytes())


def attempt(data: bytes, config: KvtcConfig) -> None:
    """Parse without a plan, then decompress by one."""
    try:
        for num_ranges in (1, 3, 9):
            stream_v0.parse(data, num_ranges, N, 20)
    except FormatError as error:
        assert str(error).isprintable()
    blocks = np.full((N, F), 7, np.float16)
    try:
        v0.decompress(np.frombuffer(data, np.uint8), config, blocks)
    except FormatError:
        assert (blocks == 7).all(), "a stream that is refused has changed the blocks"
        raise
    right = make_stream(config)
    for at in stream_v0.offsets(tuple(config.ranges), N)[:-1]:
        assert data[at : at + 40] == right[at : at + 40], "another header passes"


def main() -> int:
    given = fuzz.arguments("Read damaged KVTC streams.", 150)
    total = fuzz.Report()
    for n, plan in enumerate(PLANS):
        config = make_config(plan)
        data = make_stream(config)
        attempt(data, config)  # the undamaged input must pass
        count = given.count * (n + 1) // len(PLANS) - given.count * n // len(PLANS)
        mutants = fuzz.mutants(data, count, given.seed)
        report = fuzz.run(lambda data, config=config: attempt(data, config), mutants)
        total.outcomes += report.outcomes
        total.faults += report.faults
    return total.finish(given.keep, ".kvtc")


if __name__ == "__main__":
    sys.exit(main())
