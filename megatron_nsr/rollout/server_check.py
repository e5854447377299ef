"""Whether the servers that rollout.servers names are there and fit the run, found out before anything slow starts.

May import: types, this package, torch.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_nsr.rollout.server_client import CALL_TIMEOUT_S, Server, ServerError, new_session, retried
from megatron_nsr.rollout.server_worker import FILE_TRANSPORT
from megatron_nsr.types import UserError

START = "start it with `megatron-nsr serve CONFIG --port PORT`"
NOT_FOR_SAMPLING = ("initializer_range",)  # fields of a model that may differ
SEEN = b"megatron_nsr"  # what a file holds by which a server shows that it sees the trainer's files


@dataclass(frozen=True, slots=True)
class Needed:
    """What a run asks of its servers, each with the config key that says it."""

    transport: str
    dtype: str
    quantization: str | None  # vLLM's name
    workers: int
    max_model_len: int
    model: Mapping[str, Any]  # a ModelShape as JSON


def check_servers(servers: Sequence[Server], needed: Needed, timeout_s: float) -> frozenset[str]:
    """The HF names of the weights that they hold.

    Waits up to `timeout_s` for servers that cannot be reached yet. Raises UserError naming the first that is not there, is no
    server of ours, or serves something else.
    """
    return asyncio.run(_check(servers, needed, timeout_s))


async def _check(servers: Sequence[Server], needed: Needed, timeout_s: float) -> frozenset[str]:
    async with new_session() as session:
        described = await asyncio.gather(*(_describe(session, server, timeout_s) for server in servers))
        _refuse_twice(servers, described)
        for server, workers in zip(servers, described, strict=True):
            compare(server, workers, needed)
        if needed.transport == FILE_TRANSPORT:
            for server in servers:
                await _require_shared_files(session, server)
    return frozenset(described[0][0]["names"])


def _refuse_twice(servers: Sequence[Server], described: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    first: dict[str, Server] = {}
    for server, workers in zip(servers, described, strict=True):
        if (other := first.setdefault(workers[0]["identity"], server)) is not server:
            raise UserError(f"{other.name} and {server.name} are the same server; name it once")


async def _describe(session: aiohttp.ClientSession, server: Server, timeout_s: float) -> list[dict[str, Any]]:
    def tell(_error: ServerError) -> None:
        print(f"{server.name}: waiting for it, up to {timeout_s:g} s ...", flush=True)

    try:
        return await retried(lambda: server.workers(session, "nsr_describe", timeout_s=CALL_TIMEOUT_S), timeout_s, waiting=tell)
    except ServerError as error:
        if error.answered:
            raise UserError(f"{error}; this is no rollout server: {START}") from None
        raise UserError(f"{error}; there is no server: {START}, or correct the address") from None


def compare(server: Server, workers: Sequence[Mapping[str, Any]], needed: Needed) -> None:
    """Raises UserError where the server was started with another config."""
    first = workers[0]
    pairs = {
        "model.dtype": (first["dtype"], needed.dtype),
        "logits": (first["logits"], "float32"),
        "rollout.quantization": (first["quantization"], needed.quantization),
        "rollout.tensor_parallel": (len(workers), needed.workers),
        "logprobs_mode": (first["logprobs_mode"], "processed_logprobs"),
        "weight transfer backend": (first["transport"], needed.transport),
        **{
            f"the model's {field}": (first["model"].get(field), value)
            for field, value in needed.model.items()
            if field not in NOT_FOR_SAMPLING
        },
    }
    differences = [f"{what} {theirs}, not {ours}" for what, (theirs, ours) in pairs.items() if theirs != ours]
    if first["max_model_len"] < needed.max_model_len:
        differences.append(f"room for {first['max_model_len']} tokens, not {needed.max_model_len}")
    if differences:
        raise UserError(f"{server.name}: it was started with {', '.join(differences)}; start it with this run's config")


async def _require_shared_files(session: aiohttp.ClientSession, server: Server) -> None:
    try:
        with tempfile.NamedTemporaryFile(prefix="megatron_nsr_") as file:
            file.write(SEEN)
            file.flush()
            answers = await server.workers(session, "nsr_sees", file.name, len(SEEN))
    except OSError as error:
        raise UserError(f"TMPDIR, through which weights travel without CUDA, cannot be written: {error}") from None
    if not all(answer["sees"] for answer in answers):
        raise UserError(
            f"{server.name}: it does not see this host's {tempfile.gettempdir()}, through which weights travel without CUDA; "
            "run it on this host, or set TMPDIR to a folder that both hosts share"
        )
