"""A base model of some shape, trained briefly on the task: `python -m tools.acceptance.bases FOLDER` makes one.

May import: everything but vLLM. The process ends before the model is used, and takes its optimizer's memory with it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_nsr.data.tokenizers import load_tokenizer
from megatron_nsr.weights.gathering import gather_hf_tensors
from megatron_nsr.weights.safetensors_files import write_hf_directory
from tools.acceptance import processes
from tools.acceptance.curves import Lesson, answers
from tools.acceptance.models import write_model
from tools.acceptance.policies import build_policy_of, policy_config, update_on
from tools.acceptance.record import Record, Step


@dataclass(frozen=True, slots=True)
class Base:
    """What is made: a shape of tools.acceptance.models, and what it learns."""

    shape: str
    dtype: str
    lesson: Lesson
    tokens_per_micro_batch: int

    @property
    def name(self) -> str:
        return f"base-{self.shape}-{self.dtype}-{self.lesson.numbers}x{self.lesson.steps}"


def made_base(record: Record, step: Step, base: Base, work: Path) -> Path:
    """The base's directory; made in a process of its own unless an earlier part left it beside `work`."""
    folder = work.parent / base.name
    if not (folder / "hf").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "base.json").write_text(json.dumps(asdict(base)), encoding="utf-8")
        processes.run(processes.python("-m", "tools.acceptance.bases", folder), folder / "log", record.remaining_s)
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    step.figure(base=base.name, first_loss=losses[0], last_loss=losses[-1])
    step.check("nats learned by the base", losses[0] - losses[-1], at_least=0.5)
    return folder / "hf"


def make(folder: Path, base: Base) -> None:
    """Maximum likelihood from random weights; writes FOLDER/losses.json, then FOLDER/hf."""
    lesson, model = base.lesson, write_model(folder / "model", base.shape)
    config = policy_config(
        model,
        model={"initialization": "random", "dtype": base.dtype},
        objective={"entropy_coefficient": 0.0},
        optimizer={"gradient_clip": 1.0},
        training={"tokens_per_micro_batch": base.tokens_per_micro_batch},
    )
    actor, shape = build_policy_of(config)
    tokenizer, losses = load_tokenizer(str(model)), []
    for step in range(1, lesson.steps + 1):
        rate = lesson.learning_rate * min(1.0, step / (0.1 * lesson.steps))
        losses.append(-update_on(actor, actor.pack(answers(tokenizer, lesson, seed=step)), rate)["policy/logprob"])
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_hf_directory(folder / "hf", gather_hf_tensors(actor.chunks, shape, 1 << 30), described, copy_from=model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds base.json")
    folder = parser.parse_args().folder
    values = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    make(folder, Base(**values | {"lesson": Lesson(**values["lesson"])}))


if __name__ == "__main__":
    main()
