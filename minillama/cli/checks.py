"""The checks of run_llama.py's options that need no more than them, and the files that they name. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from minillama.cli.flags import (
    ADAPTER_FORMATS,
    CORPUS_ENDINGS,
    FILTERS,
    FOLDER_FORMATS,
    LORA_VARIANTS,
    NEW_MODEL,
    OF_GENERATE,
    OPTIONS_FROM_FINE_TUNED,
    OUTPUT_ENDINGS,
    PARTS,
    REGULARIZERS,
    TRAINING,
    used_by,
)
from minillama.cli.options import best_model_path, changed, curve_picture, text_and_weight, writes_two_files
from minillama.formats.names import RUN_FILES, RUNS, path_and_fold, tokenizer_beside


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other; needs no torch and touches no file."""
    check_paths(args)
    if args.use_gpu and args.device and not args.device.startswith("cuda"):
        raise ValueError(f"--use_gpu contradicts --device {args.device}; give one of them")
    check_belonging(args)
    if args.option == "report":
        if not args.report_out.endswith(".html"):
            raise ValueError(f"--report_out is {args.report_out}; the name of a page must end in .html")
        return
    if args.option == "convert":
        if args.to in ADAPTER_FORMATS and args.adapter is None:
            raise ValueError(f"--to {args.to} writes an adapter; say which with --adapter")
        return
    check_prompt(args)
    if args.option in ("wise_ft", "classify"):
        check_fine_tuned(args)
        return
    check_regularizers(args)
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat")
    if args.option == "generate":
        check_generation(args)
        return
    parted = args.option in TRAINING and (args.micro_batch_size or args.batch_size) < args.batch_size
    if args.option in OUTPUT_ENDINGS and args.pooling == "last_column" and (parted or args.processes > 1):
        raise ValueError(
            "--pooling last_column reads the padding of a whole batch, so a batch cannot be parted: leave out "
            "--micro_batch_size, and run one process"
        )
    if args.fsdp and args.dtype == "fp16":
        raise ValueError("--fsdp does not go with --dtype fp16 (each shard would judge its scale alone); give bf16")
    if args.option in TRAINING and args.min_lr > args.lr:
        raise ValueError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}; it must not be")
    if args.option in ("pretrain", "perplexity", "tokenizer"):
        if not args.corpus:
            raise ValueError(f"--option {args.option} needs --corpus: text files, or folders of them")
        if args.option != "pretrain" and any(text_and_weight(text)[1] != 1.0 for text in args.corpus):
            raise ValueError(f"--option {args.option} reads each text once; leave out the weights of --corpus")
        return
    if args.option == "sft":
        if not (args.train and args.dev):
            raise ValueError(
                f"--train is {args.train} and --dev {args.dev}; --option sft needs both, or none for the demo"
            )
        check_outputs_differ(args)
        return
    ending = OUTPUT_ENDINGS[args.option]
    for option, path, split in (("--dev_out", args.dev_out, "dev"), ("--test_out", args.test_out, "test")):
        if not path.endswith(f"{split}-{ending}"):
            raise ValueError(f"{option} is {path}; for --option {args.option} its name must end in {split}-{ending}")
    if Path(args.dev_out).resolve() == Path(args.test_out).resolve():
        raise ValueError(f"--dev_out and --test_out are both {args.dev_out}; give two files")


def check_paths(args: argparse.Namespace) -> None:
    """Raises ValueError if a file is to be read and written, or would be written where it is in the way."""
    clashes = {str(Path(path).resolve()) for path in input_files(args)}
    folders = {Path(path).resolve() for path in (args.pretrained_model_path, args.adapter, args.tokenizer) if path}
    for path in output_files(args):
        if around := folders & set(Path(path).resolve().parents):
            raise ValueError(f"{path} lies in {around.pop()}, which is read; write it elsewhere")
        if str(Path(path).resolve()) in clashes:
            raise ValueError(f"{path} is to be read and to be written; give another name for what is written")
    for text in args.corpus:
        folder = Path(text_and_weight(text)[0]).resolve()
        for path in output_files(args):
            inside = folder in Path(path).resolve().parents
            if inside and Path(path).suffix.lower() in CORPUS_ENDINGS:
                raise ValueError(f"{path} would be one of the texts of --corpus {text}; write it elsewhere")
        if args.option == "pretrain" and folder in Path(args.run_dir or RUNS, "a").resolve().parents:
            raise ValueError(
                f"the run's folder, {args.run_dir or RUNS}, lies in --corpus {text}, and its log would be one of the "
                "texts; give the texts a folder of their own, or a --run_dir elsewhere"
            )
    if args.run_dir is not None:
        for path in output_files(args):
            if Path(path).resolve().parent == Path(args.run_dir).resolve() and Path(path).name in RUN_FILES:
                raise ValueError(f"{path} is a file of the run's own; give another name")


