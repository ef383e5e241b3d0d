"""A conversation that was saved sixteen times smaller goes on in another process, nearly as it
would have gone on: both get the same tokens, and what they say of the next ones is compared."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import numpy as np
import pytest

from pykv.eval import continuation, replay
from pykv.kvtc import calibrate
from pykv.llm import LLM, SamplingParams
from tests.helpers import to_numpy

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
MODEL, RATIO = "smollm2-135m", 16
TOPICS = " ".join(topics.topics.values())  # calibrations read its beginning, conversations its end
GO_ON = "from tests.kvtc import test_conversation as test; test.go_on(*test.sys.argv[1:])"


def by_readme(folder, device):
    """As the commands of pykv/kvtc/README.md do it: 13,000 tokens of four kinds, all layers."""
    text = (ROOT / "pykv/kvtc/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh-session\n(.*?)```", text, re.DOTALL)
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        command = re.sub("^python ", f"{sys.executable} ", command)
        command = re.sub("^(pykv kvtc .*)", rf"{sys.executable} -m \1 --device {device}", command)
        subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, check=True)


def quickly(folder, device):
    """Groups of few layers need fewer tokens, and lose more."""
    llm = LLM(MODEL, device=device)
    calibrate(llm, {"topics": TOPICS}, out=folder / "smollm2.kvtc", groups=5, tokens=2_000)


class Form(NamedTuple):
    """How the artefact is made, how many tokens are saved and scored, and the KL that this may
    cost."""

    make: Callable
    saved: int
    scored: int
    kl: float


SHORT, LONG = Form(quickly, 500, 64, 0.03), Form(by_readme, 1500, 256, 0.012)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    "device, form",
    [
        pytest.param("cpu", SHORT, id="short", marks=pytest.mark.sweep),
        pytest.param("cpu", LONG, id="long", marks=pytest.mark.nightly),
        pytest.param("cuda", LONG, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_it_goes_on_nearly_as_it_would_have(tmp_path, device, form):
    form.make(tmp_path, device)
    llm = open_llm(device)
    (ids,) = continuation.windows(llm, TOPICS[-20_000:], prefill=form.saved, score=form.scored)
    prompt = ids[: form.saved]
    llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    kept = llm.save(tmp_path / "coded", prompt, codec=f"{tmp_path}/smollm2.kvtc:{RATIO}")
    assert kept == llm.save(tmp_path / "plain", prompt) == form.saved // 16 * 16
    exact = logits_of(llm, ids, kept)

    np.save(tmp_path / "ids.npy", ids)
    command = [sys.executable, "-c", GO_ON, device, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    plain, coded = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "coded"))
    targets = np.array(ids[kept + 1 :])
    same, changed = (continuation.compare(exact, x, targets) for x in (plain, coded))
    assert same[0].max() < 1e-4
    assert 1e-4 < changed[0].mean() <= form.kl, changed[0].mean()
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "coded")]
    print(f"KL {changed[0].mean():.5f}, top-1 {changed[1].mean():.3f}, {sizes[0] / sizes[1]:.1f}x")


def open_llm(device):
    return LLM(MODEL, device=device, pool_tokens=2048)


def go_on(device, folder):
    """In another process: what a model says that has not computed the tokens before."""
    ids = np.load(f"{folder}/ids.npy").tolist()
    for name, codec in (("plain", None), ("coded", f"{folder}/smollm2.kvtc:{RATIO}")):
        llm = open_llm(device)
        session = llm.load(f"{folder}/{name}", codec=codec)
        assert session.token_ids == ids[: len(session.token_ids)]
        np.save(f"{folder}/{name}.npy", logits_of(llm, ids, session.cached_tokens))


def logits_of(llm, ids, kept):
    """Logits [n, V] after each token from `kept` on but the last, behind the pages that it has."""
    more = ids[kept:-1]
    with llm.turn(), llm._scheduler.pages.known(ids[:kept]) as pages:
        assert len(pages) * llm.cache.page_size == kept
        llm.cache.extend(pages, kept, kept + len(more))
        parts = replay.steps(llm, llm.cache, replay.Place(pages, kept, kept), more)
        return np.concatenate([to_numpy(part) for part in parts])
