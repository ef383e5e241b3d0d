"""What callers give as a prompt, and the sequence that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from pykv.errors import CapacityError, ParameterError, quoted
from pykv.llm.answer import Answer
from pykv.llm.sampling import SamplingParams, check_vocabulary
from pykv.llm.sequence import Sequence
from pykv.number_texts import counted
from pykv.options import check_flag

if TYPE_CHECKING:
    from pykv.llm.language import Language


def answers_to(language: Language, prompts: Any, params: Any, special: bool) -> list[Answer]:
    """The answers to prompts, of which no scheduler knows yet. Args, Raises: see LLM.generate."""
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = items("generate: prompts", prompts, "a text, or a list of prompts")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    params = items("generate: params", params, "SamplingParams, or a list of them")
    if len(params) != len(prompts):
        raise ParameterError(
            f"generate: params has {len(params)}, expected one for each of {len(prompts)} prompts"
        )
    pairs = enumerate(zip(prompts, params, strict=True))
    places = len(prompts) > 1
    orders = [order(language, *pair, special, f"[{n}]" if places else "") for n, pair in pairs]
    return [begin(language, each) for each in orders]


def answer_to(
    language: Language, prompt: Any, params: SamplingParams, special: bool = False
) -> Answer:
    """The answer to a prompt, which no scheduler knows yet. Args, Raises: see LLM.generate."""
    return begin(language, order(language, prompt, params, special))


class Order(NamedTuple):
    """What makes a Sequence: the arguments of the same names."""

    prompt: list[int]
    params: SamplingParams
    limit: int
    end_ids: frozenset[int]


def order(
    language: Language,
    prompt: Any,
    params: SamplingParams,
    special: bool = False,
    place: str = "",
) -> Order:
    """What a prompt asks for; `place` is what errors call its place among several, such as "[1]".
    Args, Raises: see LLM.generate."""
    name = f"prompts{place}" if place else "prompt"
    if not isinstance(params, SamplingParams):
        raise ParameterError(f"params{place} has {quoted(params)}, expected SamplingParams")
    check_vocabulary(f"params{place}", params, language.config.vocab)
    if banned := dict.fromkeys(language.tokenizer.suppressed_ids, -100.0):
        params = replace(params, logit_bias=dict(params.logit_bias) | banned)
    ids = read_ids(language, name, prompt, special)
    if len(ids) == language.context:
        raise CapacityError(
            f"{name} has {counted(len(ids), 'token')}, expected fewer than the context of "
            f"{language.context:,}: the answer needs room"
        )
    limit = min(language.context, len(ids) + params.max_tokens)
    ends = frozenset() if params.ignore_eos else language.tokenizer.stop_ids
    known = language.tokenizer.control.ids  # no text holds them, so none finds a stop string there
    ends |= {*params.stop_token_ids, *(known[text] for text in params.stop if text in known)}
    return Order(ids, params, limit, ends)


def begin(language: Language, order: Order) -> Answer:
    """The answer to an order, which no scheduler knows yet."""
    return Answer(Sequence(*order), language.tokenizer.stream_decoder())


def read_ids(language: Language, name: str, prompt: Any, special: bool = False) -> list[int]:
    """Token ids of argument `name`, a text or ids: at least one, and at most a context."""
    check_flag("LLM", "special", special)
    if isinstance(prompt, str):
        if not prompt:
            raise ParameterError(f"{name} is empty, expected at least one character")
        limit = language.context
        ids = language.tokenizer.encode(prompt, special=special, limit=limit, name=name)
    else:
        ids = known_ids(language, name, items(name, prompt, "a text or a list of token ids"))
    if not ids:
        raise ParameterError(f"{name} is empty, expected at least one token")
    if len(ids) > language.context:
        raise CapacityError(
            f"{name} has {counted(len(ids), 'token')}, expected at most the context "
            f"of {language.context:,}"
        )
    return ids


def known_ids(language: Language, name: str, ids: Any) -> list[int]:
    """Ids that are tokens of the model."""
    vocab = language.config.vocab
    known = items(name, ids, "a list of token ids")
    if not set(map(type, known)) <= {int}:
        known = [_token_id(name, i) for i in known]
    if known and not 0 <= min(known) <= max(known) < vocab:
        wrong = next(i for i in known if not 0 <= i < vocab)
        raise ParameterError(f"{name} has token id {wrong}, expected 0 to {vocab - 1}")
    return known


def items(name: str, values: Any, what: str) -> list[Any]:
    """The items of a list, a tuple or an array; `what` says what was expected else."""
    try:
        if isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set):
            raise TypeError
        return list(values)
    except TypeError:
        raise ParameterError(f"{name} is {quoted(values)}, expected {what}") from None


def _token_id(name: str, value: Any) -> int:
    """An integer of any library."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ParameterError(f"{name} has token id {quoted(value)}, expected an integer") from None
