"""KVTC: caches as few bits of their principal components, by what one calibration of a model found.

Source: KV Cache Transform Coding (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815).
"""

from pykv.kvtc.artefact import Artefact, Fingerprint, Group, Plan, Side, Text

__all__ = ["Artefact", "Fingerprint", "Group", "Plan", "Side", "Text"]
