"""PyTorch's side of `step_time.py`: GPT-2 of Transformers, compiled, a step for each line on stdin.

    python benchmarks/torch_gpt2.py FOLDER LEARNING_RATE WEIGHT_DECAY CLIP_NORM

Reads `weights.npz` (names of `bare.py`) once and `batch.npz` before each step from FOLDER; answers
with a JSON line. Not started by hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave the processors to others

import numpy as np
import torch  # type: ignore[import-not-found]
from transformers import GPT2Config, GPT2LMHeadModel


def load(weights: dict[str, np.ndarray]) -> Any:
    """The model with these weights, without dropout."""
    (vocab, embed), length = weights["w_vocab"].shape, len(weights["w_position"])
    layers, _, mlp = weights["blocks.w_up"].shape
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=length,
        n_embd=embed,
        n_layer=layers,
        n_head=int(weights["heads"]),
        n_inner=mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    state = {
        "wte.weight": weights["w_vocab"],
        "wpe.weight": weights["w_position"],
        "ln_f.weight": weights["gain"],
        "ln_f.bias": weights["bias"],
    }
    names = {
        "ln_1.weight": ("norm1_gain", (embed,)),
        "ln_1.bias": ("norm1_bias", (embed,)),
        "attn.c_attn.weight": ("w_qkv", (embed, 3 * embed)),
        "attn.c_attn.bias": ("b_qkv", (3 * embed,)),
        "attn.c_proj.weight": ("w_out", (embed, embed)),
        "attn.c_proj.bias": ("b_out", (embed,)),
        "ln_2.weight": ("norm2_gain", (embed,)),
        "ln_2.bias": ("norm2_bias", (embed,)),
        "mlp.c_fc.weight": ("w_up", (embed, mlp)),
        "mlp.c_fc.bias": ("b_up", (mlp,)),
        "mlp.c_proj.weight": ("w_down", (mlp, embed)),
        "mlp.c_proj.bias": ("b_down", (embed,)),
    }
    for i in range(layers):
        for theirs, (ours, shape) in names.items():
            state[f"h.{i}.{theirs}"] = weights[f"blocks.{ours}"][i].reshape(shape)
    arrays = {
        f"transformer.{name}": torch.from_numpy(array.copy()) for name, array in state.items()
    }
    left = model.load_state_dict(arrays, strict=False)
    assert not left.unexpected_keys, left
    assert left.missing_keys in ([], ["lm_head.weight"]), left  # tied
    return model.train()


def main() -> None:
    folder, (rate, decay, clip) = Path(sys.argv[1]), map(float, sys.argv[2:])
    with np.load(folder / "weights.npz") as file:
        model = load(dict(file))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @torch.compile
    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    for _ in sys.stdin:
        with np.load(folder / "batch.npz") as file:
            tokens, targets = (
                torch.from_numpy(file[name]).long() for name in ("tokens", "targets")
            )
        wall, processors = time.perf_counter(), time.process_time()
        loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        wall, processors = time.perf_counter() - wall, time.process_time() - processors
        print(json.dumps({"loss": loss.item(), "wall": wall, "processors": processors}), flush=True)


if __name__ == "__main__":
    main()
