"""Whatever the user got wrong: exit status 2, one line that says what and what would be right, and nothing is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from megatron_nsr import cli
from tests.integration.small_run import CONFIGS, REPOSITORY, TIMEOUT_S, Small, snapshot

Refuse = Callable[[Sequence[str]], str]


@pytest.fixture
def refuse(small: Small, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Refuse]:
    """Runs a command in this process (imports are paid once), requires status 2 and untouched files, and returns its only line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def leave(status: int) -> None:
        raise SystemExit(status)

    def run(arguments: Sequence[str]) -> str:
        monkeypatch.setattr(os, "_exit", leave)  # a failed command leaves at once, without teardown
        before = snapshot(small.root)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.app(list(arguments), standalone_mode=False)
        lines = capfd.readouterr().err.splitlines()
        assert ended.value.code == 2, lines
        assert len(lines) == 1 and lines[0].startswith("megatron-nsr: "), lines
        assert snapshot(small.root) == before
        return lines[0].removeprefix("megatron-nsr: ")

    monkeypatch.chdir(REPOSITORY)
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


OVERRIDES = {
    "wrong key": (["objective.nam=nsr"], "objective.nam: no such key; did you mean name?"),
    "wrong section": (["objectives.name=nsr"], "objectives: no such key; did you mean objective?"),
    "bad type": (["run.steps=many"], "run.steps='many': input should be a valid integer"),
    "out of range": (["parallel.tensor=0"], "parallel.tensor=0: input should be greater than or equal to 1"),
    "not an override": (["nsr"], "override 'nsr': write it as section.key=value"),
    "no training data": (["data.train=null"], "data.train: required for training, but not given"),
    "missing data": (["data.train=nowhere.jsonl"], "data.train=nowhere.jsonl: no such file or directory"),
    "missing benchmark": (["evaluation.benchmarks.MATH=nowhere.parquet"], "evaluation.benchmarks.MATH=nowhere.parquet: no such file"),
    "sleep on a CPU": (["rollout.sleep_level=1"], "rollout.sleep_level=1: vLLM cannot sleep on a CPU; it must be 0 here"),
    "offload beside servers": (
        ["training.offload=all", "rollout.mode=server", "rollout.servers=[http://127.0.0.1:1]"],
        "training.offload=all needs rollout.mode=colocated: servers share no GPU with the policy",
    ),
    "missing model": (["model.path=nowhere"], "model.path=nowhere: no such directory; give a Hugging Face model's directory"),
    "unknown objective": (["objective.name=nrs"], "objective.name='nrs': no such objective; did you mean nsr?"),
    "objective nowhere": (["objective.name=nowhere:Mine"], "objective.name='nowhere:Mine': cannot import nowhere"),
    "NSR before an own loss": (
        ["objective.name=examples.own_objective:SequenceRatio", "objective.nsr_steps=2"],
        "objective.nsr_steps=2: objective.name='examples.own_objective:SequenceRatio' brings its own token_loss",
    ),
    "a field of another objective": (["objective.lambda=0.3"], "objective.lambda=0.3: only name=w_reinforce reads it, and name is nsr"),
    "a clip for an own loss": (
        ["objective.name=examples.own_objective:SequenceRatio", "objective.dual_clip=3.0"],
        "objective.dual_clip=3.0: objective.name='examples.own_objective:SequenceRatio' brings its own token_loss",
    ),
    "a dual clip without a ratio": (
        ["objective.form=reinforce", "objective.dual_clip=3.0"],
        "objective.dual_clip=3.0: it bounds the ratio",
    ),
    "correction without rollouts": (
        ["objective.name=supervised", "objective.rollout_correction=2.0"],
        "objective.rollout_correction=2.0: it needs rollouts, and name=supervised has none",
    ),
    "a dual clip below one": (["objective.dual_clip=0.5"], "objective.dual_clip=0.5: input should be greater than 1"),
    "grader nowhere": (["reward.grader=nowhere:Mine"], "reward.grader='nowhere:Mine': cannot import nowhere"),
    "no such grader": (["reward.grader=tests.integration.graders:Mine"], "module tests.integration.graders has no Mine"),
    "layout and one process": (["parallel.tensor=2"], "parallel.tensor=2 x parallel.pipeline=1 does not divide the 1 process"),
    "engine and one process": (["rollout.tensor_parallel=2"], "rollout.tensor_parallel=2 does not divide the number of processes, 1"),
    "no servers": (["rollout.mode=server"], "rollout.servers: rollout.mode=server needs at least one; start it with `megatron-nsr serve"),
    "servers for nothing": (["rollout.servers=[http://a:1]"], "rollout.servers: rollout.mode=colocated uses none; set rollout.mode=server"),
    "no address": (
        ["rollout.mode=server", "rollout.servers=[node1]"],
        "rollout.servers[0]='node1': an address looks like http://host:port",
    ),
    "a server twice": (["rollout.mode=server", "rollout.servers=[http://a:1,http://a:1/]"], "an address stands there twice"),
    "a server that is not there": (
        ["rollout.mode=server", "rollout.servers=[http://127.0.0.1:1]", "rollout.server_timeout_s=0.1"],
        "rollout.servers[0]=http://127.0.0.1:1: ClientConnectorError",
    ),
    "ahead in one process": (["rollout.max_staleness=1", "objective.rollout_correction=2.0"], "max_staleness=1 needs rollout.mode=server"),
    "ahead without a correction": (
        ["rollout.mode=server", "rollout.servers=[http://a:1]", "rollout.max_staleness=1"],
        "rollout.max_staleness=1 needs objective.rollout_correction, the cap of the importance weight",
    ),
    "ahead with a loss of one's own": (
        [
            *("rollout.mode=server", "rollout.servers=[http://a:1]", "rollout.max_staleness=1", "objective.rollout_correction=2.0"),
            "objective.name=examples.own_objective:SequenceRatio",
        ],
        "rollout.max_staleness=1: it must be 0, as objective.name='examples.own_objective:SequenceRatio' brings its own token_loss",
    ),
    "two steps ahead": (["rollout.max_staleness=2"], "rollout.max_staleness=2: input should be less than or equal to 1"),
    "too few prompts": (["data.limit=8", "data.validation=null"], "data.prompts_per_step=16: there are only 8 prompts; choose 8 or fewer"),
    "nothing left to train on": (
        ["data.validation=256"],
        "data.validation=256: data.train has only 256 different problems; hold out fewer",
    ),
    "too few prompts left": (["data.validation=250"], "data.prompts_per_step=16: there are only 6 prompts; choose 6 or fewer"),
    "missing validation": (["data.validation=nowhere.jsonl"], "data.validation=nowhere.jsonl: no such file or directory"),
    "no validation problems": (["data.validation=0"], "data.validation.constrained-int=0: input should be greater than or equal to 1"),
    "two validations": (["evaluation.benchmarks.validation=a.jsonl"], "evaluation.benchmarks.validation: data.validation takes this name"),
    "mini-batches": (["objective.mini_batch_prompts=5"], "objective.mini_batch_prompts=5 does not divide data.prompts_per_step=16"),
    "prompts too long": (["data.max_prompt_tokens=2"], "data.max_prompt_tokens=2: all 256 prompts of data.train="),
    "responses too long": (
        ["rollout.max_response_tokens=1020"],
        "it passes the model's max_position_embeddings=1024; lower it, or data.max",
    ),
    "evaluated responses too long": (
        ["evaluation.max_response_tokens=1020"],
        "evaluation.max_response_tokens=1020: with the longest prompt",
    ),
    "supervised without responses": (["objective.name=supervised"], "problem train-0 has no `response`, which objective.name=supervised"),
    "backend": (["model.backend=te"], "model.backend="),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_wrong_value_is_refused(refuse: Refuse, small: Small, case: str) -> None:
    overrides, expected = OVERRIDES[case]
    assert expected in refuse(small.nsr(small.root / "new", *overrides))


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (3, ["parallel.tensor=3"], "parallel.tensor=3 does not divide num_attention_heads=2"),
        (3, ["parallel.pipeline=3"], "parallel.pipeline=3 does not divide num_hidden_layers=4"),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=4"], "parallel.virtual_pipeline=4 does not divide num_hidden_layers=4"),
        (3, ["parallel.tensor=2"], "parallel.tensor=2 x parallel.pipeline=1 does not divide the 3 processes of this run"),
        (3, ["rollout.tensor_parallel=3"], "rollout.tensor_parallel=3 does not divide num_attention_heads=2"),
    ],
)
def test_an_impossible_layout_is_refused(
    refuse: Refuse, small: Small, monkeypatch: pytest.MonkeyPatch, world: int, overrides: list[str], expected: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert expected in refuse(small.nsr(small.root / "new", *overrides))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1\n", "config "),
        ("- run\n- model\n", "a list, where sections with their keys are wanted"),
        ("", "run: required, but not given; model: required"),
        ("run: 5\n", "run=5: "),
    ],
    ids=["broken", "list", "empty", "no section"],
)
def test_a_file_that_is_no_config_is_refused(refuse: Refuse, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert expected in refuse(["train", str(tmp_path / "config.yaml")])


def test_a_missing_config_file_is_refused(refuse: Refuse) -> None:
    assert refuse(["train", "nowhere.yaml"]) == "config file nowhere.yaml: no such file"


def test_data_without_answers_is_refused(refuse: Refuse, small: Small, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(20)))
    assert f"data.train={data}: no answers in its columns question; give" in refuse(small.nsr(small.root / "new", f"data.train={data}"))


