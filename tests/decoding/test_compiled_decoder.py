"""The decoder compiled by Numba: against the readable Llama, its choice of threads, its cache, and what it needs."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from llama import Llama, load_pretrained
from minillama.decoding import compiled_decoder
from minillama.decoding.compiled_decoder import (
    TRIAL,
    CompiledDecoder,
    Team,
    cache_folder,
    covers,
    interrupts_wait,
    missing,
)
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.sampling import generate
from minillama.environment import HERE
from minillama.layers.kernels import int8_weights
from models import random_ids, tiny_config, tiny_llama
from tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the loops cannot run here: {missing()}")


def random_shape(seed: int) -> dict:
    """Sizes and conventions drawn at random, odd sizes too."""
    draw = random.Random(seed)
    kv_heads, group, pairs = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([1, 3, 4, 9])
    heads = kv_heads * group
    return {
        "vocab_size": draw.choice([7, 64, 131]),
        "dim": heads * 2 * pairs,
        "n_layers": draw.choice([1, 3]),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "hidden_dim": draw.choice([None, 5, 37]),
        "multiple_of": 1,
        "max_seq_len": draw.choice([9, 40]),
        "norm": draw.choice(["layernorm", "rmsnorm"]),
        "layer_norm_eps": draw.choice([1e-5, 1e-2]),
        "tie_embeddings": draw.random() < 0.5,
        "rope_theta": draw.choice([100.0, 500000.0]),
        "causal": True,
    }


def step_by_step(fast: InferenceLlama, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states of ids (1, T), of which the first `prompt` are read at once."""
    cache = fast.new_cache()
    found = [fast(ids[:, :prompt], ids, cache=cache)]
    found += [fast(ids[:, i : i + 1], cache=cache) for i in range(prompt, ids.shape[1])]
    return torch.cat([logits for logits, _ in found], 1), torch.cat([hidden for _, hidden in found], 1)


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_to_the_end_of_the_context_its_logits_are_those_of_llama(seed):
    shape = random_shape(seed)
    model = tiny_llama(seed, **shape)
    if shape["norm"] == "layernorm":
        assert model.norm.bias.abs().max() > 0.01
    fast = InferenceLlama(copy.deepcopy(model))
    assert fast.decoder is not None
    ids = random_ids(1, shape["max_seq_len"], shape["vocab_size"], seed)
    wanted_logits, wanted_hidden = model(ids, ids)
    for prompt in (1, 4):
        logits, hidden = step_by_step(fast, ids, prompt)
        torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden, wanted_hidden, atol=1e-4, rtol=1e-4)


