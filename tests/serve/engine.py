"""vLLM's side of serve_check.py: `engine.py PART MODEL TOKENS OUT.json`, PART one of the keys of `PARTS`.

A process of its own per part. OUT.json is written whatever happens: a part that stops says where, in `stopped`.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: patches reach it, and its errors reach us
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

import deltanet
import torch
import vllm
from prompts import PROMPTS, TOP
from safetensors import safe_open
from vllm import LLM, SamplingParams

DRAFTS = 2
PARTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "mtp": {"dtype": "bfloat16", "speculative_config": {"method": "mtp", "num_speculative_tokens": DRAFTS}},
}


def engine(model: str, part: str) -> LLM:
    """vLLM as it comes, without the compiler (seconds instead of minutes) and with raw logits as its 'logprobs'."""
    options = {"max_model_len": 1024, "max_num_seqs": 4, "enable_prefix_caching": False, "seed": 0}
    return LLM(model, enforce_eager=True, logprobs_mode="raw_logits", disable_log_stats=False, **options, **PARTS[part])


def greedy(llm: LLM, tokens: int) -> list[dict[str, Any]]:
    """Per prompt its ids, those chosen and {id: logit} of the best; all prompts in one batch, as a server runs them."""
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP)
    return [
        {
            "prompt": list(done.prompt_token_ids or []),
            "tokens": list(done.outputs[0].token_ids),
            "logits": [
                {token: best.logprob for token, best in step.items()} for step in done.outputs[0].logprobs or []
            ],
        }
        for done in llm.generate(list(PROMPTS), wanted, use_tqdm=False)
    ]


def watch_drafter(folder: Path, record: dict[str, Any]) -> None:
    """Let `record` learn what vLLM's MTP model loads, at the moment it has loaded it (later steps repack weights)."""
    from vllm.model_executor.models.qwen3_next_mtp import Qwen3NextMTP

    load = Qwen3NextMTP.load_weights

    def watched(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load(self, weights)
        parameters = {name: value.detach() for name, value in self.named_parameters()}
        record["drafter"] = {
            "class": type(self).__name__,
            "parameters": len(parameters),
            "numel": sum(value.numel() for value in parameters.values()),
            "not_loaded": sorted(set(parameters) - loaded),
        } | compared(folder, parameters)
        return loaded

    Qwen3NextMTP.load_weights = watched


def compared(folder: Path, parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many `mtp.*` tensors of the files stand in the drafter bit for bit, each at rows of its own.

    Engines fuse (q, k, v; gate and up; all experts), but they stack whole tensors along rows: so a tensor of the file
    is looked for as a run of equal rows among parameters of its width.
    """
    taken: set[tuple[str, int]] = set()
    tensors, missing = 0, []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in (name for name in opened.keys() if name.startswith("mtp.")):  # noqa: SIM118 - not a dict
                tensors += 1
                if not _found(opened.get_tensor(name), parameters, taken=taken):
                    missing.append(name)
    return {"tensors_on_disk": tensors, "not_found": missing}


def _found(tensor: torch.Tensor, parameters: dict[str, torch.Tensor], *, taken: set[tuple[str, int]]) -> bool:
    rows = tensor.reshape(-1, tensor.shape[-1])
    for name, value in parameters.items():
        if value.shape[-1] != rows.shape[1]:
            continue
        flat = value.reshape(-1, rows.shape[1])
        starts = (flat == rows[0].to(flat.dtype)).all(dim=1).nonzero()[:, 0].tolist()
        for start in starts:
            if (name, start) not in taken and torch.equal(flat[start : start + len(rows)], rows.to(flat.dtype)):
                taken.add((name, start))
                return True
    return False


def counters(llm: LLM) -> dict[str, Any]:
    """vLLM's own counts of drafts: rounds, proposed, accepted, accepted per position."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): getattr(metric, "values", None) or getattr(metric, "value", None)
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_")
    }


def run(part: str, model: str, *, tokens: int, record: dict[str, Any]) -> None:
    """Fill `record` phase by phase, so that what was reached before an error stays known."""
    if part == "mtp":
        watch_drafter(Path(model), record)
    head = json.loads((Path(model) / "config.json").read_text()).get("linear_key_head_dim")
    if part == "float32":
        record["replaced"] = deltanet.compute_in_fp32()
    elif head not in deltanet.PREFILL_HEADS:
        record["replaced"] = deltanet.pad_prefill(head)
    record["phase"] = "starting the engine"
    llm = engine(model, part)
    record["phase"] = "generating"
    record["texts"] = greedy(llm, tokens)
    record["drafts"] = counters(llm)
    record["phase"] = "done"


def main() -> None:
    part, model, tokens, out = sys.argv[1:]
    record: dict[str, Any] = {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}}
    try:
        run(part, model, tokens=int(tokens), record=record)
    except Exception as problem:  # whatever stops the engine is the finding, and is passed on
        traceback.print_exc()
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno} in {frame.name}"
        record["stopped"] = f"{type(problem).__name__}: {problem} ({where})"
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
