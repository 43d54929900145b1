"""Train the tokenizer of the small model on its corpus: `python tokenizer.py CORPUS FOLDER`."""

import json
import re
import sys
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from glm_hf import GLMTokenizer

VOCAB_SIZE = 6000
HAN = re.compile("[\u4e00-\u9fff\u3400-\u4dbf]")
BORDER = "\u2016"  # no piece crosses it, so that every Chinese character is a piece of its own


def train_tokenizer(corpus: Path, folder: Path) -> GLMTokenizer:
    """
    Train a BPE model on both languages and save it as a tokenizer without image tokens.

    Args:
        corpus: Folder with `text.en.jsonl` and `text.zh.jsonl`.
        folder: Gets `text.model`, the SentencePiece model, and the files of the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.loads(line)["text"]
        for language in ("en", "zh")
        for line in (corpus / f"text.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    with (folder / "text.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=(HAN.sub(rf"{BORDER}\g<0>{BORDER}", line) for line in lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=1.0,
            pretokenization_delimiter=BORDER,
            split_digits=True,
            user_defined_symbols=["<n>"],
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = GLMTokenizer.from_sentencepiece(folder / "text.model", num_image_tokens=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    train_tokenizer(*map(Path, sys.argv[1:]))
