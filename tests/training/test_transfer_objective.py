"""Attention transfer as an objective: which layers, weights and gradients, and what is refused."""

import copy

import pytest
import torch

from layers.report import Report
from models.language_model import LanguageModel
from schema.errors import ConfigError
from tests.tiny import tiny_model
from training.objectives import NextToken
from training.transfer_objective import AttentionTransfer

LENGTH = 24


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(31, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    segments = torch.tensor([[0] * 10 + [1] * 14, [0] * 20 + [-1] * 4])
    return {"inputs": tokens, "labels": tokens.roll(-1, dims=1), "segments": segments}


def attached(
    student: LanguageModel, teacher: LanguageModel, **options
) -> tuple[AttentionTransfer, LanguageModel]:
    objective = AttentionTransfer("somewhere", **options)
    objective.attach(student, teacher, copy=True)
    return objective, student


@pytest.fixture
def teacher() -> LanguageModel:
    return tiny_model("attention", seed=1)


def trained_names(model: LanguageModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pattern", ["hedgehog", "hedgehog_window"])
def test_stage_1_trains_what_is_new_and_takes_the_rest(teacher, pattern):
    student = tiny_model(pattern)
    before = copy.deepcopy(student.state_dict())
    attached(student, teacher)
    theirs = teacher.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, theirs[name] if name in theirs else before[name]), name
    new = {name for name in before if name not in theirs}
    assert trained_names(student) == new
    kinds = {name.rpartition("mixer.")[2] for name in new}
    expected = {"query_map.weight", "key_map.weight"}
    assert kinds == expected | ({"window_factors"} if pattern == "hedgehog_window" else set())


def test_layers_are_fed_what_the_teachers_read(teacher):
    objective, student = attached(tiny_model("hedgehog"), teacher)
    data, report = batch(), Report()
    loss = objective(student, data, report)
    reads = []
    for block in teacher.blocks:
        block.mixer.register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    with torch.no_grad():
        teacher.eval().hidden(data["inputs"], segments=data["segments"])
    alone = [
        mixer.imitation_loss(x, old, segments=data["segments"])["kl"]
        for mixer, x, old in zip(student.mixers, reads, teacher.mixers, strict=True)
    ]
    torch.testing.assert_close(loss.parts["kl"], sum(alone) / 2)
    torch.testing.assert_close(report.stats["block1/kl"], alone[1].detach())
    # The second layer learns from the teacher's first and not from the student's own.
    with torch.no_grad():
        student.mixers[0].query_map.weight.mul_(3)
    torch.testing.assert_close(
        objective(student, data, Report()).parts["kl"] - loss.parts["kl"],
        (
            student.mixers[0].imitation_loss(
                reads[0], teacher.mixers[0], segments=data["segments"]
            )["kl"]
            - alone[0]
        )
        / 2,
    )


def test_gradients_are_the_new_parameters_alone(teacher):
    objective, student = attached(tiny_model("hedgehog_window"), teacher)
    objective(student.train(), batch(), Report()).total.backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == trained_names(student)
    assert not any(p.grad is not None for p in teacher.parameters())


def test_training_leaves_the_teacher_as_it_is_and_lowers_the_divergence(teacher):
    objective, student = attached(tiny_model("hedgehog"), teacher)
    before = copy.deepcopy(teacher.state_dict())
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    first = objective.score(student, [batch()])
    for _ in range(60):
        optimizer.zero_grad()
        objective(student, batch(), Report()).total.backward()
        optimizer.step()
    last = objective.score(student, [batch()])
    assert last["kl"] < first["kl"] / 2
    assert last["teacher_entropy"] == first["teacher_entropy"]
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(weight, student.state_dict()[name]), name


def test_layers_may_stay_softmax():
    teacher = tiny_model(["attention", "conv", "attention"], num_layers=3, seed=1)
    objective, student = attached(
        tiny_model(["attention", "conv", "hedgehog"], num_layers=3), teacher
    )
    assert objective.converted == [2]
    assert {name.split(".")[1] for name in trained_names(student)} == {"2"}
    scores = objective.score(student, [batch()])
    assert {"kl", "kl/block2", "mse", "student_entropy/block2"} <= scores.keys()
    assert "kl/block0" not in scores
    # One layer: what differs from the teacher's output is its imitation alone.
    assert scores["kl"] == scores["kl/block2"] > 0


def test_weights_of_the_losses(teacher):
    student = tiny_model("hedgehog")
    plain, _ = attached(student, teacher)
    parts = plain(student, batch(), Report()).parts
    both, _ = attached(student, teacher, weights={"xent": 1, "mse": 1000})
    total = both(student, batch(), Report()).total
    torch.testing.assert_close(total, parts["xent"] + 1000 * parts["mse"])
    unknown, _ = attached(student, teacher, weights={"kd": 1.0})
    with pytest.raises(ConfigError, match=r"objective.weights.kd: no mixer has .* allowed: loss"):
        unknown(student, batch(), Report())


def test_stage_2_is_next_token_over_all_parameters(teacher):
    student = tiny_model("hedgehog")
    objective = AttentionTransfer(None, stage=2)
    before = copy.deepcopy(student.state_dict())
    objective.attach(student, teacher, copy=False)
    assert trained_names(student) == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(w, before[name]) for name, w in student.state_dict().items())
    student.eval()
    got = objective(student, batch(), Report()).total
    torch.testing.assert_close(got, NextToken()(student, batch(), Report()).total)
    assert objective.score(student, [batch()])["kl"] > 0


