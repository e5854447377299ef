"""From a data file to prompts ready to sample: read, render, tokenise, leave out what is too long.

May import: types.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_nsr.data.sources import Row, read_rows
from megatron_nsr.data.templates import render
from megatron_nsr.data.tokenizers import Tokenizer
from megatron_nsr.types import Prompt, UserError


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one file, in its order, and the number left out for their length."""

    prompts: tuple[Prompt, ...]
    too_long: int


def load_prompts(
    path: str | Path, *, field: str, tokenizer: Tokenizer, template: str, max_prompt_tokens: int, limit: int | None = None
) -> PromptSet:
    """Reads the first `limit` rows of `path`, renders and tokenises them, and leaves out those above `max_prompt_tokens` tokens.

    Raises UserError as `read_rows` and `render` do, and naming data.max_prompt_tokens where no prompt is left.
    """
    prompts = [_prompt(row, tokenizer, template) for row in read_rows(path, field=field, limit=limit)]
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
    if not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise UserError(
            f"data.max_prompt_tokens={max_prompt_tokens}: all {len(prompts)} prompts of {field}={path} are longer; "
            f"the shortest has {shortest}"
        )
    return PromptSet(prompts=kept, too_long=len(prompts) - len(kept))


def _prompt(row: Row, tokenizer: Tokenizer, template: str) -> Prompt:
    text = render(template, row.question)
    return Prompt(
        id=row.id,
        text=text,
        token_ids=tuple(tokenizer.encode(text)),
        answer=row.answer,
        source=row.source,
        response=row.response,
        extra=row.extra,
    )
