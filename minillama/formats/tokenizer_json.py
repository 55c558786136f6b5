"""Hugging Face's tokenizer files: writes tokenizer.json and the files beside it, without Hugging Face's libraries.

Sources of the formats: sentencepiece_model.proto (github.com/google/sentencepiece), the documentation of the tokenizers
library (huggingface.co/docs/tokenizers), and for byte pair encoding by ranks, Llama 3's tokenizer.json.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from minillama.formats.files import atomic_file
from minillama.formats.tokenizers import BYTE_LETTERS, BytePairModel, HuggingFaceModel, SentencePieceModel

SPACE = "\u2581"  # SentencePiece's letter for a space
# Numbers of fields and values in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # of a ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # of a piece
NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5  # types of a piece
MODEL_TYPE, SPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35  # of the trainer
BPE = 2  # a model type
CHARACTER_MAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPED_SPACES = 2, 3, 4, 5  # of the normalizer; all flags default to true
ALL = 1 << 30  # more spaces than in any text
Token = TypeVar("Token", str, bytes)


def write_huggingface_tokenizer(tokenizer: Any, folder: str | PathLike[str]) -> None:
    """Writes the tokenizer for transformers.AutoTokenizer.from_pretrained(folder), each file atomically.

    The files are tokenizer.json, tokenizer_config.json, and for SentencePiece tokenizer.model. bos is added to a text
    if this tokenizer adds it. A tokenizer.json that was read is copied. Raises ValueError for a tokenizer that these
    files cannot describe.

    Hugging Face's libraries behave differently in three cases: encode finds special tokens in a text, and decode gives
    one U+FFFD for each byte of invalid UTF-8, and nothing for SentencePiece's unknown piece.
    """
    model, folder = tokenizer.model, Path(folder)
    names = {i: name for name, i in tokenizer.special_ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
    }
    written: dict[str, bytes] = {}
    if isinstance(model, HuggingFaceModel):
        beside = [tokenizer.path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        written = {path.name: path.read_bytes() for path in beside if path.is_file()}
        written["tokenizer.json"] = tokenizer.path.read_bytes()
    else:
        if isinstance(model, SentencePieceModel):
            written["tokenizer.model"] = proto = tokenizer.path.read_bytes()
            parts = sentencepiece_parts(tokenizer.path, proto)
            config["unk_token"] = model.processor.id_to_piece(model.processor.unk_id())
        else:
            parts = byte_pair_parts(model)
        written["tokenizer.json"] = _json_bytes(_tokenizer_json(tokenizer, names, parts))
    written.setdefault("tokenizer_config.json", _json_bytes(config))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        with atomic_file(folder / name, "wb") as file:
            file.write(content)


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _tokenizer_json(tokenizer: Any, names: dict[int, str], parts: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json. parts: the entries that differ by kind: normalizer, pre_tokenizer, decoder, model."""
    bos = names[tokenizer.bos_id]

    def marked(text: str, number: int) -> list[dict[str, Any]]:
        begin = [{"SpecialToken": {"id": bos, "type_id": number}}] if tokenizer.adds_bos else []
        return [*begin, {"Sequence": {"id": text, "type_id": number}}]

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **plain} for i, name in sorted(names.items())],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": marked("A", 0),
            "pair": marked("A", 0) + marked("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        **parts,
    }


def _sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": vocab, "merges": merges, **options}


def _merges(preference: dict[Token, float]) -> list[list[Token]]:
    """All pairs of tokens that form a third token, in the order of BPE's merges.

    BPE by preference merges the neighbours that form the most preferred token, the leftmost if there are several. BPE
    by merges uses the first pair of the list. To agree where preferences tie (Llama 2's runs of spaces), longer tokens
    come first, then longer left parts: leftmost merging extends the longest token.
    """
    ordered = sorted(preference, key=lambda token: (-preference[token], -len(token)))
    splits = ((token[:at], token[at:]) for token in ordered for at in range(len(token) - 1, 0, -1))
    return [[left, right] for left, right in splits if left in preference and right in preference]


