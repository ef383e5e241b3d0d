"""The load tool, by a server whose answers and times are known."""

import asyncio

from pykv.serve import load

SIZES = dict(clients=3, requests=7, prompt=20, answer=10, shared=12)


def test_percentiles_by_hand():
    values = [float(n) for n in range(100, 0, -1)]
    assert [load.percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert load.percentile([3.0], 50) == 3 and load.percentile([], 99) == 0


def test_what_clients_see(serve):
    prompts = []
    client = serve(lambda s: prompts.append(s.prompt) or [5] * 20, seconds=0.02)
    found = asyncio.run(load.ask(client.url, **SIZES))
    assert not found.failures and found.answer_tokens == 70 and found.prompt_tokens == 140
    assert len(found.first) == 7 and found.seconds >= 3 * 10 * 0.02
    facts = found.facts()
    assert facts["failures"] == 0 and facts["between_p50_ms"] >= 15
    assert len({tuple(p[:12]) for p in prompts}) == 1 and len({tuple(p) for p in prompts}) == 7


def test_failures_are_counted(serve):
    client = serve(lambda _: [5, RuntimeError("broken")], limit=2)
    found = asyncio.run(load.ask(client.url, **SIZES))
    assert len(found.failures) == 7 and found.answer_tokens == 0
    kinds = {failure.partition(":")[2].strip()[:7] for failure in found.failures}
    assert kinds <= {"a fault", "503 Ser"} and "a fault" in kinds
    found = asyncio.run(load.ask("http://127.0.0.1:9", **SIZES))
    assert len(found.failures) == 7 and "tokens_per_second" in found.facts()
