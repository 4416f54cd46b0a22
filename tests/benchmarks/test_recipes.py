"""The full-size experiments have the papers' sizes, and docs/recipes.md is what the code gives."""

import pytest

from benchmarks.recipes import PUBLISHED, ROOT, experiments, full_size, page


def parameters(name: str) -> int:
    return sum(p.numel() for p in full_size(name)[1].parameters())


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == page()


def test_published_figures_are_of_experiments():
    assert PUBLISHED.keys() <= set(experiments())


@pytest.mark.parametrize(
    ("name", "expected", "within"),
    [
        # Counts by hand of the matrices that the papers' tables imply.
        ("wikitext103_jrt", 0.356e9, 0.01),
        ("wikitext103_jrt_1300m", 1.37e9, 0.01),
        # The published count is rounded to millions; learned positions (0.8 M) are not here.
        ("wikitext103_gpt2", 124.4e6 - 0.8e6, 0.005),
        ("wikitext103_monarch", 71.3e6 - 0.8e6, 0.005),
        # The released checkpoint has 23 padding rows in its embedding.
        ("wikitext103_mamba", 129_135_360 - 23 * 768, 0),
    ],
)
def test_parameters_are_the_papers(name, expected, within):
    assert parameters(name) == pytest.approx(expected, rel=within)


@pytest.mark.parametrize(
    ("name", "globals_", "windows"),
    [
        ("wikitext103_jrt", [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
        ("wikitext103_based_1300m", [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
    ],
)
def test_interleaving_is_the_papers(name, globals_, windows):
    cfg, model = full_size(name)
    kinds = [type(mixer).__name__ for mixer in model.mixers]
    assert [i for i, kind in enumerate(kinds) if kind.endswith("LinearAttention")] == globals_
    assert [i for i, kind in enumerate(kinds) if kind == "SlidingWindowAttention"] == windows
    assert cfg.mixers.sliding_window.window == 129  # 128 others and the token itself
