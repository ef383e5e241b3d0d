"""Messages between processes: facts as JSON, with the sender's name and a checksum.

offset  type     field, little-endian
     0  8s       magic, b"\\x89PYKVTM\\n"
     8  u32      version, 1
    12  u32      CRC-32 of all bytes after it
    16  u32 x2   bytes of the sender's name, and of the facts
    24           the name, then the facts, a JSON object, both UTF-8
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from typing import Any, NamedTuple

from pykv.errors import DtypeError, ParameterError, TransportError, quoted
from pykv.options import check_number, check_type

MAGIC = b"\x89PYKVTM\n"
VERSION = 1
MOST_BYTES = 1 << 26  # size limit of a message
_HEADER = struct.Struct("<8s4I")


class Message(NamedTuple):
    """A message.

    Attributes:
        sender: name of the process that sent it.
        facts: by name.
    """

    sender: str
    facts: dict[str, Any]


def check_name(op: str, argument: str, name: str) -> str:
    """Check for `op` that `argument`, with the value `name`, is a process name: up to 40 letters,
    digits, dashes, underscores and dots.

    Raises:
        ParameterError: it is another text.
        DtypeError: it is not a text.
    """
    check_type(op, argument, name, str, "a name")
    if not is_name(name):
        expected = "expected up to 40 letters, digits, dashes, underscores or dots"
        raise ParameterError(f"{op}: {argument} is {quoted(name)}, {expected}")
    return name


def is_name(name: str) -> bool:
    """Whether a text is a valid process name."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}", name) is not None


def check_facts(op: str, facts: Any) -> dict[str, Any]:
    """Check `facts` for `op`, before anything is written or sent.

    Raises:
        DtypeError: they are not a dict with texts as keys, or JSON cannot hold them.
    """
    if not isinstance(facts, dict) or not all(isinstance(name, str) for name in facts):
        raise DtypeError(f"{op}: facts is {quoted(facts)}, expected a dict of names")
    try:
        json.dumps(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise DtypeError(f"{op}: facts hold what JSON does not: {error}") from None
    return facts


def check_seconds(op: str, timeout: Any) -> float:
    """Check for `op` a `timeout` in seconds, from 0 to a year.

    Raises:
        DtypeError, ParameterError: it is not a number, or out of range.
    """
    return check_number(op, "timeout", timeout, least=0, most=365 * 86400)


def pack(message: Message) -> bytes:
    """The bytes of a `message`.

    Raises:
        ParameterError: they exceed MOST_BYTES, which a receiver accepts.
    """
    name, facts = message.sender.encode(), json.dumps(message.facts).encode()
    if _HEADER.size + len(name) + len(facts) > MOST_BYTES:
        raise ParameterError(
            f"transport: facts have {len(facts):,} bytes, expected a message of at most "
            f"{MOST_BYTES:,}"
        )
    sizes = struct.pack("<2I", len(name), len(facts))
    crc = zlib.crc32(facts, zlib.crc32(name, zlib.crc32(sizes)))
    return MAGIC + struct.pack("<2I", VERSION, crc) + sizes + name + facts


def unpack(data: bytes) -> Message:
    """The message in the bytes `data`.

    Raises:
        TransportError: they are not a message, are damaged, or of another version.
    """

    def wrong(name: str, has: Any, expected: Any) -> TransportError:
        return TransportError(f"transport: a message has {name} {quoted(has)}, expected {expected}")

    if len(data) < _HEADER.size:
        raise wrong("bytes", len(data), f"at least {_HEADER.size}")
    magic, version, crc, name_bytes, fact_bytes = _HEADER.unpack(data[: _HEADER.size])
    if magic != MAGIC:
        raise wrong("magic", magic, MAGIC)
    if version != VERSION:
        raise wrong("version", version, VERSION)
    if _HEADER.size + name_bytes + fact_bytes != len(data):
        raise wrong("bytes", len(data), "as many as its header says")
    if zlib.crc32(data[16:]) != crc:
        raise TransportError("transport: a message is damaged: its CRC-32 does not hold")
    middle = _HEADER.size + name_bytes
    try:
        sender = check_name("transport", "sender", data[_HEADER.size : middle].decode())
        facts = json.loads(data[middle:])
    except (ValueError, RecursionError) as error:
        raise TransportError(f"transport: a message is invalid: {error}") from None
    if not isinstance(facts, dict):
        raise wrong("facts", facts, "a JSON object")
    return Message(sender, facts)
