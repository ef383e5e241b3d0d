"""What the bodies of each endpoint ask for: prompts as token ids, sampling parameters, and how the
answer shall look.

Fields are OpenAI's, and those that vLLM adds; `null` is the same as none, unknown ones are ignored
and named once in the log, wrong values are refused by name.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from pykv.errors import CapacityError, ParameterError, PykvError, UnsupportedError, quoted
from pykv.llm.chat import chat_prompt, template_of
from pykv.llm.language import Language
from pykv.llm.prompts import Order, known_ids, order
from pykv.llm.sampling import SamplingParams
from pykv.number_texts import counted, whole_of
from pykv.serve.constraints import check_grammar, check_schema
from pykv.serve.fields import ApiError, Fields, wrong
from pykv.serve.tools import (
    OPENING,
    Dialect,
    Rule,
    Tools,
    find_dialect,
    grammar,
    read_format,
    read_messages,
    read_tools,
)
from pykv.serve.unsupported import IGNORED, OF_OTHERS, refuse_unsupported

log = logging.getLogger("pykv.serve")

MAX_CHOICES = 128  # prompts times n
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16  # stop strings, of MAX_STOP characters each
MAX_STOP = 256
MAX_IDS = 1024  # of logit_bias, and of stop_token_ids: each step looks at all of them
# Schemas, for the description of bodies, of fields that functions below check.
_STOP: dict[str, Any] = dict(minLength=1, maxLength=MAX_STOP)
_STOPS = _STOP | dict(maxItems=MAX_STOPS, items={"type": "string", **_STOP})
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
_BIASES: dict[str, Any] = dict(maxProperties=MAX_IDS, additionalProperties=_BIAS)
_LOGGED: set[str] = set()  # unknown fields that the log has named


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        orders: a sequence for each choice, `n` for each prompt.
        rule: which texts they may take; None: any.
        stream, include_usage: send pieces, and counts behind them.
        logprobs: likeliest tokens to name beside each; None: no logprobs.
        tools: that may be called.
        echo: texts of the prompts to begin the choices with.
    """

    orders: list[Order]
    rule: Rule | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    tools: Tools | None = None
    echo: list[str] | None = None


