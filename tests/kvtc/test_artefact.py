"""The file of an artefact, read by `struct` alone, and damaged ones."""

import hashlib
import os
import struct
from dataclasses import replace

import numpy as np
import pytest

from pykv import whole_files
from pykv.errors import DtypeError, FormatError, ParameterError
from pykv.kvtc import Artefact, Codec, Fingerprint, Group, Plan, Side, Text, coder
from tests.helpers import assert_same_bits
from tests.kvtc import made

L, H, D, PAIRS = 3, 2, 24, 10
RATIOS = {8: (0, 0, 0, 0, 0, 0, 32, 0), 16: (0, 0, 0, 0, 0, 0, 0, 32)}


def side(rng, layers):
    F = layers * H * D
    basis = np.linalg.qr(rng.standard_normal((F, F)))[0][:, :32].astype(np.float16)
    plans = {
        ratio: Plan(widths, rng.uniform(0.1, 1, 32).astype(np.float32), ratio / 100)
        for ratio, widths in RATIOS.items()
    }
    mean, weights = rng.standard_normal(F), made.weights(rng, F // D, D)
    return Side(mean.astype(np.float16), weights, basis, plans)


@pytest.fixture
def artefact(rng):
    inv_freq = rng.uniform(0, 1, (L, PAIRS)).astype(np.float32)
    model = Fingerprint("llama", L, H, D, "adjacent", inv_freq, "5a" * 32)
    groups = tuple(
        Group(layers, side(rng, len(layers)), side(rng, len(layers))) for layers in ((0, 2), (1,))
    )
    return Artefact(model, groups, (Text("ä.txt", "1b" * 32, 77), Text("b", "c2" * 32, 1)), 3, 64)


@pytest.fixture
def path(artefact, tmp_path):
    artefact.save(tmp_path / "a.kvtc")
    return tmp_path / "a.kvtc"


def test_arrays_are_not_printed(artefact):
    assert repr(artefact) == 'Artefact("llama", ratios 8, 16, 78 tokens of 2 texts)'
    size = artefact.row_bytes(8)
    assert repr(Codec(artefact, 8)) == f'Codec("llama", ratio 8, {size} bytes a token)'
    for part in (artefact.model, artefact.groups[0]):
        assert "array" not in repr(part)


def test_a_file_is_what_the_format_says(artefact, path):
    data = path.read_bytes()
    at = 0

    def take(code):
        nonlocal at
        size = struct.calcsize("<" + code)
        at += size
        return struct.unpack("<" + code, data[at - size : at])

    def skip_padding():
        nonlocal at
        while at % 64:
            assert data[at] == 0
            at += 1

    magic, version, pairing, size, sha256, model, name = take("8sIIQ32s32s32s")
    assert (magic, version, pairing, size) == (b"\x89PYKVTC\n", 3, 1, len(data))
    assert sha256 == hashlib.sha256(data[:24] + bytes(32) + data[56:]).digest()
    assert model.hex() == "5a" * 32 and name.rstrip(b"\0") == b"llama"
    assert take("9I") == (L, H, D, PAIRS, 2, 2, 2, 3, 64)
    skip_padding()
    assert take(f"{L}I") == (0, 1, 0)
    assert take(f"{L * PAIRS}f") == tuple(artefact.model.inv_freq.ravel().tolist())
    assert take("2I") == (8, 16)
    assert take("4I") == (32,) * 4
    widths = [take("8I") for _ in range(8)]
    assert widths == [*RATIOS.values()] * 4
    errors = take("8f")
    assert errors == tuple(np.float32([0.08, 0.16] * 4).tolist())
    for text in artefact.texts:
        name, digest, tokens = take("96s32sQ")
        assert (name.rstrip(b"\0").decode(), digest.hex(), tokens) == text
    skip_padding()
    for group in artefact.groups:
        F = len(group.layers) * H * D
        for of_side in (group.k, group.v):
            assert take(f"{F}e") == tuple(of_side.mean.tolist())
            assert take(f"{F * D}e") == tuple(of_side.weights.ravel().tolist())
            assert take(f"{F * 32}e") == tuple(of_side.basis.ravel().tolist())
            for plan in of_side.plans.values():
                assert take("32f") == tuple(plan.steps.tolist())
    skip_padding()
    assert at == len(data)


def test_it_comes_back(artefact, path):
    found = Artefact.load(str(path))
    assert not found.model.difference(artefact.model)
    assert (found.texts, found.sinks, found.window) == (artefact.texts, 3, 64)
    assert found.ratios == (8, 16)
    for mine, other in zip(found.groups, artefact.groups, strict=True):
        assert mine.layers == other.layers
        for a, b in ((mine.k, other.k), (mine.v, other.v)):
            assert_same_bits(a.mean, b.mean)
            assert_same_bits(a.weights, b.weights)
            assert_same_bits(a.basis, b.basis)
            for ratio, plan in a.plans.items():
                assert_same_bits(plan.steps, b.plans[ratio].steps)
                assert plan.widths == b.plans[ratio].widths
                assert plan.error == np.float32(b.plans[ratio].error)
    assert found.row_bytes(8) == 4 * 8 and found.row_bytes(16) == 4 * 4


def test_ratios_it_does_not_have_are_refused(artefact):
    for ratio in (4, 12):
        with pytest.raises(ParameterError, match=f"ratio is {ratio}, expected one of 8, 16"):
            artefact.row_bytes(ratio)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(architecture="qwen2"), "architecture=llama, expected qwen2"),
        (dict(layers=4), "layers=3, expected 4"),
        (dict(kv_heads=1), "kv_heads=2, expected 1"),
        (dict(head_dim=32), "head_dim=24, expected 32"),
        (dict(pairing="half"), "pairing=adjacent, expected half"),
        (dict(sha256="00"), "sha256=5a.*, expected 00"),
        (dict(inv_freq=np.zeros((L, PAIRS), np.float32)), "inv_freq"),
    ],
)
def test_another_model_is_told_by_name(artefact, change, text):
    other = replace(artefact.model, **change)
    assert __import__("re").match(text, artefact.model.difference(other))


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.sweep)])
def test_a_changed_byte_is_refused(path, step):
    """Bytes of header, tables and arrays."""
    good = path.read_bytes()
    for at in [*range(192), *range(192, 960, step), *range(960, len(good), 99 * step)]:
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"Artefact\.load: .*a\.kvtc"):
            Artefact.load(path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 155, 156, 192, 500, 1000, -64, -1])
