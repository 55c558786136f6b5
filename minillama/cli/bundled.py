"""Bundled files of data/, which replace missing default files. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minillama.cli.data_files import complete, is_courses, prediction_file
from minillama.cli.header import display_path, report
from minillama.cli.options import Options
from minillama.cli.provenance import BUNDLED_CLASSIFIER, BUNDLED_MODEL
from minillama.environment import HERE

DEMO_DATA = {
    "train": "demo-train.txt",
    "dev": "demo-dev.txt",
    "test": "demo-test.txt",
    "label_names": "demo-label-mapping.json",
}


def use_bundled_model(options: Options) -> Options:
    """The options, with the bundled model if the default checkpoint is missing."""
    path = options.pretrained_model_path
    if "pretrained_model_path" in options.typed or Path(path).exists():
        return options
    bundled = display_path(BUNDLED_MODEL)
    report(f"using the bundled model, {bundled} (python fetch_data.py downloads the course's {path})")
    return substitute(options, pretrained_model_path=bundled)


def use_bundled_classifier(options: Options) -> Options:
    """The options, with the bundled classifier, if there is one, and no fine-tuned model is named."""
    if options.finetuned is not None or not BUNDLED_CLASSIFIER.exists():
        return options
    bundled = display_path(BUNDLED_CLASSIFIER)
    report(f"using the bundled classifier of opinions, {bundled} (--finetuned names another)")
    return substitute(options, finetuned=bundled)


def use_demo_data(options: Options, files: dict[str, str]) -> Options:
    """The options with files of data/ instead of the default ones. files: maps a flag to a file name in data/."""
    paths = {name: display_path(HERE / "data" / file) for name, file in files.items()}
    return substitute(options, **paths)


def substitute(options: Options, **paths: str) -> Options:
    return options.replace(**paths, substituted=[*options.substituted, *paths])


def use_bundled_rows(options: Options, ending: str, reads: Sequence[str] = tuple(DEMO_DATA)) -> Options:
    """The options of prompt, finetune or lora. The bundled model and the demo data replace missing default files.
    Prediction files of lines get default names that end in `ending`. reads: the data flags that the command needs.
    """
    options = use_bundled_model(options)
    typed = options.typed
    missing = [getattr(options, name) for name in reads if not Path(getattr(options, name)).exists()]
    demo = bool(missing) and not any(name in typed for name in DEMO_DATA)
    if demo:
        folder = display_path(HERE / "data")
        report(f"using the demo data, {folder}/demo-* (python fetch_data.py downloads the course's {missing[0]})")
        options = use_demo_data(options, DEMO_DATA)
    options = options if demo else complete(options, reads)
    course = demo or not any(name in typed for name in ("train", "dev", "test"))
    default = {
        f"{split}_out": f"{'demo' if demo else 'cfimdb'}-{split}-{ending}"
        if course or (split not in typed and is_courses(getattr(options, split) or ""))
        else prediction_file(options, split, ending)
        for split in ("dev", "test")
    }
    return options.replace(**{name: path for name, path in default.items() if name not in typed})
