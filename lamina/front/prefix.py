"""Name the contents of KV cache blocks by keys, so that prompts with the same beginning can share them."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from lamina.wire.tenants import KEY_BYTES


class PrefixKeys:
    """Computes 128-bit keys for the full blocks of sequences. Blocks with equal keys have equal contents.

    A block's key is the BLAKE2b digest of the key before it and the tokens of the block. Before the first key comes a
    digest of everything else that the contents depend on: the ``model`` (the fingerprint of its checkpoint), the
    ``dtype`` in which it runs, the ``kv_dtype`` in which keys and values are stored, the size of a block, and a salt.
    Requests with different salts share nothing.
    """

    def __init__(self, *, model: str, dtype: str, kv_dtype: str, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._facts = (model, dtype, kv_dtype, str(block_tokens))

    def keys(self, tokens: Sequence[int], salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
        """Return the keys of all full blocks of ``tokens``, the first of which may be ``known`` from an earlier
        call."""
        size = self._block_tokens
        keys = list(known[: len(tokens) // size])
        key = keys[-1] if keys else self._root(salt)
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            key = _digest(key + array("Q", tokens[start : start + size]).tobytes())
            keys.append(key)
        return keys

    def _root(self, salt: str) -> bytes:
        # Each fact comes with its length, so that no two lists of facts give the same bytes.
        facts = [fact.encode() for fact in (*self._facts, salt)]
        return _digest(b"".join(struct.pack("<Q", len(fact)) + fact for fact in facts))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES, person=b"lamina prefix").digest()
