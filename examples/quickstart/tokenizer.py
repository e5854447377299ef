"""The tiny model's own sentencepiece tokenizer: one id for each word of the task.

May import: the task's modules and sentencepiece.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import sentencepiece

from examples.quickstart.arithmetic import COMPUTE
from examples.quickstart.corpus import BOX, END, RETRY, TRY
from examples.quickstart.puzzle import OPERATORS, Ranges

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


def task_words(ranges: Ranges) -> list[str]:
    """Every word that is one id: numbers, results `=17`, steps `+7`, lone operators, and the few fixed phrases.

    The longest word that fits wins, so `=17` is never `=1` and `7`; spaces belong to the phrases, so that no text has two readings.
    """
    values = range(ranges.largest_value + 1)
    steps = [f"{operator}{number}" for operator in OPERATORS for number in range(1, ranges.largest_operand + 1)]
    return [str(v) for v in values] + [f"={v}" for v in values] + steps + list(OPERATORS) + ["?", TRY, RETRY, BOX, END, COMPUTE]


def train_tokenizer(sentences: Iterable[str], ranges: Ranges) -> bytes:
    """Trains on the corpus and returns the model file's bytes, the same for the same sentences.

    The words of the task leave nothing to merge; whatever else a text holds is the unknown id. The model type is bpe because the
    others refuse a corpus that the words cover entirely.
    """
    words = [word.replace(" ", SPACE) for word in task_words(ranges)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + len(words),
        user_defined_symbols=words,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        bos_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
