"""The report compares runs on one page that needs nothing else, whatever a run lacks, and shows responses as text."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_nsr.config_files import parse_config
from megatron_nsr.evaluation.evaluation_files import difference
from megatron_nsr.evaluation.report import render_pass_at_k_table, write_report
from megatron_nsr.evaluation.report_data import load_runs, run_names
from megatron_nsr.evaluation.report_panels import SIGN_TITLES
from megatron_nsr.evaluation.report_tables import metric_rows
from megatron_nsr.observability.loggers import JsonlLogger
from megatron_nsr.observability.metrics import METRICS
from megatron_nsr.observability.run_directory import RunDirectory, open_run, write_json
from megatron_nsr.observability.samples import SampleRow, write_samples
from megatron_nsr.observability.state import write_state
from megatron_nsr.types import StepMetrics, UserError

KS = (1, 2, 4, 8, 16)
N = 16
ATTACK = "<script>alert('stolen')</script></pre></details> 3 & 5 < 8"


def make_run(
    root: Path, name: str, objective: str, *, steps: int, evaluated: Sequence[int] = (), sampled: bool = False, skill: int = 4
) -> Path:
    """A run directory as training leaves it, with numbers that depend on `skill` only."""
    config = {
        "run": {"dir": str(root / name), "steps": max(steps, 1)},
        "model": {"path": "model"},
        "data": {"template": "plain", "prompts_per_step": 8},
        "objective": {"name": objective, "mini_batch_prompts": 8},
    }
    run = open_run(parse_config(config))
    logger = JsonlLogger(run.metrics)
    for step in range(1, steps + 1):
        logger.log(StepMetrics(step, step_values(objective, step, skill)))
    logger.close()
    for step in evaluated:
        write_json(run.evaluation(step), evaluation(step, skill + step // 4))
    if sampled:
        for step in (1, 2):
            write_samples(
                run.samples(step), [sample(step, outcome, index) for outcome in ("correct", "wrong", "none") for index in range(5)]
            )
    write_json(run.environment, {"time": name, "versions": {"python": "3.11"}})
    write_state(run, "done", steps)
    return run.path


def step_values(objective: str, step: int, skill: int) -> dict[str, float]:
    if objective == "supervised":
        return {"supervised/loss": 3 / step, "policy/entropy": 9.0, "time/update_s": 0.4, "time/step_s": 0.4}
    ramp = 1 - math.exp(-step / 10)
    names = [name for name in METRICS if name.startswith(("reward/", "policy/", "rollout/", "time/", "perf/"))]
    return {name: (0.1 + 0.1 * skill * ramp) * (1e-5 if "gap" in name else 1) * (40 if "tokens" in name else 1) for name in names}


def evaluation(step: int, skill: int) -> dict[str, Any]:
    counts = [min(N, (index * 7 % 5) * skill // 2) for index in range(40)]
    problems = [{"id": f"p{index}", "correct": count, "n": N} for index, count in enumerate(counts)]

    def curve(k: int) -> float:
        return sum(1 - math.comb(N - count, k) / math.comb(N, k) for count in counts) / len(counts)

    benchmark = {"n": N, "pass_at_k": {str(k): curve(k) for k in reversed(KS)}, "problems": problems}
    return {"step": step, "benchmarks": {"puzzle": benchmark}, "heldout_entropy": 1.5 - 0.1 * skill}


def sample(step: int, outcome: str, index: int) -> SampleRow:
    reason = {"correct": "match", "wrong": "mismatch", "none": "timeout"}[outcome]
    prompt = f"Reach 24 from 3, {index}"
    return SampleRow(step, f"q{index}", prompt, f"{outcome} of step {step}: {ATTACK}", outcome, reason, "24", "25", 9, "stop", 3, -0.4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        make_run(root, "base", "supervised", steps=30, evaluated=[30]),
        make_run(root, "psr", "psr", steps=20, evaluated=[0, 8, 20], sampled=True, skill=2),
        make_run(root, "nsr_$a$_<i>", "nsr", steps=20, evaluated=[0, 8, 20], sampled=True, skill=5),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    return out.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_from_elsewhere(page: str) -> None:
    tags = Page(page).tags
    assert not [tag for tag, _ in tags if tag in {"script", "img", "iframe", "object", "embed", "base"}]
    links = [value or "" for _, attributes in tags for name, value in attributes.items() if name in {"href", "src", "xlink:href", "action"}]
    assert len(links) > 1 and all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"@import|url\((?!['\"]?#)", page)


def test_ids_are_unique_and_every_picture_has_a_description(page: str) -> None:
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(pictures) >= 11
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in pictures)


def test_responses_are_shown_as_text(page: str) -> None:
    assert "<script>" not in page and "<i>" not in page
    text = Page(page).text
    assert ATTACK in text and "nsr_$a$_<i>" in text


def test_samples_of_the_last_kept_step_of_each_verdict(page: str) -> None:
    text = Page(page).text
    for outcome in ("correct", "wrong", "none"):
        assert text.count(f"{outcome} of step 2: ") == 2 * 3  # two runs, three each
    assert "of step 1:" not in text


def test_every_subject_has_its_figure_or_table(page: str) -> None:
    text = Page(page).text
    for title in (
        "Pass@k on puzzle",
        "puzzle over training",
        "Held-out entropy",
        "Supervised loss",
        "Correct responses",
        "Fully solved prompts",
        "Policy entropy",
        "Never solved prompts",
        "Loss",
        "Clip fraction",
        "Gradient norm at the head",
        "Speed",
        "Every other metric",
        "Log-prob gap",
        "Response length",
        "Time of a step",
        "Where the configs differ",
        "Versions and hardware",
    ):
        assert title in text
    assert "objective.name" in text and "run.dir" not in text


def test_every_metric_of_the_two_signs_has_a_title_and_a_unit() -> None:
    assert {name[:-4] for name in METRICS if name.endswith(("_psr", "_nsr"))} == SIGN_TITLES.keys()


def test_the_table_holds_final_values_and_differences_to_the_first_run(page: str, runs: list[Path]) -> None:
    finals = [json.loads(RunDirectory(run).evaluation(step).read_text()) for run, step in zip(runs, (30, 20, 20), strict=True)]
    scores = [final["benchmarks"]["puzzle"]["pass_at_k"] for final in finals]
    text = Page(page).text
    for k in ("1", "16"):
        assert f"{100 * scores[2][k]:.1f} %" in text
        assert f"{100 * (scores[2][k] - scores[0][k]):+.1f}" in text
    assert f"{finals[2]['heldout_entropy'] - finals[0]['heldout_entropy']:+.3f}" in text


def test_a_metric_s_number_is_the_mean_over_the_last_steps_or_the_last_value(tmp_path: Path) -> None:
    run = make_run(tmp_path, "counted", "nsr", steps=20)
    records = [{"step": step, "policy/loss": float(step), "not/known": 7.5} for step in range(1, 21)]
    records[3]["policy/grad_cosine"], records[4]["policy/grad_cosine"] = 0.25, 0.75
    RunDirectory(run).metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = {name: (meaning, values) for name, meaning, values in metric_rows(load_runs([run]))}
    assert rows == {
        "policy/loss": (METRICS["policy/loss"], ["15.5"]),
        "policy/grad_cosine": (METRICS["policy/grad_cosine"], ["0.75"]),
        "not/known": ("not a metric of this version", ["7.5"]),
    }


def test_the_page_is_reproducible(page: str, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(("steps", "evaluated", "sampled"), [(0, [], False), (1, [], False), (1, [1], True), (3, [], True)])
def test_a_run_that_lacks_things_still_renders(tmp_path: Path, steps: int, evaluated: list[int], sampled: bool) -> None:
    run = make_run(tmp_path, "short", "nsr", steps=steps, evaluated=evaluated, sampled=sampled)
    write_report([run], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert ("Policy entropy" in text, "Pass@k on" in text, "Responses to read" in text) == (steps > 0, bool(evaluated), sampled)
    assert ("no training step (metrics.jsonl)" in text, "no evaluation (eval/step_N.json)" in text) == (not steps, not evaluated)
    assert ("no responses to read (samples/step_N.parquet)" in text) == (steps > 0 and not sampled)


def test_a_bare_config_and_a_benchmark_without_counts_still_render(tmp_path: Path, runs: list[Path]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("objective:\n  name: of_an_earlier_version\n")
    write_json(RunDirectory(bare).evaluation(2), {"step": 2, "benchmarks": {"other": {"n": 4, "pass_at_k": {"1": 0.5}}}})
    write_report([bare, *runs], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "of_an_earlier_version" in text and "Pass@k on other" in text and "Pass@k on puzzle" in text


def test_runs_evaluated_once_compare_entropy_in_bars(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, "nsr", steps=2, evaluated=[2], skill=skill) for name, skill in (("a", 2), ("b", 4))]
    write_report(runs, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    labels = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg"]
    assert "Bars of held-out entropy: a 1.3, b 1.1" in labels
    assert "over training" not in page.text


def test_a_run_evaluated_once_is_a_level_beside_the_others(page: str) -> None:
    text = Page(page).text
    assert "Solid: k = 1; dashed: k = 16. Level, without markers: base, of none of these steps." in text
    assert "40 problems, n = 16 samples each" in text
    assert "mathdefault" not in text  # numbers on a log axis are plain text


def test_intervals_hold_the_curve_and_come_from_the_file_first(runs: list[Path], tmp_path: Path) -> None:
    result = load_runs(runs)[1].final("puzzle")
    assert result is not None
    assert list(result.pass_at_k) == sorted(KS)
    assert all(result.curve.intervals[k][0] < value < result.curve.intervals[k][1] for k, value in result.pass_at_k.items())
    assert result.per_problem.mean(axis=0) == pytest.approx(list(result.pass_at_k.values()), abs=1e-12)

    written = evaluation(3, 4)
    written["benchmarks"]["puzzle"] |= {"ci_low": {"1": 0.125}, "ci_high": {"1": 0.875}}
    run = make_run(tmp_path, "stored", "nsr", steps=1)
    write_json(RunDirectory(run).evaluation(3), written)
    stored = load_runs([run])[0].final("puzzle")
    assert stored is not None and stored.curve.intervals == {1: (0.125, 0.875)}
    write_report([run], tmp_path / "report.html")
    assert "12.5 to 87.5" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_votes_greedy_accuracy_levels_and_lost_verdicts_are_shown_where_an_evaluation_has_them(runs: list[Path], tmp_path: Path) -> None:
    written = evaluation(3, 4)
    level = {"problems": 7, "pass_at_k": {"1": 0.1234, "16": 0.9876}}
    written["benchmarks"]["puzzle"] |= {
        "cons_at_k": {"1": 0.4, "16": 0.6543},
        "cons_ci_low": {"1": 0.3, "16": 0.5},
        "cons_ci_high": {"1": 0.5, "16": 0.8},
        "greedy_accuracy": 0.4321,
        "no_verdict": 13,
        "groups": {"level": {"Level 1": level}},
    }
    run = make_run(tmp_path, "voted", "nsr", steps=1)
    write_json(RunDirectory(run).evaluation(3), written)
    write_report([run, runs[1]], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = Page(page).text
    assert descriptions(page)["cons@k on puzzle"].endswith("voted ends at 65.4")
    assert "43.2 %" in text and "13 samples have no verdict and count as not correct." in text
    assert "puzzle by level: Pass@1 in percent, below it Pass@16" in text
    assert re.search(r"Level 1\s*7\s*12.3\s*98.8\s*–", text)


def report(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_nsr", "report", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_names_what_is_missing_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "fresh", "nsr", steps=0)
    done = report(run, "--out", tmp_path / "report.html")
    assert done.returncode == 0 and "missing: fresh: no evaluation (eval/step_N.json)" in done.stderr
    refused = report(run, tmp_path, "--out", tmp_path / "none.html")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "holds no config.yaml" in refused.stderr
    assert not (tmp_path / "none.html").exists()


def test_an_installed_package_has_the_files_of_the_page() -> None:
    package = Path(__file__).parents[3]
    declared = tomllib.loads((package / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {f"{name.replace('.', '/')}/{file}" for name, files in declared.items() for file in files}
    files = {path for path in (package / "megatron_nsr").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert {str(path.relative_to(package)) for path in files} == named


def test_a_long_response_is_cut_in_its_middle(tmp_path: Path) -> None:
    run = make_run(tmp_path, "long", "nsr", steps=1)
    response = "begins" + "x" * 100_000 + "ends"
    write_samples(RunDirectory(run).samples(1), [replace(sample(1, "wrong", 0), response=response)])
    write_report([run], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "begins" in text and "ends" in text and "[... 94010 characters left out ...]" in text and "x" * 3000 not in text


def test_a_difference_is_paired_over_the_same_problems(runs: list[Path]) -> None:
    base, better = (load_runs(runs)[index].final("puzzle") for index in (1, 2))
    assert base is not None and better is not None
    assert difference(base, base).intervals == dict.fromkeys(KS, (0.0, 0.0))
    found = difference(better, base)
    low, high = found.intervals[1]
    assert low < found.values[1] == better.pass_at_k[1] - base.pass_at_k[1] < high


def test_a_single_problem_has_no_interval(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, name, "nsr", steps=1) for name in ("base", "nsr")]
    for path, count in zip(paths, (4, 8), strict=True):
        alone = {"n": N, "pass_at_k": {"1": count / N}, "problems": [{"id": "p", "correct": count, "n": N}]}
        write_json(RunDirectory(path).evaluation(1), {"step": 1, "benchmarks": {"puzzle": alone}})
    missing = write_report(paths, tmp_path / "report.html")
    assert "nsr: a single problem in puzzle, hence no interval" in missing
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "+25.0" in text and "+25.0 to" not in text and "50.0 to" not in text


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert run_names([Path("a/nsr"), Path("b/nsr"), Path("a/psr")]) == ["a/nsr", "b/nsr", "psr"]


def test_the_terminal_table_has_a_row_a_run(runs: list[Path]) -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(render_pass_at_k_table(runs))
    text = console.export_text()
    assert all(expected in text for expected in ("base", "psr", "Pass@1", "Pass@16", "entropy"))


def test_wrong_arguments_are_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run .*absent: no such directory"):
        write_report([runs[0], tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"not a run directory, it holds no config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a directory; name a file"):
        write_report([runs[0]], tmp_path)
    with pytest.raises(UserError, match="no run given"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_supervised_steps_stay_off_the_axes_of_reinforcement_learning(page: str) -> None:
    shown = descriptions(page)
    assert "base ends at" in shown["Supervised loss"] and "psr ends at" not in shown["Supervised loss"]
    assert "psr ends at" in shown["Policy entropy"] and "base ends at" not in shown["Policy entropy"]


def descriptions(page: str) -> dict[str, str]:
    """What each picture says of itself, by its title."""
    labels = [attributes["aria-label"] or "" for tag, attributes in Page(page).tags if tag == "svg"]
    return {title: text for title, _, text in (label.partition(": ") for label in labels)}
