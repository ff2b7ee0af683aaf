"""The estimator of benchmarks/experts.py against hand arithmetic and against simulated documents and samples."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_FILE = Path(__file__).parents[1] / "benchmarks" / "experts_page.py"


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("experts_page", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def documents(page: Any, domains: list[str], tokens: list[float]) -> Any:
    sizes = np.array(tokens)
    return page.Documents(tokens=sizes, bytes=3 * sizes, domains=np.array(domains), nats=sizes)


def test_by_hand(page: Any) -> None:
    ground = documents(page, ["a", "a", "b", "b"], [1, 3, 2, 2])
    sums = np.array([[1.0, 5.0, 2.0, 4.0], [3.0, 7.0, 2.0, 0.0]])
    found = page.mean(sums, ground.tokens, ground)
    # sample 0: domain a 6/4, b 6/4, mean 1.5; sample 1: 10/4 and 2/4, mean 1.5
    assert found.value == pytest.approx(1.5)
    assert found.samples == 0.0
    # over samples a is (2, 6) of (1, 3): r = 2, no residual; b is (2, 2) of (2, 2): r = 1, none either
    assert found.documents == pytest.approx(0.0)
    other = page.mean(np.array([[1.0, 5.0, 2.0, 4.0], [1.0, 5.0, 2.0, 0.0]]), ground.tokens, ground)
    # sample 1: 6/4 and 2/4, mean 1; the values 1.5 and 1 spread by 0.25 sqrt 2, over sqrt 2
    assert (other.value, other.samples) == (pytest.approx(1.25), pytest.approx(0.25))
    # a is (1, 5): r = 1.5, residuals -0.5, 0.5 over 4; 2/1 times their squares' sum 1/32, over 2^2 domains; b has none
    assert other.documents == pytest.approx(np.sqrt(2 * (2 * 0.125**2) / 4))
    assert other.error == pytest.approx(np.hypot(0.25, np.sqrt(1 / 64)))


def test_the_error_covers_documents_and_samples(page: Any) -> None:
    """Simulated effects of documents, samples and pairs of them: in the error's square the pairs' part counts twice."""
    draw = np.random.default_rng(0)
    num_documents, num_samples, repeats = 12, 3, 2000
    ground = documents(page, ["a", "b"] * (num_documents // 2), [1.0] * num_documents)
    values, squares = [], []
    for _ in range(repeats):
        by_document = draw.normal(0, 1.0, (1, num_documents))
        by_sample = draw.normal(0, 0.4, (num_samples, 1))
        by_pair = draw.normal(0, 0.8, (num_samples, num_documents))
        found = page.mean(by_document + by_sample + by_pair, ground.tokens, ground)
        values.append(found.value)
        squares.append(found.error**2)
    pairs = 0.8**2 / (num_documents * num_samples)
    truth = 1.0 / num_documents + 0.4**2 / num_samples + pairs
    assert np.var(values) == pytest.approx(truth, rel=0.1)
    assert np.mean(squares) == pytest.approx(truth + pairs, rel=0.05)


def test_verdict_names_the_least_kl_and_challengers_beat_two_errors(page: Any) -> None:
    ground = documents(page, ["a", "a"], [1.0, 1.0])

    def cells(*kl: tuple[float, float]) -> list[dict[str, list[float]]]:
        return [{"kl": list(one), "nats": list(one)} for one in kl]

    base = cells((1.0, 2.0), (1.1, 2.1))
    methods = {
        "drop/reap": base,
        "sure": cells((0.5, 1.5), (0.6, 1.6)),  # lower by 0.5 everywhere: no error
        "lucky": cells((0.1, 2.0), (0.2, 2.1)),  # lower by 0.9 on one document, by 0 on the other
    }
    table = {
        50: {name: page.compared(own, ground, default=base) for name, own in methods.items()},
        25: {name: page.compared(own, ground, default=base) for name, own in methods.items()},
    }
    assert page.verdict(table)["0.5"] == {"best": "sure", "difference": -0.5, "error": 0.0}
    assert page.challengers(table) == {"sure": [50, 25]}
    assert table[50]["lucky"].kl_difference.error == pytest.approx(0.45)
    # half a bit less per 3 bytes a token
    assert table[50]["sure"].bits_difference.value == pytest.approx(-0.5 / (3 * np.log(2)))
