"""Page files: what is saved comes back, and nothing else is taken for it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pykv import PagedKVCache, cuda, page_files, pages, whole_files
from pykv.errors import DtypeError, FormatError, ParameterError, UnsupportedError
from tests.helpers import assert_same_bits, to_numpy, without_simt
from tests.test_pages import SIZES, SPECS, assert_holds, host, make, moved


@without_simt
@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load(xp, rng, tmp_path, spec):
    path = tmp_path / "x.safetensors"
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    page_files.save(path, cache, [5, 0, 6], model="m")
    assert_holds(cache, before)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]

    other = make(xp, rng, spec, **{**SIZES, "N": 4})
    for name in ("k_scales", "v_scales"):
        if not cache.spec.has_dynamic_scales and getattr(cache, name) is not None:
            getattr(other, name)[...] = getattr(cache, name)
    want = moved(cache.spec, before, host(other), [5, 0, 6], [3, 1, 0])
    assert page_files.load(path, other, [3, 1, 0], model="m") == 3
    assert_holds(other, want)


@without_simt
@pytest.mark.parametrize("spec", SPECS)
def test_a_whole_cache(xp, rng, tmp_path, spec):
    """Given scales come back with it, but not over others that a store of swapped pages shares."""
    cache, other = (make(xp, rng, spec, **SIZES) for _ in range(2))
    page_files.save(tmp_path / "x", cache)
    store, before = pages.swap_out(other, [1, 2]), host(other)
    if cache.spec.has_given_scales:
        with pytest.raises(FormatError, match="has other ._scales, expected those of the cache, o"):
            page_files.load(tmp_path / "x", other)
        assert_holds(other, before)
        assert_holds(store, {name: x[:, [1, 2]] if x is not None and x.ndim > 2 else x
                             for name, x in before.items()})  # fmt: skip
        for x in (other.k_scales, other.v_scales):
            if x is not None:
                x[...] = 0
    assert page_files.load(tmp_path / "x", other) == SIZES["N"]
    assert_holds(other, host(cache))


def test_a_file_is_what_the_format_says(rng, tmp_path):
    """Read by hand, as safetensors' documentation defines it."""
    cache = make(np, rng, "bf16+int8", **SIZES)
    page_files.save(tmp_path / "x", cache, [2, 4])
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = header.pop("__metadata__")
    assert size % 8 == 0 and all(isinstance(text, str) for text in facts.values())
    assert facts.pop("sha256")
    assert facts == dict(
        format="pykv.pages.1",
        spec="bf16+int8",
        layers="3",
        page_size="4",
        heads="2",
        head_dim="24",
        pages="2",
        model="",
    )
    dtypes = dict(U16=np.uint16, I8=np.int8, F16=np.float16)
    for name, want in (
        ("k", cache.k.view(np.uint16)), ("v", cache.v), ("v_scales", cache.v_scales)
    ):  # fmt: skip
        entry = header.pop(name)
        begin, end = (8 + size + at for at in entry["data_offsets"])
        x = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
        assert_same_bits(x, want[:, [2, 4]])
    assert not header and end == len(data)


def test_the_library_reads_it(rng, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    cache = make(np, rng, "int8:fp32", **SIZES)
    page_files.save(tmp_path / "x", cache)
    found = safetensors.load_file(tmp_path / "x")
    for name, x in host(cache).items():
        assert_same_bits(found[name], x)


SMALL = dict(L=2, N=2, P=1, H=1, D=8)


@without_simt
def test_every_damaged_byte_is_found(xp, rng, tmp_path):
    """One bit of each byte of header and data; the cache stays as it is."""
    path = tmp_path / "x"
    page_files.save(path, make(xp, rng, "int8", **SMALL))
    good = path.read_bytes()
    other = make(xp, rng, "int8", **SMALL)
    before = host(other)
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            page_files.load(path, other)
        except FormatError:
            continue
        size = int.from_bytes(good[:8], "little")  # another blank in the header means the same
        assert 8 <= at < 8 + size and json.loads(damaged[8 : 8 + size]) == json.loads(
            good[8 : 8 + size]
        )
    assert_holds(other, before)


@without_simt
@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -40])
def test_a_file_cut_short_or_too_long(xp, rng, tmp_path, keep):
    path = tmp_path / "x"
    cache = make(xp, rng, "int8", **SMALL)
    page_files.save(path, cache)
    good = path.read_bytes()
    cache.k[...] = xp.zeros(cache.k.shape, np.int8)
    before = host(cache)
    for data in (good[:keep], good + b"\0", b"", b"GGUF" + good):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            page_files.load(path, cache)
    assert_holds(cache, before)


