"""The MTP block and the student's forward: parity with transformers' MtpModel and with losses written out by hand."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import MtpModel

from moeslim.losses import Coefficients, LossWeights, Signal, coefficients, term_counts
from moeslim.model.load import load_student
from moeslim.model.sorted_experts import NAME as SORTED
from moeslim.model.student import Student
from tiny import tiny_config, write_tiny

ONE = Coefficients({"lm": 1.0, "mtp_lm.1": 1.0})

RENAMED = {
    "norm_embedding": "enorm",
    "norm_hidden": "hnorm",
    "fc": "eh_proj",
    "norm": "post_norm",
    "layers": "mtp_block",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def student(folder: Path) -> Student:
    return load_student(folder)


def _rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def _oracle(student: Student) -> MtpModel:
    """transformers' own MTP module, filled with our block's weights (its embedding is initialised anew: not used)."""
    config = copy.deepcopy(student.trunk.config)
    config.num_mtp_layers = 1
    config.mtp_layer_types = ["full_attention"]
    main = copy.deepcopy(student.trunk)
    main.config = config
    mtp = MtpModel(main, 1)
    assert student.mtp is not None
    state = {}
    for name, tensor in student.mtp.state_dict().items():
        first, rest = name.split(".", 1)
        state[f"layers.0.{RENAMED[first]}.{rest.removeprefix('0.')}"] = tensor
    left = mtp.load_state_dict(state, strict=False)
    assert left.unexpected_keys == []
    assert all(not key.startswith("layers") for key in left.missing_keys)
    return mtp.eval()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_block_equals_transformers_mtp_model(folder: Path, attn: str) -> None:
    student = load_student(folder, attn=attn).eval()
    oracle = _oracle(student)
    assert student.mtp is not None
    rows = _rows(1, 10)
    with torch.no_grad():
        hidden = student.hidden(rows[:, :-1])
        ours = student.mtp_states(hidden, rows, depths=1)[0]
        cache, words = DynamicCache(config=oracle.config), student.trunk.model.embed_tokens(rows[:, 1:-1])
        positions = torch.arange(8).unsqueeze(0)
        theirs = oracle.forward_layer(0, hidden[:, :-1], positions, cache, inputs_embeds=words)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((ours - hidden[:, :-1]).abs().max()) > 0.1  # the block does something


def test_block_is_causal_in_both_back_ends(folder: Path) -> None:
    rows = _rows(1, 10)
    changed = rows.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    for attn in ("sdpa", "eager"):
        student = load_student(folder, attn=attn).eval()
        with torch.no_grad():
            one, two = (student.mtp_states(student.hidden(r[:, :-1]), r, depths=2) for r in (rows, changed))
        for m in (1, 2):  # position i of depth m knows tokens up to i + m
            same = 6 - m
            torch.testing.assert_close(one[m - 1][:, :same], two[m - 1][:, :same], rtol=1e-5, atol=1e-6)
            assert float((one[m - 1][:, same] - two[m - 1][:, same]).abs().max()) > 1e-3


def test_depths_follow_the_recursion(student: Student) -> None:
    """Depth m at i reads depth m-1 at i and the embedding of t_{i+m}; written out with the block alone."""
    assert student.mtp is not None
    rows = _rows(2, 9)
    embed, rotary = student.trunk.model.embed_tokens, student.trunk.model.rotary_emb
    with torch.no_grad():
        hidden = student.hidden(rows[:, :8])
        states = student.mtp_states(hidden, rows, depths=3)
        assert [s.shape[1] for s in states] == [7, 6, 5]
        first = student.mtp(hidden[:, :7], embed(rows[:, 1:8]), rotary=rotary)
        second = student.mtp(first[:, :6], embed(rows[:, 2:8]), rotary=rotary)
        third = student.mtp(second[:, :5], embed(rows[:, 3:8]), rotary=rotary)
    for ours, by_hand in zip(states, (first, second, third), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=0)


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_forward_sums_equal_logits_written_out(student: Student, depths: int) -> None:
    rows, mask = _rows(3, 9), torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.25
    with torch.no_grad():
        names = ["lm", *(f"mtp_lm.{m}" for m in range(1, depths + 1))]
        terms = student(rows, mask, coefficients=Coefficients(dict.fromkeys(names, 0.0)))
        hidden = student.hidden(rows[:, :-1])
        states = [hidden, *student.mtp_states(hidden, rows, depths=depths)]
        counts = term_counts(mask, depths)
        for m, state in enumerate(states):
            logp = torch.log_softmax((state @ student.head.T).double(), -1)
            wanted, count = 0.0, 0
            for b in range(3):
                for i in range(8 - m):
                    if mask[b, i + m]:
                        wanted -= float(logp[b, i, rows[b, i + m + 1]])
                        count += 1
            name = f"mtp_lm.{m}" if m else "lm"
            assert float(terms.sums[name]) == pytest.approx(wanted, rel=1e-5)
            assert counts[name] == count
    assert list(terms.sums) == names
    assert float(terms.loss) == 0.0


def test_a_student_is_its_own_best_teacher(student: Student) -> None:
    """teacher == student: KD is 0; MTP-KD is the KL from the backbone's word at the same target, not 0."""
    rows, mask = _rows(2, 9), torch.ones(2, 8, dtype=torch.bool)
    hidden = student.hidden(rows[:, :-1])
    asked = Coefficients({"kd": 1.0, "mtp_kd.1": 1.0})
    terms = student(rows, mask, coefficients=asked, teacher=Signal(hidden.detach(), student.head.detach()))
    assert float(terms.sums["kd"]) == pytest.approx(0.0, abs=1e-5)
    p = torch.log_softmax((hidden @ student.head.T).double(), -1)
    q = torch.log_softmax((student.mtp_states(hidden, rows, depths=1)[0] @ student.head.T).double(), -1)
    wanted = (p[:, 1:].exp() * (p[:, 1:] - q)).sum()  # target t_{i+2}: the backbone says it at i+1
    assert float(terms.sums["mtp_kd.1"]) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(wanted.detach()) > 1.0