def test_a_file_cut_short_or_too_long_is_refused(path, size):
    good = path.read_bytes()
    for data in (good[:size], good + b"\0" * (abs(size) or 1)):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="has (size|magic)"):
            Artefact.load(path)


def forged(data):
    """The same bytes with sums that hold."""
    data = bytearray(data)
    data[16:24] = len(data).to_bytes(8, "little")
    data[24:56] = bytes(32)
    data[24:56] = hashlib.sha256(data).digest()
    return bytes(data)


def test_bytes_behind_the_arrays_are_refused(path):
    path.write_bytes(forged(path.read_bytes() + bytes(64)))
    with pytest.raises(FormatError, match="bytes, expected"):
        Artefact.load(path)


FIELDS = [  # offset, format, value, what the error names
    (
        8,
        "<I",
        2,
        "version 2, expected 3: calibrate again, by `pykv kvtc calibrate --model .* --out",
    ),
    (8, "<I", 4, "version 4, expected 3: it is of a newer pykv"),
    (12, "<I", 2, "pairing"),
    (88, "<8s", b"lla\x1bma", "architecture"),
    (88, "<8s", b"\xff", "architecture"),
    (88, "<32s", b"", "architecture"),
    (120, "<I", 0, "layers"),
    (120, "<I", 2**31, "layers"),
    (120, "<I", 1, "groups"),
    (120, "<I", 4, "bytes|padding|groups"),
    (124, "<I", 0, "kv_heads"),
    (124, "<I", 2**14, "bytes"),
    (128, "<I", 0, "head_dim"),
    (128, "<I", 16, "inv_freq|bytes|padding"),
    (132, "<I", 2**14, "bytes"),
    (136, "<I", 0, "groups"),
    (140, "<I", 0, "ratios"),
    (140, "<I", 2**14, "bytes"),
    (144, "<I", 2**14, "texts|bytes"),
    (148, "<I", 2**30, "sinks"),
    (152, "<I", 2**30, "window"),
    (156, "<I", 1, "padding"),
    (192, "<I", 1, "basis|weights"),
    (192, "<I", 7, "bytes|groups"),
    (204, "<f", np.nan, "inv_freq"),
    (204, "<f", -1.0, "inv_freq"),
    (324, "<I", 16, "ratios"),
    (324, "<I", 0, "ratios"),
    (328, "<I", 8, "ratios"),
    (328, "<I", 1000, "widths"),
    (332, "<I", 31, "bytes|basis"),
    (332, "<I", 2**32 - 1, "bytes"),
    (348, "<I", 32, "steps|bytes|widths"),
    (372, "<I", 64, "steps|bytes|widths"),
    (372, "<I", 31, "steps|bytes|widths|padding"),
    (372, "<I", 2**32 - 32, "bytes"),
    (604, "<f", np.nan, "error"),
    (604, "<f", -0.5, "error"),
    (636, "<2s", b"\x1b[", "texts"),
    (636, "<96s", b"", "texts"),
    (636 + 128, "<Q", 0, "texts"),
    (960, "<e", np.inf, "mean"),
    (960 + 192, "<e", np.nan, "weights"),
    (960 + 192, "<e", 0.0, "weights"),
    (960 + 192, "<e", 200.0, "weights"),
    (960 + 194, "<e", 0.5, "weights"),
    (960 + 4800, "<e", np.nan, "basis"),
    (960 + 4800, "<e", 2.0, "basis"),
    (960 + 4800 + 6144, "<f", 0.0, "steps"),
    (960 + 4800 + 6144, "<f", -1.0, "steps"),
    (960 + 4800 + 6144, "<f", np.nan, "steps"),
]


