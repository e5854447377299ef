"""Requests over servers of a few lines: who gets which, and what becomes of them when a server is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_nsr.rollout import server_sampling
from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling
from megatron_nsr.rollout.server_client import Held, Server, ServerError, ServersLost
from megatron_nsr.rollout.server_engine import Member
from megatron_nsr.rollout.server_sampling import sample_on_servers

LOST = r"^a: (was started again and has lost its weights|holds other weights: another run uses it, too)$"
SAMPLING = Sampling(temperature=1.0, max_tokens=4, stop_ids=())
REQUESTS = [SampleRequest((i,), seed=100 * i, n=2) for i in range(12)]


class FakeServer(Server):
    """Answers with the prompt's id; `trouble(count)` may raise at the count-th request, `life` says what it is when asked."""

    def __init__(self, name: str, trouble: Callable[[FakeServer, int], None] = lambda server, count: None) -> None:
        super().__init__(f"http://{name}:1", name)
        self.trouble, self.asked = trouble, 0
        self.life: list[Held | ServerError] = []

    async def generate(self, session: Any, request: SampleRequest, sampling: Sampling) -> list[Completion]:
        self.asked += 1
        count = self.asked
        await asyncio.sleep(0)
        self.trouble(self, count)
        return [Completion(np.array([request.prompt_ids[0], i], np.int32), np.zeros(2, np.float32), "length") for i in range(request.n)]

    async def held(self, session: Any) -> Held:
        answer = self.life.pop(0) if self.life else Held(self.name, "7")
        if isinstance(answer, ServerError):
            raise answer
        return answer


def sample(*servers: FakeServer, max_num_seqs: int = 2, timeout_s: float = 0.0) -> list[list[int]]:
    members = [Member(server, server.name, 1, max_num_seqs) for server in servers]
    return [c.token_ids.tolist() for c in asyncio.run(sample_on_servers(members, "7", REQUESTS, SAMPLING, timeout_s))]


def unreachable(server: FakeServer) -> ServerError:
    return ServerError(server, "ClientConnectorError")


def dies_at(number: int) -> Callable[[FakeServer, int], None]:
    def trouble(server: FakeServer, count: int) -> None:
        if count >= number:
            server.life = [unreachable(server)] * 99
            raise unreachable(server)

    return trouble


def interrupted_at(*numbers: int) -> Callable[[FakeServer, int], None]:
    def trouble(server: FakeServer, count: int) -> None:
        if count in numbers:
            raise unreachable(server)

    return trouble


def refuses(server: FakeServer, count: int) -> None:
    raise ServerError(server, "status 500", answered=True)


EVERYTHING = [[i, k] for i in range(12) for k in range(2)]


def test_answers_come_in_the_order_of_the_requests_from_one_server_and_from_three() -> None:
    servers = [FakeServer(name) for name in "abc"]
    assert sample(*servers) == sample(FakeServer("d")) == EVERYTHING
    assert all(server.asked for server in servers)


def test_a_server_is_given_no_more_at_once_than_keeps_it_busy() -> None:
    at_once = []

    class Busy(FakeServer):
        now = 0

        async def generate(self, *arguments: Any) -> list[Completion]:
            self.now += 1
            at_once.append(self.now)
            try:
                return await super().generate(*arguments)
            finally:
                self.now -= 1

    assert sample(Busy("a"), max_num_seqs=4) == EVERYTHING
    assert max(at_once) == server_sampling.AHEAD * 4 // 2  # two sequences a request


@pytest.mark.parametrize("number", [1, 3])
def test_what_a_lost_server_had_goes_to_the_others(number: int) -> None:
    assert sample(FakeServer("a", dies_at(number)), FakeServer("b")) == EVERYTHING


def test_a_server_that_answers_with_an_error_is_left_out_at_once() -> None:
    broken = FakeServer("a", refuses)
    broken.life = [Held("a", "7"), ServerError(broken, "asked again")]
    assert sample(broken, FakeServer("b")) == EVERYTHING and len(broken.life) == 1


def test_a_server_that_was_started_again_since_the_push_gives_nothing() -> None:
    again = FakeServer("a")
    again.life = [Held("another process", None)]
    assert sample(again, FakeServer("b")) == EVERYTHING and again.asked == 0


@pytest.mark.parametrize("held", [Held("another process", None), Held("a", "another run:7")])
def test_what_a_server_gave_before_it_was_found_with_other_weights_is_sampled_again(held: Held) -> None:
    changed, right = FakeServer("a"), FakeServer("b")
    changed.life = [Held("a", "7"), held]  # asked before the first response and after the last
    assert sample(changed, right) == EVERYTHING
    assert changed.asked and right.asked == len(REQUESTS)
    alone = FakeServer("a")
    alone.life = [Held("a", "7"), held]
    with pytest.raises(ServersLost, match=LOST):
        sample(alone)


def test_an_interrupted_connection_is_made_again() -> None:
    assert sample(FakeServer("a", interrupted_at(2, 5, 9))) == EVERYTHING


def test_a_server_that_is_back_after_a_while_with_its_weights_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer("a", interrupted_at(2))
    server.life = [Held("a", "7"), unreachable(server)]
    assert sample(server, timeout_s=60) == EVERYTHING
    assert capsys.readouterr().out == "a: ClientConnectorError; waiting for it, up to 60 s\na: there again, with its weights\n"


@pytest.mark.parametrize("life", [Held("another", None), Held("another", "7"), Held("a", None), Held("a", "6")])
def test_a_server_that_was_started_again_or_has_other_weights_is_lost(life: Held) -> None:
    server = FakeServer("a", interrupted_at(2))
    server.life = [Held("a", "7"), life]
    with pytest.raises(ServersLost, match=LOST):
        sample(server)


def test_losing_all_names_all() -> None:
    with pytest.raises(ServersLost) as lost:
        sample(FakeServer("a", dies_at(2)), FakeServer("b", refuses))
    assert sorted(str(lost.value).split("; ")) == ["a: ClientConnectorError", "b: status 500"]


def test_a_server_that_loses_every_connection_but_is_there_when_asked_is_lost_in_the_end() -> None:
    def always(server: FakeServer, count: int) -> None:
        raise unreachable(server)

    with pytest.raises(ServersLost, match="a: ClientConnectorError"):
        sample(FakeServer("a", always))


def test_an_answer_that_makes_no_sense_is_an_error() -> None:
    def nonsense(server: FakeServer, count: int) -> None:
        raise RuntimeError("vLLM returned 1 responses, not 2")

    with pytest.raises(RuntimeError, match="1 responses, not 2"):
        sample(FakeServer("a", nonsense), FakeServer("b"))


def test_a_server_that_gives_no_sign_of_life_while_it_samples_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sampling, "SIGN_OF_LIFE_S", 0.0)

    class Silent(FakeServer):
        async def generate(self, *arguments: Any) -> list[Completion]:
            await asyncio.Event().wait()
            raise AssertionError

    silent = Silent("a")
    silent.life = [unreachable(silent)] * 99
    assert sample(silent, FakeServer("b")) == EVERYTHING
