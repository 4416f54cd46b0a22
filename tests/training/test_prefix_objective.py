"""JRT-RNN's objective: which positions are masked, what their labels are, how losses add up."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from layers.jrt import PrefixLinearAttention
from layers.norm import RMSNorm
from layers.report import Report
from models.language_model import LanguageModel
from tasks.base import IGNORED
from training.prefix_objective import PrefixLanguageModel

V, D, B, T, M = 11, 8, 4, 24, 10
MASK = V


def model(extra_tokens: int = 1) -> LanguageModel:
    torch.manual_seed(0)
    mixers = [PrefixLinearAttention(D, num_heads=2, key_dim=4) for _ in range(2)]
    return LanguageModel(V, D, mixers, [None, None], RMSNorm, extra_tokens=extra_tokens)


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], **more}


def watched(lm: LanguageModel, **options) -> tuple[PrefixLanguageModel, list[dict]]:
    """The objective, and what it asked of the model."""
    asked: list[dict] = []
    hidden = lm.hidden

    def spy(tokens, state=None, **arguments):
        asked.append({"tokens": tokens, **arguments})
        return hidden(tokens, state, **arguments)

    lm.hidden = spy  # type: ignore[method-assign]
    return PrefixLanguageModel(M, **options), asked


@pytest.mark.parametrize("normalise", [False, True])
def test_loss_is_what_its_positions_say(normalise):
    lm = model()
    objective, asked = watched(lm, normalise=normalise)
    data = batch()
    torch.manual_seed(3)
    loss = objective(lm, data, Report())
    tokens = asked[0]["tokens"]
    masked = tokens == MASK
    assert masked.any()
    assert not masked[:, M:].any()
    assert torch.equal(tokens[~masked], data["inputs"][~masked])
    logits, _ = lm(tokens, prefix_len=torch.full((B,), M))
    behind = cross_entropy(logits[:, M:].flatten(0, 1), data["labels"][:, M:].flatten())
    inside = cross_entropy(logits[masked], data["inputs"][masked])
    expected = (behind + 0.25 * inside) / (1.25 if normalise else 1)
    torch.testing.assert_close(loss.total, expected)
    assert set(loss.parts) == {"next_token", "masked_token"}


def test_mask_rate_and_token_zero():
    lm = model()
    objective, asked = watched(lm, mask_rate=0.15)
    data = batch()
    data["inputs"][:, 0] = 0  # id 0 is a token like any other
    zeros = 0
    for _ in range(400):
        objective(lm, data, Report())
        zeros += int((asked[-1]["tokens"][:, 0] == MASK).sum())
    share = torch.stack([(a["tokens"] == MASK).float().mean() for a in asked]).mean() * T / M
    # 16,000 draws of probability 0.15 have a standard deviation of 0.0028.
    assert abs(share - 0.15) < 0.012
    assert zeros > 0


def test_documents_and_padding():
    lm = model()
    objective, asked = watched(lm, mask_rate=0.9)
    segments = torch.tensor([[-1] * 2 + [0] * 4 + [1] * 18] * B)
    objective(lm, batch(segments=segments), Report())
    masked = asked[0]["tokens"] == MASK
    assert not masked[:, :2].any()
    assert masked[:, 2:6].any()
    assert not masked[:, 6:].any()


def test_without_the_masked_loss_it_is_a_prefix_language_model():
    lm = model()
    objective, asked = watched(lm, mask_weight=0.0)
    loss = objective(lm, batch(), Report())
    torch.testing.assert_close(loss.total, loss.parts["next_token"])
    assert asked[0]["prefix_len"].tolist() == [M] * B


def test_mask_is_never_predicted():
    lm = model()
    logits, _ = lm(torch.full((1, 3), MASK))
    assert logits.shape[-1] == V
    assert lm.embedding.num_embeddings == V + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(PrefixLanguageModel, 0), "prefix_len=0"),
        (partial(PrefixLanguageModel, 4, mask_rate=1.0), "mask_rate=1.0"),
        (partial(PrefixLanguageModel, 4, mask_weight=-1.0), "mask_weight=-1.0"),
        (lambda: PrefixLanguageModel(T)(model(), batch(), Report()), "leaves nothing to predict"),
        (lambda: PrefixLanguageModel(M)(model(0), batch(), Report()), "extra_tokens=0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ignored_labels_stay_ignored():
    lm = model()
    data = batch()
    torch.manual_seed(5)
    full = PrefixLanguageModel(M)(lm, data, Report()).parts["next_token"]
    data["labels"] = data["labels"].clone()
    data["labels"][:, M + 3 :] = IGNORED
    torch.manual_seed(5)
    part = PrefixLanguageModel(M)(lm, data, Report()).parts["next_token"]
    assert not torch.equal(full, part)
    assert torch.isfinite(part)
