"""Tiers below a cache: pages that it forgets are kept in host memory and on disk."""

from pykv.tiers.counters import Counters, Flow
from pykv.tiers.stack import Tiers

__all__ = ["Counters", "Flow", "Tiers"]
