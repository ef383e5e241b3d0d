"""Reading GGUF: what a writer wrote comes back, and bad bytes bring nothing but a PykvError."""

import os
import struct

import gguf as library
import numpy as np
import pytest

from pykv.errors import FormatError, PykvError, UnsupportedError
from pykv.llm import LLM, gguf, weights
from pykv.llm.tokenizer import Tokenizer
from tests.llm import tiny
from tools import fuzz_gguf

TENSORS = {
    "token_embd.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
    "norm.weight": np.linspace(-1, 1, 5, dtype=np.float16),
    "cube": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
}


@pytest.fixture
def sample(tmp_path):
    """A small file with every kind of value, three plain tensors and a quantised one."""
    writer = library.GGUFWriter(tmp_path / "sample.gguf", "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"a.{name}", 100)
    writer.add_int64("a.negative", -(2**62))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.true", True)
    writer.add_string("a.text", "Grüße 👋\n")
    writer.add_array("a.floats", [0.25, -1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["h", "e", "he", "<|im_end|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(3)
    for name, x in TENSORS.items():
        writer.add_tensor(name, x)
    blocks = library.quants.quantize(TENSORS["token_embd.weight"], quant("Q8_0"))
    writer.add_tensor("packed", blocks, raw_dtype=quant("Q8_0"))
    write(writer)
    return tmp_path / "sample.gguf"


def quant(kind):
    return library.GGMLQuantizationType[kind]


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_come_back_as_python_values(sample):
    file = gguf.read(sample)
    assert file.path == sample and file.version == 3
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        assert file.metadata[f"a.{name}"] == 100
    assert file.metadata["a.negative"] == -(2**62)
    assert file.metadata["a.float32"] == 0.5 and file.metadata["a.float64"] == 0.1
    assert file.metadata["a.true"] is True
    assert file.metadata["a.text"] == "Grüße 👋\n"
    assert file.metadata["a.floats"] == [0.25, -1.5]
    assert file.metadata["a.bools"] == [True, False]
    assert file.metadata["tokenizer.ggml.tokens"] == ["h", "e", "he", "<|im_end|>"]


def test_the_library_reads_the_same(sample):
    """The slow reader of the `gguf` package is the judge."""
    want = library.GGUFReader(sample)
    file = gguf.read(sample)
    fields = {k: f.contents() for k, f in want.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    assert list(file.tensors) == [t.name for t in want.tensors]
    for t in want.tensors:
        info = file.tensors[t.name]
        assert info.kind == t.tensor_type.name
        assert info.shape == tuple(reversed(t.shape.tolist()))
        assert info.nbytes == t.n_bytes
        assert info.blocks.tobytes() == t.data.tobytes()


def test_tensors_are_rows_of_blocks(sample):
    file = gguf.read(sample)
    for name, x in TENSORS.items():
        info = file.tensor("absent", name)
        assert info.shape == x.shape
        assert info.blocks.shape == (x.size // x.shape[-1], x.shape[-1] * x.itemsize)
        assert info.blocks.tobytes() == x.tobytes()
    packed = file.tensor("packed")
    assert (packed.kind, packed.shape, packed.blocks.shape) == ("Q8_0", (3, 32), (3, 34))


@pytest.mark.parametrize("change", ["cut short", "written to", "replaced", "gone"])
def test_a_file_that_changes_is_noticed(sample, change):
    """Its mapping would end the process where it is cut short."""
    info = gguf.read(sample).tensor("cube")
    kept = info.blocks
    data = sample.read_bytes()
    if change == "cut short":
        os.truncate(sample, info.start + 1)
    elif change == "written to":
        os.utime(sample, ns=(0, 0))  # clocks of file systems are coarse
    else:
        sample.rename(sample.with_name("old"))
        if change == "replaced":
            sample.write_bytes(data)
    text = "cannot be read" if change == "gone" else "has changed since its header was read, in wh"
    with pytest.raises(FormatError, match=text):
        _ = info.blocks
    assert kept.tobytes() == TENSORS["cube"].tobytes()


def test_a_file_that_is_cut_short_while_it_is_loaded(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny.write(path, "llama")
    file = gguf.read(path)
    with pytest.raises(FormatError, match="has changed since its header was read"):
        weights.load(file, progress=lambda nbytes: os.truncate(path, 4096))


def test_get_and_require(sample):
    file = gguf.read(sample)
    assert file.get("absent") is None and file.get("absent", 7, int) == 7
    assert file.get("a.text", None, str) == file.require("a.text", (str, int)) == "Grüße 👋\n"
    with pytest.raises(FormatError, match=r"sample.gguf: key absent is missing"):
        file.require("absent")
    with pytest.raises(FormatError, match=r"key a.uint8 has 100 \(int\), expected str or list"):
        file.require("a.uint8", (str, list))
    with pytest.raises(FormatError, match="sample.gguf: tensor x or y is missing"):
        file.tensor("x", "y")


def test_describe(sample):
    text = gguf.describe(gguf.read(sample))
    title, metadata, tensors, totals = text.split("\n\n")
    assert title == f"{sample}: GGUF version 3, 22 keys, 4 tensors of 592 bytes"
    assert "a.text                       'Grüße 👋\\n'" in metadata.splitlines()
    assert "tokenizer.ggml.token_type    [4] 1, 1, 1, 3" in metadata.splitlines()
    assert tensors.splitlines()[0] == "token_embd.weight  F32   3 x 32     384 bytes"
    assert tensors.splitlines()[3] == "packed             Q8_0  3 x 32     102 bytes"
    assert totals.splitlines() == [
        "F16   1 tensor  10 bytes",
        "F32   1 tensor  384 bytes",
        "I32   1 tensor  96 bytes",
        "Q8_0  1 tensor  102 bytes",
    ]


def test_describe_shortens_and_never_prints_control_characters(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(header([kv("a\x1b[2J", 8, text("x" * 500)), kv("n", 9, numbers(4, range(9)))]))
    lines = gguf.describe(gguf.read(path)).splitlines()
    assert lines[2] == r"a\x1b[2J  '" + "x" * 60 + "'... (500 characters)"
    assert lines[3] == "n         [9] 0, 1, 2, 3, ..."


# Files written byte by byte, to be wrong in one place each.


def text(s):
    data = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(data)) + data


def kv(key, code, value):
    return text(key) + struct.pack("<I", code) + value


def numbers(code, values):
    return struct.pack("<IQ", code, len(values)) + b"".join(struct.pack("<I", v) for v in values)


def tensor(name, shape, code=0, offset=0):
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", code, offset)


def header(kvs=(), tensors=(), data=0, version=3, magic=b"GGUF"):
    head = magic + struct.pack("<IQQ", version, len(tensors), len(kvs))
    head += b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


BROKEN = {
    "magic": (header(magic=b"GGML"), "has magic b'GGML', expected b'GGUF'"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        r"b'vers' \(a pointer of Git LFS: ",
    ),
    "zip": (b"PK\x03\x04", r"\(a zip, as PyTorch's models are\), expected b'GGUF'"),
    "page": (b"<!DOCTYPE html>", r"\(a page, not what it links to\)"),
    "short": (b"GG", "the magic needs 4 bytes at offset 0, the file has 2 there"),
    "version 1": (header(version=1), "has GGUF version 1, expected 2 or 3"),
    "big-endian": (header(version=3 << 24), r"\(version 3 in big-endian order\)"),
    "many tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        "the tensor count is 1152921504606846976, expected at most 0",
    ),
    "many keys": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(40),
        "the key count is 18446744073709551615, expected at most 3",
    ),
    "long key": (header([struct.pack("<Q", 2**63) + b"k" * 20]), "a key has a string at offset 24"),
    "key not UTF-8": (header([kv(b"k\xff", 7, b"\1")]), "a key has invalid UTF-8 at offset 33"),
    "text not UTF-8": (header([kv("k", 8, text(b"ab\xc3("))]), "key k has invalid UTF-8"),
    "value type": (header([kv("k", 13, bytes(8))]), "key k has value type 13, expected 0 to 12"),
    "element type": (header([kv("k", 9, numbers(99, []))]), "key k has value type 99"),
    "long array": (
        header([kv("k", 9, struct.pack("<IQ", 4, 2**62))]),
        "the length of key k is 4611686018427387904, expected at most",
    ),
    "array past the end": (
        header([kv("k", 9, struct.pack("<IQ", 12, 9) + bytes(15))]),
        "key k needs 72 bytes at offset 49, the file has 15 there",
    ),
    "long string array": (
        header([kv("k", 9, struct.pack("<IQ", 8, 2**60))]),
        "the length of key k is 1152921504606846976",
    ),
    "key twice": (header([kv("k", 7, b"\1")] * 2), "key k occurs twice"),
    "alignment 0": (
        header([kv("general.alignment", 4, bytes(4))]),
        "key general.alignment has 0, expected a power of two",
    ),
    "alignment text": (
        header([kv("general.alignment", 8, text("32"))]),
        "key general.alignment has '32', expected a power of two",
    ),
    "rank 0": (header(tensors=[tensor("t", [])], data=64), "tensor t has rank 0, expected 1 to 4"),
    "rank 5": (header(tensors=[tensor("t", [1] * 5)], data=64), "tensor t has rank 5"),
    "no elements": (
        header(tensors=[tensor("t", [4, 0])]),
        r"tensor t has shape \(4, 0\), expected",
    ),
    "part of a block": (
        header(tensors=[tensor("t", [4, 33], code=8)], data=256),
        r"shape \(4, 33\), expected no zero and rows of a multiple of 32 \(Q8_0\)",
    ),
    "past the end": (
        header(tensors=[tensor("t", [4, 8])], data=127),
        r"tensor t \(F32 \(4, 8\)\) has bytes 96 to 224, the file has 223",
    ),
    "far past the end": (
        header(tensors=[tensor("t", [2**64 - 1] * 4, offset=2**64 - 32)]),
        "tensor t .* the file has 96",
    ),
    "misaligned": (
        header(tensors=[tensor("t", [8], offset=4)], data=64),
        "tensor t has offset 4, expected a multiple of 32",
    ),
    "overlap": (
        header(tensors=[tensor("t", [16]), tensor("u", [8], offset=32)], data=96),
        "tensor u overlaps tensor t",
    ),
    "tensor twice": (
        header(tensors=[tensor("t", [8]), tensor("t", [8], offset=32)], data=64),
        "tensor t occurs twice",
    ),
}

UNSUPPORTED = {
    "nested array": (
        header([kv("k", 9, struct.pack("<IQ", 9, 1) + numbers(4, [1]))]),
        "key k is an array of arrays",
    )
}


def test_the_pieces_of_the_broken_files_are_right(tmp_path):
    path = tmp_path / "file"
    good = [tensor("t", [2, 8]), tensor("u", [32], code=8, offset=64)]
    path.write_bytes(header([kv("k", 9, numbers(4, [7, 8]))], good, data=98, version=2))
    file = gguf.read(path)
    assert file.version == 2 and file.metadata == {"k": [7, 8]}
    assert [(t.shape, t.nbytes) for t in file.tensors.values()] == [((2, 8), 64), ((32,), 34)]


@pytest.mark.parametrize(
    "case, error", [(c, FormatError) for c in BROKEN] + [(c, UnsupportedError) for c in UNSUPPORTED]
)
def test_broken_files(tmp_path, case, error):
    data, message = (BROKEN | UNSUPPORTED)[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        gguf.read(path)
    assert str(path) in str(caught.value)


def test_an_unknown_type_can_be_looked_at(tmp_path):
    """Its size is unknown: its bytes end where the next tensor begins."""
    path = tmp_path / "file"
    tensors = [tensor("t", [2, 8], code=77), tensor("u", [8], offset=64)]
    path.write_bytes(header(tensors=tensors, data=96))
    file = gguf.read(path)
    assert [(t.kind, t.nbytes) for t in file.tensors.values()] == [("type 77", 64), ("F32", 32)]
    assert "t  type 77  2 x 8  64 bytes" in gguf.describe(file)
    path.write_bytes(header(tensors=tensors[:1], data=40))
    assert gguf.read(path).tensor("t").nbytes == 40


# --- Models in several files ---


@pytest.fixture
def parts(tmp_path):
    """A tiny llama in three files, and whole."""
    tiny.write(tmp_path / "whole.gguf", "llama")
    whole = gguf.read(tmp_path / "whole.gguf")
    names = list(whole.tensors)
    paths = [tmp_path / f"tiny-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for n, path in enumerate(paths):
        keys = {"split.no": n, "split.count": 3, "split.tensors.count": len(names)}
        chosen = {
            name: (t.kind, t.shape, t.blocks.tobytes())
            for name, t in whole.tensors.items()
            if names.index(name) * 3 // len(names) == n
        }
        path.write_bytes(fuzz_gguf.packed(keys | (whole.metadata if n == 0 else {}), chosen))
    return paths


def rewrite(path, keys=None, without=()):
    file = gguf.read(path)
    tensors = {
        name: (t.kind, t.shape, t.blocks.tobytes())
        for name, t in file.tensors.items()
        if name not in without
    }
    path.write_bytes(fuzz_gguf.packed(file.metadata | (keys or {}), tensors))


def test_any_part_opens_the_model(parts, tmp_path):
    want = LLM(tmp_path / "whole.gguf", device="cpu").logits([1, 2, 3])
    for path in parts:
        np.testing.assert_array_equal(LLM(path, device="cpu").logits([1, 2, 3]), want)
    assert list(gguf.read_model(parts[1]).tensors) == list(
        gguf.read(tmp_path / "whole.gguf").tensors
    )


def test_a_part_can_be_looked_at_alone(parts):
    parts[0].unlink()
    assert "split.no" in gguf.describe(gguf.read(parts[1]))


def test_parts_that_do_not_belong_together(parts):
    parts[1].unlink()
    parts[2].unlink()
    missing = "2 of them are missing: tiny-00002-of-00003.gguf, tiny-00003-of-00003.gguf"
    with pytest.raises(FormatError, match=f"is one of 3 parts, and {missing}"):
        gguf.read_model(parts[0])
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(FormatError, match="expected a name like model-00001-of-00003.gguf"):
        gguf.read_model(renamed)


@pytest.mark.parametrize(
    "keys, without, text",
    [
        ({"split.no": 2}, (), "split.no has 2, expected 1"),
        ({"general.architecture": "qwen2"}, (), "has 'qwen2', expected 'llama' as the first part"),
        ({"llama.attention.scale": 2.0}, (), "has 2.0, expected None as the first part has it"),
        ({"split.count": 4}, (), "split.count has 4, expected 3"),
        ({}, ("blk.0.ffn_up.weight",), "split.tensors.count has 21, but the parts hold 20 tensors"),
    ],
)
def test_parts_are_checked(parts, keys, without, text):
    rewrite(parts[1], keys, without)
    with pytest.raises(FormatError, match=text):
        gguf.read_model(parts[0])


def test_a_tensor_in_two_parts(parts):
    parts[2].write_bytes(parts[1].read_bytes())
    rewrite(parts[2], {"split.no": 2})
    with pytest.raises(FormatError, match="is in an earlier part, too"):
        gguf.read_model(parts[0])


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="empty: is empty"):
        gguf.read(tmp_path / "empty")
    with pytest.raises(FormatError, match="is no file"):
        gguf.read(tmp_path)
    with pytest.raises(FormatError, match="absent: does not exist"):
        gguf.read(tmp_path / "absent")
    with pytest.raises(FormatError):
        gguf.read("a\0b")
    if hasattr(os, "mkfifo"):  # opening a pipe without a writer would wait for ever
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FormatError, match="pipe: is no file"):
            gguf.read(tmp_path / "pipe")


def open_all(path):
    """Everything that runs on a file's bytes before a model does."""
    file = gguf.read(path)
    gguf.describe(file)
    Tokenizer(file).encode("hehe <|im_end|>", special=True)


def test_every_prefix_of_a_file_is_refused(sample, tmp_path):
    data, path = sample.read_bytes(), tmp_path / "cut"
    assert len(data) < 4000
    last = len(data) - 26  # the padding after the last tensor may go
    for size in range(last):
        path.write_bytes(data[:size])
        with pytest.raises(PykvError):
            gguf.read(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_brings_nothing_but_a_pykv_error(sample, tmp_path, seed):
    rng = np.random.default_rng(seed)
    data, path = np.frombuffer(sample.read_bytes(), np.uint8), tmp_path / "damaged"
    refused = 0
    for _ in range(25):
        damaged = data.copy()
        where = rng.integers(0, len(data) - 592, rng.integers(1, 8))
        damaged[where] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)], len(where))
        path.write_bytes(damaged.tobytes())
        try:
            open_all(path)
        except PykvError as error:
            refused += 1
            assert len(str(error)) < 1000
    assert refused  # most damage shows
