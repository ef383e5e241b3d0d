"""Load damaged sessions into LLMs that hold another conversation; see fuzz.py.

    python tools/fuzz_sessions.py [COUNT] [--seed N] [--keep FOLDER]

Sessions are plain, of int8, and coded by pykv.kvtc. A third of the inputs are files whose bytes,
lengths or ends are damaged; a third have another header; the others have checksums that hold, but
arrays of another content, shape, name or file. What is refused must leave the cache as it was; what
passes must have a checksum that holds, leave the other conversation as it was, and be gone on with.
Exits with 1 if there is a fault; --keep writes the inputs that are faults.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import fuzz  # noqa: I001 - first, as it sets the number of threads

import numpy as np

from pykv import tensor_files
from pykv.errors import PykvError
from pykv.kvtc import Codec
from pykv.llm import LLM, SamplingParams
from tests.kvtc import made
from tests.llm import tiny
from tools.fuzz_page_files import digest_of, other_headers

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
TALK = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "in the time"}]
BEFORE = list(range(3, 23))  # tokens that an LLM holds before it loads a session
NEXT = SamplingParams(max_tokens=1, ignore_eos=True)
DTYPES = {"F16": np.float16, "I8": np.int8, "U8": np.uint8, "I32": np.int32}
CRC = slice(12, 16)  # its place in a stream of pykv.kvtc

Parts = tuple[dict[str, str], dict[str, Any]]  # facts and arrays of a file


class Target(NamedTuple):
    """An LLM, the codec that it is given with each file, and what its cache holds."""

    llm: LLM
    codec: Codec
    state: list[Any]


def open_llm(model: Path, kv_dtype: str) -> LLM:
    llm = LLM(model, device="cpu", kv_dtype=kv_dtype, page_size=4, pool_tokens=120)
    llm.file.metadata["tokenizer.chat_template"] = TEMPLATE
    llm.generate([BEFORE], NEXT)
    return llm


def state_of(llm: LLM) -> list[Any]:
    """All that a file which is refused must not change."""
    cache, manager = llm.cache, llm.cache.manager
    counts = manager.num_pages, manager.num_free, manager.num_cached
    arrays = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [*counts, *(None if x is None else x.tobytes() for x in arrays), held_of(llm)]


def held_of(llm: LLM) -> list[bytes]:
    """The pages of what an LLM held before."""
    cache = llm.cache
    with llm._scheduler.pages.known(BEFORE) as pages:
        return [x[:, pages].tobytes() for x in (cache.k, cache.v)]


def save(path: Path, llm: LLM, codec: Codec | None) -> bytes:
    ids = llm.chat_ids(TALK, template_variables={"add_generation_prompt": False})
    llm.generate([ids], NEXT)
    kept = llm.save(path, TALK, codec=codec)
    assert kept >= 16, f"a session keeps {kept} tokens, too few to be damaged"
    return path.read_bytes()


def attempt(data: bytes, path: Path, targets: list[Target]) -> None:
    """Load into each LLM; if none takes the file, the last refusal stands."""
    path.write_bytes(data)
    refusal = None
    for llm, codec, state in targets:
        try:
            session = llm.load(path, codec=codec)
        except PykvError as error:
            refusal = error
            assert state_of(llm) == state, "a file that is refused has changed the cache"
            continue
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        right = digest_of(header, data[begin:])
        assert header["__metadata__"]["sha256"] == right, "a checksum that does not hold passes"
        assert held_of(llm) == state[-1], "a session has changed the pages of another"
        llm.generate([session.token_ids[: llm.context - 2] + [5]], NEXT)
        return
    assert refusal is not None
    raise refusal


# --- Files ----------------------------------------------------------------------------------------


def parts_of(data: bytes) -> Parts:
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:begin])
    facts, arrays = table.pop("__metadata__"), {}
    for name, entry in table.items():
        first, end = entry["data_offsets"]
        x = np.frombuffer(data[begin + first : begin + end], DTYPES[entry["dtype"]])
        arrays[name] = x.reshape(entry["shape"])
    return facts, arrays


def lies(files: list[bytes], count: int, seed: int, path: Path) -> Iterator[fuzz.Mutant]:
    """Inputs whose checksums hold: parts of the first file, changed, or replaced by another's."""
    for n in range(count):
        rng = random.Random(seed + n)
        facts, arrays = parts_of(files[0])
        other_facts, other = parts_of(rng.choice(files[1:]))
        del facts["sha256"], other_facts["sha256"]
        name = rng.choice([*arrays])
        change = rng.choice(("content", "shape", "name", "array", "facts", "without"))
        match change:
            case "content":
                arrays[name] = _changed(arrays[name], name, rng)
            case "shape":
                arrays[name] = rng.choice([arrays[name][:-1], arrays[name][None], arrays[name].T])
            case "name":
                second = rng.choice([*arrays, "more"])
                arrays[name], arrays[second] = arrays.get(second, arrays[name]), arrays[name]
            case "array":
                taken = rng.choice([*other])
                arrays[taken] = other[taken]
            case "facts":
                key = rng.choice([*other_facts, "pages"])
                number = rng.choice((0, 1, int(facts["pages"]) - 1, int(facts["pages"]) + 1, 9**9))
                facts[key] = str(number) if key == "pages" else other_facts[key]
            case "without":
                del arrays[name]
        tensor_files.write(path, facts, {key: np.ascontiguousarray(x) for key, x in arrays.items()})
        yield f"{n} of seed {seed}: {change} of {name}", path.read_bytes()