def byte_pair_parts(model: BytePairModel) -> dict[str, Any]:
    """The parts of a tokenizer.json that tokenizes as tiktoken does with the ranks."""
    letters = {token: "".join(BYTE_LETTERS[byte] for byte in token) for token in model.ranks}
    merges = [[letters[left], letters[right]] for left, right in _merges({t: -rank for t, rank in model.ranks.items()})]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": model.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": _sequence("pretokenizers", split, byte_level),
        "decoder": byte_level,
        # ignore_merges: tiktoken looks up a whole piece before it merges anything.
        "model": _bpe({letters[token]: rank for token, rank in model.ranks.items()}, merges, ignore_merges=True),
    }


def sentencepiece_parts(path: Path, proto: bytes) -> dict[str, Any]:
    """The parts of a tokenizer.json that tokenizes as a SentencePiece proto does. Raises ValueError if none does."""
    messages = list(_fields(proto))
    pieces = [dict(_fields(value)) for number, value in messages if number == PIECES]
    trainer, normalizer, denormalizer = (
        {k: v for number, value in messages if number == part for k, v in _fields(value)}
        for part in (TRAINER, NORMALIZER, DENORMALIZER)
    )
    texts = [piece[PIECE].decode() for piece in pieces]
    types = [piece.get(TYPE, NORMAL) for piece in pieces]
    # Scores of ordinary pieces only: merges never result in special pieces or those for bytes.
    scores = {
        text: struct.unpack("<f", piece.get(SCORE, b"\0\0\0\0"))[0]
        for text, piece, kind in zip(texts, pieces, types, strict=True)
        if kind == NORMAL
    }
    odd = sorted({letter for text in scores for letter in text} - scores.keys())
    reasons = {
        "it is not a BPE model": trainer.get(MODEL_TYPE) != BPE,
        "it has no pieces for bytes": not trainer.get(BYTE_FALLBACK),
        "it normalizes characters": normalizer.get(CHARACTER_MAP) or denormalizer.get(CHARACTER_MAP),
        "it puts spaces after words": trainer.get(SPACE_AS_SUFFIX),
        "it does not escape spaces": not normalizer.get(ESCAPED_SPACES, True),
        "it has user-defined pieces": USER_DEFINED in types,
        "it has unused pieces": UNUSED in types,
        f"it has no piece for {''.join(odd[:1])!r}, but longer pieces with it": odd,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{path} cannot be written for other programs: {reason}, which their files do not support")
    strips, prefixes = space_flags(proto)
    steps, decoders = [], [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if strips:
        patterns = {r"\A +": "", " {2,}": " ", f"[ {SPACE}]+\\z": ""}
        steps += [_replace({"Regex": pattern}, content) for pattern, content in patterns.items()]
    if prefixes:
        steps.append({"type": "Prepend", "prepend": SPACE})
    if strips or prefixes:  # strips: a text begins with no space, so all are removed; else one, the prefix
        decoders.append({"type": "Strip", "content": " ", "start": ALL if strips else 1, "stop": 0})
    vocab = {text: i for i, text in enumerate(texts)}
    options = {"unk_token": texts[types.index(UNKNOWN)], "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": _sequence("normalizers", *steps, _replace({"String": " "}, SPACE)),
        "pre_tokenizer": None,
        "decoder": _sequence("decoders", *decoders),
        "model": _bpe(vocab, _merges(scores), **options),
    }


def space_flags(proto: bytes) -> tuple[bool, bool]:
    """Whether a SentencePiece proto strips extra spaces, and whether it puts a space before a text."""
    normalizer = {k: v for number, value in _fields(proto) if number == NORMALIZER for k, v in _fields(value)}
    return bool(normalizer.get(EXTRA_SPACES, True)), bool(normalizer.get(DUMMY_PREFIX, True))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value (integer or bytes) of each protobuf field: protobuf.dev/programming-guides/encoding"""
    stream = io.BytesIO(message)

    def integer() -> int:
        byte = stream.read(1)[0]
        return byte if byte < 0x80 else (byte & 0x7F) | integer() << 7

    while stream.tell() < len(message):
        number, wire = divmod(integer(), 8)
        if wire == 0:
            yield number, integer()
        else:
            yield number, stream.read(integer() if wire == 2 else {1: 8, 5: 4}[wire])
