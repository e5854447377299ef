"""The LM head with the policy loss: ours, materialised logits and other people's fused heads, in one process, in interleaved rounds.

Usage: python tools/benchmarks/fused_head.py [--device cpu|cuda] [--json FILE]; `make bench-deps` installs the peers. May import everything.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script, Python knows this folder only

from megatron_nsr.platform.quiet import ignore_library_warnings
from tools.benchmarks.fused_head_measure import MIB, SEQUENCES, CpuMeter, CudaMeter, Meter, Outcome, Problem, Reference, Shape, make_problem
from tools.benchmarks.fused_head_peers import BASELINES, OURS, PEERS, Head, Unavailable, Variant, find_peers

FORWARD, TRAINING = "forward", "forward+backward"
CPU_SHAPES = (Shape(2048, 512, 32768),)
CUDA_SHAPES = tuple(Shape(tokens, hidden, 151936) for tokens in (4096, 16384, 32768) for hidden in (2560, 3584, 4096))
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# On a CPU, in CPU seconds and peak memory, against materialised logits, forward and backward with entropy.
CPU_GOAL = {"time_ratio": 0.85, "memory_ratio": 1 / 6}
PRODUCTS = "matrix products"
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")
# Tokens at a time in the bare matrix products; the fastest is the limit. On a CPU few rows stay in the cache, many fill the cores.
_PRODUCT_ROWS = {"cpu": (256, 2048), "cuda": (2048, 8192)}


@dataclass(slots=True, eq=False)
class Case:
    """One variant in one mode, and what was taken of it."""

    variant: Variant
    head: Head
    mode: str
    entropy: bool
    laps: list[tuple[float, ...]] = field(default_factory=list)
    peak: int | None = None
    gradients: int = 0  # bytes that the call leaves behind
    errors: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def terms(self) -> str:
        """What it computes: only cases of equal mode and terms are compared."""
        return (self.head.loss if self.mode == TRAINING else self.head.measures) + ("+entropy" if self.entropy else "")

    def prepare(self, problem: Problem) -> None:
        problem.hidden.grad = problem.weight.grad = None
        weight: Any = problem.weight
        if hasattr(weight, "main_grad"):
            del weight.main_grad
        if self.head.main_grad:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def run(self, problem: Problem) -> Outcome:
        if self.mode == TRAINING:
            outcome = self.head.training(problem, self.entropy)
            if outcome.loss is not None:
                outcome.loss.backward()
            return outcome
        assert self.head.forward is not None
        with torch.no_grad():
            return self.head.forward(problem, self.entropy)

    def check(self, problem: Problem, right: Reference) -> None:
        """Runs once without a clock: compiles what compiles, and takes the errors."""
        self.prepare(problem)
        outcome = self.run(problem)
        self.errors = right.errors(outcome)
        if self.mode == TRAINING and problem.hidden.grad is not None:
            weight: Any = problem.weight
            d_weight = weight.main_grad if self.head.main_grad else weight.grad
            self.errors |= right.gradient_errors(self.terms, problem.hidden.grad, d_weight)
            left = (problem.hidden.grad,) if self.head.main_grad else (problem.hidden.grad, d_weight)
            self.gradients = sum(gradient.numel() * gradient.element_size() for gradient in left)


def build_cases(variants: Sequence[Variant], device: torch.device) -> tuple[list[Case], list[dict[str, Any]]]:
    """The cases that may run here, and an entry `not_run: why` for each that may not."""
    cases: list[Case] = []
    absent: list[dict[str, Any]] = []
    for variant in variants:
        named = {"name": variant.name, "package": variant.package}
        try:
            head = variant.build(device)
        except (Unavailable, ImportError) as error:
            why = str(error) if isinstance(error, Unavailable) else f"{error}; `make bench-deps` installs the peers"
            absent.append({**named, "not_run": why})
            continue
        modes = [FORWARD, TRAINING] if head.forward else [TRAINING]
        entropies = [True, False] if head.entropy else [False]
        cases += [Case(variant, head, mode, entropy) for mode in modes for entropy in entropies]
        if not head.entropy:
            absent.append({**named, "entropy": True, "not_run": "it computes no entropy"})
    return cases, absent


def products_case(problem: Problem, mode: str, chunk_tokens: int) -> Case:
    """The head's matrix products and nothing else, with their outputs allocated beforehand."""
    tokens, _, vocabulary = problem.shape
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_empty(min(tokens, chunk_tokens), vocabulary)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def run(_problem: Problem, _entropy: bool) -> Outcome:
        for start in range(0, tokens, len(logits)):
            rows = slice(start, min(start + len(logits), tokens))
            chunk = logits[: rows.stop - start]
            torch.mm(hidden[rows], weight.t(), out=chunk)
            if mode == TRAINING:
                torch.mm(chunk, weight, out=d_hidden[rows])
                d_weight.addmm_(chunk.t(), hidden[rows], beta=1 if start else 0)
        return Outcome()

    head = Head(run, run, measures="products", loss="products", entropy=False)
    return Case(Variant(PRODUCTS, "torch", lambda device: head), head, mode, entropy=False)


