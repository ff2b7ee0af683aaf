"""Which part a tensor belongs to, what each part's optimizer does to it, and that a frozen part is left alone."""

import re
from pathlib import Path

import pytest
import torch

import micro
import ranks
import sharded
from moeslim import pipeline
from moeslim.checkpoint.reader import Reader
from moeslim.distill.optimizer import freeze, make_optimizer, set_rate
from moeslim.distill.parts import parts_of, trained_parts
from moeslim.distill.settings import TrainSettings
from moeslim.errors import RecipeError
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.model.load import load_student
from moeslim.model.sharding import sharding, whole
from moeslim.model.student import Student
from moeslim.recipe import PartSettings
from tiny import changed, train_settings, write_tiny

pytestmark = pytest.mark.bits("frozen and untouched weights keep their bits")

SETTINGS = train_settings(1, learning_rate=1e-2, weight_decay=0.1)
BY_NAME = [  # the first pattern that is found decides
    (r"^mtp\.", "mtp"),
    (r"embed_tokens", "embedding"),
    (r"^lm_head", "head"),
    (r"layernorm|^model\.norm", "norm"),
    (r"self_attn", "attention"),
    (r"linear_attn", "deltanet"),
    (r"mlp\.gate\.weight", "router"),
    (r"shared_expert", "shared"),
    (r"mlp\.experts", "experts"),
    (r"mlp\.(gate|up|down)_proj", "dense"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has every part: a dense DeltaNet layer, an attention layer with experts, an untied head, an MTP."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2, mlp_only_layers=[0])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tied", num_hidden_layers=2, tie_word_embeddings=True)


def part_by_name(name: str) -> str:
    return next(part for pattern, part in BY_NAME if re.search(pattern, name))


def gradients(student: Student) -> None:
    """One backward pass of all terms that need no teacher, the balance among them."""
    generator = torch.Generator().manual_seed(0)
    rows, mask = torch.randint(0, 64, (4, 9), generator=generator), torch.ones(4, 8, dtype=torch.bool)
    weights = LossWeights(beta=0.3, alpha=1e-2)
    factors = coefficients(weights, counts=term_counts(mask, 1), tokens=mask.numel())
    student.routers.start_step()
    student(rows, mask, coefficients=factors).loss.backward()


@pytest.mark.parametrize("model", ["folder", "tied"])
def test_every_live_tensor_has_its_part(model: str, request: pytest.FixtureRequest) -> None:
    student = load_student(request.getfixturevalue(model))
    found = parts_of(student.shape)
    assert found == {name: part_by_name(name) for name in student.disk_state()}
    absent = {"folder": set(), "tied": {"head", "dense"}}[model]
    assert {part for _, part in BY_NAME} - set(found.values()) == absent


def test_weight_decay_is_on_matrices_only(folder: Path) -> None:
    student = load_student(folder)
    decayed, plain = make_optimizer(student, SETTINGS).param_groups
    names = {id(p): n for n, p in student.disk_state().items()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    plain_names = {names[id(p)] for p in plain["params"]}
    assert {"model.norm.weight", "mtp.norm.weight", "model.layers.0.linear_attn.A_log"} <= plain_names
    matrices = {names[id(p)] for p in decayed["params"]}
    assert {"model.layers.0.linear_attn.conv1d.weight", "mtp.layers.0.mlp.experts.down_proj"} <= matrices
    assert len(plain_names) + len(matrices) == len(list(student.parameters()))


def test_each_part_has_its_rate_and_decay(folder: Path) -> None:
    """Adam's first step by hand: with g the gradient, p - rate * f * (decay * p + g / (|g| + eps))."""
    student = load_student(folder)
    settings = changed(
        SETTINGS,
        parts={
            "router": PartSettings(learning_rate=0.25),
            "experts": PartSettings(weight_decay=0.0),
            "mtp": PartSettings(learning_rate=2.0, weight_decay=0.5),
        },
    )
    own = {"router": (0.25, 0.1), "experts": (1.0, 0.0), "mtp": (2.0, 0.5)}
    freeze(student, settings)
    optimizer = make_optimizer(student, settings)
    set_rate(optimizer, 3e-3)
    wanted = {}
    generator = torch.Generator().manual_seed(1)
    for name, p in student.disk_state().items():
        g = torch.randn(p.shape, generator=generator)
        p.grad = g.clone()
        factor, decay = own.get(part_by_name(name), (1.0, 0.1))
        decay = decay if p.ndim > 1 else 0.0
        wanted[name] = p.double() - 3e-3 * factor * (decay * p.double() + g.double() / (g.double().abs() + 1e-8))
    optimizer.step()
    for name, p in student.disk_state().items():
        torch.testing.assert_close(p.detach(), wanted[name].detach().float(), rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("parts", [("router",), ("mtp",), ("norm", "experts"), ("embedding",), ("head", "dense")])
def test_what_is_frozen_stays_as_it_is(folder: Path, parts: tuple) -> None:
    whole, student = load_student(folder), load_student(folder)
    gradients(whole)
    settings = changed(SETTINGS, train_only=parts)
    freeze(student, settings)
    optimizer = make_optimizer(student, settings)
    gradients(student)
    all_gradients = {name: p.grad for name, p in whole.disk_state().items()}
    before = {name: p.detach().clone() for name, p in student.disk_state().items()}
    trained = {name for name in before if part_by_name(name) in parts}
    for name, p in student.disk_state().items():
        if name in trained:  # what is frozen elsewhere changes nothing for it
            torch.testing.assert_close(p.grad, all_gradients[name], rtol=1e-5, atol=1e-8, msg=name)
        else:
            assert p.grad is None, name
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for n, p in student.disk_state().items() if n in trained}
    moved = {name for name, p in student.disk_state().items() if not torch.equal(p.detach(), before[name])}
    assert moved == trained


def test_training_the_mtp_head_costs_no_backward_pass_of_the_trunk(folder: Path) -> None:
    student = load_student(folder)
    rows = torch.arange(18).view(2, 9)

    def kept_by_the_trunk() -> int:
        """Tensors that autograd keeps for a backward pass through the trunk."""
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            student.hidden(rows)
        return len(kept)

    assert kept_by_the_trunk() > 10
    freeze(student, changed(SETTINGS, train_only=("mtp",)))
    assert kept_by_the_trunk() == 0
    (state,) = student.mtp_states(student.hidden(rows), rows, depths=1)
    assert state.requires_grad


def test_a_rate_of_zero_freezes(folder: Path) -> None:
    student = load_student(folder)
    freeze(student, changed(SETTINGS, parts={"embedding": PartSettings(learning_rate=0.0)}))
    assert {n for n, p in student.disk_state().items() if not p.requires_grad} == {"model.embed_tokens.weight"}


def test_a_tied_head_is_the_embedding(tied: Path) -> None:
    student = load_student(tied)
    freeze(student, changed(SETTINGS, train_only=("embedding",)))
    assert student.head.requires_grad
    (group,) = make_optimizer(student, changed(SETTINGS, train_only=("embedding",))).param_groups
    assert [p is student.head for p in group["params"]] == [True]
    with pytest.raises(
        RecipeError, match=r"train_only names head .* its head is its embedding .*name some of embedding,"
    ):
        freeze(student, changed(SETTINGS, train_only=("head",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_only": ("dense",)}, "distill.train_only names dense of a model where it has none"),
        ({"parts": {"dense": PartSettings()}}, "distill.parts names dense of a model"),
        ({"train_only": ("mtp",), "parts": {"mtp": PartSettings(learning_rate=0.0)}}, "a learning_rate of 0"),
        ({"train_only": ("mtp",), "beta_start": 0.0}, "only mtp is trained: where beta is 0"),
        ({"train_only": ("mtp",), "beta_end": 0.0}, "beta_start is 0.3, beta_end 0, and only mtp"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(tied: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        trained_parts(changed(SETTINGS, **changes), Reader(tied).shape)


def test_the_mtp_head_may_be_missing(tied: Path) -> None:
    assert "mtp" not in trained_parts(SETTINGS, Reader(tied).shape.trunk)
    with pytest.raises(RecipeError, match="train_only names mtp"):
        trained_parts(changed(SETTINGS, train_only=("mtp",)), Reader(tied).shape.trunk)
    constant = changed(SETTINGS, train_only=("mtp",), beta_end=0.0, beta_schedule="constant")
    assert trained_parts(constant, Reader(tied).shape) == {"mtp"}


def two_steps(folder: Path, settings: TrainSettings) -> dict[str, torch.Tensor]:
    """The whole weights after two optimizer steps on the batch that all ranks share out."""
    student = load_student(folder, sharding=sharding())
    freeze(student, settings)
    student.checkpoint_activations()
    optimizer = make_optimizer(student, settings)
    for rate in (1e-2, 5e-3):
        sharded.step_gradients(student)
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.distill.clip)
        set_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(tensor).detach() for name, tensor in student.disk_state().items()}


@pytest.mark.parametrize("parts", [("router", "norm", "mtp"), ("mtp",)])
def test_two_ranks_train_the_same_parts_to_the_same_weights(folder: Path, parts: tuple) -> None:
    own = {"mtp": PartSettings(learning_rate=0.5, weight_decay=0.3)}
    # A large eps: next to zero Adam takes a gradient's sign, and so rounding would decide.
    settings = changed(SETTINGS, train_only=parts, parts=own, eps=1e-2)
    before, one = load_student(folder).disk_state(), two_steps(folder, settings)
    two, other = ranks.run(two_steps, folder, settings)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(two[name], other[name])
        trained = part_by_name(name) in parts
        assert torch.equal(two[name], before[name].detach()) != trained, name


def test_a_run_of_two_stages_trains_routers_alone(tmp_path: Path) -> None:
    """From file to file, with a cut of the moments between: what is frozen has the cut's very bytes."""
    recipe, run = micro.write_micro(tmp_path, compare_random_init=False), tmp_path / "run"
    pipeline.run(recipe, run, overrides=["distill.train_only=[router]", "distill.learning_rate=0.05"])
    for cut, trained in (("stage-1/cut", "stage-1/distilled"), ("stage-2/cut", "model")):
        before, after = Reader(run / cut), Reader(run / trained)
        moved = {name for name in before.rows if not torch.equal(before.tensor(name), after.tensor(name))}
        assert moved == {name for name in before.rows if part_by_name(name) == "router"}
