"""Beyond a cache's memory: pages that it forgets fall to the host's memory and on to a disk."""

from pykv.tiers.counters import Counters, Flow
from pykv.tiers.stack import Tiers

__all__ = ["Counters", "Flow", "Tiers"]