def test_validation_problems_that_are_trained_on_are_refused(refuse: Refuse, small: Small, tmp_path: Path) -> None:
    lines = [small.data(name).read_text().splitlines()[0] for name in ("test", "train")]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    message = refuse(small.nsr(small.root / "new", f"data.validation={tmp_path / 'validation.jsonl'}"))
    assert "validation.jsonl: 1 of its 2 problems are in data.train too, the first is train-0; take them out" in message
    message = refuse(small.nsr(small.root / "new", f"data.validation={small.data('test')}"))
    assert "test.jsonl: 8 of its 100 problems are in evaluation.benchmarks.puzzle too, the first is test-0; take them out" in message


def test_a_model_without_weights_is_refused(refuse: Refuse, small: Small) -> None:
    message = refuse(small.nsr(small.root / "new", f"model.path={small.model}"))
    assert message == f"model.path={small.model}: no file model.safetensors; the model's safetensors files must be complete"


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(refuse: Refuse, small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.model, tmp_path / "model")
    config = json.loads((small.model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    message = refuse(small.nsr(small.root / "new", f"model.path={tmp_path / 'model'}"))
    assert message == f"model.path={tmp_path / 'model'}: the tokenizer knows {config['vocab_size']} ids, the model has 100"


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_run_directory_that_is_a_file_is_refused(refuse: Refuse, small: Small, tmp_path: Path, below: str) -> None:
    (tmp_path / "run").write_text("not a directory")
    run = Path(f"{tmp_path / 'run'}{below}")
    assert refuse(small.nsr(run)) == f"run.dir={run}: cannot be a directory (run is a file); choose another run.dir"


def test_a_run_is_not_resumed_with_another_config(refuse: Refuse, small: Small) -> None:
    message = refuse(small.supervised(small.base, "run.steps=40", "optimizer.warmup_steps=5", "optimizer.learning_rate=0.01"))
    assert "holds a run with another config: optimizer." in message and "choose another run.dir" in message


@pytest.mark.parametrize("damage", ["truncated", "missing", "gone"])
def test_a_damaged_checkpoint_is_refused_before_anything_starts(refuse: Refuse, small: Small, damage: str) -> None:
    run = small.root / f"damaged_{damage}"
    shutil.copytree(small.base, run, symlinks=True)
    checkpoint = run / "checkpoints" / "step_40"
    file = next((checkpoint / "state").glob("*.distcp"))
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
        expected = f"the file {file.relative_to(checkpoint)} has {file.stat().st_size} bytes, not {file.stat().st_size + 1}"
    elif damage == "missing":
        (checkpoint / "rng" / "rank_0.pt").unlink()
        expected = "the file rng/rank_0.pt is missing"
    else:
        shutil.rmtree(checkpoint)
        expected = "run.json cannot be read (FileNotFoundError)"
    resumed = yaml.safe_load((run / "config.yaml").read_text())
    resumed["optimizer"]["schedule"] = "constant"  # the base's cosine would fix run.steps
    (run / "config.yaml").write_text(yaml.safe_dump(resumed))
    resumed["run"] |= {"steps": 50, "dir": str(run)}
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(resumed))
    message = refuse(["train", str(config)])
    assert message.startswith(f"checkpoint {checkpoint}: {expected}; ") and "restore it from a copy" in message


def test_a_checkpoint_without_its_weights_is_refused_as_a_model(refuse: Refuse, small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.base / "checkpoints" / "step_40", tmp_path / "step_40")
    shutil.rmtree(tmp_path / "step_40" / "state")
    assert "the file state/" in refuse(small.nsr(small.root / "new", f"model.path={tmp_path / 'step_40'}"))


def test_evaluating_nothing_is_refused(refuse: Refuse, small: Small) -> None:
    config = {
        "run": {"dir": str(small.root / "new"), "steps": 0},
        "model": {"path": str(small.base / "hf")},
        "data": {"template": "plain"},
        "objective": {"name": "nsr"},
    }
    path = small.root / "evaluate.yaml"
    path.write_text(yaml.safe_dump(config))
    assert "evaluation.benchmarks: no benchmark is named" in refuse(["evaluate", str(path)])
    assert "evaluation.benchmarks.MATH=nowhere.jsonl: no such file" in refuse(
        ["evaluate", str(path), "evaluation.benchmarks.MATH=nowhere.jsonl"]
    )


def test_another_rank_says_that_it_is_another(small: Small, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "RANK_0_SPEAKS_FIRST_S", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert refuse(small.nsr(small.root / "new", "objective.nam=nsr")).startswith("rank 1: config: objective.nam: no such key")


def test_what_rank_0_alone_finds_wrong_ends_every_rank_alike(small: Small, tmp_path: Path) -> None:
    """Two ranks as Slurm starts them: no torchrun ends the second one, which would wait for the first, or fail without it."""
    with socket.socket() as taken, socket.socket() as meeting:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        meeting.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        meeting.close()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "megatron_nsr", *small.nsr(tmp_path / "run", f"logging.prometheus_port={port}")]
        ranks = [
            subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | place | {"RANK": rank}, text=True, stderr=subprocess.PIPE)
            for rank in ("0", "1")
        ]
        said = [rank.communicate(timeout=TIMEOUT_S)[1].splitlines()[-1] for rank in ranks]
    problem = f"logging.prometheus_port={port}: cannot listen on it (Address already in use); choose a free port"
    assert said == [f"megatron-nsr: {problem}", f"megatron-nsr: rank 1: {problem}"]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert not (tmp_path / "run").exists()


def test_a_wrong_key_is_reported_by_a_process_that_has_imported_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "megatron_nsr", "train", str(CONFIGS / "quickstart.yaml"), "run.setps=3"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    imports = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert ended.returncode == 2 and ended.stdout == ""
    assert [line for line in ended.stderr.splitlines() if line not in imports] == [
        "megatron-nsr: config: run.setps: no such key; did you mean steps?"
    ]
    assert "pydantic" in modules and not modules & {"torch", "vllm", "megatron", "transformers", "datasets"}
