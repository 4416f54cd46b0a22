"""Decoding through the states: equal to full forwards, row by row, in constant memory."""

import math

import pytest
import torch

from layers.state import state_nbytes
from models.generation import choose_token, evaluation_mode, generate, token_probabilities
from tests.tiny import CAUSAL, MIXERS, tiny_model

HYBRID = ["conv", "attention", "linear_attention"]
PATTERNS = [*MIXERS, HYBRID]
V = 31


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_full_forwards(model, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy decoding that reads everything again for each token."""
    start = tokens.shape[1]
    with torch.no_grad(), evaluation_mode(model):
        for _ in range(new):
            logits, _ = model(tokens)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, start:]


@pytest.mark.parametrize("pattern", [*CAUSAL, HYBRID], ids=str)
@pytest.mark.parametrize("new", [48, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_decoding_is_the_argmax_of_full_forwards(pattern, new):
    model = tiny_model(pattern, num_layers=len(pattern) if isinstance(pattern, list) else 2)
    tokens = prompt(2, 11)
    decoded = generate(model, tokens, max_new_tokens=new)
    assert torch.equal(decoded, by_full_forwards(model, tokens, new))
    assert len(decoded.unique()) > 3, "a model that repeats itself would prove little"


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_padded_rows_decode_as_each_row_alone(pattern):
    model = tiny_model(pattern)
    rows = [prompt(1, n, seed=n) for n in (1, 5, 12)]
    longest = max(row.shape[1] for row in rows)
    for side in ("left", "right"):
        tokens = prompt(3, longest, seed=99)  # padding holds anything
        segments = torch.full((3, longest), -1)
        for b, row in enumerate(rows):
            n = row.shape[1]
            where = slice(longest - n, None) if side == "left" else slice(0, n)
            tokens[b, where], segments[b, where] = row[0], 0
        together = generate(model, tokens, max_new_tokens=16, segments=segments)
        alone = [generate(model, row, max_new_tokens=16) for row in rows]
        assert torch.equal(together, torch.cat(alone)), side


def test_the_last_of_several_documents_is_continued():
    model = tiny_model(HYBRID, num_layers=3)
    tokens = prompt(2, 12)
    segments = torch.tensor([[0] * 5 + [3] * 7, [2] * 9 + [4] * 3])
    together = generate(model, tokens, max_new_tokens=9, segments=segments)
    alone = [generate(model, tokens[:1, 5:], max_new_tokens=9)]
    alone += [generate(model, tokens[1:, 9:], max_new_tokens=9)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_prompt_may_follow_a_state_that_stays_as_it_was(pattern):
    model = tiny_model(pattern).eval()
    tokens = prompt(2, 13)
    with torch.no_grad():
        _, state = model(tokens[:, :8], want_state=True)
    first = generate(model, tokens[:, 8:], max_new_tokens=12, state=state)
    again = generate(model, tokens[:, 8:], max_new_tokens=12, state=state)
    assert torch.equal(first, again)
    assert torch.equal(first, generate(model, tokens, max_new_tokens=12))


def test_a_finished_row_repeats_the_stop_token_and_leaves_the_others_alone():
    model = tiny_model("attention")
    tokens = prompt(6, 7)
    free = generate(model, tokens, max_new_tokens=24)
    stop = int(free[0, 4])
    stopped = generate(model, tokens, max_new_tokens=24, stop_token=stop)
    for row, expected in zip(stopped, free, strict=True):
        hits = (expected == stop).nonzero().flatten()
        end = int(hits[0]) + 1 if len(hits) else len(expected)
        end = min(end, len(row))
        assert torch.equal(row[:end], expected[:end])
        assert (row[end:] == stop).all()


def test_decoding_ends_when_every_row_has_stopped():
    model = tiny_model("attention")
    tokens = prompt(1, 7)
    free = generate(model, tokens, max_new_tokens=24)[0]
    stop = int(free[5])
    first = (free == stop).nonzero().flatten()[0]
    assert generate(model, tokens, max_new_tokens=24, stop_token=stop).shape == (1, first + 1)


@pytest.mark.parametrize("pattern", MIXERS)
def test_states_stay_of_one_size_where_they_are_bounded(pattern, monkeypatch):
    model = tiny_model(pattern)
    sizes = []
    hidden = model.hidden

    def watched(*args, **kwargs):
        h, state = hidden(*args, **kwargs)
        sizes.append(state_nbytes(state))
        return h, state

    monkeypatch.setattr(model, "hidden", watched)
    generate(model, prompt(2, 16), max_new_tokens=40)
    assert (len(set(sizes)) == 1) == model.bounded_state


def test_dropout_is_off_and_the_mode_is_given_back():
    model = tiny_model("conv").train()
    model.blocks[0].eval()
    assert torch.equal(*(generate(model, prompt(2, 5), max_new_tokens=20) for _ in range(2)))
    assert model.training
    assert model.blocks[1].mixer.training
    assert not model.blocks[0].mixer.training


def test_probabilities_after_temperature_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()
    close = torch.testing.assert_close
    close(token_probabilities(logits, 1.0), logits.exp())
    squared = logits.exp() ** 2
    close(token_probabilities(logits, 0.5), squared / squared.sum())
    close(token_probabilities(logits, 1.0, top_k=2), torch.tensor([[0.625, 0.0, 0.375, 0.0]]))
    # 0.5 does not reach 0.6, 0.5 + 0.3 does.
    close(token_probabilities(logits, 1.0, top_p=0.6), torch.tensor([[0.625, 0.0, 0.375, 0.0]]))
    close(token_probabilities(logits, 1.0, top_p=0.4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    close(token_probabilities(logits, 1.0, top_p=1.0), logits.exp())
    # Among the three that top-k leaves, the first two hold 0.8 / 0.95 of the mass.
    both = token_probabilities(logits, 1.0, top_k=3, top_p=0.8)
    close(both, torch.tensor([[0.625, 0.0, 0.375, 0.0]]))


def test_ties_at_the_edge_of_top_k_leave_exactly_k():
    assert (token_probabilities(torch.zeros(2, 9), 1.0, top_k=4) > 0).sum(1).tolist() == [4, 4]


def test_samples_follow_the_probabilities():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(20_000, 4)
    drawn = choose_token(logits, 1.0, generator=torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=4) / len(drawn)
    expected = logits[0].exp()
    deviation = (counts - expected) / (expected * (1 - expected) / len(drawn)).sqrt()
    assert deviation.abs().max() < 4  # standard errors: exceeded once in 4,000 seeds


def test_sampling_repeats_with_its_generator_and_reaches_greedy_at_low_temperature():
    model = tiny_model("conv")

    def sample(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt(2, 6), max_new_tokens=20, generator=generator, **options)

    assert torch.equal(sample(3, temperature=1.0), sample(3, temperature=1.0))
    assert not torch.equal(sample(3, temperature=1.0), sample(4, temperature=1.0))
    assert torch.equal(sample(3, temperature=2.0, top_k=1), sample(4))
    assert torch.equal(sample(3, temperature=1e-4), sample(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0; allowed: 1 to 31"),
        ({"temperature": 1.0, "top_k": 32}, "top_k=32; allowed: 1 to 31"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0; allowed: above 0, up to 1"),
        ({"top_k": 5}, "temperature=0 is greedy, but top_k=5"),
        ({"stop_token": 31}, "stop_token=31; allowed: 0 to 30"),
        ({"segments": torch.zeros(2, 4)}, r"segments has shape \(2, 4\)"),
        ({"segments": torch.tensor([[0] * 5, [-1] * 5])}, r"rows \[1\] are padding only"),
        ({"prefix_len": torch.ones(2), "state": ()}, "prefix_len and state"),
    ],
)
def test_wrong_arguments_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("conv"), prompt(2, 5), **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), "T >= 1"),
        (torch.zeros(5, dtype=torch.int64), "T >= 1"),
        (torch.zeros(2, 5), "expected integers"),
        (torch.full((1, 3), 31), "ids 31 to 31; allowed: 0 to 30"),
    ],
)
def test_a_wrong_prompt_is_one_clear_line(tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("conv"), tokens, max_new_tokens=4)
