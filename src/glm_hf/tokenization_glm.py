"""
Tokenizer of GLM-130B: a fast tokenizer built once from a SentencePiece model and saved as `tokenizer.json`.

Ids, for `I` image tokens and `P` pieces (GLM-130B: 20000 and 130000):

    0 .. I-1          image tokens, which prose cannot spell; the first is the pad token
    I .. I+P-1        the pieces of the SentencePiece model in its own order
    I+P .. I+P+7      [MASK] [gMASK] [sMASK] eod sop eop ENC dBLOCK

Text goes through: line breaks, tabs and runs of blanks to their symbols; the model's own normalisation; isolation of
the symbols; unigram or BPE; and back. It is split at special tokens first, and every part between them is encoded on
its own, dummy prefix included, as the released code does.
"""

import os
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import TokenizersBackend

from .chat_glm import CHAT_TEMPLATE

# In the released order. Its bare words (eod, sop, ...) occur inside ordinary words and so get other contents here.
SPECIAL_TOKENS = {
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "smask_token": "[sMASK]",
    "eod_token": "<|endofdocument|>",
    "sop_token": "<|startofpiece|>",
    "eop_token": "<|endofpiece|>",
    "enc_token": "<|ENC|>",
    "dblock_token": "<|dBLOCK|>",
}
WHITESPACE_SYMBOLS = {"\n": "<n>", "\t": "<|tab|>"} | {" " * k: f"<|blank_{k}|>" for k in range(80, 1, -1)}
SPACE = "\u2581"  # how SentencePiece writes a blank
GRAPHEME_BREAK = "\U000e0fff"  # unassigned, ignorable and never joined to its neighbours

WINDOW = 2048  # tokens of GLM-130B, prompt and answer together
UNLIMITED = 10**20  # from here on, transformers takes `model_max_length` for unknown

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMAL, USER_DEFINED, BYTE = 1, 4, 6
# By field number: model_type, treat_whitespace_as_suffix, byte_fallback.
TRAINER_DEFAULTS: dict[int, Any] = {3: 1, 24: 0, 35: 0}
# By field number: precompiled_charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
NORMALIZER_DEFAULTS: dict[int, Any] = {2: b"", 3: 1, 4: 1, 5: 1}
PIECE_DEFAULTS: dict[int, Any] = {1: b"", 2: bytes(4), 3: NORMAL}  # text, score (float32), kind


