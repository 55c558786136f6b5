"""tokenizer.py: every kind is known by its content, gives text back, agrees with an independent implementation, and
refuses in words what is damaged or no text.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import shutil
import sys

import pytest

from conftest import ROOT
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from minillama.formats.tokenizers import LLAMA3_PATTERN
from tokenizer import Tokenizer

KINDS = ("sentencepiece", "llama3", "gpt2", "huggingface")
LOOKS_SPECIAL = "<s></s><|begin_of_text|><|end_of_text|><|eot_id|><|start_header_id|><|endoftext|>"
EDGES = [
    "",
    " ",
    "   ",
    "  a",
    "a  ",
    "a  b   c",
    "\n",
    "\n\n\tx\ty",
    "\0",
    "a\0b",
    "\x01\x1b\x7f\x85\u2028\ufeff",
    "1234567",
]
EDGES += [
    "zwölf e\u0301 \ufb01",
    "映画 кино سينما",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "it's I'LL 'S",
    LOOKS_SPECIAL,
]


@pytest.fixture(scope="module")
def tokenizers(asset, tmp_path_factory):
    """A tokenizer of a kind, opened once."""
    opened = {}

    def of(kind):
        if kind not in opened:
            if kind == "huggingface":
                path = tmp_path_factory.mktemp("huggingface")
                write_huggingface_tokenizer(Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model"), path)
                path = path / "tokenizer.json"
            else:
                names = {"llama3": "tokenizers/llama3_tokenizer.model", "gpt2": "tokenizers/gpt2_encoder.json"}
                path = asset(names.get(kind, "course/tokenizer.model"))
            opened[kind] = Tokenizer(tokenizer_model=path)
        return opened[kind]

    return of


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers(request.param)


@pytest.fixture(scope="module")
def lines(asset):
    """Three thousand lines of reviews, stories and novels."""
    names = ("course/data/sst-dev.txt", "corpora/tinystories.txt", "corpora/prose/prose_03.txt")
    texts = [asset(name).read_text(encoding="utf-8")[:400_000].split("\n") for name in names]
    return [line for text in texts for line in text[:1000]]


# Ids


def test_llama_2_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("sentencepiece")
    assert tokenizer.encode("Hello World!", bos=False, eos=False) == [15043, 2787, 29991]
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("sentencepiece", 32000, (2, 1))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_llama_3_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("llama3")
    text = "the answer to the ultimate question of life, the universe, and everything is "
    ids = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220]
    assert tokenizer.encode(text, bos=True, eos=False) == ids
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("llama3", 128256, (128001, 128009, 128000))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128000, 128001)
    special = [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    ]
    assert [tokenizer.special_ids[name] for name in special] == [128006, 128007, 128009, 128010, 128255]
    assert len(tokenizer.special_ids) == 256


def test_gpt_2_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("gpt2")
    assert tokenizer.encode("Hello world", bos=True, eos=True) == [50256, 15496, 995, 50256]
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("gpt2", 50257, (50256,))


def test_padding_is_the_byte_0(tokenizer):
    ids = tokenizer.encode("a\0", bos=False, eos=False)
    assert ids[-1] == tokenizer.pad_id


def test_without_bytes_padding_is_what_is_no_text(tmp_path):
    json_file = word_level(tmp_path)
    assert Tokenizer(tokenizer_model=json_file).pad_id == Tokenizer(tokenizer_model=json_file).eos_id


def test_gpt_2_equals_the_tokenizers_library(asset, tokenizers, lines):
    from tokenizers import ByteLevelBPETokenizer

    files = [str(asset(f"tokenizers/{name}")) for name in ("gpt2_encoder.json", "gpt2_vocab.bpe")]
    independent = ByteLevelBPETokenizer.from_file(*files)
    texts = [*lines, *EDGES[:-1], *(" " * n for n in range(40))]
    assert tokenizers("gpt2").encode_many(texts) == [done.ids for done in independent.encode_batch(texts)]


@pytest.fixture(scope="module")
def llama3_elsewhere(asset):
    """Llama 3's ranks in the tokenizers library: all pairs that make a token, by its rank."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    rows = [row.split() for row in asset("tokenizers/llama3_tokenizer.model").read_bytes().splitlines()]
    vocab = {"".join(letters[b] for b in base64.b64decode(token)): int(rank) for token, rank in rows}
    pairs = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    pairs.sort(key=lambda pair: vocab["".join(pair)])
    independent = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    independent.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    independent.decoder = decoders.ByteLevel()
    return independent


