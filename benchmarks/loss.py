"""The fused loss beside autograd and beside Liger-Kernel: `make bench-loss`, or this file with options.

One micro-batch of T targets over V = 151 936 words, LM and KD at the backbone and at D MTP depths, forward and backward
down to the gradients of states and head:

- fused: ours, one call.
- naive: cross_entropy and kl_div(log_target) of fp32 logits, the teacher's logits once and without gradient, autograd;
  head by head, which saves it 4 GB at D = 1.
- liger, liger-256: Liger-Kernel 0.8.5's chunked distillation loss (its JSD at beta 0 is the same KL), `compiled=False`,
  with its own 1024 positions to a chunk and with 256, called once per head, since it knows no depths; each call
  computes the teacher's logits anew. The bars take the faster of the two for time and the smaller for memory.
- apart: ours, called once per depth, so that the teacher's logits are computed once per depth (D = 2 alone).

Every run has a process of its own, which checks nothing but time and memory; that all ways of a case find the same loss
and gradient is checked here, to 0.1 %. The ways of a case take turns, so that a busy machine troubles all alike;
medians decide, and the process's own CPU time stands beside the wall's. Memory is the peak of RssAnon beyond what the
process had with all inputs and weights (on a GPU, allocated memory), less the gradients' own size. Naive needs 8 to 9
GB beyond its inputs of 1 to 2 GB and its gradients of as much.

The last line is one JSON object; each of its four ratios is the worse of the two pairs of hidden sizes:
`time_ratio_vs_naive`, `extra_memory_ratio_vs_naive` and `time_ratio_vs_liger_mtp` at D = 1, `time_ratio_vs_liger` at
D = 0. A GPU, where there is one, is measured in bf16 instead, on a line of its own before it.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from moeslim.losses import Coefficients, LossWeights, Signal, coefficients, fused_loss, term_counts

VOCABULARY = 151_936
PAIRS = {"512/1024": (512, 1024), "1536/2048": (1536, 2048)}
"""Hidden sizes of student and teacher."""
LIGERS = ("liger", "liger-256")
WAYS = {0: ("fused", "naive", *LIGERS), 1: ("fused", "naive", *LIGERS), 2: ("fused", "apart")}
"""By number of depths."""
WEIGHTS = LossWeights(lam=0.5, beta=0.3)
LIGER = "liger-kernel==0.8.5"


class Batch:
    """A micro-batch of one row: random states, heads, teacher and targets."""

    def __init__(self, pair: str, depths: int, *, length: int, device: str) -> None:
        torch.manual_seed(0)
        d, d_teacher = PAIRS[pair]
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
        self.head = torch.empty(VOCABULARY, d, **options).normal_(std=0.05).requires_grad_()
        self.states = [torch.randn(1, length - m, d, **options).requires_grad_() for m in range(depths + 1)]
        self.teacher = Signal(
            torch.randn(1, length, d_teacher, **options),
            torch.empty(VOCABULARY, d_teacher, **options).normal_(std=0.05),
        )
        self.targets = torch.randint(0, VOCABULARY, (1, length), device=device)
        self.mask = torch.ones(1, length, dtype=torch.bool, device=device)
        self.counts = term_counts(self.mask, depths)

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.head, *self.states))

    def first(self, length: int) -> "Batch":
        """The same with the first few positions, for warming up."""
        few = object.__new__(Batch)
        few.head, depths = self.head, len(self.states) - 1
        few.states = [s[:, : length - m].detach().requires_grad_() for m, s in enumerate(self.states)]
        few.teacher = Signal(self.teacher.hidden[:, :length], self.teacher.head)
        few.targets, few.mask = self.targets[:, :length], self.mask[:, :length]
        few.counts = term_counts(few.mask, depths)
        return few


def _kinds(depth: int) -> tuple[str, str]:
    return (f"mtp_lm.{depth}", f"mtp_kd.{depth}") if depth else ("lm", "kd")


def _factors(batch: Batch) -> Coefficients:
    return coefficients(WEIGHTS, counts=batch.counts, tokens=batch.mask.numel())


def _fused(batch: Batch, factors: Coefficients) -> torch.Tensor:
    return fused_loss(
        batch.states,
        batch.head,
        targets=batch.targets,
        mask=batch.mask,
        coefficients=factors,
        teacher=batch.teacher,
    )[0]


def fused(batch: Batch) -> torch.Tensor:
    loss = _fused(batch, _factors(batch))
    loss.backward()
    return loss.detach()


def apart(batch: Batch) -> torch.Tensor:
    terms, loss = _factors(batch).terms, torch.zeros(())
    for m in range(len(batch.states)):
        part = _fused(batch, Coefficients({name: terms[name] for name in _kinds(m)}))
        part.backward()
        loss += part.detach().cpu()
    return loss


def naive(batch: Batch) -> torch.Tensor:
    terms, loss = _factors(batch).terms, torch.zeros(())
    with torch.no_grad():
        log_p = log_softmax(linear(batch.teacher.hidden[0], batch.teacher.head).float(), -1)
    for m, states in enumerate(batch.states):
        lm, kd = (terms[name] for name in _kinds(m))
        logits = linear(states[0], batch.head).float()
        part = lm * cross_entropy(logits, batch.targets[0, m:], reduction="sum")
        part = part + kd * kl_div(log_softmax(logits, -1), log_p[m:], reduction="sum", log_target=True)
        del logits
        part.backward()
        loss += part.detach().cpu()
    return loss


def liger(batch: Batch, chunk: int = 1024) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    terms, loss = _factors(batch).terms, torch.zeros(())
    for m, states in enumerate(batch.states):
        # its own mean is over a head's positions, ours over all depths'
        lm, kd = (terms[name] * (batch.mask.shape[1] - m) for name in _kinds(m))
        theirs = LigerFusedLinearJSDLoss(lm, kd, beta=0.0, compiled=False, chunk_size=chunk)
        said = batch.teacher.hidden[0, m:]
        part = theirs(states[0], batch.head, said, batch.teacher.head, batch.targets[0, m:])
        part.backward()
        loss += part.detach().cpu()
        gc.collect()  # a call leaves its logits in reference cycles
    return loss


RUN: dict[str, Callable[[Batch], torch.Tensor]] = {
    "fused": fused,
    "apart": apart,
    "naive": naive,
    "liger": liger,
    "liger-256": partial(liger, chunk=256),
}


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class _Peak:
    """Samples anonymous memory every 5 ms."""

    def __init__(self) -> None:
        self.bytes, self._done = _anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, _anonymous_bytes())

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, _anonymous_bytes())


@contextmanager
def _measured(found: dict[str, float], device: str) -> Any:
    """Put the seconds, CPU seconds and peak bytes of the block into `found`."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else _anonymous_bytes()
    with _Peak() as peak:
        began = time.perf_counter(), time.process_time()
        yield
        if device == "cuda":
            torch.cuda.synchronize()
        found["seconds"], found["cpu_seconds"] = time.perf_counter() - began[0], time.process_time() - began[1]
    found["bytes"] = (torch.cuda.max_memory_allocated() if device == "cuda" else peak.bytes) - before


