"""Room for a training: the bytes by hand and against what is really held, what is refused with which advice, and what
running out of memory says."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command import write_model, write_text
from moeslim.checkpoint.structure import read_structure
from moeslim.demo import recipe_path, teacher_path
from moeslim.distill import memory_check
from moeslim.distill.memory_check import MemoryCase, check_memory, explain_out_of_memory, needed
from moeslim.distill.settings import TrainSettings
from moeslim.errors import ResourceError, TrainingError
from moeslim.families import Shape
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.machine import memory
from moeslim.machine.memory import free_memory
from moeslim.machine.parallel import World
from moeslim.model.sorted_experts import NAME as SORTED
from moeslim.model.student import Student
from moeslim.recipe import Recipe
from tiny import changed, tiny_config, tiny_shape, train_settings

LENGTH = 64
SETTINGS = train_settings(10**6, rows_per_step=8, micro_rows=4)
CONFIG = tiny_config(num_key_value_heads=1)
SHAPE = Shape.from_config(CONFIG)
CASE = MemoryCase(SHAPE, None, length=LENGTH)


def _parameters(config: dict[str, Any], *, mtp: bool = True) -> int:
    with torch.device("meta"):
        shape = Shape.from_config(config)
        student = Student.from_config(config, shape=shape if mtp else shape.trunk)
        return sum(parameter.numel() for parameter in student.parameters())


def test_bytes_by_hand() -> None:
    whole, teacher = _parameters(CONFIG), tiny_config(hidden_size=24)
    found = needed(replace(CASE, teacher=Shape.from_config(teacher)), SETTINGS)
    assert (found.weights, found.gradients, found.moments) == (4 * whole, 4 * whole, 8 * whole)
    assert found.teacher == 4 * _parameters(teacher, mtp=False)
    # Per token: two normed inputs of 16; per expert (2) 16 + 3 * 12, shared 3 * 10; in 2 DeltaNet layers a convolution
    # over 16 + 16 + 32 channels, gate and result of 32; in 2 attention layers and the MTP block's queries, result and
    # gated result of 32, key and value of 8. 4 bytes, 4 x 64 tokens.
    layers = 5 * (2 * 16 + 2 * (16 + 36) + 30) + 2 * (64 + 32 + 32) + 3 * (3 * 32 + 2 * 8)
    logits = 256 * 64 * 4 * 3  # of the backbone, MTP depth 1 and the teacher, for all 256 targets
    assert found.activations == 256 * 4 * layers + logits
    assert found.total == found.weights + found.gradients + found.moments + found.teacher + found.activations
    # Two further depths keep as much each, and the serving form 4 heads' scores of 64 x 64 in each of 4 rows.
    deep = changed(SETTINGS, depths=3)
    block = 2 * 16 + 2 * (16 + 36) + 30 + 3 * 32 + 2 * 8
    further = needed(CASE, deep).activations - needed(CASE, SETTINGS).activations
    assert further == 2 * 256 * 4 * (block + 64)
    served = needed(CASE, changed(deep, mtp_train="serving")).activations
    assert served - needed(CASE, deep).activations == 4 * 4 * 4 * 64 * 64
    once = needed(CASE, changed(SETTINGS, micro_rows=8))
    assert once.total == once.weights + once.moments + max(once.gradients, once.activations)
    bf16 = needed(replace(CASE, teacher=Shape.from_config(teacher)), changed(SETTINGS, precision="bfloat16"))
    assert (bf16.weights, bf16.teacher) == (found.weights, found.teacher // 2)
    assert bf16.activations - logits == (found.activations - logits) // 2
    spread = needed(replace(CASE, teacher=Shape.from_config(teacher)), SETTINGS, ranks=2, shard=2)
    assert (spread.weights, spread.moments, spread.teacher) == (2 * whole, 4 * whole, found.teacher // 2)
    assert (spread.activations, spread.together) == (found.activations, False)


def test_what_is_frozen_has_no_gradient_and_no_moments() -> None:
    block = _parameters(CONFIG) - _parameters(CONFIG, mtp=False)
    found = needed(CASE, changed(SETTINGS, train_only=("mtp",)))
    assert (found.weights, found.gradients, found.moments) == (4 * _parameters(CONFIG), 4 * block, 8 * block)
    assert found.activations == 256 * 64 * 4 * 2  # the logits alone
    router = needed(CASE, changed(SETTINGS, train_only=("router",)))
    assert router.moments == 8 * 4 * 8 * 16
    assert router.activations - found.activations == 256 * 4 * 5 * 16


@pytest.mark.parametrize("form", [{}, {"layer_types": ["linear_attention"] * 4}, {"mlp_only_layers": [0, 1]}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("depths", "how"), [(1, "parallel"), (3, "parallel"), (3, "serving")])
def test_activations_are_a_lower_bound_of_what_autograd_keeps(
    form: dict[str, Any], precision: Any, depths: int, how: Any
) -> None:
    """Every tensor that the graph holds, weights and what two share counted once: more than said, not ten times it."""
    config = tiny_config(hidden_size=64, moe_intermediate_size=16, **form)
    settings = changed(SETTINGS, precision=precision, depths=depths, mtp_train=how)
    torch.manual_seed(0)
    student = Student.from_config(config, shape=Shape.from_config(config), experts=SORTED)
    student.serving = how == "serving"
    rows, mask = torch.randint(0, 64, (4, LENGTH + 1)), torch.ones(4, LENGTH, dtype=torch.bool)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no place is used twice
        return tensor

    factors = coefficients(LossWeights(beta=0.3), counts=term_counts(mask, depths), tokens=mask.numel())
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with narrow, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(rows, mask, coefficients=factors)
    held = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    case = MemoryCase(Shape.from_config(config), None, length=LENGTH)
    logits = 256 * 64 * 4 * (1 + depths)  # gone by the time the forward ends
    counted = memory_check.activations(case, settings, whole=True) - logits
    assert counted <= held <= 10 * counted


def _free(monkeypatch: pytest.MonkeyPatch, free: int, world: World | None = None) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda _device, *, processes: free // processes)
    monkeypatch.setattr(memory_check, "world", lambda: world or World())


def _changed(settings: TrainSettings, **changes: Any) -> int:
    return needed(CASE, changed(settings, **changes)).total


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"micro_rows": 2}, r"Set distill\.micro_rows to 2 \(now 4\)$"),
        ({"micro_rows": 1}, r"Set distill\.micro_rows to 1 \(now 4\)$"),
        ({"activation_checkpointing": True}, r"Set distill\.activation_checkpointing to true$"),
        (
            {"activation_checkpointing": True, "micro_rows": 2},
            r"Set distill\.micro_rows to 2 \(now 4\) and distill\.activation_checkpointing to true$",
        ),
    ],
)
def test_too_little_is_refused_with_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    """The advice is the mildest change that makes room: followed, nothing is refused."""
    settings = changed(SETTINGS, rows_per_step=16)
    if "activation_checkpointing" in changes and "micro_rows" not in changes:
        settings = changed(settings, micro_rows=1)
        told = told.replace(r" \(now 4\)", "")
    elif "activation_checkpointing" in changes:
        monkeypatch.setattr(memory_check, "CHUNK_BYTES", 0)  # logits that do not shrink with the rows
    _free(monkeypatch, _changed(settings, **changes))
    with pytest.raises(ResourceError, match=told) as caught:
        check_memory(SHAPE, settings, length=LENGTH)
    assert "training needs at least" in str(caught.value)
    check_memory(SHAPE, changed(settings, **changes), length=LENGTH)


def test_where_no_setting_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_shape(hidden_size=256)
    least = changed(SETTINGS, micro_rows=1, activation_checkpointing=True)
    _free(monkeypatch, needed(CASE, least).total)
    with pytest.raises(ResourceError, match=r"the teacher .*\. A teacher_cache .* takes the teacher out"):
        check_memory(SHAPE, SETTINGS, length=LENGTH, teacher=teacher)
    _free(monkeypatch, needed(CASE, least, ranks=4, shard=4).total)
    with pytest.raises(ResourceError, match=r"Start 4 processes with as much memory each .*shard_over: 4"):
        check_memory(SHAPE, SETTINGS, length=LENGTH)
    _free(monkeypatch, 1000)
    with pytest.raises(ResourceError, match="No setting makes room"):
        check_memory(SHAPE, SETTINGS, length=LENGTH)


def test_processes_share_a_machines_memory_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = changed(SETTINGS, micro_rows=1)
    two = World(rank=0, size=2, local_size=2)
    each = needed(CASE, settings, ranks=2, shard=2).total
    _free(monkeypatch, 2 * each, two)
    check_memory(SHAPE, settings, length=LENGTH)
    _free(monkeypatch, 2 * each - 2, two)
    with pytest.raises(ResourceError, match="for each process"):
        check_memory(SHAPE, settings, length=LENGTH)
    _free(monkeypatch, 2 * each, two)
    with pytest.raises(ResourceError, match="for each process"):  # each process a copy of its own
        check_memory(SHAPE, changed(settings, shard_over=1), length=LENGTH)


def test_the_demo_has_room_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shape = Recipe.load(recipe_path()), read_structure(teacher_path()).shape
    settings = TrainSettings(recipe.distill, tokens=recipe.distill.tokens, seed=0, precision="float32", device="cpu")
    _free(monkeypatch, 1 << 30)
    check_memory(shape, settings, length=recipe.data.sequence_length, teacher=shape)


def test_free_memory_here() -> None:
    """Less than the machine's, and less again under a limit of the process's address space."""
    found = free_memory("cpu")
    if not sys.platform.startswith("linux"):
        assert found is None
        return
    machine = int(Path("/proc/meminfo").read_text().splitlines()[0].split()[1]) * 1024
    assert found is not None
    assert 0 < found <= 2 * machine
    assert free_memory("mps") is None
    status = Path("/proc/self/status").read_text()
    used, held = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmSize", "RssAnon"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    try:
        limited = free_memory("cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert limited is not None
    assert limited == pytest.approx(held + (256 << 20), abs=64 << 20)


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_limits_of_control_groups_by_hand(tmp_path: Path) -> None:
    """Of a group and those above it; file pages do not count as used; `max` and missing groups limit nothing."""
    stat = "anon 50\ninactive_file 30\nactive_file 20\n"
    _group(tmp_path / "a/b", {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": stat})
    _group(tmp_path / "a", {"memory.max": "max\n", "memory.current": "900\n", "memory.stat": stat})
    _group(tmp_path, {"memory.max": "700\n", "memory.current": "500\n", "memory.stat": stat})
    assert list(memory._group_limits(tmp_path, ["0::/a/b"])) == [650, 250]
    assert list(memory._group_limits(tmp_path, ["0::/gone"])) == [250]
    old = {"memory.limit_in_bytes": "800", "memory.usage_in_bytes": "300"}
    _group(tmp_path / "memory/c", {**old, "memory.stat": "cache 9\ntotal_inactive_file 7\ntotal_active_file 3\n"})
    assert list(memory._group_limits(tmp_path, ["5:cpu:/", "4:memory:/c", "0::/a"])) == [250, 510]
    assert list(memory._group_limits(tmp_path / "none", ["4:memory:/c"])) == []


def _on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")


def _on_a_cpu() -> None:
    torch.empty(1 << 50)


def _in_a_library() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def _in_python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize(
    ("fail", "asked"),
    [(_on_a_gpu, " (2.50 GiB more"), (_on_a_cpu, " (4,503,599.6 GB more"), (_in_a_library, "."), (_in_python, ".")],
)
def test_running_out_names_what_to_lower(fail: Callable[[], None], asked: str) -> None:
    with (
        pytest.raises(ResourceError) as caught,
        explain_out_of_memory(changed(SETTINGS, micro_rows=6, rows_per_step=12), 3),
    ):
        fail()
    told = str(caught.value)
    assert told.startswith(f"step 3: out of memory on cpu{asked}")
    for words in ("Set distill.micro_rows to 3 (now 6)", "distill.activation_checkpointing to true", "more than 1 "):
        assert words in told
    assert caught.value.__suppress_context__


def test_only_what_helps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "world", lambda: World(size=8, local_size=4))
    tight = changed(SETTINGS, micro_rows=1, activation_checkpointing=True)
    with pytest.raises(ResourceError) as caught, explain_out_of_memory(tight, 1):
        raise MemoryError
    assert "micro_rows" not in str(caught.value)
    assert "checkpointing" not in str(caught.value)
    assert "Set distill.shard_over to 8 (now 4)" in str(caught.value)
    assert "shorter rows" in str(caught.value)


@pytest.mark.parametrize("problem", [RuntimeError("mat1 and mat2 shapes"), TrainingError("lm is nan"), ValueError("x")])
def test_other_errors_pass(problem: Exception) -> None:
    with pytest.raises(type(problem)) as caught, explain_out_of_memory(SETTINGS, 1):
        raise problem
    assert caught.value is problem


TIGHT = """
import resource, sys
import torch, transformers.models.qwen3_next.modeling_qwen3_next, moeslim.distill.run
from moeslim.cli import main as cli
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
for arguments in sys.argv[1:]:
    sys.argv = ["moeslim", *arguments.split()]
    try:
        cli.main()
    except SystemExit as ending:
        print("ended", ending.code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_batch_that_cannot_fit_names_the_setting_and_leaves_no_traceback(tmp_path: Path) -> None:
    """In a real process with 2 GiB left: one batch is refused beforehand, one is only found out in the step.

    The refused one needs 6.4 GB at least; the other, of which 0.8 GB can be told beforehand, needs about 5.
    """
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl", documents=400)
    settings = "distill.tokens=1048576 data.sequence_length=256 device=cpu distill.rows_per_step="
    line = f"distill {model} {{out}} --data {text} " + " ".join(f"--set {key}" for key in settings.split())
    lines = [
        line.format(out=tmp_path / name) + f"{rows} --set distill.micro_rows={rows}"
        for name, rows in (("refused", 4096), ("broken", 512))
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", TIGHT, *lines], capture_output=True, text=True, check=False, env=environment
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["1", "1"], done.stderr
    refused, broken = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert refused.startswith("error: training needs at least ")
    assert "activations of 4096 x 256 tokens" in refused
    assert "Set distill.micro_rows to " in refused
    assert broken.startswith("error: step 1: out of memory on cpu (")
    assert "Set distill.micro_rows to 256 (now 512)" in broken
    assert not (tmp_path / "broken").exists()
