"""Scores somebody else's generations: their file becomes JSONL of one response a line, which `megatron-nsr score` reads.

    python -m examples.score_other_generations OUTPUTS.json [--out DIRECTORY]

Evaluation tools write their own formats. This one takes a common shape, a JSON list of problems with all their responses,

    [{"idx": 0, "question": "...", "gt": "5", "level": "Level 2", "code": ["first response", "second response", ...]}, ...]

and is meant to be copied and changed: `lines` is the only place that knows the format.

May import: megatron_nsr.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_nsr.config import RewardConfig
from megatron_nsr.evaluation.comparison import comparison_records, load_evaluations
from megatron_nsr.evaluation.score import render, score_file, write_summary


def lines(problems: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One object a response: the problem's id, the response, the reference answer, and what groups the scores."""
    for problem in problems:
        for response in problem["code"]:
            yield {"question_id": problem["idx"], "response": response, "answer": problem["gt"], "level": problem["level"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("scored"))
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    generations, verdicts, scores = (options.out / name for name in ("generations.jsonl", "verdicts.jsonl", "scores.json"))
    with generations.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines(json.loads(options.outputs.read_text(encoding="utf-8"))))

    # What `megatron-nsr score generations.jsonl --out verdicts.jsonl --summary scores.json` does.
    limits = RewardConfig()
    summary = score_file(
        generations,
        verdicts,
        grader="math_verify",
        workers=1,
        timeout_s=limits.timeout_s,
        memory_limit_mib=limits.memory_limit_mib,
        cache_size=limits.cache_size,
    )
    write_summary(scores, summary, source=options.outputs, benchmark="MATH")
    Console().print(render(summary, "MATH"))

    # The scores as plain records, for pandas or a spreadsheet; `megatron-nsr compare` sets several such files side by side.
    for record in comparison_records(load_evaluations([scores])):
        if record["k"] == 1 and record["measure"] == "pass":
            interval = f" [{record['low']:.3f}, {record['high']:.3f}]" if record["low"] is not None else ""  # a single problem has none
            print(f"{record['group']}: Pass@1 {record['value']:.3f}{interval}")


if __name__ == "__main__":
    main()
