"""The decoder that Numba compiles: one new token for one row on the CPU. It chooses threads, and compiles once.

numba_step.py holds the loops. Numba is imported for the second token, so that the first one does not wait for it.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from minillama.environment import try_lock
from minillama.layers.kv_cache import KVCache
from rope import rotary_rows

if TYPE_CHECKING:
    from minillama.decoding.numba_step import Block

Matrix = tuple[Tensor, Tensor | None]  # W (out, in), float32 or bfloat16; or int8 with the scale of each row (out,)
LOOPS = Path(__file__).with_name("numba_step.py")
TRIAL = 100  # a number of threads that is not the fastest is tried for 1 / TRIAL of the time


def covers(config: LlamaConfig, device: torch.device, dtype: torch.dtype, quantize: str | None) -> bool:
    """Whether the compiled decoder computes such a model. dtype: of the matrix products."""
    plain = config.causal and config.position_embedding_type == "rotary" and config.sliding_window is None
    narrow = dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and quantize == "int8")
    return device.type == "cpu" and plain and config.attention_type == "softmax" and narrow


def missing() -> str | None:
    """The reason why the compiled decoder cannot run here, as a phrase; None if it can.

    Numba without OpenMP would take three times as long.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    found = find_spec("numba")
    if found is None or found.origin is None:
        return "numba is missing (pip install numba)"
    for library in Path(found.origin).parent.glob("np/ufunc/omppool.*"):
        try:
            ctypes.CDLL(str(library))
            return None
        except OSError:
            continue
    return "numba finds no OpenMP library here (libgomp on Linux, libomp on macOS)"


class NotCompiled(Exception):
    """The loops cannot be compiled, or read from the cache. The message is the reason, as a phrase."""


