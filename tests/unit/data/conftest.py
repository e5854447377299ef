"""Tiny tokenizers with the special tokens of the real families, whose other ids are byte values, so that golden ids can be read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_WORDS = ("<think>", "</think>")  # added tokens of Qwen3 that are not special: they are part of the text
LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
SYMBOLS = ("\n", "<|end|>", "\\boxed{", "}")


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, numbered by the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def build_hf(
    directory: Path, special: tuple[str, ...], words: tuple[str, ...] = (), *, kind: str, eos: str | None, bos: str | None = None
) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in words])
    if bos:  # Llama's own tokenizer.json adds its BOS so: the trap for a second one
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "eos_token": eos, "bos_token": bos}
    (directory / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if value}))
    return directory


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """Ids: <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258, <think> 259, </think> 260."""
    directory = build_hf(tmp_path / "qwen", QWEN_SPECIAL, QWEN3_WORDS, kind="Qwen2Tokenizer", eos="<|im_end|>")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 258, "vocab_size": 512}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    return directory


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Ids: begin 256, end_of_text 257, start_header 258, end_header 259, eom 260, eot 261."""
    directory = build_hf(tmp_path / "llama", LLAMA_SPECIAL, kind="PreTrainedTokenizerFast", eos="<|eot_id|>", bos="<|begin_of_text|>")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [257, 260, 261]}))
    return directory


@pytest.fixture
def arithmetic() -> list[str]:
    return [f"{a} + {b} * {c} = {a + b * c} ;  no, retry" for a in range(10) for b in range(10) for c in range(5)]


@pytest.fixture
def sentencepiece_directory(tmp_path: Path, arithmetic: list[str]) -> Path:
    """A tokenizer trained as the documentation says; <|end|> is named as a stop by the generation config."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(arithmetic),
        model_writer=model,
        model_type="bpe",
        vocab_size=48,
        user_defined_symbols=list(SYMBOLS),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    directory = tmp_path / "sentencepiece"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    return directory


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object, name: str = "problems.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
