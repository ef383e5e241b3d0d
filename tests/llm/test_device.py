"""LLM on one of several GPUs, whichever of them is the current one."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import CapacityError, DeviceError, UnsupportedError
from pykv.llm import LLM
from tests.llm.test_model import greedy


@pytest.fixture
def gpus(device, monkeypatch):
    """(module, a GPU, another one). On the SIMT machine arrays are on its one GPU whatever is the
    current one, but no op takes them while another one is."""
    if device.__name__ == "tests.simt.cupy":
        monkeypatch.setattr(cuda, "array_module", lambda name: device)
        return device, device.DEVICE, device.DEVICE + 1
    if device.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    return device, 1, 0


def test_all_work_is_on_the_gpu_that_was_asked_for(gpus, tiny_paths, rng):
    cupy, here, other = gpus
    prompt = rng.integers(3, 250, 12).tolist()
    with cupy.cuda.Device(here):
        plain = LLM(tiny_paths / "llama.gguf", device=f"cuda:{here}", weights="fp32")
        (want,), logits = plain.generate([prompt], greedy(4)), plain.logits(prompt)
        perplexity = plain.perplexity(prompt)

    with cupy.cuda.Device(other):
        llm = LLM(
            tiny_paths / "llama.gguf", device=f"cuda:{here}", weights="fp32", prefix_cache=False
        )
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