class Protocol:
    """Reads bodies for one model; threads may share it.

    Args:
        language: its tokenizer and template.
        names: of the model, the first one first.
    """

    def __init__(self, language: Language, names: list[str]) -> None:
        self.language, self.names = language, names
        self._template = template_of(language.file, tools=False) or ""

    def chat(self, body: dict[str, Any]) -> Asked:
        """A body of /v1/chat/completions."""
        fields = self._begin(body)
        tools, templated = self._conversation(fields)
        schema = read_format(fields)
        logprobs = fields.whole("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
        if not fields.flag("logprobs"):
            if logprobs:
                raise wrong("top_logprobs", logprobs, "logprobs to be true as well")
            logprobs = None
        most = fields.whole("max_tokens", None, 1)
        most = fields.whole("max_completion_tokens", most, 1)
        rule = _rule(tools, schema)
        asked = self._asked(fields, most or self.language.context, logprobs, rule, tools=tools)
        return asked([templated()], param="messages")

    def completions(self, body: dict[str, Any]) -> Asked:
        """A body of /v1/completions."""
        fields = self._begin(body)
        prompts = _prompts(fields.take("prompt", str, list, required=True, minItems=1))
        logprobs = fields.whole("logprobs", None, 0, MAX_TOP_LOGPROBS)
        most = fields.whole("max_tokens", 16, 1)
        if fields.take("suffix", str, maxLength=0):
            raise wrong("suffix", fields.body["suffix"], "none: texts are continued only")
        schema = read_format(fields)
        special = fields.flag("special")
        echo = fields.flag("echo")
        if echo and logprobs is not None:
            raise wrong("echo", True, "no logprobs beside it: prompts have none")
        asked = self._asked(fields, most, logprobs, _rule(None, schema))(prompts, special)
        if not echo:
            return asked
        texts = [self._text(prompt) for prompt in prompts for _ in range(asked.n)]
        return replace(asked, echo=texts)

    def generate(self, body: dict[str, Any]) -> Asked:
        """A body of /generate, the endpoint of m40-llm."""
        fields = self._begin(body)
        prompt = fields.take("prompt", str, required=True, minLength=1)
        style = fields.choice("prompt_format", "auto", "auto", "raw", "llama3-chat", "qwen-chat")
        marks = {"auto": "", "llama3-chat": "<|start_header_id|>", "qwen-chat": "<|im_start|>"}
        if style in marks and marks[style] not in self._template:
            raise wrong("prompt_format", style, "auto or raw: the model's template is another")
        most = fields.whole("max_tokens", self.language.context, 1)
        fields.whole("n", 1, 1, 1)  # an answer is one text
        asked = self._asked(fields, most, None, None, temperature=0.0)
        if style == "raw" or not self._template:
            return asked([prompt])
        messages = [{"role": "user", "content": prompt}]
        return asked([self._templated("prompt", messages, {}, {})])

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        """A body of /tokenize: a prompt, or messages."""
        fields = self._begin(body)
        param = "prompt" if fields.take("messages") is None else "messages"
        refuse_unsupported(fields)
        if param == "messages":
            if (prompt := fields.take("prompt", enum=[None])) is not None:
                raise wrong("prompt", prompt, "none beside messages")
            ids = self._conversation(fields)[1]()
        else:
            prompt = fields.take("prompt", str, required=True)
            bos = None if fields.flag("add_special_tokens", True) else False
            special = fields.flag("special")
            encode = partial(self.language.tokenizer.encode, bos=bos, special=special)
            limit = self.language.context
            ids = self._checked(param, lambda: encode(prompt, limit=limit, name=param))
        self._check_length(param, ids)
        self._note_unknown(fields)
        return list(ids)

    def detokenize(self, body: dict[str, Any]) -> str:
        """A body of /detokenize."""
        fields = self._begin(body)
        vocab = self.language.config.vocab
        tokens = fields.take("tokens", list, required=True, items=_id_below(vocab))
        self._check_length("tokens", tokens)
        self._note_unknown(fields)
        decode = self.language.tokenizer.decode
        text: str = self._checked(
            "tokens",
            lambda: decode(known_ids(self.language, "tokens", tokens), skip_special=False),
        )
        return text

    def check_model(self, name: str) -> None:
        """Refuse a name that is not the model's."""
        if name not in self.names:
            message = f"model is {quoted(name)}, expected {' or '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    # --- What bodies have in common ---

    def _conversation(self, fields: Fields) -> tuple[Tools | None, Callable[[], list[int]]]:
        """The tools of a body, and a function that gives the token ids of its messages."""
        variable, writes_calls = self._dialect
        native = bool(variable)
        messages = read_messages(fields, native=native, writes_calls=writes_calls)
        tools = read_tools(fields, native=native)
        given = fields.take("chat_template_kwargs", dict, default={})
        own: dict[str, Any] = {}
        if tools is not None:
            messages = tools.instruct(messages)
            own = {variable: tools.given} if tools.native else own
        if any(message["role"] == "system" for message in messages):
            messages = _by_the_user(messages, self._num_systems)
        return tools, partial(self._templated, "messages", messages, own, given)

    @cached_property
    def _dialect(self) -> Dialect:
        """How the template has tools; one whose calls have other marks than are read here counts as
        one that knows none."""
        if OPENING not in (template_of(self.language.file, tools=True) or ""):
            return Dialect()
        return find_dialect(
            lambda messages, given: chat_prompt(
                self.language.file, messages, template_variables=given
            )
        )

    @cached_property
    def _num_systems(self) -> int:
        """Messages at the beginning that may be of the system: Gemma's template refuses one and
        others leave it out, or all but the first message."""
        if not self._takes("system", "user"):
            return 0
        return 2**31 if self._takes("system", "user", "assistant", "system", "user") else 1

    def _takes(self, *roles: str) -> bool:
        """Whether the template takes messages of these roles."""
        talk = [{"role": role, "content": f"Hi {n}"} for n, role in enumerate(roles)]
        try:
            chat_prompt(self.language.file, talk)
        except ParameterError:
            return False
        except PykvError:  # whatever the messages are
            return True
        return True

    def _begin(self, body: dict[str, Any]) -> Fields:
        fields = Fields(body)
        fields.ignore(*IGNORED)
        model = fields.take("model", str)
        if model is not None:
            self.check_model(model)
        return fields

    def _asked(
        self,
        fields: Fields,
        most: int,
        logprobs: int | None,
        rule: Rule | None,
        *,
        temperature: float = 1.0,
        tools: Tools | None = None,
    ) -> Callable[..., Asked]:
        """Reads the fields that are left; returns a function from prompts, whether they may hold
        control tokens, and the field that they come from, to what is asked."""
        n = fields.whole("n", 1, 1, MAX_CHOICES)
        fields.whole("best_of", n, n, n)  # all choices are answered
        text: dict[str, Any] = dict(default=["text"], enum=[["text"], None])
        if (modalities := fields.take("modalities", list, **text)) != ["text"]:
            raise wrong("modalities", modalities, '["text"]')
        stream = fields.flag("stream")
        options = fields.part("stream_options")
        include_usage = options.flag("include_usage")
        options.ignore("include_obfuscation", "continuous_usage_stats")
        params = self._params(fields, most, logprobs, temperature)
        if rule is not None and params.ignore_eos:
            raise wrong("ignore_eos", True, "false beside tools or a response_format")
        if rule is not None and params.min_tokens:  # a grammar may allow nothing but the end
            raise wrong("min_tokens", params.min_tokens, "0 beside tools or a response_format")
        refuse_unsupported(fields)
        refuse_unsupported(fields, table=OF_OTHERS)
        self._note_unknown(fields)

        def asked(prompts: list[Any], special: bool = False, param: str = "prompt") -> Asked:
            if len(prompts) * n > MAX_CHOICES:
                raise wrong("n", n, f"{MAX_CHOICES} choices at most, of {len(prompts)} prompts")
            for prompt in prompts:
                if isinstance(prompt, list):
                    self._check_length(param, prompt)

            def make() -> list[Order]:
                made = [order(self.language, prompt, params, special) for prompt in prompts]
                each = [one for one in made for _ in range(n)]  # which share a prompt's ids
                return [
                    one._replace(params=_reseeded(one.params, choice))
                    for choice, one in enumerate(each)
                ]

            orders = self._checked(param, make)
            return Asked(orders, rule, n, stream, include_usage, logprobs, tools)

        return asked

    def _params(
        self, fields: Fields, most: int, logprobs: int | None, temperature: float
    ) -> SamplingParams:
        """How tokens are drawn; fields that are absent keep what SamplingParams has."""
        seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
        is_random = seed in (None, -1)  # as llama.cpp and vLLM have -1
        vocab = self.language.config.vocab
        min_tokens = fields.whole("min_tokens", 0, 0)
        if min_tokens > most:
            raise wrong("min_tokens", min_tokens, f"0 to {most}, as many as there may be")
        few_ids: dict[str, Any] = dict(items=_id_below(vocab), maxItems=MAX_IDS)
        given: dict[str, Any] = dict(
            temperature=fields.number("temperature", temperature, least=0, most=2),
            top_p=max(fields.number("top_p", 1.0, least=0, most=1), 1e-9),
            top_k=max(fields.whole("top_k", 0, -1, 2**31 - 1), 0),  # vLLM's -1 keeps all
            min_p=fields.number("min_p", 0.0, least=0, most=1),
            seed=secrets.randbits(63) if is_random else seed % 2**64,
            max_tokens=most,
            stop=_stops(fields.take("stop", str, list, default=[], **_STOPS)),
            ignore_eos=fields.flag("ignore_eos"),
        )
        more = dict(
            repetition_penalty=fields.number("repetition_penalty", 1.0, least=0.01, most=100),
            presence_penalty=fields.number("presence_penalty", 0.0, least=-2, most=2),
            frequency_penalty=fields.number("frequency_penalty", 0.0, least=-2, most=2),
            logit_bias=_biases(fields.take("logit_bias", dict, default={}, **_BIASES), vocab),
            stop_token_ids=_ids(
                "stop_token_ids", fields.take("stop_token_ids", list, **few_ids), vocab
            ),
            min_tokens=min_tokens,
            logprobs=logprobs,
        )
        return SamplingParams(**given, **more)

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.language.detokenize(prompt)

    def _templated(
        self, param: str, messages: list[Any], own: dict[str, Any], given: dict[str, Any]
    ) -> list[int]:
        """Token ids of messages, by a template that sees variables of ours and, before these, what
        `chat_template_kwargs` gives, whose error it is that there is none without them."""

        def ids(variables: dict[str, Any]) -> list[int]:
            return self.language.chat_ids(messages, template_variables=variables)

        found: list[int]
        try:
            source = "chat_template_kwargs" if given else param
            found = self._checked(source, lambda: ids(own | given))
        except ApiError:
            if given:
                self._checked(param, lambda: ids(own))
            raise
        return found

    def _check_length(self, param: str, ids: list[Any]) -> None:
        """Refuse what is longer than the context before work is done for each id."""
        if len(ids) > self.language.context:
            message = f"{param} has {counted(len(ids), 'token')}, "
            message += f"expected at most {self.language.context:,}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _checked(self, param: str, make: Callable[[], Any]) -> Any:
        """What a function makes of a field; its errors are the field's."""
        codes = {CapacityError: "context_length_exceeded", UnsupportedError: "unsupported"}
        try:
            return make()
        except PykvError as error:
            code = codes.get(type(error))
            raise ApiError(400, str(error), param=param, code=code) from None

    def _note_unknown(self, fields: Fields) -> None:
        new = {name[:40] for name in fields.unknown} - _LOGGED
        if new and len(_LOGGED) < 1000:
            _LOGGED.update(new)
            log.warning("fields that are ignored: %s", ", ".join(map(ascii, sorted(new)))[:400])


def _rule(tools: Tools | None, schema: dict[str, Any] | None) -> Rule | None:
    """What an answer keeps to. Refuses what the engine could not follow."""
    schemas = [*([] if schema is None else [schema]), *(tools.functions.values() if tools else ())]
    try:
        for one in schemas:
            check_schema(one)
        rule = grammar(tools, schema)
        if rule is not None:
            check_grammar(rule.grammar)
    except UnsupportedError as error:
        param = "response_format" if tools is None else "tools"
        raise ApiError(400, f"{param}: {error}", param=param) from None
    return rule


def _reseeded(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of a request's choices: each draws its own tokens."""
    return replace(params, seed=(params.seed + choice) % 2**64) if choice else params


def _by_the_user(messages: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """Messages of which the user says what system messages from `first` on do, as llama.cpp has it
    where a template takes none. Turns of the user become one, as many templates want them to."""
    made: list[dict[str, Any]] = []
    was_system = False
    for n, message in enumerate(messages):
        is_system = n >= first and message["role"] == "system"
        message = message | {"role": "user"} if is_system else message
        is_turn = bool(made) and made[-1]["role"] == message["role"] == "user"
        if is_turn and (is_system or was_system):
            both = f"{made[-1]['content']}\n\n{message['content']}"
            made[-1] = message | {"content": both}
        else:
            made.append(message)
        was_system = is_system
    return made


def _prompts(given: Any) -> list[Any]:
    """Prompts of a field that holds a text, token ids, or several of either."""
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if kinds == {int}:
        return [given]
    if kinds and kinds <= {str, list}:
        return list(given)
    raise wrong("prompt", given, "a string, a list of token ids, or a list of these")


def _stops(given: str | list[Any]) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    fits = all(isinstance(x, str) and 0 < len(x) <= MAX_STOP for x in stops)
    if not fits or len(stops) > MAX_STOPS:
        expected = f"up to {MAX_STOPS} strings of 1 to {MAX_STOP} characters"
        raise wrong("stop", given, expected)
    return tuple(stops)


def _biases(given: dict[str, Any], vocab: int) -> dict[int, float]:
    if len(given) > MAX_IDS:
        raise wrong("logit_bias", len(given), f"up to {MAX_IDS} token ids")
    biases = {}
    for key, value in given.items():
        token = whole_of(key, most=vocab - 1)
        if token is None:
            raise wrong("logit_bias", key, f"token ids from 0 to {vocab - 1}")
        if token in biases:  # 5 and 05
            raise wrong("logit_bias", key, "each token id once")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise wrong(f"logit_bias.{key}", value, "-100 to 100")
        biases[token] = float(value)
    return biases


def _id_below(vocab: int) -> dict[str, Any]:
    """A token's id in a JSON schema."""
    return {"type": "integer", "minimum": 0, "maximum": vocab - 1}


def _ids(name: str, given: list[Any] | None, vocab: int) -> tuple[int, ...]:
    if len(given or ()) > MAX_IDS:
        raise wrong(name, len(given or ()), f"up to {MAX_IDS} token ids")
    for i in given or ():
        if type(i) is not int or not 0 <= i < vocab:
            raise wrong(name, i, f"token ids from 0 to {vocab - 1}")
    return tuple(given or ())
