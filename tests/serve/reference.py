"""Greedy tokens by transformers, the yardstick of serve_check.py: `reference.py DTYPE MODEL TOKENS OUT.json`.

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


@torch.inference_mode()
def noise(text: dict[str, Any], exact: Any) -> float:
    """How far the dtype alone moves transformers' logits on this text: the largest difference to fp32's."""
    given = text["prompt"] + text["tokens"][:-1]
    logits = exact(torch.tensor([given])).logits[0, len(text["prompt"]) - 1 :]
    steps = zip(logits, text["logits"], strict=True)
    return max(abs(float(exact_step[token]) - logit) for exact_step, best in steps for token, logit in best.items())


def main() -> None:
    dtype, folder, tokens, out = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, exact = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[name]).eval()
        for name in (dtype, "float32")
    )
    texts = [greedy(model, tokenizer.encode(text), int(tokens)) for text in PROMPTS]
    for text in texts:
        text["noise"] = noise(text, exact)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(out).write_text(json.dumps({"versions": versions, "texts": texts}))


if __name__ == "__main__":
    main()