def _changed(x: Any, name: str, rng: random.Random) -> Any:
    """An array with other bytes; of a stream, half of the time, with a CRC-32 that holds."""
    data = bytearray(x.tobytes())
    for _ in range(rng.randrange(1, 9)):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if name == "stream" and rng.randrange(2):
        data[CRC] = bytes(4)
        data[CRC] = zlib.crc32(data).to_bytes(4, "little")
    return np.frombuffer(bytes(data), x.dtype).reshape(x.shape)


def main() -> int:
    given = fuzz.arguments("Load damaged sessions.", 150)
    warnings.simplefilter("ignore")  # wild values overflow
    with tempfile.TemporaryDirectory() as name:
        model, foreign, path = (Path(name, x) for x in ("a.gguf", "b.gguf", "mutant"))
        tiny.write(model, "llama")
        tiny.write(foreign, "llama", edit=lambda name, x: x * np.float32(1.01))
        codec = Codec(made.artefact_of(LLM(model, device="cpu")), 2)
        cases = [(kv_dtype, by) for by in (None, codec) for kv_dtype in ("fp16", "int8")]
        files = [save(path, open_llm(model, kv_dtype), by) for kv_dtype, by in cases]
        others = [save(path, open_llm(foreign, "fp16"), None)]
        targets = [
            Target(llm, codec, state_of(llm))
            for llm in (open_llm(model, x) for x in ("fp16", "int8"))
        ]
        load = partial(attempt, path=path, targets=targets)
        report = fuzz.run(load, [("as it was", data) for data in files])
        assert report.outcomes["accepted"] == len(files), report
        report = fuzz.run(load, [("of another model", data) for data in others])
        assert report.outcomes["refused"] == len(others), report
        inputs: list[fuzz.Mutant] = []
        for n, data in enumerate(files):
            count = given.count * (n + 1) // len(files) - given.count * n // len(files)
            inputs += fuzz.mutants(data, count // 3, given.seed)
            inputs += other_headers(data, count // 3, given.seed)
            rest = [data, *(x for x in files + others if x is not data)]
            inputs += lies(rest, count - 2 * (count // 3), given.seed, path)
        report = fuzz.run(load, inputs)
    return report.finish(given.keep, ".session")


if __name__ == "__main__":
    sys.exit(main())
