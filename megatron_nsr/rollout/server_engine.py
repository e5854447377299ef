"""vLLM API servers as one rollout engine: prompts are spread over them, weights are pushed to all of them.

May import: types, platform, this package, aiohttp, torch, transformers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import aiohttp
import torch

from megatron_nsr.rollout import vllm_api
from megatron_nsr.rollout.engine import Completion, Region, SampleRequest, Sampling
from megatron_nsr.rollout.pushed_weights import HEAD, PushedWeights
from megatron_nsr.rollout.server_client import CALL_TIMEOUT_S, SIGN_OF_LIFE_S, Server, ServerError, ServersLost, new_session, retried
from megatron_nsr.rollout.server_sampling import sample_on_servers
from megatron_nsr.rollout.weight_transport import FileTransport, NcclTransport, Transport, TransportError
from megatron_nsr.types import RolloutsLost, UserError

Fits = Callable[[Server, Sequence[Mapping[str, Any]]], None]
RESETS = 50  # tries to empty the prefix cache: blocks of the last requests are freed a moment after their answers
RESET_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Member:
    """A server that takes part: which process it was when it joined, and how many workers and sequences it has."""

    server: Server
    identity: str
    workers: int
    max_num_seqs: int


class ServerEngine:
    """A RolloutEngine over rollout servers, which hold the weights of the last push and sample on their own.

    Every rank makes one; rank 0 (`speaks`) talks to the servers, the others only keep in step: they consume what is pushed and
    sample nothing. A server that is lost is left out until the next push, which takes in whatever answers then. No file of
    the model is read but its config.

    run: what servers and messages call the run. names: of the weights that every server holds, as `check_servers` found them. tied: the
    policy has no head of its own. fits: raises UserError where a server, which may have come later, was started with another config.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        run: str,
        names: frozenset[str],
        tied: bool,
        vocabulary: int,
        dtype: torch.dtype,
        bucket_bytes: int,
        timeout_s: float,
        speaks: bool,
        fits: Fits,
    ) -> None:
        self._servers, self._names, self._tied, self._vocabulary, self._dtype = servers, names, tied, vocabulary, dtype
        self._bucket_bytes, self._timeout_s, self._speaks, self._fits = bucket_bytes, timeout_s, speaks, fits
        self._name, self._told = f"{run} [{uuid4().hex[:8]}]", set[str]()
        self._transport: Transport = NcclTransport() if torch.cuda.is_available() else FileTransport()
        self._members: list[Member] = []
        self._version: int | None = None
        self._lost = "no weights were pushed yet"
        self._problems: dict[str, ServerError] = {}  # of the last push, by the server's name
        self._alone_since: float | None = None  # when the last server was lost, monotonic

    @property
    def version(self) -> int | None:
        """The version of the weights it samples from; None before the first push and where no server took one."""
        return self._version

    @property
    def holders(self) -> Sequence[str]:
        """The servers with the weights, each start of one under a name of its own."""
        return [] if self._version is None else [member.identity for member in self._members]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self._dtype

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        """Samples; see RolloutEngine. The servers' own limits hold, which `check_servers` compared with the config.

        Raises RolloutsLost where no server with the weights is left.
        """
        if not self._speaks or not requests:
            return []
        if self._version is None:
            raise RolloutsLost(self._lost)
        try:
            return asyncio.run(sample_on_servers(self._members, self._label(self._version), requests, sampling, self._timeout_s))
        except ServersLost as lost:
            self._alone_since = max(problem.since for problem in lost.problems)
            raise RolloutsLost(self._account(lost.problems)) from None

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        """Replaces every weight of every server that answers, and waits for one where none does; see RolloutEngine.

        Waits no longer than `timeout_s` after the last server was lost. Where none can be reached the tensors are consumed all the
        same, and `generate` raises RolloutsLost.
        """
        self._version = None
        if not self._speaks:
            size = sum(tensor.nbytes for _, tensor in tensors)
            self._version = version
            return size
        tied_apart = self._tied and HEAD in self._names
        pushed = PushedWeights(tensors, self._names, vocabulary=self._vocabulary, copy_embedding=tied_apart)
        self._problems.clear()
        try:
            self._members = asyncio.run(self._answering())
            self._run(self._begin, owned=False)
            self._transport.connect([(m.identity, m.workers) for m in self._members], self._initialize)
            self._run(lambda session, member: member.server.call(session, vllm_api.START_UPDATE, timeout_s=CALL_TIMEOUT_S))
            for bucket in _buckets(pushed, self._bucket_bytes):
                self._transport.send(bucket, self._announce)
            self._run(lambda session, member: member.server.call(session, vllm_api.FINISH_UPDATE, timeout_s=CALL_TIMEOUT_S))
            pushed.check()
            self._run(lambda session, member: self._end(session, member, version))
        except (ServerError, TransportError) as error:
            self._note_loss(error)
            pushed.drain()
            pushed.check()
            return pushed.bytes
        self._version = version
        return pushed.bytes

    def held_checksums(self) -> list[dict[Region, int]]:
        """Of each worker of each server; see RolloutEngine. Where the last server is lost `generate` says so."""
        if not self._speaks or self._version is None:
            return []
        try:
            answers = self._run(self._checksums)
        except ServerError as error:
            self._version = None
            self._note_loss(error)
            return []
        workers = [worker for answer in answers for worker in answer]
        return [{(name, row, column): share for name, row, column, share in worker["held"]} for worker in workers]

    def close(self) -> None:
        """The servers are the user's and go on."""
        self._members, self._version, self._lost = [], None, "the engine is closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _answering(self) -> list[Member]:
        """The servers that can be reached; waits for the first where there is none. Raises ServerError where none comes."""
        async with new_session() as session:

            async def all_of_them() -> list[Member]:
                found = await asyncio.gather(*(self._join(session, server) for server in self._servers), return_exceptions=True)
                members = [item for item in found if isinstance(item, Member)]
                self._problems = {item.server.name: item for item in found if isinstance(item, ServerError)}
                problems = [item for item in found if isinstance(item, BaseException)]
                for problem in problems:
                    if not isinstance(problem, ServerError):
                        raise problem
                    if members:
                        self._tell(problem)
                if not members:  # one that may still come is waited for
                    raise min(problems, key=lambda problem: isinstance(problem, ServerError) and problem.answered)
                return members

            left = self._timeout_s if self._alone_since is None else max(0.0, self._alone_since + self._timeout_s - time.monotonic())

            def tell(error: ServerError) -> None:
                self._alone_since = self._alone_since or error.since
                print(f"{error}; no rollout server is left: waiting for one, up to {left:.3g} s", flush=True)

            members = await retried(all_of_them, left, waiting=tell)
            if self._alone_since is not None:
                self._alone_since = None
                print(f"{', '.join(member.server.name for member in members)}: there again; the weights are pushed anew", flush=True)
            return members

    async def _join(self, session: aiohttp.ClientSession, server: Server) -> Member:
        workers = await server.workers(session, "nsr_describe", timeout_s=SIGN_OF_LIFE_S)
        try:
            self._fits(server, workers)
        except UserError as error:
            raise ServerError(server, str(error).removeprefix(f"{server.name}: "), answered=True) from None
        return Member(server, workers[0]["identity"], len(workers), workers[0]["max_num_seqs"])

    def _run(self, call: Callable[[aiohttp.ClientSession, Member], Coroutine[Any, Any, Any]], *, owned: bool = True) -> list[Any]:
        """Makes a call to every member at once; one that fails is no member any more. Raises its ServerError where none is left.

        owned: this run has begun a push to the members, so that another owner is one that has come since.
        """

        async def one(session: aiohttp.ClientSession, member: Member) -> Any:
            try:
                return await call(session, member)
            except ServerError as error:
                if owned and error.answered:
                    await self._require_own(session, member.server)
                raise

        async def run() -> list[Any]:
            async with new_session() as session:
                return await asyncio.gather(*(one(session, member) for member in self._members), return_exceptions=True)

        answers = asyncio.run(run())
        for problem in answers:
            if isinstance(problem, BaseException) and not isinstance(problem, ServerError):
                raise problem
        failed = [item for item in answers if isinstance(item, ServerError)]
        for item in failed:
            self._problems[item.server.name] = item
            self._tell(item)
        self._members = [member for member, item in zip(self._members, answers, strict=True) if not isinstance(item, ServerError)]
        if failed and not self._members:
            raise failed[0]
        return [item for item in answers if not isinstance(item, ServerError)]

    async def _require_own(self, session: aiohttp.ClientSession, server: Server) -> None:
        """Raises ServerError where another run has begun a push since this one did, or the server was started again."""
        owner = (await server.held(session)).owner
        if owner is None:
            raise ServerError(server, "was started again and has lost its weights", answered=True)
        if owner != self._name:
            raise ServerError(server, f"another run uses it at the same time: {owner}", answered=True)

    async def _checksums(self, session: aiohttp.ClientSession, member: Member) -> list[Any]:
        answer = await member.server.workers(session, "nsr_checksums")
        await self._require_own(session, member.server)
        return answer

    def _note_loss(self, error: ServerError | TransportError) -> None:
        """Keeps for `generate` why nobody has the weights."""
        if isinstance(error, TransportError):
            self._lost = str(error)
            return
        self._alone_since = self._alone_since or error.since
        self._lost = self._account(list(self._problems.values()))

    def _account(self, problems: Sequence[ServerError]) -> str:
        """What happened to each server, and how long one was waited for."""
        waited = "" if all(problem.answered for problem in problems) else f"; none came back within {self._timeout_s:g} s"
        return "; ".join(map(str, problems)) + waited

    def _label(self, version: int) -> str:
        """What the weights of a version are called; two runs that use one server do not take each other's."""
        return f"{self._name}:{version}"

    def _tell(self, problem: ServerError) -> None:
        """That a run goes on with fewer servers, once for each reason."""
        if str(problem) not in self._told:
            self._told.add(str(problem))
            print(f"{problem}; left out until a later push", flush=True)

    def _initialize(self, infos: list[dict[str, Any]]) -> None:
        by_member = dict(zip((member.identity for member in self._members), infos, strict=True))
        self._run(lambda session, m: m.server.call(session, vllm_api.INIT_TRANSFER, {"init_info": by_member[m.identity]}, CALL_TIMEOUT_S))

    def _announce(self, update_info: dict[str, Any]) -> None:
        self._run(lambda session, member: member.server.call(session, vllm_api.UPDATE, {"update_info": update_info}, CALL_TIMEOUT_S))

    async def _begin(self, session: aiohttp.ClientSession, member: Member) -> None:
        await member.server.call(session, vllm_api.PAUSE, timeout_s=CALL_TIMEOUT_S)
        await member.server.workers(session, "nsr_label", None, self._name)

    async def _end(self, session: aiohttp.ClientSession, member: Member, version: int) -> None:
        """Cached keys and values were computed with the old weights."""
        server = member.server
        for _ in range(RESETS):
            if (await server.call(session, vllm_api.RESET_PREFIX_CACHE, timeout_s=CALL_TIMEOUT_S))["success"]:
                break
            await asyncio.sleep(RESET_PAUSE_S)
        else:
            raise ServerError(server, "did not reset its prefix cache: requests are still running", answered=True)
        await server.workers(session, "nsr_label", self._label(version), self._name)
        await server.call(session, vllm_api.RESUME, timeout_s=CALL_TIMEOUT_S)


def _buckets(tensors: PushedWeights, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors that travel together: at most `bucket_bytes`, or one that is larger."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