class CompiledDecoder:
    """One step of decoding, with the results of `InferenceLlama` and the same cache.

    tell: is given a line if the loops have to be compiled.
    """

    def __init__(self, config: LlamaConfig, tell: Callable[[str], None]) -> None:
        self.config, self.tell = config, tell
        self.weights: list[tuple[np.ndarray, ...]] = []  # of each layer, the fields of a Block
        self.blocks: list[Block] = []
        self.loops: Any = None  # the module numba_step, once it is loaded

    def add_block(self, attention_norm: Any, ffn_norm: Any, matrices: Sequence[Matrix]) -> None:
        """Adds a layer. matrices: query, key and value in one; output; gate and up in one; down."""
        qkv, output, gate_up, down = (arrays(*matrix) for matrix in matrices)
        self.weights.append(
            (*norm_arrays(attention_norm), *qkv, *output, *norm_arrays(ffn_norm), *gate_up, *down),
        )

    def add_head(self, norm: Any, output: Matrix) -> None:
        """Adds the final norm and the output matrix."""
        self.norm, self.output = norm_arrays(norm), arrays(*output)
        self.folder = cache_folder(self.tell)
        # An empty file, written when the loops for this type of weights have been compiled
        self.compiled = self.folder / str(output[0].dtype).removeprefix("torch.")

    def load(self) -> None:
        """Imports Numba and the loops, and compiles them or reads them from the cache. Raises NotCompiled."""
        try:
            with interrupts_wait(), open(self.folder.with_suffix(".lock"), "ab") as lock:
                self.import_loops()
                self.compile(lock)
        except Exception as error:  # a damaged cache file may raise anything, and so may a full disk
            said = " ".join(str(error).split())[:200]
            raise NotCompiled(f"Numba failed ({type(error).__name__}: {said})") from error

    def import_loops(self) -> None:
        """Imports Numba, and the loops with their cache in `self.folder`."""
        import numba

        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(self.folder)
        config.THREADING_LAYER = "omp"
        try:
            from minillama.decoding import numba_step
        finally:
            config.CACHE_DIR = before
        self.blocks = [numba_step.Block(*weights) for weights in self.weights]
        threads = torch.get_num_threads()
        self.team = Team(min(threads, config.NUMBA_NUM_THREADS))
        self.set_threads, self.loops = numba.set_num_threads, numba_step
        # This starts Numba's threads. Without them, loops read from the cache may call a function that is not there
        # (github.com/numba/numba/issues/8578): so after a first compilation that was killed before it ended.
        self.set_threads(1)
        torch.set_num_threads(threads)  # Numba's start made it the number of processors, for torch too

    def compile(self, lock: IO[bytes]) -> None:
        """Computes one step with made-up inputs, for which Numba compiles the loops or reads them from the cache.

        A cache that fails is removed. lock: one process compiles or removes at a time, else Numba's files could get
        mixed up.
        """
        from numba.core import event

        if not self.compiled.exists():
            try_lock(lock, wait=True)
        began, kind = time.perf_counter(), self.compiled.name
        how_long = "5 to 15 seconds if nothing else runs"
        lines = iter([f"preparing fast generation: Numba compiles it once for {kind} weights; {how_long} ..."])

        class Listener(event.Listener):
            """Tells of the first compilation. There is none if the cache has the loops for this processor."""

            def on_start(this, _: event.Event) -> None:
                try_lock(lock, wait=True)
                for line in lines:
                    self.tell(line)

            def on_end(this, _: event.Event) -> None:
                pass

        try:
            with event.install_listener("numba:compile", Listener()):
                cache = KVCache(self.config, 1)
                for layer in range(len(self.blocks)):
                    cache.append(layer, *torch.zeros(2, 1, self.config.kv_heads, 1, self.config.head_dim))
                self.step(torch.zeros(self.config.dim), cache)
            self.compiled.touch()
        except Exception:
            try_lock(lock, wait=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        if next(lines, None) is None:
            self.tell(f"prepared in {time.perf_counter() - began:.1f} s")

    def __call__(self, x: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """A token's embedding x (D,), float32, which is overwritten -> logits (1, 1, V) and hidden state (1, 1, D).

        Raises ValueError if the cache is full. The loops must be loaded.
        """
        cache.check_room(1)
        began = time.perf_counter()
        threads = self.team.choose(began)
        self.set_threads(threads)
        found = self.step(x, cache)
        self.team.note(threads, began, time.perf_counter())
        return found

    def step(self, x: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """See `__call__`, with the present number of threads."""
        config, loops, at = self.config, self.loops, cache.length
        sizes = (config.head_dim, config.max_seq_len, config.rope_theta)
        turn = torch.view_as_real(rotary_rows(at, at + 1, *sizes, x.device, config.rope_scaling)[0]).numpy()
        centred, eps = config.norm == "layernorm", config.layer_norm_eps
        state, hidden = x.numpy(), np.empty(config.dim, np.float32)
        logits = np.empty(config.vocab_size, np.float32)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            loops.block_step(state, turn, at, config.n_heads, eps, centred, block, keys[0].numpy(), values[0].numpy())  # type: ignore[index]
        loops.normalize(state, *self.norm, eps, centred, hidden)
        loops.project(*self.output, hidden, logits)
        cache.length += 1
        return torch.from_numpy(logits)[None, None], torch.from_numpy(hidden)[None, None]


class Team:
    """The number of threads: the one that is fastest now.

    Threads that share a step wait for the slowest of them. Beside another busy program this takes up to forty times as
    long as one thread alone. So each number (1, 2, 4, ..., `most`) is measured, and tried again now and then.
    """

    def __init__(self, most: int) -> None:
        counts = {most} | {2**n for n in range(most.bit_length()) if 2**n < most}
        # The seconds of the last steps
        self.recent: dict[int, deque[float]] = {count: deque([], 3) for count in sorted(counts)}
        self.due = dict.fromkeys(self.recent, 0.0)  # the time of the next trial

    def choose(self, now: float) -> int:
        """The number of threads for the next step."""
        for count, due in self.due.items():
            if now >= due:
                return count
        return min(self.recent, key=lambda count: sorted(self.recent[count])[len(self.recent[count]) // 2])

    def note(self, count: int, began: float, ended: float) -> None:
        """Notes the time of a step. One slow step among three changes nothing."""
        self.recent[count].append(ended - began)
        self.due[count] = ended + TRIAL * (ended - began)


def arrays(weight: Tensor, scale: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as two arrays: the weights, bfloat16 as uint16, and the scales, which are 1 except for int8."""
    bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return bits.numpy(), np.ones(len(weight), np.float32) if scale is None else scale.numpy()


def norm_arrays(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a norm, float32; RMSNorm has no bias."""
    weight = norm.weight.detach().float()
    bias = norm.bias.detach().float() if hasattr(norm, "bias") else torch.zeros_like(weight)
    return weight.numpy(), bias.numpy()


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """A context at whose end Ctrl-C takes effect: inside it, LLVM's callbacks would swallow the KeyboardInterrupt."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as for a job in the background of a shell script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            raise KeyboardInterrupt


def cache_folder(tell: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the compiled loops: in ~/.cache, or where NUMBA_CACHE_DIR or XDG_CACHE_HOME say.

    One compilation serves all sizes of a model, until the loops, Numba or NumPy change. Each copy of the project has
    its own folder, because Numba compiles again for another path or time of the file. If the place is not writable, or
    belongs to another user, who could place code there, the folder is a temporary one of this process.
    """
    file = f"{LOOPS} {LOOPS.stat().st_mtime_ns}"
    text = "".join((LOOPS.read_text("utf-8"), file, version("numba"), version("numpy")))
    place = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache")
    try:
        folder = Path(place).expanduser() / "mini-llama" / hashlib.sha256(text.encode()).hexdigest()[:12]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        mine = False
    if not mine:
        tell(
            f"notice: {place} is not writable, so the decoder is compiled at each start; NUMBA_CACHE_DIR names another"
        )
        folder = Path(tempfile.mkdtemp(prefix="mini-llama-"), "loops")
        folder.mkdir()
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    return folder