class GLMTokenizer(TokenizersBackend):
    """
    Turn text into GLM ids and back; build it with `from_sentencepiece`, load it with `from_pretrained`.

    Texts are padded on the left and, with `truncation=True`, shortened there, since the end is what is answered; to
    what length is said by `max_length` or else by `model_max_length`, the window of prompt and answer together.
    `apply_chat_template` lays a chat out around its blank (see `chat_glm`).

    Besides the usual ones it has `gmask_token`, `smask_token`, `eod_token`, `sop_token`, `eop_token`, `enc_token` and
    `dblock_token`, each with its `..._id`. Encoding adds no special token.

    The content of a special token is recognised in text, as everywhere in transformers: users type `[MASK]`. All other
    contents are strings that prose, code and HTML do not hold: `</s>` in a text is ordinary text, as it is for
    SentencePiece, and the token of that id is called `<| </s> |>`. For untrusted text pass
    `split_special_tokens=True`; then no text whatever gives a special id, but for characters unknown to the model.

    Ids equal SentencePiece's, with three exceptions: a unigram model may order the pieces of a run such as `=====`
    otherwise, where both orders score the same; a mark after an already composed letter is composed too; and a
    unigram model's user-defined symbol that could also be part of ordinary words is always its own token here.
    """

    padding_side = "left"
    truncation_side = "left"
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "GLMTokenizer":
        """Load as in transformers; a folder that has no chat template or window gets GLM-130B's."""
        tokenizer = super().from_pretrained(*args, **kwargs)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.model_max_length >= UNLIMITED:
            tokenizer.model_max_length = WINDOW
        return tokenizer

    @classmethod
    def from_sentencepiece(
        cls, model_file: str | os.PathLike, num_image_tokens: int = 20000, preserve_linebreaks: bool = True
    ) -> "GLMTokenizer":
        """
        Build the tokenizer from a unigram or BPE SentencePiece model such as icetk's `ice_text.model`.

        Args:
            model_file: Path of the SentencePiece model.
            num_image_tokens: Ids in front of the first piece, at least 0.
            preserve_linebreaks: Whether line breaks, tabs and runs of 2 to 80 blanks become their own symbols, as far
                as the model has them. False leaves them to the model's normalisation, as the released code does.

        Returns:
            The tokenizer. It pads with id 0, an image token; without image tokens with the pad piece of the model or,
            if there is none, with its unknown piece.

        Raises:
            FileNotFoundError: If `model_file` does not exist.
            ValueError: If `num_image_tokens` is negative, or if the file is not a SentencePiece model, or one of a
                kind that this tokenizer cannot reproduce.
        """
        if num_image_tokens < 0:
            raise ValueError(f"num_image_tokens must be at least 0, got {num_image_tokens}")
        model = _read_sentencepiece(model_file)
        image_tokens = [_unreachable(f"image {i}") for i in range(num_image_tokens)]
        tokens = image_tokens + [_token(piece) for piece in model.pieces]
        if taken := set(SPECIAL_TOKENS.values()).intersection(tokens):
            raise ValueError(f"{model_file} must not hold GLM's special tokens itself, got {', '.join(sorted(taken))}")
        own_pad_id = model.pad_id if model.pad_id >= 0 else model.unk_id
        named = {
            "eos_token": tokens[num_image_tokens + model.eos_id],
            "unk_token": tokens[num_image_tokens + model.unk_id],
            "pad_token": tokens[0 if num_image_tokens else own_pad_id],
        }
        backend = Tokenizer(_build_model(model, tokens))
        backend.normalizer = _build_normalizer(model, preserve_linebreaks)
        backend.pre_tokenizer = _build_pre_tokenizer(model)
        backend.decoder = _build_decoder(model, [*SPECIAL_TOKENS.values(), *named.values()])
        backend.add_special_tokens([AddedToken(content, special=True) for content in SPECIAL_TOKENS.values()])
        return cls(
            tokenizer_object=backend,
            padding_side=cls.padding_side,
            truncation_side=cls.truncation_side,
            model_max_length=WINDOW,
            chat_template=CHAT_TEMPLATE,
            **SPECIAL_TOKENS,
            **named,
        )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Lay out chats as in transformers; with `add_generation_prompt=True` their ids end in `sop`.

        Raises:
            jinja2.TemplateError: If a chat is not one (roles, their order, empty turns), or its question cannot be
                answered.
            ValueError: If `truncation` would remove a mask or `sop`.
        """
        is_chats = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        is_batch = is_chats and (isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"))
        chats = [self._drop_unseen(chat) for chat in (conversation if is_batch else [conversation])]
        if kwargs.get("truncation") and kwargs.get("tokenize", True):
            whole = dict.fromkeys(("truncation", "padding", "return_dict", "return_assistant_tokens_mask"), False)
            for ids in super().apply_chat_template(chats, *args, **kwargs | whole | {"return_tensors": None}):
                self._require_blank(ids, kwargs.get("max_length") or self.model_max_length)
        return super().apply_chat_template(chats if is_batch else chats[0], *args, **kwargs)

    def _drop_unseen(self, chat: Any) -> Any:
        """
        Return a chat without what gives no id in its question, between special tokens, and in front of its answer.

        These are blanks mostly. The template knows the text only, but what completes a context depends on whether its
        last id is a mask; and before 5.24, transformers marks no answer whose first letter has no token.
        """
        messages = [*getattr(chat, "messages", chat)]
        for index in range(len(messages) - 1, max(-1, len(messages) - 3), -1):
            turn = messages[index]
            role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
            if role == "user" and isinstance(content, str):
                parts = re.split(f"({'|'.join(map(re.escape, self.all_special_tokens))})", content)
                seen = [part for i, part in enumerate(parts) if i % 2 or self.encode(part)]  # every second is special
                messages[index] = {**turn, "content": "".join(seen)}
                break
            if role == "assistant" and isinstance(content, str):
                shorter = [content.lstrip(), content.lstrip(" "), content]
                same = next(text for text in shorter if self.encode(text) == self.encode(content))
                messages[index] = {**turn, "content": same}
        return messages

    def _require_blank(self, ids: list[int], max_length: int) -> None:
        """Raise ValueError unless truncation leaves the masks and `sop` of a chat in."""
        removed = ids[: max(0, len(ids) - max_length)] if self.truncation_side == "left" else ids[max_length:]
        blank = (self.mask_token_id, self.smask_token_id, self.gmask_token_id, self.sop_token_id)
        if any(token_id in blank for token_id in removed):
            raise ValueError(
                f"a chat of {len(ids)} tokens would lose its mask or sop when truncated to {max_length}; shorten the "
                "texts of its turns instead"
            )


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _SentencePieceModel(NamedTuple):
    pieces: list[_Piece]
    model_type: str
    byte_fallback: bool
    charsmap: bytes
    composes: bool
    dummy_prefix: bool
    remove_extra_blanks: bool
    unk_id: int
    eos_id: int
    pad_id: int

    @property
    def symbols(self) -> list[str]:
        """User-defined symbols, which are never split, joined or normalised; longest first."""
        return sorted((piece.text for piece in self.pieces if piece.kind == USER_DEFINED), key=len, reverse=True)


def _read_sentencepiece(model_file: str | os.PathLike) -> _SentencePieceModel:
    """Load a SentencePiece model; the field numbers are those of its `sentencepiece_model.proto`."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("building the tokenizer anew needs sentencepiece: pip install sentencepiece") from error

    if not os.path.isfile(model_file):
        raise FileNotFoundError(f"model_file must be a SentencePiece model, but there is no file {model_file}")
    try:
        processor = SentencePieceProcessor(model_file=os.fspath(model_file))
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"model_file must be a SentencePiece model, but {model_file} is none") from error
    fields = list(_proto_fields(processor.serialized_model_proto()))
    pieces = [PIECE_DEFAULTS | dict(_proto_fields(value)) for number, value in fields if number == 1]
    specs = dict(fields)
    trainer = TRAINER_DEFAULTS | dict(_proto_fields(specs.get(2, b"")))
    norm = NORMALIZER_DEFAULTS | dict(_proto_fields(specs.get(3, b"")))
    if trainer[3] not in {1, 2}:
        raise ValueError(f"the type of {model_file} must be unigram or bpe, got {MODEL_TYPES.get(trainer[3])}")
    if trainer[24] or not norm[5]:
        raise ValueError(
            f"{model_file} must write a blank as {SPACE} in front of a word; "
            "train it with escape_whitespaces and without treat_whitespace_as_suffix"
        )
    if processor.eos_id() < 0:
        raise ValueError(f"{model_file} must have an end-of-sentence piece; train it with an eos_id of 0 or more")
    return _SentencePieceModel(
        pieces=[_Piece(piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]) for piece in pieces],
        model_type=MODEL_TYPES[trainer[3]],
        byte_fallback=bool(trainer[35]),
        charsmap=norm[2],
        composes="\u00e9" in processor.normalize("e\u0301"),
        dummy_prefix=bool(norm[3]),
        remove_extra_blanks=bool(norm[4]),
        unk_id=processor.unk_id(),
        eos_id=processor.eos_id(),
        pad_id=processor.pad_id(),
    )