@without_simt
@pytest.mark.parametrize(
    "saved, sizes, options, text",
    [
        ("fp16", {}, {}, "has spec=fp16, expected int8"),
        ("int8:fp32", {}, {}, "has spec=int8:fp32, expected int8"),
        ("int8:HND", {}, {}, "has spec=int8:HND, expected int8"),
        ("int8", {"P": 8}, {}, "has page_size=8, expected 4"),
        ("int8", {"L": 2}, {}, "has layers=2, expected 3"),
        ("int8", {"H": 1}, {}, "has heads=1, expected 2"),
        ("int8", {"D": 16}, {}, "has head_dim=16, expected 24"),
        ("int8", {"N": 6}, {}, "has 6 pages, expected all 7, or a list of pages"),
        ("int8", {}, {"pages": [0, 1]}, "has 7 pages, expected 2 like pages"),
        ("int8", {}, {"model": "other"}, "has model=m, expected other"),
    ],
    ids=str,
)
def test_a_file_of_another_cache(xp, rng, tmp_path, saved, sizes, options, text):
    path = tmp_path / "x"
    page_files.save(path, make(xp, rng, saved, **{**SIZES, **sizes}), model="m")
    cache = make(xp, rng, "int8", **SIZES)
    before = host(cache)
    with pytest.raises(FormatError, match=text):
        page_files.load(path, cache, **options)
    assert_holds(cache, before)


@without_simt
def test_pages_for_other_given_scales_are_refused(xp, rng, tmp_path):
    cache, other = (make(xp, rng, "int8:head", **SIZES) for _ in range(2))
    page_files.save(tmp_path / "x", cache, [1])
    before = host(other)
    with pytest.raises(FormatError, match="has other k_scales, expected those of the cache"):
        page_files.load(tmp_path / "x", other, [0])
    with pytest.raises(ParameterError, match="target.k_scales differ, expected those of source"):
        pages.copy_pages(cache, other, [0], [0])
    assert_holds(other, before)


def test_a_save_that_fails_leaves_the_old_file(rng, tmp_path, monkeypatch):
    path = tmp_path / "x"
    cache = make(np, rng, "fp16", **SIZES)
    page_files.save(path, cache)
    good = path.read_bytes()
    monkeypatch.setattr(
        page_files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        page_files.save(path, make(np, rng, "fp16", **SIZES))
    assert path.read_bytes() == good and [x.name for x in tmp_path.iterdir()] == ["x"]


def test_other_files_are_refused(rng, tmp_path):
    cache = make(np, rng, "fp16", **SIZES)
    for header in ("{}", "[]", "3", "{", '{"__metadata__": 3}', '{"__metadata__": {}}'):
        text = header.encode()
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FormatError, match="is no file of pages"):
            page_files.load(tmp_path / "x", cache)
    text = b'{"__metadata__": {"format": "pt"}}'
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FormatError, match="has format 'pt', expected 'pykv.pages.1'"):
        page_files.load(tmp_path / "x", cache)


@pytest.mark.parametrize("call", [page_files.save, page_files.load])
def test_files_cannot_be_prepared(rng, tmp_path, call):
    cache = make(np, rng, "fp16", **SIZES)
    with pytest.raises(UnsupportedError, match="cannot be prepared: .* pages.swap_"):
        cuda.prepare(call, tmp_path / "x", cache)
    assert not list(tmp_path.iterdir())


# --- Files of strangers ---


def write_file(path, header, data=b""):
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"__metadata__":', "[[{"], ids=str)
def test_a_deeply_nested_header(rng, tmp_path, opening):
    cache = make(np, rng, "fp16", **SIZES)
    write_file(tmp_path / "x", opening * 100_000)
    with pytest.raises(FormatError, match="is no file of pages"):
        page_files.load(tmp_path / "x", cache)


WILD = "\x1b[2J\nforged: line\u202e"


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, table: facts.update(spec=WILD),
        lambda facts, table: facts.update(format=WILD),
        lambda facts, table: facts.update(format=[WILD]),
        lambda facts, table: facts.update(model=WILD),
        lambda facts, table: facts.update(pages=[WILD]),
        lambda facts, table: facts.update(pages="9" * 5000),
        lambda facts, table: facts.update(pages="\u0663"),
        lambda facts, table: table.update({WILD: 1}),
        lambda facts, table: table["k"].update(dtype=WILD * 100_000),
        lambda facts, table: table.update(k=WILD),
    ],
)
def test_errors_are_one_line_that_no_terminal_obeys(rng, tmp_path, change):
    cache = make(np, rng, "fp16", **SIZES)
    page_files.save(tmp_path / "x", cache, model="m")
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    facts = table["__metadata__"]
    change(facts, table)
    write_file(tmp_path / "x", json.dumps(table), data[8 + size :])
    with pytest.raises(FormatError) as error:
        page_files.load(tmp_path / "x", cache, model="m")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_damaged_files_in_bounded_processes():
    """1,500 a night, another seed each."""
    tool = Path(__file__).parents[1] / "tools" / "fuzz_page_files.py"
    done = subprocess.run([sys.executable, tool, "150"], capture_output=True, text=True)
    assert done.returncode == 0 and "; 0 faults" in done.stdout, done.stdout + done.stderr


# --- What stands at the path ---


