"""`make test-docker` with and without a Docker daemon: what it installs, builds and leaves, told by stand-ins for what it calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "build_cpu_image.sh"
REAL = ("bash", "cat", "dirname", "git", "grep", "mktemp", "mv", "realpath", "rm", "sed")
CHECK = "bash /opt/megatron-nsr/share/megatron_nsr/tools/try_installed.sh /opt/megatron-nsr"


class Machine:
    """`programs` is the PATH that the script sees; `packages` is what apt-get can install; every call of a stand-in goes to `log`."""

    def __init__(self, root: Path) -> None:
        self.programs, self.packages, self.temporary, self.log = root / "bin", root / "packages", root / "tmp", root / "log"
        for folder in (self.programs, self.packages, self.temporary):
            folder.mkdir()
        for name in REAL:
            program = shutil.which(name)
            assert program, f"no {name}"
            (self.programs / name).symlink_to(program)
        self.stand_in(self.programs / "docker", "exit 1")
        self.stand_in(self.programs / "id", "echo 0")
        install = f'[ ! -e {self.packages}/"$name" ] || mv {self.packages}/"$name" {self.programs}'
        self.stand_in(self.programs / "apt-get", f'[ "$1" != install ] || for name; do {install}; done')

    def stand_in(self, path: Path, text: str = "") -> None:
        path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >> {self.log}\n{text}\n')
        path.chmod(0o755)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        names = {"PATH": str(self.programs), "TMPDIR": str(self.temporary), **environment}
        return subprocess.run([SCRIPT], env=names, capture_output=True, text=True)

    def calls(self, program: str) -> list[str]:
        """Their arguments, without those that name buildah's storage."""
        words = [line.split() for line in self.log.read_text().splitlines()]
        return [" ".join(line[5 if "--root" in line else 1 :]) for line in words if line[0] == program]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_docker_or_root_it_says_what_is_needed(machine: Machine) -> None:
    machine.stand_in(machine.programs / "id", "echo 1000")
    done = machine.build()
    message = "build_cpu_image: no Docker daemon answers, and without one root is needed, for buildah\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert machine.calls("apt-get") == []


def test_wheels_that_the_build_could_not_see_are_refused(machine: Machine, tmp_path: Path) -> None:
    missing = machine.build(TORCH_WHEELS="nowhere")
    assert (missing.returncode, missing.stderr) == (1, "build_cpu_image: TORCH_WHEELS=nowhere: no such folder or wheel\n")
    machine.stand_in(machine.programs / "docker")
    with_docker = machine.build(TORCH_WHEELS=str(tmp_path))
    assert with_docker.returncode == 1 and "docker build sees no file of this machine; name the URL of an index" in with_docker.stderr
    assert set(machine.calls("docker")) == {"info"}


def test_docker_builds_and_tries_the_image_where_it_runs(machine: Machine) -> None:
    machine.stand_in(machine.programs / "docker")
    assert machine.build(TORCH_WHEELS="https://example.org/cpu").returncode == 0
    _, build, run = machine.calls("docker")
    assert build.startswith("build --target cpu --tag megatron-nsr:cpu ") and build.endswith(
        " --build-arg TORCH_SOURCE=--extra-index-url https://example.org/cpu ."
    )
    assert run == f"run --rm --shm-size 2g megatron-nsr:cpu {CHECK}"


def test_a_bare_machine_gets_buildah_and_a_base_that_cannot_be_pulled_is_made(machine: Machine, tmp_path: Path) -> None:
    machine.stand_in(machine.packages / "buildah", 'case " $* " in *" pull "*) exit 1 ;; *" from "*) echo container ;; esac')
    machine.stand_in(machine.packages / "mmdebstrap", 'for name; do case "$name" in *.tar) : >"$name" ;; esac; done')
    done = machine.build(TORCH_WHEELS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    installed = [line.split()[-1] for line in machine.calls("apt-get") if line.startswith("install")]
    assert installed == ["buildah", "debian-archive-keyring"]
    (base,) = machine.calls("mmdebstrap")
    assert " bookworm " in base
    pull, *made, build, start, check, cleaned = machine.calls("buildah")
    assert pull == "pull -q debian:12.12-slim" and made[-1] == "commit -q --rm container debian:12.12-slim"
    assert build.startswith("bud ") and build.endswith(" .") and " --target cpu --tag megatron-nsr:cpu " in build
    assert f" --volume {tmp_path}:/torch-wheels:ro " in build and " --build-arg TORCH_SOURCE=--find-links /torch-wheels " in build
    assert start == "from --pull-never localhost/megatron-nsr:cpu" and check == f"run --isolation chroot container -- {CHECK}"
    assert cleaned == "rm --all" and list(machine.temporary.iterdir()) == []


def test_a_wheel_is_named_as_a_file_of_the_folder_that_pip_searches(machine: Machine, tmp_path: Path) -> None:
    machine.stand_in(machine.programs / "buildah")
    (wheel := tmp_path / "torch.whl").touch()
    assert machine.build(TORCH_WHEELS=str(wheel)).returncode == 0
    (build,) = [call for call in machine.calls("buildah") if call.startswith("bud ")]
    assert f" --volume {wheel}:/torch-wheels/torch.whl:ro " in build and "--find-links /torch-wheels " in build


def test_a_base_that_can_be_pulled_is_used_and_a_failed_build_leaves_nothing(machine: Machine) -> None:
    machine.stand_in(machine.programs / "buildah", 'case " $* " in *" bud "*) exit 7 ;; esac')
    done = machine.build()
    assert done.returncode == 7
    assert [call.split()[0] for call in machine.calls("buildah")] == ["pull", "bud", "rm"]
    assert machine.calls("apt-get") == [] and list(machine.temporary.iterdir()) == []
