"""Names for what blocks of the KV cache hold, so that prompts that begin alike can share them."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from lamina.wire.tenants import KEY_BYTES


class PrefixKeys:
    """Keys of 128 bits for the full blocks of a sequence: equal keys, equal keys and values.

    A key is BLAKE2b of the key before it and the tokens of its block; the first builds on a digest of everything else
    that keys and values depend on: ``model`` (the fingerprint of the checkpoint), ``dtype`` in which it runs,
    ``kv_dtype`` in which they are stored, the size of a block, and a salt. Requests with different salts share nothing.
    """

    def __init__(self, *, model: str, dtype: str, kv_dtype: str, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._facts = (model, dtype, kv_dtype, str(block_tokens))

    def keys(self, tokens: Sequence[int], salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
        """The keys of all full blocks of ``tokens``. ``known``: those of the leading ones, from an earlier call."""
        size = self._block_tokens
        keys = list(known[: len(tokens) // size])
        key = keys[-1] if keys else self._root(salt)
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            key = _digest(key + array("Q", tokens[start : start + size]).tobytes())
            keys.append(key)
        return keys

    def _root(self, salt: str) -> bytes:
        # With the length before each, so that no two lists of facts look alike.
        facts = [fact.encode() for fact in (*self._facts, salt)]
        return _digest(b"".join(struct.pack("<Q", len(fact)) + fact for fact in facts))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES, person=b"lamina prefix").digest()
