"""The fields of a request's body, taken one by one, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pykv.errors import PykvError
from pykv.options import check_choice, check_number, check_whole

_JSON = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


class ApiError(Exception):
    """What a request is answered instead of a result.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if one is.
        code: a word for programs, such as "context_length_exceeded".
        headers: beside the usual ones.
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

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients make an exception of."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        facts = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}


def wrong(param: str, has: object, expected: str) -> ApiError:
    """The error of a field that has another value than it may."""
    return ApiError(400, f"{param} is {has!r:.80}, expected {expected}", param=param)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a body."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    try:
        body = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {body!r:.80}, expected an object of JSON")
    return body


class Fields:
    """The fields of an object of JSON; `null` is the same as none.

    Args:
        body: the object.
        where: what stands before a field's name in errors, such as "stream_options.".
    """

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self.body, self.where = body, where
        self._taken: set[str] = set()

    @property
    def unknown(self) -> set[str]:
        """Fields that nobody has taken."""
        return self.body.keys() - self._taken

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """A field of one of these types, of any without them."""
        self._taken.add(name)
        value = self.body.get(name)
        if value is None:
            return default
        if kinds and type(value) not in kinds:
            expected = " or ".join(_JSON[kind] for kind in kinds)
            raise wrong(self.where + name, value, expected)
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change nothing here, whatever they have."""
        self._taken.update(names)

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.take(name, bool, default=default))

    def number(self, name: str, default: Any, **bounds: Any) -> Any:
        return self._checked(name, default, lambda x: check_number("", name, x, **bounds))

    def whole(self, name: str, default: Any, least: int, most: int = 2**63 - 1) -> Any:
        return self._checked(name, default, lambda x: check_whole("", name, x, least, most))

    def choice(self, name: str, default: Any, *choices: str) -> Any:
        return self._checked(name, default, lambda x: check_choice("", name, x, choices))

    def part(self, name: str) -> Fields:
        """The fields of a field that is an object."""
        return Fields(self.take(name, dict, default={}), f"{self.where}{name}.")

    def _checked(self, name: str, default: Any, check: Callable[[Any], Any]) -> Any:
        value = self.take(name)
        if value is None:
            return default
        try:
            return check(value)
        except PykvError as error:
            message = self.where + str(error).removeprefix(": ")
            raise ApiError(400, message, param=self.where + name) from None