@pytest.mark.slow
def test_llama_3_equals_the_tokenizers_library(llama3_elsewhere, tokenizers, lines):
    texts = [*lines, *EDGES, *(" " * n for n in range(40))]
    assert tokenizers("llama3").encode_many(texts) == [done.ids for done in llama3_elsewhere.encode_batch(texts)]


# Text and back


def test_real_text_comes_back(tokenizer, lines):
    many = tokenizer.encode_many(lines)
    assert [tokenizer.decode(ids) for ids in many] == lines
    assert many[::100] == [tokenizer.encode(line, bos=False, eos=False) for line in lines[::100]]


@pytest.mark.parametrize("text", EDGES)
def test_every_text_has_ids_that_give_it_back(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not set(ids[1:-1]) & set(tokenizer.special_ids.values())  # also of text that reads like them


def test_max_len_cuts_before_the_marks_are_added(tokenizer):
    short = Tokenizer(max_len=2, tokenizer_model=tokenizer.path)
    whole = tokenizer.encode("a good film", bos=False, eos=False)
    assert short.encode("a good film", bos=True, eos=True) == [tokenizer.bos_id, *whole[:2], tokenizer.eos_id]
    assert short.encode_many(["a good film"]) == [whole]


def test_parts_of_characters_are_decoded_to_something(tokenizer):
    smile = tokenizer.encode("\U0001f600", bos=False, eos=False)
    for ids in ([tokenizer.pad_id], smile[:-1], smile[-1:], smile[::-1], [tokenizer.eos_id], []):
        assert isinstance(tokenizer.decode(ids), str)
    assert "\ufffd" in tokenizer.decode(smile[-1:])


@pytest.mark.parametrize("outside", [-1, 1 << 20])
def test_ids_that_are_not_there_are_refused(tokenizer, outside):
    with pytest.raises(ValueError, match=f"has ids from 0 to {tokenizer.n_words - 1}, not {outside}"):
        tokenizer.decode([5, outside])


@pytest.mark.parametrize("text", ["a good \ud800 film", b"caf\xe9".decode("utf-8", "surrogateescape"), "\udfff"])
def test_half_a_character_is_no_text(tokenizer, text):
    for encode in (lambda: tokenizer.encode(text, bos=True, eos=True), lambda: tokenizer.encode_many([text])):
        with pytest.raises(ValueError, match=r"\\ud.*is no UTF-8 text.*save or type it as UTF-8") as raised:
            encode()
        assert str(raised.value).isprintable()


def test_what_is_no_string_is_refused(tokenizer):
    with pytest.raises(TypeError, match="takes a string, not bytes"):
        tokenizer.encode(b"film", bos=False, eos=False)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_runs_that_the_regex_could_not_hold_are_cut(tokenizers, kind):
    tokenizer = tokenizers(kind)
    text = " " * 1_000_000 + "a" + "\n" * 30_000 + "b" * 30_000
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text
    beginning = tokenizer.encode(" " * 25_000, bos=False, eos=False)
    assert ids[: 2 * len(beginning)] == 2 * beginning


# Files


def word_level(folder, **changes):
    """A tokenizer.json of two words and two marks, that are among its words, not its added tokens."""
    content = {
        "version": "1.0",
        "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "a"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<go>": 2, "<halt>": 3}, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    marks = {"bos_token": {"content": "<go>", "lstrip": False}, "eos_token": "<halt>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks), encoding="utf-8")
    return folder / "tokenizer.json"


def llama3_text(count=128_000):
    """As many ranks as Llama 3 has, of one, two and three bytes."""
    tokens = itertools.chain.from_iterable(itertools.product(range(256), repeat=size) for size in (1, 2, 3))
    rows = (b"%s %d\n" % (base64.b64encode(bytes(t)), n) for n, t in enumerate(itertools.islice(tokens, count)))
    return b"".join(rows)


def gpt2_json(**changes):
    """GPT-2's first 257 tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return (
        {letter: n for n, letter in enumerate(bytes_to_unicode().values())}
        | {"\u0120t": 256, "<|endoftext|>": 257}
        | changes
    )


def test_content_tells_the_kind_whatever_the_name(tokenizer, tmp_path):
    path = shutil.copy(tokenizer.path, tmp_path / "vocab.png")
    again = Tokenizer(tokenizer_model=path)
    assert (again.kind, again.n_words, again.path) == (tokenizer.kind, tokenizer.n_words, path)
    assert again.encode(EDGES[-1], bos=True, eos=True) == tokenizer.encode(EDGES[-1], bos=True, eos=True)


def test_either_file_of_gpt_2_and_their_folder_do(asset, tokenizers):
    encoder, merges = (asset(f"tokenizers/{name}") for name in ("gpt2_encoder.json", "gpt2_vocab.bpe"))
    for path in (merges, encoder.parent):
        other = Tokenizer(tokenizer_model=path)
        assert (other.kind, other.model.ranks) == ("gpt2", tokenizers("gpt2").model.ranks)
        assert other.path.is_file()


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_two_files_of_gpt_2_have_to_agree(tmp_path, names):
    encoder, merges = (tmp_path / name for name in names)
    encoder.write_text(json.dumps(gpt2_json()), encoding="utf-8")
    merges.write_text("#version: 0.2\n\u0120 t\n", encoding="utf-8")
    for path in (encoder, merges, tmp_path):
        assert Tokenizer(tokenizer_model=path).encode(" t", bos=False, eos=True) == [256, 257]
    merges.write_text("#version: 0.2\n\u0120 t\nh e\n", encoding="utf-8")
    for path in (encoder, merges, tmp_path):
        with pytest.raises(ValueError, match=f"{names[0]} and .*{names[1]} are not of one tokenizer"):
            Tokenizer(tokenizer_model=path)


def test_a_folder_is_searched_for_a_proto_then_json(tokenizers, tmp_path):
    with pytest.raises(
        ValueError, match="folder without a tokenizer: no tokenizer.model, tokenizer.json, encoder.json"
    ):
        Tokenizer(tokenizer_model=tmp_path)
    shutil.copy(tokenizers("huggingface").path, tmp_path / "tokenizer.json")
    assert Tokenizer(tokenizer_model=tmp_path).kind == "huggingface"
    shutil.copy(ROOT / "data/mini-llama.model", tmp_path / "tokenizer.model")
    assert Tokenizer(tokenizer_model=tmp_path).kind == "sentencepiece"


def test_marks_are_as_the_file_beside_names_them(tmp_path):
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (2, 3, 4)
    assert tokenizer.encode("b a b", bos=True, eos=True) == [2, 1, 0, 1, 3]  # neither cut nor padded
    assert tokenizer.decode([2, 1, 0, 3]) == "b a"
    with pytest.raises(ValueError, match="has no chat format"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_marks_are_else_known_by_name(tmp_path):
    path = word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names no eos; put a tokenizer_config.json with"):
        Tokenizer(tokenizer_model=path)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [{"id": 4 + n, "content": name, **plain} for n, name in enumerate(("<pad>", "</s>", "<s>"))]
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, added_tokens=tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(tokenizer_model=path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (6, 5, 7)


DAMAGED = {
    "nothing": b"",
    "random bytes": bytes(range(200, 256)),
    "pickle": pickle.dumps({"run": os.system}),
    "half a proto": lambda: (ROOT / "data/mini-llama.model").read_bytes()[:-5000],
    "proto of other bytes": lambda: (
        (ROOT / "data/mini-llama.model").read_bytes().replace(b"\x01e\x15", b"\x01\xff\x15")
    ),
    "half a JSON": json.dumps(gpt2_json()).encode()[:-1],
    "deep JSON": b'{"a":' * 100_000,
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "JSON of something else": b'{"label": {"positive": 1}}',
    "JSON that is not UTF-8": b'{"caf\xe9": 1}',
    "JSON without a model": b'{"model": {"type": "BPE"}}',
    "JSON with a bad regex": json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        | {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}
    ).encode(),
    "a token too few": json.dumps(gpt2_json(x=0)).encode(),
    "a truth for an id": json.dumps(gpt2_json(**{'"': True})).encode(),
    "no end of text": json.dumps({k: v for k, v in gpt2_json().items() if v < 257}).encode(),
    "a letter for no byte": json.dumps(gpt2_json(映=257) | {"<|endoftext|>": 258}).encode(),
    "a merge of three": "#version: 0.2\n\u0120 t h\n".encode(),
    "a merge of what is not there": b"#version: 0.2\nth e\n",
    "a merge given twice": b"#version: 0.2\nt h\nt h\n",
    "ranks cut short": lambda: llama3_text()[:-20_000],
    "ranks of another tokenizer": lambda: llama3_text(100_256),
    "wrong base64": lambda: llama3_text().replace(b"\nAgA= ", b"\nAgA*= "),
    "no number": lambda: llama3_text().replace(b" 300\n", b" 3O0\n"),
    "a rank twice": lambda: llama3_text().replace(b" 300\n", b" 301\n"),
    "a token twice": lambda: b"AgA= 127999\n" + llama3_text(127_999),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_told_in_one_line(tmp_path, capfd, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(ValueError, match="is damaged|is no|but no|but Llama 3's") as raised:
        Tokenizer(tokenizer_model=path)
    message = str(raised.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 300
    assert capfd.readouterr().err == ""


def test_ranks_that_are_whole_are_read(tmp_path):
    (tmp_path / "ranks").write_bytes(llama3_text().replace(b"\n", b"\r\n"))
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "ranks")
    assert tokenizer.encode("\x02\0", bos=True, eos=False) == [128000, 256 + 2 * 256]
    assert (tokenizer.pad_id, tokenizer.n_words) == (0, 128256)


def test_a_damaged_file_beside_is_named(tmp_path):
    path = word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds .*must be a JSON object"):
        Tokenizer(tokenizer_model=path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match="8,589,934,592 bytes, no tokenizer more than .*checkpoint"):
        Tokenizer(tokenizer_model=tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "package"), [("gpt2", "tiktoken"), ("llama3", "tiktoken"), ("huggingface", "tokenizers")]
)
def test_a_package_that_is_not_there_is_named(tokenizers, monkeypatch, kind, package):
    path = tokenizers(kind).path
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"another package: pip install {package}$"):
        Tokenizer(tokenizer_model=path)


def test_a_word_without_ids_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "<go>": 1, "<halt>": 2}, "unk_token": "<unk>"}
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, model=model))
    with pytest.raises(ValueError, match="no ids for a text: .*unk|UNK"):
        tokenizer.encode("never seen", bos=False, eos=False)


# Chat

CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "  Was it good?  "},
    {"role": "assistant", "content": " Yes: \U0001f600\n"},
    {"role": "user", "content": "Why? <|eot_id|></s><s>"},
]
CHATS = [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2], [*CHAT, CHAT[2], CHAT[1]]]
# As the two formats are described at llama.com/docs. transformers takes what reads like a special token for one, which
# encode_chat does not: the comparison leaves it out.
LLAMA2_TEMPLATE = """{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- for message in (messages if system is none else messages[1:]) -%}
{%- set text = message.content if system is none or not loop.first else
 '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content -%}
{{- bos_token + '[INST] ' + text | trim + ' [/INST]' if message.role == 'user' else
 ' ' + text | trim + ' ' + eos_token -}}
{%- endfor -%}"""
LLAMA3_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"""


def without_marks(chat):
    return [message | {"content": message["content"].replace("<|eot_id|></s><s>", "")} for message in chat]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [without_marks(chat) for chat in CHATS])
def test_llama_2_chat_equals_the_template_of_transformers(tokenizers, llama2_elsewhere, chat):
    ids = llama2_elsewhere.apply_chat_template(chat, chat_template=LLAMA2_TEMPLATE, return_dict=False)
    assert tokenizers("sentencepiece").encode_chat(chat) == ids


@pytest.fixture(scope="module")
def llama2_elsewhere(tokenizers, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("llama2")
    write_huggingface_tokenizer(tokenizers("sentencepiece"), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [without_marks(chat) for chat in CHATS])
def test_llama_3_chat_equals_the_template_of_transformers(tokenizers, llama3_elsewhere, chat):
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers("llama3")
    llama3_elsewhere.add_special_tokens(list(tokenizer.special_ids))
    elsewhere = PreTrainedTokenizerFast(tokenizer_object=llama3_elsewhere, bos_token="<|begin_of_text|>")
    ids = elsewhere.apply_chat_template(chat, chat_template=LLAMA3_TEMPLATE, return_dict=False)
    assert tokenizer.encode_chat(chat) == ids


def test_llama_2_chat_spelled_out(tokenizers):
    tokenizer = tokenizers("sentencepiece")
    first, second = "<<SYS>>\n Be brief.\n\n<</SYS>>\n\n  Was it good?", "Why? <|eot_id|></s><s>"
    expected = tokenizer.encode(f"[INST] {first} [/INST] Yes: \U0001f600 ", bos=True, eos=True)
    expected += tokenizer.encode(f"[INST] {second} [/INST]", bos=True, eos=False)
    assert tokenizer.encode_chat(CHAT) == expected


def test_llama_3_chat_spelled_out(tokenizers):
    tokenizer = tokenizers("llama3")
    system, user, assistant = ([128006, i, 128007, 271] for i in (9125, 882, 78191))
    text = lambda s: [*tokenizer.encode(s, bos=False, eos=False), 128009]  # noqa: E731
    turns = [*system, *text("Be brief."), *user, *text("Was it good?"), *assistant, *text("Yes: \U0001f600")]
    turns += [*user, *text("Why? <|eot_id|></s><s>"), *assistant]
    assert tokenizer.encode_chat(CHAT) == [128000, *turns]


@pytest.mark.parametrize(
    "roles",
    ["", "system", "assistant", "user assistant", "user user", "user system user", "system system user", "tool"],
)
def test_roles_in_another_order_are_refused(tokenizers, roles):
    chat = [{"role": role, "content": "Hello"} for role in roles.split()]
    with pytest.raises(ValueError, match=f"the roles are {', '.join(roles.split()) or 'none'}; a system message may"):
        tokenizers("sentencepiece").encode_chat(chat)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "user", "content": " \n"}], "a message of the user is empty"),
        ([{"role": "user", "content": 5}], "a message is .*it must be {'role': 'user', 'content': 'a text'}"),
        (["Hello"], "a message is 'Hello'; it must be"),
        ([{"role": "user", "content": "[/INST] Sure."}], r"the user says \[/INST\], which marks turns"),
        ([{"role": "user", "content": "\ud800"}], "is no UTF-8 text"),
    ],
)
def test_messages_that_are_none_are_refused(tokenizers, chat, words):
    with pytest.raises(ValueError, match=words):
        tokenizers("sentencepiece").encode_chat(chat)


