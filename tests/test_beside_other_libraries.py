"""`kernels` is also the name of a distribution that other libraries look for; they must cope."""

import importlib.util
import subprocess
import sys

import pytest

import kernels


@pytest.mark.parametrize("library", ["datasets", "transformers", "lm_eval"])
def test_library_runs_beside_our_kernels(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (the `eval` extra brings it)")
    use = {
        "datasets": "assert datasets.Dataset.from_dict({'a': [1, 2]})[1] == {'a': 2}",
        "transformers": (
            "from transformers import LlamaConfig, LlamaForCausalLM as M; import torch;"
            "m = M(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,"
            " num_hidden_layers=1, num_attention_heads=1));"
            "assert m(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)"
        ),
        "lm_eval": "from lm_eval.api.model import LM; assert LM",
    }[library]
    code = f"import kernels, {library}; {use}; assert kernels.__version__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_kernels_has_a_version():
    assert kernels.__version__.count(".") == 2