def test_gradient_reaches_the_trunk_unless_detached(student: Student) -> None:
    rows, mask = _rows(2, 9), torch.ones(2, 8, dtype=torch.bool)
    for detach in (False, True):
        student.detach_trunk = detach
        student.zero_grad()
        student(rows, mask, coefficients=Coefficients({"lm": 0.0, "mtp_lm.1": 1.0})).loss.backward()
        assert student.mtp is not None
        assert student.mtp.fc.weight.grad is not None
        assert (student.trunk.model.layers[0].input_layernorm.weight.grad is None) == detach


def _by_hand_balance(student: Student, batches: list[torch.Tensor]) -> float:
    """E sum f p per router: f from the selections in all batches, p from the last; from the routers' own weights."""
    gates = {n: m for n, m in student.named_modules() if n.endswith("mlp.gate")}
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in gates}
    hooks = [m.register_forward_pre_hook(lambda _m, x, n=n: inputs[n].append(x[0].detach())) for n, m in gates.items()]
    with torch.no_grad():
        for rows in batches:
            student.mtp_states(student.hidden(rows[:, :-1]), rows, depths=1)
    for hook in hooks:
        hook.remove()
    values = []
    for name, gate in gates.items():
        p = [torch.softmax((x.reshape(-1, 16) @ gate.weight.detach().T).double(), -1) for x in inputs[name]]
        chosen = torch.cat([one.topk(2, -1).indices.reshape(-1) for one in p])
        f = torch.bincount(chosen, minlength=8).double() / len(chosen)
        values.append(8 * float((f * p[-1].mean(0)).sum()))
    assert len(values) == 5  # four trunk layers and the MTP block
    return sum(values) / len(values)


def test_balance_counts_over_the_micro_batches_of_a_step(student: Student) -> None:
    one, two = _rows(2, 9), _rows(2, 9, seed=5)
    mask = torch.ones(2, 8, dtype=torch.bool)
    student.routers.start_step()
    first, second = (student(rows, mask, coefficients=ONE).balance for rows in (one, two))
    assert first is not None
    assert second is not None
    assert float(first) == pytest.approx(_by_hand_balance(student, [one]), rel=1e-5)
    assert float(second) == pytest.approx(_by_hand_balance(student, [one, two]), rel=1e-5)
    student.routers.start_step()
    again = student(two, mask, coefficients=ONE).balance
    assert again is not None
    assert float(again) == pytest.approx(_by_hand_balance(student, [two]), rel=1e-5)


def test_sorted_experts_equal_eager_ones_in_values_and_gradients(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe_intermediate_size=16)
    rows, mask = _rows(2, 17), torch.ones(2, 16, dtype=torch.bool)
    factors = coefficients(LossWeights(beta=0.3, alpha=0.01), counts=term_counts(mask, 1), tokens=32)
    found = {}
    for experts in ("eager", SORTED):
        student = load_student(folder, experts=experts)
        loss = student(rows, mask, coefficients=factors).loss
        loss.backward()
        found[experts] = [loss.detach(), *(p.grad for p in student.parameters())]
    for ours, eager in zip(found[SORTED], found["eager"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_disk_names_cover_trunk_and_block_once() -> None:
    student = Student.from_config(tiny_config(num_nextn_predict_layers=1, tie_word_embeddings=True))
    names = student.disk_state()
    assert "lm_head.weight" not in names
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in names
    assert names["model.embed_tokens.weight"] is student.head
    assert Student.from_config(tiny_config()).mtp is None


def test_fresh_weights_are_those_of_transformers() -> None:
    config = tiny_config(num_nextn_predict_layers=1, initializer_range=0.05)
    torch.manual_seed(3)
    student = Student.from_config(config)
    torch.manual_seed(3)
    theirs = Qwen3NextForCausalLM(Qwen3NextConfig.from_dict(config))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(student.trunk.state_dict()[name], tensor, rtol=0, atol=0)
    assert student.mtp is not None
    assert float(student.mtp.fc.weight.detach().std()) == pytest.approx(0.05, rel=0.2)
    assert float(student.mtp.norm.weight.detach().abs().max()) == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_detached_mtp_terms_train_the_mtp_head_alone(tmp_path: Path, tied: bool) -> None:
    """Outside of `mtp.*` the gradients are those without MTP terms, inside they are as large as ever."""
    student = load_student(write_tiny(tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=tied))
    rows, mask = _rows(2, 9), torch.ones(2, 8, dtype=torch.bool)
    found = []
    for weight, detached in ((1.0, False), (0.0, False), (1.0, True)):
        student.detach_trunk = detached
        student.zero_grad()
        asked = Coefficients({"lm": 1.0, "mtp_lm.1": weight, "mtp_lm.2": weight})
        student(rows, mask, coefficients=asked).loss.backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    plain, without, detached = found
    assert detached.keys() == plain.keys()
    for name, gradient in detached.items():
        wanted = plain[name] if name.startswith("mtp.") else without[name]
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()), msg=name)
