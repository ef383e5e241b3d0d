"""A process that forks while its threads are at work: the child goes on with what it has of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykv import forks
from tests.llm import tiny

# In a process of its own, as this one has threads, with which it must not fork.
SCRIPT = """
import os, signal, sys, threading, time
import pykv

llm = pykv.LLM(sys.argv[1], device="cpu", weights="fp32", kv_dtype="fp32", pool_tokens=256)
ask = lambda n: llm.generate([[5, 6, 7] * n], pykv.SamplingParams(max_tokens=6, ignore_eos=True))
want, chat = ask(5)[0].token_ids, [{"role": "user", "content": "Hi"}]
ids, goes_on = llm.chat_ids(chat), True

def work(n):
    while goes_on:
        ask(n)
        llm.chat_ids(chat)

threads = [threading.Thread(target=work, args=[n]) for n in (2, 7)]
for thread in threads:
    thread.start()
failed = []
for _ in range(8):
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # the child of a parent that held a lock for another would wait for ever
        is_right = ask(5)[0].token_ids == want and llm.chat_ids(chat) == ids
        os._exit(0 if is_right else 1)
    failed += [status for status in [os.waitpid(child, 0)[1]] if status]
goes_on = False
for thread in threads:
    thread.join()
sys.exit(f"children ended with {failed}" if failed else 0)
"""


class Told:
    """A lock that tells when it is taken."""

    def __init__(self, taken):
        self.taken = taken

    def acquire(self):
        self.taken.append(self)

    def release(self):
        self.taken.remove(self)


def test_a_fork_takes_older_locks_last(monkeypatch):
    """Whoever holds another may wait for one of these, as a model's step for that of all caches."""
    monkeypatch.setattr(forks, "_locks", type(forks._locks)())
    taken = []
    locks = [forks.waits_for(Told(taken)) for _ in range(20)]
    forks._take()
    assert taken == locks[::-1]
    forks._release()
    assert not taken


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_asks_while_other_threads_of_its_parent_do(tmp_path):
    tiny.write(
        tmp_path / "x.gguf", "llama", keys={"tokenizer.chat_template": "{{ messages[0].content }}"}
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path / "x.gguf"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
