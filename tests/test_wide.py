"""The oracle of all families (wide.py) and the models that it is asked about (tiny_families.py), without moeslim."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle import Oracle
from stock import Stock
from tiny import write_tiny
from tiny_families import HIDDEN, MOE, STOCK, build_stock, save_stock, stock_class, stock_config
from wide import Wide, experts_in, layers_of, moe_in
from wide_loading import in_float64

TOKENS = torch.randint(0, 56, (2, 17), generator=torch.Generator().manual_seed(5))
GONE = (1, 6)
EXPERTS = tuple(e for e in range(8) if e not in GONE)
NEURONS = (0, 1, 3, 4, 6, 7, 8, 11)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

pytestmark = pytest.mark.bits("a masked neuron's other weights change nothing at all")


@pytest.fixture(scope="module", params=STOCK)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stock(tmp_path_factory.mktemp("stock") / family, family)


def stock(folder: Path, family: str) -> Any:
    cls: Any = stock_class(stock_config(family))
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_the_oracle_is_the_stock_model(family: str, folder: Path) -> None:
    """To 1e-5 of the largest logit, or ten times what one rounding of every weight moves the stock model itself.

    The second counts where a recurrence amplifies: DeltaNet's.
    """
    model = stock(folder, family)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            towards = torch.randn(parameter.shape, generator=draw) * 1e9
            parameter.data = parameter.data.nextafter(towards)
        noise = (model(input_ids=TOKENS, use_cache=False).logits - expected).abs().max()
    assert expected.std() > 0.5, "a model whose logits are all alike proves nothing"
    found = Wide(folder).run(TOKENS)[:, :17]
    assert (found - expected).abs().max() < max(1e-5 * expected.abs().max(), 10 * noise)


def test_the_oracle_is_float64(folder: Path) -> None:
    """A step of 1e-9 moves the output a thousandth as far as one of 1e-6; of a rounding to float32 it would be lost."""
    oracle = Wide(folder)
    before = oracle.run(TOKENS)
    weight = oracle.trunk.get_input_embeddings().weight.data
    moved = []
    for step in (1e-12, 1e-9, 1e-6):
        weight[int(TOKENS[0, 0]), 3] += step
        moved.append(oracle.run(TOKENS) - before)
        weight[int(TOKENS[0, 0]), 3] -= step
    assert 0 < moved[0].abs().max() < 1e-9
    assert (moved[1] * 1e3 - moved[2]).abs().max() < 1e-2 * moved[2].abs().max()


def test_nothing_writes_to_silent_channels(family: str, tmp_path: Path) -> None:
    """Norms over 16 channels are given zeros there, in every layer."""
    if family == "phimoe":
        pytest.skip("a LayerNorm's mean is not zero where channels are: a cut of width is not exact there")
    oracle = Wide(build_stock(tmp_path / "model", family, silent=GONE))
    seen: list[torch.Tensor] = []
    for layer in layers_of(oracle.trunk):
        layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    oracle.run(TOKENS)
    assert len(seen) == len(layers_of(oracle.trunk))
    assert all(x.shape[-1] == HIDDEN and (x[..., list(GONE)] == 0).all() and x.std() > 0.1 for x in seen)


@pytest.mark.parametrize("family_", MOE)
def test_masked_experts_are_experts_that_are_not_there(tmp_path: Path, family_: str) -> None:
    """Compared with transformers' model of 6 experts, filled with slices."""
    source = build_stock(tmp_path / "source", family_, dtype=torch.float64, heads=False)
    oracle = Wide(source)
    whole = oracle.run(TOKENS)
    oracle.mask_experts(dict.fromkeys(oracle.moe_keys, EXPERTS))
    expected = _with_fewer_experts(source, family_, tmp_path / "small").run(TOKENS)
    found = oracle.run(TOKENS)
    assert (found - expected).abs().max() < 1e-10
    assert (found - whole).abs().max() > 1e-2