@pytest.mark.skipif(os.name != "posix", reason="needs permissions and links of POSIX")
def test_permissions_and_links_are_kept(rng, tmp_path):
    cache, umask = make(np, rng, "fp16", **SIZES), os.umask(0o027)
    try:
        page_files.save(tmp_path / "new", cache)
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o600)
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "dangling").symlink_to("other")
    for name in ("new", "link", "dangling"):
        page_files.save(tmp_path / name, cache, [1])
        assert page_files.load(tmp_path / name, cache, [2]) == 1
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    links = {x.name: x.is_symlink() for x in tmp_path.iterdir()}
    assert links == dict(new=False, other=False, link=True, dangling=True)


def test_what_is_no_regular_file_is_left_alone(rng, tmp_path):
    """A pipe would be waited for, and a device replaced."""
    cache = make(np, rng, "fp16", **SIZES)
    os.mkfifo(tmp_path / "pipe")
    for call in (page_files.save, page_files.load):
        for path in (tmp_path / "pipe", tmp_path, os.devnull):
            with pytest.raises(ParameterError, match="path is .*, expected a regular file"):
                call(path, cache)
        with pytest.raises(ParameterError, match="path is 'a.x00b': "):
            call("a\0b", cache)
        with pytest.raises(DtypeError, match="path is an int, expected a text or a pathlib.Path"):
            call(3, cache)
    with pytest.raises(DtypeError, match="model is an int, expected a text"):
        page_files.save(tmp_path / "x", cache, model=3)
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
    page_files.save(os.fsencode(tmp_path / "x"), cache)


def test_threads_that_save_to_one_path(rng, tmp_path):
    """A reader finds a whole file at any time."""
    path, cache = tmp_path / "x", make(np, rng, "int8", **SIZES)
    page_files.save(path, cache)
    failures = []

    def save():
        try:
            for _ in range(25):
                page_files.save(path, cache)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    loads = 0
    while any(thread.is_alive() for thread in threads):
        page_files.load(path, make(np, rng, "int8", **SIZES))
        loads += 1
    for thread in threads:
        thread.join()
    assert not failures and loads > 3 and [x.name for x in tmp_path.iterdir()] == ["x"]


SAVES = """
import itertools, sys
from pykv import PagedKVCache, page_files

cache = PagedKVCache(2, 64, 4, 64)
for n in itertools.count():
    cache.k[...] = n
    page_files.save(sys.argv[1], cache)
    print(n, flush=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_saves(tmp_path, kind):
    """There is a whole file at any time, and the next save removes what a killed one has left."""
    path, cache = tmp_path / "x", PagedKVCache(2, 64, 4, 64)
    for wait in (0.0, 0.002, 0.005, 0.01):
        command = [sys.executable, "-c", SAVES, path]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with subprocess.Popen(command, **pipes) as process:
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(kind)
        assert process.returncode != 0
        assert page_files.load(path, cache) == 64 and (cache.k == cache.k.flat[0]).all()
    page_files.save(path, cache)
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


KILLED = """
import os, signal, sys
from pykv import PagedKVCache, page_files

page_files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
page_files.save(sys.argv[1], PagedKVCache(2, 4, 1, 8), model="new")
"""


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path):
    cache = PagedKVCache(2, 4, 1, 8)
    page_files.save(tmp_path / "x", cache, model="old")
    for name in ("x", "y"):
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / name])
        assert done.returncode == -9
    assert page_files.load(tmp_path / "x", cache, model="old") == 4
    names = [x.name for x in tmp_path.iterdir()]
    assert "y" not in names and sum(name.startswith(".pykv-") for name in names) == 2
    for name in ("x", "y"):
        page_files.save(tmp_path / name, cache)
    assert {x.name for x in tmp_path.iterdir()} == {"x", "y"}


# --- Given scales ---


@without_simt
def test_scales_that_are_unset_become_those_of_the_file(xp, rng, tmp_path):
    path, rows = tmp_path / "x", rng.standard_normal((8, 2, 8)).astype(np.float32)
    saved, loaded = (PagedKVCache(1, 2, 2, 8, page_size=4, spec="int8:head", margin=1.5, xp=xp)
                     for _ in range(2))  # fmt: skip
    slots = xp.asarray(np.arange(8, dtype=np.int32))
    saved.append(0, xp.asarray(rows), xp.asarray(-rows), slots)
    page_files.save(path, saved, [1])
    page_files.load(path, loaded, [0])
    before = host(loaded)
    assert_same_bits(loaded.k[:, 0], saved.k[:, 1])
    loaded.append(0, xp.asarray(10 * rows[:1]), xp.asarray(rows[:1]), slots[4:5])
    for name in ("k_scales", "v_scales"):
        assert_same_bits(getattr(loaded, name), to_numpy(getattr(saved, name)))
    assert_same_bits(loaded.k[:, 0], before["k"][:, 0])
    page_files.save(path, saved)
    page_files.load(path, loaded)
    loaded.append(0, xp.asarray(10 * rows), xp.asarray(rows), slots)
    assert_same_bits(loaded.k_scales, saved.k_scales)


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    """Not the one beside it that would have been renamed."""
    with pytest.raises(FileNotFoundError) as caught:
        whole_files.replace(tmp_path / "no" / "x", [b"1"])
    assert caught.value.filename == str(tmp_path / "no" / "x")
