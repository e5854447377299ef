"""A push to servers of a few lines: what is called in which order, who is left out, and what a failure leaves behind."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_nsr.rollout import server_client, server_engine, vllm_api
from megatron_nsr.rollout.engine import SampleRequest, Sampling
from megatron_nsr.rollout.server_client import Server, ServerError
from megatron_nsr.rollout.server_engine import Fits, ServerEngine
from megatron_nsr.types import RolloutsLost, UserError

NAMES = frozenset({"model.embed_tokens.weight", "lm_head.weight", "a", "b"})
MIB = 1 << 20


class FakeServer(Server):
    """Keeps what was called and loaded; `fails` names a path or method at which it is lost."""

    def __init__(self, name: str, fails: str = "") -> None:
        super().__init__(f"http://{name}:1", name)
        self.fails, self.resets_needed = fails, 2
        self.calls: list[str] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.files: list[Path] = []
        self.version: int | None = -1
        self.owner: str | None = None

    async def call(self, session: Any, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        self._called(path)
        if path == vllm_api.UPDATE:
            self.files.append(Path(body["update_info"]["path"]))
            self.loaded |= safetensors.torch.load_file(self.files[-1])
        if path == vllm_api.RESET_PREFIX_CACHE:
            self.resets_needed -= 1
            return {"success": self.resets_needed <= 0}
        return None

    async def workers(self, session: Any, method: str, *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
        if method != "nsr_held":
            self._called(method)
        if method == "nsr_label":
            self.version, self.owner = None if arguments[0] is None else int(arguments[0].partition(":")[2]), arguments[1]
        if method == "nsr_checksums":
            return [{"held": [["a", 0, 0, 5], ["b", 0, 2, -7]]}, {"held": []}]
        return [{"identity": self.name, "max_num_seqs": 4, "label": None, "owner": self.owner}] * 2

    def _called(self, what: str) -> None:
        if what == self.fails:
            raise ServerError(self, f"lost at {what}")
        self.calls.append(what)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_engine, "RESET_PAUSE_S", 0.0)


def engine(
    *servers: Server, tied: bool = True, speaks: bool = True, fits: Fits = lambda server, workers: None, timeout_s: float = 0.0
) -> ServerEngine:
    settings: dict[str, Any] = {"vocabulary": 4, "dtype": torch.float32, "bucket_bytes": MIB, "timeout_s": timeout_s}
    return ServerEngine(servers, run="runs/mine", names=NAMES, tied=tied, speaks=speaks, fits=fits, **settings)


def weights() -> dict[str, torch.Tensor]:
    """An embedding, a tensor of more than a bucket, and a view."""
    return {
        "model.embed_tokens.weight": torch.randn(4, 8),
        "a": torch.randn(600, 512),
        "b": torch.randn(8, 4).t(),
    }


def test_a_push_pauses_replaces_every_weight_and_resumes_with_an_empty_cache() -> None:
    server, tensors = FakeServer("s"), weights()
    pushing = engine(server)
    assert pushing.load_weights(iter(tensors.items()), 3) == sum(tensor.nbytes for tensor in tensors.values())
    assert server.calls == [
        *("nsr_describe", vllm_api.PAUSE, "nsr_label", vllm_api.INIT_TRANSFER, vllm_api.START_UPDATE),
        *(vllm_api.UPDATE, vllm_api.UPDATE, vllm_api.UPDATE, vllm_api.FINISH_UPDATE),
        *(vllm_api.RESET_PREFIX_CACHE, vllm_api.RESET_PREFIX_CACHE, "nsr_label", vllm_api.RESUME),
    ]
    assert pushing.version == server.version == 3
    expected = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}  # a tied head is a tensor of its own there
    assert server.loaded.keys() == expected.keys() and all(torch.equal(server.loaded[name], expected[name]) for name in expected)
    assert not any(file.exists() for file in server.files)


@pytest.mark.parametrize(
    "where", ["nsr_describe", vllm_api.PAUSE, vllm_api.START_UPDATE, vllm_api.UPDATE, vllm_api.FINISH_UPDATE, vllm_api.RESUME]
)
def test_a_server_that_is_lost_in_a_push_is_left_out_and_taken_in_by_the_next(where: str) -> None:
    lost, left = FakeServer("lost", fails=where), FakeServer("left")
    pushing = engine(lost, left)
    pushing.load_weights(iter(weights().items()), 1)
    assert pushing.version == left.version == 1 and left.loaded.keys() == NAMES
    lost.fails = ""
    pushing.load_weights(iter(weights().items()), 2)
    assert lost.version == left.version == 2


@pytest.mark.parametrize("where", ["nsr_describe", vllm_api.UPDATE, vllm_api.RESUME])
def test_a_push_that_no_server_took_consumes_all_and_is_told_when_something_is_sampled(where: str) -> None:
    pushing, rest = engine(FakeServer("s", fails=where)), iter(weights().items())
    pushing.load_weights(rest, 1)
    assert list(rest) == [] and pushing.version is None and pushing.held_checksums() == []
    with pytest.raises(RolloutsLost, match=f"^s: lost at {where}".replace("?", r"\?")):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))


def test_a_full_temporary_directory_loses_the_rollouts_by_its_name_and_the_next_push_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, rest = FakeServer("s"), iter(weights().items())
    pushing = engine(server)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
        pushing.load_weights(rest, 1)
    assert list(rest) == [] and server.version is None
    with pytest.raises(RolloutsLost, match=f"could not be written to TMPDIR={tmp_path}/absent: "):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))
    pushing.load_weights(iter(weights().items()), 2)
    assert pushing.version == server.version == 2


def test_an_incomplete_push_is_an_error_and_leaves_no_weights() -> None:
    server = FakeServer("s")
    pushing, tensors = engine(server), weights()
    del tensors["b"]
    with pytest.raises(RuntimeError, match="pushed weights lack 1 of 4 tensors: b"):
        pushing.load_weights(iter(tensors.items()), 1)
    assert pushing.version is None and server.version is None


def test_a_cache_that_does_not_empty_is_an_error_of_that_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer("s")
    server.resets_needed = server_engine.RESETS + 1
    pushing = engine(server)
    pushing.load_weights(iter(weights().items()), 1)
    with pytest.raises(RolloutsLost, match="s: did not reset its prefix cache"):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))


def test_checksums_of_all_workers_of_all_servers_are_compared() -> None:
    pushing = engine(FakeServer("s"), FakeServer("t"))
    pushing.load_weights(iter(weights().items()), 1)
    worker = {("a", 0, 0): 5, ("b", 0, 2): -7}
    assert pushing.held_checksums() == [worker, {}, worker, {}]


def test_a_server_that_is_lost_while_it_is_compared_is_told_when_something_is_sampled() -> None:
    pushing = engine(FakeServer("s", fails="nsr_checksums"))
    pushing.load_weights(iter(weights().items()), 1)
    assert pushing.version == 1 and pushing.held_checksums() == [] and pushing.version is None
    with pytest.raises(RolloutsLost, match=r"^s: lost at nsr_checksums"):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))


def test_a_server_of_another_config_is_left_out_and_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    other, right = FakeServer("other"), FakeServer("right")

    def fits(server: Server, workers: Any) -> None:
        if server is other:
            raise UserError("other: it was started with model.dtype bfloat16, not float32")

    pushing = engine(other, right, fits=fits)
    for version in (1, 2):
        pushing.load_weights(iter(weights().items()), version)
    assert (other.version, right.version) == (-1, 2)
    assert capsys.readouterr().out == "other: it was started with model.dtype bfloat16, not float32; left out until a later push\n"


@pytest.mark.parametrize("order", [1, -1])
def test_one_that_may_still_come_is_waited_for_whatever_another_answers(order: int) -> None:
    late, broken = FakeServer("late"), FakeServer("broken")
    tries = []

    async def workers(session: Any, method: str, *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
        tries.append(method)
        if len(tries) < 3:
            raise ServerError(late, "ClientConnectorError")
        return await FakeServer.workers(late, session, method, *arguments)

    def refuse(server: Server, _: Any) -> None:
        if server is broken:
            raise UserError("broken: another config")

    late.workers = workers  # type: ignore[method-assign]
    pushing = engine(*(late, broken)[::order], fits=refuse, timeout_s=30.0)
    pushing.load_weights(iter(weights().items()), 1)
    assert pushing.version == late.version == 1 and len(tries) > 3


def test_all_lost_servers_are_waited_for_once_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are lost in a push; the next two pushes find none, and only the first of them waits."""
    clock, tries = [time.monotonic()], []

    async def sleep(pause: float) -> None:
        clock[0] += pause
        tries.append(pause)

    monkeypatch.setattr(server_client.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(server_client.asyncio, "sleep", sleep)
    lost = [FakeServer(name, fails=vllm_api.PAUSE) for name in "st"]
    pushing = engine(*lost, timeout_s=5.0)
    pushing.load_weights(iter(weights().items()), 1)
    for server in lost:
        server.fails = "nsr_describe"
    capsys.readouterr()
    pushing.load_weights(iter(weights().items()), 1)
    assert len(tries) > 3 and sum(tries) == pytest.approx(5.0)
    assert capsys.readouterr().out == "s: lost at nsr_describe; no rollout server is left: waiting for one, up to 5 s\n"
    tries.clear()
    pushing.load_weights(iter(weights().items()), 1)
    assert tries == [] and capsys.readouterr().out == ""
    with pytest.raises(RolloutsLost, match=r"^s: lost at nsr_describe; t: lost at nsr_describe; none came back within 5 s$"):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))
    lost[1].fails = ""
    pushing.load_weights(iter(weights().items()), 2)
    assert pushing.version == lost[1].version == 2
    assert "t: there again; the weights are pushed anew\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("runs/other [1]", r"^s: another run uses it at the same time: runs/other \[1\]$"),
        (None, "^s: was started again and has lost its weights$"),
    ],
)
@pytest.mark.parametrize("where", [vllm_api.UPDATE, "nsr_checksums"])
def test_a_server_that_another_run_took_since_or_that_was_started_again_is_called_so(where: str, owner: str | None, said: str) -> None:
    class Taken(FakeServer):
        def _called(self, what: str) -> None:
            if what == where:
                self.owner = owner
                raise ServerError(self, "status 500: already active", answered=True)

    pushing = engine(Taken("s"))
    pushing.load_weights(iter(weights().items()), 1)
    assert pushing.held_checksums() == []
    with pytest.raises(RolloutsLost, match=said):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))


