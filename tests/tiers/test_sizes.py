"""What a user says of tiers, read or refused by name."""

from pathlib import Path

import pytest

from pykv.errors import DtypeError, ParameterError
from pykv.tiers.sizes import Limit, artefact_of, parse_bytes, parse_disk, parse_host


@pytest.mark.parametrize(
    "value, nbytes",
    [
        ("4GiB", 4 << 30),
        ("1.5 GB", 3 << 29),
        ("512B", 512),
        ("512", 512),
        ("3KiB", 3072),
        ("2MB", 2 << 20),
        ("9007199254740993", 2**53 + 1),
        *[
            (f"{n}{space}{unit}", int(float(n) * 1024**power))
            for power, letter in enumerate("KMGT", 1)
            for ending in ("", "B", "iB")
            for unit in (letter + ending, (letter + ending).lower(), (letter + ending).upper())
            for n, space in (("64", ""), ("0.5", " "))
        ],
        ("1TiB", 1 << 40),
        (77, 77),
    ],
)
def test_bytes(value, nbytes):
    assert parse_bytes("op", "name", value) == nbytes


@pytest.mark.parametrize(
    "value, error, text",
    [
        ("4P", ParameterError, "op: name is '4P', expected a size such as '4GiB' or '64M'"),
        ("4Gi", ParameterError, "is '4Gi', expected a size"),
        ("4ib", ParameterError, "expected a size"),
        (".5G", ParameterError, "expected a size"),
        ("-1GiB", ParameterError, "is '-1GiB', expected a size"),
        ("1e9B", ParameterError, "expected a size"),
        ("", ParameterError, "is '', expected a size"),
        ("0GiB", ParameterError, "is 0, expected at least 1"),
        ("0.1B", ParameterError, "is 0, expected at least 1"),
        (0, ParameterError, "is 0, expected at least 1"),
        (-5, ParameterError, "is -5, expected at least 1"),
        ("9" * 400 + "B", ParameterError, "expected a size"),
        ("9" * 18 + "TiB", ParameterError, "expected 1 to"),
        (True, DtypeError, "name is a bool, expected a size such as '4GiB'"),
        (1.5, DtypeError, "name is a float, expected a size"),
        (None, DtypeError, "name is a NoneType, expected a size"),
    ],
)
def test_no_bytes(value, error, text):
    with pytest.raises(error, match=text):
        parse_bytes("op", "name", value)


def test_host():
    assert parse_host("op", "name", 5) == Limit(5, "none")
    assert parse_host("op", "name", "4GiB") == Limit(4 << 30, "none")
    assert (
        parse_host("op", "name", "64M")
        == parse_host("op", "name", "64MB")
        == Limit(64 << 20, "none")
    )
    assert parse_host("op", "name", "4096") == Limit(4096, "none")
    assert parse_host("op", "name", "1k:int8") == Limit(1024, "int8")
    assert parse_host("op", "name", "1KiB:int8") == Limit(1024, "int8")
    assert parse_host("op", "name", "1KiB:/a b/c:d.kvtc:16") == Limit(1024, "/a b/c:d.kvtc:16")
    assert parse_host("op", "name", "1KiB:lfu") == Limit(1024, "none", policy="lfu")
    assert parse_host("op", "name", "1KiB:lfu:int8") == Limit(1024, "int8", policy="lfu")
    assert parse_host("op", "name", "1KiB:lru:lfu.kvtc:16") == Limit(1024, "lfu.kvtc:16")
    assert artefact_of("/a b/c:d.kvtc:16") == ("/a b/c:d.kvtc", 16) and artefact_of("int8") is None


@pytest.mark.parametrize(
    "value, text",
    [
        ("x:4GiB", "is 'x:4GiB', expected SIZE, SIZE:lfu or SIZE:CODEC"),
        ("4GiB:", "expected SIZE, SIZE:lfu or SIZE:CODEC"),
        ("4GiB:kvtc", "name's codec is 'kvtc', expected one of none, int8, int4, or FILE:RATIO of"),
        ("4GiB:16", "name's codec is '16', expected one of"),
        ("4GiB::16", "name's codec is ':16', expected one of"),
        ("4GiB:a.kvtc:0x10", "name's codec is 'a.kvtc:0x10', expected one of"),
        ("4GiB:zip", "name's codec is 'zip', expected one of"),
        ("int8", "expected SIZE, SIZE:lfu or SIZE:CODEC"),
    ],
)
def test_no_host(value, text):
    with pytest.raises(ParameterError, match=text):
        parse_host("op", "name", value)


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_disk("op", "name", f"{tmp_path}:1GB") == Limit(1 << 30, "none", tmp_path)
    assert parse_disk("op", "name", "~/a b:1GB:int8") == Limit(1 << 30, "int8", tmp_path / "a b")
    given = parse_disk("op", "name", f"{tmp_path}:1GB:x/y.kvtc:32")
    assert given == Limit(1 << 30, "x/y.kvtc:32", tmp_path)
    given = parse_disk("op", "name", f"{tmp_path}:1GB:lfu:lfu:8")
    assert given == Limit(1 << 30, "lfu:8", tmp_path, "lfu")
    assert parse_disk("op", "name", f"{tmp_path}:64m").nbytes == 64 << 20
    # A folder's name may hold colons, even one that looks like a size.
    assert parse_disk("op", "name", f"{tmp_path}/c:1GB:2MB").folder == tmp_path / "c:1GB"
    assert parse_disk("op", "name", "d:1GB").folder == Path.cwd() / "d"


@pytest.mark.parametrize(
    "value, error, text",
    [
        ("4GiB", ParameterError, "is '4GiB', expected DIR:SIZE, DIR:SIZE:lfu or DIR:SIZE:CODEC"),
        ("/tmp", ParameterError, "is '/tmp', expected DIR:SIZE"),
        ("/tmp:", ParameterError, "expected DIR:SIZE"),
        ("/tmp:-1GiB", ParameterError, "expected DIR:SIZE"),
        ("/tmp:1024", ParameterError, "expected DIR:SIZE"),
        ("/tmp:0B", ParameterError, "name is 0, expected at least 1"),
        ("/tmp:1GiB:zip", ParameterError, "name's codec is 'zip'"),
        ("a\0b:1GiB", ParameterError, "expected DIR:SIZE"),
        (5, DtypeError, "name is an int, expected a text such as 'DIR:50GiB'"),
        (Path("/tmp"), DtypeError, "name is a .*Path, expected a text"),
    ],
)
def test_no_disk(value, error, text):
    with pytest.raises(error, match=text):
        parse_disk("op", "name", value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ParameterError, match="x, expected a folder"):
        parse_disk("op", "name", f"{tmp_path}/x:1GiB")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_new_folder_has_a_parent(tmp_path):
    (tmp_path / "x").write_text("mine")
    assert parse_disk("op", "name", f"{tmp_path}/new:1GiB").folder == tmp_path / "new"
    for parent in ("none", "x"):
        expected = f"{parent}/new, expected a folder, or a new one in a folder that exists, which "
        with pytest.raises(ParameterError, match=f"{expected}{tmp_path}/{parent} is not"):
            parse_disk("op", "name", f"{tmp_path}/{parent}/new:1GiB")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