def check_belonging(args: argparse.Namespace) -> None:
    """Raises ValueError for what is of another --option; what is merely without effect, the header tells."""
    users = used_by()
    for name in changed(args, "run_dir", "fsdp", *OF_GENERATE, *REGULARIZERS):
        if args.option not in users[name]:
            raise ValueError(f"--{name} belongs to --option {', '.join(users[name])}; leave it out for {args.option}")
    for name in NEW_MODEL:
        if getattr(args, name) and args.option != "pretrain":
            raise ValueError(
                f"--{name} is of a new model, and a checkpoint says its own; leave it out for --option {args.option}"
            )
    if args.quantize is not None and args.option not in ("generate", "perplexity"):
        raise ValueError(f"--quantize is for a model that only runs; leave it out for --option {args.option}")
    of_lora = args.option == "lora" or (args.option == "sft" and args.lora_rank)
    for name in changed(args, *LORA_VARIANTS) if not of_lora else ():
        if args.option == "sft":
            raise ValueError(f"--{name} is of LoRA, and all weights would be trained; add --lora_rank 4")
        raise ValueError(f"--{name} belongs to --option lora; leave it out for {args.option}")
    if args.adapter is not None and args.option in (*TRAINING, "tokenizer", "wise_ft", "classify"):
        raise ValueError(f"--adapter is for a model that is run or converted; leave it out for --option {args.option}")


def check_regularizers(args: argparse.Namespace) -> None:
    """Raises ValueError for regularizers that cannot work here, or parts of one that is off."""
    given = changed(args, *REGULARIZERS)
    for other in ("fsdp", "compile"):
        if given and getattr(args, other):
            raise ValueError(f"--{given[0]} does not go with --{other}, which allows one pass a step; leave one out")
    for name in changed(args, *PARTS):
        if not getattr(args, PARTS[name]):
            raise ValueError(f"--{name} is a part of --{PARTS[name]}, which is off; add --{PARTS[name]} 1")


def check_fine_tuned(args: argparse.Namespace) -> None:
    """Raises ValueError for options of wise_ft or classify that contradict each other."""
    if not args.finetuned:
        raise ValueError(f"--option {args.option} needs --finetuned, the file that finetune or lora wrote")
    if args.norm is not None or args.attention is not None:
        raise ValueError("--norm and --attention are those that the model was fine-tuned with; leave them out")
    if args.option == "classify":
        check_prompts(args)
        if not changed(args, "prompt", "prompt_file", "interactive"):
            raise ValueError(
                "--option classify needs a sentence: --prompt TEXT, --prompt_file FILE (-: what is piped in), or "
                "--interactive"
            )
        return
    if not args.curve_out.endswith(".csv"):
        raise ValueError(f"--curve_out is {args.curve_out}; the name of the table must end in .csv")
    for name in ("ood_classes", "ood_label_names"):
        if len(getattr(args, name)) not in (0, 1, len(args.ood)) or (getattr(args, name) and not args.ood):
            raise ValueError(
                f"--{name} has {len(getattr(args, name))} values for {len(args.ood)} files of --ood; give one for "
                "all, or one for each"
            )
    check_outputs_differ(args)


def check_outputs_differ(args: argparse.Namespace) -> None:
    """Raises ValueError if a file would be written twice."""
    files = [Path(path).resolve() for path in output_files(args) if Path(path).resolve() != Path(os.devnull)]
    if len(set(files)) < len(files):
        raise ValueError(f"two of {', '.join(output_files(args))} are one file; give each its own name")


def refuse(names: list[str], why: str) -> None:
    """Raises ValueError if there are any."""
    if names:
        raise ValueError(f"{why}; leave out --{names[0]}")


def check_prompts(args: argparse.Namespace) -> None:
    """Raises ValueError if texts are asked for in two ways."""
    if args.interactive:
        together = ("json",) if args.option == "generate" else ()
        refuse(
            changed(args, "prompt", "prompt_file", *together, "explain", "num_samples"),
            "--interactive asks for prompts and answers each as it comes",
        )
    if args.prompt_file is not None:
        refuse(changed(args, "prompt"), "--prompt_file has the prompts")


