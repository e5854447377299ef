"""What a part found, in one JSON file that is written anew after every step: a part that is cut short leaves what it measured.

May import: the standard library.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


class NotRun(Exception):
    """A component is missing; the message says which, and is written beside "not run"."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that the project must reach on a GPU. at_most, at_least: one of the two."""

    text: str
    at_most: float | None = None
    at_least: float | None = None

    def reached(self, value: float) -> bool:
        return _inside(value, self.at_most, self.at_least)


@dataclass
class Step:
    """One step of a part: `figures` are measured, `checks` must hold."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    not_run: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def figure(self, **values: Any) -> None:
        self.figures |= values

    def check(
        self, what: str, value: float | bool, *, at_most: float | None = None, at_least: float | None = None, wrong: float | None = None
    ) -> None:
        """A number inside its bounds, or without bounds a truth.

        wrong: the same number of an implementation with a known fault, measured beside it: where this one is inside too, the check would
        notice nothing, and it fails.
        """
        bounded = at_most is not None or at_least is not None
        holds = _inside(float(value), at_most, at_least) if bounded else bool(value)
        blind = wrong is not None and _inside(float(wrong), at_most, at_least)
        entry = {"check": what, "value": value, "at_most": at_most, "at_least": at_least, "wrong": wrong, "holds": holds and not blind}
        if blind:
            entry["why"] = "a wrong implementation would pass"
        self.checks.append({name: item for name, item in entry.items() if item is not None})

    @property
    def holds(self) -> bool:
        return self.error is None and all(check["holds"] for check in self.checks)

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step_seconds": round(self.seconds, 2), **self.figures}
        if self.checks:
            found["checks"] = self.checks
        for name, text in (("not run", self.not_run), ("error", self.error)):
            if text is not None:
                found[name] = text
        return found


class RunningStep:
    """Takes a step's seconds and keeps its exceptions."""

    def __init__(self, record: Record, step: Step) -> None:
        self._record, self._step = record, step

    def __enter__(self) -> Step:
        self._started = time.monotonic()
        return self._step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        step = self._step
        if isinstance(error, NotRun):
            step.not_run = str(error)
        elif isinstance(error, Exception):
            traceback.print_exception(error)
            step.error = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        elif error is not None:
            return False
        step.seconds = time.monotonic() - self._started
        self._record.write()
        _say(step)
        return True


class Record:
    """A part's JSON file. `described`: what is known before the part starts (versions, device, commit)."""

    def __init__(
        self, file: Path, part: str, described: Mapping[str, Any], goals: Mapping[str, Goal], *, dry: bool, limit_s: float
    ) -> None:
        self.file, self.part, self.dry = file, part, dry
        self._described, self._goals = dict(described), dict(goals)
        self._started, self._limit_s = time.monotonic(), limit_s
        self.settings: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.steps: list[Step] = []
        self._reached: dict[str, dict[str, Any]] = {}
        self.not_run: str | None = None  # of the whole part
        self.complete = False
        self.write()

    @property
    def remaining_s(self) -> float:
        """Seconds that are left to the part."""
        return self._limit_s - (time.monotonic() - self._started)

    def step(self, name: str) -> RunningStep:
        """To be entered: a step that lacks a component is `not run`; any other exception is an error of the step, and the part goes on."""
        step = Step(name)
        self.steps.append(step)
        print(f"{self.part}: {name} ...", flush=True)
        return RunningStep(self, step)

    def goal(self, name: str, value: float) -> None:
        """What was measured for a goal of the part. A dry run measures nothing that a goal speaks of: it stays open."""
        goal = self._goals[name]
        reached = None if self.dry else goal.reached(value)
        self._reached[name] = {"value": value, "reached": reached}

    def has_goal(self, name: str) -> bool:
        return name in self._goals

    def open_goal(self, name: str, why: str) -> None:
        self._reached[name] = {"reached": None, "why": why}

    @property
    def holds(self) -> bool:
        return all(step.holds for step in self.steps) and all(goal["reached"] is not False for goal in self._reached.values())

    def finish(self) -> None:
        self.complete = True
        self.write()

    def write(self) -> None:
        found = {
            "part": self.part,
            "dry": self.dry,
            **self._described,
            **({} if self.not_run is None else {"not run": self.not_run}),
            "settings": self.settings,
            "limits": self.limits,
            "steps": {step.name: step.described() for step in self.steps},
            "goals": [self._goal(name, goal) for name, goal in self._goals.items()],
            "seconds": round(time.monotonic() - self._started, 1),
            "complete": self.complete,
            "holds": self.complete and self.holds,
        }
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
        partial.replace(self.file)

    def _goal(self, name: str, goal: Goal) -> dict[str, Any]:
        bound = {"at_most": goal.at_most} if goal.at_most is not None else {"at_least": goal.at_least}
        found = self._reached.get(name, {"reached": None, "why": "not measured"})
        if self.dry and "value" in found:
            found = {**found, "why": "a dry run says nothing of a GPU"}
        return {"goal": goal.text, **bound, **found}


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, and those that JSON has no sign for as text."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _inside(value: float, at_most: float | None, at_least: float | None) -> bool:
    """NaN is outside of everything."""
    if at_most is None and at_least is None:
        return False
    return not math.isnan(value) and (at_most is None or value <= at_most) and (at_least is None or value >= at_least)


def _say(step: Step) -> None:
    if step.not_run is not None:
        print(f"  not run: {step.not_run}", flush=True)
    if step.error is not None:
        print(f"  ERROR {step.error}", flush=True)
    for name, value in step.figures.items():
        text = json.dumps(rounded(value))
        print(f"  {name}: {text if len(text) < 200 else text[:200] + ' ...'}", flush=True)
    for check in step.checks:
        bounds = " ".join(f"{name} {check[name]:.3g}" for name in ("at_most", "at_least", "wrong") if name in check)
        value = check["value"] if isinstance(check["value"], bool) else f"{check['value']:.4g}"
        print(f"  {'ok    ' if check['holds'] else 'FAILED'} {check['check']}: {value} {bounds}", flush=True)