def measure(cases: list[Case], problem: Problem, right: Reference, meter: Meter, rounds: int) -> list[Case]:
    """One round to warm up, one for memory, then the timed ones, each beginning with another case. Returns the cases that ran."""
    running = []
    for case in cases:
        try:
            case.check(problem, right)
            running.append(case)
        except Exception as error:  # a peer may fail in any way; the others go on
            if case.variant in OURS:
                raise
            case.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(f"{case.variant.name}, {case.mode}: {case.failure}")
    for case in running:
        case.prepare(problem)
        case.peak = meter.peak_bytes(lambda case=case: case.run(problem))  # type: ignore[misc]  # the default binds the loop's case
    for index in range(rounds):
        first = index % len(running)
        for case in running[first:] + running[:first]:
            case.prepare(problem)
            case.laps.append(meter.seconds(lambda case=case: case.run(problem)))  # type: ignore[misc]
        _say(f"round {index + 1} of {rounds}")
    return running


def benchmark(shape: Shape, device: torch.device, variants: Sequence[Variant], rounds: int) -> dict[str, Any]:
    """All variants on one problem."""
    meter: Meter = CudaMeter() if device.type == "cuda" else CpuMeter()
    torch.compiler.reset()  # the shapes before this one would count against the limit of recompilations
    problem = make_problem(shape, device, DTYPES[device.type])
    products = {mode: [products_case(problem, mode, rows) for rows in _PRODUCT_ROWS[device.type]] for mode in (FORWARD, TRAINING)}
    cases, absent = build_cases(variants, device)
    running = measure([*products[FORWARD], *products[TRAINING], *cases], problem, Reference(problem), meter, rounds)
    limits = {mode: min(medians(case)[0] for case in of_mode) for mode, of_mode in products.items()}
    absent += [{**identity(case), "not_run": case.failure} for case in cases if case.failure is not None]
    operations = 6 * shape.tokens * shape.hidden * shape.vocabulary
    return {
        **shape._asdict(),
        "dtype": str(problem.hidden.dtype).removeprefix("torch."),
        "products_tflops": operations / limits[TRAINING] / 1e12,
        "results": [summarise(case, running, limits[case.mode], meter) for case in running if case in cases] + absent,
    }


def identity(case: Case) -> dict[str, Any]:
    return {"name": case.variant.name, "package": case.variant.package, "mode": case.mode, "entropy": case.entropy}


def medians(case: Case) -> tuple[float, ...]:
    return tuple(statistics.median(lap[clock] for lap in case.laps) for clock in range(len(case.laps[0])))


