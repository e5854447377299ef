"""A run's directory: made once, resumed by the same experiment only, and never seen half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import load_config, parse_config
from megatron_nsr.observability.run_directory import RunDirectory, flat_config, open_run, replacing, write_atomic
from megatron_nsr.types import UserError


def config_for(directory: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": str(directory), "steps": 4},
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "template": "plain", "prompts_per_step": 8},
        "objective": {"name": "w_reinforce", "lambda": 0.1, "mini_batch_prompts": 8},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return parse_config(values)


def test_a_new_run_holds_the_config_it_was_given(tmp_path: Path) -> None:
    config = config_for(tmp_path / "a" / "run", objective={"lambda": 0.25})
    run = open_run(config)
    assert run.path == tmp_path / "a" / "run"
    assert load_config(run.config) == config
    assert "lambda: 0.25" in run.config.read_text()


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"steps": 9}},
        {"parallel": {"tensor": 2, "sequence": True}},
        {"logging": {"tensorboard": False}},
        {"checkpoint": {"every": 3}},
        {"evaluation": {"benchmarks": {"MATH": "test.parquet"}}},
        {"training": {"tokens_per_micro_batch": 512}},
        {"rollout": {"max_num_seqs": 8, "kv_cache_mib": 64, "gpu_memory_utilization": 0.3, "push_bucket_mib": 1}},
        {"rollout": {"enforce_eager": True, "sleep_level": 1, "tensor_parallel": 2, "max_logprob_gap": 0.5}},
        {"model": {"transformer": {"recompute_modules": ["mlp"]}}},
        {"reward": {"workers": 3, "timeout_s": 1.0, "memory_limit_mib": 512, "cache_size": 0}},
    ],
    ids=lambda sections: "-".join(sections),
)
def test_what_does_not_change_the_learning_may_change_on_resume(tmp_path: Path, sections: dict[str, Any]) -> None:
    open_run(config_for(tmp_path))
    resumed = config_for(tmp_path, **sections)
    assert load_config(open_run(resumed).config) == resumed


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"objective": {"lambda": 0.5}}, "objective.lambda was 0.1 and is 0.5"),
        ({"objective": {"name": "nsr"}}, 'objective.name was "w_reinforce" and is "nsr"'),
        ({"data": {"limit": 3}}, "data.limit was null and is 3"),
        ({"run": {"seed": 7}}, "run.seed was 0 and is 7"),
        ({"rollout": {"temperature": 0.5}}, "rollout.temperature was 1.0 and is 0.5"),
        ({"reward": {"truncated": "masked"}}, 'reward.truncated was "wrong" and is "masked"'),
        ({"optimizer": {"learning_rate": 1e-5}}, "optimizer.learning_rate was 1e-06 and is 1e-05"),
    ],
)
def test_another_experiment_in_the_same_directory_is_refused_by_field(tmp_path: Path, sections: dict[str, Any], named: str) -> None:
    first = config_for(tmp_path)
    run = open_run(first)
    with pytest.raises(UserError) as caught:
        open_run(config_for(tmp_path, **sections))
    assert named in str(caught.value)
    assert str(caught.value).endswith("choose another run.dir")
    assert load_config(run.config) == first


def test_a_cosine_schedule_keeps_its_last_step(tmp_path: Path) -> None:
    open_run(config_for(tmp_path, optimizer={"schedule": "cosine"}))
    with pytest.raises(UserError, match=r"run\.steps was 4 and is 9"):
        open_run(config_for(tmp_path, optimizer={"schedule": "cosine"}, run={"steps": 9}))


def test_many_differences_are_counted_not_listed(tmp_path: Path) -> None:
    open_run(config_for(tmp_path))
    changed = config_for(tmp_path, optimizer={"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.0, "gradient_clip": 2.0})
    with pytest.raises(UserError, match=r"optimizer\.eps was 1e-08 and is 1e-06 and 2 more; choose"):
        open_run(changed)


def test_a_moved_run_resumes(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert open_run(config_for(tmp_path / "new")).path == tmp_path / "new"


def test_a_file_in_place_of_the_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*run: cannot be a directory"):
        open_run(config_for(tmp_path / "run"))


def test_a_config_of_another_kind_in_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("services: {}\n")
    with pytest.raises(
        UserError, match=r"the config of the run it holds cannot be read; choose another run\.dir \(.*services: no such key"
    ):
        open_run(config_for(tmp_path))


def test_steps_are_found_in_numeric_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (10, 9, 100):
        write_atomic(run.evaluation(step), "{}")
    (tmp_path / "eval" / "step_x.json").write_text("{}")
    assert run.evaluation_steps() == [9, 10, 100]
    assert run.sample_steps() == []
    assert (run.checkpoint(3), run.samples(3)) == (tmp_path / "checkpoints" / "step_3", tmp_path / "samples" / "step_3.parquet")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_atomic(target, "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_flat_config_names_fields_as_the_yaml_does(tmp_path: Path) -> None:
    flat = flat_config(config_for(tmp_path, evaluation={"benchmarks": {"MATH": "m.parquet"}}))
    assert flat["objective.lambda"] == 0.1
    assert flat["evaluation.benchmarks.MATH"] == "m.parquet"
