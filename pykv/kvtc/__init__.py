"""KVTC: caches as few bits of their principal components, by what one calibration of a model found.

    artefact = pykv.kvtc.calibrate("smollm2-135m", texts, out="smollm2.kvtc")   once, minutes
    artefact = pykv.kvtc.Artefact.load("smollm2.kvtc")

    codec = pykv.kvtc.Codec(artefact, 16, xp)         sixteen times smaller, on the CPU or a GPU
    coded = codec.compress(cache, table, positions)   tokens of a sequence, from its pages
    codec.decompress(pykv.kvtc.parse(coded.to_bytes()), cache, table)

    v0         the operations and the stream of NVIDIA Dynamo's kvbm-kernels: rows of blocks
    stream_v0  that stream: ranges of coefficients, sizes, headers

Source: KV Cache Transform Coding (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815).
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from pykv.kvtc.artefact import Artefact, Fingerprint, Group, Plan, Side, Text
from pykv.kvtc.codec import Codec
from pykv.kvtc.stream import Coded, Header, parse

if _TYPE_CHECKING:
    from pykv.kvtc.calibration import calibrate, compare_coders, v0_configs

__all__ = [
    "Artefact",
    "Coded",
    "Codec",
    "Fingerprint",
    "Group",
    "Header",
    "Plan",
    "Side",
    "Text",
    "calibrate",
    "compare_coders",
    "parse",
    "v0_configs",
]


def __getattr__(name: str) -> _Any:
    if name in ("calibrate", "compare_coders", "v0_configs"):
        # They need the extra `llm`, so they are imported when used.
        return getattr(_import_module("pykv.kvtc.calibration"), name)
    raise AttributeError(f"module 'pykv.kvtc' has no attribute {name!r}")