def run_once(way: str, pair: str, depths: int, *, length: int, device: str) -> dict[str, float]:
    """One measured run in this process: time, memory beyond gradients, and what it found."""
    batch = Batch(pair, depths, length=length, device=device)
    RUN[way](batch.first(16))
    batch.head.grad = None
    found: dict[str, float] = {}
    with _measured(found, device):
        loss = RUN[way](batch)
    found["extra_gb"] = (found.pop("bytes") - batch.gradient_bytes) / 1e9
    assert batch.head.grad is not None
    norms = [batch.head.grad.float().norm(), *(s.grad.float().norm() for s in batch.states if s.grad is not None)]
    return {**found, "loss": float(loss), "norm": float(torch.stack(norms).norm())}


def run_in_a_process(way: str, pair: str, depths: int, *, args: argparse.Namespace, device: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--pairs", pair, "--depths", str(depths)]
    command += ["--length", str(args.length), "--device", device]
    command += [] if args.threads is None else ["--threads", str(args.threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(pair: str, depths: int, *, args: argparse.Namespace, device: str) -> dict[str, dict[str, float]]:
    """Medians per way of one case; the ways take turns."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[depths]}
    for _ in range(args.repeats):
        for way, found in runs.items():
            found.append(run_in_a_process(way, pair, depths, args=args, device=device))
    out = {way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()}
    for way, found in out.items():
        for key in ("loss", "norm"):
            off = abs(found[key] / out["fused"][key] - 1)
            if off > (2e-2 if device == "cuda" else 1e-3):  # on a GPU the others round logits to bf16
                raise SystemExit(f"{pair}, D = {depths}: {way} finds a {key} that is {off:.2%} off: {out}")
    return out


def show(pair: str, depths: int, found: dict[str, dict[str, float]]) -> None:
    """Rows of the table; the last three columns are ours over it."""
    ours = found["fused"]
    for way, run in found.items():
        print(
            f"{pair:>11}{depths:3}  {way:9}{run['seconds']:9.2f}{run['cpu_seconds']:9.2f}{run['extra_gb']:10.2f}"
            f"{ours['seconds'] / run['seconds']:10.3f}{ours['cpu_seconds'] / run['cpu_seconds']:9.3f}"
            f"{ours['extra_gb'] / run['extra_gb']:9.3f}"
        )
    sys.stdout.flush()


def summary(found: dict[str, dict[int, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """The ratios that the bars are about, the worse of the pairs; None where a case was not run."""

    def worst(depths: int, ways: tuple[str, ...], key: str) -> float | None:
        cases = [case[depths] for case in found.values() if depths in case]
        return (
            round(max(case["fused"][key] / min(case[way][key] for way in ways) for case in cases), 4) if cases else None
        )

    shared = {pair: case[2] for pair, case in found.items() if 2 in case}
    return {
        "time_ratio_vs_naive": worst(1, ("naive",), "seconds"),
        "extra_memory_ratio_vs_naive": worst(1, ("naive",), "extra_gb"),
        "time_ratio_vs_liger": worst(0, LIGERS, "seconds"),
        "time_ratio_vs_liger_mtp": worst(1, LIGERS, "seconds"),
        "extra_memory_ratio_vs_liger": worst(0, LIGERS, "extra_gb"),
        "cpu_time_ratio_vs_naive": worst(1, ("naive",), "cpu_seconds"),
        "time_saved_by_sharing_d2": {
            pair: round(1 - case["fused"]["seconds"] / case["apart"]["seconds"], 4) for pair, case in shared.items()
        },
    }


def main() -> None:
    """Measure, show, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--depths", nargs="+", type=int, choices=WAYS, default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=2048, help="targets, T")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of torch; what it takes by itself unless told")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="only this one")
    parser.add_argument("--one", choices=RUN, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(run_once(args.one, args.pairs[0], args.depths[0], length=args.length, device=args.device)))
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise SystemExit(
            f"Liger-Kernel is missing, which this compares with. `make bench-loss` brings it; by hand:\n"
            f"    {sys.executable} -m pip install --no-deps --target DIR {LIGER}    and PYTHONPATH=DIR"
        )
    devices = [args.device] if args.device else ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
        print(
            f"\n{device}: T = {args.length}, V = {VOCABULARY}, {torch.get_num_threads()} threads, {args.repeats} runs"
        )
        print(
            f"{'sizes':>11} D  {'way':9}{'seconds':>9}{'CPU s':>9}{'extra GB':>10}{'time':>10}{'CPU':>9}{'memory':>9}"
        )
        for pair in args.pairs:
            for depths in args.depths:
                found.setdefault(pair, {})[depths] = measure(pair, depths, args=args, device=device)
                show(pair, depths, found[pair][depths])
        print(json.dumps({**summary(found), "device": device, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
