"""Checks and measures this project on a host with a CUDA GPU, part by part; docs/h200.md says what each part does.

Usage: python tools/gpu_acceptance.py [--part NAME] --json DIR, or --dry on a machine without a GPU, or --page to write the results of
docs/results into docs/h200.md. Each part is a process of its own, of at most 8 minutes, and leaves DIR/DEVICE-PART.json.
Exit status: 0 all that could run holds, 1 a check or a goal failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, Python knows this folder only

from tools.acceptance import page, processes
from tools.acceptance.part import BUSY, LIMIT_S, PARTS
from tools.acceptance.results import conclusion, device_name, mark_cut_short, read, summary

RESULTS = processes.ROOT / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="one part, or several; without it all, in this order")
    parser.add_argument("--json", type=Path, metavar="DIR", help="where each part's result is written")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models and logs here, for later parts; else they are removed")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: exercises this program, measures nothing")
    parser.add_argument(
        "--page", action="store_true", help=f"write the tables of docs/{page.PAGE.name} from docs/results, and nothing else"
    )
    arguments = parser.parse_args()
    if arguments.page:
        page.write()
        return
    if arguments.json is None:
        parser.error("--json DIR: required, unless --page is given")
    if arguments.json.exists() and not arguments.json.is_dir():
        parser.error(f"--json {arguments.json}: that is a file; give a directory")
    if arguments.dry and arguments.json.resolve().is_relative_to(RESULTS):
        parser.error(f"--json {arguments.json}: a dry run is no result; docs/results is for those of a GPU")
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_acceptance_")))
        results = [run_part(name, arguments.json, work.resolve(), dry=arguments.dry) for name in arguments.part or PARTS]
    print(conclusion(results))
    raise SystemExit(0 if all(found["holds"] for found in results) else 1)


def run_part(name: str, folder: Path, work: Path, *, dry: bool) -> dict[str, Any]:
    """One part in a process of its own; its result."""
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    file = folder.resolve() / f"{'dry' if dry else device_name()}-{name}.json"
    file.unlink(missing_ok=True)
    command = processes.python("-m", "tools.acceptance.part", name, file, work, *(["--dry"] if dry else []))
    limit = LIMIT_S * (BUSY if dry else 1)
    with processes.started(command, changes=PARTS[name].dry_environment if dry else None) as process:
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
    if status is None or not file.exists() or not read(file)["complete"]:
        why = f"took longer than {limit:.0f} s" if status is None else f"ended with status {status} before it was complete"
        mark_cut_short(file, name, why)
    found = read(file)
    print(summary(found), flush=True)
    return found


if __name__ == "__main__":
    main()
