"""A run with damaged files, or one that did not end, is still reported, and the report says what is missing."""

from __future__ import annotations

from pathlib import Path

from megatron_nsr.evaluation.report import write_report
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import write_state
from tests.unit.evaluation.test_report import Page, make_run

DAMAGE = {
    "metrics.jsonl": "x\n{}\n",
    "eval/step_1.json": "{",
    "eval/step_2.json": "[]",
    "eval/step_3.json": '{"step": 1}',
    "eval/step_4.json": '{"step": 1, "benchmarks": {"puzzle": {"n": 4}}}',
    "samples/step_2.parquet": "PAR",
    "environment.json": "{",
    "state.json": '{"status": "tired"}',
}


def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "damaged", "nsr", steps=1, evaluated=[5], sampled=True)
    for name, content in DAMAGE.items():
        (run / name).write_text(content)
    missing = write_report([run], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for name in DAMAGE:
        (line,) = [line for line in missing if name in line and ": not" in line]
        assert line.startswith("damaged: ") and line.removeprefix("damaged: ") in text
    assert "Pass@k on puzzle" in text and "correct of step 1:" in text


def test_a_run_that_did_not_end_says_where_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, "short", "nsr", steps=3, evaluated=[2], sampled=True)
    write_state(RunDirectory(run), "stopped", 3, "SIGTERM")
    missing = write_report([run], tmp_path / "report.html")
    assert missing == ["short: stopped at step 3 of 3: SIGTERM", "short: last evaluated at step 2 of the 3 done"]
