"""Training with rollout.mode=server against real servers, which are shared, killed and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nsr.observability.run_directory import RunDirectory
from tests.integration.servers import PYTHON, RolloutServer, server_overrides
from tests.integration.small_run import REPOSITORY, Small, finished, start, state, steps_logged, values, wait_until

GAP = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def servers(small: Small, folder: Path) -> Iterator[dict[str, RolloutServer]]:
    """`one` and `two` are alike; the workers of `wide` share the model."""
    made = {
        "one": RolloutServer(small, folder / "one.log"),
        "two": RolloutServer(small, folder / "two.log"),
        "wide": RolloutServer(small, folder / "wide.log", "rollout.tensor_parallel=2"),
    }
    for server in made.values():
        server.begin()
    try:
        for server in made.values():
            server.wait()
        yield made
    finally:
        for server in made.values():
            server.kill()


@pytest.fixture(scope="module")
def undisturbed_server_run(small: Small, servers: dict[str, RolloutServer], folder: Path) -> Path:
    """Four steps of one process on one server."""
    run = folder / "undisturbed"
    finished(start(small.nsr(run, "run.steps=4", *server_overrides([servers["one"]])), folder / "undisturbed.log"), 0)
    return run


def post(server: RolloutServer, path: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data=b"", method="POST"), timeout=60) as answer:
        assert answer.status == 200


def same_numbers(run: Path, reference: Path) -> None:
    """The same tokens from the same weights; log-probs are rounded anew, as requests reach a server in batches that their timing makes."""
    got, want = values(run), values(reference)
    assert [step["step"] for step in got] == [step["step"] for step in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            exact = name in ("rollout/weight_version", "rollout/staleness", "rollout/response_tokens_mean", "reward/correct_ratio")
            assert mine[name] == (theirs[name] if exact else pytest.approx(theirs[name], rel=1e-3, abs=1e-4)), (mine["step"], name)


def test_steps_are_drawn_from_the_weights_that_were_pushed(undisturbed_server_run: Path) -> None:
    steps = values(undisturbed_server_run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["rollout/weight_version"] for step in steps] == [0, 1, 2, 3]
    assert all(step["rollout/staleness"] == 0 and 0 < step["rollout/logprob_gap_max"] < GAP for step in steps)
    assert all(step["rollout/push_bytes"] == steps[0]["rollout/push_bytes"] > 0 and step["rollout/engines"] == 1 for step in steps)
    assert steps[-1]["heldout/logprob_gap_max"] < GAP
    assert (undisturbed_server_run / "hf" / "model.safetensors").is_file()


def test_two_workers_that_share_the_model_hold_its_weights(
    small: Small, servers: dict[str, RolloutServer], undisturbed_server_run: Path, tmp_path: Path
) -> None:
    """An update that a killed trainer left open is ended first, and a pause with it."""
    for path in ("/pause?mode=wait", "/start_weight_update"):
        post(servers["wide"], path)
    wide = [*server_overrides([servers["wide"]]), "rollout.tensor_parallel=2", "rollout.verify_push=always", "rollout.push_bucket_mib=1"]
    finished(start(small.nsr(tmp_path / "run", "run.steps=2", *wide), tmp_path / "log"), 0)
    steps = values(tmp_path / "run")
    assert all(0 < step["rollout/logprob_gap_max"] < GAP for step in steps)
    assert steps[0]["policy/loss"] == pytest.approx(values(undisturbed_server_run)[0]["policy/loss"], rel=1e-4)


def test_a_run_that_loses_all_servers_keeps_its_last_step_and_goes_on_with_new_ones(
    small: Small, servers: dict[str, RolloutServer], undisturbed_server_run: Path, tmp_path: Path
) -> None:
    run, server = tmp_path / "run", servers["two"]
    server.revive()
    arguments = small.nsr(run, "run.steps=4", "checkpoint.every=100", *server_overrides([server]))
    started = start([*arguments, "rollout.server_timeout_s=1"], tmp_path / "lost.log")
    wait_until(lambda: steps_logged(run) >= 1, started, "step 1")
    server.kill()
    output = finished(started, 1)
    assert "Traceback" not in output and state(run)["status"] == "failed"
    last = output.splitlines()[-1]
    assert (
        last.startswith(f"megatron-nsr: rollout.servers[0]={server.url}: ") and "; none came back within 1 s; a checkpoint of step " in last
    )
    assert 1 <= output.count("waiting for ") <= 2  # where it was sampling, and then where it would push again
    assert server.url in state(run)["reason"]
    lost = state(run)["step"]
    assert 1 <= lost == steps_logged(run) < 4 and RunDirectory(run).latest.resolve().name == f"step_{lost}"

    server.begin()  # the trainer waits for it
    resumed = start(arguments, tmp_path / "resumed.log")
    wait_until(lambda: steps_logged(run) > lost, resumed, "the next step")
    server.kill()
    server.begin()  # it comes back without weights: they are pushed to it again
    finished(resumed, 0)
    same_numbers(run, undisturbed_server_run)


def test_a_run_on_two_servers_goes_on_with_the_one_that_is_left(
    small: Small, servers: dict[str, RolloutServer], undisturbed_server_run: Path, tmp_path: Path
) -> None:
    servers["two"].revive()
    run, both = tmp_path / "run", server_overrides([servers["one"], servers["two"]])
    started = start(small.nsr(run, "run.steps=4", "rollout.server_timeout_s=3", *both), tmp_path / "log", ranks=2)
    wait_until(lambda: steps_logged(run) >= 1, started, "step 1")
    servers["two"].kill()
    finished(started, 0)
    steps = values(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(0 < step["rollout/logprob_gap_max"] < GAP for step in steps)
    assert steps[-1]["rollout/engines"] == 1
    # how many servers there are changes no token, and how many ranks there are none of the first step
    same = values(undisturbed_server_run)[0]
    for name in ("reward/correct_ratio", "rollout/response_tokens_mean", "policy/loss", "policy/entropy"):
        assert steps[0][name] == pytest.approx(same[name], rel=1e-4), name


def test_a_step_ahead_is_older_by_one_and_resumes_to_the_same_numbers(
    small: Small, servers: dict[str, RolloutServer], tmp_path: Path
) -> None:
    ahead = ["run.steps=5", "rollout.max_staleness=1", "objective.rollout_correction=2.0", *server_overrides([servers["one"]])]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finished(start(small.nsr(whole, *ahead), tmp_path / "whole.log"), 0)
    steps = values(whole)
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 1, 1, 1]
    assert [step["rollout/weight_version"] for step in steps] == [0, 0, 1, 2, 3]
    assert steps[0]["rollout/logprob_gap_max"] < GAP < min(step["rollout/logprob_gap_max"] for step in steps[1:])
    corrections = [step["rollout/correction_mean"] for step in steps]
    assert corrections[0] == pytest.approx(1, abs=1e-4) and all(abs(correction - 1) > 1e-4 for correction in corrections[1:])
    assert all(step["heldout/logprob_gap_max"] < GAP for step in steps if "heldout/logprob_gap_max" in step)

    started = start(small.nsr(stopped, *ahead, "checkpoint.every=100"), tmp_path / "stopped.log")
    wait_until(lambda: steps_logged(stopped) >= 2, started, "step 2")
    started.process.send_signal(signal.SIGTERM)
    finished(started, 3)
    assert 2 <= state(stopped)["step"] < 5
    latest = RunDirectory(stopped).latest
    assert json.loads((latest / "run.json").read_text())["sampler"]["drawn"] == state(stopped)["step"]  # not what was drawn ahead
    finished(start(small.nsr(stopped, *ahead, "checkpoint.every=100"), tmp_path / "resumed.log"), 0)
    same_numbers(stopped, whole)


NCCL_PROGRAM = """
import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
from megatron_nsr.rollout.vllm_api import nccl_init_info, nccl_update_info

told = NCCLWeightTransferInitInfo(**nccl_init_info("node0", 4000, first_rank=3, world_size=5))
assert (told.master_address, told.master_port, told.rank_offset, told.world_size) == ("node0", 4000, 3, 5)
update = NCCLWeightTransferUpdateInfo(**nccl_update_info([("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(4))]))
assert (update.names, update.shapes) == (["a", "b"], [[2, 3], [4]])
assert [getattr(torch, name) for name in update.dtype_names] == [torch.bfloat16, torch.float32]
assert not getattr(told, "packed", False) and not getattr(update, "packed", False)  # a broadcast for each tensor
print("taken")
"""


def test_vllm_s_nccl_backend_takes_what_would_be_sent_to_it() -> None:
    ended = subprocess.run([PYTHON or sys.executable, "-c", NCCL_PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "taken", ended.stderr[-3000:]
