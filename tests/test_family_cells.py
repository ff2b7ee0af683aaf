"""The short form of `make families`: every family that has a page, on a model that transformers built and saved."""

from pathlib import Path

import pytest

import cells
from case import CELLS, REASONS, Case, Figure, pages_without_models, with_pages
from families import END, PAGE, START, failures

__all__ = ["cells"]  # imported for the cells that it enters

pytestmark = pytest.mark.bits("walks, keep-all cuts and saved models have the source's bits")

SHORT = [name for name, (_, _, short) in CELLS.items() if short]


@pytest.fixture(scope="module", params=with_pages())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", SHORT)
def test_what_is_proven_of_every_family(case: Case, name: str) -> None:
    figure = CELLS[name][0](case)
    if figure is None:
        pytest.skip(f"{case.family} has no such part")
    assert figure.good, f"{name}: {figure.value} (at most {figure.bound}), a wrong cut {figure.wrong}"


def test_one_cut_of_every_dense_family(case: Case) -> None:
    if case.shape.moe_keys:
        pytest.skip("its experts are cut above")
    figure = CELLS["dense size"][0](case)
    assert figure is not None
    assert figure.good


def test_every_page_has_a_tiny_model() -> None:
    """A new page needs an entry in tiny_families.py, or nothing of it is proven."""
    assert pages_without_models() == set()


def test_figures_can_fail() -> None:
    assert Figure(0.0).good
    assert not Figure(1e-300).good
    assert not Figure(float("nan"), 1.0).good
    assert Figure(1e-11, 1e-10, wrong=1e-8).good
    assert not Figure(1e-11, 1e-10, wrong=1e-9).good  # a wrong cut must stand out


def test_a_listed_reason_must_be_true() -> None:
    """What fails without a reason is a failure, and so is what holds in spite of one."""
    (family, name), *_ = REASONS
    assert failures({family: {name: Figure(1.0)}}) == []
    assert failures({family: {name: Figure(0.0)}}) == [f"{family}: {name}"]
    assert failures({family: {"walk": "RunError: no"}}) == [f"{family}: walk"]
    assert failures({family: {"walk": None}}) == []


def test_the_docs_have_a_place_for_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert text.index(START) < text.index(END)
    assert all(f"\n| {family} |" in text[text.index(START) :] for family in with_pages()), "run `make families`"


def test_the_oracle_knows_nothing_of_moeslim() -> None:
    assert "moeslim" not in (Path(__file__).parent / "wide.py").read_text(encoding="utf-8").split('"""', 2)[2]
