"""PyTorch's side of `generation.py`: GPT-2 of Transformers, a text for each line on stdin.

    python benchmarks/torch_generation.py FOLDER THREADS

FOLDER has the checkpoint and `prompts.npy`. A line is how many tokens to generate greedily with the
cache; the answer is a JSON line. Not started by hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave the processors to others

import numpy as np
import torch  # type: ignore[import-not-found]
import transformers


def main() -> None:
    """Loads, then answers."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompts = torch.from_numpy(np.load(folder / "prompts.npy")).long()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        since = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                use_cache=True,
                max_new_tokens=int(line),
            )
        seconds = time.perf_counter() - since
        tokens = out[:, prompts.shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