def check_generation(args: argparse.Namespace) -> None:
    """Raises ValueError for options of generate that contradict each other or would have no effect."""
    check_prompts(args)
    if args.explain is not None:
        refuse(
            changed(args, "json", "prompt_file", "num_samples", "decoder"), "--explain shows how one text was sampled"
        )
        if args.explain and not args.explain.endswith(".html"):
            raise ValueError(f"--explain {args.explain}: the page's name must end in .html")
    if not writes_two_files(args):
        cause, *_ = changed(
            args, "temperature", "decoder", "prompt_file", "interactive", "json", "num_samples", "explain"
        )
        refuse(
            changed(args, "generated_sentence_low_temp_out", "generated_sentence_high_temp_out"),
            f"with --{cause} the two texts, at temperature 0 and at 1, and their files are not made",
        )
    if "" in args.stop:
        raise ValueError("--stop has an empty text, which would end everything at once; leave it out")
    belongs = {"beams": "beam", "length_penalty": "beam", "contrast": "contrastive"}
    for name, decoder in belongs.items():
        if args.decoder != decoder:
            refuse(changed(args, name), f"--{name} is for --decoder {decoder}")
    if args.decoder == "lookup":
        refuse(changed(args, "repetition_penalty"), "--decoder lookup has no repetition penalty")
    draws = args.temperature != 0 and args.decoder in ("sample", "lookup")
    if not draws:
        what = f"--decoder {args.decoder}" if args.decoder in ("beam", "contrastive") else "temperature 0"
        allowed = {"top_k"} if args.decoder == "contrastive" else set()
        allowed |= {"epsilon"} if args.epsilon == 0 else set()  # which cuts nothing
        names = [name for name in (*FILTERS, "num_samples", "epsilon") if name not in allowed]
        refuse(changed(args, *names), f"{what} draws nothing")
    if args.decoder in ("beam", "contrastive"):
        refuse(changed(args, "temperature") if args.temperature else [], f"--decoder {args.decoder} draws nothing")
        refuse(changed(args, "repetition_penalty"), f"--decoder {args.decoder} has no repetition penalty")
    low, high = args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out
    if Path(low).resolve() == Path(high).resolve() and Path(low).resolve() != Path(os.devnull):
        raise ValueError(f"both generated sentences would go to {low}; give two files")


def check_prompt(args: argparse.Namespace) -> None:
    """Raises ValueError for a template that cannot be filled, or options of prompt where they have no meaning."""
    asks = args.option == "prompt" or (args.option in ("finetune", "lora") and args.head == "prompt")
    given = changed(args, "template", "label_words", "calibrate")
    for name in given:
        if not (args.option == "prompt" if name == "calibrate" else asks):
            also = "" if name == "calibrate" else " and to --head prompt of finetune and lora"
            raise ValueError(f"--{name} belongs to --option prompt{also}; leave it out for {args.option}")
    if "calibrate" in given and args.pooling == "last_column":
        raise ValueError(
            "--pooling last_column reads most rows at their padding, which a prompt without content has not: leave "
            f"out --calibrate {args.calibrate}, or --pooling"
        )
    fields = re.findall(r"\{\w*\}", args.template)
    if unknown := set(fields) - {"{sentence}", "{labels}"}:
        raise ValueError(f"--template has {min(unknown)}; it takes {{sentence}} and {{labels}}")
    if fields.count("{sentence}") != 1:
        raise ValueError(f"--template {args.template!r} must have {{sentence}} once, where a row's sentence goes")


def input_files(args: argparse.Namespace) -> list[str]:
    """Every file that the run reads, as far as the options tell."""
    new = args.option == "tokenizer" or (args.option == "pretrain" and not args.continued)
    named = [
        args.config,
        args.tokenizer,
        args.adapter,
        args.prompt_file,
        *([args.finetuned] if args.option in OPTIONS_FROM_FINE_TUNED else []),
        *([] if new else [args.pretrained_model_path]),
    ]
    if args.option in OUTPUT_ENDINGS:
        named += [path_and_fold(path)[0] for path in (args.train, args.dev, args.test)] + [args.label_names]
    if args.option == "sft":
        named += [args.train, args.dev, args.test]
    if args.option == "wise_ft":
        named += [path_and_fold(path)[0] for path in (args.dev, args.test, *args.ood) if path]
        named += [args.label_names, *args.ood_label_names]
    return [path for path in named if path] + [text_and_weight(text)[0] for text in args.corpus]


def output_files(args: argparse.Namespace) -> list[str]:
    """Every file that the run will write, beside its folder."""
    if args.option == "generate":
        both = [args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out]
        return both if writes_two_files(args) else [args.explain] if args.explain else []
    if args.option in ("pretrain", "sft", "tokenizer", "convert"):
        if not args.model_out:
            raise ValueError(f"--option {args.option} needs --model_out, the file to write")
        if args.option == "convert" and args.to in FOLDER_FORMATS:
            return []  # a folder, made anew
        if args.option == "convert" and args.to != "safetensors":
            return [args.model_out]
        beside = tokenizer_beside(args.model_out)
        if args.option != "tokenizer" and beside == str(Path(args.model_out)):
            raise ValueError(
                f"--model_out {args.model_out} is where its tokenizer would go; let it end in .safetensors"
            )
        stays = args.option == "tokenizer" or (
            args.tokenizer and Path(args.tokenizer).resolve() == Path(beside).resolve()
        )
        answers = [args.dev_out, *([args.test_out] if args.test else [])] if args.option == "sft" else []
        return [args.model_out, *([] if stays else [beside]), *answers]
    if args.option == "report":
        return [args.report_out]
    if args.option in ("perplexity", "classify"):
        return []
    if args.option == "wise_ft":
        named = [args.curve_out, curve_picture(args), args.model_out, args.dev_out, args.test_out]
        return [path for path in named if path]
    return [args.dev_out, args.test_out, *([best_model_path(args)] if args.option != "prompt" else [])]
