"""A small seeded model with a SentencePiece tokenizer, as a folder."""

from pathlib import Path

import torch
from corpus import chinese, english, generate
from sentencepiece import SentencePieceTrainer

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMTokenizer

NUM_IMAGE_TOKENS = 20


def train_sentencepiece(path: Path, vocab_size: int = 500) -> Path:
    """Train a unigram model with a symbol for line breaks."""
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(generate([english, chinese], 1500, seed=1)),
            model_writer=file,
            model_type="unigram",
            vocab_size=vocab_size,
            user_defined_symbols=["<n>"],
            minloglevel=2,
        )
    return path


def config_for(tokenizer: GLMTokenizer, **sizes: object) -> GLMConfig:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "mask", "gmask", "smask")
    }
    ids |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eod", "sop", "eop")}
    defaults = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return GLMConfig(vocab_size=len(tokenizer) + 8, **ids, **(defaults | sizes))


def save_tiny_model(folder: Path, model_file: Path) -> None:
    tokenizer = GLMTokenizer.from_sentencepiece(model_file, num_image_tokens=NUM_IMAGE_TOKENS)
    torch.manual_seed(0)
    model = GLMForBlankInfilling(config_for(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)  # so that answers differ from text to text
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
