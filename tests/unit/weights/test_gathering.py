from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.weights.gathering import plan_buckets
from megatron_nsr.weights.loading import random_hf_tensors
from tests.tiny_models import tiny_config


def tiny_shape(tmp_path: Path, **fields: object) -> ModelShape:
    tiny_config("qwen3", tied=False, **fields).save_pretrained(tmp_path)
    return read_model_shape(str(tmp_path))


@pytest.mark.parametrize("bucket_numel", [1, 5_000, 1 << 30])
def test_buckets_keep_to_their_size_and_to_one_stage(tmp_path: Path, bucket_numel: int) -> None:
    shape = tiny_shape(tmp_path)
    buckets = plan_buckets(shape, 2, 2, bucket_numel)
    assert all(bucket.numel <= bucket_numel or len(bucket.items) == 1 for bucket in buckets)
    assert all(where.pipeline_rank == bucket.owner for bucket in buckets for _, where in bucket.items)
    names = [name for bucket in buckets for entry, _ in bucket.items for name in entry.hf]
    assert sorted(names) == sorted(random_hf_tensors(shape, 0))