def rounded(model: Llama, dtype: torch.dtype) -> Llama:
    """The model in float64, with each matrix rounded to bfloat16 or int8; its embedding table is not rounded."""
    wide = copy.deepcopy(model).double()
    for one, other in zip(wide.modules(), model.modules(), strict=True):
        if isinstance(one, torch.nn.Linear):
            weight = other.weight.detach()
            whole, scale = int8_weights(weight) if dtype == torch.int8 else (weight.to(dtype), torch.ones(len(weight)))
            one.weight = torch.nn.Parameter(whole.double() * scale.double()[:, None])
    return wide


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_of_narrow_weights_nothing_else_is_rounded(seed, dtype):
    shape = random_shape(seed)
    model = tiny_llama(seed, **shape)
    ids = random_ids(1, shape["max_seq_len"], shape["vocab_size"], seed)
    # One token is read by torch, whose activations are bfloat16; its keys and values then go into every later token.
    settings = {"quantize": "int8"} if dtype == torch.int8 else {"dtype": dtype}
    fast = InferenceLlama(copy.deepcopy(model), **settings)
    exact = rounded(model, dtype)
    cache, wide = fast.new_cache(), exact.new_cache()
    fast(ids[:, :1], cache=cache), exact(ids[:, :1], cache=wide)
    for ours, theirs in ((cache.keys, wide.keys), (cache.values, wide.values)):
        for mine, wanted in zip(ours, theirs, strict=True):
            mine.copy_(wanted)
    for i in range(1, ids.shape[1]):
        found, wanted = fast(ids[:, i : i + 1], cache=cache)[0], exact(ids[:, i : i + 1], cache=wide)[0]
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_in_int8_the_perplexity_of_held_out_stories_is_within_a_hundredth(asset):
    text = asset("corpora/tinystories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[-6:] if story.strip()]
    encode = Tokenizer(tokenizer_model=HERE / "data/mini-llama.model").encode
    rows = [torch.tensor([encode(story, bos=True, eos=False)[:512]]) for story in stories]
    nats = []
    for quantize in (None, "int8"):
        fast = InferenceLlama(load_pretrained(HERE / "data/mini-llama.safetensors"), torch.float32, quantize)
        losses = [cross_entropy(step_by_step(fast, ids, 1)[0][0, :-1], ids[0, 1:], reduction="sum") for ids in rows]
        nats.append(sum(map(float, losses)) / sum(ids.shape[1] - 1 for ids in rows))
    assert 1.0 < nats[0] < 2.5 and 0 < abs(nats[1] - nats[0]) < 0.01


def test_numba_leaves_torch_the_number_of_threads_that_the_user_chose():
    """Two threads on a busy processor can take forty times as long as one, and training goes on after a sample."""
    code = (
        "import torch; from minillama.decoding.fast_llama import InferenceLlama; from models import tiny_llama; "
        "torch.set_num_threads(1); assert InferenceLlama(tiny_llama(causal=True)).has_loops(); "
        "import numba; print(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)"
    )
    paths = os.pathsep.join([str(HERE), str(HERE / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3"]


@torch.no_grad()
def test_it_continues_in_the_cache_of_torch_and_torch_in_its():
    model = tiny_llama(causal=True)
    fast, ids = InferenceLlama(copy.deepcopy(model)), random_ids(1, 20)
    cache = fast.new_cache()
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 13), (13, 20)):
        logits = fast(ids[:, start:end], ids, cache=cache)[0]
        torch.testing.assert_close(logits, model(ids[:, :end], ids)[0][:, start:end], atol=1e-5, rtol=1e-4)
    cache.keep(8)
    torch.testing.assert_close(fast(ids[:, 8:9], cache=cache)[0], model(ids[:, :9])[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_is_refused_and_unchanged():
    fast = InferenceLlama(tiny_llama(causal=True))
    cache = fast.new_cache(4)
    fast(random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="4 tokens are cached and 1 more do not fit into 4"):
        fast(random_ids(1, 1), cache=cache)
    assert cache.length == 4


def test_damaged_weights_are_noticed():
    model = tiny_llama(causal=True)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 3] = torch.nan
    fast = InferenceLlama(model)
    cache = fast.new_cache()
    cache.append(0, *torch.zeros(2, 1, 2, 1, 8)), cache.append(1, *torch.zeros(2, 1, 2, 1, 8))
    cache.length = 1
    assert torch.isnan(fast(random_ids(1, 1), cache=cache)[0]).any()
    with pytest.raises(ValueError, match="logits .* hold NaN or infinity"):
        generate(fast, random_ids(1, 3), 3)


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.float64, "quantize": "int8"}, False),
        ({"dtype": torch.bfloat16, "quantize": "int8"}, True),
        ({"device": torch.device("cuda")}, False),
        ({"position_embedding_type": "alibi"}, False),
        ({"sliding_window": 3}, False),
        ({"attention_type": "differential"}, False),
        ({"causal": False}, False),
    ],
    ids=str,
)
def test_what_it_does_not_cover_takes_the_path_of_torch(changes, covered):
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "quantize": None}
    settings |= {name: changes[name] for name in settings if name in changes}
    shape = {"causal": True} | {name: value for name, value in changes.items() if name not in settings}
    assert covers(tiny_config(**shape), **settings) is covered


def calls(monkeypatch) -> list[int]:
    """The positions that compiled decoders compute from now on."""
    seen: list[int] = []
    really = CompiledDecoder.__call__
    monkeypatch.setattr(
        CompiledDecoder, "__call__", lambda self, x, cache: seen.append(cache.length) or really(self, x, cache)
    )
    return seen


@torch.no_grad()
def test_only_one_real_token_of_one_row_is_its_own(monkeypatch):
    fast = InferenceLlama(tiny_llama(causal=True))
    seen = calls(monkeypatch)
    generate(fast, random_ids(1, 3), 4)
    assert seen == [3, 4, 5]
    generate(fast, random_ids(2, 3), 4)
    generate(fast, random_ids(1, 3), 4, attention_mask=torch.tensor([[False, True, True]]))
    generate(fast, random_ids(1, 3), 4, use_cache=False)
    assert seen == [3, 4, 5]
    assert InferenceLlama(tiny_llama(causal=True), rows=2).decoder is None


