"""The layers of docs/design.md hold: imports go down only, and heavy libraries stay in the package that owns them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megatron_nsr"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
MAX_LINES = 400
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}

# Lowest first. A package or module of the root may import whatever stands in a lower line.
LAYERS = [
    {"types", "presets", "objective_fields", "config_sections", "config", "config_files", "clock", "platform"},
    {"models", "weights", "losses", "objectives", "rewards", "data", "observability"},
    {"training", "rollout"},
    {"phases"},
    {"evaluation", "launch", "planning", "conversion"},
    {"experience"},
    {"components"},
    {"recording"},
    {"trainer", "evaluator"},
    {"cli"},
    {"__main__"},
]
# Within its own layer a part may import only these.
WITHIN: dict[str, set[str]] = {
    "config_sections": {"objective_fields"},
    "config": {"types", "presets", "objective_fields", "config_sections"},
    "config_files": {"types", "config"},
    "objective_fields": {"presets"},
    "platform": {"types"},
    "weights": {"models"},
    "data": {"rewards"},  # a gold answer is read from a boxed solution as a response's answer is
}
# A library and the only parts that may import it.
OWNERS = {"nemo_run": {"launch"}, "vllm": {"rollout"}}
# A part and the libraries that it must do without.
WITHOUT = {part: {"megatron", "vllm", "transformer_engine"} for part in ("objectives", "losses")}


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import in a module of `package`, wherever in the module it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def violations(part: str, source: str, package: str = "megatron_nsr") -> list[str]:
    """What a module of `part` imports against the rules, as `line N: reason`."""
    rank = next(index for index, layer in enumerate(LAYERS) if part in layer)
    allowed = set().union(*LAYERS[:rank]) | WITHIN.get(part, set()) | {part}
    found = []
    for line, name in imported(source, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "megatron_nsr" and target not in allowed | {"", "__version__"}:
            found.append(f"line {line}: {part} imports {target}")
        if part not in OWNERS.get(top, {part}) or top in WITHOUT.get(part, set()):
            found.append(f"line {line}: {part} imports {top}")
    return found


def part_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", [module for module in MODULES if module != Path("__init__.py")], ids=str)
def test_imports_go_down(module: Path) -> None:
    assert part_of(module) in set().union(*LAYERS), f"{part_of(module)} stands in no layer: give it a place in LAYERS"
    package = ".".join(["megatron_nsr", *module.parts[:-1]])
    assert violations(part_of(module), (ROOT / module).read_text(), package) == []


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported((ROOT / "__init__.py").read_text(), "megatron_nsr")) == []


def test_names_say_what_a_module_is_for() -> None:
    assert [str(module) for module in MODULES if FORBIDDEN_NAMES & {part.removesuffix(".py") for part in module.parts}] == []


def test_files_are_short() -> None:
    lengths = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("part", "source", "reason"),
    [
        ("objectives", "from megatron_nsr.training import actor", "line 1: objectives imports training"),
        ("training", "from megatron_nsr.rollout.engine import Engine", "line 1: training imports rollout"),
        ("rollout", "import megatron_nsr.training", "line 1: rollout imports training"),
        ("models", "from megatron_nsr import weights", "line 1: models imports weights"),
        ("rewards", "def grade():\n    from ..data import prompts", "line 2: rewards imports data"),
        ("platform", "from megatron_nsr.config import Config", "line 1: platform imports config"),
        ("losses", "from megatron.core import parallel_state", "line 1: losses imports megatron"),
        ("objectives", "import transformer_engine.pytorch", "line 1: objectives imports transformer_engine"),
        ("training", "import vllm", "line 1: training imports vllm"),
        ("cli", "import nemo_run as run", "line 1: cli imports nemo_run"),
    ],
)
def test_a_forbidden_import_is_found(part: str, source: str, reason: str) -> None:
    assert violations(part, source, f"megatron_nsr.{part}") == [reason]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("weights", "from megatron_nsr.models.policy import Policy"),
        ("evaluation", "from megatron_nsr.rollout import engine\nfrom megatron_nsr.training import actor"),
        ("rollout", "from vllm import LLM\nfrom . import engine"),
        ("models", "from megatron.core import parallel_state\nfrom megatron_nsr import __version__"),
        ("cli", "from megatron_nsr.trainer import train"),
    ],
)
def test_an_allowed_import_passes(part: str, source: str) -> None:
    assert violations(part, source, f"megatron_nsr.{part}") == []
