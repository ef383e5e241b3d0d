"""One file over HTTP: resumed, tried again, and held against its SHA-256.

By `requests`, which gguf needs as well: it knows proxies, .netrc and credentials in a URL, and
drops credentials where a redirect leaves the host. pip is not asked: not every environment has it,
and `python -m pip` runs a pip.py of the current folder. Nor is huggingface_hub, which knows one hub
and compares sizes alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pykv.errors import FetchError, ParameterError
from pykv.number_texts import whole_of
from pykv.terminal import visible

LARGEST = 1 << 36  # limit in bytes for a file of unknown size; hubs hold smaller ones
PAGE = 1 << 26  # limit in bytes for a page read into memory
PIECE = 1 << 16  # bytes; a broken connection loses at most one piece
TIMEOUT = 30.0  # seconds without an answer, or without a byte of one
PAUSES = (1.0, 4.0, 10.0)  # seconds before each retry; any byte received starts over


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
        url: where it is; never shown with credentials or a query.
        sha256: what it must have, in hexadecimal digits; None where nobody says.
        size: in bytes, None where the server does not say.
        tag: the server's word for this version of the file, if it has one.
        headers: that each request carries.
    """

    url: str
    sha256: str | None = None
    size: int | None = None
    tag: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def part_name(self) -> str:
        """The name of what has arrived so far: this version of this file, and no other's."""
        version = self.sha256 or f"{self.url} {self.tag} {self.size}"
        return f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.part"


def probe(url: str, sha256: str | None = None, headers: dict[str, str] | None = None) -> Remote:
    """What a server says of a file, without its bytes.

    Hugging Face states the SHA-256 of a large file on the way, in X-Linked-ETag.

    Raises:
        FetchError: there is no such file, or no answer; or nobody states a SHA-256, and an https
            address leads to one without encryption, or the server does not state the size.
    """
    with answer(url, headers) as response:
        passed = [*response.history, response]
        if not sha256:
            _check_encrypted(url, passed)
        linked = [hop.headers.get("X-Linked-ETag", "").strip('"') for hop in passed]
        stated = [tag for tag in linked if re.fullmatch("[0-9a-f]{64}", tag)]
        sha256 = sha256 or (stated[0] if stated else None)
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        length = None if encoded else whole_of(response.headers.get("Content-Length", ""))
        if not sha256 and length is None:
            raise FetchError(
                f"{shown(url)} comes without its size, expected that or #sha256=... behind the "
                "address: nothing would tell a file that is cut short"
            )
        tag = response.headers.get("ETag", "")
        return Remote(
            url,
            sha256,
            length,
            tag if tag and not tag.startswith("W/") else None,  # weak: not the same bytes
            headers or {},
        )


def _check_encrypted(url: str, passed: list[Any]) -> None:
    """Refuse the answers that an https address has led through if one came without encryption."""
    for hop in passed if url.startswith("https:") else ():
        if not hop.url.startswith("https:"):
            raise FetchError(
                f"{shown(url)} leads to {shown(hop.url)}, expected https; #sha256=... behind the "
                "address would do instead"
            )


def receive(remote: Remote, part: Path, show: Callable[[int], object]) -> str:
    """Download a file, going on where an earlier attempt ended.

    Args:
        remote: from `probe`.
        part: where the bytes go; kept when the connection is lost, deleted when they are wrong.
        show: called with the number of bytes that are there, again and again.

    Returns:
        The SHA-256.

    Raises:
        FetchError: the server cannot be reached, has another file than it should, or leads to one
            without encryption as of `probe`.
        OSError: `part` cannot be written.
    """
    pauses, most = iter(PAUSES), 0
    while True:
        digest, have = _kept(remote, part)
        try:
            if have != remote.size or not part.exists():
                digest, have = _append(remote, part, digest, have, show)
            lost = f"the connection ended after {have:,} of {remote.size or have:,} bytes"
        except ConnectionError as error:
            lost, have = str(error), part.stat().st_size if part.exists() else 0
        else:
            if have >= (remote.size or 0):
                break
        if have > most:
            pauses, most = iter(PAUSES), have
        pause = next(pauses, None)
        if pause is None:
            raise FetchError(f"cannot fetch {shown(remote.url)}: {lost}; what arrived is kept")
        time.sleep(pause)
    found = str(digest.hexdigest())
    if found != (remote.sha256 or found) or have != (remote.size or have):
        part.unlink()
        size = f"{remote.size:,}" if remote.size else f"at most {LARGEST:,}"
        raise FetchError(
            f"{shown(remote.url)} has {have:,} bytes of SHA-256 {found}, expected {size} of "
            f"{remote.sha256 or 'any'}; nothing was kept"
        )
    return found


