"""Holds the model against reference outputs: the course's, where they are here, those of a tiny model that ships, and
those of the bundled model.

examples:
  python sanity_check.py                                    everything that is here
  python sanity_check.py --pretrained-model-path my.pt      the course's references against another copy of its model
  python sanity_check.py sanity_check.data                  against this reference file alone

The course's editions differ in norm and attention. Each reference file shows which it was made with, and is compared
under that convention, whatever the checkpoint says. Everything is computed in float32 on the CPU.
Exit code: 0 if all that could be compared agrees, 1 if something differs or the bundled model is not the one that its
reference was made of, 2 for a file that cannot be used.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from command_line import OneLineParser

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
CONFORMANCE = HERE / "tests" / "conformance"
# The bundled model, and what tests/make_bundled_reference.py computed with it in float64.
BUNDLED = Path("data/mini-llama.safetensors")
BUNDLED_EXPECTED = Path("tests/conformance/bundled_expected.safetensors")
# What the course's references are outputs for; the two rows begin alike, which betrays a causal mask.
REFERENCE_IDS = [[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]]
SHARED = 2  # ids that the rows have in common at their beginning
DEFAULT_CHECKPOINT = Path("stories42M.pt")


class Tolerance(NamedTuple):
    """A difference passes up to absolute + relative * |wanted|."""

    absolute: float
    relative: float


COURSE = Tolerance(1e-5, 1e-3)  # the course's own
CONFORMING = Tolerance(1e-4, 0.0)  # float32, summed in another order, over logits of up to 30
BUNDLED_AGREES = Tolerance(3e-5, 0.0)  # float32 against float64: ten times the 2.6e-6 measured at logits of up to 9


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = OneLineParser(prog="sanity_check.py", description=__doc__)
    parser.add_argument(
        "references",
        nargs="*",
        type=Path,
        metavar="REFERENCE",
        help="reference files to compare with (default: data/reference/sanity_check*.data and ./sanity_check.data, "
        "the tiny model of tests/conformance, and the bundled model)",
    )
    parser.add_argument(
        "--pretrained-model-path",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="the course's checkpoint (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        agree = run(args.references, args.pretrained_model_path)
    except (ValueError, OSError) as error:
        print(f"sanity_check.py: error: {error}", file=sys.stderr)
        return 2
    return 0 if agree else 1


def run(asked: list[Path], path: Path) -> bool:
    """Compares the checkpoint at `path` with the references asked for, else the tiny model, the bundled one and every
    reference there is; says what is missing. Whether all that was compared agrees.
    """
    from checkpoint import read_checkpoint

    results = [] if asked else [check_conformance(), check_bundled()]
    references = asked or found_references()
    if not references:
        print("The course's reference outputs are not here; python fetch_data.py references brings them (1 MB).")
    # Who names a file wants it: only a default that is not there is passed over.
    if asked or path != DEFAULT_CHECKPOINT or path.exists():
        checkpoint = read_checkpoint(path)
        return all([*results, *(check_reference(reference, checkpoint) for reference in references)])
    print(f"The course's checkpoint {path} is not here; python fetch_data.py checkpoint brings it (167 MB).")
    for reference in references:
        causal = is_causal(read_reference(reference)["hidden_states"])
        print(
            f"{reference} ({'causal' if causal else 'bidirectional'} attention)\n    not compared, for want of {path}"
        )
    return all(results)


def found_references() -> list[Path]:
    """The course's reference files, where fetch_data.py and the course itself put them."""
    places = [*sorted((HERE / "data" / "reference").glob("sanity_check*.data")), Path("sanity_check.data").absolute()]
    return [Path(os.path.relpath(place)) for place in places if place.exists()]


