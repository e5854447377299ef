"""Writes docs/configuration.md from the configuration schema. May import: megatron_nsr.config.

Usage: python tools/write_configuration_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_nsr.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/write_configuration_page.py from megatron_nsr/config.py: change the schema, then run the tool. -->

A run is described by one YAML file. `run`, `model`, `data` and `objective` are required sections, the others have defaults.
Any field can be set behind the file's name; the last word wins:

    megatron-nsr train configs/quickstart.yaml objective.name=w_reinforce objective.lambda=0.2 optimizer.learning_rate=1e-4

- A value is read as YAML: `data.limit=null`, `parallel.sequence=true`.
- `${section.field}` stands for another field's value, `${oc.env:NAME}` for an environment variable. Quote both for the shell:
  `'run.dir=runs/${objective.name}'`.
- `include: other.yaml` at the top of a file puts it on top of that one, whose path is relative to the file's own.
- Types are strict: `run.steps=1.5`, `parallel.sequence=1` and unknown keys are errors, with exit status 2 and one line that names the
  field. Where a number is wanted, an integer will do.
- `RUN/config.yaml` holds the resolved configuration, defaults included; it is itself a valid configuration file.

`objective.name` and `objective.preset` bring defaults of their own for some fields ([objectives.md](objectives.md)); what is given wins.
A field of `objective` that the objective does not read is an error unless it has its default.

Checked over several fields: `objective.mini_batch_prompts` divides `data.prompts_per_step` (supervised runs apart);
`parallel.virtual_pipeline` above 1 needs `parallel.pipeline` above 1; `parallel.sequence` needs `parallel.tensor` above 1;
`optimizer.min_learning_rate` is at most `optimizer.learning_rate`; `objective.nsr_steps` and `critic.warmup_steps` are below
`run.steps`, unless that is 0; objectives that compare a prompt's responses with one another need `rollout.samples_per_prompt` of 2
or more; `rollout.mode=server` needs `rollout.servers`, and
`rollout.max_staleness=1` needs both that mode and `objective.rollout_correction`; `training.offload` and `rollout.sleep_level` are for a
colocated engine and no supervised run. What depends on the model or the number of
processes (heads that `parallel.tensor` must divide, processes that `parallel.tensor` x `context` x `pipeline` must divide, ranks that
`rollout.tensor_parallel` must divide) and what servers say of themselves is checked before anything slow starts. `critic` is for
`objective.name=ppo` alone: with another objective it is an error to change it.
"""

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
EMPTY: dict[str | None, Any] = {"array": [], "object": {}}  # defaults that the schema leaves out: made by a function
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def page() -> str:
    """The whole page: a table a section, in the schema's order."""
    schema = Config.model_json_schema(by_alias=True)
    sections = [_section(name, _resolve(field, schema), name in schema["required"]) for name, field in schema["properties"].items()]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, section: dict[str, Any], required: bool) -> str:
    needed = section.get("required", [])
    rows = [
        f"| `{field}` | {_type(entry)} | {'required' if field in needed else _value(entry['default'])} | {_cell(entry['description'])} |"
        for field, entry in ((field, {"default": EMPTY.get(entry.get("type")), **entry}) for field, entry in section["properties"].items())
    ]
    return "\n".join(
        [f"## {name}{' (required)' if required else ''}", "", "| field | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _resolve(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]  # JSON


def _type(entry: dict[str, Any]) -> str:
    """A JSON schema's type in words: `integer ≥ 1`, or one of the values that it allows."""
    if "anyOf" in entry:
        return " or ".join(_type(choice) for choice in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    if entry["type"] == "object":
        return f"mapping of text to {_type(entry['additionalProperties'])}"
    bounds = [f"{sign} {_number(entry[key])}" for key, sign in BOUNDS.items() if key in entry]
    return " ".join([NAMES[entry["type"]], ", ".join(bounds)]).strip()


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"`{_number(value)}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float) -> str:
    """`0.2`, `1e-6`, `1`."""
    mantissa, exponent, power = f"{value:g}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
