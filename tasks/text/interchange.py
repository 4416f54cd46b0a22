"""A tokeniser as the files that the `tokenizers` and `transformers` libraries read."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, processors

from records.atomic import write_json
from tasks.text.tokenizers import FILE_NAME, Tokenizer

BOS_TOKEN = "<|document|>"


def to_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """`tokenizer` with the begin-of-document id as a special token, which starts every encoding.

    Raises:
        ValueError: the vocabulary has gaps or a token of that name, so that the id is another.
    """
    inner = tokenizer.to_library()
    inner.add_special_tokens([AddedToken(BOS_TOKEN, special=True)])
    found = inner.token_to_id(BOS_TOKEN)
    if found != tokenizer.bos:
        raise ValueError(
            f"the id of {BOS_TOKEN} would be {found}; expected {tokenizer.bos}, "
            "the one after a vocabulary without gaps"
        )
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, found)]
    )
    return inner


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    text = to_library(tokenizer).to_str(pretty=True)
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": BOS_TOKEN,
        "pad_token": BOS_TOKEN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)
