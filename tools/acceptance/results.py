"""Reads the parts' result files and says what stands in them. May import: the standard library."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.acceptance import processes

ASK_DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def device_name() -> str:
    """`h200` for an NVIDIA H200, `cpu` without CUDA. Asked in a process of its own, which takes its memory on the device with it."""
    command = processes.python("-c", ASK_DEVICE)
    name = subprocess.run(command, env=processes.environment(), capture_output=True, text=True, check=True).stdout.strip()
    return short_name(name)


def short_name(name: str) -> str:
    """The model number in a device's name, in small letters."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    numbered = next((word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)), None)
    return numbered or "-".join(words) or "cpu"


def mark_cut_short(file: Path, part: str, why: str) -> None:
    """What a part that did not end has left, with the reason; a part that left nothing gets a file that says so."""
    found = read(file) if file.exists() else {"part": part, "steps": {}, "goals": []}
    file.write_text(json.dumps(found | {"complete": False, "holds": False, "error": why}, indent=1) + "\n", encoding="utf-8")


def summary(found: Mapping[str, Any]) -> str:
    """A part's outcome in a few lines."""
    steps: Mapping[str, Any] = found["steps"]
    ran = [name for name, step in steps.items() if "not run" not in step]
    outcome = "FAILED" if not found["holds"] else "holds" if ran else "NOT RUN"
    lines = [f"{found['part']}: {outcome}; {len(ran)} of {len(steps)} steps ran"]
    if "error" in found:
        lines.append(f"  the part {found['error']}")
    if "not run" in found:
        lines.append(f"  not run: {found['not run']}")
    for name, step in steps.items():
        if "not run" in step:
            lines.append(f"  {name}: not run: {step['not run']}")
        if "error" in step:
            lines.append(f"  {name}: {step['error']}")
        lines += [f"  {name}: {check['check']}: {check['value']}" for check in step.get("checks", ()) if not check["holds"]]
    lines += [f"  goal, {goal_text(goal)}" for goal in found["goals"]]
    return "\n".join(lines)


def conclusion(results: Sequence[Mapping[str, Any]]) -> str:
    """What all parts come to, in one line: a goal that nothing was measured for fails no part, so it is counted."""
    reached = [goal["reached"] for found in results for goal in found["goals"]]
    held = sum(bool(found["holds"]) for found in results)
    goals = f"{reached.count(True)} reached, {reached.count(False)} not reached, {reached.count(None)} open"
    return f"{held} of {len(results)} parts hold; goals: {goals}"


def goal_text(goal: Mapping[str, Any]) -> str:
    word = {True: "reached", False: "NOT reached", None: f"open ({goal.get('why', '')})"}[goal["reached"]]
    measured = f" {goal['value']}" if "value" in goal else ""
    return f"{goal['goal']}:{measured} {word}"
