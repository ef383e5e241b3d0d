"""The options of commands that open a model, and the LLM that they name."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykv.llm import LLM

MODEL = (
    "a name, a GGUF file, hf:owner/repo/file.gguf or https://... (%(default)s); see `pykv models`"
)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument("--model", default="smollm2-135m", help=MODEL)
    add_device(parser)
    add_weights(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def add_model(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    add_cache(parser)
    add_decode(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """What the cache stores, and of which tokens."""
    add_kv_dtype(parser)
    add_context(parser)
    parser.add_argument(
        "--prefill-device", metavar="cuda:N", help="another GPU that computes prompts (none)"
    )
    parser.add_argument(
        "--evict",
        metavar="POLICY",
        help="keep some rows of the cache alone: snapkv:512, keydiff:0.5, streaming:1024:sinks=4; "
        "also tova, h2o, expectedattention, keynorm, largest, random, and before any of them but "
        "tova adakv:, by which heads share a budget",
    )
    parser.add_argument(
        "--host-cache",
        metavar="SIZE[:lfu][:CODEC]",
        help="keep pages that the cache forgets in so much host memory, such as 4G, 4GB or "
        "4GiB, which are one size: units are powers of 1024; with lfu the least often used go, "
        "else the least recently used; codecs are int8, int4, and FILE:RATIO of an artefact of "
        "`pykv kvtc calibrate`",
    )
    parser.add_argument(
        "--disk-cache",
        metavar="DIR:SIZE[:lfu][:CODEC]",
        help="and on disk, for other processes as well: tiers:50GiB",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """How answers go on."""
    parser.add_argument(
        "--decode",
        default="auto",
        metavar="WAY",
        help="how a GPU computes the next token: graph, persistent or steps; auto is graph, or "
        "what pykv.llm.calibrate found to be faster (%(default)s)",
    )
    parser.add_argument(
        "--max-sms-resident",
        type=int,
        metavar="N",
        help="SMs that a launch of the persistent way takes at most, to leave others some (all)",
    )


def add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--ctx", "--context"), type=int, help="tokens of prompt and answer (the model's context)"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", default="fp16", help="fp16, bf16, fp32 or stored (%(default)s)"
    )


def add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype",
        default="fp16",
        metavar="KIND",
        help="fp16, bf16, fp32, int8, int4, fp8 or k8v4; or keys and values apart, a scale for "
        "each head, of fp32: int8+e4m3:head:fp32 (%(default)s)",
    )


# Options by what LLM calls them: of add_place, and of add_model.
PLACE = {"device": "device", "weights": "weights"}
ALL = PLACE | {"kv_dtype": "kv_dtype", "ctx": "context", "evict": "eviction"}
_SAME = "prefill_device host_cache disk_cache decode max_sms_resident"
ALL |= {name: name for name in _SAME.split()}


def open_llm(args: argparse.Namespace, options: dict[str, str] = ALL) -> LLM:
    """The model of `args.model`, opened by these of the options; a terminal sees it load."""
    from pykv.llm import LLM

    given = {name: getattr(args, option) for option, name in options.items()}
    return LLM(args.model, **given, progress=sys.stderr.isatty())
