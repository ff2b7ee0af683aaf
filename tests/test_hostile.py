"""Files from strangers: nothing in them runs, nothing outside is touched, and what lies is refused soon and cheaply."""

import ast
import contextlib
import gzip
import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import moeslim
from command import write_model, write_text
from moeslim.artifacts import strict_json
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.artifacts.run import open_run
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.index import INDEX_NAME, read_header, read_index
from moeslim.checkpoint.side_files import check_side_files
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.cli.display import printable
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import TokenSet, load_tokenizer, pack
from moeslim.distill.cache.coding import CachedProbs, decode, encode
from moeslim.distill.stored import Stored, seal, write
from moeslim.errors import CheckpointError, DataError, FamilyError, MoeslimError, PlanError, RecipeError, RunError
from moeslim.families import Shape, table
from moeslim.plan import Plan, check_plan
from moeslim.plan.file import parse_plan, read_plan
from moeslim.recipe import Recipe
from moeslim.report.records import model_record
from moeslim.stats import LayerStats, Stats
from moeslim.surgery.apply import cut
from spoil import write_good, write_raw
from tiny import tiny_config, tiny_shape

pytestmark = pytest.mark.bits("what is not damaged is copied, not computed")

anything = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


class Runs:
    """A pickle of this makes the file `ran` where it is loaded."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.ran}",)


# JSON


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "no number"),
        (b'{"a": 1e999}', "beyond float64"),
        (b'{"a": 1, "a": 2}', "'a' stands in it twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (json.dumps({"a": 1}).encode("utf-16"), "utf-8"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b"[" + b"[]," * 2_000_001 + b"1]", "items"),
        (b" " * (strict_json.BYTES_LIMIT + 1) + b"1", "bytes"),
    ],
)
def test_json_that_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.parse(raw)


def test_json_that_is_read() -> None:
    value = {"emoji": "\U0001f600", "deep": [[[[1.5]]]], "": None}
    assert strict_json.parse(json.dumps(value).encode()) == value  # with a pair of surrogates, which is a character
    assert strict_json.parse(b'{"a": 1, "a": 2}', repeated_keys=True) == {"a": 2}
    many = b"{" + b",".join(b'"%x": %d' % (n, n) for n in range(300_000)) + b"}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(strict_json.parse(many)) == 300_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # kilobytes


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "receipt.json", "tokenizer.json"])
def test_nobody_waits_at_a_pipe(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    record = verify(copy)
    assert not record.ok
    assert any(name in problem for problem in record.problems)
    if name != "receipt.json":
        with pytest.raises(CheckpointError, match=name):
            read_structure(copy)


def test_a_sparse_file_of_gigabytes_is_not_read(copy: Path) -> None:
    for name in ("config.json", INDEX_NAME):
        with (copy / name).open("ab") as file:
            file.truncate(30 << 30)
    with (copy / "chat_template.jinja").open("ab") as file:
        file.truncate(30 << 30)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: 32,212,254,720 bytes"):
        check_side_files(copy)
    with pytest.raises(CheckpointError, match=r"config.json.*32,212,254,720 bytes"):
        read_config(copy)
    with pytest.raises(CheckpointError, match=r"index.json.*32,212,254,720 bytes"):
        read_index(copy)


# Headers, indexes and configs


def test_headers_that_cost_nothing_to_write(tmp_path: Path) -> None:
    began = time.process_time()
    facts = {"dtype": "F32", "shape": [10**9] * 300_000, "data_offsets": [0, 8]}
    with pytest.raises(CheckpointError, match="must give dtype, shape"):
        read_header(write_raw(tmp_path / "axes.safetensors", {"x": facts}))
    pairs = b",".join(b'"n%d":1' % number for number in range(200_000))
    with pytest.raises(CheckpointError, match="'n7' stands in it twice"):
        read_header(write_raw(tmp_path / "twice.safetensors", b"{" + pairs + b',"n7":1}'))
    assert time.process_time() - began < 5
    big = tmp_path / "big.safetensors"
    with write_raw(big, b"").open("r+b") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(CheckpointError, match="100,000,000 bytes, at most 50,000,000"):
        read_header(big)


_sizes = st.one_of(st.integers(-1, 9), st.sampled_from([2**31, 2**63, 2**64, 1.0, "2", None, True]))
_facts = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "X", "", None, 3]),
        "shape": st.one_of(st.lists(_sizes, max_size=3), st.just([1]), st.just([2]), st.none()),
        "data_offsets": st.one_of(st.lists(_sizes, max_size=3), st.sampled_from([[0, 4], [4, 8], [0, 8], [0, 2]])),
    }
)
_notes = st.one_of(st.dictionaries(st.text(max_size=3), st.text(max_size=3)), st.just({"a": 1}), st.just([]), st.none())


@anything
@given(header=st.dictionaries(st.text(max_size=3), _facts, max_size=3), notes=_notes, data=st.integers(0, 16))
def test_what_is_read_is_what_safetensors_reads(tmp_path: Path, header: Any, notes: Any, data: int) -> None:
    """A header that is accepted is accepted by the library too, with the same names, dtypes and shapes."""
    path = tmp_path / "f.safetensors"
    for raw in (
        header,
        {"__metadata__": notes, **header},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ):
        write_raw(path, raw, bytes(data))
        try:
            found = read_header(path)
        except CheckpointError:
            continue
        with safe_open(path, framework="np") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
            told = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == told


def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    """Both were read once, and called good."""
    good = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for raw in ({"__metadata__": {"format": 7}, **good}, json.dumps(good).encode("utf-16")):
        path = write_raw(tmp_path / "f.safetensors", raw, bytes(4))
        with pytest.raises(CheckpointError):
            read_header(path)
        with pytest.raises(SafetensorError), safe_open(path, framework="np"):
            pass


_json = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_subnormal=False), st.text(max_size=4)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@anything
@given(key=st.sampled_from(sorted(tiny_config())), value=st.one_of(_json, st.integers(0, 10**12)))
def test_any_value_in_a_config(tmp_path: Path, key: str, value: Any) -> None:
    """It is a model whose table of tensors can be made at once, or refused."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_config(), key: value}))
    began = time.process_time()
    try:
        config = read_config(path)
        shape = Shape.from_config(config)
        assert len(table(shape)) > 10
    except (CheckpointError, FamilyError):
        pass
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": -1e-6}, {"rms_norm_eps": "1e-6"}, {"rope_theta": 0}, {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "sideways"}}, {"tie_word_embeddings": "false"}, {"norm_topk_prob": 1},
        {"hidden_act": "os.system"}, {"eos_token_id": "1"}, {"partial_rotary_factor": 0.2, "rope_parameters": None},
        {"text_config": 7}, {"quantization_config": "fp8"}, {"num_nextn_predict_layers": -1},
        {"_attn_implementation": "someone/kernels"}, {"num_hidden_layers": 10**9}, {"num_experts": 10**12},
        {"hidden_size": 10**400}, {"vocab_size": True}, {"experts": 1, "num_experts": 65537},
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    config = {**tiny_config(), **change}
    if "num_hidden_layers" in change:
        del config["layer_types"]
    path.write_text(json.dumps(config))
    with pytest.raises((CheckpointError, FamilyError), match=next(iter(change)).removesuffix("_parameters")):
        Shape.from_config(read_config(path))


