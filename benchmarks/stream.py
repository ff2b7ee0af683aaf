"""What cutting and calibrating a model that is larger than the bound takes: `make bench-stream`, or this with options.

A synthetic Qwen3-Next checkpoint of 13.8 GB (7 layers and the MTP block, 512 experts of 3.1 MB in each, the real
vocabulary, random values) is made per expert and then stacked, one after the other, and deleted.

memory  `moeslim cut` to a third of the experts and `moeslim calibrate` on 16k tokens, each a process of its own under
        `--max-memory`. Peaks are RssAnon, sampled every 20 ms from outside, with ru_maxrss beside it; pages of mapped
        files are not in RssAnon, for the system may drop them at any time.
speed   the cut, with hashes and the look for NaN and Inf, beside `cp --reflink=never` and fsync of the same bytes: what
        the cut reads is copied to what it writes. Speed is bytes read and written per second; the ratio is the cut's
        over cp's, a median over rounds in which the two take turns. The system is told to forget what it holds of the
        source's files (posix_fadvise) before each of them: the cache is cold.

The last line is one JSON object: `cut_peak_anon_gb`, `calibrate_peak_anon_gb`, `cp_speed_ratio`, each the worst of the
layouts, and the cases. At most 19 GB of disk are used at once.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import committed_folder
from moeslim.checkpoint.config_json import copy_side_files, read_config, write_config
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.writer import ShardWriter
from moeslim.demo import teacher_path
from moeslim.families import Shape, table

CUT_MEMORY, CALIBRATE_MEMORY = "1.5GB", "3GB"
KEPT, SEQUENCES, LENGTH = 171, 8, 2048
_POOL = 1 << 25


def config(layers: int, experts: int) -> dict[str, Any]:
    """80A3B's shape but for d 1024 and the number of layers: every fourth full attention."""
    types = ["full_attention" if (number + 1) % 4 == 0 else "linear_attention" for number in range(layers)]
    changes = {"hidden_size": 1024, "num_hidden_layers": layers, "layer_types": types, "full_attention_interval": 4}
    changes |= {"num_experts": experts, "num_experts_per_tok": 10, "vocab_size": 151936, "mlp_only_layers": []}
    changes |= {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False}
    changes |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    changes |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    changes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    changes |= {"num_nextn_predict_layers": 1, "torch_dtype": "bfloat16"}
    return {**read_config(teacher_path()), **changes}


