"""The decoder for CUDA: one new token for each row, replayed as a CUDA graph. Shapes as in llama.py.

To launch the kernels of a step one by one can take longer than to compute them. A graph launches all of them at once.
It repeats the same kernels on the same memory. So everything that changes from token to token is in tensors here: the
tokens, their position, and the keys and values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from config import LlamaConfig
from minillama.layers.kv_cache import KVCache
from rope import rotary_table

FEWEST_KEYS = 128  # attention reads this number of keys, or a power of two above it; there is a graph for each number

Append = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # see `KVCache.append`
# forward(tokens (B, 1), rotary table (1, hd / 2), mask, append) -> logits (B, 1, V) and hidden states (B, 1, D)
Forward = Callable[[Tensor, Tensor, Tensor, Append], tuple[Tensor, Tensor]]
Step = Callable[[], tuple[Tensor, Tensor]]


def covers(config: LlamaConfig, device: torch.device) -> bool:
    """Whether the decoder computes such a model."""
    return device.type == "cuda" and config.causal and config.position_embedding_type == "rotary"


class NotCaptured(Exception):
    """CUDA cannot capture the step, for example for lack of memory. The message is the reason, as a phrase."""


class CudaDecoder:
    """One step of decoding, with the results of `InferenceLlama` and the same cache.

    The graphs know only the arrays of this decoder. So before the first step of a cache, its keys and values are copied
    into these arrays, which become the cache's own. If another cache comes, the first one gets a copy back.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.keys: list[Tensor] = []  # of each layer, (B, K, capacity, hd)
        self.values: list[Tensor] = []
        self.owner: Callable[[], KVCache | None] = lambda: None  # a weak reference to the cache in the arrays
        self.padding: Tensor | None = None  # its `real`
        self.steps: dict[int, Step] = {}  # the graph for each number of keys

    def __call__(self, forward: Forward, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """tokens (B, 1) -> logits (B, 1, V) and hidden states (B, 1, D), after at least one cached token.

        forward: the model; it must be the same in each call. Raises ValueError if the cache is full. Raises
        NotCaptured, and leaves the cache usable, if there can be no graph.
        """
        cache.check_room(1)
        try:
            same = self.owner() is cache and cache.keys[0] is self.keys[0] and cache.real is self.padding
            if not same:  # `KVCache.take` may have replaced the arrays
                self.adopt(cache)
            keys = min(max(FEWEST_KEYS, power_of_two(cache.length + 1)), self.keys[0].shape[2])
            self.tokens.copy_(tokens)
            self.position.fill_(cache.length)
            if keys not in self.steps:
                self.steps[keys] = self.capture(lambda: self.step(forward, keys))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            said = " ".join(str(error).split())[:200]
            raise NotCaptured(f"CUDA could not capture a step ({type(error).__name__}: {said})") from error
        logits, hidden = self.steps[keys]()
        cache.length += 1
        return logits.clone(), hidden.clone()  # the next step overwrites them

    def step(self, forward: Forward, keys: int) -> tuple[Tensor, Tensor]:
        """The step for the tokens at the position in this decoder's tensors. Attention reads the first `keys` keys."""

        def append(layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            stored = self.keys[layer_id], self.values[layer_id]
            for array, new in zip(stored, (key, value), strict=True):
                array.index_copy_(2, self.position, new)
            return stored[0][:, :, :keys], stored[1][:, :, :keys]

        places = self.places[:keys]
        seen = self.real[:, :keys] & (places <= self.position)
        if self.config.sliding_window is not None:
            seen &= places > self.position - self.config.sliding_window
        # Added to the scores. torch would make such a mask of a bool one in each layer.
        mask = torch.where(seen, 0.0, -math.inf).to(self.keys[0].dtype)[:, None, None]  # (B, 1, 1, keys)
        return forward(self.tokens, self.table.index_select(0, self.position), mask, append)

    def adopt(self, cache: KVCache) -> None:
        """Copies the cache into the arrays, which become its own."""
        self.release()
        first: Tensor = cache.keys[0]  # type: ignore[assignment]
        if not self.keys or not fits(cache, first, self.keys[0]):
            self.allocate(cache.capacity, first)
        for ours, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer_id, array in enumerate(ours):
                array[:, :, : cache.length] = theirs[layer_id][:, :, : cache.length]  # type: ignore[index]
                # The mask hides the rest, but 0 * NaN is NaN.
                array[:, :, cache.length :] = 0.0
                theirs[layer_id] = array
        self.real.fill_(True)
        if cache.real is not None:
            self.real[:, : cache.capacity] = cache.real
            cache.real = self.real[:, : cache.capacity]
        self.padding = cache.real
        self.owner = weakref.ref(cache)

    def release(self) -> None:
        """Gives the cache in the arrays its own copy, if it is still in use."""
        cache, self.owner = self.owner(), lambda: None
        if cache is None:
            return
        for ours, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer_id, array in enumerate(ours):
                if theirs[layer_id] is array:
                    theirs[layer_id] = array.clone()
        cache.real = None if cache.real is None else cache.real.clone()

    def allocate(self, capacity: int, like: Tensor) -> None:
        """Makes arrays for `capacity` tokens or more. like: an array of the cache. The graphs of the old arrays end."""
        self.steps, self.keys, self.values = {}, [], []
        config, device, rows = self.config, like.device, len(like)
        capacity = min(power_of_two(capacity), config.max_seq_len)
        shape = (*like.shape[:2], capacity, like.shape[3])
        self.values = [like.new_empty(shape) for _ in range(config.n_layers)]
        self.keys = [like.new_empty(shape) for _ in range(config.n_layers)]
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        self.real = torch.ones(rows, capacity, dtype=torch.bool, device=device)  # False for padding
        sizes = (config.head_dim, power_of_two(capacity), config.rope_theta)
        self.table = rotary_table(*sizes, device, config.rope_scaling)
        self.capture = Capture(device)


class Capture:
    """Makes CUDA graphs, which share their memory because only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """The step as a graph. Each call computes it again from the same tensors, into the same results."""
        usual = torch.cuda.current_stream(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(usual):  # restores it, which a failing capture does not
            self.stream.wait_stream(usual)
            with torch.cuda.stream(self.stream):
                step()  # libraries set themselves up in a first run, which cannot be captured
            usual.wait_stream(self.stream)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                results = step()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def fits(cache: KVCache, kept: Tensor, array: Tensor) -> bool:
    """Whether a cache with arrays as `kept` can move into arrays as `array`."""
    same = kept.dtype == array.dtype and kept.shape[:2] == array.shape[:2]
    return same and cache.capacity <= array.shape[2]
