"""torch tensors as arguments of ops: as arrays, on torch's current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pykv import cuda, install
from pykv.errors import DeviceError
from pykv.foreign import named_array

install.require("torch", "torch")

import torch  # noqa: E402


@contextmanager
def place_of(op: str, **tensors: Any) -> Iterator[None]:
    """A context for work on tensors: their GPU is the current one, and pykv uses torch's current
    stream.

    Args:
        op: for errors.
        tensors: by name; None for absent ones.

    Raises:
        DeviceError: they are on several devices, or on one that is neither a CPU nor an NVIDIA GPU.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    (first, x), *others = given.items()
    if x.device.type not in ("cpu", "cuda") or torch.version.hip:
        raise DeviceError(f"{op}: {first} is on device {x.device}, expected one on cpu or cuda")
    for name, other in others:
        if other.device != x.device:
            raise DeviceError(
                f"{op}: {name} is on device {other.device}, expected {x.device} like {first}"
            )
    if x.device.type == "cpu":
        yield
    else:
        with torch.cuda.device(x.device), cuda.on_stream(torch.cuda.current_stream(x.device)):
            yield


def codes_of(op: str, name: str, x: Any) -> Any:
    """A tensor as an array; FP8 tensors become their codes, uint8. None stays None."""
    if x is None:
        return None
    is_fp8 = x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return named_array(op, name, x.view(torch.uint8) if is_fp8 else x)
