"""recall_study.py: trains what is missing, and only that."""

import json

import pytest

from recall_study import study
from schema.compose import compose
from schema.errors import ConfigError
from tests.evaluation.test_study import TINY

pytestmark = pytest.mark.slow  # starts processes that import everything


def told(out, *overrides: str):
    common = ", ".join(f"'{each}'" for each in TINY)
    return compose(
        "recall_study",
        [
            f"study.common=[{common}]",
            *(f"~study.arms.{arm}" for arm in ("mamba", "mamba-attention", "hedgehog-16")),
            "study.columns=[L16_K2]",
            "study.lrs=[0.001]",
            f"out={out}",
            *overrides,
        ],
    )


def test_a_study_goes_on_where_it_stopped(tmp_path, capsys):
    study(told(tmp_path, "study.seeds=[0]"))
    assert "2 runs, 0 of them finished" in capsys.readouterr().out
    rows = study(told(tmp_path, "study.seeds=[0,1]"))
    printed = capsys.readouterr().out
    assert "4 runs, 2 of them finished" in printed
    assert "Student's 95% interval" in printed
    written = json.loads((tmp_path / "study.json").read_text())
    assert [row["arm"] for row in written] == [row.arm for row in rows] == ["attention", "based-8"]
    with pytest.raises(ConfigError, match="a run with another model; give another out="):
        study(told(tmp_path, "study.seeds=[0]", "study.arms.attention=['model.d_model=16']"))
    with pytest.raises(ConfigError, match=r"study\.arms\.attention: .*0 features per head"):
        study(told(tmp_path, "study.arms.attention=['pattern=based','mixers.based.key_dim=0']"))
