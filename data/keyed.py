"""Randomness without state: keyed by what it is for, equal on every rank, in every worker, after every restart."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

MASK_64 = (1 << 64) - 1


def stable_hash(data: bytes | str) -> int:
    """63 bits of BLAKE2b: the same in every process (Python's `hash` is not), and it fits a signed 64-bit tensor."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big") >> 1


def keyed_rng(purpose: str, seed: int, *place: int) -> np.random.Generator:
    """A generator for one place of the run, e.g. `keyed_rng("crop", seed, step, row, attempt)`; at most three places.

    Philox is counter-based (Salmon et al., SC 2011): seed and purpose are its key, the place is the upper part of its
    counter, so streams of different places never meet.
    """
    assert len(place) <= 3, place
    counter = [0, *place, *([0] * (3 - len(place)))]
    key = [seed & MASK_64, stable_hash(purpose)]
    return np.random.Generator(np.random.Philox(counter=np.array(counter, np.uint64), key=np.array(key, np.uint64)))


def mix_64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014), element-wise on uint64: a bijection that looks random."""
    x = x.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_64(*words: int | np.ndarray) -> np.ndarray:
    """Chains integers, broadcast against one another, into uint64 that look random."""
    state = np.zeros((), np.uint64)
    for word in words:
        value = np.asarray(word & MASK_64 if isinstance(word, int) else word).astype(np.uint64)
        state = mix_64(np.atleast_1d(state * np.uint64(0x9E3779B97F4A7C15 | 1) + value + np.uint64(0x632BE59BD9B4E019)))
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray, *, rounds: int = 6) -> np.ndarray:
    """Element-wise image of `index` under the permutation of 0 .. size-1 that `key` (uint64, broadcast) names.

    A Feistel network on the next power of four with cycle walking (Black and Rogaway, CT-RSA 2002): O(1) memory and any
    element by itself, where a shuffled array of a billion samples would need 8 GB and all of it.
    """
    assert size > 0 and (index.size == 0 or (index.min() >= 0 and index.max() < size)), (size, index)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    out = index.astype(np.uint64)
    outside = np.ones(index.shape, bool)
    while outside.any():
        left, right, inner_key = out[outside] >> half, out[outside] & mask, key[outside]
        for i in range(rounds):
            left, right = right, left ^ (hash_64(i, inner_key, right) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)
