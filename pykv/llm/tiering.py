"""The tiers of a model's cache: whether they make sense, and what their files depend on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import cuda
from pykv.arrays import to_host
from pykv.errors import CapacityError, ParameterError, quoted
from pykv.kvtc import Codec
from pykv.llm import memory
from pykv.llm.sessions import facts, open_codec
from pykv.page_arrays import given_scales
from pykv.tiers import Tiers
from pykv.tiers.sizes import Limit, artefact_of, parse_disk, parse_host

if TYPE_CHECKING:
    from pykv.llm.generate import LLM


def check_tiers(op: str, host: Any, disk: Any, prefix_cache: bool) -> None:
    """Check what can be checked before a model is read.

    Raises:
        ParameterError, DtypeError: see pykv.tiers.sizes; or there is no prefix cache, or no file of
            an artefact.
        CapacityError: the host has not as much memory free, which it may hand out all the same.
    """
    given = [name for name, x in (("host_cache", host), ("disk_cache", disk)) if x is not None]
    if given and not prefix_cache:
        raise ParameterError(f"{op}: {given[0]} is given, expected none without a prefix_cache")
    if host is not None:
        limit = parse_host(op, "host_cache", host)
        _check_free(op, limit)
        _check_artefact(op, "host_cache", limit)
    if disk is not None:
        _check_artefact(op, "disk_cache", parse_disk(op, "disk_cache", disk))


def _check_artefact(op: str, name: str, limit: Limit) -> None:
    found = artefact_of(limit.codec)
    if found is not None and not os.path.isfile(found[0]):
        raise ParameterError(f"{op}: {name}'s artefact is {quoted(found[0])}, expected a file")


def _check_free(op: str, limit: Limit) -> None:
    free = memory.free(np)
    if free is not None and limit.nbytes > free:
        raise CapacityError(
            f"{op}: host_cache asks for {limit.nbytes:,} bytes, but the host has {free:,} free"
        )


def open_tiers(llm: LLM, host: Any, disk: Any) -> Tiers | None:
    """The tiers of a model's cache; None where it has none."""
    if host is None and disk is None:
        return None
    if host is not None:  # again, now that the weights are loaded
        _check_free("LLM", parse_host("LLM", "host_cache", host))

    def opened(name: str, codec: str, xp: Any) -> Codec:
        made = open_codec("LLM", codec, llm, name=f"{name}'s codec", xp=xp)
        assert made is not None
        return made

    return Tiers(
        llm.cache,
        host=host,
        disk=disk,
        identity=identity(llm),
        open_codec=opened,
        hadamard=llm.model.hadamard,
    )


def identity(llm: LLM) -> dict[str, str]:
    """What keys and values depend on beside tokens: what sessions compare; scales that are found
    once; and the sort of device, as sums in another order differ in their last bits. Not the
    layout, which files of tiers do not depend on."""
    scales = hashlib.sha256()
    for x in given_scales(llm.cache).values():
        scales.update(np.ascontiguousarray(to_host(x)).tobytes())
    device = "cpu" if llm.xp is np else cuda.current_arch()
    found = {name: text for name, text in facts(llm, 0).items() if name not in ("format", "pages")}
    spec = str(replace(llm.cache.spec, layout="NHD"))
    return found | dict(spec=spec, scales=scales.hexdigest(), device=device)
