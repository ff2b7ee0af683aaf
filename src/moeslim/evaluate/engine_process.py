"""vLLM's side of `engine.py`, a process of its own: `engine_process.py ASKED.json ANSWER.json`; the only file that
knows the package.

It imports nothing of moeslim, so that the environment which vLLM needs for itself does not have to hold it.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

_CACHE_BYTES = 1 << 30  # of keys and values: by itself vLLM would fill the GPU, and the peak would say nothing


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Per prompt the seconds to the first token and the tokens per second behind it; peak bytes; counts of drafts."""
    import torch
    import vllm

    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"kv_cache_memory_bytes": _CACHE_BYTES} if on_gpu else {"enforce_eager": True}
    if asked["drafts"]:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": asked["drafts"]}
    llm = vllm.LLM(
        asked["model"],
        max_model_len=max(map(len, asked["prompts"])) + asked["new_tokens"] + 16,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,  # without them there are no times
        seed=0,
        **options,
    )
    wanted = vllm.SamplingParams(temperature=0, max_tokens=asked["new_tokens"] + 1, ignore_eos=True)
    first, rate = [], []
    for prompt in (asked["prompts"][0], *asked["prompts"]):  # the first warms up
        (done,) = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
        first.append(done.metrics.first_token_latency)
        rate.append(asked["new_tokens"] / (done.metrics.last_token_ts - done.metrics.first_token_ts))
    counts = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in llm.get_metrics()
        if metric.name in ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        "version": vllm.__version__,
        "first_seconds": first[1:],
        "tokens_per_second": rate[1:],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak,
        "counts": counts,
    }


if __name__ == "__main__":
    answer = measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
