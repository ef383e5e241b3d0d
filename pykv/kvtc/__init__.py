"""KVTC: caches as few bits of their principal components, by what one calibration of a model found.

    artefact = pykv.kvtc.calibrate("smollm2-135m", texts, out="smollm2.kvtc")   once, minutes
    artefact = pykv.kvtc.Artefact.load("smollm2.kvtc")

    v0         the operations and the stream of NVIDIA Dynamo's kvbm-kernels: rows of blocks
    stream_v0  that stream: ranges of coefficients, sizes, headers

Source: KV Cache Transform Coding (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815).
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from pykv.kvtc.artefact import Artefact, Fingerprint, Group, Plan, Side, Text

if _TYPE_CHECKING:
    from pykv.kvtc.calibration import calibrate, compare_coders

__all__ = [
    "Artefact",
    "Fingerprint",
    "Group",
    "Plan",
    "Side",
    "Text",
    "calibrate",
    "compare_coders",
]


def __getattr__(name: str) -> _Any:
    if name in ("calibrate", "compare_coders"):  # need the extra `llm`, so imported when used
        return getattr(_import_module("pykv.kvtc.calibration"), name)
    raise AttributeError(f"module 'pykv.kvtc' has no attribute {name!r}")
