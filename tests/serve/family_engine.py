"""vLLM's answers about one model, without a tokenizer: `family_engine.py MODEL ASKED.json OUT.json`.

ASKED.json has `prompts` and `texts`, lists of token ids, and `tokens`, how many to choose after each prompt. OUT.json
is written whatever happens: an engine that stops says where, in `stopped`.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its errors reach us
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

import vllm
from vllm import LLM, SamplingParams

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,  # without the compiler: seconds instead of minutes
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
    "seed": 0,
}


def answers(llm: LLM, asked: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens behind each prompt, and of each text the log-probabilities of its tokens from the second on."""
    greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    scored = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    chosen = llm.generate(prompts, greedy, use_tqdm=False)
    texts = llm.generate([{"prompt_token_ids": ids} for ids in asked["texts"]], scored, use_tqdm=False)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in chosen],
        "log_probs": [
            [step[token].logprob for token, step in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
            for ids, one in zip(asked["texts"], texts, strict=True)
        ],
    }


def main() -> None:
    model, asked, out = sys.argv[1:]
    record: dict[str, Any] = {"version": vllm.__version__, "phase": "starting the engine"}
    try:
        llm = LLM(model, **OPTIONS)
        record["phase"] = "generating"
        record |= answers(llm, json.loads(Path(asked).read_text()))
        record["phase"] = "done"
    except Exception as problem:  # whatever stops the engine is the finding, and is passed on
        traceback.print_exc()
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno} in {frame.name}"
        record["stopped"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:500]} ({where})"
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
