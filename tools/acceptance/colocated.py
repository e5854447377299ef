"""One policy and one vLLM engine in this process, and what part (d) asks of them in turn.

May import: everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.components import Components, Inputs
from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.rollout.engine import SampleRequest, Sampling
from megatron_nsr.rollout.engines import build_engine, check_engine
from megatron_nsr.rollout.held_weights import wrong_tensors
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.rollout.seeds import sample_seed
from megatron_nsr.rollout.vllm_engine import vllm_sampling_params
from megatron_nsr.types import Trajectory, WeightedSample
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.gathering import execute_push_plan
from tools.acceptance.limits import seconds_of
from tools.acceptance.policies import update_on
from tools.acceptance.record import NotRun, Record, Step
from tools.acceptance.runs import timed, used_gib
from tools.acceptance.sampled import misaligned, plausible, shared_ids, shared_tokens
from tools.acceptance.servers import served

GAPS = {"float32": 2e-4, "bfloat16": 0.02}  # nats, of a mean
SAME = {"float32": 0.95, "bfloat16": 0.7}  # share of sampled tokens before a rounding makes a difference
STALE_RATE = {"float32": 1e-3, "bfloat16": 1e-4}  # a learning rate that moves most weights of a published or tiny shape, and ruins none
ROUNDS = 5
FREED_SHARE = 0.9  # of the weights' bytes at least; the cache comes on top


class Colocated:
    """Its methods are steps of the part, in their order: later ones go on from what earlier ones left in the engine."""

    def __init__(self, record: Record, config: Config, inputs: Inputs, parts: Components, device: torch.device, work: Path) -> None:
        assert parts.rollouts is not None and inputs.train is not None
        self.record, self.config, self.inputs, self.parts, self.device, self.work = record, config, inputs, parts, device, work
        self.rollouts, self.prompts = parts.rollouts, inputs.train.prompts[: config.data.prompts_per_step]
        self.engine: Any = parts.rollouts._engine  # a VllmEngine; nothing else leads to its own load and to bare vLLM
        self.samples = config.rollout.samples_per_prompt
        self.sampling = Sampling(config.rollout.temperature, config.rollout.max_response_tokens, inputs.tokenizer.stop_ids)
        self.version = 0  # pushes
        self.drawn: list[Trajectory] = []  # from the weights that the policy has
        self.gap: float | None = None

    def push(self, step: Step) -> None:
        """Times whole pushes, and what none can do without: copying the bytes once, and vLLM's own load of tensors that lie ready."""
        first = self._push()  # verified by the rollouts themselves, and it makes what later ones reuse
        tensors = list(self._tensors())
        size = sum(tensor.nbytes for _, tensor in tensors)
        copies = [torch.empty_like(tensor) for _, tensor in tensors]

        def copy() -> None:
            for target, (_, source) in zip(copies, tensors, strict=True):
                target.copy_(source)

        def load() -> None:
            self.engine.load_weights(iter(tensors), self.version)

        copied = seconds_of(self.device, copy)
        loads = [timed(load)[0] for _ in range(ROUNDS)]
        whole = [timed(self._push)[0] for _ in range(ROUNDS)]
        pushed = statistics.median(whole)
        step.figure(bytes=size, push_seconds=whole, load_seconds=loads, copy_seconds=copied, copy_gb_s=2 * size / copied / 1e9)
        step.check("bytes that the engine took over those of the model", first["rollout/push_bytes"] / size, at_most=1.0, at_least=1.0)
        step.check("tensors that the engine holds otherwise than the policy", len(self._differing()), at_most=0)
        self.record.goal("push", pushed / (copied + statistics.median(loads)))
        self.record.goal("push seconds", pushed)

    def generation(self, step: Step) -> None:
        self.drawn, again, other = (self._generate(seed_step) for seed_step in (1, 1, 2))
        expected = len(self.prompts) * self.samples
        step.figure(tokens=sum(t.length for t in self.drawn), truncated=sum(t.truncated for t in self.drawn))
        step.check("responses", len(self.drawn), at_most=expected, at_least=expected)
        same, different = shared_tokens(self.drawn, again), shared_tokens(self.drawn, other)
        step.check("share of the same tokens from the same seeds", same, at_least=SAME[self.config.model.dtype], wrong=different)
        step.check("log-probs are finite, one a token, none above 0", plausible(self.drawn))
        self.gap = self._check_gap(step, self.drawn, wrong=misaligned(self.drawn))

    def beside_bare_vllm(self, step: Step) -> None:
        """The same engine, prompts, seeds and sampling parameters, each way first in every other round."""
        ways: dict[str, Callable[[int], list[list[int]]]] = {"bare": self._bare, "project": self._through}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        same = []
        self.parts.phases.sample()
        for number in range(ROUNDS + 1):
            found = {}
            for name in sorted(ways, reverse=bool(number % 2)):
                seconds, found[name] = timed(partial(ways[name], 10 + number))
                if number:  # the first round warms up
                    rates[name].append(sum(map(len, found[name])) / seconds)
            same.append(shared_ids(found["bare"], found["project"]))
        step.figure(tokens_per_s=rates)
        step.check("share of the same tokens", min(same), at_least=SAME[self.config.model.dtype])
        self.record.goal("rollouts", statistics.median(rates["project"]) / statistics.median(rates["bare"]))

    def stale_weights(self, step: Step) -> None:
        """An update without a push must show in checksums and gap, or neither would notice a push that fails; a push mends both."""
        self.parts.phases.inspect()
        self._update(self.drawn, STALE_RATE[self.config.model.dtype])
        stale = self.parts.actor.measure_samples(self.drawn)["rollout/logprob_gap_mean"]
        self.parts.phases.push()
        step.check("tensors that a missing push leaves different", len(self._differing()), at_least=1)
        self._push()
        step.check("tensors that differ after the push", len(self._differing()), at_most=0)
        self.drawn = self._generate(1)
        self._check_gap(step, self.drawn, wrong=stale)

    def sleep(self, step: Step) -> None:
        """A training phase that changes no weight, the engine asleep: the memory that its driver sees freed, the same responses after."""
        if self.device.type != "cuda":
            self.parts.phases.train()
            self._update(self.drawn, 0.0)
            self._push()
            step.figure(levels="not run: vLLM cannot sleep on a CPU; the policy's own offload ran")
            step.check(
                "share of the same tokens after training",
                shared_tokens(self.drawn, self._generate(1)),
                at_least=SAME[self.config.model.dtype],
            )
            return
        weights = sum(tensor.nbytes for _, tensor in self._tensors()) / 2**30
        for level in (1, 2):
            self.parts.phases.sample()
            awake = used_gib()
            asleep_s, _ = timed(partial(self.engine.sleep, level))
            freed = awake - used_gib()
            self._update(self.drawn, 0.0)
            awake_s, _ = timed(partial(self._wake, level))
            step.figure(**{f"level_{level}": {"freed_gib": freed, "sleep_seconds": asleep_s, "wake_seconds": awake_s}})
            step.check(f"level {level}: GiB freed", freed, at_least=FREED_SHARE * weights)
            step.check(
                f"level {level}: share of the same tokens",
                shared_tokens(self.drawn, self._generate(1)),
                at_least=SAME[self.config.model.dtype],
            )

    def push_to_server(self, step: Step) -> None:
        """NCCL from this GPU to a server on another one, files on a CPU."""
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.device_count() < 2:
            raise NotRun("one GPU: NCCL joins no two processes on the same one")
        with served(self.config, self.work, self.record.remaining_s, {"CUDA_VISIBLE_DEVICES": "1"} if on_gpu else {}) as address:
            values = self.config.model_dump(by_alias=True)
            server = {"mode": "server", "servers": [address], "sleep_level": 0}
            config = parse_config(values | {"rollout": values["rollout"] | server, "training": values["training"] | {"offload": "none"}})
            engine = build_engine(config, self.inputs.shape, check_engine(config, self.inputs.shape, world_size=1, samples=True))
            with Rollouts(engine, self.inputs.tokenizer.decode, run_seed=config.run.seed, verify_push="always") as rollouts:
                self.parts.phases.push()
                plan, chunks = self.parts.push_plan, self.parts.actor.chunks
                # Raises where the server does not hold what the policy holds.
                seconds, _ = timed(lambda: rollouts.push(self._tensors(), self.version, partial(policy_checksums, plan, chunks)))
                found = rollouts.generate(self.prompts, step=1, samples=self.samples, sampling=self.sampling, purpose="train")
        step.figure(push_and_verify_seconds=seconds, tokens_shared_with_the_engine_in_process=shared_tokens(self.drawn, found))
        self._check_gap(step, found, wrong=misaligned(found))

    def _push(self) -> dict[str, float]:
        self.version += 1
        return self.parts.push(self.version)

    def _wake(self, level: int) -> None:
        """After level 2 the engine's weights are gone, and a push brings them."""
        self.engine.wake("weights")
        if level == 2:
            self._push()
        self.engine.wake("kv_cache")

    def _tensors(self) -> Any:
        return execute_push_plan(self.parts.push_plan, self.parts.actor.chunks)

    def _differing(self) -> list[str]:
        sums = policy_checksums(self.parts.push_plan, self.parts.actor.chunks, self.engine.dtype)
        return wrong_tensors(sums, self.engine.held_checksums())

    def _update(self, trajectories: Sequence[Trajectory], learning_rate: float) -> None:
        samples = [WeightedSample(t, 1.0 if index % 2 else -1.0, 1e-3) for index, t in enumerate(trajectories)]
        update_on(self.parts.actor, self.parts.actor.pack(samples), learning_rate)

    def _generate(self, seed_step: int) -> list[Trajectory]:
        self.parts.phases.sample()
        return self._draw(seed_step)

    def _draw(self, seed_step: int) -> list[Trajectory]:
        return self.rollouts.generate(self.prompts, step=seed_step, samples=self.samples, sampling=self.sampling, purpose="train")

    def _through(self, seed_step: int) -> list[list[int]]:
        return [trajectory.response_ids.tolist() for trajectory in self._draw(seed_step)]

    def _bare(self, seed_step: int) -> list[list[int]]:
        """vLLM alone: its parameters, its `generate`, token ids out."""
        seeds = [sample_seed(self.config.run.seed, seed_step, p.id, 0, purpose="train") for p in self.prompts]
        requests = [SampleRequest(p.token_ids, seed, self.samples) for p, seed in zip(self.prompts, seeds, strict=True)]
        parameters = [vllm_sampling_params(request, self.sampling) for request in requests]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self.engine._llm.generate(prompts, parameters, use_tqdm=False)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]

    def _check_gap(self, step: Step, trajectories: Sequence[Trajectory], *, wrong: float) -> float:
        self.parts.phases.inspect()
        found = self.parts.actor.measure_samples(trajectories)
        gap = found["rollout/logprob_gap_mean"]
        step.figure(logprob_gap_max=found["rollout/logprob_gap_max"])
        step.check("mean log-prob gap, nats", gap, at_most=GAPS[self.config.model.dtype], wrong=wrong)
        return gap
