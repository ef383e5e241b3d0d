"""KVTC: transform coding of KV caches, with a basis that one calibration of a model finds.

    artefact = pykv.kvtc.calibrate("smollm2-135m", texts, out="smollm2.kvtc")   once, minutes
    artefact = pykv.kvtc.Artefact.load("smollm2.kvtc")

    codec = pykv.kvtc.Codec(artefact, 16, xp)         16 times fewer bytes, on the CPU or a GPU
    coded = codec.compress(cache, table, positions)   tokens of a sequence, from its pages
    codec.decompress(pykv.kvtc.parse(coded.to_bytes()), cache, table)

    v0         the operations of NVIDIA Dynamo's kvbm-kernels: a row is a block
    stream_v0  their stream: ranges of coefficients, sizes, headers

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
        # They need the extra `llm`, so their import waits for the first use.
        return getattr(_import_module("pykv.kvtc.calibration"), name)
    raise AttributeError(f"module 'pykv.kvtc' has no attribute {name!r}")