def make(folder: Path, layout: str, *, layers: int, experts: int) -> Path:
    """The checkpoint; every tensor is a stretch of one pool of normal values, which is quick to make."""
    made = config(layers, experts)
    pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    rows = table(Shape.from_config(made), {"trunk": layout, "mtp": layout})
    with committed_folder(folder) as temporary:
        write_config(temporary, made)
        copy_side_files(teacher_path(), temporary)
        writer = ShardWriter(temporary, [(row.name, row.shape, "BF16") for row in rows.values()])
        for number, name in enumerate(writer.order):
            values = torch.empty(rows[name].shape, dtype=torch.bfloat16).flatten()
            start = number * 7919 % (_POOL // 2)
            for block in values.split(_POOL // 2):
                block.copy_(pool[start : start + block.numel()])
            writer.add(name, values.view(rows[name].shape))
        writer.finish()
    return folder


def moeslim(*words: object) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "moeslim", *map(str, words)]


def watched(command: list[str]) -> dict[str, float]:
    """Run it; its peaks in GB, and seconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak = max(peak, 1024 * int(found[1])) if found else peak
        done, code, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return {
        "peak_anon_gb": round(peak / 1e9, 3),
        "maxrss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "seconds": round(seconds, 1),
    }


def memory(source: Path, work: Path, *, bound: bool = True) -> dict[str, Any]:
    """Peaks of the cut and of the calibration."""
    out, stats = work / "out", work / "stats"
    found = {}
    limits = [["--max-memory", size] if bound else [] for size in (CUT_MEMORY, CALIBRATE_MEMORY)]
    found["cut"] = watched(moeslim("cut", source, work / "plan.json", out, *limits[0]))
    shutil.rmtree(out)
    settings = (f"calibrate.sequences={SEQUENCES}", f"data.sequence_length={LENGTH}", "calibrate.rows_per_batch=1")
    told = [word for setting in settings for word in ("--set", setting)]
    found["calibrate"] = watched(moeslim("calibrate", source, stats, *told, *limits[1]))
    shutil.rmtree(stats)
    shutil.rmtree(work / "stats.tokens")
    return found


def speed(source: Path, work: Path, *, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of cut and cp in turn; how much faster cp is."""
    out, like = work / "out", work / "like"
    rounds = []
    for _ in range(repeats):
        drop_cache(source)
        start = time.perf_counter()
        subprocess.run(moeslim("cut", source, work / "plan.json", out), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        moved = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        shutil.rmtree(out)
        drop_cache(source)
        rounds.append((seconds, copied(source, like, size=moved), moved))
        shutil.rmtree(like)
    ratios = [copy / cut for cut, copy, _ in rounds]
    return {
        "cut_seconds": [round(cut, 1) for cut, _, _ in rounds],
        "cp_seconds": [round(copy, 1) for _, copy, _ in rounds],
        "gb_read_and_written": round(2 * rounds[0][2] / 1e9, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cache": "cold",
    }


def copied(source: Path, out: Path, *, size: int) -> float:
    """Seconds in which cp and fsync copy as many bytes of the source's shards as the cut takes out of them."""
    out.mkdir()
    start, left = time.perf_counter(), size
    for shard in sorted(source.glob("*.safetensors")):
        if left <= 0:
            break
        part = min(left, shard.stat().st_size)
        if part == shard.stat().st_size:
            subprocess.run(["cp", "--reflink=never", shard, out], check=True)
        else:  # the last one in part: cp has no such option, dd reads and writes in the same way
            blocks = ["bs=1M", f"count={part}", "iflag=count_bytes", "status=none"]
            subprocess.run(["dd", f"if={shard}", f"of={out / shard.name}", *blocks], check=True)
        left -= part
    subprocess.run(["sync", *out.iterdir(), out], check=True)
    return time.perf_counter() - start


def drop_cache(folder: Path) -> None:
    """Have the system forget what it holds of the folder's files."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure, show, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["memory", "speed"], default=["memory", "speed"])
    parser.add_argument("--layouts", nargs="+", choices=["per_expert", "stacked"], default=["per_expert", "stacked"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=7, help="besides the MTP block")
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--kept", type=int, default=KEPT)
    parser.add_argument("--no-bound", action="store_true", help="without --max-memory")
    parser.add_argument("--work", type=Path, default=None, help="where models lie; a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the models in --work, and take what lies there")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        for layout in args.layouts:
            source = (args.work if args.keep else Path(temporary)) / f"{layout}-{args.layers}"
            if not source.exists():
                make(source, layout, layers=args.layers, experts=args.experts)
            work = Path(temporary) / "work"
            work.mkdir()
            plan = moeslim("plan", source, work / "plan.json", "--experts", args.kept)
            importance = ("--set", "methods.experts=random", "--set", "methods.expert_op=drop")
            subprocess.run([*plan, *importance], check=True, stdout=subprocess.DEVNULL)
            found[layout] = {"gb": round(Reader(source).index.bytes / 1e9, 2)}
            if "memory" in args.cases:
                found[layout] |= memory(source, work, bound=not args.no_bound)
            if "speed" in args.cases:
                found[layout]["speed"] = speed(source, work, repeats=args.repeats)
            print(layout, json.dumps(found[layout]), flush=True)
            shutil.rmtree(work)
            if not args.keep:
                shutil.rmtree(source)
    peaks = {verb: [case[verb]["peak_anon_gb"] for case in found.values() if verb in case] for verb in _VERBS}
    summary = {f"{verb}_peak_anon_gb": max(peaks[verb], default=None) for verb in _VERBS}
    ratios = [case["speed"]["ratio"] for case in found.values() if "speed" in case]
    summary["cp_speed_ratio"] = min(ratios, default=None)
    print(json.dumps({**summary, "cases": found}))


_VERBS = ("cut", "calibrate")


if __name__ == "__main__":
    main()
