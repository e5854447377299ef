"""Spreads requests over rollout servers: each takes the next one when it has room, and what a lost server had goes to the others.

May import: this package, aiohttp.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling
from megatron_nsr.rollout.server_client import SIGN_OF_LIFE_S, ServerError, ServersLost, new_session, retried

if TYPE_CHECKING:
    from megatron_nsr.rollout.server_engine import Member

AHEAD = 2  # a server is given so many times the sequences that it runs at once, so that it never waits for work
INTERRUPTIONS = 5  # connections lost in a row, by a server that is there when asked, before it counts as lost


async def sample_on_servers(
    members: Sequence[Member], label: str, requests: Sequence[SampleRequest], sampling: Sampling, timeout_s: float
) -> list[Completion]:
    """The responses to all requests, in their order, whoever gave them.

    label: of the weights that the servers were given. A server that cannot be reached is waited for; one that then turns out to have
    been started again, or to hold other weights, is lost, as is one that answers with an error. It is asked before its first response
    and after its last: one that was lost in between gave responses that cannot be trusted. Raises ServersLost where all are lost.
    """
    work = _Work(label, requests, sampling, timeout_s)
    async with new_session() as session, _cancelled_at_the_end() as start:
        serving = {member: start(work.serve(session, member)) for member in members}
        while not work.complete:
            everything = start(work.left.join())
            servers = set(serving.values())
            while servers and not everything.done():
                ended, _ = await asyncio.wait({everything, *servers}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended & servers:
                    task.result()  # raises where an answer made no sense
                servers -= ended
            if not everything.done():
                raise ServersLost(list(work.problems.values()))
            for member in await work.doubtful(session):
                serving.pop(member).cancel()
                work.take_back(member)
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

    def __init__(self, label: str, requests: Sequence[SampleRequest], sampling: Sampling, timeout_s: float) -> None:
        self.label, self.requests, self.sampling, self.timeout_s = label, requests, sampling, timeout_s
        self.answers: list[list[Completion]] = [[] for _ in requests]
        self.givers: dict[int, Member] = {}  # who gave which of the answers
        self.problems: dict[str, ServerError] = {}  # the last of each lost server, by its name
        self.waited_for: set[str] = set()
        self.left: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(requests)):
            self.left.put_nowait(index)

    @property
    def complete(self) -> bool:
        return len(self.givers) == len(self.requests)

    async def doubtful(self, session: aiohttp.ClientSession) -> list[Member]:
        """Those who gave answers and do not hold the weights, or cannot be asked; they are not waited for: others can answer again."""
        members = list(dict.fromkeys(self.givers.values()))
        problems = await asyncio.gather(*(self._check(session, member) for member in members), return_exceptions=True)
        for problem in problems:
            if isinstance(problem, ServerError):
                self._note(problem)
            elif problem is not None:
                raise problem
        return [member for member, problem in zip(members, problems, strict=True) if problem is not None]

    def take_back(self, member: Member) -> None:
        """What the member answered is to be answered again."""
        for index in [index for index, giver in self.givers.items() if giver is member]:
            del self.givers[index]
            self.left.put_nowait(index)

    async def serve(self, session: aiohttp.ClientSession, member: Member) -> None:
        """Gives the server work until it is lost (or this is cancelled)."""
        width = max(1, AHEAD * member.max_num_seqs // max(request.n for request in self.requests))
        try:
            await self._require(session, member)
        except ServerError as error:
            self._note(error)
            return
        async with _cancelled_at_the_end() as start:
            tasks = {start(self._take(session, member)) for _ in range(min(width, len(self.requests)))}
            tasks.add(start(self._watch(session, member)))
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # they end by an error only
            try:
                for task in ended:
                    task.result()
            except ServerError as error:
                self._note(error)

    async def _take(self, session: aiohttp.ClientSession, member: Member) -> None:
        interruptions = 0
        while True:
            index = await self.left.get()
            try:
                self.answers[index] = await member.server.generate(session, self.requests[index], self.sampling)
                self.givers[index], interruptions = member, 0
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
        name = member.server.name

        def tell(error: ServerError) -> None:
            if name not in self.waited_for:
                self.waited_for.add(name)
                print(f"{error}; waiting for it, up to {self.timeout_s:g} s", flush=True)

        await retried(lambda: self._check(session, member), self.timeout_s, waiting=tell)
        if name in self.waited_for:
            self.waited_for.discard(name)
            print(f"{name}: there again, with its weights", flush=True)

    async def _check(self, session: aiohttp.ClientSession, member: Member) -> None:
        held = await member.server.held(session)
        if held.identity != member.identity:
            raise ServerError(member.server, "was started again and has lost its weights", answered=True)
        if held.label != self.label:
            whose = f" ({held.owner})" if held.owner else ""
            raise ServerError(member.server, f"holds other weights: another run uses it, too{whose}", answered=True)

    def _note(self, problem: ServerError) -> None:
        self.problems[problem.server.name] = problem
