"""Batches drawn ahead: taken once, by whoever asks for the same, from the weights of their start."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_nsr.rollout.ahead import Ahead
from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling
from megatron_nsr.types import RolloutsLost

SAMPLING = Sampling(1.0, 4, ())
REQUESTS = [SampleRequest((1,), 10), SampleRequest((2,), 20)]


class SlowEngine:
    """Samples once it is let."""

    def __init__(self) -> None:
        self.version: int | None = 3
        self.let = threading.Event()
        self.lost = False

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        self.let.wait(60)
        if self.lost:
            raise RolloutsLost("gone")
        return [Completion(np.array([request.seed], np.int32), np.zeros(1, np.float32), "length") for request in requests]


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def ahead(engine: SlowEngine) -> Ahead:
    return Ahead(engine)  # type: ignore[arg-type]  # what is drawn needs of an engine


def test_a_batch_is_drawn_beside_the_caller_and_taken_once(engine: SlowEngine, ahead: Ahead) -> None:
    ahead.start(REQUESTS, SAMPLING)
    assert ahead.take(REQUESTS, SAMPLING) is None  # not there yet
    engine.let.set()
    ahead.settle()
    engine.version = 4
    drawn = ahead.take(REQUESTS, SAMPLING)
    assert drawn is not None and drawn.version == 3
    assert [completion.token_ids.tolist() for completion in drawn.completions] == [[10], [20]]
    assert ahead.take(REQUESTS, SAMPLING) is None


def test_what_was_not_asked_for_ahead_leaves_the_batch_waiting(engine: SlowEngine, ahead: Ahead) -> None:
    engine.let.set()
    ahead.start(REQUESTS, SAMPLING)
    ahead.settle()
    assert ahead.take(REQUESTS[:1], SAMPLING) is ahead.take(REQUESTS, Sampling(0.5, 4, ())) is None
    assert ahead.take(REQUESTS, SAMPLING) is not None


def test_a_batch_that_was_lost_is_forgotten(engine: SlowEngine, ahead: Ahead) -> None:
    engine.lost = True
    engine.let.set()
    ahead.start(REQUESTS, SAMPLING)
    ahead.settle()
    assert ahead.take(REQUESTS, SAMPLING) is ahead.state() is None


def test_another_error_is_raised_where_the_batch_is_waited_for(engine: SlowEngine, ahead: Ahead) -> None:
    def broken(*_: object) -> list[Completion]:
        raise ValueError("broken")

    engine.generate = broken  # type: ignore[method-assign]
    ahead.start(REQUESTS, SAMPLING)
    with pytest.raises(ValueError, match="broken"):
        ahead.settle()


def test_a_batch_survives_in_a_file(engine: SlowEngine, ahead: Ahead) -> None:
    engine.let.set()
    ahead.start(REQUESTS, SAMPLING)
    ahead.settle()
    other = Ahead(engine)  # type: ignore[arg-type]  # as above
    other.restore(pickle.loads(pickle.dumps(ahead.state())))
    drawn = other.take(REQUESTS, SAMPLING)
    assert drawn is not None and [completion.token_ids.tolist() for completion in drawn.completions] == [[10], [20]]
