"""The CUDA layer: devices, compilation, launches. Importing it touches no driver.

    devices    the GPUs present, the current one, streams of any library
    compiler   kernels_cu/<stem>.cu to a cubin for an SM, kept in the cache folder
    launch     kernels by name, and launches with the parameters that the .cu file declares
    driver     the driver's launches: the one seam, where tests substitute another machine
    calls      plain and prepared calls
    graphs     calls of many launches as CUDA graphs
    replay     calls of several launches, traced once for each layout
    peers      several GPUs: peer access, order between their streams

PYKV_ARCH replaces the SM of the current GPU: with compute_52 a newer GPU runs, through PTX, the
code that an M40 gets, `__CUDA_ARCH__` included.
"""

from pykv.cache_folder import cache_dir
from pykv.cuda.calls import (
    UPLOADS,
    Prepared,
    enqueue,
    hold,
    is_capturing,
    is_preparing,
    look,
    prepare,
    refuse_capture,
    refuse_copy,
    refuse_prepare,
    refuse_repeat,
    run_on_host,
    skip,
)
from pykv.cuda.compiler import (
    KERNELS,
    by_sm,
    clear_cubins,
    compile,
    cubin_dir,
    cubins,
    is_cached,
    nvrtc_version,
    source,
    stems,
    variants,
    warmup,
)
from pykv.cuda.devices import (
    architectures,
    array_module,
    behind,
    check_stream,
    current_arch,
    current_device,
    current_sm,
    device_name,
    has_driver,
    num_sms,
    on_stream,
    order_streams,
    pick_device,
    sm_shared_bytes,
    stream_handle,
    synchronize,
    use_device,
)
from pykv.cuda.graphs import GraphMemory, graph
from pykv.cuda.launch import (
    MOST_BLOCKS,
    Kernel,
    Launch,
    active_clusters,
    cooperative_blocks,
    divisor,
    kernel,
    signature,
)
from pykv.cuda.peers import (
    beside,
    can_reach,
    cross,
    enable_peer_access,
    follow,
    gpu_pair,
    homes,
    uses_others,
)
from pykv.cuda.replay import replayed
