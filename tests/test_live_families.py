"""Families beside Qwen3-Next, live: pruned, trained, measured and drafted with as by the command line.

What runs is compared with transformers' own float64 model (stock.py), which knows nothing of moeslim.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from command import MEASURE, SMALL, TOKENIZER, TRAIN, Command, moeslim, settings, write_text
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.errors import CheckpointError, FamilyError
from moeslim.families import FAMILIES as PAGES
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.student import Student
from moeslim.model.walk import WalkSettings
from moeslim.stats import Stats
from stock import Stock
from tiny import FAMILIES, tiny_config, write_tiny

__all__ = ["moeslim"]  # a fixture

pytestmark = pytest.mark.bits("what is not trained is copied, not computed")

OTHERS = [family for family in FAMILIES if family != "qwen3_next"]
TOKENS = torch.randint(0, 64, (3, 18), generator=torch.Generator().manual_seed(1))
E, K = 8, 2


@pytest.mark.parametrize("family", OTHERS)
def test_a_live_model_says_what_transformers_says(tmp_path: Path, family: str) -> None:
    """Trunk and MTP head, whose block transformers builds of its own MtpLayer."""
    folder = write_tiny(tmp_path / "model", family=family)
    student = load_student(folder, dtype=torch.float64, experts="eager").eval()
    with torch.no_grad():
        hidden = student.hidden(TOKENS)
        states = [hidden, *student.mtp_states(hidden, torch.cat([TOKENS, TOKENS[:, :1]], dim=1), depths=1)]
        found = torch.cat([state @ student.head.T for state in states], dim=1)
    expected = Stock(folder).run(TOKENS)
    assert found.shape == expected.shape == (3, 18 + (17 if family == "glm4_moe" else 0), 64)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4  # routers, norms and rotary run in float32 there


class Direct:
    """What one float64 forward of transformers' own layers shows of layer `key`, expert by expert."""

    def __init__(self, folder: Path, key: str) -> None:
        stock = Stock(folder)
        block = stock.layer(key).mlp
        seen: dict[str, Any] = {}
        stock.router(key).register_forward_hook(lambda _m, _i, output: seen.update(logits=output[0]))
        block.experts.register_forward_hook(
            lambda _m, inputs, _o: seen.update(zip(("x", "ids", "gates"), inputs, strict=True))
        )
        shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
        if shared is not None:
            shared.down_proj.register_forward_hook(lambda _m, inputs, _o: seen.update(shared=inputs[0]))
        stock.run(TOKENS)
        self.block, self.shared = block, None
        if shared is not None:
            self.shared = seen["shared"].flatten(0, -2)
            gate = getattr(block, "shared_expert_gate", None)
            self.shared = self.shared if gate is None else gate(seen["x"]).sigmoid() * self.shared
        self.x, self.ids, self.gates, self.logits = (seen[name] for name in ("x", "ids", "gates", "logits"))
        sigmoid = hasattr(stock.router(key), "e_score_correction_bias")
        scores = self.logits.sigmoid() if sigmoid else self.logits.softmax(-1)
        self.shares = scores / scores.sum(-1, keepdim=True)

    def expert(self, number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gated activations and outputs of an expert."""
        experts = self.block.experts
        if experts.has_bias:  # gpt-oss: transposed, gate and up in turns, clamped
            both = x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
            gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
            h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            return h, h @ experts.down_proj[number] + experts.down_proj_bias[number]
        gate, up = (x @ self.block.experts.gate_up_proj[number].T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        return h, h @ self.block.experts.down_proj[number].T

    def sums(self) -> dict[str, np.ndarray]:
        """Per expert the sums of `LayerStats` that importances are made of."""
        found: dict[str, list[Any]] = {
            name: [] for name in ("routed", "gate_sum", "gate_norm_sum", "softmax_norm_sum", "neuron_sum")
        }
        share = self.gates / self.gates.sum(-1, keepdim=True)
        for number in range(E):
            token, slot = torch.where(self.ids == number)
            h, out = self.expert(number, self.x[token])
            norms, gates = out.norm(dim=-1), self.gates[token, slot]
            found["routed"].append(len(token))
            found["gate_sum"].append(share[token, slot].sum())
            found["gate_norm_sum"].append((gates * norms).sum())
            found["softmax_norm_sum"].append((self.shares[token, number] * norms).sum())
            found["neuron_sum"].append((gates[:, None] * h.abs()).sum(0).detach().numpy())
        return {name: np.array([np.asarray(value) for value in values], float) for name, values in found.items()}


def calibrated(folder: Path, out: Path, *, removal: bool = False) -> Stats:
    """Statistics over TOKENS, in float64; a row holds one token more, which the MTP block alone reads."""
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
    settings_ = WalkSettings(rows_per_batch=2, dtype=torch.float64)
    return calibrate(folder, rows, out=out, settings=settings_, observe=Observe(removal=removal))


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_statistics_equal_a_direct_computation(tmp_path: Path, family: str) -> None:
    """To 1e-4: the observed model's router and norms run in float32, the direct one's do not."""
    folder = write_tiny(tmp_path / "model", family=family)
    stats = calibrated(folder, tmp_path / "stats")
    for key in ("1", "3"):
        direct, found = Direct(folder, key), stats.layers[key]
        for name, expected in direct.sums().items():
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-5, err_msg=f"{key} {name}")
        if direct.shared is not None:  # an ungated shared expert counts every token whole, a gated one by its gate
            np.testing.assert_allclose(found.neuron_shared_sum, direct.shared.abs().sum(0), rtol=1e-4)
    assert stats.layers["0"].is_moe == (family != "glm4_moe")
    assert ("mtp.0" in stats.layers) == (family == "glm4_moe")


@pytest.mark.parametrize(
    ("family", "renormalise"),
    [("qwen3_moe", True), ("glm4_moe", True), ("glm4_moe", False), ("mixtral", True), ("gpt_oss", True)],
)
@torch.no_grad()
def test_removal_is_what_the_block_loses(tmp_path: Path, family: str, renormalise: bool) -> None:
    """Each expert taken out of the choice of transformers' own router: the rest is chosen and weighed again."""
    groups = {"n_group": 1} if family == "glm4_moe" else {}
    folder = write_tiny(tmp_path / "model", family=family, norm_topk_prob=renormalise, **groups)
    found = calibrated(folder, tmp_path / "stats", removal=True).layers["2"].removal_sum
    direct = Direct(folder, "2")
    whole = sum(
        direct.gates[:, k, None]
        * torch.stack([direct.expert(int(e), x)[1] for x, e in zip(direct.x, direct.ids[:, k], strict=True)])
        for k in range(K)
    )
    scores = direct.logits.sigmoid() if family == "glm4_moe" else direct.logits.softmax(-1)
    router = Stock(folder).router("2")
    bias = getattr(router, "e_score_correction_bias", torch.zeros(E))
    scale = getattr(router, "routed_scaling_factor", 1.0)
    expected = np.zeros(E)
    for gone in range(E):
        left = scores.clone()
        choice = scores + bias
        choice[:, gone] = -torch.inf
        ids = choice.topk(K).indices
        gates = left.gather(1, ids)
        gates = scale * (gates / gates.sum(-1, keepdim=True) if renormalise else gates)
        for token in torch.where((direct.ids == gone).any(1))[0].tolist():
            other = sum(gates[token, k] * direct.expert(int(ids[token, k]), direct.x[token])[1] for k in range(K))
            expected[gone] += float((other - whole[token]).norm())
    assert expected.max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_balance_of_a_sigmoid_router_is_by_its_own_scores(tmp_path: Path) -> None:
    """E sum f p: p the mean over tokens of each sigmoid over the sum of all, computed from the router's weight."""
    student = load_student(write_tiny(tmp_path / "model", family="glm4_moe"))
    seen: dict[str, list[torch.Tensor]] = {}
    for key, moe in student.moe.items():
        moe.router.register_forward_hook(lambda _m, i, o, key=key: seen.setdefault(key, []).extend((i[0], o[2])))
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    factors = coefficients(LossWeights(beta=0.3, alpha=0.1), counts=term_counts(torch.ones(3, 18), 1), tokens=54)
    terms = student(rows, torch.ones(3, 18, dtype=torch.bool), coefficients=factors)
    losses = []
    for key, (x, ids) in seen.items():
        scores = torch.sigmoid(x.detach().reshape(-1, 16) @ student.moe[key].router.weight.detach().T)
        share = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
        losses.append(float(E * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()))
    assert set(seen) == {"1", "2", "3", "mtp.0"}
    assert float(terms.balance) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_the_command_line_from_prune_to_distill(moeslim: Command, tmp_path: Path, family: str) -> None:
    """The MTP head, where there is one, is calibrated, cut to the trunk's counts, trained and drafted with."""
    heads = family == "glm4_moe"
    model = write_tiny(tmp_path / "model", family=family, vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    moeslim("probe", model, tmp_path / "probe", *data, *settings(*SMALL, "calibrate.sequences=16"))
    cut = tmp_path / "cut"
    width = 16 if PAGES[family].fixed_width else 12
    said = moeslim("prune", model, cut, "--experts", "50%", "--hidden", width, *data, *settings(*SMALL, *MEASURE)).out
    assert "calibrated on" in said
    assert verify(cut).ok
    shape = Reader(cut).shape
    assert (shape["experts"], shape["hidden"], shape.mtp_layers) == (4, width, int(heads))
    out = tmp_path / "trained"
    more = settings(*SMALL, *TRAIN, "distill.micro_rows=1", "distill.alpha=0.01")
    record = moeslim("distill", cut, out, "--teacher", model, *data, *more, "--json").json
    assert verify(out).ok
    before, after = Reader(cut), Reader(out)
    moved = {name for name in before.rows if not torch.equal(before.tensor(name), after.tensor(name))}
    fixed = {name for name in before.rows if "correction_bias" in name}
    assert not moved & fixed
    router = next(row.name for row in before.rows.values() if row.layer == "2" and row.axes == ("experts", "hidden"))
    assert {"model.embed_tokens.weight", router, "lm_head.weight"} <= moved
    assert any(name.startswith("model.layers.4.eh_proj") for name in moved) == heads
    assert record["model"] == str(out)
    drafts = settings(*SMALL, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0")
    told = moeslim("evaluate", out, "--out", tmp_path / "records", "--teacher", model, *data, *drafts).out
    assert ("acc_0" in told) == heads


@pytest.mark.parametrize("family", OTHERS)
def test_searches_at_live_layers(moeslim: Command, tmp_path: Path, family: str) -> None:
    """Sequential, aligned on activations, rho by trial, router rows trained: what a live layer is cut to is written.

    The router's biases and groups are cut with its rows, or the tried layer could not run.
    """
    model = write_tiny(tmp_path / "model", family=family, vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    methods = ("expert_op=partial", "rho=auto", "sequential=true", "calibrate_router=true", "align=activations")
    keys = settings(*SMALL, *MEASURE, "calibrate.sequences=16", *(f"methods.{method}" for method in methods))
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    moeslim("prune", model, tmp_path / "cut", "--experts", "50%", *data, *keys)
    assert verify(tmp_path / "cut").ok
    assert Reader(tmp_path / "cut").shape["experts"] == 4


def test_a_heads_copies_of_embedding_and_head_are_one_with_the_trunks(tmp_path: Path) -> None:
    """GLM's files may hold both a second time: equal ones are written as what they copy, others are refused."""
    folder = write_tiny(tmp_path / "model", family="glm4_moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    copies = {
        "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.4.shared_head.head.weight": "lm_head.weight",
    }
    save_file({**tensors, **{copy: tensors[name].clone() for copy, name in copies.items()}}, file)
    (folder / "receipt.json").unlink()
    student = load_student(folder)
    with torch.no_grad():
        student.parts.embed.weight.mul_(0.5)
        student.head.mul_(0.25)
    save_student(student, folder, out=tmp_path / "saved", kind="distilled")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[copy], saved[name]) for copy, name in copies.items())
    assert torch.equal(saved["lm_head.weight"], tensors["lm_head.weight"] * 0.25)
    save_file({**load_file(file), "model.layers.4.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="embed_tokens.weight differs from model.embed_tokens.weight in dtype"):
        load_student(folder)


def test_a_page_that_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a class holds beyond the page, or in another size, must not be trained and forgotten."""
    page = PAGES["qwen3_moe"]
    parts = {**page.parts, "full_attention": page.parts["full_attention"][:-1]}  # without k_norm
    monkeypatch.setitem(PAGES, "qwen3_moe", replace(page, parts=parts))
    with pytest.raises(
        FamilyError, match=r"families/qwen3_moe.py and Qwen3MoeForCausalLM disagree on 4 tensors.*k_norm"
    ):
        Student.from_config(tiny_config("qwen3_moe"))


def test_a_router_with_a_bias_computes_in_float32_under_autocast(tmp_path: Path) -> None:
    """As its class asks for, and as evaluation does: autocast's bf16 product would send some tokens elsewhere."""
    student = load_student(write_tiny(tmp_path / "model", family="glm4_moe"))
    router, x = student.moe["1"].router, torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert mixed[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))


def test_a_student_in_bfloat16_keeps_its_buffers(tmp_path: Path) -> None:
    """A correction bias is compared with values near 1 and moves in small steps: bf16 has 3 digits there."""
    built = Student.from_config(tiny_config("glm4_moe"), dtype=torch.bfloat16)
    loaded = load_student(write_tiny(tmp_path / "model", family="glm4_moe"), dtype=torch.bfloat16)
    for student in (built, loaded):
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in student.buffers()} == {torch.float32}
    assert built.mtp is not None  # transformers takes GLM without the key for a model with a head


def test_copies_in_another_dtype_are_refused(tmp_path: Path) -> None:
    """Equal values now, but each would be rounded by its own dtype when they are saved."""
    folder = write_tiny(tmp_path / "model", family="glm4_moe", form={"dtype": "bfloat16"})
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.4.embed_tokens.weight": tensors["model.embed_tokens.weight"].float()}
    save_file({**tensors, **more}, folder / "model.safetensors")
    (folder / "receipt.json").unlink()
    with pytest.raises(CheckpointError, match="in dtype or values"):
        load_student(folder)


def test_a_group_needs_as_many_experts_as_rank_it() -> None:
    with pytest.raises(FamilyError, match="ranks a group by its 2 best; there must be at least 4"):
        Student.from_config(tiny_config("glm4_moe", n_routed_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_say_which_classes_have_eager_attention_alone(family: str) -> None:
    """A walk then has all scores of a layer in memory, which its bound counts."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]
    assert PAGES[family].eager_attention == (not found._supports_sdpa)
