"""An exported network: read back as a plain module and by transformers."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from layers.mamba import Mamba
from models.build import build_model
from models.exported import check_target, load_exported, network_of, write_exported
from models.generation import generate
from schema.check import plain
from schema.compose import compose
from schema.errors import ConfigError

VOCAB = 31
SMALL = ("model.d_model=16", "model.num_layers=2", "model.num_heads=1")
PATTERNS = {
    "hybrid": ("pattern=[mamba,attention]",),
    "untied": ("pattern=[conv,based]", "model.tie_embeddings=false", "channel_mixer=swiglu"),
    "memory": (
        "pattern=sliding_window",
        "memory=hmt",
        "memory.segment_len=4",
        "memory.sensory_len=2",
    ),
}


def exported(folder, *overrides: str):
    """A model with weights so large that it predicts all sorts of tokens, and its folder."""
    cfg = plain(compose("config", [*SMALL, *overrides]))
    torch.manual_seed(0)
    model = build_model(cfg, VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    write_exported(model, network_of(cfg), folder, bos=VOCAB - 1)
    return model


@pytest.fixture(params=PATTERNS)
def pair(request, tmp_path):
    return exported(tmp_path / "out", *PATTERNS[request.param]), tmp_path / "out"


@pytest.fixture
def tokens():
    """Without the id VOCAB - 1, which transformers takes for padding."""
    return torch.randint(VOCAB - 1, (3, 11), generator=torch.Generator().manual_seed(1))


def hugging_face(folder):
    transformers = pytest.importorskip("transformers")
    import models.hf  # noqa: F401 (registers the classes)

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_logits_survive_bit_for_bit(pair, tokens):
    model, folder = pair
    expected, _ = model(tokens)
    assert torch.equal(load_exported(folder)(tokens)[0], expected)
    theirs = hugging_face(folder)
    assert torch.equal(theirs(tokens).logits, expected)
    theirs.save_pretrained(folder / "again")
    assert torch.equal(hugging_face(folder / "again")(tokens).logits, expected)


def test_transformers_generates_what_we_do(pair, tokens):
    model, folder = pair
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    theirs = hugging_face(folder)
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, :1] = 0
    for given, segments in ((torch.ones_like(tokens), None), (mask, mask - 1)):
        new = theirs.generate(tokens, attention_mask=given, **options)[:, tokens.shape[1] :]
        assert torch.equal(new, generate(model, tokens, max_new_tokens=9, segments=segments))
    alone = theirs.generate(tokens[:1, 4:], **options)[0, 7:]
    assert torch.equal(new[0], alone)  # left padding is not seen


def test_beams_carry_their_states(tmp_path, tokens):
    """Beam search reorders rows: with our states it finds what it finds reading all anew."""
    exported(tmp_path / "out", *PATTERNS["hybrid"])
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    theirs = hugging_face(tmp_path / "out")
    assert torch.equal(
        theirs.generate(tokens, **options), theirs.generate(tokens, use_cache=False, **options)
    )


def test_loss_is_of_the_next_token(tmp_path, tokens):
    model = exported(tmp_path / "out", *PATTERNS["hybrid"])
    logits = model(tokens)[0][:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    loss = hugging_face(tmp_path / "out")(tokens, labels=tokens).loss.detach()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # fp32, another order of sums


def test_padding_of_a_model_that_would_see_it_is_refused(tmp_path, tokens, monkeypatch):
    exported(tmp_path / "out", *PATTERNS["hybrid"])
    theirs = hugging_face(tmp_path / "out")
    monkeypatch.setattr(Mamba, "supports_segments", False)  # no shipped mixer is like that
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="cannot leave out padding"):
        theirs(tokens, attention_mask=mask)


def test_what_is_no_export_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load_exported(tmp_path)
    exported(tmp_path / "out", *PATTERNS["hybrid"])
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["network"]["norm"]["_target_"] = "os.system"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"_target_=os\.system: allowed: classes in layers"):
        load_exported(tmp_path / "out")
    config["network"]["norm"]["_target_"] = "layers.norm.Nothing"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"_target_=layers\.norm\.Nothing"):
        load_exported(tmp_path / "out")


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="expected a folder that is new or empty"):
            check_target(taken)
    check_target(tmp_path / "new")


def test_plain_nodes_build_the_network_of_a_configuration():
    cfg = compose("config", [*SMALL, "pattern=[mamba,based]", "channel_mixer=swiglu"])
    states = []
    for given in (cfg, plain(cfg), network_of(OmegaConf.to_container(cfg, resolve=True))):
        torch.manual_seed(0)
        states.append(build_model(given, VOCAB).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name])
