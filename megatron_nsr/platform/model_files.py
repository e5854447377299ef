"""The small files of a model directory that go wherever its weights go. May import: the standard library."""

from __future__ import annotations

import shutil
from pathlib import Path

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
