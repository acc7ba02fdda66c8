"""Convert control messages to the plain maps that links carry, and back."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta, Struct

from lamina.errors import LaminaError, ProtocolError
from lamina.validation import explain

Count = Annotated[int, Meta(ge=0, le=2**40)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]

MemberId = Annotated[int, Meta(ge=0, le=2**16 - 1)]
"""The id of a node in its cluster. It stays with the node's name and is never given to another."""


class Message(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag=True):
    """All control messages derive from this class. The name of the class travels as ``type``."""


def encode(message: Message) -> dict[str, Any]:
    """Convert a message to a plain map, as links send it: the keys of all maps are text."""
    plain: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,), str_keys=True)
    return plain


def decode(plain: dict[str, Any], kinds: Any) -> Any:
    """Convert a plain map to a message of one of the types in the union ``kinds``; raise ProtocolError if it fits
    none."""
    try:
        return msgspec.convert(plain, kinds, str_keys=True)
    except msgspec.ValidationError as e:
        known = ", ".join(k.__name__ for k in get_args(kinds) or (kinds,))
        raise ProtocolError(f"message {plain.get('type')!r}: {explain(e, plain)}; expected one of {known}") from e
    except LaminaError as e:
        raise ProtocolError(f"message {plain.get('type')!r}: {e}") from e