def test_a_window_is_scored_with_either_part_left_out(teacher):
    objective, student = attached(tiny_model("hedgehog_window"), teacher)
    scores = objective.score(student, [batch()])
    student.eval()
    with torch.no_grad():
        both = float(NextToken()(student, batch(), Report()).total)
    assert scores["both_parts_loss"] == pytest.approx(both)
    assert (
        len({scores[f"{part}_loss"] for part in ("both_parts", "window_only", "linear_only")}) == 3
    )
    assert student.mixers[0].parts == "both"
    objective, student = attached(tiny_model("hedgehog"), teacher)
    assert "both_parts_loss" not in objective.score(student, [batch()])


def test_scoring_leaves_the_mode_of_the_model_as_it_is(teacher):
    objective, student = attached(tiny_model("hedgehog"), teacher)
    for training in (True, False):
        student.train(training)
        objective.score(student, [batch(), batch(1)])
        assert student.training is training


@pytest.mark.parametrize(
    ("student", "theirs", "message"),
    [
        ({"pattern": "mamba"}, {}, "block 0 is Mamba, which has no imitation_loss"),
        ({"pattern": ["hedgehog", "conv"]}, {}, "block 1 is GatedConv, which has no"),
        ({"pattern": "hedgehog"}, {"pattern": "conv"}, "only softmax attention can be imitated"),
        ({"pattern": "attention"}, {}, "every block is the teacher's own"),
        ({"pattern": "hedgehog", "num_layers": 3}, {}, "num_layers=3: expected the teacher's 2"),
        ({"pattern": "hedgehog", "vocab_size": 30}, {}, r"embedding.weight is \(30, 32\)"),
    ],
)
def test_models_that_do_not_fit(student, theirs, message):
    teacher = tiny_model(**{"pattern": "attention", **theirs})
    with pytest.raises(ConfigError, match=message):
        attached(tiny_model(**student), teacher)


@pytest.mark.parametrize(("option", "value"), [("rotary", False), ("num_kv_heads", 1)])
def test_options_by_which_queries_and_keys_differ(teacher, option, value):
    student = tiny_model("hedgehog")
    setattr(student.mixers[1], option, value)
    with pytest.raises(ConfigError, match=f"block 1 has {option}={value}; expected the teacher's"):
        attached(student, teacher)


def test_options_that_do_not_fit():
    for options, message in (
        ({}, "objective.teacher=null: stage 1 needs"),
        ({"teacher": "x", "stage": 3}, "objective.stage=3: allowed: 1, 2"),
        ({"teacher": "x", "weights": {"loss": -1.0}}, "objective.weights"),
        ({"teacher": "x", "weights": {}}, "objective.weights"),
        ({"teacher": "x", "validation_batches": 0}, "validation_batches=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AttentionTransfer(**options)
