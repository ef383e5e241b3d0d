"""LLM on one of several GPUs, whichever of them is the current one."""

from types import SimpleNamespace

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, DeviceError, UnsupportedError
from pykv.llm import LLM
from tests.llm.conftest import spare_simt
from tests.llm.test_model import greedy


@pytest.fixture
def gpus(device, monkeypatch):
    """(module, a GPU, another one). On the SIMT machine arrays are on its one GPU whatever is the
    current one, but no op takes them while another one is."""
    if device.__name__ == "tests.simt.cupy":
        spare_simt(monkeypatch)
        monkeypatch.setattr(cuda, "array_module", lambda name: device)
        return device, device.DEVICE, device.DEVICE + 1
    if device.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    return device, 1, 0


def test_all_work_is_on_the_gpu_that_was_asked_for(gpus, tiny_paths, rng):
    cupy, here, other = gpus
    prompt = rng.integers(3, 250, 12).tolist()
    with cupy.cuda.Device(here):
        plain = LLM(tiny_paths / "llama.gguf", device=f"cuda:{here}")
        (want,), logits = plain.generate([prompt], greedy(4)), plain.logits(prompt)
        perplexity = plain.perplexity(prompt)

    with cupy.cuda.Device(other):
        llm = LLM(tiny_paths / "llama.gguf", device=f"cuda:{here}", prefix_cache=False)
        assert cuda.current_device() == other
        for array in (llm.model.head, llm.model.layers[0].qkv, llm.cache.k, llm.cache.v):
            assert array.data.device_id == here
        assert llm.generate([prompt], greedy(4)) == [want]
        assert cuda.current_device() == other
        pieces = []
        for piece in llm.stream(prompt, greedy(4)):
            assert cuda.current_device() == other
            pieces.append(piece)
        assert "".join(pieces) == want.text
        unfinished = llm.stream(prompt, greedy(4))
        next(unfinished)
        unfinished.close()
        assert cuda.current_device() == other
        np.testing.assert_array_equal(llm.logits(prompt), logits)
        assert llm.perplexity(prompt) == perplexity
        with pytest.raises(CapacityError):
            llm.generate([[5] * llm.context])
        assert cuda.current_device() == other
        assert llm.cache.k.data.device_id == here  # it has grown


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_turns_of_several_streams(device, tiny_paths, monkeypatch):
    """A thread may have a current stream of its own: its turn waits for the one before."""
    monkeypatch.setattr(cuda, "array_module", lambda name: device)
    done = []
    monkeypatch.setattr(device.Event, "record", lambda event, stream: done.append(("end", stream)))
    streams = [
        SimpleNamespace(ptr=i, wait_event=lambda event, i=i: done.append(("wait", i)))
        for i in range(3)
    ]
    monkeypatch.setattr(device.cuda, "get_current_stream", lambda: streams[0])
    llm = LLM(tiny_paths / "llama.gguf", device=f"cuda:{device.DEVICE}", weights="fp32")
    assert done[-1] == ("end", streams[0])
    for i in (1, 2):
        done.clear()
        monkeypatch.setattr(device.cuda, "get_current_stream", lambda i=i: streams[i])
        with llm.turn():
            assert done == [("wait", i)]
        assert done[1:] == [("end", streams[i])]


@pytest.mark.gpu
def test_a_turn_sees_what_another_stream_did(tiny_paths):
    import cupy

    llm = LLM(tiny_paths / "llama.gguf", device="cuda", weights="fp32")
    slow, found = cupy.zeros(1 << 26, np.float32), cupy.zeros(1, np.float32)
    cupy.cuda.Device().synchronize()
    first, then = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with first, llm.turn():
        for _ in range(50):
            slow += 1
    with then, llm.turn():
        found[:] = slow[-1:]
        then.synchronize()
    assert found.get() == [50]


@pytest.mark.parametrize("beyond", [0, 7])
def test_a_gpu_that_is_not_there_is_refused(device, tiny_paths, beyond):
    pytest.importorskip("cuda.core")
    count = device.cuda.runtime.getDeviceCount()
    name = f"cuda:{count + beyond}"
    with pytest.raises(
        DeviceError, match=f"^device is '{name}', expected cuda:0 to cuda:{count - 1}$"
    ):
        LLM(tiny_paths / "llama.gguf", device=name)


def test_an_answer_is_no_prepared_call(tiny_paths):
    llm = LLM(tiny_paths / "llama.gguf", device="cpu")
    for method in (llm.generate, llm.stream, llm.logits, llm.perplexity):
        with pytest.raises(UnsupportedError, match=f"LLM.{method.__name__}: cannot be prepared"):
            cuda.prepare(method, [5, 6, 7])


def test_a_device_that_is_refused_before_the_model_is_looked_for():
    with pytest.raises(DeviceError, match="'cpu', here the CPU, expected a GPU of sm_80 or newer"):
        LLM("no such file", device="cpu", require_sm=80)
