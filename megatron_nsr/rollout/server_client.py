"""One rollout server over HTTP: its errors, and what it says of itself.

May import: this package, aiohttp and the standard library.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from megatron_nsr.rollout import vllm_api
from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling

CALL_TIMEOUT_S = 600.0  # loading one bucket; sampling has no limit, its server is asked for signs of life instead
SIGN_OF_LIFE_S = 10.0  # a server that runs answers within
FIRST_PAUSE_S, LONGEST_PAUSE_S, SHORTEST_PAUSE_S = 0.1, 2.0, 0.001  # between tries
REFUSALS_SHOWN = 300  # characters
Result = TypeVar("Result")


class ServerError(Exception):
    """A server did not do what it was asked. `answered`: it said so itself; otherwise it cannot be reached, since `since` (monotonic)."""

    def __init__(self, server: Server, problem: str, *, answered: bool = False) -> None:
        super().__init__(f"{server.name}: {problem}")
        self.server, self.answered, self.since = server, answered, time.monotonic()


class ServersLost(Exception):
    """No server is left; what happened to each."""

    def __init__(self, problems: Sequence[ServerError]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Held:
    """Which process a server is, the label of the weights it holds, and the run that began the last push to it.

    A server that was started again is another process.
    """

    identity: str
    label: str | None
    owner: str | None = None


class Server:
    """A server's address and the calls to it. `name` is what messages call it, as rollout.servers[0]=http://host:8000."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url.rstrip("/"), name

    async def call(
        self, session: aiohttp.ClientSession, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """POSTs and returns the answer's JSON. Raises ServerError."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with session.post(self.url + path, json=body, timeout=timeout) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise ServerError(self, f"POST {path} gave status {answer.status}: {text[:REFUSALS_SHOWN]}", answered=True)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(self, f"{type(error).__name__} {error}".strip()) from None
        return json.loads(text) if text else None

    async def workers(self, session: aiohttp.ClientSession, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """Calls a method of server_worker.WorkerExtension on every worker; the results in the order of ranks. Raises ServerError."""
        answer = await self.call(session, vllm_api.CALL_WORKERS, {"method": method, "args": list(arguments)}, timeout_s)
        results: list[Any] = answer["results"]
        return results

    async def held(self, session: aiohttp.ClientSession) -> Held:
        """Raises ServerError, soon where it cannot be reached."""
        first = (await self.workers(session, "nsr_held", timeout_s=SIGN_OF_LIFE_S))[0]
        return Held(first["identity"], first["label"], first["owner"])

    async def generate(self, session: aiohttp.ClientSession, request: SampleRequest, sampling: Sampling) -> list[Completion]:
        """Samples the responses of one request. Raises ServerError, RuntimeError for an answer that makes no sense."""
        return vllm_api.read_completions(await self.call(session, vllm_api.GENERATE, vllm_api.generate_body(request, sampling)), request.n)


async def retried(
    call: Callable[[], Awaitable[Result]], timeout_s: float, *, waiting: Callable[[ServerError], None] = lambda error: None
) -> Result:
    """The call's result, tried again while the server cannot be reached, for `timeout_s`; `waiting` is told of the first failure.

    Raises the last ServerError, whose `since` is then that of the first; one that the server answered itself at once.
    """
    since: float | None = None
    deadline, pause = time.monotonic() + timeout_s, FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except ServerError as error:
            if error.answered:
                raise
            error.since = since = error.since if since is None else since
            if (left := deadline - time.monotonic()) < SHORTEST_PAUSE_S:
                raise
            if pause == FIRST_PAUSE_S:
                waiting(error)
        await asyncio.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def new_session() -> aiohttp.ClientSession:
    """For one batch of calls; a response of any length, as many connections as there are calls, no proxy from the environment."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), trust_env=False)
