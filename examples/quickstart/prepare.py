"""Writes the quickstart's data and its untrained model; the same bytes each time. May import: the task's modules.

OUT/data/{corpus,train,validation,test,math_style}.jsonl and OUT/model/{config.json,generation_config.json,tokenizer.model}.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from examples.quickstart.arithmetic import Expression, make_problems
from examples.quickstart.corpus import Author, Example, Question, make_corpus
from examples.quickstart.puzzle import Problem, Ranges, make_splits, writable_solutions
from examples.quickstart.tokenizer import EOS_ID, PAD_ID, train_tokenizer

RANGES, AUTHOR = Ranges(), Author()
CORPUS_SIZE = 30_000
TRAIN, VALIDATION, TEST, MATH_STYLE = 256, 100, 100, 64
# A little plain arithmetic, so that the base model can also answer what math-verify grades.
ARITHMETIC_SHARE = 0.05
SPLIT_SEED, CORPUS_SEED, MATH_STYLE_SEED = 1234, 0, 5678

# About 200,000 parameters. Four layers and two heads can be split over 2 x 2 pipeline chunks and 2 tensor-parallel ranks;
# 32 is the smallest head size that vLLM serves.
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "torch_dtype": "float32",
}


def prepare(
    out: Path,
    ranges: Ranges = RANGES,
    author: Author = AUTHOR,
    corpus_size: int = CORPUS_SIZE,
    *,
    train: int = TRAIN,
    validation: int = VALIDATION,
    test: int = TEST,
) -> None:
    """Writes everything under `out`; a file that is already there with the same bytes is left alone. train, validation, test: puzzles."""
    splits = make_splits(ranges, train, validation, test, SPLIT_SEED)
    math_style = make_problems(ranges, MATH_STYLE, MATH_STYLE_SEED)
    held_out = frozenset[Question](splits.all | frozenset(math_style))
    corpus = list(make_corpus(random.Random(CORPUS_SEED), ranges, author, corpus_size, ARITHMETIC_SHARE, held_out))
    tokenizer = train_tokenizer((text for example in corpus for text in (example.question.question, example.response)), ranges)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()

    data, model = out / "data", out / "model"
    _write(data / "corpus.jsonl", _lines(_corpus_row(i, example, ranges) for i, example in enumerate(corpus)))
    for name, problems in {"train": splits.train, "validation": splits.validation, "test": splits.test}.items():
        _write(data / f"{name}.jsonl", _lines(_row(f"{name}-{i}", problem, ranges) for i, problem in enumerate(problems)))
    _write(data / "math_style.jsonl", _lines(_row(f"math-style-{i}", expression, ranges) for i, expression in enumerate(math_style)))
    _write(model / "tokenizer.model", tokenizer)
    _write(model / "config.json", _json(MODEL | {"vocab_size": vocabulary}))
    _write(model / "generation_config.json", _json({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}))


def _row(identifier: str, question: Question, ranges: Ranges) -> dict[str, Any]:
    """One line of a data file. A puzzle's `answer` is one of its solutions, for display; the grader reads numbers and target."""
    if isinstance(question, Expression):
        return {"id": identifier, "question": question.question, "answer": str(question.value)}
    answer = writable_solutions(question, ranges)[0]
    puzzle: Problem = question
    return {
        "id": identifier,
        "question": puzzle.question,
        "answer": answer,
        "numbers": list(puzzle.numbers),
        "target": puzzle.target,
    }


def _corpus_row(index: int, example: Example, ranges: Ranges) -> dict[str, Any]:
    return _row(f"corpus-{index}", example.question, ranges) | {"response": example.response}


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Complete or untouched: a run that reads the file meanwhile never sees half of it."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
