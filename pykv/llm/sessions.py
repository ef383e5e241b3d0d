"""A conversation in a file: its token ids, the pages of those that are computed, its messages.

A file is one of pykv.tensor_files with

    tokens    i32 [T]       of the whole conversation
    messages  u8 [n]        JSON, UTF-8; not there where a text or token ids were saved
    pages                   of the first tokens, see pykv.page_files

Its facts are those of pages, and of what computed them: a SHA-256 that names the model, and the
dtype of its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pykv import cuda, stored_pages, tensor_files, whole_files
from pykv.errors import CapacityError, FormatError, ParameterError, PykvError, quoted
from pykv.kvtc.artefact import Artefact
from pykv.kvtc.codec import Codec
from pykv.kvtc.stream import parse
from pykv.llm.chat import chat_ids, check_messages
from pykv.llm.prompts import read_ids
from pykv.llm.sequence_pages import SequencePages
from pykv.number_texts import counted
from pykv.page_arrays import check_codec, facts_of
from pykv.pages import swap_in
from pykv.tiers.sizes import artefact_of

if TYPE_CHECKING:
    from pykv.llm.generate import LLM

FORMAT = "pykv.session.2"


class Session(NamedTuple):
    """A conversation that was loaded.

    Attributes:
        token_ids: of all of it.
        messages: of all of it; None where a text or token ids were saved.
        cached_tokens: how many of the first tokens no call computes again.
    """

    token_ids: list[int]
    messages: list[dict[str, Any]] | None
    cached_tokens: int


def holds_messages(op: str, path: Path) -> bool:
    """Whether a file of a session holds messages, by its header alone: no model is needed.

    Raises:
        FormatError: it is no session.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return "messages" in tensor_files.read_header(op, file, path, "session", FORMAT).table


def conversation(
    llm: LLM, prompt: Any, variables: Mapping[str, Any] | None
) -> tuple[list[int], Sequence[Any] | None]:
    """Token ids of what LLM.save was given, and its messages: None of a text or token ids."""
    if isinstance(prompt, list | tuple) and any(isinstance(x, Mapping) for x in prompt):
        if variables is None or isinstance(variables, Mapping):  # chat_ids refuses others
            variables = {"add_generation_prompt": False, **(variables or {})}
        return chat_ids(llm.file, llm.tokenizer, prompt, template_variables=variables), prompt
    if variables is not None:
        given = f"template_variables is {quoted(variables)}"
        raise ParameterError(f"LLM.save: {given}, expected None without messages")
    return read_ids(llm, "prompt", prompt), None


def save(
    llm: LLM,
    shared: SequencePages,
    path: str | os.PathLike[str],
    ids: list[int],
    messages: Sequence[Any] | None,
    codec: Codec | str | None,
) -> int:
    """Write a file; returns how many tokens it keeps the pages of. See LLM.save."""
    op, cache = "LLM.save", llm.cache
    path, codec = _checked(op, llm, shared, path, codec)
    arrays = {"tokens": np.array(ids, np.int32)}
    if messages is not None:
        arrays["messages"] = np.frombuffer(json.dumps([*map(dict, messages)]).encode(), np.uint8)
    mixed = codec is not None and llm.model.hadamard
    with llm.turn(), shared.known(ids) as pages:
        arrays |= stored_pages.fetch(cache, pages, codec, hadamard=mixed)
        metadata, kept = facts(llm, len(pages)), len(pages) * cache.page_size
        metadata["exact"] = str(int(llm.is_exact))
    tensor_files.write(path, metadata, arrays, private=True)
    return kept


def load(
    llm: LLM, shared: SequencePages, path: str | os.PathLike[str], codec: Codec | str | None
) -> Session:
    """Read a file and put its pages into the cache. See LLM.load."""
    op, cache = "LLM.load", llm.cache
    path, codec = _checked(op, llm, shared, path, codec)
    with llm.turn():
        with open(path, "rb") as file:
            header = tensor_files.read_header(op, file, path, "session", FORMAT)
            tensor_files.check_facts(op, path, header, facts(llm, 0), ("pages",))
            count, exact = (header.number(op, path, name) for name in ("pages", "exact"))
            tokens = np.empty(header.length(op, path, "tokens"), np.int32)
            kept = count * cache.page_size
            if kept > len(tokens):
                raise FormatError(
                    f"{op}: {path} has {counted(count, 'page')} of {counted(len(tokens), 'token')}"
                )
            if kept > llm.context:
                raise CapacityError(
                    f"{op}: {path} has pages of {counted(kept, 'token')}, expected at most the "
                    f"context of {llm.context}"
                )
            more = {"tokens": tokens}
            if "messages" in header.table:
                more["messages"] = np.empty(header.length(op, path, "messages"), np.uint8)
            is_coded = "stream" in header.table
            if is_coded:
                more["stream"] = np.empty(header.length(op, path, "stream"), np.uint8)
                tensor_files.read_arrays(op, file, path, header, more)
                put = _put_coded(op, path, more["stream"], kept, llm, codec)
            else:
                stored = stored_pages.take(op, file, path, header, cache, count, more)
                stored_pages.check_scales(op, path, stored, cache)
                put = partial(stored_pages.put, cache, stored=stored)
        ids = _token_ids(op, path, tokens, llm.model.config.vocab)
        messages = _messages(op, path, more["messages"]) if "messages" in more else None
        if is_coded or not exact:
            if llm.tiers is not None and llm.tiers.folder is not None:
                return Session(ids, messages, 0)  # its files hold what models computed
            llm.is_exact = False
        if is_coded:
            with shared.known(ids[:kept]):  # exact pages of a tier come first; `new` finds them
                pass
        with shared.new(ids[:kept]) as pages:
            put(pages)
    return Session(ids, messages, kept)


