"""What `prepare` writes: files that the package's own readers take, one id for each word, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.quickstart.grader import PuzzleGrader
from examples.quickstart.prepare import prepare
from examples.quickstart.puzzle import Ranges
from examples.quickstart.tokenizer import UNK_ID, task_words, train_tokenizer
from megatron_nsr.config import Config
from megatron_nsr.config_files import load_config
from megatron_nsr.data.prompts import load_prompts
from megatron_nsr.data.tokenizers import Tokenizer, load_tokenizer
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.types import Prompt, Reason

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart")
    prepare(directory, corpus_size=2000)
    return directory


@pytest.fixture(scope="module")
def tokenizer(out: Path) -> Tokenizer:
    return load_tokenizer(str(out / "model"))


def prompts(out: Path, tokenizer: Tokenizer, name: str) -> tuple[Prompt, ...]:
    path = out / "data" / f"{name}.jsonl"
    return load_prompts(path, field="data.train", tokenizer=tokenizer, template="plain", max_prompt_tokens=32).prompts


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_same_bytes_each_time(out: Path, tmp_path: Path) -> None:
    prepare(tmp_path, corpus_size=2000)
    assert files(tmp_path) == files(out)
    assert len(files(out)) == 8


def test_a_second_time_leaves_the_files_alone_and_mends_a_damaged_one(out: Path, tmp_path: Path) -> None:
    prepare(tmp_path, corpus_size=500)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    damaged = tmp_path / "data" / "test.jsonl"
    damaged.write_text("")
    prepare(tmp_path, corpus_size=500)
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {damaged} and damaged.stat().st_size > 0
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(before)


def test_no_problem_is_in_two_files(out: Path, tokenizer: Tokenizer) -> None:
    texts = [{prompt.text for prompt in prompts(out, tokenizer, name)} for name in ("corpus", "train", "validation", "test", "math_style")]
    assert [len(part) for part in texts[1:]] == [256, 100, 100, 64]
    assert sum(map(len, texts)) == len(set().union(*texts))


def test_every_text_round_trips_without_an_unknown_id(out: Path, tokenizer: Tokenizer) -> None:
    for name in ("corpus", "train", "validation", "test", "math_style"):
        for prompt in prompts(out, tokenizer, name):
            texts = [prompt.text] if prompt.response is None else [prompt.text, prompt.response]
            for text in texts:
                ids = tokenizer.encode(text)
                assert UNK_ID not in ids and tokenizer.decode(ids) == text


def test_sequences_are_as_short_as_the_task_allows(out: Path, tokenizer: Tokenizer) -> None:
    corpus = [prompt for prompt in prompts(out, tokenizer, "corpus") if prompt.text.startswith(tuple("123456789"))]
    assert {len(prompt.token_ids) for prompt in corpus} == {6}
    lengths = [len(tokenizer.encode(prompt.response or "")) + 1 for prompt in corpus]
    assert min(lengths) == 11 and max(lengths) == 25  # one attempt; three
    assert 12 < sum(lengths) / len(lengths) < 13


def test_each_word_of_the_task_is_one_id(tokenizer: Tokenizer) -> None:
    words = task_words(Ranges())
    ids = [tokenizer.encode(word) for word in words]
    assert all(len(found) == 1 for found in ids)
    assert len({found[0] for found in ids}) == len(words) == tokenizer.vocab_size - 3
    assert len(tokenizer.encode(r"try 3+7=10*2=20 no try 3*7=21-2=19 \boxed{*-}")) == 17


def test_foreign_text_becomes_unknown_ids_and_does_not_fail(tokenizer: Tokenizer) -> None:
    assert UNK_ID in tokenizer.encode("What is $x^2$ if $x = 3$?\n")


def test_wider_ranges_have_their_own_words() -> None:
    ranges = Ranges(numbers=4, largest_operand=12, largest_value=120)
    assert {"120", "=120", "*12"} <= set(task_words(ranges))
    assert train_tokenizer(["1?2?3?4=10"], ranges) == train_tokenizer(["1?2?3?4=10"], ranges)


def test_the_model_is_what_the_package_reads_and_can_be_split(out: Path, tokenizer: Tokenizer) -> None:
    shape = read_model_shape(str(out / "model"))
    assert (shape.family, shape.head_dim, shape.tie_embeddings, shape.initializer_range) == ("qwen3", 32, True, 0.05)
    assert shape.vocab_size == tokenizer.vocab_size
    config = json.loads((out / "model" / "config.json").read_text())
    assert tokenizer.stop_ids == (config["eos_token_id"],)
    assert shape.num_layers % 4 == 0 and shape.heads % 2 == shape.query_groups % 2 == 0
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.query_groups)
    assert shape.vocab_size * shape.hidden + shape.num_layers * (attention + 3 * shape.hidden * shape.ffn) < 1_000_000


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_the_reference_answers_are_correct(out: Path, tokenizer: Tokenizer, name: str) -> None:
    grader = PuzzleGrader()
    verdicts = [grader.grade(rf"\boxed{{{prompt.answer}}}", prompt) for prompt in prompts(out, tokenizer, name)]
    assert {verdict.reason for verdict in verdicts} == {Reason.MATCH}


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / name, list(overrides))


@pytest.mark.parametrize("name", ["psr", "nsr", "w_reinforce"])
def test_each_objective_starts_from_the_base_in_a_directory_of_its_own(name: str) -> None:
    base, config = load("quickstart_base.yaml"), load("quickstart.yaml", f"objective.name={name}")
    assert config.run.dir == f"runs/quickstart/{name}"
    assert base.checkpoint.export_hf and config.model.path == f"{base.run.dir}/hf"
    assert (base.objective.name, base.model.initialization) == ("supervised", "random")


def test_all_runs_are_judged_alike_and_on_enough_samples() -> None:
    base, config = load("quickstart_base.yaml"), load("quickstart.yaml")
    assert base.evaluation == config.evaluation and base.reward.grader == config.reward.grader
    assert config.evaluation.samples >= 64
    assert base.rollout.max_response_tokens == config.rollout.max_response_tokens == 32


def test_the_configs_name_the_files_that_prepare_writes(out: Path) -> None:
    written = {str(Path("runs/quickstart") / name) for name in files(out)}
    for config in (load("quickstart_base.yaml"), load("quickstart.yaml")):
        assert {config.data.train, *config.evaluation.benchmarks.values()} <= written
    assert f"{load('quickstart_base.yaml').model.path}/tokenizer.model" in written


def test_a_line_of_each_file_reads_as_the_documentation_shows(out: Path) -> None:
    for name, keys in {"corpus": {"response"}, "train": {"numbers", "target"}, "math_style": set()}.items():
        row = json.loads((out / "data" / f"{name}.jsonl").read_text().splitlines()[0])
        assert {"id", "question", "answer"} | keys <= set(row)