def _proto_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every field of a protobuf message: ints for varints, bytes for the rest."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            position += size
            yield key >> 3, message[position - size : position]


def _unreachable(name: str) -> str:
    """Return a token content that normalised text cannot hold, since there every blank is a `SPACE`."""
    return f"<| {name} |>"


def _token(piece: _Piece) -> str:
    """Return the content for a piece; those that SentencePiece does not look for in text become unreachable."""
    return piece.text if piece.kind in {NORMAL, USER_DEFINED, BYTE} else _unreachable(piece.text)


def _build_model(model: _SentencePieceModel, tokens: list[str]) -> models.Model:
    """Return the unigram or BPE model over `tokens`, the image tokens and then the pieces."""
    offset = len(tokens) - len(model.pieces)
    if model.model_type == "unigram":
        scores = [0.0] * offset + [piece.score for piece in model.pieces]
        return models.Unigram(list(zip(tokens, scores, strict=True)), offset + model.unk_id, model.byte_fallback)
    return models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=_merges(model.pieces),
        unk_token=tokens[offset + model.unk_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=True,  # an isolated symbol is one token though no merge leads to it
    )


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, the highest score first, as SentencePiece merges them."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    return [
        (text[:i], text[i:])
        for text in sorted(scores, key=scores.__getitem__, reverse=True)
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]