def test_checksums_of_another_run_s_weights_are_not_compared() -> None:
    server = FakeServer("s")
    pushing = engine(server)
    pushing.load_weights(iter(weights().items()), 1)
    server.owner = "runs/other [1]"
    assert pushing.held_checksums() == [] and pushing.version is None


def test_an_error_of_a_server_that_an_earlier_run_used_is_its_own() -> None:
    server = FakeServer("s", fails=vllm_api.PAUSE)
    server.owner = "runs/ended [1]"
    pushing = engine(server)
    pushing.load_weights(iter(weights().items()), 1)
    with pytest.raises(RolloutsLost, match=r"^s: lost at /pause"):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))


def test_a_rank_that_does_not_speak_consumes_what_is_pushed_and_samples_nothing() -> None:
    server, tensors = FakeServer("s"), weights()
    silent, rest = engine(server, speaks=False), iter(tensors.items())
    assert silent.load_weights(rest, 1) == sum(tensor.nbytes for tensor in tensors.values())
    assert silent.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ())) == silent.held_checksums() == list(rest) == server.calls == []


def test_a_closed_engine_samples_no_more() -> None:
    with engine(FakeServer("s")) as pushing:
        pushing.load_weights(iter(weights().items()), 1)
    with pytest.raises(RolloutsLost, match="closed"):
        pushing.generate([SampleRequest((1,), 0)], Sampling(1.0, 2, ()))
