"""A forward pass of a checkpoint against Hugging Face's own. May import: models, training, platform, megatron-core, transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.models.parallel import initialize_parallel
from megatron_nsr.models.policy import build_policy
from megatron_nsr.platform import distributed
from megatron_nsr.training.checkpoints import load_state

LENGTHS = (5, 1, 18)  # tokens of the sequences that are run, packed together
TOLERANCE = 1e-4  # of the largest logit: both sides compute in fp32, in another order


def logit_error(checkpoint: Path, hf: Path) -> float:
    """The largest difference of the logits of random tokens, over the largest logit. Both models are held in fp32, one after the other."""
    shape = read_model_shape(str(hf))
    tokens = torch.randint(0, shape.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    theirs = _hf_logits(hf, tokens)
    mine = _checkpoint_logits(checkpoint, tokens)[:, : shape.vocab_size]
    return relative_error(mine, theirs)


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest finite value of `theirs`; NaN where one side alone is NaN, as that is no rounding."""
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    scale = theirs[theirs.isfinite()].abs()
    if bool(same.all()):
        return 0.0
    return float((mine - theirs)[~same].abs().max() / scale.max()) if scale.numel() else math.inf


@torch.no_grad()
def _hf_logits(hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    return torch.cat([model(sequence[None]).logits[0] for sequence in tokens.split(list(LENGTHS))])


@torch.no_grad()
def _checkpoint_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[tokens, padded vocabulary], of a model on one rank."""

    def head(hidden: torch.Tensor, weight: torch.Tensor, _labels: Any) -> torch.Tensor:
        return hidden @ weight.T

    shape, layout, backend = read_model_shape(str(checkpoint)), ParallelConfig(), choose_backend("auto")
    distributed.init_process_group()
    initialize_parallel(layout, shape, 1, seed=0)
    chunks = build_policy(shape, layout, dtype=torch.float32, backend=backend, recompute="none", head=head)
    load_state(checkpoint / "state", chunks, None, backend)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(backend.device)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS)
    )
    with backend.phase():
        row = tokens[None].to(backend.device)
        logits: torch.Tensor = chunks[0](row, torch.zeros_like(row), None, packed_seq_params=packing)
    return logits.cpu()
