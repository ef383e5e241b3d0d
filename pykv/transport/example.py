"""One process computes a prompt, another answers it; the text is compared with a single process's.

python -m pykv.transport.example
python -m pykv.transport.example --model tiny.gguf --prompt "..." --folder DIR
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from pykv import LLM, SamplingParams
from pykv.transport import Handover, Local, wait_for

PROMPT = (
    "Once upon a time there was a river that nobody had ever seen the other side of, and on its "
    "bank lived a woman who mended nets. Every morning she"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--folder", help="which both processes share; one of this user, in memory")
    parser.add_argument(
        "--prefill", metavar="NAME", help="serve prompts under a name, until killed"
    )
    args = parser.parse_args(argv)
    llm = LLM(args.model, device=args.device)
    if args.prefill:
        parent = os.getppid()
        with Local(args.prefill, args.folder) as transport:
            Handover(llm, transport, size="64MiB").serve(lambda: os.getppid() != parent)
        return 0

    name = f"prefill-{os.getpid()}"
    command = [sys.executable, "-m", "pykv.transport.example", "--prefill", name]
    command += ["--model", args.model, "--device", args.device]
    command += ["--folder", args.folder] if args.folder else []
    other = subprocess.Popen(command)
    try:
        with Local(f"decode-{os.getpid()}", args.folder) as transport:
            handover = Handover(llm, transport, size="64MiB")
            wait_for(transport, name)
            came = handover.ask(name, args.prompt)
            greedy = SamplingParams(max_tokens=24)
            answer = llm.generate(args.prompt, greedy)[0]
            reused = llm.stats.reused_tokens
    finally:
        other.kill()
        other.wait()
    alone = LLM(args.model, device=args.device).generate(args.prompt, greedy)[0]
    print(f"{came} of {len(llm.tokenize(args.prompt))} tokens came from {name}, {reused} were used")
    print(answer.text.strip())
    print("as of one process" if answer == alone else f"one process says: {alone.text}")
    return 0 if answer == alone and reused == came > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
