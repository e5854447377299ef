from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.data.templates import INSTRUCTION, Message, render
from megatron_nsr.data.tokenizers import load_tokenizer
from megatron_nsr.types import UserError

ASK = b"Please reason step by step, and put your final answer within \\boxed{}."
QWEN_TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA_TEXT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN_IDS = [
    *(257, *b"system\nYou are a helpful assistant.", 258, *b"\n"),
    *(257, *b"user\nWhat is 1+1?\n", *ASK, 258, *b"\n"),
    *(257, *b"assistant\n"),
]
LLAMA_IDS = [
    *(256, 258, *b"system", 259, *b"\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", 261),
    *(258, *b"user", 259, *b"\n\nWhat is 1+1?\n", *ASK, 261),
    *(258, *b"assistant", 259, *b"\n\n"),
]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("qwen2.5-math", QWEN_TEXT),
        ("qwen3", QWEN_TEXT + "<think>\n\n</think>\n\n"),
        ("llama3.1", LLAMA_TEXT),
        ("plain", "What is 1+1?"),
    ],
)
def test_golden_text(template: str, text: str) -> None:
    assert render(template, "What is 1+1?") == text
    assert render(template, [{"role": "user", "content": "What is 1+1?"}]) == text


def test_golden_ids_qwen(qwen: Path) -> None:
    encode = load_tokenizer(str(qwen)).encode
    assert encode(render("qwen2.5-math", "What is 1+1?")) == QWEN_IDS
    assert encode(render("qwen3", "What is 1+1?")) == [*QWEN_IDS, 259, *b"\n\n", 260, *b"\n\n"]


def test_golden_ids_llama_have_one_bos(llama: Path) -> None:
    ids = load_tokenizer(str(llama)).encode(render("llama3.1", "What is 1+1?"))
    assert ids == LLAMA_IDS
    assert ids.count(256) == 1


@pytest.mark.parametrize(
    ("template", "header"), [("qwen2.5-math", "<|im_start|>system"), ("qwen3", "<|im_start|>system"), ("llama3.1", "|>system<|")]
)
def test_a_given_system_message_replaces_the_default(template: str, header: str) -> None:
    text = render(template, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
    assert text.count(header) == 1
    assert "Be brief." in text
    assert "helpful assistant" not in text


def test_llama_keeps_its_date_block_before_a_given_system_message_and_trims_turns() -> None:
    text = render("llama3.1", [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  1+1? " + INSTRUCTION + "\n"}])
    assert "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" in text
    assert f"<|end_header_id|>\n\n1+1? {INSTRUCTION}<|eot_id|>" in text


@pytest.mark.parametrize("template", ["qwen2.5-math", "qwen3", "llama3.1"])
def test_the_instruction_stands_once(template: str) -> None:
    in_user: list[Message] = [{"role": "user", "content": f"1+1?\n{INSTRUCTION}"}]
    in_system: list[Message] = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "1+1?"}]
    assert render(template, in_user).count(INSTRUCTION) == 1
    assert render(template, in_system).count(INSTRUCTION) == 1


def test_earlier_turns_are_kept_and_only_the_last_is_asked_for_a_box() -> None:
    shots: list[Message] = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]
    text = render("qwen2.5-math", shots)
    assert "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n" in text
    assert text.endswith(f"<|im_start|>user\n2+2?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    assert text.count(INSTRUCTION) == 1


def test_plain_adds_nothing() -> None:
    assert render("plain", " 3 4 = 7 \n") == " 3 4 = 7 \n"


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"data\.template='chatml'.*qwen2\.5-math, qwen3, llama3\.1, plain"):
        render("chatml", "1+1?")