def compare(name: str, convention: str, tolerance: Tolerance, pairs: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Prints the largest difference of each (got, wanted) pair, and whether all stay within the tolerance."""
    import torch

    atol, rtol = tolerance
    agrees = all(torch.allclose(got, wanted, atol=atol, rtol=rtol) for got, wanted in pairs.values())
    differences = ", ".join(f"{what} {(got - wanted).abs().max():.1e}" for what, (got, wanted) in pairs.items())
    allowed = f"{atol:g}" + (f" + {rtol:g} of the value" if rtol else "")
    print(f"{name} ({convention})")
    print(f"    {'agrees' if agrees else 'DIFFERS'}: largest difference of {differences}; allowed {allowed}")
    return agrees


def check_conformance() -> bool:
    """The tiny model of tests/conformance against what a course-conforming implementation computed with it."""
    import torch

    from files import read_torch
    from llama import load_pretrained

    expected = read_torch(CONFORMANCE / "course_tiny_expected.pt")
    # The file says nothing of it, but its greedy tokens continue a prefix just as logits over the whole row foretell.
    model = load_pretrained(CONFORMANCE / "course_tiny.pt", causal=True)
    with torch.no_grad():
        last, hidden = model(expected["ids"])
        logits, _ = model(expected["ids"], targets=expected["ids"])
    prompt = expected["ids"][:1, :5]
    greedy = model.generate(prompt, expected["greedy"].shape[1] - prompt.shape[1], temperature=0.0)
    pairs = {
        "last logits": (last, expected["logits_last"]),
        "all logits": (logits, expected["logits_all"]),
        "hidden states": (hidden, expected["hidden_states"]),
        "greedy tokens": (greedy, expected["greedy"]),
    }
    return compare("tests/conformance, a tiny model", model.config.convention, CONFORMING, pairs)


def check_bundled() -> bool:
    """The bundled model against what float64 NumPy computed with it; True, and a line that says so, where it is not
    here. False without comparing if the reference is missing or was made of another file.
    """
    import torch

    from llama import load_pretrained

    if not (HERE / BUNDLED).exists():
        print(f"The bundled model {BUNDLED} is not here; it comes with the project (git checkout {BUNDLED}).")
        return True
    remedy = "python tests/make_bundled_reference.py makes it anew"
    if not (HERE / BUNDLED_EXPECTED).exists():
        print(f"{BUNDLED}, the bundled model\n    NOT COMPARED: {BUNDLED_EXPECTED} is not here; {remedy}")
        return False
    expected, made_of = read_bundled_reference(HERE / BUNDLED_EXPECTED)
    if made_of != hashlib.sha256((HERE / BUNDLED).read_bytes()).hexdigest():
        print(
            f"{BUNDLED}, the bundled model\n    NOT COMPARED: {BUNDLED_EXPECTED} belongs to another model, "
            f"with SHA-256 {made_of[:12]}...; {remedy}"
        )
        return False
    model = load_pretrained(HERE / BUNDLED)
    ids, prompt = expected["ids"], expected["prompt"]
    with torch.no_grad():
        last, hidden = model(ids)
        logits, _ = model(ids, targets=ids)
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    greedy = model.generate(prompt[None], len(expected["greedy"]), temperature=0.0)[0, len(prompt) :]
    pairs = {
        "last logits": (last.squeeze(1), expected["logits_last"]),
        "hidden states": (hidden, expected["hidden_states"]),
        "log-probabilities": (log_probs, expected["log_probs"]),
        "greedy tokens": (greedy, expected["greedy"]),
    }
    return compare(f"{BUNDLED}, the bundled model", model.config.convention, BUNDLED_AGREES, pairs)


def read_bundled_reference(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors that tests/make_bundled_reference.py describes, and the SHA-256 of the model they were made of."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["model_sha256"]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or cut short; python tests/make_bundled_reference.py makes it anew"
        ) from error


def read_reference(path: Path) -> dict[str, Tensor]:
    """{"logits": (2, 1, V), "hidden_states": (2, 8, D)}. Raises ValueError for anything else."""
    import torch

    from files import is_dense, read_torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such reference file; python fetch_data.py references brings the course's")
    content: Any = read_torch(path)
    names = ("logits", "hidden_states")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), torch.Tensor) for name in names):
        raise ValueError(f"{path} is no reference file; one holds the tensors {' and '.join(names)}")
    rows, length = torch.tensor(REFERENCE_IDS).shape
    for name, sizes, wanted in (("logits", (rows, 1), "V"), ("hidden_states", (rows, length), "D")):
        tensor = content[name]
        if not is_dense(tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is sparse, has no data or no real numbers; save it dense, as float32")
        if tensor.dim() != 3 or tuple(tensor.shape[:2]) != sizes or not tensor.numel():
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}; it must be ({sizes[0]}, {sizes[1]}, {wanted}), "
                "what a model computes for the course's two rows of ids"
            )
    return {name: content[name].float() for name in names}


def is_causal(hidden: Tensor) -> bool:
    """Whether hidden states (2, 8, D) of REFERENCE_IDS were made with a causal mask: with one, what follows cannot tell
    the rows' equal beginnings apart.
    """
    import torch

    return torch.allclose(hidden[0, :SHARED], hidden[1, :SHARED], atol=COURSE.absolute, rtol=COURSE.relative)


def norm_of(hidden: Tensor, norm_weight: Tensor) -> str:
    """The norm that hidden states (2, 8, D) left as the last: a LayerNorm with zero bias, once its weight is divided
    out, gives a state of mean zero; an RMSNorm leaves the mean where it was.

    Without the weight it cannot be told: some weight gives all of the few states mean zero. For the course's RMSNorm
    file of 2024 one does whose features differ by no more than a factor of 1.5.
    """
    kept = norm_weight.abs() > 1e-3 * norm_weight.abs().max()  # a feature scaled to nothing cannot be scaled back
    normed = hidden[..., kept] / norm_weight[kept]
    return "layernorm" if normed.mean(-1).abs().max() < 1e-3 else "rmsnorm"


def check_reference(path: Path, checkpoint: Checkpoint) -> bool:
    """One of the course's reference files against the checkpoint, under the file's own convention."""
    import torch

    from llama import llama_from_checkpoint

    wanted = read_reference(path)
    rows, length = torch.tensor(REFERENCE_IDS).shape
    sizes = {"logits": (rows, 1, checkpoint.config.vocab_size), "hidden_states": (rows, length, checkpoint.config.dim)}
    for name, size in sizes.items():
        if tuple(wanted[name].shape) != size:
            raise ValueError(
                f"{path}: {name} is {tuple(wanted[name].shape)}, {checkpoint.path} computes {size}; "
                "give the --pretrained-model-path of the model that the reference was made with"
            )
    norm = norm_of(wanted["hidden_states"], checkpoint.complete_state(checkpoint.config)["norm.weight"])
    model = llama_from_checkpoint(checkpoint, norm=norm, causal=is_causal(wanted["hidden_states"]))
    with torch.no_grad():
        logits, hidden = model(torch.tensor(REFERENCE_IDS))
    pairs = {"logits": (logits, wanted["logits"]), "hidden states": (hidden, wanted["hidden_states"])}
    return compare(str(path), model.config.convention, COURSE, pairs)


if __name__ == "__main__":
    sys.exit(main())