def _build_normalizer(model: _SentencePieceModel, preserve_linebreaks: bool) -> normalizers.Normalizer:
    """Return the steps from raw text to the string that SentencePiece would segment."""
    steps: list[normalizers.Normalizer] = []
    if preserve_linebreaks:
        symbols = set(model.symbols)
        steps += [
            normalizers.Replace(text, symbol) for text, symbol in WHITESPACE_SYMBOLS.items() if symbol in symbols
        ]
    if model.charsmap:
        charsmap = normalizers.Precompiled(model.charsmap)
        if changed := [text for text in model.symbols if charsmap.normalize_str(text).replace(" ", SPACE) != text]:
            raise ValueError(
                f"the model's normalisation must leave its user-defined symbols alone, but changes {changed}"
            )
        # Precompiled maps whole graphemes and loses what it does not know in them; alone, every character is mapped.
        steps += [
            normalizers.Replace(Regex(r"\Y"), GRAPHEME_BREAK),
            charsmap,
            normalizers.Replace(GRAPHEME_BREAK, ""),
        ]
    if model.composes:
        steps.append(normalizers.NFC())
    if model.remove_extra_blanks:
        steps.append(normalizers.Replace(Regex(r"\A +|(?<= ) +"), ""))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_blanks:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _build_pre_tokenizer(model: _SentencePieceModel) -> pre_tokenizers.PreTokenizer | None:
    """Return the step that isolates the symbols, and keeps a literal `<0x0A>` from being taken for a byte piece."""
    patterns = [re.escape(symbol) for symbol in model.symbols]
    if model.byte_fallback:
        patterns.append("(?<=<)(?=0x[0-9A-F]{2}>)")
    return pre_tokenizers.Split(Regex("|".join(patterns)), "isolated") if patterns else None


def _build_decoder(model: _SentencePieceModel, specials: list[str]) -> decoders.Decoder:
    """Return the way back: bytes to characters, dummy prefixes dropped, symbols to the whitespace they stand for."""
    steps: list[decoders.Decoder] = [decoders.ByteFallback()] if model.byte_fallback else []
    steps.append(decoders.Fuse())
    if model.dummy_prefix or model.remove_extra_blanks:
        after_special = "|".join(map(re.escape, specials))
        steps.append(decoders.Replace(Regex(rf"(?:\A|(?<={after_special})){SPACE}"), ""))
    steps.append(decoders.Replace(SPACE, " "))
    symbols = set(model.symbols)
    steps += [decoders.Replace(symbol, text) for text, symbol in WHITESPACE_SYMBOLS.items() if symbol in symbols]
    return decoders.Sequence(steps)


__all__ = ["GLMTokenizer"]
