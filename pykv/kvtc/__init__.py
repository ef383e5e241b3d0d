"""KVTC: caches as few bits of their principal components, by what one calibration of a model found.

Source: KV Cache Transform Coding (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815).
"""

from pykv.kvtc.artefact import Artefact, Fingerprint, Group, Plan, Side, Text
from pykv.kvtc.codec import Codec
from pykv.kvtc.stream import Coded, Header, parse

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
    "parse",
]
