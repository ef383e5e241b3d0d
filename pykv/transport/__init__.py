"""Moves pages between processes: one computes prompts, another answers them.

Local      processes of one machine, through shared memory
Nixl       processes of several machines, through NVIDIA's NIXL
Handover   an LLM's pages, through either
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from pykv.transport.interface import Transport, wait_for
from pykv.transport.local import Local
from pykv.transport.messages import Message
from pykv.transport.region import PeerRegion, Region

if _TYPE_CHECKING:
    from pykv.transport.handover import Handover
    from pykv.transport.nixl import Nixl

__all__ = ["Handover", "Local", "Message", "Nixl", "PeerRegion", "Region", "Transport", "wait_for"]

_LATER = {"Handover": "handover", "Nixl": "nixl"}  # lazy: need the extras `llm` and `nixl`


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return getattr(_import_module(f"pykv.transport.{_LATER[name]}"), name)
    raise AttributeError(f"module 'pykv.transport' has no attribute {name!r}")