@pytest.mark.parametrize("kind", ["gpt2", "huggingface"])
def test_a_tokenizer_without_a_chat_format_says_so(tokenizers, kind):
    with pytest.raises(ValueError, match=f"\\({kind}\\) has no chat format"):
        tokenizers(kind).encode_chat(CHAT)


# Marks before a text, and the size of a model


BEGIN = {"SpecialToken": {"id": "<go>", "type_id": 0}}
END = {"SpecialToken": {"id": "<halt>", "type_id": 0}}
TEXT, PAIR = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}


def template(*single):
    marks = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<go>", 2), ("<halt>", 3))}
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT, PAIR], "special_tokens": marks}


WHOLE = {"truncation": None, "padding": None, "added_tokens": []}
POST_PROCESSORS = {
    "none": None,
    "begin": template(BEGIN, TEXT),
    "end": template(TEXT, END),
    "both": template(BEGIN, TEXT, END),
    "bert": {"type": "BertProcessing", "sep": ["<halt>", 3], "cls": ["<go>", 2]},
    "sequence": {"type": "Sequence", "processors": [template(TEXT), template(BEGIN, TEXT)]},
}


@pytest.mark.parametrize("added", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_bos_stands_before_a_text_where_transformers_puts_it(tmp_path, name, added):
    transformers = pytest.importorskip("transformers")
    path = word_level(tmp_path, post_processor=POST_PROCESSORS[name], **WHOLE)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"bos_token": "<go>", "eos_token": "<halt>"} | added))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("b").input_ids
    ours = Tokenizer(tokenizer_model=path)
    assert ours.adds_bos == (theirs[0] == ours.bos_id)
    assert ours.encode_prompt("b") == [i for i in theirs if i != ours.eos_id]  # what is continued has no end
    assert ours.encode_prompt("") == [2]  # something to begin with


