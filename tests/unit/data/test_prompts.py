from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_nsr.data.prompts import load_prompts
from megatron_nsr.data.templates import render
from megatron_nsr.data.tokenizers import load_tokenizer
from megatron_nsr.types import UserError

Write = Callable[..., Path]


@pytest.fixture
def problems(write_jsonl: Write) -> Path:
    return write_jsonl(
        {"question": "1+1?", "answer": "2", "response": "two", "level": 1},
        {"question": "1+1+1+1+1?", "answer": "5"},
        {"question": "2+2?", "answer": "4"},
    )


def test_prompts_keep_the_files_order_and_carry_what_a_grader_reads(problems: Path, qwen: Path) -> None:
    tokenizer = load_tokenizer(str(qwen))
    loaded = load_prompts(problems, field="data.train", tokenizer=tokenizer, template="qwen2.5-math", max_prompt_tokens=1024)
    assert loaded.too_long == 0
    assert [(prompt.id, prompt.answer) for prompt in loaded.prompts] == [("problems/0", "2"), ("problems/1", "5"), ("problems/2", "4")]
    first = loaded.prompts[0]
    assert first.text == render("qwen2.5-math", "1+1?")
    assert first.token_ids == tuple(tokenizer.encode(first.text))
    assert (first.response, first.source, first.extra) == ("two", "problems", {"level": 1})
    assert loaded.prompts[1].response is None


def test_long_prompts_are_left_out_counted_and_do_not_change_the_other_ids(problems: Path, qwen: Path) -> None:
    tokenizer = load_tokenizer(str(qwen))
    loaded = load_prompts(problems, field="data.train", tokenizer=tokenizer, template="plain", max_prompt_tokens=4)
    assert loaded.too_long == 1
    assert [prompt.id for prompt in loaded.prompts] == ["problems/0", "problems/2"]
    at_bound = load_prompts(problems, field="data.train", tokenizer=tokenizer, template="plain", max_prompt_tokens=10)
    assert at_bound.too_long == 0


def test_limit_counts_rows_of_the_file_before_the_filter(problems: Path, qwen: Path) -> None:
    tokenizer = load_tokenizer(str(qwen))
    loaded = load_prompts(problems, field="data.train", tokenizer=tokenizer, template="plain", max_prompt_tokens=4, limit=2)
    assert ([prompt.id for prompt in loaded.prompts], loaded.too_long) == (["problems/0"], 1)


def test_all_prompts_too_long(problems: Path, qwen: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data\.max_prompt_tokens=3: all 3 prompts of data\.train=.*problems\.jsonl are longer; the shortest has 4"
    ):
        load_prompts(problems, field="data.train", tokenizer=load_tokenizer(str(qwen)), template="plain", max_prompt_tokens=3)