def _put_coded(
    op: str, path: Path, stream: Any, tokens: int, llm: LLM, codec: Codec | None
) -> Callable[[list[int]], None]:
    """A function that decodes a stream of so many tokens into pages.

    Raises:
        FormatError: it is damaged, or coded otherwise.
    """
    try:
        coded = parse(stream)
    except FormatError as error:
        raise FormatError(f"{op}: {path}: {error}") from None
    header, cache = coded.header, llm.cache
    if codec is None:
        has = f"{path} is coded by artefact {header.artefact} at ratio {header.ratio}"
        raise FormatError(f"{op}: {has}, expected a codec of these (--session-codec)")
    for name, want in vars(codec.header(tokens, cache.spec)).items():
        has = getattr(header, name)
        if has != want:
            raise FormatError(f"{op}: {path} is coded with {name}={has}, expected {want}")
    if not np.array_equal(coded.arrays()["positions"], np.arange(tokens)):
        raise FormatError(f"{op}: {path} is coded with positions other than 0 to {tokens - 1}")

    def put(pages: list[int]) -> None:
        swap_in(cache, pages, coded.to(llm.xp), codec=codec, hadamard=llm.model.hadamard)
        stored_pages.wait(cache)

    return put


def open_codec(
    op: str, codec: Any, llm: LLM, *, name: str = "codec", xp: Any = None
) -> Codec | None:
    """A codec of a model's caches; a text names the file of an artefact, and a ratio; `xp` is where
    it works, the LLM's device by default.

    Raises:
        ParameterError: the text is no such text, or the artefact is of another model.
        DtypeError: it is neither.
        FormatError, OSError: the file is none, or cannot be read.
    """
    if isinstance(codec, str):
        found = artefact_of(codec)
        if found is None:
            raise ParameterError(f"{op}: {name} is {quoted(codec)}, expected FILE:RATIO")
        path, ratio = found
        with llm.turn():
            codec = Codec(Artefact.load(path), ratio, xp or llm.xp)
    check_codec(op, codec, False)
    made: Codec | None = codec
    if made is not None:
        difference = made.model.difference(llm.fingerprint)
        if difference:
            raise ParameterError(f"{op}: {name} is of a model with {difference}")
    return made


def _checked(
    op: str, llm: LLM, shared: SequencePages, path: Any, codec: Any
) -> tuple[Path, Codec | None]:
    """A path and a codec of a call."""
    cuda.refuse_prepare(op, "it reads or writes a file")
    if not shared.prefix_cache:
        raise ParameterError(f"{op}: prefix_cache is False, expected an LLM that keeps pages")
    return whole_files.regular_path(op, path), open_codec(op, codec, llm)


def facts(llm: LLM, count: int) -> dict[str, str]:
    """What a file with so many pages says of itself."""
    config = llm.model.config
    keys = {k: v for k, v in llm.file.metadata.items() if k.startswith(f"{config.architecture}.")}
    model = [llm.fingerprint.sha256, llm.contents, keys]
    found = {name: str(fact) for name, fact in facts_of("LLM", "cache", llm.cache).items()}
    return found | dict(
        format=FORMAT,
        pages=str(count),
        model=hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        weights=llm.weights_dtype,
    )


def _token_ids(op: str, path: Path, tokens: Any, vocab: int) -> list[int]:
    wrong = (tokens < 0) | (tokens >= vocab)
    if wrong.any():
        raise FormatError(
            f"{op}: {path} has token id {tokens[wrong][0]}, expected 0 to {vocab - 1}"
        )
    ids: list[int] = tokens.tolist()
    return ids


def _messages(op: str, path: Path, data: Any) -> list[dict[str, Any]]:
    try:
        messages = json.loads(data.tobytes())
        check_messages(messages)
    except (ValueError, RecursionError, PykvError) as error:
        raise FormatError(f"{op}: {path} has messages that are none: {error}") from None
    found: list[dict[str, Any]] = messages
    return found
