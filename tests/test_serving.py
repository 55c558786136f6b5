"""--option serve: OpenAI's routes, beside what the commands compute; clients that misbehave."""

from __future__ import annotations

import copy
import http.client
import json
import random
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch

from classifier import LlamaEmbeddingClassifier
from llama import load_pretrained
from minillama.commands.serve import MOST_BYTES, Server
from minillama.decoding.fast_llama import fast_model
from minillama.formats.checkpoint import write_checkpoint
from minillama.inference import TextClassifier, complete
from minillama.serving import Engine, Refused
from minillama.training.evaluation import score_documents
from models import tiny_llama
from run_llama import main
from tokenizer import Tokenizer

CPU = torch.device("cpu")
PROMPT = "one day"


@pytest.fixture(scope="module")
def parts(asset, tmp_path_factory):
    """A tokenizer, a model, and an engine of the same weights with a classifier."""
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = Tokenizer(asset("stories260K/tok512.model"))
    model = tiny_llama(norm="rmsnorm", causal=True, vocab_size=512, max_seq_len=64)
    write_checkpoint(folder / "base.pt", model.state_dict(), model.config)
    config = SimpleNamespace(llama=model, num_labels=2, hidden_dropout_prob=0.0, option="finetune")
    judge = LlamaEmbeddingClassifier(config)
    described = {"head": "linear", "label_names": ["bad", "good"], "labels": {"0": "bad", "1": "good"}, "options": {}}
    write_checkpoint(folder / "judge.pt", judge.state_dict(), model.config, kind="classifier", **described)
    classifier = TextClassifier(folder / "judge.pt", tokenizer)
    fast = fast_model(load_pretrained(folder / "base.pt"))
    return tokenizer, load_pretrained(folder / "base.pt"), Engine(fast, tokenizer, CPU, "tiny", classifier)


@pytest.fixture(scope="module")
def server(parts):
    with Server(("127.0.0.1", 0), parts[2], lambda tokens, given: f"<p>{tokens} {given}</p>") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(server):
    """Sends a request; returns the status and the answer, from JSON if it is JSON."""

    def send(path, body=None, method=None, **headers):
        line = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body)
        line.request(method or ("GET" if body is None else "POST"), path, content, headers)
        answer = line.getresponse()
        text = answer.read().decode()
        line.close()
        return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text

    return send