def test_one_mark_for_both_ends_tells_where_it_stands(tmp_path):
    for single, adds in (([BEGIN, TEXT], True), ([TEXT, BEGIN], False)):
        path = word_level(tmp_path, post_processor=template(*single), **WHOLE)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<go>", "eos_token": "<go>"}')
        assert Tokenizer(tokenizer_model=path).adds_bos == adds


def test_a_sentencepiece_model_has_its_bos_as_the_files_beside_it_say(small_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_tokenizer.read_bytes())
    assert Tokenizer(tokenizer_model=path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer(tokenizer_model=path).adds_bos
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=small_tokenizer), tmp_path)
    assert Tokenizer(tokenizer_model=path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer(tokenizer_model=path).adds_bos  # with tokenizer.json there, it alone is asked
    renamed = (tmp_path / "tokenizer.json").read_text().replace('"<s>"', '"[BEGIN]"')
    (tmp_path / "tokenizer.json").write_text(renamed)  # another name for the same id
    assert Tokenizer(tokenizer_model=path).adds_bos
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = Tokenizer(tokenizer_model=path)
    assert not again.adds_bos
    write_huggingface_tokenizer(again, tmp_path / "out")
    assert not Tokenizer(tokenizer_model=tmp_path / "out" / "tokenizer.json").adds_bos


@pytest.mark.parametrize("text", ["Once upon", "a", "é", " b", "\n", "\U0001f600 x"])
def test_the_first_token_covers_the_bytes_of_its_text(tokenizer, text):
    size, ids = tokenizer.bytes_of_first(text), tokenizer.encode(text, bos=False, eos=False)
    first = tokenizer.decode(ids[:1])
    assert size == len(text.encode()) if len(ids) == 1 else 0 <= size < len(text.encode())
    if "\ufffd" not in first:
        assert size == len(first.encode()) and text.startswith(first)
    elif text == "é":
        assert size == 1  # half of it


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_the_model_lacks_is_kept_out_of_text(tmp_path, special):
    added = {"id": 4, "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path = word_level(tmp_path, added_tokens=[added | {"special": special}], truncation=None, padding=None)
    tokenizer = Tokenizer(tokenizer_model=path)
    assert tokenizer.n_words == 5
    tokenizer.fit_to_model(4, stop_ids=[1])
    assert 4 not in tokenizer.encode("b <pad> a<pad>", bos=False, eos=False) and "<pad>" not in tokenizer.special_ids
    assert tokenizer.stop_ids == (3, 2, 1) and tokenizer.unused_ids == ()
    with pytest.raises(ValueError, match="gives ids that a model with a vocabulary of 3 does not have"):
        tokenizer.fit_to_model(3)


def test_ids_without_a_piece_are_unused_unless_a_text_ends_with_them(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<go>": 2, "<halt>": 3, "c": 6}, "unk_token": "a"}
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, model=model))
    tokenizer.fit_to_model(10, stop_ids=(9,))
    assert tokenizer.unused_ids == (4, 5, 7, 8)
    assert tokenizer.decode([1, 9]) == "b"
    with pytest.raises(ValueError, match="has ids from 0 to 6, not 8"):
        tokenizer.decode([1, 8])
