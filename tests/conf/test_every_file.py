"""Every file of conf/ composes, is typed, builds, and takes a step in tiny form."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from evaluation.study import Plan
from models.build import build_model
from schema.check import check, check_here
from schema.compose import CONF, compose, compose_all, compose_with_hydra
from schema.names import check_pattern
from train import train
from training.data import loader_of
from training.module import Training

FILES = {str(p.relative_to(CONF).with_suffix("")) for p in CONF.rglob("*.yaml")}
COMMANDS = {"config", "eval", "compare", "bench", "export", "recall_study", "search"}
EVERYWHERE = {"shell", *(file for file in FILES if file.startswith("hydra/"))}
MIXERS = {file for file in FILES if file.startswith("mixer/")}
# Some experiments are sweeps.
SWEEPS = {
    f for f in FILES if f.startswith("sweep/") or "params:" in (CONF / f"{f}.yaml").read_text()
}
PROBES = {file for file in FILES if file.startswith("probe/")}
STUDIES = {file for file in FILES if file.startswith("study/")}
CHOICES = FILES - COMMANDS - EVERYWHERE - MIXERS - STUDIES - PROBES
CHOICES -= {file for file in SWEEPS if file.startswith("sweep/")}
PARTS = ("train", "test")  # of a recall task; its first slices are its smallest
# What says how a run goes rather than what is trained: shown by a whole run.
RUNS = {f for f in CHOICES if f.split("/")[0] in ("trainer", "logger", "callbacks", "debug")}
GPUS = {"trainer/gpu", "trainer/ddp", "trainer/fsdp", "trainer/sequence", "callbacks/autotune"}
# What imitates a trained model: shown by tests/e2e/test_transfer.py.
TRANSFERS = {"objective/attention_transfer", "experiment/wikitext_small_transfer"}
# What the default task, of tokens, has no use for.
TASK_OF = {
    "io/vectors": ["task=mqar_continuous"],
    "io/auto_encoder": ["task=compression"],
    "objective/squared_error": ["task=mqar_continuous"],
}


def overrides_of(file: str) -> list[str]:
    group, _, choice = file.rpartition("/")
    own = f"pattern={choice}" if group == "mixer" else f"{group}={choice}"
    return [own, *(["objective.teacher=somewhere"] if file in TRANSFERS else TASK_OF.get(file, []))]


@pytest.fixture
def composed(request, tmp_path, monkeypatch) -> DictConfig:
    """The file as it is shipped, checked; only a text task is given a text."""
    monkeypatch.chdir(tmp_path)
    overrides = overrides_of(request.param)
    if request.param == "task/text":
        overrides.append("files=[text.txt]")
    cfg = compose("config", overrides)
    check(cfg)
    return cfg


def tiny(cfg: DictConfig, folder) -> DictConfig:
    """`cfg` with small sizes and a text of its own, for one step."""
    cfg = copy.deepcopy(cfg)
    depth = 1 if isinstance(cfg.pattern, str) else len(cfg.pattern)
    changes = {
        "model.d_model": 32,
        "model.num_heads": 2,
        "model.num_layers": depth,
        "task.recipe.batch_size": 2,
        "task.recipe.warmup_steps": 0,
        "task.recipe.max_steps": 1,
    }
    if "prefix_len" in cfg.objective:
        changes["objective.prefix_len"] = 8
    if "corpus" in cfg.task:
        text = folder / "text.txt"
        text.write_text("".join(f"line {i} of a text\n" for i in range(400)))
        changes |= {
            "task.corpus": {
                "_target_": "tasks.text.files.TextFiles",
                "files": [str(text)],
                "validation": 0.2,
                "test": 0.2,
            },
            "task.tokenizer": "bytes",
            "task.seq_len": 32,
            "task.cache": str(folder / "cache"),
        }
    else:
        changes |= {f"task.{part}": [{**cfg.task[part][0], "num_examples": 8}] for part in PARTS}
    with open_dict(cfg):
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, merge=False)
    cfg.trainer.accelerator = "cpu"
    cfg.trainer.max_steps = cfg.trainer.validate_every = min(10, cfg.trainer.max_steps)
    check(cfg)
    check_here(cfg)
    return cfg


@pytest.mark.parametrize("composed", sorted((CHOICES | MIXERS) - RUNS - TRANSFERS), indirect=True)
def test_it_trains(composed, tmp_path):
    takes_a_step(tiny(composed, tmp_path))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_trains_on_text(mixer, tmp_path):
    """The default task, of test_it_trains, is recall."""
    takes_a_step(tiny(compose("config", ["task=wikitext_small", *overrides_of(mixer)]), tmp_path))


def takes_a_step(cfg):
    torch.manual_seed(0)
    task = instantiate(cfg.task)
    task.prepare()
    module = Training(
        build_model(cfg, task.vocab_size),
        instantiate(cfg.objective),
        instantiate(cfg.optimizer),
        instantiate(cfg.scheduler),
    )
    before = copy.deepcopy(module.model.state_dict())
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step(next(iter(loader_of(task, cfg, step=0))), 0).backward()
    optimizer.step()
    assert math.isfinite(module.loss["loss"])
    assert any(not torch.equal(before[name], w) for name, w in module.model.state_dict().items())


@pytest.mark.parametrize("composed", sorted(RUNS - GPUS - {"logger/wandb"}), indirect=True)
def test_it_runs(composed, tmp_path):
    cfg = tiny(composed, tmp_path)
    cfg.run_dir = "run"
    scores = train(cfg)
    assert all(math.isfinite(score) for score in scores.values())
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "run.json", "metrics.csv"} <= written
    assert ("profile.json" in written) == ("profile" in cfg.callbacks)


@pytest.mark.parametrize("composed", ["logger/wandb", *sorted(GPUS | TRANSFERS)], indirect=True)
def test_it_is_right(composed):
    """Needs a device or a trained model, or starts processes that outlast the test."""


@pytest.mark.parametrize("file", sorted(SWEEPS))
def test_every_point_of_a_sweep_is_right(file):
    points = list(compose_all("config", overrides_of(file)))
    assert len(points) > 1
    for point in points:
        check_pattern(point.pattern, point.mixers)
        check(point)


@pytest.mark.parametrize("file", sorted(STUDIES))
def test_every_arm_of_a_study_is_right(file):
    cfg = compose("recall_study", overrides_of(file))
    check(cfg, "recall_study")
    plan = Plan(**OmegaConf.to_container(cfg.study))
    for point in plan.points(Path())[:: len(plan.lrs) * len(plan.seeds)]:
        check(compose("config", plan.overrides(point)))


@pytest.mark.parametrize("task", [None, *sorted(p.stem for p in CONF.glob("task/*.yaml"))])
def test_evaluation(task):
    overrides = ["run=somewhere"] + ([f"task={task}"] if task else [])
    cfg = compose("eval", overrides + (["files=[text.txt]"] if task == "text" else []))
    check(cfg, "eval")


@pytest.mark.parametrize("file", sorted(PROBES))
def test_probes(file):
    cfg = compose("eval", ["run=somewhere", *overrides_of(file)])
    check(cfg, "eval")
    assert next(iter(instantiate(cfg.probe).questions())).answer.isdigit()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_hydra_writes_nothing_of_its_own(command):
    cfg = compose_with_hydra(command, [])
    assert {file.rpartition("/")[2] for file in EVERYWHERE} >= {
        cfg.hydra.runtime.choices["hydra/hydra_logging"],
        cfg.hydra.runtime.choices["hydra/help"],
    }
    assert (cfg.hydra.run.dir, cfg.hydra.output_subdir, cfg.hydra.job.chdir) == (".", None, False)
