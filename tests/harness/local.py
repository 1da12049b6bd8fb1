"""A small checkpoint with a tokenizer, and tasks on disk with contexts longer than its model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from data.tokens import train_bpe
from tests.hf import synthetic
from tests.hf.parity import TEXT

# 8 heads and an inner width that tensor 4 divides; the longest sequence is 48 tokens.
GPT2 = replace(synthetic.GPT2, vocab_size=300, layers=2, max_length=48)
SIZES = {"vocab_size": 300, "layers": 2, "encoder_layers": 2, "max_length": 48}
# T5 1.0, one table for all.
T5 = replace(synthetic.T5, **SIZES, tied=True, head_scale=True, gated=False, activation="relu")
END, PAD = "<|end|>", "<pad>"


def checkpoint(path: Path, config=GPT2, biases: float = 4) -> Path:
    """A folder of random weights, large enough that tokens differ in probability.

    Biases are `biases` times as large as drawn: if they are large, one token is the likeliest after
    every text.

    The tokenizer of an encoder-decoder has a padding token, which its targets start with, and puts
    the end token after a text, as T5's.
    """
    drawn = synthetic.random_tensors(config).items()
    tensors = {n: (biases if n.endswith("bias") else 4) * a for n, a in drawn}
    synthetic.write_folder(path, config, tensors)
    pairs = config.family == "encoder_decoder"
    file = path / "tokenizer.json"
    train_bpe([TEXT[:20_000]], 290, file, (PAD,) if pairs else ())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if pairs:
        backend = Tokenizer.from_file(str(file))
        end, pad = backend.token_to_id(END), backend.token_to_id(PAD)
        backend.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
        backend.save(str(file))
        settings["pad_token"] = PAD
        keys = json.loads((path / "config.json").read_text())
        keys |= {"decoder_start_token_id": pad, "pad_token_id": pad, "eos_token_id": end}
        del keys["bos_token_id"]
        (path / "config.json").write_text(json.dumps(keys))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


MULTIPLE_CHOICE = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: data/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GENERATING = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: data/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: both
task: [choices, texts]
"""


def task_folder(path: Path, documents: int = 24) -> Path:
    """A multiple-choice task, one of rolling perplexity, one that generates, and a group."""
    (path / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        start = int(rng.integers(0, len(TEXT) - most))
        return " ".join(TEXT[start : start + int(rng.integers(least, most))].split())

    choices = [
        {
            # From a word to three times what the model reads; some end in a space.
            "question": text(12, 240) + " " * int(rng.integers(2)),
            "choices": [text(8, 40) for _ in range(3)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(documents)
    ]
    texts = [{"text": text(20, 600)} for _ in range(documents // 3)]
    for name, rows in (("choices", choices), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "data" / f"{name}.jsonl").write_text(lines)
    kinds = {"choices": MULTIPLE_CHOICE, "texts": ROLLING, "answers": GENERATING, "both": GROUP}
    for name, content in kinds.items():
        (path / f"{name}.yaml").write_text(content)
    return path
