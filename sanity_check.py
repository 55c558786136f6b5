"""Compares the model's outputs with references: the course's, a tiny model's, and the bundled model's.

examples:
  python sanity_check.py                                    all references that exist
  python sanity_check.py --pretrained-model-path my.pt      the course's references with another copy of its model
  python sanity_check.py sanity_check.data                  only this reference file

The course's editions differ in norm and attention. Both are detected from the reference file and replace the
checkpoint's own. Everything is computed in float32 on the CPU. The last line is the verdict.

Exit code: 0 if all compared references agree; 1 if one differs, or if the bundled reference belongs to another model;
2 for a file that cannot be used; 3 with --strict if a reference was not compared.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillama.cli.parser import OneLineParser
from minillama.environment import file_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from minillama.formats.checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
CONFORMANCE = HERE / "tests" / "conformance"
# The bundled model, and its outputs in float64, made by tests/make_bundled_reference.py.
BUNDLED = Path("data/mini-llama.safetensors")
BUNDLED_EXPECTED = Path("tests/conformance/bundled_expected.safetensors")
# The inputs of the course's references. The rows share their first ids, which reveals a causal mask.
REFERENCE_IDS = [[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]]
SHARED = 2  # ids that both rows begin with
DEFAULT_CHECKPOINT = Path("stories42M.pt")
REFERENCES = Path("data/reference")
COURSE_REFERENCES = tuple(f"sanity_check_{edition}.data" for edition in ("2024", "fall2025", "spring2026"))


class Check(NamedTuple):
    """The result for one reference. agrees: also True for a missing one. not_compared: the reason, if any."""

    name: str
    agrees: bool
    not_compared: str = ""


# Differences allowed: atol + rtol * |wanted|.
COURSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-3}  # the course's own
CONFORMING: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}  # float32, summed in another order, for logits of up to 30
BUNDLED_AGREES: dict[str, Any] = {"atol": 3e-5, "rtol": 0.0}  # ten times float32's error of 2.6e-6, for logits up to 9


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = OneLineParser(prog="sanity_check.py", description=__doc__)
    references = "reference files to compare with (default: data/reference/sanity_check*.data, ./sanity_check.data, "
    references += "the tiny model of tests/conformance, and the bundled model)"
    model = "the course's checkpoint (default: %(default)s)"
    parser.add_argument("references", nargs="*", type=Path, metavar="REFERENCE", help=references)
    parser.add_argument("--pretrained-model-path", type=Path, default=DEFAULT_CHECKPOINT, metavar="FILE", help=model)
    parser.add_argument("--strict", action="store_true", help="exit with 3 if a reference was not compared")
    args = parser.parse_args(argv)
    try:
        checks = run(args.references, args.pretrained_model_path)
    except (ValueError, OSError) as error:
        print(f"sanity_check.py: error: {error}", file=sys.stderr)
        return 2
    print(verdict(checks))
    if not all(check.agrees for check in checks):
        return 1
    return 3 if args.strict and any(check.not_compared for check in checks) else 0


def verdict(checks: list[Check]) -> str:
    """The last line: `5 of 8 references compared, all agree; 3 not compared: stories42M.pt is missing`."""
    compared = [check for check in checks if not check.not_compared]
    differ = [check.name for check in compared if not check.agrees]
    agreement = f"{len(differ)} DIFFER: {', '.join(differ)}" if differ else "all agree"
    reasons = Counter(check.not_compared for check in checks if check.not_compared)
    parts = [f"{len(compared)} of {len(checks)} references compared" + (f", {agreement}" if compared else "")]
    return "; ".join([*parts, *(f"{count} not compared: {reason}" for reason, count in reasons.items())])


def run(asked: list[Path], path: Path) -> list[Check]:
    """Compares the checkpoint at `path` with the references in `asked`, or with all; prints each comparison."""
    from minillama.formats.checkpoint import read_checkpoint

    checks = [] if asked else [check_conformance(), check_bundled()]
    references = asked or course_references()
    there = [reference for reference in references if asked or reference.exists()]
    if len(there) < len(references):
        print("The course's reference outputs are missing; python fetch_data.py references brings them (1 MB).")
    # A missing file is an error if it was named on the command line.
    has_model = bool(asked) or path != DEFAULT_CHECKPOINT or path.exists()
    if not has_model:
        print(f"The course's checkpoint {path} is missing; python fetch_data.py checkpoint brings it (167 MB).")
    checkpoint = read_checkpoint(path) if has_model else None
    for reference in references:
        if checkpoint is not None and reference in there:
            checks.append(check_reference(reference, checkpoint))
            continue
        if reference in there:
            causal = is_causal(read_reference(reference)["hidden_states"])
            print(f"{reference} ({'causal' if causal else 'bidirectional'} attention)")
            print(f"    not compared: {path} is missing")
        missing = [] if reference in there else [str(REFERENCES)]
        missing += [] if has_model else [str(path)]
        verb = "are" if len(missing) > 1 else "is"
        checks.append(Check(str(reference), True, f"{' and '.join(missing)} {verb} missing"))
    return checks


def course_references() -> list[Path]:
    """The course's reference files: those of fetch_data.py, even if missing, and ./sanity_check.data if it exists."""
    places = {HERE / REFERENCES / name for name in COURSE_REFERENCES}
    places |= set((HERE / REFERENCES).glob("sanity_check*.data"))
    own = Path("sanity_check.data").absolute()
    return [Path(os.path.relpath(place)) for place in (*sorted(places), *([own] if own.exists() else []))]


