"""Greedy tokens by transformers, the yardstick of serve_check.py: `reference.py MODEL DTYPE TOKENS OUT.json`.

A process of its own, so that neither library sees the other's patches and threads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from prompts import PROMPTS, TOP

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The prompt, `tokens` greedily chosen ids, and the best logits of each choice as {id: logit}.

    The argmax is taken here and not by `generate`, whose processors (end of text, minimum length) change logits.
    """
    step = model(torch.tensor([prompt]), use_cache=True)
    chosen, logits = [], []
    while True:
        best = step.logits[0, -1].float().topk(TOP)
        logits.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        chosen.append(int(step.logits[0, -1].argmax()))
        if len(chosen) == tokens:
            return {"prompt": prompt, "tokens": chosen, "logits": logits}
        step = model(torch.tensor([chosen[-1:]]), past_key_values=step.past_key_values, use_cache=True)


def main() -> None:
    folder, dtype, tokens, out = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    texts = [greedy(model, tokenizer.encode(text), int(tokens)) for text in PROMPTS]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(out).write_text(json.dumps({"versions": versions, "texts": texts}))


if __name__ == "__main__":
    main()
