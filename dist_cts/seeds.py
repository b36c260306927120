"""Seeds hashed from all their keys: seed + rank would make (0, 1) and (1, 0) the same stream."""

import hashlib


def hashed_seed(*keys: int | str) -> int:
    """A 63-bit seed from any keys, the same in every process and on every machine."""
    text = "\x1f".join(map(str, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
