"""Seeds of sampled responses: a function of what is sampled, not of where or in which order.

May import: the standard library.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Purpose = Literal["train", "eval", "heldout"]


def sample_seed(run_seed: int, step: int, prompt_id: str, sample: int, *, purpose: Purpose = "train") -> int:
    """The seed of one response, in [0, 2**63).

    Samples of a prompt have consecutive seeds, which is how vLLM numbers the children of one request
    (vllm/v1/engine/parallel_sampling.py, 0.32.0); prompts, steps, runs and purposes are hashed apart.
    """
    if sample < 0:
        raise ValueError(f"sample={sample} is negative")
    key = "\0".join([purpose, str(run_seed), str(step), prompt_id]).encode()
    first = int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"rollout-seed").digest(), "big") >> 2
    return first + sample
