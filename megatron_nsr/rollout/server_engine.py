"""vLLM API servers as one rollout engine: prompts are spread over them, weights are pushed to all of them.

May import: types, platform, this package, aiohttp, torch, transformers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import aiohttp
import torch

from megatron_nsr.rollout import vllm_api
from megatron_nsr.rollout.engine import Completion, Region, RolloutsLost, SampleRequest, Sampling
from megatron_nsr.rollout.pushed_weights import HEAD, PushedWeights
from megatron_nsr.rollout.server_client import CALL_TIMEOUT_S, SIGN_OF_LIFE_S, Server, ServerError, new_session, retried
from megatron_nsr.rollout.server_sampling import sample_on_servers
from megatron_nsr.rollout.weight_transport import FileTransport, NcclTransport, Transport, TransportError
from megatron_nsr.types import UserError

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

    names: of the weights that every server holds, as `check_servers` found them. tied: the policy has no head of its own. fits: raises
    UserError where a server, which may have come later, was started with another config.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
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
        self._name, self._told = uuid4().hex, set[str]()
        self._transport: Transport = NcclTransport() if torch.cuda.is_available() else FileTransport()
        self._members: list[Member] = []
        self._version: int | None = None
        self._lost = "no weights were pushed yet"

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
        return asyncio.run(sample_on_servers(self._members, self._label(self._version), requests, sampling, self._timeout_s))

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        """Replaces every weight of every server that answers, and waits for one where none does; see RolloutEngine.

        Where none can be reached the tensors are consumed all the same, and `generate` raises RolloutsLost.
        """
        self._version = None
        if not self._speaks:
            size = sum(tensor.nbytes for _, tensor in tensors)
            self._version = version
            return size
        tied_apart = self._tied and HEAD in self._names
        pushed = PushedWeights(tensors, self._names, vocabulary=self._vocabulary, copy_embedding=tied_apart)
        try:
            self._members = asyncio.run(self._answering())
            self._run(self._begin)
            self._transport.connect([(m.identity, m.workers) for m in self._members], self._initialize)
            self._run(lambda session, member: member.server.call(session, vllm_api.START_UPDATE, timeout_s=CALL_TIMEOUT_S))
            for bucket in _buckets(pushed, self._bucket_bytes):
                self._transport.send(bucket, self._announce)
            self._run(lambda session, member: member.server.call(session, vllm_api.FINISH_UPDATE, timeout_s=CALL_TIMEOUT_S))
            pushed.check()
            self._run(lambda session, member: self._end(session, member, version))
        except (ServerError, TransportError) as error:
            self._lost = str(error)
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
            answers = self._run(lambda session, member: member.server.workers(session, "nsr_checksums"))
        except ServerError as error:
            self._version, self._lost = None, str(error)
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
                problems = [item for item in found if isinstance(item, BaseException)]
                for problem in problems:
                    if not isinstance(problem, ServerError):
                        raise problem
                    if members:
                        self._tell(problem)
                if not members:  # one that may still come is waited for
                    raise min(problems, key=lambda problem: isinstance(problem, ServerError) and problem.answered)
                return members

            return await retried(all_of_them, self._timeout_s)

    async def _join(self, session: aiohttp.ClientSession, server: Server) -> Member:
        workers = await server.workers(session, "nsr_describe", timeout_s=SIGN_OF_LIFE_S)
        try:
            self._fits(server, workers)
        except UserError as error:
            raise ServerError(server, str(error).removeprefix(f"{server.name}: "), answered=True) from None
        return Member(server, workers[0]["identity"], len(workers), workers[0]["max_num_seqs"])

    def _run(self, call: Callable[[aiohttp.ClientSession, Member], Coroutine[Any, Any, Any]]) -> list[Any]:
        """Makes a call to every member at once; one that fails is no member any more. Raises its ServerError where none is left."""

        async def run() -> list[Any]:
            async with new_session() as session:
                return await asyncio.gather(*(call(session, member) for member in self._members), return_exceptions=True)

        answers = asyncio.run(run())
        for problem in answers:
            if isinstance(problem, BaseException) and not isinstance(problem, ServerError):
                raise problem
        failed = [item for item in answers if isinstance(item, ServerError)]
        for item in failed:
            self._tell(item)
        self._members = [member for member, item in zip(self._members, answers, strict=True) if not isinstance(item, ServerError)]
        if failed and not self._members:
            raise failed[0]
        return [item for item in answers if not isinstance(item, ServerError)]

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
        await member.server.workers(session, "nsr_label", None)

    async def _end(self, session: aiohttp.ClientSession, member: Member, version: int) -> None:
        """Cached keys and values were computed with the old weights."""
        server = member.server
        for _ in range(RESETS):
            if (await server.call(session, vllm_api.RESET_PREFIX_CACHE, timeout_s=CALL_TIMEOUT_S))["success"]:
                break
            await asyncio.sleep(RESET_PAUSE_S)
        else:
            raise ServerError(server, "did not reset its prefix cache: requests are still running", answered=True)
        await server.workers(session, "nsr_label", self._label(version))
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