def summarise(case: Case, running: list[Case], limit: float, meter: Meter) -> dict[str, Any]:
    """Medians over rounds, and their ratios to the baseline that has the same mode and terms."""
    seconds = medians(case)
    entry = {
        **identity(case),
        "terms": case.terms,
        "note": case.variant.note,
        **dict(zip(meter.clocks, seconds, strict=True)),
        f"{meter.clocks[0]}_of_rounds": [lap[0] for lap in case.laps],
        "fraction_of_limit": limit / seconds[0],
        "errors": case.errors,
    }
    if case.peak is not None:
        entry |= {"peak_mib": case.peak / MIB, "peak_without_gradients_mib": (case.peak - case.gradients) / MIB}
    for other in running:
        if other.variant in BASELINES and (other.mode, other.terms) == (case.mode, case.terms):
            entry["time_ratio"] = seconds[0] / medians(other)[0]
            if case.peak is not None and other.peak:
                entry["memory_ratio"] = case.peak / other.peak
    return entry


def environment(device: torch.device, rounds: int) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "python": platform.python_version(),
        "versions": versions,
    }


def table(result: dict[str, Any]) -> str:
    """One line a case, equal terms together, fastest first; then what did not run."""
    clock = "device_s" if result["dtype"] == "bfloat16" else "cpu_s"
    ran = sorted((e for e in result["results"] if clock in e), key=lambda e: (e["mode"], e["terms"], e[clock]))
    lines = [
        f"T {result['tokens']}  H {result['hidden']}  V {result['vocabulary']}  {result['dtype']}"
        f"  matrix products {result['products_tflops']:.3g} TFLOP/s",
        f"{'':34}{'s':>9}{'ratio':>7}{'limit':>7}{'MiB':>9}{'ratio':>7}  errors",
    ]
    group = None
    for entry in ran:
        if group != (group := (entry["mode"], entry["terms"])):
            lines.append(f"{entry['mode']}: {entry['terms']}")
        errors = "  ".join(f"{name} {error:.1e}" for name, error in entry["errors"].items())
        lines.append(
            f"  {entry['name']:32}{entry[clock]:>9.4g}{_number(entry, 'time_ratio', '.3f'):>7}{entry['fraction_of_limit']:>7.2f}"
            f"{_number(entry, 'peak_mib', '.1f'):>9}{_number(entry, 'memory_ratio', '.3f'):>7}  {errors}"
        )
    for entry in result["results"]:
        if "not_run" in entry:
            where = ", ".join([*filter(None, [entry.get("mode")]), *(["entropy"] if entry.get("entropy") else [])])
            lines.append(f"  {entry['name']}{f' ({where})' if where else ''}: not run: {entry['not_run']}")
    return "\n".join(lines)


def _number(entry: dict[str, Any], name: str, form: str) -> str:
    return format(entry[name], form) if name in entry else "-"


def _rounded(value: Any) -> Any:
    """Four significant digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--shape", action="append", type=_shape, help="T,H,V in place of the usual ones; may be repeated")
    arguments = parser.parse_args()
    ignore_library_warnings()
    find_peers()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shapes = arguments.shape or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES)
    results: dict[str, Any] = environment(device, arguments.rounds)
    if device.type == "cpu":
        results["goal"] = CPU_GOAL
    results["shapes"] = []
    for shape in shapes:
        results["shapes"].append(_rounded(benchmark(shape, device, (*BASELINES, *OURS, *PEERS), arguments.rounds)))
        print(table(results["shapes"][-1]), flush=True)
        if arguments.json:  # after each shape, so that a run cut short leaves what it measured
            arguments.json.write_text(json.dumps(_rounded(results), indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _shape(text: str) -> Shape:
    tokens, hidden, vocabulary = (int(part) for part in text.split(","))
    if tokens % SEQUENCES:
        raise argparse.ArgumentTypeError(f"{tokens} tokens do not split into {SEQUENCES} equal sequences")
    return Shape(tokens, hidden, vocabulary)


if __name__ == "__main__":
    main()