def compare(name: str, convention: str, allowed: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> Check:
    """Prints the largest difference of each (got, wanted) pair, and whether all are within the tolerance `allowed`."""
    import torch

    agrees = all(torch.allclose(got, wanted, **allowed) for got, wanted in pairs.values())
    differences = ", ".join(f"{what} {(got - wanted).abs().max():.1e}" for what, (got, wanted) in pairs.items())
    limit = f"{allowed['atol']:g}" + (f" + {allowed['rtol']:g} of the value" if allowed["rtol"] else "")
    print(f"{name} ({convention})")
    print(f"    {'agrees' if agrees else 'DIFFERS'}: largest difference of {differences}; allowed {limit}")
    return Check(name, agrees)


def check_conformance() -> Check:
    """Compares the tiny model of tests/conformance with the outputs of another implementation of the course."""
    import torch

    from llama import load_pretrained
    from minillama.formats.files import read_torch

    expected = read_torch(CONFORMANCE / "course_tiny_expected.pt")
    # The file does not say that it is causal, but its greedy tokens agree with the logits over the whole row.
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


def check_bundled() -> Check:
    """Compares the bundled model with its outputs in float64. Disagrees if these are missing or of another model."""
    import torch

    from llama import load_pretrained
    from minillama.formats.files import read_safetensors, safetensors_metadata

    name = f"{BUNDLED}, the bundled model"
    if not (HERE / BUNDLED).exists():
        print(f"The bundled model {BUNDLED} is missing; it comes with the project (git checkout {BUNDLED}).")
        return Check(name, True, f"{BUNDLED} is missing")
    remedy = "python tests/make_bundled_reference.py makes it again"
    if not (HERE / BUNDLED_EXPECTED).exists():
        print(f"{name}\n    NOT COMPARED: {BUNDLED_EXPECTED} is missing; {remedy}")
        return Check(name, False, f"{BUNDLED_EXPECTED} is missing")
    expected = read_safetensors(HERE / BUNDLED_EXPECTED)
    model_sha256 = safetensors_metadata(HERE / BUNDLED_EXPECTED).get("model_sha256")
    if model_sha256 is None:
        raise ValueError(f"{BUNDLED_EXPECTED} is damaged or cut short; {remedy}")
    if model_sha256 != file_sha256(HERE / BUNDLED):
        reason = f"{BUNDLED_EXPECTED} belongs to another model"
        print(f"{name}\n    NOT COMPARED: {reason}, with SHA-256 {model_sha256[:12]}...; {remedy}")
        return Check(name, False, reason)
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
    return compare(name, model.config.convention, BUNDLED_AGREES, pairs)


def read_reference(path: Path) -> dict[str, Tensor]:
    """{"logits": (2, 1, V), "hidden_states": (2, 8, D)}. Raises ValueError for anything else."""
    import torch

    from minillama.formats.files import is_dense, read_torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such reference file; python fetch_data.py references brings the course's")
    content: Any = read_torch(path)
    names = ("logits", "hidden_states")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), torch.Tensor) for name in names):
        raise ValueError(f"{path} is not a reference file; one holds the tensors {' and '.join(names)}")
    rows, length = torch.tensor(REFERENCE_IDS).shape
    for name, sizes, wanted in (("logits", (rows, 1), "V"), ("hidden_states", (rows, length), "D")):
        tensor = content[name]
        if not is_dense(tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is sparse, has no data or no real numbers; save it dense, as float32")
        if tensor.dim() != 3 or tuple(tensor.shape[:2]) != sizes or not tensor.numel():
            shape = f"({sizes[0]}, {sizes[1]}, {wanted})"
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}; it must be {shape}, as for the course's ids")
    return {name: content[name].float() for name in names}


def is_causal(hidden: Tensor) -> bool:
    """Whether hidden states (2, 8, D) of REFERENCE_IDS are causal: the rows' equal first ids then have equal states."""
    import torch

    return torch.allclose(hidden[0, :SHARED], hidden[1, :SHARED], **COURSE)


def norm_of(hidden: Tensor, norm_weight: Tensor) -> str:
    """The kind of norm whose output is `hidden` (2, 8, D).

    The output of a LayerNorm with zero bias, divided by the weight, has mean zero. The output of an RMSNorm does not.
    """
    kept = norm_weight.abs() > 1e-3 * norm_weight.abs().max()  # division by other weights is inaccurate
    normed = hidden[..., kept] / norm_weight[kept]
    return "layernorm" if normed.mean(-1).abs().max() < 1e-3 else "rmsnorm"


def check_reference(path: Path, checkpoint: Checkpoint) -> Check:
    """Compares the checkpoint with a reference file of the course, using that file's norm and attention."""
    import torch

    from llama import llama_from_checkpoint

    wanted = read_reference(path)
    rows, length = torch.tensor(REFERENCE_IDS).shape
    sizes = {"logits": (rows, 1, checkpoint.config.vocab_size), "hidden_states": (rows, length, checkpoint.config.dim)}
    for name, size in sizes.items():
        if tuple(wanted[name].shape) != size:
            both = f"{name} is {tuple(wanted[name].shape)}, {checkpoint.path} computes {size}"
            raise ValueError(f"{path}: {both}; give the --pretrained-model-path of the reference's model")
    norm = norm_of(wanted["hidden_states"], checkpoint.complete_state(checkpoint.config)["norm.weight"])
    model = llama_from_checkpoint(checkpoint, norm=norm, causal=is_causal(wanted["hidden_states"]))
    with torch.no_grad():
        logits, hidden = model(torch.tensor(REFERENCE_IDS))
    pairs = {"logits": (logits, wanted["logits"]), "hidden states": (hidden, wanted["hidden_states"])}
    return compare(str(path), model.config.convention, COURSE, pairs)


if __name__ == "__main__":
    sys.exit(main())
