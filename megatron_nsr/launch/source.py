"""Which code a job runs: a commit, so that a run can say what it was.

May import: observability, types and the standard library.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_nsr.observability.environment import SHIPPED_COMMIT
from megatron_nsr.observability.run_directory import write_json
from megatron_nsr.types import UserError

SHOWN = 5  # changed files


@dataclass(frozen=True, slots=True)
class Source:
    """The checkout's directory and the commit that is shipped. `changed`: the commit is made of uncommitted changes, on no branch."""

    directory: Path
    commit: str
    changed: bool

    def ship(self, target: Path) -> None:
        """Writes the commit's files below `target`, which is created, and beside them what the run will say that it is made of."""
        target.mkdir(parents=True)
        archive = subprocess.Popen(["git", "-C", str(self.directory), "archive", "--format=tar", self.commit], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(target)], stdin=archive.stdout, check=True)
        if archive.wait():
            raise RuntimeError(f"git archive {self.commit} ended with status {archive.returncode}")
        write_json(target / SHIPPED_COMMIT, {"commit": self.commit, "dirty": self.changed})


def find_source(directory: Path, *, uncommitted: bool) -> Source | None:
    """The commit that is checked out around `directory`; None where there is no checkout and `uncommitted` allows it.

    uncommitted: changes of tracked files are shipped too, as `git stash create` records them, which leaves the checkout alone.
    Raises UserError where there are such changes, or no checkout, and it is not allowed.
    """
    top = _git(directory, "rev-parse", "--show-toplevel")
    commit = top and _git(Path(top), "rev-parse", "HEAD")
    if not top or not commit:
        if uncommitted:
            return None
        raise UserError(f"{directory}: no git checkout with a commit; launch from one, or with --uncommitted to run what is installed")
    changes = (_git(Path(top), "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    if not changes:
        return Source(Path(top), commit, changed=False)
    if not uncommitted:
        files = [line.strip().split(maxsplit=1)[1] for line in changes]
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        raise UserError(f"{top}: uncommitted changes in {', '.join(files[:SHOWN])}{more}; commit them, or launch with --uncommitted")
    return Source(Path(top), _git(Path(top), "stash", "create") or commit, changed=True)


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip("\n")
