from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_nsr.data.tokenizers import load_tokenizer
from megatron_nsr.platform.model_files import copy_tokenizer
from megatron_nsr.types import UserError

COMMON = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_hf_ids_without_special_tokens_of_its_own(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.encode("hé<|eot_id|>") == [*"hé".encode(), 261]
    assert tokenizer.vocab_size == 262


def test_hf_stop_ids_start_with_the_tokenizers_own(qwen: Path, llama: Path) -> None:
    assert load_tokenizer(str(qwen)).stop_ids == (258, 256)
    assert load_tokenizer(str(llama)).stop_ids == (261, 257, 260)


def test_hf_decode_skips_special_tokens_but_not_think_marks(qwen: Path) -> None:
    tokenizer = load_tokenizer(str(qwen))
    assert tokenizer.decode([257, *b"user\n", 259, *b" a , b .", 258, 256]) == "user\n<think> a , b ."


@pytest.mark.parametrize("kind", ["qwen", "llama", "sentencepiece_directory"])
def test_ids_outside_the_vocabulary_decode_to_the_replacement_character(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    one, two = tokenizer.encode("1"), tokenizer.encode("2")
    assert tokenizer.decode([*one, tokenizer.vocab_size, 10**6, *two, -1]) == "1\ufffd\ufffd2\ufffd"
    assert tokenizer.decode([]) == ""


def test_sentencepiece_gives_back_its_corpus(sentencepiece_directory: Path, arithmetic: list[str]) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_directory))
    for text in [*arithmetic, "  1 +  2 ", "\n 1\n\n \\boxed{+ * } 2\n", " ", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@COMMON
@given(text=st.text(alphabet="0123456789+*=; \n}", max_size=30))
def test_sentencepiece_gives_back_any_text_of_its_characters(sentencepiece_directory: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_directory))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_special_tokens(sentencepiece_directory: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_directory))
    assert tokenizer.encode("\n<|end|>\\boxed{}") == [3, 4, 5, 6]  # user-defined symbols follow <unk>, <s>, </s>
    assert tokenizer.stop_ids == (2, 4)
    assert tokenizer.vocab_size == 48
    assert tokenizer.decode([1, *tokenizer.encode("1 + 2"), 4, 2]) == "1 + 2"
    assert tokenizer.decode([0]) == "\ufffd"


@pytest.mark.parametrize("kind", ["qwen", "sentencepiece_directory"])
def test_a_copied_tokenizer_is_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    target = tmp_path / "export"
    target.mkdir()
    copy_tokenizer(tokenizer.directory, target)
    again = load_tokenizer(str(target))
    assert again.encode("1 + 2\n") == tokenizer.encode("1 + 2\n")
    assert again.stop_ids == tokenizer.stop_ids
    assert not (target / "config.json").exists()  # the model's, not the tokenizer's


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.path=.*absent: no such directory"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "message"), [("tokenizer.json", "cannot load its tokenizer"), ("tokenizer.model", "not a sentencepiece model")]
)
def test_a_broken_tokenizer(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("broken")
    with pytest.raises(UserError, match=rf"model\.path=.*{message}"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_nothing_stops(llama: Path) -> None:
    (llama / "config.json").write_text("{}")
    settings_file = llama / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match=r"model\.path=.*nothing ends a response; set eos_token_id"):
        load_tokenizer(str(llama))


def test_a_broken_generation_config(qwen: Path) -> None:
    (qwen / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.path=.*generation_config\.json is not JSON"):
        load_tokenizer(str(qwen))
