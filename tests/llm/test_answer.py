"""Stop strings in a text that comes piece by piece, held to a search of the whole text."""

import random
import time

from pykv.llm.answer import Answer
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence


class Words:
    """A decoder of which token i is words[i]."""

    def __init__(self, words):
        self.words = words

    def push(self, token):
        return self.words[token]

    def finish(self):
        return ""


def begin(words, stops):
    s = Sequence([1], SamplingParams(stop=tuple(stops)), 1000)
    return s, Answer(s, Words(words))


def cut(text, stops):
    """Where the first prefix that ends with a stop string has the longest such one."""
    for end in range(len(text) + 1):
        if found := [len(x) for x in stops if text[:end].endswith(x)]:
            return end - max(found)
    return None


def held(text, stops):
    """Characters that a stop string may still take back, by trying all."""
    lengths = range(len(text) + 1)
    return max(n for n in lengths if not n or any(x.startswith(text[-n:]) for x in stops))


def test_random_texts_and_stop_strings():
    choose, ended = random.Random(3), 0
    for _ in range(3000):
        letters = "ab" if choose.random() < 0.7 else "abcé"

        def some(most, letters=letters):
            return "".join(choose.choices(letters, k=choose.randint(1, most)))

        words = [some(3) for _ in range(12)]
        stops = [some(6) for _ in range(choose.randint(1, 3))]
        s, answer = begin(words, stops)
        text, given = "", ""
        for token in range(len(words)):
            s.generated.append(token)
            answer.read()
            text, given = text + words[token], given + answer.piece()
            assert (s.finish_reason == "stop") == any(stop in text for stop in stops)
            if s.finish_reason:
                ended += 1
                # However the tokens cut the text, and whichever stop string is named first.
                assert given == answer.completion().text == text[: cut(text, stops)]
                assert not any(stop in given for stop in stops)
                break
            assert given == text[: len(text) - held(text, stops)]
    assert ended > 1000


def test_text_of_tokens_behind_a_stop_string_is_no_part():
    """As where a step fails after a token was drawn, and the next one draws another."""
    s, answer = begin(["a st", "op b", " c"], ["stop"])
    s.generated += [0, 1, 2]
    answer.read()
    assert (answer.completion().text, s.finish_reason, answer.piece()) == ("a ", "stop", "a ")
    s.generated.append(2)
    answer.read()
    assert answer.completion().text == "a " and not answer.piece()


def test_what_is_left_at_the_end_may_complete_a_stop_string():
    """The last token may begin a character only; U+FFFD then stands for it."""
    for reason, stop, want in (
        ("length", "b\ufffd", ("a", "stop")),
        ("length", "c\ufffd", ("ab\ufffd", "length")),
        ("error", "b\ufffd", ("a", "error")),
    ):
        s, answer = begin(["ab"], [stop])
        answer._decoder.finish = lambda: "\ufffd"
        s.generated.append(0)
        s.finish_reason = reason
        answer.read()
        assert (answer.completion().text, s.finish_reason) == want
        assert answer.piece() == want[0]


def test_many_long_stop_strings_cost_little():
    """64 of 1,024 characters took 25 ms a token when each prefix was tried."""
    stops = ["a" * 1022 + chr(98 + i % 20) + chr(98 + i // 20) for i in range(64)]
    s, answer = begin(["z" * 3000, "a", "aab"], stops)
    best = 1.0
    for token in [0, *[1, 2] * 50]:
        s.generated.append(token)
        started = time.thread_time()
        answer.read()
        answer.piece()
        best = min(best, time.thread_time() - started) if token else best
    assert best < 5e-3
