"""Makes the bundled teacher: a small Qwen3-Next with an MTP head, trained by the project's own loop without a teacher.

    python -m moeslim.demo.train_teacher --data TOKENS --work FOLDER --tokens 26000000 --out FOLDER

TOKENS is a folder of packed tokens (rows of 256), made by build_text.py. SIGTERM or Ctrl-C saves and stops; the same
command goes on, bit-identically. The learning rate's cosine runs over --tokens. `--start` trains a checkpoint further
with a schedule of its own. `--export` writes a checkpoint from the newest state, also while the training runs.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import read_json, write_json
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.data.tokens import TokenSet
from moeslim.demo import tokenizer_path
from moeslim.distill.loop import TrainInputs, train
from moeslim.distill.settings import Stage, TrainSettings
from moeslim.distill.state import load_weights, step_folders
from moeslim.errors import MoeslimError, RunError
from moeslim.log import logger
from moeslim.machine.host import tune_cpu
from moeslim.model.init import write_random
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.sorted_experts import NAME as SORTED
from moeslim.recipe import Distill

LAYERS = 8


def teacher_config(*, vocab_size: int, eos: int) -> dict[str, Any]:
    """The teacher's config.json, every field that engines read in both of its spellings.

    Every axis can be halved or cut to three quarters in whole periods: 8 layers in periods of 2, hidden size 128,
    32 experts, top-4, expert size 32. DeltaNet heads are of 64, the least that vLLM's kernels take.
    """
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.06,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def settings_for(tokens: int, *, seed: int, learning_rate: float) -> TrainSettings:
    """Plain language modelling with a balancing weight ten times the default, so that no expert dies."""
    section = Distill(
        rows_per_step=8,
        micro_rows=8,
        learning_rate=learning_rate,
        min_learning_rate=0.02 * learning_rate,
        warmup=0.02,
        beta_start=0.3,
        beta_end=0.3,
        alpha=1e-2,
        lm_only=True,
        save_every=250,
        keep_last=2,
    )
    return TrainSettings(section, tokens=tokens, seed=seed, precision="float32", device="cpu")


def export(work: Path, start: Path, *, out: Path) -> None:
    """Write the newest state of the training in `work` as a checkpoint `out` in bf16; an `out` that stands is kept."""
    folders = step_folders(work / "states")
    if not folders:
        raise RunError(f"{work}: no training state here yet; train first")
    student = load_student(start)
    load_weights(folders[-1], student)
    save_student(student, start, out=out, kind="demo", parents={}, recipe=read_json(work / "settings.json"))
    logger.info("%s written from %s", out, folders[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--data", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=tokenizer_path())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=26_000_000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="train this checkpoint further, with a schedule of its own")
    parser.add_argument("--export", action="store_true", help="write --out from the newest state, do not train")
    return parser.parse_args()


def _run(args: argparse.Namespace) -> None:
    start = args.start or args.work / "start"
    if not args.export:
        tokens = TokenSet.open(args.data)
        config = teacher_config(vocab_size=tokens.vocab_size, eos=tokens.eos)
        settings = settings_for(args.tokens, seed=args.seed, learning_rate=args.learning_rate)
        if not start.exists():
            write_random(start, config, seed=args.seed, tokenizer_from=args.tokenizer)
        facts = {"settings": settings.facts(), "start": folder_fingerprint(start), "tokens": tokens.fingerprint}
        write_json(args.work / "settings.json", facts)
        torch.set_num_threads(args.threads)
        tune_cpu()
        student = load_student(start, experts=SORTED)
        stage = Stage(fingerprint=fingerprint(facts))
        train(student, TrainInputs(tokens), settings=settings, folder=args.work, stage=stage)
    if args.out is not None:
        export(args.work, start, out=args.out)


def main() -> int:
    """Train (or go on), then write the checkpoint if `--out` is given; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        _run(_arguments())
    except MoeslimError as problem:
        logger.error("%s", problem)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
