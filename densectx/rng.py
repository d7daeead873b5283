"""Counted randomness: a generator is a function of what it is for, so nothing has to be stored to repeat it."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for a key such as (seed, pass, index, "denoising")."""
    return torch.Generator(device).manual_seed(seed_of(*key))
