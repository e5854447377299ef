"""The reproduction's numbers and sentences, on made-up counts whose truth is known: means, intervals, verdicts, the page, the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.quickstart.jobs import alone_in
from examples.reproduction.__main__ import DOCS, main
from examples.reproduction.comparison import BASE, Comparison, crossing, pass_1
from examples.reproduction.cost import Cost
from examples.reproduction.figures import write_figures
from examples.reproduction.intervals import Resampler, run_interval
from examples.reproduction.orderings import Ordering, not_below, orderings, strictly_above
from examples.reproduction.page import render
from examples.reproduction.plan import METHODS, base_runs, comparison_runs, search_runs
from examples.reproduction.results import (
    KS,
    Evaluation,
    MethodResult,
    Results,
    read_candidates,
    read_evaluations,
    read_results,
    write_results,
)
from examples.reproduction.scales import CANDIDATES, SCALES
from examples.reproduction.search import chosen_rates
from megatron_nsr.config_files import load_config
from megatron_nsr.evaluation.pass_at_k import pass_at_k
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import write_state
from megatron_nsr.types import UserError
from tests.unit.examples.made_up_results import DEGRADED, PAPER, PROBLEMS, SAMPLES, STEPS, Shape, evaluation, results


@pytest.fixture(scope="module")
def paper() -> Results:
    return results()


def verdicts(of: Results) -> dict[str, str]:
    return {each.label: each.verdict for each in orderings(Comparison(of))}


def test_numbers_like_the_papers_give_the_papers_orderings(paper: Results) -> None:
    assert verdicts(paper) == {
        **{"(a)": "holds", "(b)": "holds", "(c)": "holds", "(d)": "holds", "(e)": "holds"},
        **{"(b), matched": "holds", "(c), matched": "holds", "(d), matched": "holds"},
    }


@pytest.mark.parametrize(
    ("label", "shapes", "late"),
    [
        ("(a)", PAPER | {"nsr": (0.80, 0.45, 0.30)}, None),
        ("(b)", PAPER | {"psr": (0.75, 0.40, 0.10)}, None),
        ("(b)", PAPER | {"psr": (0.99, 0.75, 0.10)}, None),
        ("(b), matched", PAPER | {"psr": (0.99, 0.75, 0.10)}, None),
        ("(c)", PAPER | {"w_reinforce": (0.60, 0.50, 0.25)}, None),
        ("(d)", PAPER | {"nsr": (0.95, 0.45, 0.18)}, None),
        ("(e)", PAPER, {}),
        ("(e)", PAPER, {"nsr": DEGRADED, "w_reinforce": DEGRADED}),
    ],
)
def test_other_numbers_give_other_verdicts(label: str, shapes: Mapping[str, Shape], late: Mapping[str, Shape] | None) -> None:
    assert verdicts(results(shapes, late))[label] == "does not hold"


def test_methods_that_differ_by_luck_alone_are_not_ordered() -> None:
    same = results({name: (0.9, 0.45, 0.2) for name in PAPER}, {})
    found = verdicts(same)
    assert found["(b)"] == found["(d)"] == "undecided"
    assert found["(c)"] == "holds"  # nobody is below anybody


def test_one_run_leaves_what_only_runs_can_tell_undecided() -> None:
    single = Comparison(results(bases=1, seeds=1))
    assert next(each for each in orderings(single) if each.label == "(d)").verdict == "undecided"
    assert math.isnan(single.at_equal_steps().entropy_level("nsr").low)


def test_the_level_is_the_mean_of_the_estimator_over_runs_and_problems(paper: Results) -> None:
    field = Comparison(paper).at_equal_steps()
    counts = [run.at(STEPS).correct for run in paper.of("grpo")]
    for k, interval in zip(KS, field.level("grpo"), strict=True):
        expected = sum(pass_at_k(c, SAMPLES, k) for row in counts for c in row) / (len(counts) * PROBLEMS)
        assert interval.mean == pytest.approx(expected, abs=1e-12)
        assert interval.low <= interval.mean <= interval.high


def test_a_difference_is_paired_so_that_what_runs_share_does_not_widen_it() -> None:
    generator = np.random.default_rng(0)
    problems = generator.random((1, 50, 1)) + np.zeros((4, 50, 1))
    resampler = Resampler([1, 1, 2, 2], 50)
    [shared], [shifted] = resampler.intervals(problems), resampler.intervals((problems + 0.1) - problems)
    assert shared.high - shared.low > 0.1
    assert shifted.low == pytest.approx(0.1) and shifted.high == pytest.approx(0.1)


@settings(max_examples=5)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_every_draw_of_runs_weighs_one_and_bases_alike(bases: list[int]) -> None:
    weights = Resampler(bases, 3).run_weights
    assert np.allclose(weights.sum(axis=1), 1)
    names = sorted(set(bases))
    by_base = np.stack([weights[:, np.asarray(bases) == name].sum(axis=1) for name in names], axis=1) * len(names)
    assert np.allclose(by_base, np.round(by_base)) and np.allclose(weights.mean(axis=0), weights.mean(axis=0).clip(0.02))


def test_a_base_with_more_runs_counts_no_more_than_another() -> None:
    values = np.array([0.0, 0.0, 0.0, 1.0]).reshape(4, 1, 1)
    [interval] = Resampler([1, 1, 1, 2], 1).intervals(values)
    assert interval.mean == 0.5


def test_problems_that_differ_widen_the_interval_of_a_mean_as_the_standard_error_says() -> None:
    values = np.random.default_rng(1).random((1, 400, 1))
    [interval] = Resampler([1], 400).intervals(values)
    half = 1.96 * values.std() / 20
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_entropies_interval_is_students() -> None:
    interval = run_interval([1.0, 2.0, 3.0], [1] * 3)
    assert interval.mean == 2.0 and interval.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))


def test_entropies_runs_of_one_base_count_as_one_where_there_are_several_bases() -> None:
    interval = run_interval([0.9, 1.1, 2.0, 3.0, 3.0, 3.0], [1, 1, 2, 3, 3, 3])
    assert interval.mean == pytest.approx(2.0) and interval.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))


def test_a_path_is_cut_where_it_first_reaches_the_level() -> None:
    start, end = Evaluation(0, 64, 0.4, (16, 0)), Evaluation(5, 64, 0.2, (32, 16))
    later = Evaluation(10, 64, 0.1, (64, 64))
    level = (pass_1(start) + pass_1(end)) / 2
    table, entropy = crossing([start, end, later], level)
    assert table[:, 0].mean() == pytest.approx(level) and entropy == pytest.approx(0.3)
    assert np.allclose(table, (start.table + end.table) / 2)
    assert np.array_equal(crossing([start, end], pass_1(start))[0], start.table)


def test_matched_methods_have_the_same_pass_1(paper: Results) -> None:
    comparison = Comparison(paper)
    field = comparison.at_matched_pass_1()
    for table in field.tables.values():
        assert np.allclose(table[:, :, 0].mean(axis=1), list(comparison.matched_levels().values()))
    assert len(comparison.matched_levels()) == len(comparison.pairs)
    assert "6 of 6 pairs of base and seed are used here. Common Pass@1" in render(None, paper, [])


def never_better(of: Results, base: int) -> Results:
    """The results, but GRPO stays below base number `base`."""

    def worse(run: MethodResult) -> MethodResult:
        if (run.method, run.base) != ("grpo", base):
            return run
        return replace(run, evaluations=tuple(replace(each, correct=(0,) * PROBLEMS) for each in run.evaluations))

    return replace(of, runs=tuple(worse(run) for run in of.runs))


def test_pairs_whose_common_pass_1_is_the_bases_decide_nothing_at_matched_pass_1(paper: Results) -> None:
    half = never_better(paper, 1)
    assert [Comparison(half).pairs[position] for position in Comparison(half).matched_levels()] == [(2, 1), (2, 2), (2, 3)]
    assert "3 of 6 pairs of base and seed are used here; in the others" in render(None, half, [])
    alone = replace(paper, bases=paper.bases[1:], runs=tuple(run for run in paper.runs if run.base == 2))
    assert Comparison(half).at_matched_pass_1().level("psr") == Comparison(alone).at_matched_pass_1().level("psr")

    none = never_better(half, 2)
    found = verdicts(none)
    assert {found[label] for label in ("(b), matched", "(c), matched", "(d), matched")} == {"undecided"}
    page = render(None, none, [])
    assert "0 of 6 pairs of base and seed" in page and page.count("There is no run to compare.") == 3 and "nan" not in page


def test_a_missing_run_is_wrong_input(paper: Results) -> None:
    torn = replace(paper, runs=tuple(run for run in paper.runs if (run.method, run.base, run.seed) != ("grpo", 1, 2)))
    with pytest.raises(UserError, match="grpo was run with"):
        Comparison(torn)
    short = replace(paper, settings=paper.settings | {"steps": 7})
    with pytest.raises(UserError, match="no evaluation at step 7"):
        orderings(Comparison(short))


def test_verdicts_need_the_whole_interval() -> None:
    interval = run_interval([1.0, 2.0, 3.0], [1] * 3)
    assert strictly_above([interval]) == "undecided" and strictly_above([run_interval([2.0, 2.1], [1] * 2)]) == "holds"
    assert strictly_above([interval, run_interval([-2.0, -2.1], [1] * 2)]) == "does not hold"
    assert not_below([run_interval([0.0, 0.0], [1] * 2)]) == "holds" and not_below([interval]) == "undecided"


def test_results_survive_the_file(paper: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, paper)
    assert read_results(path) == paper
    path.write_text("{}")
    with pytest.raises(UserError, match="not the results of a comparison"):
        read_results(path)


def evidence_means(found: list[Ordering]) -> list[str]:
    return [f"{100 * each.interval.mean:+.1f}" for ordering in found for each in ordering.evidence if each.unit == "points"]


def test_the_page_says_what_the_numbers_say_and_what_is_missing(paper: Results, tmp_path: Path) -> None:
    found = orderings(Comparison(paper))
    page = render(None, paper, [])
    assert page.count("**Not run yet**") == 1
    for each in found:
        assert f"| {each.label} | {each.claim} | **{each.verdict}** |" in page
    assert all(f"| {mean} (" in page for mean in evidence_means(found))
    assert "Not in this comparison: PPO. " in page
    assert "2 bases" in page and "2 minutes by the clock and 3 minutes of CPU time" in page
    nothing = render(None, None, [])
    assert all("## The setting was not picked blind" in text for text in (page, nothing))  # what was seen before is told either way
    assert nothing.count("**Not run yet**") == 2 and "|" not in nothing
    for name in write_figures(Comparison(paper), tmp_path, "made_up"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_page_reports_the_search(paper: Results) -> None:
    searched = tuple(
        MethodResult(1, "nsr", 101, rate, (evaluation(STEPS, (0.9, chance, 0.2), 5),)) for rate, chance in ((1e-4, 0.3), (2e-4, 0.5))
    )
    page = render(None, replace(paper, search=searched), [])
    assert "seeds 101" in page and "| mean Pass@1..64 | 0.0001 | 0.0002 |" in page
    assert chosen_rates(searched) == {"nsr": 2e-4}
    tie = (searched[0], replace(searched[0], learning_rate=2e-4))
    assert chosen_rates(tie) == {"nsr": 1e-4}


def test_the_committed_page_is_the_one_that_its_results_give() -> None:
    one, full, candidates = (DOCS / "results" / f"reproduction{name}.json" for name in ("", "_full", "_candidates"))
    expected = render(
        read_results(one) if one.is_file() else None,
        read_results(full) if full.is_file() else None,
        read_candidates(candidates) if candidates.is_file() else [],
    )
    assert (DOCS / "reproduction.md").read_text(encoding="utf-8") == expected


def test_every_run_is_a_training_command_that_loads_and_no_two_draw_alike(tmp_path: Path) -> None:
    scale = SCALES["full"]
    rates = dict.fromkeys(METHODS, 3e-4)
    commands = {
        run.job.name: run.job.command
        for run in (*base_runs(scale, tmp_path), *comparison_runs(scale, tmp_path, rates), *search_runs(scale, tmp_path))
    }
    assert len(commands) == 3 + 3 * 5 * len(METHODS) + 3 * len(METHODS) * len(scale.search_rates)
    seeds: dict[str, set[int]] = {}
    for name, command in list(commands.items())[:: max(1, len(commands) // 25)]:
        assert command[2:4] == ("megatron_nsr", "train")
        config = load_config(command[4], list(command[5:]))
        assert config.run.dir == str(tmp_path / name)
        benchmarks = [file for file in config.evaluation.benchmarks.values() if file]
        assert benchmarks == [str(tmp_path / "data" / ("validation.jsonl" if "search" in name else "test.jsonl"))]
        if config.objective.name != "supervised":
            assert config.run.seed not in {0, 1, 2, 3} and config.model.path == str(tmp_path / name.split("/")[0] / "base" / "hf")
            seeds.setdefault(config.objective.name, set()).add(config.run.seed)
        if config.objective.name == "ppo":
            assert config.critic.learning_rate == pytest.approx(10 * config.optimizer.learning_rate)
            assert config.objective.kl_coefficient == 1e-3
    assert "ppo" in seeds
    assert all(config.rates is None or set(config.rates) >= set(config.methods) for config in SCALES.values())


def test_seeds_of_search_and_comparison_are_apart(tmp_path: Path) -> None:
    scale = SCALES["full"]

    def run_seeds(runs: list[tuple[str, ...]]) -> set[str]:
        return {item for command in runs for item in command if item.startswith("run.seed=")}

    compared = run_seeds([run.job.command for run in comparison_runs(scale, tmp_path, dict.fromkeys(METHODS, 1e-4))])
    searched = run_seeds([run.job.command for run in search_runs(scale, tmp_path)])
    assert len(compared) == 15 and not compared & searched


def test_each_scale_evaluates_at_the_steps_that_it_compares() -> None:
    for scale in SCALES.values():
        assert scale.steps % scale.every == 0 and scale.long_steps % scale.every == 0 and scale.long_steps > scale.steps
        assert min(scale.samples, scale.base_samples) >= KS[-1] and len(scale.bases) * len(scale.seeds) > 1
    assert len({candidate.name for candidate in CANDIDATES}) == len(CANDIDATES)


def write_evaluation(run: RunDirectory, step: int, content: object) -> None:
    run.evaluation(step).parent.mkdir(parents=True, exist_ok=True)
    run.evaluation(step).write_text(json.dumps(content))


def test_evaluations_are_read_in_order_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="holds no evaluation"):
        read_evaluations(run, "test")
    scores = {"n": 64, "problems": [{"id": "a", "correct": 3, "n": 64}]}
    for step in (100, 50):
        write_evaluation(run, step, {"step": step, "benchmarks": {"test": scores}, "heldout_entropy": 0.25})
    assert read_evaluations(run, "test") == (Evaluation(50, 64, 0.25, (3,)), Evaluation(100, 64, 0.25, (3,)))
    with pytest.raises(UserError, match=r"step_50\.json: not an evaluation on validation"):
        read_evaluations(run, "validation")


def test_the_cost_goes_on_where_a_killed_command_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    clock: Callable[[], float] = lambda: now  # noqa: E731
    monkeypatch.setattr("examples.reproduction.cost.time.monotonic", clock)
    first = Cost(tmp_path)
    now = 130.0
    first.note()
    now = 131.0
    first.note()  # too soon to be written
    second = Cost(tmp_path)
    assert second.seconds["wall_s"] == 30.0
    now = 141.0
    assert second.seconds["wall_s"] == 40.0


def test_a_directory_in_which_another_command_works_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(tmp_path):
        assert main(["tiny", "--out", str(tmp_path)]) == 2
    assert "another command is at work in it" in capsys.readouterr().err
    assert BASE not in {path.name for path in tmp_path.iterdir()}


def fabricate(run: RunDirectory, split: str, steps: Sequence[int], chance: float) -> None:
    """What a finished run leaves behind, as far as the comparison reads it."""
    for step in steps:
        made = evaluation(step, (0.9, chance, 0.2), step)
        problems = [{"id": str(index), "correct": count, "n": made.n} for index, count in enumerate(made.correct)]
        scores = {split: {"n": made.n, "problems": problems}}
        write_evaluation(run, step, {"step": step, "benchmarks": scores, "heldout_entropy": made.entropy})
    write_state(run, "done", steps[-1])


def test_what_is_done_is_only_read_and_the_search_decides_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale, best = SCALES["tiny"], SCALES["tiny"].search_rates[-1]
    for base in base_runs(scale, tmp_path):
        fabricate(base.job.run, "test", [scale.task.base_steps], 0.3)
    for run in search_runs(scale, tmp_path):
        fabricate(run.job.run, "validation", [scale.steps], 0.6 if run.learning_rate == best else 0.4)
    for run in comparison_runs(scale, tmp_path, dict.fromkeys(scale.methods, best)):
        fabricate(run.job.run, "test", range(scale.every, run.steps + 1, scale.every), 0.5)

    assert main(["tiny", "--out", str(tmp_path)]) == 0
    assert "runs to do" not in capsys.readouterr().out and not (tmp_path / "logs").exists() and not (tmp_path / "data").exists()
    read = read_results(tmp_path / "results.json")
    assert {run.learning_rate for run in read.runs} == {best} and len(read.search) == len(METHODS) * len(scale.search_rates)
    assert len(read.runs) == len(scale.seeds) * len(METHODS) and all(result.evaluation.step == 0 for result in read.bases)
    assert "| NSR |" in (tmp_path / "reproduction.md").read_text()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"reproduction_pass_at_k.png", "reproduction_long.png"}
