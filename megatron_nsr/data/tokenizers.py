"""Tokenizers behind one interface: Hugging Face's tokenizer.json, or a sentencepiece tokenizer.model.

May import: platform.model_files, types; transformers and sentencepiece are imported when a tokenizer is loaded: they take seconds.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_nsr.platform.model_files import read_json
from megatron_nsr.types import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(ABC):
    """Text to token ids and back.

    vocab_size: one above the highest id it knows; the model's own vocabulary may be padded beyond it.
    stop_ids: the ids that end a response: the tokenizer's end of sequence first, then those of generation_config.json and config.json.
    """

    def __init__(self, directory: Path, *, vocab_size: int, eos_id: int | None) -> None:
        self.directory = directory
        self.vocab_size = vocab_size
        self.stop_ids = _stop_ids(directory, eos_id)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else, no beginning of sequence; special tokens spelled out in it become their single ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens. An id that no token has (a padded vocabulary row) gives U+FFFD."""
        runs = itertools.groupby((int(index) for index in ids), key=self._known)
        return "".join(self._decode_known(list(run)) if known else REPLACEMENT * len(list(run)) for known, run in runs)

    @abstractmethod
    def _known(self, index: int) -> bool: ...

    @abstractmethod
    def _decode_known(self, ids: list[int]) -> str: ...


def load_tokenizer(directory: str) -> Tokenizer:
    """Loads the tokenizer of a model directory: tokenizer.json where there is one, else tokenizer.model.

    Raises UserError naming model.path for a directory without a tokenizer, a broken one, or one without any stop id.
    """
    path = Path(directory)
    if (path / "tokenizer.json").is_file():
        return _HFTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return _SentencePieceTokenizer(path)
    found = "it has no tokenizer.json or tokenizer.model" if path.is_dir() else "no such directory"
    raise UserError(f"model.path={directory}: {found}; give a directory with config.json and a tokenizer")


class _HFTokenizer(Tokenizer):
    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise UserError(f"model.path={directory}: cannot load its tokenizer: {_one_line(error)}") from None
        self._ids = frozenset(self._tokenizer.get_vocab().values())
        super().__init__(directory, vocab_size=max(self._ids) + 1, eos_id=self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _known(self, index: int) -> bool:
        return index in self._ids

    def _decode_known(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, directory: Path) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise UserError(f"model.path={directory}: tokenizer.model is not a sentencepiece model: {_one_line(error)}") from None
        eos = self._processor.eos_id()  # -1: has none
        super().__init__(
            directory,
            vocab_size=self._processor.get_piece_size(),
            eos_id=eos if eos >= 0 else None,
        )
        # A stop token may be a user-defined symbol, which sentencepiece itself would print.
        self._special = {i for i in range(self.vocab_size) if self._processor.is_control(i)} | set(self.stop_ids)

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def _known(self, index: int) -> bool:
        # The unknown piece would decode to " ⁇ ", spaces included.
        return 0 <= index < self.vocab_size and not self._processor.is_unknown(index)

    def _decode_known(self, ids: list[int]) -> str:
        return str(self._processor.decode([index for index in ids if index not in self._special]))


def _stop_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    ids = [] if eos_id is None else [eos_id]
    for name in ("generation_config.json", "config.json"):
        value = (read_json(directory, name) or {}).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not ids:
        raise UserError(
            f"model.path={directory}: nothing ends a response; set eos_token_id in generation_config.json, config.json or the tokenizer"
        )
    return tuple(dict.fromkeys(int(index) for index in ids))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
