"""The commands; no logic. Heavy imports wait for the command that needs them.

Exit status: 0 done; 1 failed while running; 2 wrong input; 3 stopped by a signal, after a checkpoint of what is complete.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from megatron_nsr.platform.quiet import ignore_library_warnings
from megatron_nsr.types import NoVerdicts, RolloutsLost, UserError

STATUS_VARIABLE = "MEGATRON_NSR_EXIT_STATUS"  # set by megatron_nsr.launch.scripts
DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3
RANK_0_SPEAKS_FIRST_S = 1.0  # torchrun looks at its processes every 0.1 s

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RLVR at Megatron scale, split by the sign of the reward.",
)

jobs = typer.Typer(no_args_is_help=True, help="Jobs that `launch` started.")
app.add_typer(jobs, name="job")


def _one_of(*values: str) -> Callable[[str], list[str]]:
    """What shell completion offers for an option."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


ConfigFile = Annotated[Path, typer.Argument(help="YAML file", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", metavar="[KEY=VALUE]...")]
JobName = Annotated[str, typer.Argument(help="as `launch` printed it", metavar="JOB")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train, or resume the run in run.dir. Also: torchrun --nproc-per-node N -m megatron_nsr train CONFIG ..."""

    def work() -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop_at_once)  # until the trainer takes them over
        from megatron_nsr.config_files import load_config

        settings = load_config(config, overrides)
        from megatron_nsr.trainer import train as run

        return STOPPED if run(settings) == "stopped" else DONE

    _exit(work)


@app.command()
def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="address to listen on; whoever reaches it can change the weights")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8000,
) -> None:
    """A rollout server of the config's model for runs with rollout.mode=server, until it is stopped."""

    def work() -> int:
        from megatron_nsr.config_files import load_config

        settings = load_config(config, overrides)
        from megatron_nsr.rollout.serve import serve as become_server

        become_server(settings, host=host, port=port)
        return DONE

    _exit(work)


@app.command()
def launch(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, and cluster.key=value", metavar="[KEY=VALUE]...")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="YAML file that says where the job runs; see docs/launching.md")] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="local, docker, slurm or skypilot; the same as cluster.executor=...",
            autocompletion=_one_of("local", "docker", "slurm", "skypilot"),
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be submitted, and submit nothing")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="return once the job is submitted; slurm only")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="print the job's log while it is written")] = False,
    uncommitted: Annotated[bool, typer.Option("--uncommitted", help="ship changes of tracked files that are not committed")] = False,
) -> None:
    """Run `train` as a job: on this machine, in a container, on Slurm or in a cloud. The exit status is the job's."""

    def work() -> int:
        from megatron_nsr.launch.command import launch as run

        flags = {"dry_run": dry_run, "detach": detach, "follow": follow, "uncommitted": uncommitted}
        return run(config, overrides or [], cluster_file=cluster, executor=executor, **flags)

    _exit(work)


@jobs.command()
def status(job: JobName) -> None:
    """What the job and its run are doing."""

    def work() -> int:
        from megatron_nsr.launch.command import show_status

        show_status(job)
        return DONE

    _exit(work)


@jobs.command()
def logs(job: JobName, follow: Annotated[bool, typer.Option("--follow", help="until the job has ended")] = False) -> None:
    """What the job's ranks have printed."""

    def work() -> int:
        from megatron_nsr.launch.command import show_logs

        show_logs(job, follow=follow)
        return DONE

    _exit(work)


@jobs.command()
def cancel(job: JobName) -> None:
    """Stop the job after a checkpoint; the same launch command goes on from there."""

    def work() -> int:
        from megatron_nsr.launch.command import cancel as run

        run(job)
        return DONE

    _exit(work)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Pass@k of model.path (a Hugging Face directory or a checkpoint) on evaluation.benchmarks, to RUN/eval/step_N.json."""

    def work() -> int:
        from megatron_nsr.config_files import load_config

        settings = load_config(config, overrides)
        from megatron_nsr.evaluator import evaluate as run

        run(settings)
        return DONE

    _exit(work)


@app.command()
def score(
    generations: Annotated[Path, typer.Argument(help="JSONL of question_id, response, and answer or label")],
    out: Annotated[Path, typer.Option(help="where the verdicts go, one JSON object a line")],
    workers: Annotated[int, typer.Option(help="grader processes", min=1)] = 1,
    timeout_s: Annotated[float, typer.Option(help="deadline of one verdict, seconds", min=0.01)] = 10.0,
    grader: Annotated[str, typer.Option(help="math_verify, or a Grader's import path")] = "math_verify",
    summary: Annotated[Path | None, typer.Option(help="where the scores go, as JSON that `compare` reads")] = None,
    benchmark: Annotated[str | None, typer.Option(help="what the summary calls the problems; otherwise the file's name")] = None,
    allow_uneven: Annotated[bool, typer.Option("--allow-uneven", help="questions may have unequally many samples")] = False,
) -> None:
    """Grade anyone's samples and print Pass@k and cons@k; needs neither a model nor a GPU."""

    def work() -> int:
        from rich.console import Console

        from megatron_nsr.config import RewardConfig
        from megatron_nsr.evaluation.score import check_output, render, score_file, write_summary

        if summary is not None:
            check_output("summary", summary, generations, out)
        limits, name = RewardConfig(), benchmark or generations.stem
        scores = score_file(
            generations,
            out,
            grader=grader,
            workers=workers,
            timeout_s=timeout_s,
            memory_limit_mib=limits.memory_limit_mib,
            cache_size=limits.cache_size,
            allow_uneven=allow_uneven,
        )
        if summary is not None:
            write_summary(summary, scores, source=generations, benchmark=name)
        Console().print(render(scores, name))
        return DONE

    _exit(work)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories; the first is what the others are compared with", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="the HTML file")],
) -> None:
    """One self-contained HTML page: Pass@k curves, entropy, per-sign diagnostics, timings."""

    def work() -> int:
        from megatron_nsr.evaluation.report import write_report

        for line in write_report(runs, out):
            typer.echo(f"missing: {line}", err=True)
        typer.echo(f"report: {out}")
        return DONE

    _exit(work)


@app.command()
def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            help="run directories, for all their evaluations, or eval/step_N.json files; the first is what others are compared with",
            metavar="EVALUATION...",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="all numbers, as FILE.csv or FILE.json")] = None,
    plot: Annotated[Path | None, typer.Option(help="the Pass@k curves with their bands, as FILE.png")] = None,
) -> None:
    """Many checkpoints in one table and one picture: Pass@k and cons@k with 95 % intervals."""

    def work() -> int:
        from rich.console import Console

        from megatron_nsr.evaluation.comparison import comparison_records, load_evaluations, render_comparison, write_picture, write_records

        found = load_evaluations(evaluations)
        if out is not None:
            write_records(out, comparison_records(found))
        if plot is not None:
            write_picture(plot, found)
        Console().print(render_comparison(found))
        return DONE

    _exit(work)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run, servers' included", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="h200, h100 or cpu", autocompletion=_one_of("h200", "h100", "cpu"))] = "h200",
    prompt_mean: Annotated[float | None, typer.Option(help="prompt tokens, on average")] = None,
    response_mean: Annotated[float | None, typer.Option(help="response tokens, on average")] = None,
    response_spread: Annotated[float | None, typer.Option(help="standard deviation of response tokens over their mean", min=0.0)] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="also the timeline of steps on up to 1,024 GPUs")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --simulate: the scaling efficiency, as FILE.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="values for programs: bytes and seconds")] = False,
) -> None:
    """Memory, time and what bounds a step, before anything is started; exit status 1 where it does not fit."""

    def work() -> int:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends other programs, without a traceback
        from megatron_nsr.config_files import load_config

        settings = load_config(config, overrides)
        from megatron_nsr.planning.command import show_plan

        fits = show_plan(
            settings,
            gpus=gpus,
            gpu=gpu,
            prompt_mean=prompt_mean,
            response_mean=response_mean,
            response_spread=response_spread,
            simulate=simulate,
            plot=plot,
            as_json=as_json,
        )
        return DONE if fits else FAILED

    _exit(work)


