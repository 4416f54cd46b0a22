"""Vectors in place of tokens, and the auto-encoder: values, gradients, cost, what they refuse."""

import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from evaluation import Settings, evaluate
from evaluation.recall import predict
from layers.report import Report
from models.build import build_model
from models.exported import load_exported, network_of, write_exported
from models.io import AutoEncoder, Vectors
from models.io.auto_encoder import sinusoids
from schema.check import check, plain
from schema.compose import compose
from schema.errors import ConfigError
from tests.tiny import tiny_model
from training.objectives import NextToken
from training.vector_objective import SquaredError

V, D, E = 16, 32, 6


def vectors(pattern="conv") -> Vectors:
    return Vectors(tiny_model(pattern, vocab_size=V), width=E, seed=3).eval()


def auto_encoder(pattern="conv") -> AutoEncoder:
    torch.manual_seed(1)
    model = AutoEncoder(tiny_model(pattern, vocab_size=V)).eval()
    with torch.no_grad():
        for layer in (model.decoder[0], model.decoder[2]):
            layer.weight.mul_(25)  # so that a position makes a difference
    return model


def pairs(rows: int, length: int) -> torch.Tensor:
    return torch.randint(V * V, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_position_is_two_rows_of_the_table_side_by_side():
    model, tokens = vectors(), pairs(2, 5)
    table = model.embedding.weight
    norms = torch.ones(V).index_fill(0, torch.tensor([0]), 0.0)
    assert torch.allclose(table.norm(dim=1), norms, atol=1e-6)  # a few roundings of fp32
    x = torch.stack(
        [
            model.reads.weight @ torch.cat([table[int(t) // V], table[int(t) % V]])
            for t in tokens.flatten()
        ]
    ).view(2, 5, D)
    h, _ = model.network.read(x)
    logits, _ = model(tokens)
    expected = h @ model.answers.weight.T @ table.T
    assert torch.allclose(logits, expected, atol=1e-5)  # sums of 32 products of order 1 in fp32
    # The nearest row is the one of the largest logit: all have length 1, but for the zero.
    answers = h @ model.answers.weight.T
    distance = torch.cdist(answers, table[1:].expand(2, -1, -1))
    assert torch.equal(logits[..., 1:].argmax(-1), distance.argmin(-1))


def test_the_table_is_not_trained_and_nothing_else_is_left_out():
    model = vectors()
    assert not model.embedding.weight.requires_grad
    labels = torch.randint(V, (2, 5))
    batch = {"inputs": pairs(2, 5), "labels": labels}
    NextToken()(model, batch, Report()).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in model.network.parameters()} < {id(p) for p in model.parameters()}


@torch.no_grad()
def test_vectors_go_on_from_a_state():
    model, tokens = vectors(["conv", "attention"]), pairs(2, 7)
    whole, _ = model(tokens)
    state = model.new_state(2, 7)
    first, state = model(tokens[:, :3], state, want_state=True)
    second, _ = model(tokens[:, 3:], state, want_state=True)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)  # fp32, other sums


def test_squared_error_is_of_the_labelled_vectors_alone():
    model = vectors()
    batch = {"inputs": pairs(2, 5), "labels": torch.full((2, 5), -100)}
    batch["labels"][0, 2], batch["labels"][1, 4] = 7, 9
    h, _ = model.hidden(batch["inputs"])
    told = h @ model.answers.weight.T
    table = model.embedding.weight
    expected = ((told[0, 2] - table[7]) ** 2).sum() + ((told[1, 4] - table[9]) ** 2).sum()
    loss = SquaredError()(model, batch, Report()).total.detach()
    assert float(loss) == pytest.approx(float(expected.detach()) / 2, rel=1e-5)  # fp32
    with pytest.raises(ConfigError, match="objective=squared_error: expected io=vectors, not to"):
        SquaredError()(tiny_model("conv", vocab_size=V), batch, Report())


@torch.no_grad()
def test_every_position_is_decoded_from_the_vector_of_the_last():
    model = auto_encoder()
    tokens = torch.randint(V, (3, 7))
    h, _ = model.network.hidden(tokens)
    for t in range(7):
        code = [f(t / 10_000 ** (2 * i / D)) for i in range(D // 2) for f in (math.sin, math.cos)]
        y = model.decoder(h[:, -1] + torch.tensor(code))
        # fp32 sums of D products, and sines of other roundings
        assert torch.allclose(model.hidden(tokens)[0][:, t], y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_shorter_sequence_is_not_seen(side):
    model = auto_encoder("mamba")
    tokens = torch.randint(V, (2, 9))
    segments = torch.zeros(2, 9, dtype=torch.int64)
    own = slice(4, None) if side == "left" else slice(0, 5)
    segments[1] = -1
    segments[1, own] = 0
    padded, _ = model(tokens, segments=segments)
    alone, _ = model(tokens[1:, own])
    assert torch.allclose(padded[1, own], alone[0], rtol=1e-4, atol=1e-4)  # fp32, other shapes
    whole, _ = model(tokens[:1])
    assert torch.allclose(padded[0], whole[0], rtol=1e-4, atol=1e-4)


def test_sines_and_cosines_of_the_paper():
    code = sinusoids(torch.tensor([0, 5]), 4)
    assert code[0].tolist() == [0, 1, 0, 1]
    expected = [math.sin(5), math.cos(5), math.sin(0.05), math.cos(0.05)]
    assert code[1].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [vectors, auto_encoder])
@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_flops_are_those_counted(make, length):
    model = make()
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(V, (2, length)))
    assert counter.get_total_flops() == model.flops(2, length)


@pytest.mark.parametrize(
    ("io", "task"), [("vectors", "mqar_continuous"), ("auto_encoder", "compression")]
)
def test_an_exported_one_is_the_same(io, task, tmp_path):
    cfg = plain(compose("config", [f"task={task}", "model.d_model=16"]))
    assert cfg["io"]["_target_"].endswith({"vectors": "Vectors"}.get(io, "AutoEncoder"))
    model = build_model(cfg, V).eval()
    write_exported(model, network_of(cfg), tmp_path / "out")
    tokens = torch.randint(V, (2, 6))
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "out")(tokens)[0], model(tokens)[0])


def tiny_task(name: str, **options):
    cfg = compose("config", [f"task={name}", *(f"task.{k}={v}" for k, v in options.items())])
    task = instantiate(cfg.task)
    task.prepare()
    return task


def test_an_auto_encoder_is_scored_and_said_to_see_everything():
    part = "[{seq_len: 8, num_examples: 200}]"
    task = tiny_task("compression", train=part, test=part)
    model = auto_encoder(["conv", "attention"])
    result = evaluate(model, task, "test", Settings())
    assert result["model"]["leak_reason"].startswith("io=auto_encoder: every position")
    assert result["all"]["state_bytes"] == 4 * D
    assert result["all"]["chance"] == pytest.approx((1 + 7 / 15) / 8)
    assert 0 <= result["all"]["sequence_accuracy"] < 0.4
    with torch.no_grad():
        tokens = torch.from_numpy(task.slices("test")["L8"].inputs)
        said = predict(model, model.hidden(tokens)[0].flatten(0, 1))
    right = (said.view(tokens.shape) == tokens).float().mean()
    assert result["all"]["token_accuracy"] == pytest.approx(float(right))


def test_a_model_of_another_kind_is_refused():
    part = "[{seq_len: 8, num_examples: 20}]"
    with pytest.raises(ConfigError, match="task=compression is for io=auto_encoder; the model has"):
        evaluate(tiny_model("conv", vocab_size=V), tiny_task("compression", train=part, test=part))
    for overrides, said in (
        (["task=compression", "io=tokens"], "io=tokens: this task is for io=auto_encoder"),
        (["io=auto_encoder"], "io=auto_encoder: this task is for io=tokens"),
        (["task=mqar_continuous", "memory=hmt"], "memory: expected none with io=vectors"),
        (["task=mqar_continuous", "io.width=0"], "io: width=0: expected at least 1"),
        (["task=mqar_continuous", "extra_tokens=1"], "io: extra_tokens=1: expected 0"),
        (["task=compression", "io.hidden=0"], "io: hidden=0: expected null or at least 1"),
        (["task=compression", "pattern=conv", "model.d_model=33"], "d_model=33: expected an even"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(compose("config", overrides))


def test_labels_are_never_beyond_what_a_model_of_vectors_names():
    part = "[{seq_len: 32, num_kv_pairs: 4, num_examples: 50}]"
    task = tiny_task("mqar_continuous", vocab_size=64, train=part, test=part)
    labels = task.slices("test")["L32_K4"].labels
    assert labels.max() < task.vocab_size == 64
    assert np.max(task.slices("test")["L32_K4"].inputs) >= 64