@pytest.mark.parametrize("family_", MOE)
def test_masked_neurons_are_neurons_that_are_not_there(tmp_path: Path, family_: str) -> None:
    """Of routed experts, however their matrices lie: compared with experts of 8 neurons."""
    source = build_stock(tmp_path / "source", family_, dtype=torch.float64, heads=False)
    oracle = Wide(source)
    for key in oracle.moe_keys:
        for expert in range(8):
            oracle.mask_neurons(key, expert, NEURONS)
    found = oracle.run(TOKENS)
    for key in oracle.moe_keys:  # whatever a gone neuron computes, nobody hears it
        experts = experts_in(oracle.layer(key))
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        weight = getattr(experts, name).data
        weight = weight if not experts.is_transposed else weight.transpose(1, 2)  # (E, rows, d), a view
        gone = [n for n in range(12) if n not in NEURONS]
        halves = 2 if experts.has_gate else 1
        rows = [n * halves + h if not experts.is_concatenated else n + 12 * h for n in gone for h in range(halves)]
        weight[:, rows] += 1.0
    assert torch.equal(oracle.run(TOKENS), found)
    assert (Wide(source).run(TOKENS) - found).abs().max() > 1e-2


def test_experts_per_token_and_layers(family: str, folder: Path) -> None:
    """Another number of experts is chosen; without layers the embedding goes to the last norm."""
    oracle = Wide(folder)
    whole = oracle.run(TOKENS)
    if family == "phimoe":
        assert torch.equal(Wide(folder, top_k=1).run(TOKENS), whole)  # its router takes two, whatever the config says
    elif family in MOE:
        assert (Wide(folder, top_k=1).run(TOKENS) - whole).abs().max() > 1e-2
    oracle.mask_layers((0,))
    one = oracle.run(TOKENS)[:, :17]
    oracle.mask_layers(())
    none = oracle.run(TOKENS)[:, :17]
    assert (one - none).abs().max() > 1e-2
    seen: list[torch.Tensor] = []
    layers_of(oracle.trunk)[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    norm = next(m for n, m in oracle.trunk.get_decoder().named_children() if "norm" in n)
    norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    oracle.run(TOKENS)
    assert torch.equal(seen[0], seen[1])


def _with_fewer_experts(source: Path, family: str, out: Path) -> Wide:
    """The oracle of a stock model of EXPERTS alone: axes of 8 entries are sliced in routers and experts."""
    config = stock_config(family)
    text = config.get_text_config(decoder=True)
    for key in _COUNTS:
        if key in text.to_dict() or key in getattr(text, "attribute_map", {}):
            setattr(text, key, len(EXPERTS))
    config.architectures = [stock_class(config).__name__]
    small: Any = stock_class(config)(config).double()
    big = Wide(source)
    names = {id(module): name for name, module in big.trunk.named_modules()}
    cut: list[str] = []
    for key in big.moe_keys:
        block, experts, router = moe_in(big.layer(key))
        cut += [f"{names[id(module)]}." for module in (experts, router)]
        cut += [f"{names[id(block)]}.{own}" for own, _ in [*block._buffers.items(), *block._parameters.items()]]
    state = big.trunk.state_dict()
    for name, tensor in state.items():
        axis = next((a for a, length in enumerate(tensor.shape) if length == 8), None)
        if axis is not None and name.startswith(tuple(cut)):
            state[name] = tensor.index_select(axis, torch.tensor(EXPERTS))
    small.load_state_dict(state, strict=True)
    return Wide(save_stock(small, out, dtype=torch.float64))


@pytest.mark.parametrize(("family_", "other"), [("qwen3_next", Oracle), ("glm4_moe", Stock)])
def test_it_says_what_the_oracles_of_single_families_say(tmp_path: Path, family_: str, other: Any) -> None:
    """MTP heads included: theirs are written out by hand, and transformers' MtpLayer; with experts masked in all."""
    folder = write_tiny(tmp_path / "model", family=family_, form={"dtype": "float64"})
    found, expected = Wide(folder), other(folder)
    assert (found.run(TOKENS) - expected.run(TOKENS)).abs().max() < 1e-6  # rotary frequencies are float32 there
    for oracle in (found, expected):
        oracle.mask_experts(dict.fromkeys(("1", "mtp.0"), EXPERTS))
    assert (found.run(TOKENS) - expected.run(TOKENS)).abs().max() < 1e-6
    assert (found.run(TOKENS) - Wide(folder).run(TOKENS))[:, 17:].abs().max() > 1e-2


_BEHIND = ("model.layers.4.", "model.layers.4.{}", ("eh_proj", "enorm", "hnorm", "shared_head.norm"))
HEADS: dict[str, tuple[dict[int, str], str, tuple[str, ...]]] = {
    "deepseek_v3": ({2: _BEHIND[0]}, *_BEHIND[1:]),
    "glm4_moe_lite": ({3: _BEHIND[0]}, *_BEHIND[1:]),
    "glm_moe_dsa": ({2: _BEHIND[0]}, *_BEHIND[1:]),
    "qwen3_5_moe": ({1: "mtp.layers.0."}, "mtp.{}", ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")),
    "nemotron_h": (
        {2: "mtp.layers.0.", 4: "mtp.layers.1."},
        "mtp.layers.{}",
        ("0.eh_proj", "0.enorm", "0.hnorm", "1.final_layernorm"),
    ),
    "ernie4_5_moe": ({0: "model.mtp_block.0."}, "model.{}.0", ("mtp_linear_proj", "mtp_emb_norm", "mtp_hidden_norm")),
}
"""Family -> layer of the trunk that is copied into a head, and the names that released heads have around it."""


@pytest.mark.parametrize("family_", HEADS)
def test_heads_in_files_are_run(tmp_path: Path, family_: str) -> None:
    """Every form of a head, its layers being copies of the trunk's: so the trunk with these layers alone says the same.

    Where the form has no last norm, the trunk's is taken out too.
    """
    copied, pattern, around = HEADS[family_]
    folder = build_stock(tmp_path / "model", family_, dtype=torch.float64, heads=False)
    path = folder / "model.safetensors"
    weights = load_file(path)
    draw = torch.Generator().manual_seed(3)
    more = {name: 1 + 0.2 * torch.randn(16, generator=draw).double() for name in around}
    more[around[0]] = 0.3 * torch.randn(16, 32, generator=draw).double()
    head = {f"{pattern.format(name)}.weight": tensor for name, tensor in more.items()}
    for number, place in copied.items():
        for name in weights:
            prefix, layer, own = name.partition(f"layers.{number}.")
            if layer and "vision" not in prefix:
                head[place + own] = weights[name].clone()
    save_file({**weights, **head}, path, metadata={"format": "pt"})
    oracle = Wide(folder)
    found = oracle.run(TOKENS)[:, 17:]
    hidden, embed = oracle.hidden(TOKENS), oracle.trunk.get_input_embeddings()
    decoder = oracle.trunk.get_decoder()
    norm = next(m for name, m in decoder.named_children() if "norm" in name)
    joined = []
    with in_float64():
        for name, x in zip(around[1:3], (embed(TOKENS[:, 1:]), hidden[:, :-1]), strict=True):
            norm.weight.data = more[name]
            joined.append(norm(x))
        if len(around) == 4:
            norm.weight.data = more[around[3]]
        else:
            norm.forward = lambda x: x
    oracle.mask_layers(tuple(copied))
    with in_float64():
        x = torch.cat(joined, dim=-1) @ more[around[0]].T
        expected = oracle.trunk.get_output_embeddings()(decoder(inputs_embeds=x, use_cache=False).last_hidden_state)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-12
