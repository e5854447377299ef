"""`make browser` finds a browser, and without one says what to do instead of asking or failing later."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_browser(commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make browser` where the PATH holds what is in `commands`, and a shell."""
    for name in ("sh", "make"):
        program = shutil.which(name)
        assert program, f"no {name}"
        (commands / name).symlink_to(program)
    return subprocess.run(["make", "browser", *arguments], cwd=ROOT, env={"PATH": str(commands)}, capture_output=True, text=True)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_browser_is_found_under_any_of_its_names_or_where_it_is_named(tmp_path: Path) -> None:
    for place, arguments in (("found", []), ("named", [f"CHROMIUM={tmp_path / 'browser'}"])):
        commands = tmp_path / place
        commands.mkdir()
        script(tmp_path / "browser" if arguments else commands / "google-chrome", "exit 1")
        done = make_browser(commands, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_root_or_apt_it_says_what_to_do(tmp_path: Path) -> None:
    script(tmp_path / "id", "echo 1000")
    script(tmp_path / "apt-get", "echo installed; exit 0")
    script(tmp_path / "sudo", "exit 1")
    done = make_browser(tmp_path)
    assert done.returncode == 2 and "installed" not in done.stdout
    assert "Install Chromium or Chrome, or name the program: make test CHROMIUM=" in done.stderr


def test_root_installs_it_without_a_question(tmp_path: Path) -> None:
    script(tmp_path / "id", "echo 0")
    script(tmp_path / "env", 'while case "$1" in *=*) ;; *) false ;; esac; do shift; done; exec "$@"')
    script(tmp_path / "apt-get", f'echo "$@" >> {tmp_path / "log"}')
    assert make_browser(tmp_path).returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends chromium fonts-dejavu-core",
    ]
