"""How this pykv was installed, hence the command that adds one of its extras.

Every module imports this one for the texts of its errors, so what only they need is imported where
it is used: sockets and email parsers, by way of urllib and importlib.metadata, take 30 ms.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from shlex import quote

from pykv.errors import InstallError

NAME = "pykv-cuda"


@cache
def command(extra: str) -> str:
    """The command that adds an extra of pyproject.toml, such as "cu13": of uv where uv installed
    pykv, as its environments have no pip, else of pip.

    Both record in direct_url.json (PEP 610) where they took a distribution from, unless that was an
    index. A source tree on sys.path that was never installed has no record at all.
    """
    import json
    from importlib import metadata

    try:
        found = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        tree = Path(__file__).resolve().parents[1]
        return f"pip install -e {quote(f'{tree}[{extra}]')}"
    tool = "uv pip" if (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    record = json.loads(found.read_text("direct_url.json") or "{}")
    return f"{tool} install {_from_record(record, extra)}"


def _from_record(record: dict[str, object], extra: str) -> str:
    url = str(record.get("url", ""))
    match record:
        case {"dir_info": {"editable": True}}:
            return f"-e {quote(f'{_path(url)}[{extra}]')}"
        case {"dir_info": _}:
            return quote(f"{_path(url)}[{extra}]")
        case {"vcs_info": {"vcs": vcs, "commit_id": commit}}:
            return quote(f"{NAME}[{extra}] @ {vcs}+{url}@{commit}")
        case {"archive_info": _}:
            return quote(f"{NAME}[{extra}] @ {url}")
    return quote(f"{NAME}[{extra}]")


def _path(url: str) -> str:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return url2pathname(urlsplit(url).path)


def cuda_advice(error: ImportError) -> str:
    """What an import of the CUDA packages lacked, in one line, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        name = "cuda-core" if error.name == "cuda" else error.name or error
        return f"{name} is not installed: {command('cu13')} (or [cu12])"
    reason = " ".join(str(error).replace("=", " ").split())
    return f"the CUDA packages are installed but broken: {reason}; see `pykv doctor`"


def require(extra: str, *packages: str) -> list[str]:
    """The folders of packages that an extra brings, without importing them.

    Raises:
        InstallError: one is not installed.
    """
    from importlib.util import find_spec

    folders = []
    for package in packages:
        try:
            spec = find_spec(package)
        except ValueError:  # sys.modules holds None or a stub for it
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise InstallError(f"{package} is not installed: {command(extra)}", name=package)
        folders.append(spec.submodule_search_locations[0])
    return folders
