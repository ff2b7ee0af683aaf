"""Figures and errors by hand, text scores against naive fp64 loops, and a whole evaluation of tiny checkpoints."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ranks
from moeslim.data.tokens import TokenDocument
from moeslim.errors import CheckpointError, DataError, RecipeError, RunError
from moeslim.evaluate import Record, Settings, evaluate, measure, paired, side_by_side
from moeslim.evaluate.language import Window, shorten, windows
from moeslim.evaluate.score import Layout, batches, score
from moeslim.evaluate.share import owners
from moeslim.figures import Figure, difference, mean, median, ratio
from moeslim.losses.metrics import kl_and_top1
from moeslim.machine import parallel
from moeslim.model.student import Student
from moeslim.recipe import Evaluate
from tiny import changed, tiny_config, tiny_shape, write_tiny

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(ALPHABET) + 1  # one token per byte, and EOS as token 0


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges: every token is one byte."""
    vocab = {"<eos>": 0, **{letter: index for index, letter in enumerate(ALPHABET, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_documents(lengths: dict[str, list[int]], *, vocab: int = 64, seed: int = 0) -> list[TokenDocument]:
    rng = np.random.default_rng(seed)
    return [
        TokenDocument(f"{domain}-{i}", domain, np.concatenate([[0], rng.integers(1, vocab, n)]), 2 * n + i)
        for domain, sizes in lengths.items()
        for i, n in enumerate(sizes)
    ]


def make_student(seed: int, **changes: object) -> Student:
    torch.manual_seed(seed)
    return Student.from_config(tiny_config(**changes), shape=tiny_shape(**changes), experts="eager").eval()


def log_softmax64(logits: torch.Tensor) -> np.ndarray:
    wide = logits.detach().numpy().astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


class TestFigures:
    def test_ratio_and_its_error_by_hand(self) -> None:
        # r = 6/4; residuals 1 - 1.5, 2 - 1.5, 3 - 3 = -0.5, 0.5, 0; se = sqrt(3/2 * 0.5) / 4.
        figure = ratio([1, 2, 3], [1, 1, 2], unit="u", per="document")
        assert figure.value == 1.5
        assert figure.se == pytest.approx(math.sqrt(0.75) / 4, rel=1e-12)
        assert (figure.n, figure.unit, figure.per) == (3, "u", "document")

    def test_equal_weights_give_the_error_of_a_mean(self) -> None:
        values = [1.0, 4.0, 2.0, 7.0]
        assert mean(values, unit="u", per="x").se == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-12)

    def test_the_error_is_that_of_resampled_documents(self) -> None:
        rng = np.random.default_rng(0)
        bottoms = rng.uniform(1, 5, 200)
        tops = bottoms * rng.normal(2, 0.5, 200)
        drawn = rng.integers(0, 200, (4000, 200))
        spread = (tops[drawn].sum(1) / bottoms[drawn].sum(1)).std()
        assert ratio(tops.tolist(), bottoms.tolist(), unit="u", per="x").se == pytest.approx(spread, rel=0.05)

    def test_difference_by_hand_and_zero_with_itself(self) -> None:
        # a: r = 2, residual parts (1 - 2, 3 - 2)/2; b: r = 1.5, parts (1 - 1.5, 2 - 1.5)/2; differences -1/4 and 1/4.
        figure = difference(([1, 3], [1, 1]), ([1, 2], [1, 1]), unit="u", per="document")
        assert figure.value == 0.5
        assert figure.se == pytest.approx(math.sqrt(2 * 2 / 16), rel=1e-12)
        same = difference(([1, 3], [1, 2]), ([1, 3], [1, 2]), unit="u", per="document")
        assert (same.value, same.se) == (0.0, 0.0)

    def test_median_one_item_and_what_is_refused(self) -> None:
        assert median([3.0, 1.0, 2.0], unit="s", per="run").value == 2.0
        assert median([3.0], unit="s", per="run").se is None
        assert ratio([1], [2], unit="u", per="x").se is None
        with pytest.raises(ValueError, match="finite"):
            Figure(math.nan, None, 1, "u")
        with pytest.raises(ValueError, match="finite"):
            Figure(1.0, math.inf, 2, "u")
        with pytest.raises(ValueError, match="add up to 0"):
            ratio([0, 0], [0, 0], unit="u", per="x")


class TestWindows:
    def test_by_hand(self) -> None:
        found = windows([10], window=4, stride=2)
        assert found[:3] == [Window(0, 0, 0, 4), Window(0, 2, 4, 6), Window(0, 4, 6, 8)]
        assert windows([5, 2], window=4, stride=4) == [Window(0, 0, 0, 4), Window(0, 4, 4, 5), Window(1, 0, 0, 2)]

    @pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (4, 3), (4, 4), (100, 50)])
    def test_every_target_counts_once_with_its_context(self, window: int, stride: int) -> None:
        found = windows([13], window=window, stride=stride)
        assert [target for w in found for target in range(w.scored, w.stop)] == list(range(13))
        assert all(0 <= w.start <= w.scored < w.stop <= w.start + window for w in found)
        assert all(w.scored - w.start >= window - stride for w in found[1:])

    def test_a_stride_beyond_the_window_is_refused(self) -> None:
        with pytest.raises(DataError, match="stride"):
            windows([3], window=4, stride=5)

    def test_batches_hold_every_window_and_stay_small(self) -> None:
        plan = windows([9, 3, 7, 1], window=4, stride=4)
        found = batches(plan, 8)
        assert sorted(index for batch in found for index in batch) == list(range(len(plan)))
        assert all(len(batch) * max(plan[i].stop - plan[i].start for i in batch) <= 8 for batch in found)

    def test_a_cut_never_falls_inside_a_character(self) -> None:
        data = "aé€b".encode()  # 1, 2, 3 and 1 bytes, a token each
        document = TokenDocument("d", "x", np.array([0, *data]), len(data))

        def decode(ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

        kept = [shorten(document, max_tokens=n, decode=decode) for n in range(1, 8)]
        assert [len(d.tokens) - 1 for d in kept] == [1, 1, 3, 3, 3, 6, 7]
        assert [d.num_bytes for d in kept] == [1, 1, 3, 3, 3, 6, 7]


class TestScore:
    def test_nats_equal_a_naive_fp64_loop(self) -> None:
        student = make_student(0)
        documents = random_documents({"a": [11, 23], "b": [5]})
        scores = score(student, documents, layout=Layout(window=64, stride=64, batch_tokens=48))
        for document, found in zip(documents, scores.nats, strict=True):
            row = torch.from_numpy(document.tokens)[None]
            with torch.no_grad():
                log_p = log_softmax64(student.trunk(row[:, :-1]).logits[0])
            naive = -sum(log_p[i, token] for i, token in enumerate(document.tokens[1:]))
            assert found == pytest.approx(naive, rel=1e-5)
        own = scores.figures()["bits_per_byte"]["a"]
        assert own.value == pytest.approx(sum(scores.nats[:2]) / math.log(2) / (22 + 47), rel=1e-9)
        assert (own.n, own.unit) == (2, "bits/byte")

    def test_overlapping_windows_equal_a_naive_loop(self) -> None:
        student = make_student(1)
        (document,) = random_documents({"a": [17]})
        found = score(student, [document], layout=Layout(window=8, stride=3)).nats[0]
        naive, scored = 0.0, 0
        for start in (0, 3, 6, 9):
            row = torch.from_numpy(document.tokens[start : start + 8])[None]
            with torch.no_grad():
                log_p = log_softmax64(student.trunk(row).logits[0])
            for target in range(scored, min(17, start + 8)):
                naive -= log_p[target - start, document.tokens[target + 1]]
            scored = min(17, start + 8)
        assert scored == 17
        assert found == pytest.approx(naive, rel=1e-5)

    def test_a_model_agrees_with_itself_and_kl_with_another_equals_fp64(self) -> None:
        one, other = make_student(0), make_student(1)
        documents = random_documents({"a": [11, 23]})
        layout = Layout(window=16, stride=16)
        states = score(one, documents, layout=layout, keep_states=True).states
        same = score(one, documents, layout=layout, teacher=states)
        assert same.kl == [0.0, 0.0]
        assert same.agreed == [11.0, 23.0]
        found = score(other, documents[:1], layout=Layout(window=16, stride=16), teacher=states)
        row = torch.from_numpy(documents[0].tokens)[None, :-1]
        with torch.no_grad():
            log_p, log_q = (log_softmax64(model.trunk(row).logits[0]) for model in (one, other))
        assert found.kl is not None
        assert found.agreed is not None
        assert found.kl[0] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-4)
        assert found.agreed[0] == (log_p.argmax(-1) == log_q.argmax(-1)).sum()

    def test_kl_by_hand(self) -> None:
        # p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 / 2 + ln(2/3) / 2; the other direction differs.
        kl, same = kl_and_top1(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]]))
        assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
        assert not same.item()

    def test_router_load_counts_each_scored_token_once(self) -> None:
        student = make_student(2)
        documents = random_documents({"a": [9, 20]})
        scores = score(student, documents, layout=Layout(window=8, stride=4, batch_tokens=24))
        assert list(scores.assigned) == ["0", "1", "2", "3", "mtp.0"]
        assert all(scores.assigned[key].sum(1).tolist() == [18, 40] for key in "0123")  # top-2
        # Each window's last position lacks the token after the next: windows of 8, 1 and 8, 4, 4, 4.
        assert scores.assigned["mtp.0"].sum(1).tolist() == [2 * (9 - 2), 2 * (20 - 4)]
        layer = [figure.value for figure in scores.load()["1"]]
        assert sum(layer) == pytest.approx(8)
        figures = scores.figures()
        assert figures["min_load"][""].value == min(f.value for layer in scores.load().values() for f in layer)
        assert figures["max_load"][""].se is not None

    def test_router_load_equals_a_direct_computation(self) -> None:
        student = make_student(3)
        (document,) = random_documents({"a": [12]})
        scores = score(student, [document], layout=Layout(window=16, stride=16))
        row = torch.from_numpy(document.tokens)[None, :-1]
        inputs: list[torch.Tensor] = []
        layer = student.trunk.model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        with torch.no_grad():
            student.hidden(row)
            logits = (inputs[0][0].double() @ layer.mlp.gate.weight.double().T).numpy()
        chosen = np.argsort(-logits, axis=1)[:, :2]
        assert scores.assigned["0"][0].tolist() == np.bincount(chosen.ravel(), minlength=8).tolist()