def events(text):
    """The objects of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Answers


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}])
def test_a_completion_is_what_the_command_writes(ask, parts, settings):
    tokenizer, model, _ = parts
    status, answer = ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, **settings})
    (text,) = complete(model, tokenizer, [PROMPT], 12, **({"epsilon": 0.0} | settings))
    assert status == 200 and answer["choices"][0]["text"] == text
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] <= 12
    streamed = events(ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "stream": True, **settings})[1])
    assert "".join(one["choices"][0]["text"] for one in streamed) == text
    finishes = [one["choices"][0]["finish_reason"] for one in streamed]
    assert finishes[:-1] == [None] * (len(streamed) - 1) and finishes[-1] == answer["choices"][0]["finish_reason"]


def test_log_probabilities_are_those_of_perplexity(ask, parts):
    tokenizer, model, _ = parts
    text = "Once upon a time there was a little dog."
    ids = tokenizer.encode_prompt(text)
    request = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 3}
    found = ask("/v1/completions", request)[1]["choices"][0]
    logprobs = found["logprobs"]
    assert found["text"] == tokenizer.decode(ids) and logprobs["token_ids"] == ids
    nats, count = score_documents(model, [ids], 64, 32, torch.float32, device=CPU)
    assert sum(logprobs["token_logprobs"][1:]) == pytest.approx(-nats, abs=1e-5) and count == len(ids) - 1
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for text, start in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert found["text"][start : start + len(text)] == text or start == 0  # the first space is not decoded
    for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert own in top.values() and max(top.values()) >= own and 3 <= len(top) <= 4


def test_offsets_stay_within_the_text(ask):
    request = {"prompt": "a 😀 é 日本 b", "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
    choice = ask("/v1/completions", request)[1]["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
    assert choice["text"][offsets[-4]] == " " and choice["text"][offsets[-4] + 1] == "b"
    streamed = events(ask("/v1/completions", request | {"stream": True})[1])
    assert [one for event in streamed for one in event["choices"][0]["logprobs"]["text_offset"]] == offsets


def test_a_model_that_gives_nan_is_an_error_and_no_silence(parts):
    tokenizer, model, _ = parts
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    engine = Engine(model, tokenizer, CPU, "broken", None)
    with Server(("::1" if socket.has_ipv6 else "127.0.0.1", 0), engine, lambda tokens, given: "") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for more in ({}, {"stream": True}, {"echo": True, "logprobs": 1}):
            line = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
            line.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT} | more))
            answer = line.getresponse()
            text = answer.read().decode().strip().removeprefix("data: ")
            assert "NaN or infinity" in json.loads(text)["error"]["message"]
            assert answer.status == (200 if "stream" in more else 500)
        server.shutdown()


def test_a_model_that_sees_later_tokens_is_not_scored(parts):
    model = tiny_llama(norm="rmsnorm", causal=False, vocab_size=512, max_seq_len=64)
    engine = Engine(model, parts[0], CPU, "both ways", None)
    with pytest.raises(Refused, match="bidirectional"):
        engine.complete({"prompt": PROMPT, "echo": True, "logprobs": 1})


def test_other_methods_get_json_too(ask):
    for method in ("PUT", "OPTIONS", "BREW"):
        status, answer = ask("/v1/models", method=method)
        assert status == 501 and "Unsupported method" in answer["error"]["message"]


def test_generated_tokens_have_the_log_probabilities_of_the_whole_text(ask):
    request = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.3, "seed": 1, "logprobs": 2}
    made = ask("/v1/completions", request)[1]["choices"][0]["logprobs"]
    start = ask("/tokenize", {"prompt": PROMPT, "add_special_tokens": True})[1]["tokens"]
    whole = {"prompt": start + made["token_ids"], "max_tokens": 0, "echo": True, "logprobs": 2}
    again = ask("/v1/completions", whole)[1]["choices"][0]["logprobs"]
    assert again["token_logprobs"][len(start) :] == pytest.approx(made["token_logprobs"], abs=1e-4)


def test_many_prompts_and_many_texts_of_one(ask):
    request = {"prompt": [PROMPT, [1, 5, 9]], "n": 2, "max_tokens": 5, "seed": 1, "temperature": 2}
    choices = ask("/v1/completions", request)[1]["choices"]
    assert [one["index"] for one in choices] == [0, 1, 2, 3] and choices[0]["text"] != choices[1]["text"]
    assert ask("/v1/completions", request)[1]["choices"] == choices, "the seed decides"


def test_a_stop_text_ends_a_text_before_it(ask):
    request = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    text = ask("/v1/completions", request)[1]["choices"][0]["text"]
    stop = text[5:8]
    for more in ({"stop": stop}, {"stop": [stop, "never"]}):
        choice = ask("/v1/completions", request | more)[1]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_tokens_there_and_back(ask, parts):
    tokenizer = parts[0]
    tokens = ask("/tokenize", {"prompt": "a dog, a cat"})[1]["tokens"]
    assert tokens == tokenizer.encode("a dog, a cat", bos=False, eos=False)
    assert ask("/detokenize", {"tokens": tokens})[1] == {"prompt": "a dog, a cat"}
    assert ask("/detokenize", {"tokens": []})[1] == {"prompt": ""}
    info = ask("/tokenizer_info")[1]
    assert ask("/tokenize", {"prompt": info["eos_token"]})[1]["tokens"] == [tokenizer.eos_id]
    assert ask("/v1/models")[1]["data"][0]["id"] == "tiny"


def test_a_classifier_answers(ask, parts):
    texts = ["a bad film", "a good day"]
    found = ask("/classify", {"text": texts})[1]["results"]
    for one, probabilities in zip(found, parts[2].classifier(texts), strict=True):
        assert one["probabilities"] == pytest.approx(probabilities, abs=1e-6)  # another thread may add in another order
    assert [one["class"] for one in found] == [max(one["probabilities"], key=one["probabilities"].get) for one in found]


def test_a_chat_has_the_tokenizers_format(ask, parts):
    tokenizer, model, _ = parts
    messages = [{"role": "user", "content": "hello"}]
    request = {"messages": messages, "max_tokens": 6, "temperature": 0}
    answer = ask("/v1/chat/completions", request)[1]
    start = tokenizer.encode_chat(messages)
    made = model.generate(torch.tensor([start]), 6, temperature=0.0, tokenizer=tokenizer)[0].tolist()
    text = tokenizer.decode(made)[len(tokenizer.decode(start)) :].lstrip()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    streamed = events(ask("/v1/chat/completions", request | {"stream": True})[1])
    assert "".join(one["choices"][0]["delta"]["content"] for one in streamed) == text
    assert ask("/v1/chat/completions", {"messages": [{"role": "pirate", "content": "a"}]})[0] == 400


def test_the_payloads_of_lm_evaluation_harness(ask):
    """Requests in the form of lm_eval 0.4.13, which also reads the answers so (models/openai_completions.py)."""
    contexts = [
        ask("/tokenize", {"prompt": text, "add_special_tokens": False})[1]["tokens"] for text in ("the dog", "a")
    ]
    wholes = [[*context, 300, 301] for context in contexts]
    request = {
        "model": "x",
        "prompt": wholes,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1,
        "echo": True,
    }
    choices = sorted(ask("/v1/completions", request)[1]["choices"], key=lambda one: one["index"])
    for choice, context in zip(choices, contexts, strict=True):
        kept = slice(len(context), -1)
        assert len(choice["logprobs"]["token_logprobs"][kept]) == 2
        assert all(isinstance(one, float) for one in choice["logprobs"]["token_logprobs"][kept])
        assert all(max(top.values()) <= 0 for top in choice["logprobs"]["top_logprobs"][kept])
    until = {"model": "x", "prompt": wholes[:1], "max_tokens": 5, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1}
    assert isinstance(ask("/v1/completions", until)[1]["choices"][0]["text"], str)


def test_openais_client(server, ask):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    host, port = server.server_address[:2]
    client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.choices[0].text == ask("/v1/completions", request)[1]["choices"][0]["text"]
    assert (
        "".join(one.choices[0].text for one in client.completions.create(**request, stream=True))
        == whole.choices[0].text
    )
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 5}
    said = client.chat.completions.create(**chat).choices[0].message.content
    assert "".join(one.choices[0].delta.content for one in client.chat.completions.create(**chat, stream=True)) == said
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.BadRequestError, match="temperature is -1; it must be a number from 0.0 to 100.0"):
        client.completions.create(**request | {"temperature": -1})


def test_the_pages(ask):
    assert "connect-src &#39;self&#39;" in ask("/")[1]
    assert ask("/xray?tokens=1,2,3&prompt=2")[1] == "<p>[1, 2, 3] 2</p>"
    bad = ["", "?tokens=", "?tokens=a", "?tokens=999", "?tokens=1&prompt=x", "?tokens=1&prompt=2", "?tokens=１"]
    for query in (*bad, "?tokens=" + "1," * 70 + "1", "?tokens=" + "1" * 5000):
        status, answer = ask("/xray" + quote(query, safe="?=&,"))
        assert status == 400 and answer["error"]["message"]


# Clients that misbehave

BAD = [
    ({"prompt": ""} | {"max_tokens": "9"}, "max_tokens is 9; it must be a whole number from 0"),
    ({"prompt": "a", "max_tokens": 65}, "max_tokens is 65; it must be a whole number from 0 to 64"),
    ({"prompt": "a", "temperature": True}, "temperature is True"),
    ({"prompt": "a", "n": 65}, "n is 65; it must be a whole number from 1 to 64"),
    ({"prompt": ["a"] * 33, "n": 2}, "at most 64 texts"),
    ({"prompt": None}, "a prompt must be a text"),
    ({"prompt": []}, "a prompt must be a text"),
    ({"prompt": [1, "a"]}, "a prompt must be a text"),
    ({"prompt": [True]}, "a prompt must be a text"),
    ({"prompt": [512]}, "token 512 is not in the vocabulary of 512"),
    ({"prompt": [-1]}, "token -1 is not in the vocabulary"),
    ({"prompt": [5] * 65}, "the prompt has 65 tokens, more than the model's context of 64"),
    ({"prompt": "\ud800"}, "is not UTF-8 text"),
    ({"prompt": "a", "stop": ""} | {"stop": [""]}, "stop must be a text"),
    ({"prompt": "a", "stop": {"a": 1}}, "stop must be a text"),
    ({"prompt": "a", "top_p": 0}, "top_p is 0; it must be above 0"),
    ({"prompt": "a", "logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty is not supported; leave it out"),
]


@pytest.mark.parametrize("request_, message", BAD)
def test_a_bad_request_gets_one_sentence(ask, request_, message):
    status, answer = ask("/v1/completions", request_)
    assert status == 400 and message in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_a_wrong_path_method_or_body_is_told(ask):
    assert ask("/nothing")[0] == 404 and ask("/nothing", {})[0] == 404
    assert ask("/v1/completions")[0] == 405 and ask("/v1/models", {})[0] == 405
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        assert ask("/tokenize", body)[0] == 400
    assert ask("/tokenize", b"x", **{"Content-Length": "many"})[0] == 411
    assert ask("/tokenize", b"", **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    for body in ({}, {"text": []}, {"text": [1]}, {"text": ["a"] * 65}, {"text": " "}):
        assert ask("/classify", body)[0] == 400


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "LOCALHOST.:8000"}, 200),
        ({"Host": "localhost", "Origin": "http://["}, 403),
    ],
)
def test_pages_of_other_sites_get_nothing(ask, headers, status):
    assert ask("/v1/models", **headers)[0] == status
    assert ask("/tokenize", {"prompt": "a"}, **headers)[0] == status


def test_two_at_once_are_answered_together_and_alike(ask, server):
    request = {"prompt": PROMPT, "max_tokens": 40, "temperature": 1, "seed": 5, "logprobs": 1}
    alone = ask("/v1/completions", request)[1]["choices"]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: ask("/v1/completions", request)[1]["choices"]}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one[0]["text"] for one in found.values()] == [alone[0]["text"]] * 6


def test_a_client_that_leaves_or_sleeps_keeps_nobody_waiting(ask, server, capsys):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 60, "temperature": 1, "stream": True}).encode()
    lines, before = [], threading.active_count()
    for _ in range(5):
        line = socket.create_connection(server.server_address[:2])
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        line.recv(100)
        lines.append(line)
    for line in lines[:3]:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
        line.close()
    start = time.monotonic()
    assert ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 3})[0] == 200
    assert time.monotonic() - start < 20
    for line in lines[3:]:
        line.close()
    while threading.active_count() > before:
        assert time.monotonic() - start < 40, "a text of a client that has left is written on"
        time.sleep(0.1)
    assert not server.engine.lock.locked()
    assert capsys.readouterr().err == ""


def test_a_thousand_malformed_requests_are_survived(ask, server, capsys):
    draw, before = random.Random(0), threading.active_count()
    good = (
        b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n{"prompt": "a", "max_tokens":1}'
    )
    for number in range(1000):
        content = bytearray(good)
        for _ in range(draw.randint(1, 12)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        del content[draw.randrange(len(content)) :]
        with socket.create_connection(server.server_address[:2]) as line:
            line.settimeout(20)
            line.sendall(bytes(content))
            line.shutdown(socket.SHUT_WR)
            if number % 3 == 0:
                while line.recv(4096):
                    pass
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.1)
    assert threading.active_count() <= before, "no thread is left over"
    assert ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_more_clients_than_there_is_room_for_are_told(ask, server, monkeypatch):
    monkeypatch.setattr(server, "room", threading.Semaphore(0))
    status, answer = ask("/v1/models")
    assert status == 503 and "try again" in answer["error"]["message"]


def test_a_wrong_port_is_told(parts, capsys):
    with pytest.raises(SystemExit):
        main(["--option", "serve", "--port", "99999"])
    assert "'99999' is not allowed; it must be from 0 to 65535" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["--option", "serve", "--port", port]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use; choose another one" in capsys.readouterr().err
