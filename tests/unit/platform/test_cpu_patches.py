from __future__ import annotations

import pytest
import torch

from megatron_nsr.platform import cpu_patches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches refuse to load here")


def test_the_patches_refuse_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where CUDA is available"):
        cpu_patches.install()


def test_cuda_means_the_cpu_inside_a_phase_only() -> None:
    with cpu_patches.megatron_phase():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).cuda().to("cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.FloatTensor"  # only megatron-core's own code is told otherwise
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_installing_twice_keeps_the_random_states() -> None:
    from megatron.core.tensor_parallel import random

    cpu_patches.install()
    tracker = random.get_cuda_rng_tracker()
    cpu_patches.install()
    assert random.get_cuda_rng_tracker() is tracker


def test_a_fork_of_the_random_state_is_reproducible_and_leaves_no_trace() -> None:
    from megatron.core.tensor_parallel import random

    cpu_patches.install()
    tracker = random.get_cuda_rng_tracker()
    drawn = []
    for _ in range(2):
        tracker.reset()
        tracker.add("test", 11)
        before = torch.get_rng_state()
        with tracker.fork("test"):
            drawn.append(torch.rand(3))
        with tracker.fork("test"):
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_every_patched_call_site_exists_upstream() -> None:
    from pathlib import Path

    import megatron.core

    root = Path(megatron.core.__file__).parent
    assert megatron.core.__version__ == "0.16.1"
    assert [site.file for site in cpu_patches.PATCHED_CALL_SITES if not (root / site.file).is_file()] == []