@pytest.mark.parametrize("at, code, value, name", FIELDS)
def test_a_forged_field_is_refused_by_name(path, at, code, value, name):
    """The sums are right, so whoever wrote this meant it."""
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, at, value)
    path.write_bytes(forged(data))
    with pytest.raises(FormatError, match=rf"Artefact\.load: .*({name})"):
        Artefact.load(path)


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.sweep)])
def test_random_forgeries_are_refused_or_sound(path, rng, count):
    """Whatever tables say: a typed error, or an artefact that may be saved again."""
    good, refused = path.read_bytes(), 0
    for _ in range(count):
        data = bytearray(good)
        for at in rng.integers(8, 900, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(forged(data))
        try:
            found = Artefact.load(path)
        except FormatError:
            refused += 1
            continue
        found.save(path)
    assert refused > count / 2


# --- Saving ---------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_what_was_there(artefact, path, monkeypatch):
    good = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_files.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        replace(artefact, sinks=0).save(path)
    with pytest.raises(KeyboardInterrupt):
        artefact.save(path.with_name("new"))
    assert path.read_bytes() == good and os.listdir(path.parent) == [path.name]


def test_what_no_calibration_gives_is_not_saved(artefact, tmp_path):
    first, group = artefact.groups
    plan = group.k.plans[8]

    def with_plan(**changes):
        k = replace(group.k, plans={**group.k.plans, 8: replace(plan, **changes)})
        return replace(artefact, groups=(first, replace(group, k=k)))

    for wrong, name in (
        (replace(artefact, groups=artefact.groups[:1]), "groups"),
        (replace(artefact, texts=(Text("a\n", "00" * 32, 1),)), "texts"),
        (with_plan(steps=plan.steps[:-1]), "steps"),
        (with_plan(steps=plan.steps * np.nan), "steps"),
        (with_plan(widths=(32,) + (0,) * 7), "widths"),
        (with_plan(error=np.inf), "error"),
    ):
        with pytest.raises(ParameterError, match=rf"Artefact\.save: {name} is"):
            wrong.save(tmp_path / "x")
    assert not os.listdir(tmp_path)
    with pytest.raises(ParameterError, match="path is .*, expected a regular file"):
        artefact.save(tmp_path)
    with pytest.raises(DtypeError, match="path is an int"):
        Artefact.load(5)


def test_the_order_of_widths_is_that_of_the_coder():
    assert coder.WIDTHS == tuple(range(8, 0, -1))


def of_model(name, change):
    return lambda made: replace(
        made, model=replace(made.model, **{name: change(getattr(made.model, name))})
    )


def of_side(name, change):
    def changed(made):
        first, *others = made.groups
        side = replace(first.k, **{name: change(getattr(first.k, name))})
        return replace(made, groups=(replace(first, k=side), *others))

    return changed


def of_plan(name, change):
    def plans(known):
        return known | {8: replace(known[8], **{name: change(getattr(known[8], name))})}

    return of_side("plans", plans)


def falling(made):
    """Layers in another order than the file has them in."""
    first, *others = made.groups
    return replace(made, groups=(replace(first, layers=(2, 0)), *others))


UNSOUND = [
    ("inv_freq", of_model("inv_freq", lambda x: x[:1])),
    ("inv_freq", of_model("inv_freq", lambda x: np.concatenate((x, x)))),
    *(("inv_freq", of_model("inv_freq", change)) for change in (np.ravel, np.float64, type)),
    ("pairing", of_model("pairing", str.upper)),
    *(("sha256", of_model("sha256", change)) for change in (str.upper, lambda x: x[2:], type)),
    *(("architecture", of_model("architecture", lambda x, y=y: y)) for y in ("é", "a\0", "", None)),
    *(("layers", of_model("layers", change)) for change in (float, lambda x: 0)),
    ("head_dim", of_model("head_dim", lambda x: 1 << 20)),
    *(("sinks", lambda made, n=n: replace(made, sinks=n)) for n in (-1, 1.5, 1 << 20)),
    *(("window", lambda made, n=n: replace(made, window=n)) for n in (-1, None, 1 << 20)),
    ("groups", falling),
    ("groups", lambda made: replace(made, groups=())),
    ("groups", lambda made: replace(made, groups=made.groups[:1])),
    ("texts", lambda made: replace(made, texts=(Text("a", "zz", 1),))),
    ("texts", lambda made: replace(made, texts=(Text("a", "5a" * 32, 2**64),))),
    *(("mean", of_side("mean", lambda x, y=y: x * y)) for y in (np.float16(np.inf), np.float32(1))),
    ("mean", of_side("mean", np.ndarray.tolist)),
    ("weights", of_side("weights", np.zeros_like)),
    ("weights", of_side("weights", lambda x: x[:, :, :1])),
    ("weights", of_side("weights", lambda x: np.triu(x))),
    ("weights", of_side("weights", lambda x: x * np.float16(np.nan))),
    ("weights", of_side("weights", np.negative)),
    ("basis", of_side("basis", lambda x: x * np.float16(np.nan))),
    ("basis", of_side("basis", np.ndarray.tolist)),
    *(("steps", of_plan("steps", change)) for change in (np.negative, np.zeros_like)),
    ("steps", of_plan("steps", lambda x: x[1:])),
    ("widths", of_plan("widths", lambda x: x[1:])),
    ("widths", of_plan("widths", lambda x: (3,) * 8)),
    ("error", of_plan("error", lambda x: np.nan)),
    *(("plans|ratios", of_side("plans", change)) for change in (lambda x: {}, lambda x: {8: x[8]})),
]


@pytest.mark.parametrize("name, change", UNSOUND, ids=[name for name, _ in UNSOUND])
def test_what_no_calibration_gives_is_neither_saved_nor_used(artefact, tmp_path, name, change):
    unsound = change(artefact)
    with pytest.raises(ParameterError, match=rf"Artefact\.save: ({name}) is "):
        unsound.save(tmp_path / "a.kvtc")
    assert not os.listdir(tmp_path)
    with pytest.raises(ParameterError, match=rf"Codec: (artefact has ({name}) |ratio is 8)"):
        Codec(unsound, 8)