SETTINGS = Settings(
    Evaluate(
        documents_per_domain=3,
        stride=16,
        prompts=4,
        prompt_tokens=8,
        new_tokens=10,
        sampling_prompts=2,
        samples=1,
        speed_prompt_tokens=12,
        speed_new_tokens=3,
        speed_repeats=2,
    ),
    window=32,
    seed=0,
    dtype="float32",
    device="cpu",
    max_memory=None,
    document_tokens=40,
    sample_tokens=6,
)


def text_documents() -> list[TokenDocument]:
    places = {letter: index for index, letter in enumerate(ALPHABET, start=1)}
    letters = {byte: letter for byte, letter in zip(range(33, 127), map(chr, range(33, 127)), strict=True)}
    rng = np.random.default_rng(1)
    documents = []
    for domain in ("prose", "code"):
        for i, n in enumerate((30, 60, 45, 20)):
            ids = [places[letters[int(byte)]] for byte in rng.integers(33, 127, n)]
            documents.append(TokenDocument(f"{domain}/{i}", domain, np.array([0, *ids]), n))
    return documents


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_tiny(root / "teacher", seed=0, vocab_size=VOCAB),
        "cut": write_tiny(root / "cut", seed=1, vocab_size=VOCAB, num_hidden_layers=2, hidden_size=8),
        "bare": write_tiny(root / "bare", seed=2, vocab_size=VOCAB, form={"mtp": False}),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def done(folders: dict[str, Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The records of all three models, and the arguments that made them."""
    out = tmp_path_factory.mktemp("run") / "records"
    arguments = {"teacher": folders["teacher"], "tokenizer": tokenizer, "settings": SETTINGS, "out": out}
    return evaluate(folders, text_documents(), **arguments), arguments


class TestEvaluate:
    def test_every_model_has_its_figures_with_errors(self, done: tuple) -> None:
        records, _ = done
        assert list(records) == ["teacher", "cut", "bare"]
        cut = records["cut"]
        drafted = ("acc_0", "acc_4", "accepted_length", "accepted_drafts", "sampled_acc_4", "drawn_accepted_length")
        for metric in ("bits_per_byte", "kl", "top1", *drafted):
            assert list(cut.figures[metric]) == ["prose", "code"], metric
            assert all(figure.se is not None and figure.n > 1 for figure in cut.figures[metric].values()), metric
        for metric in (
            "parameters",
            "active_parameters",
            "mtp_parameters",
            "bytes",
            "prefill",
            "decode",
            "peak_memory",
        ):
            assert cut.figures[metric][""].value > 0, metric
        assert cut.figures["bits_per_byte"]["prose"].n == 3
        assert cut.figures["acc_0"]["prose"].n == 4
        assert "kl" not in records["teacher"].figures
        assert not any("acc" in metric for metric in records["bare"].figures)
        assert "mtp_parameters" not in records["bare"].figures
        assert set(records["teacher"].load) == {"0", "1", "2", "3", "mtp.0"}

    def test_documents_are_cut_and_a_byte_a_token(self, done: tuple) -> None:
        kept = done[0]["teacher"].documents
        assert kept["tokens"] == kept["bytes"] == [30, 40, 40] * 2
        total = sum(kept["nats"][:3]) / math.log(2) / 110
        assert done[0]["teacher"].figures["bits_per_byte"]["prose"].value == pytest.approx(total, rel=1e-6)

    def test_a_record_reads_back_and_stands(
        self, done: tuple, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records, arguments = done
        read = Record.read(arguments["out"] / "cut.json")
        assert read.to_json() == json.loads(json.dumps(records["cut"].to_json()))
        assert read.figures == records["cut"].figures
        monkeypatch.setattr("moeslim.evaluate.measure.load", lambda *_: pytest.fail("nothing was to be loaded"))
        again = evaluate(folders, text_documents(), **arguments)
        assert again["cut"] == read

    def test_a_missing_record_is_made_anew_and_equal(self, done: tuple, folders: dict[str, Path]) -> None:
        records, arguments = done
        (arguments["out"] / "cut.json").unlink()
        again = evaluate(folders, text_documents(), **arguments)["cut"]
        timed = {"prefill", "prefill_seconds", "decode", "peak_memory"}
        for metric in records["cut"].figures.keys() - timed:
            assert again.figures[metric] == records["cut"].figures[metric], metric
        assert again.documents == records["cut"].documents
        assert again.samples == records["cut"].samples

    def test_other_settings_are_another_record(self, done: tuple, folders: dict[str, Path], tmp_path: Path) -> None:
        _, arguments = done
        small = changed(SETTINGS, samples=0, speed_repeats=0, prompts=0)
        one = {"bare": folders["bare"]}
        (record,) = evaluate(one, text_documents(), **{**arguments, "settings": small, "out": tmp_path}).values()
        assert record.inputs != done[0]["bare"].inputs
        assert record.figures["kl"] == done[0]["bare"].figures["kl"]
        assert not {"prefill", "peak_memory", "acc_0", "sampled_acc_0"} & record.figures.keys()

    def test_paired_differences_and_side_by_side(self, done: tuple) -> None:
        records, _ = done
        cut, bare = records["cut"], records["bare"]
        found = paired(cut, bare)["prose"]
        own = cut.figures["bits_per_byte"]["prose"].value - bare.figures["bits_per_byte"]["prose"].value
        assert found.value == pytest.approx(own, abs=1e-5)
        assert paired(cut, cut)["code"].se == 0.0
        assert set(paired(cut, bare, metric="kl")) == {"prose", "code"}
        with pytest.raises(DataError, match="not measured on both"):
            paired(cut, records["teacher"], metric="top1")
        samples = side_by_side(records)
        assert [sample["domain"] for sample in samples] == ["prose", "code"]
        assert all(set(sample["texts"]) == {"teacher", "cut", "bare"} for sample in samples)
        assert all(len(sample["prompt"].encode()) == 7 for sample in samples)

    def test_what_cannot_work_is_said_before_a_model_is_loaded(
        self, done: tuple, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("moeslim.evaluate.measure.load", lambda *_: pytest.fail("nothing was to be loaded"))
        arguments = {**done[1], "out": tmp_path / "records"}
        for changes, message in (
            ({"new_tokens": 5}, "at least 6"),
            ({"stride": 33}, "must be 1 to 32"),
            ({"dtype": "int8"}, "use one of float32"),
        ):
            wrong = changed(SETTINGS, **changes)
            with pytest.raises(RecipeError, match=message):
                evaluate(folders, text_documents(), **{**arguments, "settings": wrong})
        small = write_tiny(tmp_path / "small", vocab_size=40)
        with pytest.raises(DataError, match="vocabulary has 40 entries"):
            evaluate({"small": small}, text_documents(), **arguments)
        large = write_tiny(tmp_path / "large", vocab_size=VOCAB + 1)
        with pytest.raises(DataError, match="vocabularies differ"):
            evaluate({"large": large}, text_documents(), **arguments)
        with pytest.raises(CheckpointError):
            evaluate({"gone": tmp_path / "gone"}, text_documents(), **arguments)
        with pytest.raises(DataError, match="no held-out document"):
            evaluate(folders, [], **arguments)
        assert not (tmp_path / "records").exists()

    def test_what_is_no_record_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text('{"schema": 99}')
        with pytest.raises(RunError, match="evaluate again"):
            Record.read(tmp_path / "x.json")


def cut_small(at_once: int, batch_tokens: int) -> None:
    """Prompts and windows in batches so small that there are several."""
    measure._PROMPTS_AT_ONCE = at_once
    measure.Layout = partial(Layout, batch_tokens=batch_tokens)


def _evaluate_small(folders: dict[str, Path], **arguments: object) -> dict[str, dict[str, Record]]:
    """With the teacher among the models, and with one that gets no record."""
    parallel.together(cut_small, 3, 64)
    try:
        out = arguments["out"]
        all_of_them = evaluate(folders, text_documents(), **arguments)
        rest = {label: folder for label, folder in folders.items() if label != "teacher"}
        return {"all": all_of_them, "rest": evaluate(rest, text_documents(), **{**arguments, "out": out / "rest"})}
    finally:
        parallel.together(cut_small, 32, 8192)


@pytest.fixture(scope="module")
def one(folders: dict[str, Path], done: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("one")
    return ranks.lead(_evaluate_small, folders, **{**done[1], "out": out}, world=1)


class TestSeveralProcesses:
    def test_pieces_go_to_whoever_has_least(self) -> None:
        # 9 to 0; 7 to 1; 5 to 1 (7 < 9); 4 to 0 (9 < 12); 4 to 1 (12 < 13)
        assert owners([5, 9, 4, 7, 4], 2) == [1, 0, 0, 1, 1]
        assert owners([3, 3], 4) == [0, 1]
        assert owners([3, 1], 1) == [0, 0]

    @pytest.mark.parametrize("world", [2, 3])
    def test_their_records_are_those_of_one(
        self, folders: dict[str, Path], done: tuple, one: dict, tmp_path: Path, world: int
    ) -> None:
        """Bit by bit but for what is timed: every window and prompt runs in the batch of one process."""
        found = ranks.lead(_evaluate_small, folders, **{**done[1], "out": tmp_path}, world=world)
        timed = {"prefill", "prefill_seconds", "decode", "peak_memory"}
        for group, records in one.items():
            assert list(found[group]) == list(records)
            for label, record in records.items():
                own = found[group][label]
                assert own.figures.keys() == record.figures.keys()
                assert timed <= own.figures.keys()
                for metric in record.figures.keys() - timed:
                    assert own.figures[metric] == record.figures[metric], (label, metric)
                bare = [{**item.to_json(), "figures": 0} for item in (own, record)]
                assert bare[0] == bare[1]
                folder = tmp_path if group == "all" else tmp_path / "rest"
                assert Record.read(folder / f"{label}.json").figures == own.figures
        whole = done[0]["cut"].figures
        for metric in ("bits_per_byte", "kl", "acc_0"):  # other batches: to rounding
            for domain, figure in whole[metric].items():
                assert found["all"]["cut"].figures[metric][domain].value == pytest.approx(figure.value, rel=1e-5)

    def test_what_stands_is_not_measured_by_another_number_of_them(self, folders: dict[str, Path], done: tuple) -> None:
        before = (done[1]["out"] / "cut.json").read_bytes()
        ranks.lead(evaluate, folders, text_documents(), **done[1], world=2)
        assert (done[1]["out"] / "cut.json").read_bytes() == before

    def test_a_model_without_numbers_is_said_once(self, folders: dict[str, Path], done: tuple, tmp_path: Path) -> None:
        bad = tmp_path / "bad"
        shutil.copytree(folders["bare"], bad)
        tensors = load_file(bad / "model.safetensors")
        tensors["model.norm.weight"][0] = math.nan
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
        arguments = {**done[1], "out": tmp_path / "records"}
        with pytest.raises(CheckpointError, match="NaN or Inf \\(6 of 6 documents\\)"):
            ranks.lead(evaluate, {"bad": bad}, text_documents(), **arguments, world=2)
