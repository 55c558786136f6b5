"""WiSE-FT (arXiv 2109.01903): a mix of the weights of a fine-tuned model and of its base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def interpolate(theta_0: Mapping[str, Tensor], theta_1: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * theta_0 + alpha * theta_1, tensor by tensor.

    Alpha 0 and 1 return the inputs themselves, and equal tensors do not change, bit for bit. Tensors that share memory
    in both inputs, such as a tied output, share it in the result. Integer tensors are those of theta_1. Raises
    ValueError, naming the tensor, if names or shapes differ, or if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 to 1")
    if missing := sorted(theta_0.keys() ^ theta_1.keys()):
        raise ValueError(f"{missing[0]} is in only one of the two models")
    if alpha in (0, 1):
        return dict(theta_1 if alpha == 1 else theta_0)
    mixed: dict[str, Tensor] = {}
    made: dict[tuple[object, ...], Tensor] = {}  # by the memory of the two tensors
    for name, one in theta_1.items():
        zero = theta_0[name]
        if zero.shape != one.shape:
            raise ValueError(f"{name} has shape {tuple(zero.shape)} in one model, {tuple(one.shape)} in the other")
        if not one.is_floating_point():
            mixed[name] = one
            continue
        place = (zero.data_ptr(), one.data_ptr(), zero.stride(), one.stride(), one.shape)
        if place not in made:
            made[place] = zero.to(one.dtype).lerp(one, alpha)
        mixed[name] = made[place]
    return mixed
