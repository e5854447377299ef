"""The small files of a model directory: reading them, and taking them wherever its weights go. May import: types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_nsr.types import UserError

# What is needed to tokenise and to stop as the source did; config.json is separate, since an export writes its own.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies the tokenizer, and the generation config with its stop ids, into an existing directory."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def has_tokenizer(directory: str | Path) -> bool:
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def read_json(directory: str | Path, name: str) -> dict[str, Any] | None:
    """The object in a file of a model directory; None where there is no such file. Raises UserError naming model.path otherwise."""
    file = Path(directory) / name
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 either
        raise UserError(f"model.path={directory}: {name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"model.path={directory}: {name} is not a JSON object")
    return values
