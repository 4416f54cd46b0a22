"""What an evaluation can be told, and that wrong input is one line."""

import pytest

from evaluation.settings import Settings
from schema.errors import ConfigError


def test_both_protocols_by_default():
    assert Settings().protocols == ("windowed", "carried")
    assert Settings(protocol="carried").protocols == ("carried",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "strided"}, "eval.protocol=strided: allowed: windowed, carried, both"),
        ({"window": 0}, "eval.window=0"),
        ({"window": "whole"}, "eval.window=whole: allowed: train, document or a number"),
        ({"window": True}, "eval.window=True"),
        ({"stride": 0}, "eval.stride=0"),
        ({"window": 8, "stride": 9}, "eval.stride=9: allowed: up to eval.window=8"),
        ({"window": "document", "stride": 9}, "eval.stride=9 with eval.window=document"),
        ({"prefix": -1}, "eval.prefix=-1"),
        ({"chunk": 0}, "eval.chunk=0"),
        ({"batch_size": 0}, "eval.batch_size=0"),
        ({"samples": -1}, "eval.samples=-1"),
        ({"max_new_tokens": 0}, "eval.max_new_tokens=0"),
        ({"temperature": -0.1}, "eval.temperature=-0.1"),
        ({"top_k": 0}, "eval.top_k=0"),
        ({"top_p": 1.5}, "eval.top_p=1.5"),
        ({"temperature": 0.0, "top_p": 0.9}, "eval.temperature=0 is greedy"),
    ],
)
def test_wrong_settings_are_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        Settings(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