@anything
@given(
    entry=st.one_of(st.text(max_size=6), st.sampled_from(["..", ".", "a/b", "/x", "x\0", "model", "x" * 300]), _json)
)
def test_any_file_name_in_an_index(model: Path, tmp_path: Path, entry: Any) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(model, folder)
    index = json.loads((model / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = entry
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises((CheckpointError, OSError)):
        read_index(folder)


def test_a_receipt_that_leaves_out_weights_names_no_model(copy: Path) -> None:
    receipt = json.loads((copy / "receipt.json").read_text())
    receipt["files"] = {"config.json": receipt["files"]["config.json"]}
    (copy / "receipt.json").write_text(json.dumps(receipt))
    before = folder_fingerprint(copy)
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert folder_fingerprint(copy) != before


def test_a_source_is_cut_only_as_its_receipt_has_it(copy: Path, tmp_path: Path) -> None:
    config = read_config(copy)
    plan = Plan.model_validate(
        {"source": {"model_type": "qwen3_next", "layers": 4, "hidden": 16, "experts": 8, "expert_size": 12,
                    "shared_size": 10, "top_k": 2, "mtp": True}}
    )  # fmt: skip
    (copy / "config.json").write_text(json.dumps(config, indent=3))  # may be edited; the weights may not
    cut(copy, plan, out_folder=tmp_path / "good")
    shard = next(copy.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed.*remove receipt.json if that is meant"):
        cut(copy, plan, out_folder=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# Plans and recipes

_PLAN: dict[str, Any] = {
    "source": {"model_type": "qwen3_next", "layers": 4, "hidden": 16, "experts": 8, "expert_size": 12,
               "shared_size": 10, "top_k": 2, "mtp": False},
    "steps": [
        {"step": "drop_layers", "layers": [2, 3]},
        {"step": "cut_experts", "kept": {"0": [0, 1, 2], "1": [1, 2, 3]}},
        {"step": "set_top_k", "top_k": 1},
    ],
}  # fmt: skip


def _replaced(tree: Any, place: int, value: Any) -> Any:
    """The tree with its `place`-th value, counted depth first, replaced."""
    left = [place]

    def walk(node: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            return value
        if isinstance(node, dict):
            return {key: walk(inner) for key, inner in node.items()}
        return [walk(inner) for inner in node] if isinstance(node, list) else node

    return walk(tree)


@anything
@given(place=st.integers(0, 30), value=_json)
def test_any_value_in_a_plan(place: int, value: Any) -> None:
    try:
        plan = parse_plan(json.dumps(_replaced(_PLAN, place, value)))
        check_plan(plan, tiny_shape().trunk)
    except (PlanError, FamilyError):
        pass


_RECIPE: dict[str, Any] = {
    "model": "x", "seed": 1, "keep": {"experts": "50%", "layers": 2}, "data": {"train": ["demo"], "sequence_length": 8},
    "distill": {"tokens": 100, "learning_rate": {"peak": 1e-3}}, "schedule": [{"layers": 1, "tokens": 1}],
}  # fmt: skip


@anything
@given(place=st.integers(0, 20), value=st.one_of(_json, st.floats(allow_subnormal=False)))
def test_any_value_in_a_recipe(tmp_path: Path, place: int, value: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_replaced(_RECIPE, place, value)))
    with contextlib.suppress(RecipeError):
        assert Recipe.parse(Recipe.load(path).dump()) == Recipe.load(path)


_LAUGHS = "a0: &a0 lol\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_LAUGHS, "100,000 places"),
        ("a: &a [*a]", "alias of itself"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("seed: " + "9" * 10_000, "digits"),
        ("? [a, b]\n: 1", "a key must be a word"),
        ("a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("a: " + "x" * 1_000_000, "at most 1,000,000"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=reason):
        Recipe.load(tmp_path / "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# Artifacts of our own, changed by somebody


@pytest.mark.parametrize("name", ["../precious", "/precious", "inside/../../precious"])
def test_a_stage_record_removes_nothing_outside(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    name = str(precious) if name.startswith("/") else name
    with open_run(tmp_path / "run") as run:
        run.path("gone").mkdir()
        run.finish("stage", {}, outputs=["gone"])
        record = tmp_path / "run" / "stages" / "stage.json"
        facts = json.loads(record.read_text())
        record.write_text(json.dumps({**facts, "outputs": {"missing": "0", name: "0"}}))
        with pytest.raises(RunError, match="lies outside the run folder"):
            run.is_current("stage", {})
    assert precious.is_dir()


@pytest.mark.parametrize("outputs", [None, [], "x"])
def test_a_stage_record_without_outputs(tmp_path: Path, outputs: object) -> None:
    with open_run(tmp_path / "run") as run:
        run.finish("stage", {})
        record = tmp_path / "run" / "stages" / "stage.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "outputs": outputs}))
        with pytest.raises(RunError, match="no record of a stage"):
            run.is_current("stage", {})


def _metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _elsewhere(folder: Path, ran: Path) -> bytes:
    metadata = _metadata(folder)
    for info in metadata.storage_data.values():
        info.relative_path = "../../x"
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, ran: pickle.dumps(Runs(ran)),
        lambda folder, ran: pickle.dumps(_metadata(folder).__class__({}, planner_data=Runs(ran), storage_data={})),
        _elsewhere,
        lambda folder, ran: pickle.dumps({"a": 1}),
        lambda folder, ran: (folder / ".metadata").read_bytes()[:-20],
        lambda folder, ran: b"",
    ],
    ids=["code", "code inside", "files elsewhere", "no metadata", "cut short", "empty"],
)
def test_a_state_from_a_stranger_runs_no_code(tmp_path: Path, make: Callable[[Path, Path], bytes]) -> None:
    folder, ran = tmp_path / "step" / "tensors", tmp_path / "ran"
    write({"a": torch.ones(3, 4)}, folder, group=None, background=False).wait()
    given = torch.zeros(3, 4)
    Stored(folder).fill({"a": given})
    assert given.sum() == 12
    (folder / ".metadata").write_bytes(make(folder, ran))
    with pytest.raises(RunError, match="cannot be read"):
        Stored(folder)
    assert not ran.exists()


def test_a_state_whose_tensors_were_altered(tmp_path: Path) -> None:
    """torch reads a flipped bit of a tensor as another number."""
    folder = tmp_path / "step" / "tensors"
    write({"a": torch.ones(300, 4)}, folder, group=None, background=False).wait()
    part = next(folder.glob("*.distcp"))
    content = bytearray(part.read_bytes())
    place = content.index(np.ones(9, np.float32).tobytes())
    part.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    given = torch.zeros(300, 4)
    Stored(folder).fill({"a": given})
    assert not torch.equal(given, torch.ones(300, 4))  # as in folders of older versions, which have no seal
    part.write_bytes(content)
    seal(folder)
    Stored(folder).fill({"a": given})
    part.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(RunError, match="torn, altered or gone"):
        Stored(folder)


def test_links_that_lead_nowhere(copy: Path) -> None:
    for name in ("tokenizer.json", INDEX_NAME, "config.json"):
        (copy / name).unlink()
        (copy / name).symlink_to(name)
        with pytest.raises(CheckpointError, match="a link that leads to itself"):
            read_structure(copy)


@pytest.mark.parametrize("change", [{"se": -0.5}, {"se": 1e999}, {"value": 1e999}, {"value": "nan"}])
def test_figures_that_cannot_be(change: dict[str, Any]) -> None:
    entry = {"value": 0.5, "se": 0.1, "n": 9, "unit": "", "per": "", **change}
    with pytest.raises(RunError, match="broken record"):
        model_record("cut", {"schema": 1, "figures": {"kl": {"": entry}}}, where="cut.json")


def test_a_plan_that_is_no_file_of_this_world(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(3 << 30)
    (tmp_path / "lists.json").write_text('{"notes": {"a": [' + "[]," * 2_000_000 + "1]}}")
    reasons = {
        "pipe.json": "pipe",
        "big.json": "at most 80,000,000",
        ".": "a folder",
        "lists.json": "2,000,000 are read",
    }
    for name, reason in reasons.items():
        with pytest.raises(PlanError, match=reason):
            read_plan(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"routed": np.ones((2, 2))}, {"routed": np.ones(3)}, {"x_sum": np.ones(5)}, {"tokens": np.ones(2)},
        {"stranger": np.ones(2)}, {"logit_gram": np.ones((2, 3))},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_statistics_fit_themselves(change: dict[str, np.ndarray]) -> None:
    good = {"tokens": np.array(7.0), "x_sum": np.ones(4), "y_sum": np.ones(4), "routed": np.ones(2)}
    good["gate_sum"] = np.ones(2)
    assert LayerStats.from_state(good).tokens == 7
    with pytest.raises(ValueError, match="fits none|unknown fields"):
        LayerStats.from_state({**good, **change})


@pytest.mark.parametrize("array", [np.array([1.0, np.nan]), np.ones(2, np.float32)], ids=["NaN", "float32"])
def test_statistics_are_finite_float64(tmp_path: Path, array: np.ndarray) -> None:
    Stats("m", ("t",), 7, 1, layers={"0": LayerStats(7.0, np.ones(2), np.ones(2))}).save(tmp_path)
    assert Stats.load(tmp_path).layers["0"].tokens == 7
    save_file({"x_sum": array}, tmp_path / "layer-0.safetensors")
    with pytest.raises(RunError, match="x_sum holds .* not finite float64 throughout"):
        Stats.load(tmp_path)


def test_packed_tokens_that_were_changed(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    model = write_model(tmp_path / "model")
    packed = pack(read_corpus([(text, None)]), model, out_folder=tmp_path / "tokens", sequence_length=16, seed=0)
    for name in ("tokens.npy", "mask.npy", "documents.npy"):
        folder = Path(shutil.copytree(packed.folder, tmp_path / name))
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match="do not fit each other"):
            TokenSet.open(folder)
    meta = json.loads((packed.folder / "meta.json").read_text())
    for key in meta.keys() - {"seed", "rows"}:  # nobody reads these two
        (packed.folder / "meta.json").write_text(json.dumps({**meta, key: {"x": []}}))
        with pytest.raises(DataError):
            TokenSet.open(packed.folder)
    old = {key: value for key, value in meta.items() if key != "files"}  # of a version without
    (packed.folder / "meta.json").write_text(json.dumps(old))
    assert len(TokenSet.open(packed.folder)) == len(packed)
    np.save(packed.folder / "tokens.npy", np.full(len(packed) * 16 + 1, 5000, np.uint16))
    with pytest.raises(DataError, match="do not fit each other"):
        TokenSet.open(packed.folder)


def test_a_cached_row_spells_no_gigabytes() -> None:
    import zlib

    words = CachedProbs(
        ids=np.array([[1, 5]]), p=np.array([[0.5, 0.25]]), rest=np.array([0.25]),
        sampled=np.empty((1, 0), np.int64), sampled_log_p=np.empty((1, 0), np.float32),
    )  # fmt: skip
    sizes = {"vocab_size": 64, "length": 1, "k": 2, "samples": 0}
    blob = encode(words, vocab_size=64)
    assert decode(blob, **sizes).ids.tolist() == [[1, 5]]
    with pytest.raises(ValueError, match="not below 5"):
        decode(blob, **{**sizes, "vocab_size": 5})
    bomb = zlib.compress(bytes(100_000_000))
    first = np.frombuffer(blob, "<u4", 2)
    bombed = np.array([len(bomb), first[1]], "<u4").tobytes() + bomb + blob[8 + int(first[0]) :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(bombed, **sizes).ids.tolist() == [[0, 0]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


# Text and tokenizers


@pytest.mark.parametrize(
    "line",
    ['{"text": "half \\ud800"}', '{"text": "x", "domain": ["a"]}', '{"text": "x", "source": 7}',
     '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"text": "x", "n": ' + "9" * 9000 + "}"],
    ids=["surrogate", "domain", "source", "deep", "digits"],
)  # fmt: skip
def test_lines_that_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "text.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"text.jsonl:1"):
        read_corpus([(tmp_path / "text.jsonl", None)])


def test_broken_and_bursting_archives(tmp_path: Path) -> None:
    packed = bytearray(
        gzip.compress(b'{"text": "' + bytes(range(32, 33)) * 5000 + os.urandom(4000).hex().encode() + b'"}')
    )
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "torn.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match="torn.jsonl.gz"):
        read_corpus([(tmp_path / "torn.jsonl.gz", None)])
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(101_000_000), 1))
    with pytest.raises(DataError, match="100,000,000 characters or more"):
        read_corpus([(tmp_path / "bomb.jsonl.gz", None)])
    with (tmp_path / "long.jsonl.gz").open("wb") as file:
        file.write(gzip.compress(b'{"text": "x"}'))
        file.truncate(3 << 30)
    with pytest.raises(DataError, match="zeros behind the end"):
        read_corpus([(tmp_path / "long.jsonl.gz", None)])


def test_tokenizers_run_no_code_and_break_with_a_reason(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    code = {**config, "tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(code))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert load_tokenizer(model).eos_token_id == 0  # what tokenizer.json says, without a word of mine.py
    assert not (tmp_path / "ran").exists()
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    good = json.loads((model / "tokenizer.json").read_text())
    for change in ({"model": 7}, {"added_tokens": [{"id": -5}]}, {"decoder": {"type": "Unheard"}}):
        (model / "tokenizer.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match="tokenizer cannot be loaded"):
            load_tokenizer(model)
    words = {"type": "WordLevel", "vocab": {"the": 7}, "unk_token": "[UNK]"}  # fails at the first word that is another
    (model / "tokenizer.json").write_text(json.dumps({**good, "model": words}))
    text = read_corpus([(write_text(tmp_path / "text.jsonl"), None)])
    with pytest.raises(DataError, match="cannot be loaded or used"):
        pack(text, model, out_folder=tmp_path / "tokens", sequence_length=16, seed=0)


def test_no_call_trusts_remote_code_or_opens_a_pickle() -> None:
    """Left out, `trust_remote_code` is a question on the terminal; torch.load and numpy take pickles if told to."""
    found = 0
    for path in Path(moeslim.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            values = {key.arg: key.value for key in node.keywords}
            if node.func.attr == "from_pretrained":
                given = values.get("trust_remote_code")
                assert isinstance(given, ast.Constant), path
                assert given.value is False, path
                found += 1
            pickles = {"allow_pickle": False, "weights_only": True}
            for key, safe in pickles.items():
                assert key not in values or values[key].value is safe, path  # type: ignore[attr-defined]
            assert ast.unparse(node.func) not in ("torch.load", "yaml.unsafe_load", "yaml.full_load"), path
    assert found >= 2


def test_names_in_files_cannot_steer_the_terminal() -> None:
    assert printable("ok \U0001f600 é\n") == "ok \U0001f600 é\n"
    assert printable("\x1b[2J\ud800\u202e\r") == "\\x1b[2J\\ud800\\u202e\\r"
    assert not issubclass(UnicodeEncodeError, MoeslimError)
