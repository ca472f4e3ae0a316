"""Private seeds from names and numbers."""

from __future__ import annotations

import hashlib


def private_seed(*parts: str | int) -> int:
    """A 32-bit seed: PyTorch's CPU generator looks at no more bits than these.

    Sums and shifts of numbers would therefore give equal streams; a hash does not.
    """
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
