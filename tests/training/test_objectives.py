"""The objective: cross entropy of the labels, plus what layers report."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layers.mixer import Mixer
from layers.report import Report
from models.language_model import LanguageModel
from schema.errors import ConfigError
from training.objectives import NextToken

VOCAB, WIDTH = 11, 8


class Pointwise(Mixer):
    """Mixes nothing along time; reports a loss as a routing layer does."""

    bounded_state = True

    def __init__(self, commitment: float | None) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.commitment = commitment

    def forward(
        self, x, state=None, *, segments=None, prefix_len=None, want_state=False, report=None
    ):
        if report is not None and self.commitment is not None:
            report.loss("commitment", self.commitment * self.proj.weight.square().mean())
            report.stat("norm", self.proj.weight.norm())
        return self.proj(x), None

    def new_state(self, batch_size, max_len, device=None, dtype=None) -> None:
        return None

    def state_bytes(self, batch_size: int, length: int) -> int:
        return 0

    def flops(self, batch_size: int, length: int) -> int:
        return 2 * batch_size * length * WIDTH * WIDTH


def model(*commitments: float | None) -> LanguageModel:
    torch.manual_seed(0)
    mixers = [Pointwise(each) for each in commitments]
    return LanguageModel(VOCAB, WIDTH, mixers, [None] * len(mixers), nn.LayerNorm)


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[0, :4] = -100
    return {"inputs": tokens[:, :-1], "labels": labels}


def test_it_is_the_mean_cross_entropy_of_the_labels_and_so_are_its_gradients() -> None:
    net, data = model(None, None), batch()
    loss = NextToken()(net, data, Report())
    assert loss.parts == {}
    loss.total.backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    logits, _ = net(data["inputs"])
    expected = cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100)
    expected.backward()
    # fp32 sums of 17 labels in another order
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=0)
    for ours, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("given", "weight"), [(None, 1.0), ({"commitment": 0.25}, 0.25)])
def test_reported_losses_of_all_layers_are_added_with_their_weight(given, weight) -> None:
    net, data, report = model(2.0, None, 3.0), batch(), Report()
    loss = NextToken(given)(net, data, report)
    reported = report.losses["block0/commitment"] + report.losses["block2/commitment"]
    assert loss.parts.keys() == {"next_token", "commitment"}
    torch.testing.assert_close(loss.parts["commitment"], weight * reported)
    torch.testing.assert_close(loss.total, loss.parts["next_token"] + weight * reported)
    plain = NextToken()(model(None, None, None), data, Report()).total
    torch.testing.assert_close(loss.parts["next_token"], plain)


def test_a_weight_for_a_loss_that_nobody_reports_is_an_error() -> None:
    message = r"objective.auxiliary.comitment: no layer reports .*; reported: commitment"
    with pytest.raises(ConfigError, match=message):
        NextToken({"comitment": 0.1})(model(1.0), batch(), Report())
