"""A data file's own response as a trajectory. May import: numpy, types, the rest of data."""

from __future__ import annotations

import numpy as np

from megatron_nsr.data.tokenizers import Tokenizer
from megatron_nsr.types import Prompt, Trajectory


def reference_trajectory(tokenizer: Tokenizer, index: int, prompt: Prompt) -> Trajectory:
    """The problem's `response`, which it must have, ended by the first stop id; `rollout_logprobs` are zeros, as no engine drew it."""
    assert prompt.response is not None
    ids = [*tokenizer.encode(prompt.response), tokenizer.stop_ids[0]]
    return Trajectory(
        prompt=index,
        sample=0,
        prompt_ids=prompt.token_ids,
        response_ids=np.asarray(ids, np.int32),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        finish_reason="stop",
        weight_version=0,
        text=prompt.response,
    )
