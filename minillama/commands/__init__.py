"""The commands: one module for each value of --option, in the order of `--help`."""

from minillama.commands import (
    classify,
    convert,
    evaluate,
    finetune,
    generate,
    perplexity,
    pretrain,
    prompt,
    report,
    serve,
    sft,
    tokenizer,
    wise_ft,
)

COMMANDS = (
    generate.COMMAND,
    prompt.COMMAND,
    finetune.FINETUNE,
    finetune.LORA,
    classify.COMMAND,
    evaluate.COMMAND,
    pretrain.COMMAND,
    sft.COMMAND,
    perplexity.COMMAND,
    serve.COMMAND,
    tokenizer.COMMAND,
    convert.COMMAND,
    wise_ft.COMMAND,
    report.COMMAND,
)