@app.command()
def examples(
    out: Annotated[Path, typer.Option(help="the folder that gets configs/, examples/, requirements/ and tools/")],
) -> None:
    """Copies the configs, examples, lock files and tools that an installed package brought; `python -m examples.quickstart` runs there."""

    def work() -> int:
        from megatron_nsr.platform.shipped_files import copy_shipped_files

        for folder in copy_shipped_files(out):
            typer.echo(str(folder))
        return DONE

    _exit(work)


@app.command()
def doctor() -> None:
    """What is installed, what works here, what is missing and how to get it."""

    def work() -> int:
        from rich.console import Console

        from megatron_nsr.platform.doctor import can_train, diagnose, render

        checks = diagnose()
        Console().print(render(checks), crop=False)
        return DONE if can_train(checks) else FAILED

    _exit(work)


def main() -> None:
    """The console script. One thread a rank unless told otherwise: ranks and the engine share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ignore_library_warnings()
    app(prog_name="megatron-nsr")  # under `python -m` too: shell completion makes names of functions and variables of it


def _exit(work: Callable[[], int]) -> None:
    """Ends the process with the status of `work`: a traceback only for a failure that no error of ours foresaw."""
    try:
        status = work()
    except UserError as error:
        _say(str(error), rank=int(os.environ.get("RANK", "0")))
        status = WRONG_INPUT
    except (RolloutsLost, NoVerdicts) as error:
        _say(str(error), rank=int(os.environ.get("RANK", "0")))
        status = FAILED
    except Exception:
        traceback.print_exc()
        status = FAILED
    if left := os.environ.get(STATUS_VARIABLE):
        Path(left).write_text(f"{status}\n")  # for `launch`: torchrun turns a rank's status into 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status in (DONE, STOPPED):
        raise SystemExit(status)
    # A failed rank must not wait for the others in a collective that its teardown would start.
    os._exit(status)


def _stop_at_once(number: int, _frame: FrameType | None) -> None:
    """A signal while modules and input are read: nothing is written or running yet. Not by an exception, which an import could swallow.

    The signal may be torchrun's, because another rank has met wrong input: the status that it left stays.
    """
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"megatron-nsr: {signal.Signals(number).name}: stopped before the run started; nothing was changed\n".encode())
    if (left := os.environ.get(STATUS_VARIABLE)) and not Path(left).exists():
        Path(left).write_text(f"{STOPPED}\n")
    os._exit(STOPPED)


def _say(problem: str, *, rank: int) -> None:
    """One line on stderr. Most wrong input is wrong on every rank: torchrun ends the others once rank 0 has left, before they repeat it.

    What is wrong elsewhere only, such as a file that one node lacks, is told by the rank that met it.
    """
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer that got so far remembers signals instead
        time.sleep(RANK_0_SPEAKS_FIRST_S)
        problem = f"rank {rank}: {problem}"
    print(f"megatron-nsr: {problem}", file=sys.stderr)
