"""Open damaged model files, and generate from those that open; see fuzz.py.

    python tools/fuzz_gguf.py [COUNT] [--seed N] [--keep FOLDER]

Half of the inputs are tiny files whose bytes, lengths or ends are damaged, the others well-formed
files in which a key has another type or a wild value, or a tensor another type, name or size. Exits
with 1 if there is a fault; --keep writes the inputs that are faults.
"""

from __future__ import annotations

import itertools
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import fuzz  # noqa: I001 - first, as it sets the number of threads

import gguf as library
import jinja2  # noqa: F401 - here, not in each attempt
import numpy as np
import tokenizers  # noqa: F401

from pykv.llm import LLM, SamplingParams, gguf
from tests.llm import tiny

VALUES: list[Any] = [
    *(0, 1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1, -(2**31)),
    *(0.0, -0.0, 1e-30, 1e38, -1.0, float("inf"), float("nan"), True, False),
    *("", "x", "yarn", "longrope", "\x1b[2J\nno", "\u00e9" * 1000),
    *([], [0], [1] * 5, [2**31] * 2, [1.5], ["a", "b"], [True, False], [-1] * 300),
]
MORE_KEYS = (  # keys of an architecture that the file lacks
    *("vocab_size", "attention.scale", "attention.causal", "rope.scaling.type", "pooling_type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.dimension_count", "attention.key_length"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    *("final_logit_softcapping", "logit_scale", "embedding_scale", "residual_scale", "unheard_of"),
    *("expert_count", "attention.value_length"),
)
KINDS = ("F32", "F16", "BF16", "Q8_0", "I8", "I64", "F64", "Q8_1", "MXFP4")

Keys = dict[str, Any]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # type, shape with rows first, contents


def attempt(data: bytes, path: Path) -> None:
    """What a user does with a file: look at it, open it, and generate."""
    path.write_bytes(data)
    gguf.describe(gguf.read(path))
    llm = LLM(path, device="cpu")
    llm.generate([[1, 2, 3], "the"], SamplingParams(max_tokens=2))


def changed_files(paths: list[Path], count: int, seed: int) -> Iterator[fuzz.Mutant]:
    """Well-formed files with one key or one tensor changed."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        file = gguf.read(paths[n % len(paths)])
        keys = dict(file.metadata)
        tensors = {t.name: (t.kind, t.shape, t.blocks.tobytes()) for t in file.tensors.values()}
        change = _change_key if rng.random() < 0.6 else _change_tensor
        what = change(keys, tensors, rng)
        yield f"{n} of seed {seed}: {what}", packed(keys, tensors)


def _change_key(keys: Keys, tensors: Tensors, rng: np.random.Generator) -> str:
    known = [*keys, *(f"{keys['general.architecture']}.{key}" for key in MORE_KEYS)]
    key, value = known[rng.integers(len(known))], VALUES[rng.integers(len(VALUES))]
    if key in keys and rng.random() < 0.1:
        del keys[key]
        return f"without {key}"
    keys[key] = value
    return f"{key} is {value!r:.60}"


def _change_tensor(keys: Keys, tensors: Tensors, rng: np.random.Generator) -> str:
    name = list(tensors)[rng.integers(len(tensors))]
    kind, shape, data = tensors[name]
    match int(rng.integers(5)):
        case 0:
            del tensors[name]
            return f"without {name}"
        case 1:
            other = name + str(rng.choice([".bias", "s", "\x1b[2J"]))
            tensors[other] = tensors.pop(name)
            return f"{name} is called {other!r}"
        case 2:
            kind = str(rng.choice(KINDS))
            elements, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
            shape = (*shape[:-1], -(-shape[-1] // elements) * elements)
            tensors[name] = kind, shape, bytes(int(np.prod(shape)) // elements * size)
            return f"{name} has type {kind}"
        case 3:
            shape = (*shape[:-1], shape[-1] + 8 * int(rng.integers(1, 9)))
            tensors[name] = kind, shape, bytes(4 * int(np.prod(shape)))
            return f"{name} has shape {shape}"
        case _:
            values = np.frombuffer(data, np.float32).copy()
            values[rng.integers(values.size)] = rng.choice([1e6, -1e38, np.inf, np.nan])
            tensors[name] = kind, shape, values.tobytes()
            return f"{name} has a wild value"


def packed(keys: Keys, tensors: Tensors) -> bytes:
    """The bytes of a GGUF file; the writer of the package gguf refuses much of what is wanted."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        code = _code(value)
        head += _text(key) + struct.pack("<I", code) + _value(value, code)
    contents = b""
    for name, (kind, shape, data) in tensors.items():
        code = int(library.GGMLQuantizationType[kind])
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", code, len(contents))
        contents += data + bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + contents


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _code(value: Any) -> int:
    """The GGUF type of a Python value."""
    match value:
        case bool():
            return 7
        case float():
            return 6
        case str():
            return 8
        case list():
            return 9
    return 4 if 0 <= value < 2**32 else 5 if -(2**31) <= value < 0 else 10


def _value(value: Any, code: int) -> bytes:
    if code == 8:
        return _text(value)
    if code != 9:
        return struct.pack({4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}[code], value)
    inner = _code(value[0]) if value else 5
    return struct.pack("<IQ", inner, len(value)) + b"".join(_value(x, inner) for x in value)


def main() -> int:
    given = fuzz.arguments("Open damaged model files.", 300)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{arch}.gguf" for arch in tiny.ARCHITECTURES]
        for path in paths:
            tiny.write(path, path.stem)
            attempt(path.read_bytes(), path)  # the undamaged inputs must pass
        whole = given.count // 2 // len(paths)
        inputs = itertools.chain(
            changed_files(paths, given.count - whole * len(paths), given.seed),
            *(fuzz.mutants(path.read_bytes(), whole, given.seed) for path in paths),
        )
        report = fuzz.run(lambda data: attempt(data, folder / "mutant.gguf"), inputs)
    return report.finish(given.keep, ".gguf")


if __name__ == "__main__":
    sys.exit(main())
