"""The server's metrics, in Prometheus' text format, under vLLM's names, which dashboards and load
tools expect. Metrics that vLLM does not have begin with "pykv:".
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from pykv.serve.engine import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
BETWEEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0),
)
END_TO_END = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0),
)


class Histogram:
    """A histogram of seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count `count` events that took `seconds` together."""
        self.counts[bisect_left(self.bounds, seconds / count)] += count
        self.sum += seconds

    def lines(self, name: str, label: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{bound}"}} {total}'
        yield f"{name}_sum{{{label}}} {self.sum}"
        yield f"{name}_count{{{label}}} {total}"


class Metrics:
    """Counters of one server. Used on its event loop alone."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(FIRST_TOKEN)
        self.inter_token_latency = Histogram(BETWEEN)
        self.e2e_request_latency = Histogram(END_TO_END)
        self.prompt_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.finished: Counter[str] = Counter()
        self.responses: Counter[int] = Counter()  # by HTTP status

    def count_finished(self, reason: str, prompt_tokens: int, reused_tokens: int) -> None:
        """Count a sequence that has ended."""
        self.finished[reason] += 1
        self.prefix_queries += prompt_tokens
        self.prefix_hits += reused_tokens

    def text(self, model: str, state: State, *, running: int) -> str:
        """The exposition text.

        Args:
            model: value of the label `model_name`.
            state: of the engine.
            running: number of running sequences.
        """
        pages, held, waiting = state.pages, state.held, state.waiting
        label = 'model_name="' + model.replace("\\", r"\\").replace('"', r"\"") + '"'
        gauges = {
            "vllm:num_requests_running": (running, "Sequences that are being answered."),
            "vllm:num_requests_waiting": (waiting, "Sequences that wait for pages or a slot."),
            "vllm:kv_cache_usage_perc": (held / max(pages, 1), "Share of pages held; 1 is all."),
            "pykv:kv_pages": (pages, "Pages of the cache."),
            "pykv:kv_pages_held": (held, "Pages that sequences hold."),
        }
        counters: dict[str, tuple[float, str]] = {
            "vllm:prompt_tokens_total": (self.prompt_tokens, "Tokens of prompts."),
            "vllm:generation_tokens_total": (self.generation_tokens, "Tokens of answers."),
            "vllm:prefix_cache_queries_total": (self.prefix_queries, "Tokens looked for."),
            "vllm:prefix_cache_hits_total": (self.prefix_hits, "Tokens found in the cache."),
            "vllm:num_preemptions_total": (state.preemptions, "Sequences that gave way to others."),
        }
        for name, value in state.tiers:
            text = f"Tiers: {name.replace('_', ' ')}; see pykv.tiers.Counters."
            counters[f"pykv:tiers_{name}_total"] = (value, text)
        lines: list[str] = []
        for kind, table in (("gauge", gauges), ("counter", counters)):
            for name, (value, text) in table.items():
                lines += _head(name, kind, text) + [f"{name}{{{label}}} {value}"]
        lines += _head("vllm:request_success_total", "counter", "Sequences by how they ended.")
        for reason, count in sorted(self.finished.items()):
            key = f'{label},finished_reason="{reason}"'
            lines.append(f"vllm:request_success_total{{{key}}} {count}")
        lines += _head("pykv:responses_total", "counter", "Answers by HTTP status.")
        for status, count in sorted(self.responses.items()):
            lines.append(f'pykv:responses_total{{status="{status}"}} {count}')
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
            full = f"vllm:{name}_seconds"
            lines += _head(full, "histogram", name.replace("_", " ").capitalize() + ".")
            lines += getattr(self, name).lines(full, label)
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
