"""--option perplexity: measures how well a model predicts a text."""

from __future__ import annotations

import math

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.checks import check_corpus, text_and_weight
from minillama.cli.header import report
from minillama.cli.loading import check_causal, load_for_inference
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.parser import COUNT


def run(options: Options) -> None:
    """Prints the perplexity and the bits per byte of each text."""
    from minillama.decoding.fast_llama import fast_model
    from minillama.text.corpus import held_out_count
    from minillama.text.documents import read_documents, text_files
    from minillama.training.evaluation import score_documents

    files = {path: text_files(path, report) for path, _ in map(text_and_weight, options.corpus)}
    llama, tokenizer, device, dtype = load_for_inference(options)
    check_causal(llama)
    model = llama if options.quantize is None else fast_model(llama, quantize=options.quantize)
    context = llama.config.max_seq_len
    window = options.window or context
    stride = options.stride or max(1, window // 2)
    if window > context:
        raise ValueError(f"--window {window} is above the model's context of {context} tokens; give at most that")
    if stride > window:
        raise ValueError(
            f"--stride {stride} is above the window of {window} tokens and would skip some; give at most that"
        )
    report(f"windows     {window} tokens, one every {stride}")
    for path, found in files.items():
        documents = [document for file in found for document in read_documents(file)]
        if not documents:
            raise ValueError(f"{path} holds no text; give a file with text")
        if options.held_out:
            count = held_out_count(options.held_out, len(documents))
            if not 0 < count <= len(documents):
                raise ValueError(f"{path} has {len(documents)} documents, too few for --held_out {options.held_out:g}")
            documents = documents[-count:]
        ids = [[tokenizer.bos_id] * tokenizer.adds_bos + ids for ids in tokenizer.encode_many(documents)]
        nats, tokens = score_documents(model, ids, window, stride, dtype, device=device)
        size = sum(len(document.encode()) for document in documents)
        if not tokenizer.adds_bos:  # the first token of a document has no context and is not scored
            size -= sum(map(tokenizer.bytes_of_first, documents))
        if not tokens or not size:
            raise ValueError(f"{path}: every document has only one token, so nothing can be scored; give longer ones")
        perplexity = math.exp(min(nats / tokens, 700.0))
        print(
            f"{path}: {len(documents):,} document{'s' * (len(documents) != 1)}, {size:,} bytes, {tokens:,} tokens: "
            f"perplexity {perplexity:.3f}, bits per token {nats / tokens / math.log(2):.4f}, bits per byte "
            f"{nats / size / math.log(2):.4f}",
            flush=True,
        )


COMMAND = Command(
    "perplexity",
    "measure how well a model predicts a text",
    (
        Group(
            "texts",
            (
                flags.CORPUS,
                flags.HELD_OUT,
                flags.WINDOW,
                Flag("--stride N", "tokens between the starts of windows", COUNT, default_text="half the window"),
                flags.QUANTIZE,
            ),
        ),
        flags.MODEL,
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option perplexity --corpus README.md --pretrained-model-path data/mini-llama.safetensors
""",
    default_texts={"window": "the model's context"},
    resolve=use_bundled_model,
    check=check_corpus,
    only_prints=lambda options: True,
)
