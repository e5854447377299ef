"""Tests that need a CUDA device: `make test-gpu`. Elsewhere none is collected: a run without a GPU must not look like a pass."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