def _kept(remote: Remote, part: Path) -> tuple[Any, int]:
    """Digest and number of the bytes of an earlier attempt, where the rest is known to continue
    them."""
    may_resume = remote.size is not None and bool(remote.sha256 or remote.tag)
    if not (may_resume and part.exists() and part.stat().st_size <= (remote.size or 0)):
        return hashlib.sha256(), 0
    with part.open("rb") as file:
        return hashlib.file_digest(file, "sha256"), file.tell()


def _append(
    remote: Remote, part: Path, digest: Any, have: int, show: Callable[[int], object]
) -> tuple[Any, int]:
    """Write what one answer brings behind the bytes that are there; digest and number of all."""
    headers = dict(remote.headers)
    if have:
        headers["Range"] = f"bytes={have}-"
        if remote.tag:
            headers["If-Range"] = remote.tag
    with _answer(remote.url, headers) as response:
        if not remote.sha256:  # each request may lead to another mirror
            _check_encrypted(remote.url, [*response.history, response])
        if response.status_code == 200:  # the server ignores ranges, or has another file now
            digest, have = hashlib.sha256(), 0
        elif not _continues(response, remote, have):
            part.unlink(missing_ok=True)  # else each retry would ask for the same range
            raise ConnectionError("the server sends another range or version")
        with part.open("ab" if have else "wb") as file:
            show(have)
            for piece in response.iter_content(PIECE):
                file.write(piece)
                digest.update(piece)
                have += len(piece)
                show(have)
                if have > (remote.size or LARGEST):
                    break
    return digest, have


def _continues(response: Any, remote: Remote, have: int) -> bool:
    """Whether a partial answer goes on behind the bytes that are there, in the same version."""
    of_range = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return of_range and response.headers.get("ETag", remote.tag) in (remote.tag, None)


@contextmanager
def answer(url: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The answer of a server, as `requests` has it.

    Raises:
        FetchError: there is none, or it is no success.
    """
    try:
        with _answer(url, headers or {}) as response:
            yield response
    except ConnectionError as error:
        raise FetchError(f"cannot fetch {shown(url)}: {error}") from error


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """As `answer`, but a failure that may pass is a ConnectionError, then or while the body is
    read."""
    import requests

    headers = {"Accept-Encoding": "identity", **headers}  # sizes and ranges count bytes of the file
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            words = visible(response.reason or "")[:80]
            status = f"the server answers {response.status_code} {words}"
            if response.status_code >= 500 or response.status_code == 429:
                raise ConnectionError(status)
            if response.status_code in (401, 403):
                status += " (Hugging Face lets in who sets HF_TOKEN)"
            if response.status_code not in (200, 206, *[416] * ("Range" in headers)):
                raise FetchError(f"cannot fetch {shown(url)}: {status}")
            yield response
    except (requests.RequestException, ValueError) as error:  # ValueError: of a bad redirect
        reason = getattr(error.args[0] if error.args else error, "reason", error)
        raise ConnectionError(" ".join(str(reason).split())) from error


def body(response: Any) -> bytes:
    """A page that `answer` gave.

    Raises:
        FetchError: it has more than PAGE bytes.
    """
    read = bytearray()
    for piece in response.iter_content(PIECE):
        read += piece
        if len(read) > PAGE:
            raise FetchError(f"{shown(response.url)} has more than the {PAGE:,} bytes expected")
    return bytes(read)


def named_address(variable: str, usual: str) -> str:
    """The http(s) address that a variable of the environment names, else the usual one, without a
    slash at its end.

    Raises:
        ParameterError: the variable has something else.
    """
    url = (os.environ.get(variable) or usual).strip().rstrip("/")
    if host_of(url) is None:
        raise ParameterError(f"{variable} is {shown(url)!r}, expected https://... or http://...")
    return url


def host_of(url: str) -> str | None:
    """The host of an http(s) address; None where it is none, which errors of `requests` would
    repeat with its credentials."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return None
    return parts.hostname or None if fits else None


def shown(url: str) -> str:
    """A URL without what nobody should read in a log: credentials, query and fragment. Of what is
    no URL, too."""
    return re.sub("^([a-zA-Z]*://)?([^/?#]*@)?", r"\1", re.split("[?#]", url, maxsplit=1)[0])
