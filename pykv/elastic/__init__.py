"""The interface of the Elastic KV core, as an adapter; new code takes `ops.compaction`,
`ops.bandwidth` and `pykv bench`.

Names and parameters are those of its C functions. What they return are the measured samples
themselves and figures made of these; nothing is timed at `repetitions=0`. Where it had

    a stream of each call's own    the caller's stream orders the work; timings are on a stream of
                                   their own, and wait before and after
    a block size                   `vectors`, the loads that a thread has in flight
    architecture tags              `gpu_info`, which says what the tags would choose
    compaction as its baseline     `inference_cycle` sets attention over the kept keys beside
                                   attention over all of them, by the same kernels

>>> kv = np.array([[3, 0.5], [-2, 0]], np.float32)
>>> kept = pykv.elastic.compress(kv, 1)
>>> kept.values[: kept.kept()], kept.indices[: kept.kept()], kept.avg_ms
(array([ 3., -2.], dtype=float32), array([0, 2], dtype=int32), None)
>>> pykv.elastic.expand(kept.values, kept.indices, kv.size, count=kept.count)
array([ 3.,  0., -2.,  0.], dtype=float32)
"""

from pykv.elastic.compaction import CompressResult, compress
from pykv.elastic.cycle import Cycle, inference_cycle
from pykv.elastic.rates import (
    Throughput,
    compute_throughput,
    gpu_info,
    mem_bandwidth,
    mem_bandwidth_batched,
)
from pykv.elastic.timed import Timed
from pykv.ops.compaction import expand

__all__ = [
    "CompressResult",
    "Cycle",
    "Throughput",
    "Timed",
    "compress",
    "compute_throughput",
    "expand",
    "gpu_info",
    "inference_cycle",
    "mem_bandwidth",
    "mem_bandwidth_batched",
]
