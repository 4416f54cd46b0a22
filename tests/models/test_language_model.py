"""The model around the mixers: shapes, pattern, initialisation, state, facts."""

import copy

import pytest
import torch
from torch import nn

from layers.marks import mark, marked_parameters
from layers.mixer import Mixer
from layers.report import Report
from layers.state import state_nbytes
from models.build import pattern_over_depth
from models.language_model import LanguageModel

V, D = 13, 8


class RunningSum(Mixer):
    """y_t = decay * (x_0 + ... + x_t); the smallest strict mixer there is."""

    bounded_state = True

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((D,), -1.5))
        self.dt = nn.Linear(D, D)
        nn.init.constant_(self.dt.bias, 0.25)
        mark(self, "log_decay", decay=False, own_init=True)
        mark(self.dt, "bias", decay=False, own_init=True)

    def forward(
        self, x, state=None, *, segments=None, prefix_len=None, want_state=False, report=None
    ):
        past = x.new_zeros(x.shape[0], D) if state is None else state
        sums = past[:, None] + self.dt(x).cumsum(1)
        if report is not None:
            report.loss("balance", sums.square().mean())
            report.stat("last", sums[:, -1].mean())
        return sums * self.log_decay.exp(), sums[:, -1] if want_state else None

    def new_state(self, batch_size, max_len, device=None, dtype=None):
        return torch.zeros(batch_size, D, device=device, dtype=dtype)

    def state_bytes(self, batch_size, length):
        return 4 * batch_size * D

    def flops(self, batch_size, length):
        return 2 * batch_size * length * D * D


class Leaky(RunningSum):
    causal = "leaky"
    leak_reason = "reads the mean of the sequence"


def model(*mixers: Mixer, **options) -> LanguageModel:
    torch.manual_seed(0)
    mixers = mixers or (RunningSum(), RunningSum())
    return LanguageModel(V, D, mixers, [None] * len(mixers), nn.RMSNorm, **options)


def test_state_carries_over_any_split():
    lm = model().eval()
    tokens = torch.randint(V, (3, 11))
    whole, last = lm(tokens, want_state=True)
    for split in (1, 5, 10):
        first, state = lm(tokens[:, :split], want_state=True)
        second, end = lm(tokens[:, split:], state, want_state=True)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)
        torch.testing.assert_close(end, last)
    assert lm(tokens)[1] is None
    assert state_nbytes(last) == lm.state_bytes(3, 11)
    assert state_nbytes(lm.new_state(3, 11)) == lm.state_bytes(3, 11)


def test_initialisation_respects_marks_and_survives_copies():
    lm = model()
    for twin in (lm, copy.deepcopy(lm)):
        for block in twin.blocks:
            assert (block.mixer.log_decay == -1.5).all()
            assert (block.mixer.dt.bias == 0.25).all()
            assert block.mixer.dt.weight.std() < 0.04  # 0.02, not nn.Linear's 0.2
        decays = {name: marks.decay for name, _, marks in marked_parameters(twin)}
        assert not decays["blocks.0.mixer.log_decay"]
        assert not decays["blocks.1.mixer.dt.bias"]
        assert decays["blocks.0.mixer.dt.weight"]
        assert not decays["final_norm.weight"]


def test_tied_and_untied_heads():
    tied, untied = model(tie_embeddings=True), model(tie_embeddings=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is not untied.embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == V * D
    assert len({name for name, *_ in marked_parameters(tied)}) == len(list(tied.parameters()))


def test_report_names_the_block():
    lm = model()
    report = Report()
    lm(torch.randint(V, (2, 5)), report=report)
    assert set(report.losses) == {"block0/balance", "block1/balance"}
    assert all(loss.requires_grad for loss in report.losses.values())
    assert set(report.stats) == {"block0/last", "block1/last"}
    assert not any(stat.requires_grad for stat in report.stats.values())


def test_model_is_as_causal_as_its_least_causal_mixer():
    assert model().causal == "strict"
    assert model().leak_reason == ""
    leaky = model(RunningSum(), Leaky(), Leaky())
    assert leaky.causal == "leaky"
    assert leaky.leak_reason == "reads the mean of the sequence"


def test_dropout_acts_in_training_only():
    lm = model(dropout=0.5, embedding_dropout=0.5)
    tokens = torch.randint(V, (2, 9))
    assert not torch.equal(lm(tokens)[0], lm(tokens)[0])
    lm.eval()
    assert torch.equal(lm(tokens)[0], lm(tokens)[0])


def test_pattern_repeats_over_depth():
    assert pattern_over_depth("a", 3) == ["a", "a", "a"]
    assert pattern_over_depth(["a", "a", "b"], 7) == ["a", "a", "b", "a", "a", "b", "a"]
    with pytest.raises(ValueError, match=r"pattern=\[\]"):
        pattern_over_depth([], 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LanguageModel(0, D, [RunningSum()], [None], nn.RMSNorm), "vocab_size=0"),
        (lambda: LanguageModel(V, D, [RunningSum()], [], nn.RMSNorm), "1 mixers but 0"),
        (lambda: model()(torch.zeros(2, 0, dtype=torch.long)), r"\(2, 0\)"),
        (lambda: model()(torch.zeros(2, 3, dtype=torch.long), (None,)), "1 blocks; this model"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
