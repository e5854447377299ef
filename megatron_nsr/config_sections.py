"""The sections of the configuration: every field with its type, default, unit and meaning.

May import: objective_fields. `config.py` puts them together.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from megatron_nsr.objective_fields import known_objective

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _two(values: Any) -> Any:
    if not isinstance(values, list) or len(values) != 2:
        raise ValueError("give two numbers, [low, high]")
    return values


Range = Annotated[list[NonNegativeFloat], BeforeValidator(_two)]
ObjectiveName = Annotated[str, AfterValidator(known_objective)]


def _address(url: str) -> str:
    """The one spelling of a server's address."""
    if not re.fullmatch(r"https?://[^/\s:]+:[0-9]+/?", url):
        raise ValueError("an address looks like http://host:port")
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]


def _setting(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One message in place of one for each type that a setting may have."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("give true or false, a number, a text or a list of texts") from None


Setting = Annotated[bool | int | float | str | list[str], WrapValidator(_setting)]


class Section(BaseModel):
    """A strict, frozen section: an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: str = Field(description="run directory; the same command with the same directory resumes")
    steps: NonNegative = Field(description="training steps; a step is one batch of prompts")
    seed: NonNegative = Field(0, description="seed of data order, sampling and initialisation")


class ModelConfig(Section):
    path: str = Field(description="HF directory (config.json, tokenizer, safetensors) or a checkpoint of ours (RUN/checkpoints/step_N)")
    initialization: Literal["pretrained", "random"] = Field("pretrained", description="random needs only config.json and the tokenizer")
    backend: Literal["auto", "cpu", "te"] = Field("auto", description="layer implementation: te on CUDA, cpu elsewhere; auto chooses")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="parameters and activations; main weights, gradients and log-probs are fp32"
    )
    transformer: dict[str, Setting] = Field(
        default_factory=dict,
        description="fields of megatron-core's TransformerConfig that change memory or speed alone, such as {recompute_modules: [mlp]}; "
        "which they are is in training.md",
    )
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = Field(
        None,
        description="recipe by which the layers' matrix products compute in FP8, te only: scales from earlier values, from each tensor, "
        "or from blocks of 128; null is dtype throughout; see training.md",
    )
    fp8_edge_layers: NonNegative = Field(0, description="layers at the start, and as many at the end, that stay in bfloat16 under fp8")
    head_fp8: bool = Field(
        False, description="the LM head's logits from sides rounded to FP8 (e4m3); what that does to log-probs is in fused-head.md"
    )


class ParallelConfig(Section):
    tensor: Positive = Field(1, description="tensor-parallel ranks")
    context: Positive = Field(
        1, description="context-parallel ranks, which share the tokens of each sequence; a micro-batch's budget is that of all of them"
    )
    pipeline: Positive = Field(1, description="pipeline stages")
    virtual_pipeline: Positive = Field(1, description="model chunks a pipeline stage (interleaved schedule when above 1)")
    sequence: bool = Field(False, description="sequence parallelism over the tensor-parallel ranks")
    expert: Positive = Field(
        1,
        description="ranks over which a layer's experts are spread, out of all processes of a pipeline stage",
    )
    distributed_optimizer: bool = Field(False, description="shard optimizer states over data-parallel ranks")


class DataConfig(Section):
    train: str | None = Field(None, description="training prompts: .parquet, .jsonl, or a saved HF data set's directory")
    template: Literal["qwen2.5-math", "qwen3", "llama3.1", "plain"] = Field(
        description="prompt template; plain is the problem's text alone"
    )
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are left out and counted")
    prompts_per_step: Positive = Field(1024, description="prompts a step; an epoch's last short batch is dropped")
    shuffle: bool = Field(True, description="a new order each epoch, from run.seed")
    limit: Positive | None = Field(None, description="use only the first rows of the training file")
    validation: str | Positive | None = Field(
        None,
        description="problems that choose the checkpoint, evaluated as the benchmark `validation`: a file, or the number of training "
        "problems that are held out and never trained on",
    )
    validation_seed: NonNegative = Field(0, description="which problems data.validation=NUMBER holds out; the same in runs of any run.seed")


class RolloutConfig(Section):
    mode: Literal["colocated", "server"] = Field("colocated", description="engine in the training processes, or servers of its own")
    servers: list[Address] = Field(
        default_factory=list, description="servers of `megatron-nsr serve`, as [http://host:8000]; for mode=server"
    )
    server_timeout_s: PositiveFloat = Field(
        300.0, description="how long servers that cannot be reached are waited for, seconds: at the start, and where none is left"
    )
    max_staleness: Annotated[int, Field(ge=0, le=1)] = Field(
        0, description="1: a step's responses are drawn while the step before trains, from weights one step older; for mode=server"
    )
    samples_per_prompt: Positive = Field(8, description="responses a prompt")
    max_response_tokens: Positive = Field(3072, description="response budget, tokens")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature; training samples use neither top-p nor top-k")
    tensor_parallel: Positive = Field(1, description="ranks that host one engine together; with mode=server, workers of each server")
    max_num_seqs: Positive = Field(256, description="sequences the engine runs at once")
    kv_cache_mib: Positive | None = Field(None, description="KV cache size, MiB; null lets vLLM size it from gpu_memory_utilization")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of GPU memory for the engine, CUDA only")
    enforce_eager: bool = Field(False, description="no CUDA graphs")
    quantization: Literal["fp8"] | None = Field(
        None, description="what the engine rounds pushed weights to, and computes its layers' products in; see rollouts.md"
    )
    sleep_level: Annotated[int, Field(ge=0, le=2)] = Field(
        0,
        description="what a colocated engine gives back while the policy trains, CUDA only: 0 nothing; 1 the KV cache, and its weights go "
        "to host memory; 2 both are dropped, and the push brings the weights",
    )
    push_bucket_mib: Positive = Field(512, description="bucket of gathered weights in a push, MiB; a rank holds up to two")
    verify_push: Literal["always", "first", "never"] = Field(
        "first", description="pushes after which what the engine holds is compared with the policy; first: each process's first"
    )
    max_logprob_gap: PositiveFloat | None = Field(
        None, description="largest |engine - policy| log-prob of a sampled token before the run stops; null only logs it"
    )


class RewardConfig(Section):
    grader: str = Field("math_verify", description="`math_verify` or the import path of a Grader, module:Class")
    workers: Positive = Field(1, description="grader processes a rollout rank")
    timeout_s: PositiveFloat = Field(10.0, description="hard deadline of one verdict, seconds; the worker is killed and respawned")
    memory_limit_mib: Positive = Field(2048, description="address space of a grader process above its size at start, MiB")
    cache_size: NonNegative = Field(100_000, description="verdicts remembered")
    truncated: Literal["wrong", "masked"] = Field("wrong", description="the verdict of a response that ran out of tokens")


class ObjectiveConfig(Section):
    name: ObjectiveName = Field(
        description="psr, nsr, w_reinforce, reinforce, grpo, dr_grpo, dapo, rloo, topr, ppo, supervised, or the import path of an "
        "Objective, module:Class; some bring defaults of their own, see objectives.md"
    )
    preset: Literal["paper", "paper_code"] | None = Field(
        None, description="settings of the paper or of its public code for what is not given; see objectives.md"
    )
    lambda_: NonNegativeFloat = Field(0.1, alias="lambda", description="weight of positive samples in w_reinforce, at first if scheduled")
    lambda_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how lambda moves to lambda_final")
    lambda_final: NonNegativeFloat = Field(1.0, description="lambda from step lambda_end_step on, if scheduled")
    lambda_start_step: NonNegative = Field(0, description="last training step with the first lambda, if scheduled")
    lambda_end_step: NonNegative = Field(0, description="first training step with lambda_final, if scheduled")
    nsr_steps: NonNegative = Field(0, description="training steps of NSR before the named objective begins")
    positive_ratio: Range = Field(
        [1.0, 1.0], description="topr: what the importance ratio of correct responses is truncated to, [low, high]"
    )
    negative_ratio: Range = Field([0.0, 1.0], description="topr: what the importance ratio of wrong responses is truncated to, [low, high]")
    form: Literal["clipped", "reinforce", "probability"] = Field(
        "clipped", description="policy loss of a token: clipped ratio, -w log pi, or -w pi (the paper's equation 6)"
    )
    eps_low: Fraction = Field(0.2, description="negative samples stop where the ratio falls below 1 - eps_low; no bound for positive ones")
    eps_high: NonNegativeFloat = Field(
        0.2, description="positive samples stop where the ratio exceeds 1 + eps_high; no bound for negative ones"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="largest ratio that counts for a negative sample; null: no bound"
    )
    rollout_correction: PositiveFloat | None = Field(
        None, description="cap of the importance weight policy / engine on each token (truncated importance sampling); null: no weight"
    )
    entropy_coefficient: NonNegativeFloat = Field(1e-4, description="entropy bonus over kept tokens, not scaled by lambda")
    kl_coefficient: NonNegativeFloat = Field(
        0.0,
        description="k3 KL to the initial policy over kept tokens, not scaled by lambda; with ppo a KL in the reward; above 0 keeps the "
        "initial weights on the host",
    )
    aggregation: Literal["sequence_mean", "token_mean", "budget_mean"] = Field(
        "sequence_mean",
        description="mean over tokens then samples (paper D.1), over tokens (its code), or sum over tokens by "
        "rollout.max_response_tokens, then mean over samples (Dr. GRPO)",
    )
    normalization: Literal["batch", "per_sign"] = Field(
        "batch", description="denominator: samples with a verdict, or kept samples in re-formed mini-batches"
    )
    mini_batch_prompts: Positive = Field(256, description="prompts an optimizer step")
    sampling_rounds: Positive = Field(
        1,
        description="most batches of prompts a step samples: above 1, prompts whose responses are all correct or all wrong give way to "
        "further ones (DAPO's dynamic sampling)",
    )
    router_aux_loss: NonNegativeFloat = Field(
        0.0, description="coefficient of the load-balancing loss of a model with experts; config.json's is pre-training's and is not read"
    )
    dropped_share: Fraction = Field(0.1, description="share of dropped samples on which entropy and log-prob gap are measured all the same")


class CriticConfig(Section):
    learning_rate: NonNegativeFloat = Field(1e-5, description="peak learning rate; the rest of `optimizer` is the critic's too")
    warmup_steps: NonNegative = Field(0, description="training steps, at the start, in which the critic learns and the policy does not")
    mini_batch_prompts: Positive | None = Field(None, description="prompts an update of the critic; null: objective.mini_batch_prompts")
    value_clip: PositiveFloat | None = Field(0.5, description="how far a value may move in a step and still get a gradient; null: no bound")
    gamma: Fraction = Field(1.0, description="discount a token")
    lambda_: Fraction = Field(
        1.0, alias="lambda", description="of generalized advantage estimation: 1 takes whole returns, 0 the next token's value"
    )
    whiten_advantages: bool = Field(True, description="advantages of mean 0 and variance 1 over a step's response tokens")


class OptimizerConfig(Section):
    learning_rate: NonNegativeFloat = Field(1e-6, description="peak learning rate")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="final learning rate of the cosine schedule")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: NonNegative = Field(0, description="linear warm-up, training steps")
    beta1: Fraction = Field(0.9, description="decay of the first moment of AdamW")
    beta2: Fraction = Field(0.999, description="decay of the second moment of AdamW")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled; never on biases and norms")
    gradient_clip: NonNegativeFloat = Field(1.0, description="global gradient norm; 0 turns clipping off")


class TrainingConfig(Section):
    tokens_per_micro_batch: Positive = Field(16384, description="packing budget, tokens; a longer sequence travels alone")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activation recomputation: none, core attention, whole layers"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what goes to host memory while a colocated engine samples: nothing, main weights and Adam's moments, or the "
        "parameters too, of the policy and PPO's critic; unless none, gradient buffers are freed",
    )
    head_chunk_tokens: Positive | None = Field(
        None,
        description="tokens whose logits live at once in the LM head; null: as many as 32 MiB hold on a CPU, 640 on a GPU",
    )


class CheckpointConfig(Section):
    every: Positive = Field(10, description="steps between checkpoints; one is always written at the end and on SIGTERM")
    keep: Positive = Field(2, description="checkpoints kept")
    export_hf: bool = Field(True, description="also write the final policy as an HF directory, RUN/hf")
    export_every: NonNegative = Field(
        0, description="steps between policies that are kept as HF directories, RUN/exports/step_N; 0 keeps none"
    )


# How the paper samples its evaluations, by family of models (arXiv 2506.01347, section 3.1).
EVALUATION_PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-math": {"samples": 256, "temperature": 0.6, "top_p": 0.95, "top_k": -1},
    "llama3.1": {"samples": 256, "temperature": 0.6, "top_p": 0.95, "top_k": -1},
    "qwen3": {"samples": 64, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


class EvaluationConfig(Section):
    preset: Literal["qwen2.5-math", "llama3.1", "qwen3"] | None = Field(
        None,
        description="the paper's samples, temperature, top_p and top_k for a family of models, where they are not given: 256, 0.6, 0.95 "
        "and -1, or for qwen3 64, 0.7, 0.8 and 20",
    )
    benchmarks: dict[str, str | None] = Field(default_factory=dict, description="name: file of problems; null leaves one out")
    every: NonNegative = Field(0, description="steps between evaluations in training; 0 evaluates at the end only")
    samples: Positive = Field(16, description="responses a problem, the n of Pass@k")
    greedy: bool = Field(True, description="also the accuracy of one response a problem at temperature 0")
    limit: Positive | None = Field(None, description="use only the first problems of each file")
    temperature: PositiveFloat = Field(0.6, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="share of the probability mass that is sampled from; 1 is all of it"
    )
    top_k: int = Field(-1, ge=-1, description="most probable tokens that are sampled from; -1 is all of them")
    max_response_tokens: Positive | None = Field(None, description="response budget, tokens; null is rollout.max_response_tokens")
    entropy_samples: Positive = Field(
        1, description="responses a problem, drawn as in training, on which heldout/entropy and the log-prob gap are measured"
    )
    part_samples: Positive = Field(
        16384,
        description="responses, about, that `evaluate` samples at a time and then keeps in RUN/eval: what an interruption loses at most",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """The preset's values where the config gives none."""
        name = values.get("preset") if isinstance(values, dict) else None
        return {**EVALUATION_PRESETS[name], **values} if isinstance(name, str) and name in EVALUATION_PRESETS else values


class LoggingConfig(Section):
    tensorboard: bool = Field(True, description="also write metrics to RUN/tensorboard; RUN/metrics.jsonl is always written")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="Weights & Biases; offline writes RUN/wandb for a later `wandb sync`"
    )
    wandb_project: str = Field("megatron_nsr", description="project in Weights & Biases")
    mlflow: str | None = Field(None, description="MLflow's tracking URI, such as http://HOST:5000; null is no MLflow")
    mlflow_experiment: str = Field("megatron_nsr", description="experiment in MLflow")
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="port of rank 0's machine on which Prometheus finds the newest metrics, at /metrics; null is none"
    )
    sign_norms_every: NonNegative = Field(
        10,
        description="steps between measurements of the gradient norm that each sign sends into the LM head, a fourth matrix product of "
        "such a step's head if there is an entropy bonus; 0 never",
    )
    probe_every: NonNegative = Field(
        0, description="steps between measurements of each sign's whole gradient, two more passes over a mini-batch each; 0 never"
    )
    kl_to_base_every: NonNegative = Field(
        0,
        description="steps between measurements of policy/kl_reference where the loss has no KL term: a forward pass with the initial "
        "weights, which are then kept in host memory; 0 never",
    )
    samples_every: NonNegative = Field(10, description="steps between kept samples (RUN/samples); 0 keeps none")