def test_without_numba_it_says_what_would_be_faster(monkeypatch):
    ids = random_ids(1, 4)
    wanted = generate(InferenceLlama(tiny_llama(causal=True)), ids, 8, temperature=0.0)
    monkeypatch.setattr(compiled_decoder, "find_spec", lambda name: None)
    lines: list[str] = []
    plain = InferenceLlama(tiny_llama(causal=True), tell=lines.append)
    assert lines == ["notice: text comes at about half the speed, because numba is missing (pip install numba)"]
    assert plain.decoder is None and generate(plain, ids, 8, temperature=0.0).equal(wanted)


def test_without_openmp_it_is_not_used(monkeypatch):
    def fails(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(compiled_decoder.ctypes, "CDLL", fails)
    assert missing() == "numba finds no OpenMP library here (libgomp on Linux, libomp on macOS)"
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert missing() == "NUMBA_DISABLE_JIT is set"


# Threads


def tokens_a_second(step: Callable[[int, float], float], seconds: float, most: int = 2, start: float = 0.0) -> float:
    """The rate of a team on a made-up machine. step: (threads, time) -> the seconds of a step."""
    team, now, tokens = Team(most), start, 0
    while now < start + seconds:
        threads = team.choose(now)
        team.note(threads, now, now + step(threads, now))
        now += step(threads, now)
        tokens += 1
    return tokens / seconds


def test_on_an_idle_machine_nearly_all_steps_use_all_threads():
    assert tokens_a_second(lambda threads, now: 0.004 / threads, 10, most=2) > 0.99 * 500
    assert tokens_a_second(lambda threads, now: 0.032 / threads, 100, most=16) > 0.95 * 500


def test_beside_a_busy_program_it_is_nearly_as_fast_as_one_thread():
    assert tokens_a_second(lambda threads, now: 0.0026 if threads == 1 else 0.083, 60) > 0.95 / 0.0026


def test_it_returns_to_all_threads_when_the_machine_is_free_again():
    def step(threads: int, now: float) -> float:
        return 0.0026 if threads == 1 else 0.083 if now < 20 else 0.0015

    assert tokens_a_second(step, 60) > 0.7 / 0.0015 * 40 / 60 + 0.9 / 0.0026 * 20 / 60


def test_one_slow_step_changes_nothing():
    team, now = Team(2), 0.0
    for seconds in (0.003, 0.002, 0.002, 0.002, 0.05):
        threads = team.choose(now)
        team.note(threads, now, now + seconds)
        now += seconds
    assert team.choose(now) == 2
    assert team.choose(now + 2 * TRIAL * 0.003) == 1  # its turn to be tried


def test_a_team_of_one_or_of_an_odd_number_is_complete():
    assert list(Team(1).recent) == [1] and list(Team(6).recent) == [1, 2, 4, 6] and list(Team(8).recent) == [1, 2, 4, 8]


# Compilation


def test_the_cache_is_where_the_user_says_and_depends_on_the_loops(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    first = cache_folder()
    assert first.parent == tmp_path / "one" / "mini-llama" and first == cache_folder()
    changed = tmp_path / "numba_step.py"
    monkeypatch.setattr(compiled_decoder, "LOOPS", changed)
    folders = {first}
    for text, time in (("# loops\n", 1), ("# other loops\n", 1), ("# other loops\n", 2)):
        changed.write_text(text, encoding="utf-8")
        os.utime(changed, (time, time))  # Numba compiles again for another time, too
        folders.add(cache_folder())
        assert cache_folder().parent == first.parent
    assert len(folders) == 4
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "two"))
    assert cache_folder().parent == tmp_path / "two" / "mini-llama"


def test_a_place_that_is_not_writable_is_replaced_by_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    lines: list[str] = []
    folder = cache_folder(lines.append)
    assert folder.is_dir() and "mini-llama-" in folder.parent.name and tmp_path not in folder.parents
    assert len(lines) == 1 and f"{tmp_path / 'file'} is not writable" in lines[0] and "NUMBA_CACHE_DIR" in lines[0]


