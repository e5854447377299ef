"""The configuration loader: files, overrides, references between fields, and what it says of wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config, load_config, parse_config
from megatron_nsr.types import UserError

MINIMAL: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs/a", "steps": 3},
    "model": {"path": "model"},
    "data": {"template": "plain", "prompts_per_step": 8},
    "objective": {"name": "nsr", "mini_batch_prompts": 4},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def field(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("objective.kl_coefficient=1", "objective.kl_coefficient", 1.0),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.weight_decay=0", "optimizer.weight_decay", 0.0),
        ("data.train=data/train.jsonl", "data.train", "data/train.jsonl"),
        ("data.limit=null", "data.limit", None),
        ("data.shuffle=false", "data.shuffle", False),
        ("run.dir=runs/a=b", "run.dir", "runs/a=b"),
        ("run.dir=runs/${objective.name}", "run.dir", "runs/nsr"),
        ("evaluation.benchmarks.math=data/math.jsonl", "evaluation.benchmarks", {"math": "data/math.jsonl"}),
        ("evaluation.benchmarks.math=null", "evaluation.benchmarks", {"math": None}),
    ],
)
def test_an_override_is_read_as_yaml(file: Path, override: str, name: str, value: Any) -> None:
    got = field(load_config(file, [override]), name)
    assert got == value
    assert type(got) is type(value)


def test_the_last_override_wins_and_the_rest_of_the_file_stays(file: Path) -> None:
    config = load_config(file, ["run.steps=5", "run.steps=6"])
    assert (config.run.steps, config.run.dir, config.data.prompts_per_step) == (6, "runs/a", 8)


def test_a_reference_follows_an_override(file: Path) -> None:
    file.write_text(yaml.safe_dump(MINIMAL | {"run": {"dir": "runs/${objective.name}", "steps": 3}}))
    assert load_config(file, ["objective.name=psr"]).run.dir == "runs/psr"


def test_a_file_stands_on_the_one_that_it_includes(file: Path) -> None:
    (file.parent / "more").mkdir()
    above = file.parent / "more" / "above.yaml"
    above.write_text("include: ../config.yaml\nobjective: {name: psr}\nrun: {dir: 'runs/${objective.name}'}\n")
    top = file.parent / "top.yaml"
    top.write_text("include: more/above.yaml\nrun: {steps: 9}\n")
    config = load_config(top, ["data.prompts_per_step=16"])
    assert (config.objective.name, config.run.dir, config.run.steps) == ("psr", "runs/psr", 9)
    assert (config.objective.mini_batch_prompts, config.data.prompts_per_step) == (4, 16)


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("absent.yaml", "config {file}: include={folder}/absent.yaml: no such file"),
        ("config.yaml", "config {file}: include={file} includes this file in turn"),
        ("[a.yaml, b.yaml]", "config {file}: include=['a.yaml', 'b.yaml']: give one file's path, relative to this file"),
        ("list.yaml", "config {folder}/list.yaml: a list"),
    ],
)
def test_an_include_that_cannot_be_followed_is_named(file: Path, include: str, expected: str) -> None:
    (file.parent / "list.yaml").write_text("- run\n")
    file.write_text(f"include: {include}\n" + file.read_text())
    assert message(file).startswith(expected.format(file=file, folder=file.parent))


def test_an_environment_variable_is_filled_in(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "elsewhere")
    assert load_config(file, ["model.path=${oc.env:SOME_FOLDER}/hf"]).model.path == "elsewhere/hf"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=1.5", "run.steps=1.5: input should be a valid integer"),
        ("run.steps=-1", "run.steps=-1: input should be greater than or equal to 0"),
        ("run.steps=", "run.steps=None: input should be a valid integer"),
        ("parallel.sequence=1", "parallel.sequence=1: input should be a valid boolean"),
        ("run.dir=5", "run.dir=5: input should be a valid string"),
        ("model.dtype=fp16", "model.dtype='fp16': input should be 'float32' or 'bfloat16'"),
        ("optimizer.beta1=1.5", "optimizer.beta1=1.5: input should be less than or equal to 1"),
        ("objective.lamda=1", "objective.lamda: no such key; did you mean lambda?"),
        ("objecive.name=psr", "objecive: no such key; did you mean objective?"),
        ("checkpoint.zzz=1", "checkpoint.zzz: no such key; known keys: every, keep, export_hf, export_every"),
        ("objective=psr", "objective='psr': input should be a valid dictionary"),
        ("run.dir=${objective.nmae}", "objective.nmae"),
        ("run.dir=[1", "config.yaml: while parsing"),
        ("run", "override 'run': write it as section.key=value"),
        ("rollout.servers=[127.0.0.1:8001]", "rollout.servers[0]='127.0.0.1:8001': an address looks like http://host:port"),
        ("model.transformer.recompute_modules=null", "recompute_modules=None: give true or false, a number, a text or a list of texts"),
        ("rollout.sleep_level=3", "rollout.sleep_level=3: input should be less than or equal to 2"),
        ("rollout.servers=[http://a:1,1]", "rollout.servers[1]=1: input should be a valid string"),
        ("objective.mini_batch_prompts=3", "objective.mini_batch_prompts=3 does not divide data.prompts_per_step=8"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline=2 needs parallel.pipeline of 2 or more, not 1"),
        ("parallel.sequence=true", "parallel.sequence=true needs parallel.tensor of 2 or more, not 1"),
        ("model.fp8=mxfp8", "model.fp8='mxfp8': input should be 'delayed', 'tensorwise' or 'blockwise'"),
        ("model.fp8_edge_layers=1", "model.fp8_edge_layers=1: without model.fp8 all layers are in model.dtype; set it to 0"),
        ("rollout.quantization=int8", "rollout.quantization='int8': input should be 'fp8'"),
        ("run.steps=1e3", "run.steps=1000.0: write it as a whole number, 1000"),
        ("objective.positive_ratio=[1]", "objective.positive_ratio=[1]: give two numbers, [low, high]"),
        ("objective.negative_ratio=1", "objective.negative_ratio=1: give two numbers, [low, high]"),
        ("objective.negative_ratio=[0,-1]", "objective.negative_ratio[1]=-1: input should be greater than or equal to 0"),
        ("objective.name=NSR", "objective.name='NSR': no such objective; did you mean nsr?"),
        ("objective.name=nsrr", "objective.name='nsrr': no such objective; did you mean nsr?"),
        ("objective.name=W-REINFORCE", "objective.name='W-REINFORCE': no such objective; did you mean w_reinforce?"),
        (
            "objective.name=xyz",
            "objective.name='xyz': choose one of psr, nsr, w_reinforce, reinforce, grpo, dr_grpo, dapo, rloo, topr, ppo, ",
        ),
        ("critic.gamma=0.9", "critic.gamma=0.9: only objective.name=ppo has a critic, not nsr"),
        ("critic.lambda=0", "critic.lambda=0.0: only objective.name=ppo has a critic, not nsr"),
        ("critic.value_clip=0", "critic.value_clip=0: input should be greater than 0"),
        ("critic.learning_rat=1", "critic.learning_rat: no such key; did you mean learning_rate?"),
        ("optimizer.min_learning_rate=1", "optimizer.min_learning_rate=1.0 is above optimizer.learning_rate=1e-06"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_field(file: Path, override: str, expected: str) -> None:
    assert expected in message(file, override)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_a_group_of_one_response_is_refused_where_responses_are_compared(file: Path, name: str) -> None:
    given = ("rollout.samples_per_prompt=1", f"objective.name={name}")
    assert f"rollout.samples_per_prompt=1: objective.name={name} compares a prompt's responses" in message(file, *given)
    assert load_config(file, [given[1], "rollout.samples_per_prompt=2"]).rollout.samples_per_prompt == 2


def test_one_response_a_prompt_is_enough_where_none_are_compared(file: Path) -> None:
    assert load_config(file, ["rollout.samples_per_prompt=1"]).rollout.samples_per_prompt == 1


@pytest.mark.parametrize(
    ("given", "field", "reason"),
    [
        ("objective.name=grpo", "objective.nsr_steps", "objective.name=grpo would never begin; name=nsr is NSR for the whole run"),
        ("objective.name=ppo", "critic.warmup_steps", "the policy would never learn"),
    ],
)
def test_a_run_that_would_never_train_by_its_objective_is_refused(file: Path, given: str, field: str, reason: str) -> None:
    assert f"{field}=3: it must be below run.steps=3, or {reason}" in message(file, given, f"{field}=3")
    assert load_config(file, [given, f"{field}=3", "run.steps=4"]).run.steps == 4
    assert load_config(file, [given, f"{field}=3", "run.steps=0"]).run.steps == 0  # an evaluation's


def test_the_critic_s_learning_rate_is_no_lower_than_what_the_schedule_ends_at(file: Path) -> None:
    rates = ("optimizer.learning_rate=1e-3", "optimizer.min_learning_rate=1e-4", "critic.learning_rate=1e-5")
    assert "optimizer.min_learning_rate=0.0001 is above critic.learning_rate=1e-05" in message(file, "objective.name=ppo", *rates)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model.backend=cpu"], "model.fp8=delayed needs model.backend=te, Transformer Engine on a GPU, not cpu"),
        (["model.dtype=float32"], "model.fp8=delayed needs model.dtype=bfloat16, not float32"),
        (["model.fp8_edge_layers=2"], "model.fp8_edge_layers=2 needs model.fp8=tensorwise or blockwise"),
        (["rollout.max_logprob_gap=0.5"], "rollout.max_logprob_gap=0.5 needs model.fp8=tensorwise or blockwise"),
    ],
)
def test_fp8_is_refused_where_nothing_could_compute_in_it(file: Path, given: list[str], expected: str) -> None:
    assert expected in message(file, "model.fp8=delayed", *given)


def test_a_server_has_one_spelling_and_stands_there_once(file: Path) -> None:
    assert load_config(file, ["rollout.mode=server", "rollout.servers=[http://a:1/]"]).rollout.servers == ["http://a:1"]
    assert "an address stands there twice" in message(file, "rollout.mode=server", "rollout.servers=[http://a:1,http://a:1/]")


def test_memory_is_shared_out_only_where_policy_and_engine_take_turns(file: Path) -> None:
    servers = ("rollout.mode=server", "rollout.servers=[http://a:1]")
    for setting in ("training.offload=all", "rollout.sleep_level=1"):
        assert f"{setting} needs rollout.mode=colocated" in message(file, setting, *servers)
        assert f"{setting}: objective.name=supervised samples nothing" in message(file, setting, "objective.name=supervised")
    assert load_config(file, ["training.offload=all", "rollout.sleep_level=2"]).rollout.sleep_level == 2


def test_every_wrong_field_is_named_at_once(file: Path) -> None:
    text = message(file, "run.steps=x", "parallel.tensor=0")
    assert "run.steps='x'" in text
    assert "parallel.tensor=0" in text


def test_missing_fields_are_named(file: Path) -> None:
    file.write_text("run: {steps: 3}")
    text = message(file)
    assert all(f"{name}: required, but not given" in text for name in ("run.dir", "model", "data", "objective"))


def test_a_missing_file_and_broken_yaml_are_said(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in message(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    assert "broken.yaml: while parsing" in message(tmp_path / "broken.yaml")
    (tmp_path / "five.yaml").write_text("5")
    assert "five.yaml: Invalid loaded object type" in message(tmp_path / "five.yaml")


def test_a_key_has_one_spelling_and_a_number_is_finite(file: Path) -> None:
    assert "objective.lambda_: no such key; did you mean lambda?" in message(file, "objective.lambda_=1")
    assert "optimizer.learning_rate=inf: input should be a finite number" in message(file, "optimizer.learning_rate=.inf")


def test_the_dumped_configuration_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file,
        [
            "objective.name=w_reinforce",
            "objective.lambda=0.25",
            "objective.preset=paper_code",
            "optimizer.learning_rate=1e-7",
            "optimizer.eps=1e-15",
            "evaluation.benchmarks.math=data/math.jsonl",
            "run.dir=runs/${objective.name}",
            "data.limit=7",
            "model.path='123'",
        ],
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.model.path == "123"
    assert "lambda: 0.25" in copy.read_text()  # by the name that users write


def test_a_critic_s_settings_read_back_equal(file: Path, tmp_path: Path) -> None:
    config, copy = load_config(file, ["objective.name=ppo", "critic.lambda=0.95", "critic.value_clip=null"]), tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config and (config.critic.lambda_, config.critic.value_clip) == (0.95, None)


def test_defaults_are_the_paper_s() -> None:
    config = parse_config(MINIMAL | {"data": {"template": "plain"}, "objective": {"name": "nsr"}})
    assert (config.data.prompts_per_step, config.rollout.samples_per_prompt, config.objective.mini_batch_prompts) == (1024, 8, 256)
    assert (config.objective.eps_low, config.objective.eps_high, config.objective.entropy_coefficient) == (0.2, 0.2, 1e-4)
    assert (config.objective.lambda_, config.optimizer.learning_rate, config.rollout.temperature) == (0.1, 1e-6, 1.0)
    critic = config.critic
    assert (critic.learning_rate, critic.gamma, critic.lambda_, critic.value_clip, critic.warmup_steps) == (1e-5, 1.0, 1.0, 0.5, 0)
    assert critic.whiten_advantages


@pytest.mark.parametrize(
    ("preset", "sampling"),
    [
        ("qwen2.5-math", (256, 0.6, 0.95, -1)),
        ("llama3.1", (256, 0.6, 0.95, -1)),
        ("qwen3", (64, 0.7, 0.8, 20)),
        ("null", (16, 0.6, 0.95, -1)),
    ],
)
def test_an_evaluation_preset_sets_the_paper_s_sampling(file: Path, preset: str, sampling: tuple[int, float, float, int]) -> None:
    found = load_config(file, [f"evaluation.preset={preset}"])
    assert (found.evaluation.samples, found.evaluation.temperature, found.evaluation.top_p, found.evaluation.top_k) == sampling
    assert parse_config(yaml.safe_load(dump_config(found))) == found


def test_what_is_given_beside_a_preset_counts(file: Path) -> None:
    found = load_config(file, ["evaluation.preset=qwen3", "evaluation.samples=8", "evaluation.top_k=-1"]).evaluation
    assert (found.samples, found.temperature, found.top_p, found.top_k) == (8, 0.7, 0.8, -1)
    assert "evaluation.preset='qwen4': input should be 'qwen2.5-math'" in message(file, "evaluation.preset=qwen4")
    assert "evaluation.temperature='hot'" in message(file, "evaluation.preset=qwen3", "evaluation.temperature=hot")
