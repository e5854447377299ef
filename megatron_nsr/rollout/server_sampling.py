"""Spreads requests over rollout servers: each takes the next one when it has room, and what a lost server had goes to the others.

May import: this package, aiohttp.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from megatron_nsr.rollout.engine import Completion, RolloutsLost, SampleRequest, Sampling
from megatron_nsr.rollout.server_client import SIGN_OF_LIFE_S, Held, ServerError, new_session, retried

if TYPE_CHECKING:
    from megatron_nsr.rollout.server_engine import Member

AHEAD = 2  # a server is given so many times the sequences that it runs at once, so that it never waits for work
INTERRUPTIONS = 5  # connections lost in a row, by a server that is there when asked, before it counts as lost


async def sample_on_servers(
    members: Sequence[Member], version: int, requests: Sequence[SampleRequest], sampling: Sampling, timeout_s: float
) -> list[Completion]:
    """The responses to all requests, in their order, whoever gave them.

    A server that cannot be reached is waited for; one that then turns out to have been started again is lost, as is one that
    answers with an error. Raises RolloutsLost where all are.
    """
    work = _Work(version, requests, sampling, timeout_s)
    async with new_session() as session, _cancelled_at_the_end() as start:
        everything = start(work.left.join())
        servers = {start(work.serve(session, member)) for member in members}
        while servers and not everything.done():
            ended, _ = await asyncio.wait({everything, *servers}, return_when=asyncio.FIRST_COMPLETED)
            for task in ended & servers:
                task.result()  # raises where an answer made no sense
            servers -= ended
        if not everything.done():
            raise RolloutsLost("; ".join(work.problems))
    return [completion for answer in work.answers for completion in answer]


@asynccontextmanager
async def _cancelled_at_the_end() -> AsyncIterator[Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]]:
    """Gives a function that starts tasks, none of which outlives the block."""
    tasks: list[asyncio.Task[None]] = []

    def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    try:
        yield start
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Work:
    """What is left to sample, and what has been."""

    def __init__(self, version: int, requests: Sequence[SampleRequest], sampling: Sampling, timeout_s: float) -> None:
        self.version, self.requests, self.sampling, self.timeout_s = version, requests, sampling, timeout_s
        self.answers: list[list[Completion]] = [[] for _ in requests]
        self.problems: list[str] = []
        self.left: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(requests)):
            self.left.put_nowait(index)

    async def serve(self, session: aiohttp.ClientSession, member: Member) -> None:
        """Gives the server work until it is lost (or this is cancelled)."""
        width = max(1, AHEAD * member.max_num_seqs // max(request.n for request in self.requests))
        async with _cancelled_at_the_end() as start:
            tasks = {start(self._take(session, member)) for _ in range(min(width, len(self.requests)))}
            tasks.add(start(self._watch(session, member)))
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # they end by an error only
            try:
                for task in ended:
                    task.result()
            except ServerError as error:
                self.problems.append(str(error))

    async def _take(self, session: aiohttp.ClientSession, member: Member) -> None:
        interruptions = 0
        while True:
            index = await self.left.get()
            try:
                self.answers[index] = await member.server.generate(session, self.requests[index], self.sampling)
                interruptions = 0
            except BaseException as error:
                self.left.put_nowait(index)  # for whoever is free
                interruptions += 1
                if not isinstance(error, ServerError) or error.answered or interruptions > INTERRUPTIONS:
                    raise
                await self._require(session, member)
            finally:
                self.left.task_done()

    async def _watch(self, session: aiohttp.ClientSession, member: Member) -> None:
        """A host that is switched off closes no connection: the server is asked for signs of life while it samples."""
        while True:
            await asyncio.sleep(SIGN_OF_LIFE_S)
            await self._require(session, member)

    async def _require(self, session: aiohttp.ClientSession, member: Member) -> None:
        """Raises ServerError unless the server is there, perhaps after a while, with the weights that it was given."""
        held = await retried(lambda: member.server.held(session), self.timeout_s)
        if held != Held(member.identity, self.version):
            raise ServerError(member.server, "was started again and has lost its weights", answered=True)
