"""The built wheel, alone in a new environment that borrows its dependencies, passes `doctor` and trains."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_nsr.platform.shipped_files import FOLDERS

ROOT = Path(__file__).parents[2]


WITHOUT_CHECKOUT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path, environment: dict[str, str] = WITHOUT_CHECKOUT) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks or would track, so that an old build/ folder adds nothing."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source, environment=dict(os.environ))
    (built,) = out.glob("megatron_nsr-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path)
    python = path / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel, cwd=path)
    # A plain line of a .pth file only adds the folder: what is installed there as editable stays out.
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip()
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return path


def test_it_is_not_the_checkout_that_is_used(environment: Path) -> None:
    found = run(environment / "bin" / "python", "-c", "import megatron_nsr; print(megatron_nsr.__file__)", cwd=environment)
    assert Path(found.strip()).is_relative_to(environment)


def test_a_lock_file_that_it_names_came_with_it(environment: Path) -> None:
    program = "from megatron_nsr.platform.doctor import lock_file; print(lock_file('launch'))"
    named = Path(run(environment / "bin" / "python", "-c", program, cwd=environment).strip())
    assert named.is_relative_to(environment) and "nemo_run==" in named.read_text()


def test_it_brings_every_config_example_lock_file_and_tool(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin" / "megatron-nsr", "examples", "--out", "here", cwd=tmp_path).split() == [
        f"here/{name}" for name in FOLDERS
    ]
    tracked = run("git", "ls-files", "--", *FOLDERS, cwd=ROOT).split()
    copied = [str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(tracked)
    again = subprocess.run(
        [environment / "bin" / "megatron-nsr", "examples", "--out", "here"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (again.returncode, again.stderr) == (2, "megatron-nsr: --out=here: here/configs is there already; name another folder\n")


def test_it_passes_doctor_and_trains_two_steps_of_each_kind(environment: Path, tmp_path: Path) -> None:
    printed = run(ROOT / "tools" / "try_installed.sh", environment, cwd=tmp_path)
    assert "This machine can train on the " in printed
    assert " 2 runs/quickstart/base/metrics.jsonl" in printed and " 2 runs/quickstart/nsr/metrics.jsonl" in printed