@pytest.mark.parametrize("warm", [False, True])
def test_where_numba_fails_torch_computes_all_tokens_and_the_cache_is_removed(warm, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise EOFError("Ran out\nof input")  # as pickle does for an empty file of the cache

    ids = random_ids(1, 4)
    wanted = generate(InferenceLlama(tiny_llama(causal=True)), ids, 8, temperature=0.0)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    if warm:
        (cache_folder() / "float32").touch()
    monkeypatch.setattr(CompiledDecoder, "step", fails)
    lines: list[str] = []
    fast = InferenceLlama(tiny_llama(causal=True), tell=lines.append)
    assert (fast.decoder is None) is not warm
    assert generate(fast, ids, 8, temperature=0.0).equal(wanted) and fast.decoder is None
    reason = "Numba failed (EOFError: Ran out of input)"
    assert lines == [f"notice: text comes at about half the speed, because {reason}"]
    assert not [path for path in (tmp_path / "mini-llama").iterdir() if path.is_dir()]


def test_a_wrong_setting_of_numba_leaves_its_cache_alone(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError("Number of threads specified must be > 0.")  # as with NUMBA_NUM_THREADS=0

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CompiledDecoder, "import_loops", fails)
    (cache_folder() / "float32").touch()
    lines: list[str] = []
    generate(InferenceLlama(tiny_llama(causal=True), tell=lines.append), random_ids(1, 4), 3)
    assert "because Numba failed (ValueError: Number of threads specified must be > 0.)" in lines[0]
    assert (cache_folder() / "float32").exists()


@pytest.fixture
def handled_by():
    """Sets the handler of Ctrl-C for a test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_during_a_compilation_takes_effect_after_it(handled_by):
    handled_by(signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        done.append("compiled")
    assert done == ["compiled"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored_during_a_compilation(handled_by):
    handled_by(signal.SIG_IGN)
    with interrupts_wait():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}
from models import random_ids, tiny_llama
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.sampling import generate
for sizes in ({{}}, {{"dim": 48, "n_layers": 1, "norm": "rmsnorm"}}):
    fast = InferenceLlama(tiny_llama(causal=True, **sizes), tell=lambda line: print(line, file=sys.stderr))
    print(generate(fast, random_ids(1, 3), 9, temperature=0.0).tolist(), flush=True)
"""


def starts(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    program = PROGRAM.format(paths=[str(HERE), str(HERE / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, env=environment, stdout=-1, stderr=-1, text=True
    )


@pytest.mark.slow
def test_two_processes_that_compile_at_once_agree_and_a_third_finds_all(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    both = [starts(tmp_path, dict(os.environ)) for _ in range(2)]
    found = [process.communicate() for process in both]
    third = starts(tmp_path, dict(os.environ)).communicate()
    assert found[0][0] == found[1][0] == third[0] and third[0].count("[[") == 2
    for _, err in found:
        assert "notice" not in err
    told = "preparing fast generation: Numba compiles it once for float32 weights; 5 to 15 seconds"
    assert sum(err.count(told) for _, err in found) == sum(err.count("prepared in") for _, err in found) == 1
    assert third[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["an empty file", "a full disk"])
def test_damaged_files_of_the_cache_and_a_full_disk_do_not_end_a_run(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    good = starts(tmp_path, dict(os.environ)).communicate()
    for index in (tmp_path / "cache").rglob("*.nbi"):
        index.unlink()
        index.write_bytes(b"") if damage == "an empty file" else index.mkdir()
    again, cured = (starts(tmp_path, dict(os.environ)).communicate() for _ in range(2))
    assert again[0] == cured[0] == good[0]
    assert again[1].count("because Numba failed") == 1 and "Traceback" not in again[1]
    assert "notice" not in cured[1]


@pytest.mark.slow
def test_a_compilation_that_was_killed_does_no_harm(tmp_path, monkeypatch):
    """Without the outer loop's file, Numba compiles it around inner loops from the cache; such a file once crashed."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    good = starts(tmp_path, dict(os.environ)).communicate()
    for path in (tmp_path / "cache").rglob("*block_step*"):
        path.unlink()
    for _ in range(2):
        process = starts(tmp_path, dict(os.environ))
        assert process.communicate()[0] == good[0] and process.returncode == 0
