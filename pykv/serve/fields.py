"""The fields of a request's body, taken one by one, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pykv.errors import PykvError, quoted
from pykv.options import check_choice, check_number, check_whole

_JSON = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean"}
_TYPES |= {float: "number", int: "integer"}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: of HTTP.
        param: the wrong field, if it is one field.
        code: for programs, such as "context_length_exceeded".
        headers: additional ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def __reduce__(self) -> Any:  # pickled by the engine's process
        facts: dict[str, Any] = dict(param=self.param, code=self.code, headers=self.headers)
        return partial(ApiError, **facts), (self.status, str(self))

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients turn into an exception."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        facts = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}


def wrong(param: str, has: object, expected: str) -> ApiError:
    """The error of a field whose value is not `expected`, or None: missing."""
    given = "missing" if has is None else quoted(has)
    return ApiError(400, f"{param} is {given}, expected {expected}", param=param)


def loads(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, and for numbers that overflow float64."""

    def refuse(word: str) -> None:
        raise ValueError(f"{quoted(word, 40)} is no number of JSON")

    def number(word: str) -> float:
        if math.isinf(value := float(word)):
            raise ValueError(f"{quoted(word, 40)} is too large a number")
        return value

    return json.loads(text, parse_constant=refuse, parse_float=number)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        body = loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {quoted(body)}, expected an object of JSON")
    return body


class Fields:
    """The fields of a JSON object; `null` means missing.

    Every check of a field is recorded, so that `schema` can describe the body by the code that
    checks it.

    Args:
        body: the object.
        where: prefix of field names in errors, such as "stream_options.".
    """

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self.body, self.where = body, where
        self._asked: dict[str, dict[str, Any] | list[Fields] | Fields] = {}
        self._required: list[str] = []

    @property
    def unknown(self) -> set[str]:
        """Fields that were never read; those of nested objects as "messages.x"."""
        names = {name for name in self.body.keys() - self._asked if self.body[name] is not None}
        for name, asked in self._asked.items():
            parts = [asked] if isinstance(asked, Fields) else asked
            for part in parts if isinstance(parts, list) else []:
                names |= {f"{name}.{inner}" for inner in part.unknown}
        return names

    def schema(self) -> dict[str, Any]:
        """A JSON schema of the fields that were read."""
        properties: dict[str, Any] = {}
        for name, asked in self._asked.items():
            if isinstance(asked, Fields):
                properties[name] = asked.schema() | {"type": ["object", "null"]}
            elif isinstance(asked, list):
                each = [fields.schema() for fields in asked]
                fields = {key: x for one in each for key, x in one["properties"].items()}
                common = [key for key in fields if all(key in one["required"] for one in each)]
                item = {"type": "object", "properties": fields, "required": common}
                properties[name] = {"type": "array", "minItems": 1, "items": item}
            else:
                properties[name] = asked
        return {"type": "object", "properties": properties, "required": self._required}

    def take(
        self, name: str, *kinds: type, default: Any = None, required: bool = False, **facts: Any
    ) -> Any:
        """The value of a field.

        Args:
            name: of the field.
            kinds: types that its value may have; none: any type.
            default: returned if the field is missing.
            required: whether it is an error if the field is missing.
            facts: further keywords of its JSON schema; the caller checks them.
        """
        self._note(name, kinds, default, required, facts)
        value = self.body.get(name)
        if value is None and not required:
            return default
        if kinds and type(value) not in kinds:
            expected = " or ".join(_JSON[kind] for kind in kinds)
            raise wrong(self.where + name, value, expected)
        return value

    def each(self, name: str) -> list[Fields]:
        """The objects in a field that is a non-empty list."""
        given = self.take(name, list, required=True)
        if not given:
            raise wrong(self.where + name, given, "a list of at least one")
        made = []
        for n, item in enumerate(given):
            where = f"{self.where}{name}[{n}]"
            if not isinstance(item, dict):
                raise wrong(where, item, "an object")
            made.append(Fields(item, f"{where}."))
        self._asked[name] = made
        return made

    def was_read(self, name: str) -> bool:
        """Whether a field was taken, or ignored."""
        return name in self._asked

    def ignore(self, *names: str) -> None:
        """Accept fields without effect, whatever their values."""
        for name in names:
            self._asked[name] = {}

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.take(name, bool, default=default))

    def number(self, name: str, default: Any, least: float, most: float) -> Any:
        facts = dict(minimum=least, maximum=most)
        check = partial(check_number, "", name, least=least, most=most)
        return self._checked(name, default, check, (float,), facts)

    def whole(self, name: str, default: Any, least: int, most: int = 2**63 - 1) -> Any:
        facts = dict(minimum=least, maximum=most)

        def check(value: Any) -> int:
            # JSON has one kind of number, and some clients write 16 as 16.0.
            is_whole = isinstance(value, float) and value.is_integer()
            return check_whole("", name, int(value) if is_whole else value, least, most)

        return self._checked(name, default, check, (int,), facts)

    def choice(self, name: str, default: Any, *choices: str) -> Any:
        """One of some words; required if `default` is None."""
        check = partial(check_choice, "", name, choices=choices)
        required = default is None
        values = [*choices] if required else [*choices, None]
        return self._checked(name, default, check, (str,), dict(enum=values), required)

    def part(self, name: str) -> Fields:
        """The fields of a field that is an object."""
        made = Fields(self.take(name, dict, default={}), f"{self.where}{name}.")
        self._asked[name] = made
        return made

    def _checked(
        self,
        name: str,
        default: Any,
        check: Callable[..., Any],
        kinds: tuple[type, ...],
        facts: dict[str, Any],
        required: bool = False,
    ) -> Any:
        self._note(name, kinds, default, required, facts)
        value = self.body.get(name)
        if value is None and not required:
            return default
        try:
            return check(value)
        except PykvError as error:
            message = self.where + str(error).removeprefix(": ")
            raise ApiError(400, message, param=self.where + name) from None

    def _note(
        self,
        name: str,
        kinds: tuple[type, ...],
        default: Any,
        required: bool,
        facts: dict[str, Any],
    ) -> None:
        types = [_TYPES[kind] for kind in kinds]
        if required:
            self._required.append(name)
            self._asked[name] = {"type": types, **facts}
            return
        noted: dict[str, Any] = {"type": [*types, "null"], **facts} if kinds else {**facts}
        if default is not None:
            noted["default"] = default
        self._asked[name] = noted
