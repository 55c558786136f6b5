"""A tokenizer as Hugging Face's libraries read it: tokenizer.json and what stands beside it, made without them.

Sources of the formats: sentencepiece_model.proto (github.com/google/sentencepiece), the documentation of the tokenizers
library (huggingface.co/docs/tokenizers) for the parts that a tokenizer.json names, Llama 3's own tokenizer.json for
which of them make up a tokenizer by ranks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from minillama.formats.files import atomic_file
from minillama.formats.tokenizers import BYTE_LETTERS, BytePairModel, HuggingFaceModel, SentencePieceModel

SPACE = "\u2581"  # what SentencePiece writes for a space
# Numbers of fields and values in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # of a ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # of a piece
NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5  # types of a piece
MODEL_TYPE, SPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35  # of the trainer
BPE = 2  # of the model types
CHARACTER_MAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPED_SPACES = 2, 3, 4, 5  # of the normalizer; all flags default to true
ALL = 1 << 30  # more spaces than there can be
Token = TypeVar("Token", str, bytes)


def write_huggingface_tokenizer(tokenizer: Any, folder: str | PathLike[str]) -> None:
    """Writes what transformers.AutoTokenizer.from_pretrained(folder) makes the same tokenizer of: tokenizer.json,
    tokenizer_config.json, and for SentencePiece tokenizer.model. It puts bos before a text if the tokenizer
    does, and no eos behind it.

    Hugging Face's way differs: its encode takes special tokens out of a text; its decode makes U+FFFD of each byte of a
    run that is not UTF-8 all through, and nothing of SentencePiece's unknown piece. A tokenizer.json that was read is
    copied as it is. Each file is written atomically. Raises ValueError if the tokenizer does what cannot be said there.
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
    """All of a tokenizer.json, from the parts in which the kinds differ: normalizer, pre_tokenizer, decoder, model."""
    bos = names[tokenizer.bos_id]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [begin] * tokenizer.adds_bos + [{"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}] * tokenizer.adds_bos
    second += [{"Sequence": {"id": "B", "type_id": 1}}]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **plain} for i, name in sorted(names.items())],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        **parts,
    }


def _sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": vocab, "merges": merges, **options}


def _merges(preference: dict[Token, float]) -> list[list[Token]]:
    """Every two tokens that make up a third, the preferred one first, as BPE by merges takes them.

    BPE by preference merges, of all neighbours that make up a token, those that make up the preferred one, the
    leftmost if there are several; by merges it is the first of the list. Where several would do, leftmost means that
    what has grown grows on: so the longer token comes first, and that made from the longer left part (Llama 2 prefers
    all runs of spaces alike).
    """
    ordered = sorted(preference, key=lambda token: (-preference[token], -len(token)))
    splits = ((token[:at], token[at:]) for token in ordered for at in range(len(token) - 1, 0, -1))
    return [[left, right] for left, right in splits if left in preference and right in preference]


def byte_pair_parts(model: BytePairModel) -> dict[str, Any]:
    """The parts of a tokenizer.json that do what tiktoken does with the ranks."""
    letters = {token: "".join(BYTE_LETTERS[byte] for byte in token) for token in model.ranks}
    merges = [[letters[left], letters[right]] for left, right in _merges({t: -rank for t, rank in model.ranks.items()})]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": model.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": _sequence("pretokenizers", split, byte_level),
        "decoder": byte_level,
        # tiktoken looks a whole piece up before it merges anything.
        "model": _bpe({letters[token]: rank for token, rank in model.ranks.items()}, merges, ignore_merges=True),
    }


# SentencePiece


def sentencepiece_parts(path: Path, proto: bytes) -> dict[str, Any]:
    """The parts that do what a SentencePiece proto says. Raises ValueError for what they cannot do."""
    messages = list(_fields(proto))
    pieces = [dict(_fields(value)) for number, value in messages if number == PIECES]
    trainer, normalizer, denormalizer = (
        {k: v for number, value in messages if number == part for k, v in _fields(value)}
        for part in (TRAINER, NORMALIZER, DENORMALIZER)
    )
    texts = [piece[PIECE].decode() for piece in pieces]
    types = [piece.get(TYPE, NORMAL) for piece in pieces]
    # The score of each piece that text is made into: those for bytes, and special ones, are never merged to.
    scores = {
        text: struct.unpack("<f", piece.get(SCORE, b"\0\0\0\0"))[0]
        for text, piece, kind in zip(texts, pieces, types, strict=True)
        if kind == NORMAL
    }
    odd = sorted({letter for text in scores for letter in text} - scores.keys())
    reasons = {
        "it is no BPE model": trainer.get(MODEL_TYPE) != BPE,
        "it has no pieces for bytes": not trainer.get(BYTE_FALLBACK),
        "it normalizes characters": normalizer.get(CHARACTER_MAP) or denormalizer.get(CHARACTER_MAP),
        "it puts spaces behind words": trainer.get(SPACE_AS_SUFFIX),
        "it leaves spaces as they are": not normalizer.get(ESCAPED_SPACES, True),
        "it has pieces of the user's own": USER_DEFINED in types,
        "it has pieces out of use": UNUSED in types,
        f"it has no piece for {''.join(odd[:1])!r}, but for what holds it": odd,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{path} cannot be written for other programs: {reason}, which their files cannot say")
    strips, prefixes = space_flags(proto)
    steps = [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")] if strips else []
    steps += [_replace({"Regex": f"[ {SPACE}]+\\z"}, "")] if strips else []
    steps += [{"type": "Prepend", "prepend": SPACE}] if prefixes else []
    # Text whose spaces are stripped has none at its beginning; else one is the prefix.
    unstrip = (
        [{"type": "Strip", "content": " ", "start": ALL if strips else 1, "stop": 0}] if strips or prefixes else []
    )
    return {
        "normalizer": _sequence("normalizers", *steps, _replace({"String": " "}, SPACE)),
        "pre_tokenizer": None,
        "decoder": _sequence(
            "decoders", _replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *unstrip
        ),
        "model": _bpe(
            {text: i for i, text in enumerate(texts)},
            _merges(scores),
            unk_token=texts[types.index(UNKNOWN)],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def space_flags(proto: bytes) -> tuple[bool, bool]:
    """Whether a SentencePiece proto strips spaces that are too many, and whether it puts one before a text."""
    normalizer = {k: v for number, value in _fields(proto) if number == NORMALIZER for k, v in _fields(value)}
    return bool(normalizer.get(EXTRA_SPACES, True)), bool(normalizer.get(DUMMY_PREFIX, True))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message, in order: an integer, or bytes where it is something else
    (protobuf.dev/programming-guides/encoding).
    """
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(integer(), 8)
        if wire == 0:
            yield number, integer()
            continue
        size = integer() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[at : at + size]
        at += size
