"""Prompt templates: a problem, as text or chat messages, becomes the exact text that the model reads.

May import: types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from megatron_nsr.types import UserError

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
QWEN_SYSTEM = "You are a helpful assistant."
# Llama 3.1's own chat template opens every system turn so. Its date is a constant (`date_string` defaults to 26 Jul 2024), not today's.
LLAMA_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# What Qwen3's own chat template writes with enable_thinking=False. The reference code has one line break at its end, in a comment.
QWEN3_NO_THINKING = "<think>\n\n</think>\n\n"


class Message(TypedDict):
    """One chat turn."""

    role: str  # system, user or assistant
    content: str


def render(template: str, question: str | Sequence[Message]) -> str:
    """The prompt's text, special tokens spelled out: encode it without adding any.

    `question` is the problem's text or its messages, of which the last is a user turn. Chat templates ask for a boxed answer
    at the end of that turn, unless the messages already do in the same words, and use a system message that is given in place
    of the default one. The Qwen templates are those of arXiv 2506.01347's public code; `llama3.1` is the model's own.

    Raises UserError for an unknown template.
    """
    if template not in _TEMPLATES:
        raise UserError(f"data.template={template!r}: no such template; choose one of {', '.join(_TEMPLATES)}")
    messages = [Message(role="user", content=question)] if isinstance(question, str) else list(question)
    return _TEMPLATES[template](messages)


def _plain(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _qwen25_math(messages: list[Message]) -> str:
    system, turns = _split_system(_ask_for_box(messages))
    turns = [Message(role="system", content=QWEN_SYSTEM if system is None else system), *turns]
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"


def _qwen3(messages: list[Message]) -> str:
    return _qwen25_math(messages) + QWEN3_NO_THINKING


def _llama31(messages: list[Message]) -> str:
    system, turns = _split_system(_ask_for_box(messages))
    # The model's own template trims every turn.
    text = "<|begin_of_text|>" + _llama_header("system") + LLAMA_SYSTEM + (system or "").strip() + "<|eot_id|>"
    text += "".join(_llama_header(turn["role"]) + turn["content"].strip() + "<|eot_id|>" for turn in turns)
    return text + _llama_header("assistant")


def _llama_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _split_system(messages: list[Message]) -> tuple[str | None, list[Message]]:
    """The system message's text, if the first message is one, and the other turns."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def _ask_for_box(messages: list[Message]) -> list[Message]:
    """Appends the instruction to the last turn, unless it is already there."""
    if any(INSTRUCTION in message["content"] for message in messages):
        return messages
    last = messages[-1]
    return [*messages[:-1], Message(role=last["role"], content=f"{last['content']}\n{INSTRUCTION}")]


_TEMPLATES: dict[str, Callable[[list[Message]], str]] = {
    "qwen2.5-math": _qwen25_math,
    "qwen3": _qwen3,
    "llama3.1": _llama31,
    "plain": _plain,
}
