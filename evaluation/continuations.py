"""Texts continued by a model, side by side though their lengths differ.

B rows, T time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.generation import generate
from models.interface import TokenModel
from tasks.base import PADDING
from tasks.text.tokenizers import END_OF_LINE, Tokenizer


def continue_tokens(
    model: TokenModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    temperature: float = 0.0,
) -> list[str]:
    """What the model writes after each prompt of ids, up to the first of the strings in `until`.

    Prompts are padded on the left, which `segments` keeps out of every state; a model that does
    not keep documents apart needs prompts of one length, see `batches`.
    """
    inputs, segments = pad_left(prompts)
    device = model.head_weight.device

    def stop(new: Tensor) -> Tensor:
        texts = [text_of(tokenizer, row) for row in new.tolist()]
        return torch.tensor([any(end in text for end in until) for text in texts])

    new = generate(
        model,
        inputs.to(device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token=tokenizer.bos,  # the next document would begin
        stop=stop if until else None,
        segments=None if segments is None else segments.to(device),
    )
    return [_before(text_of(tokenizer, row), until) for row in new.tolist()]


def batches(
    lengths: Sequence[int], batch_size: int, supports_segments: bool = True
) -> Iterator[list[int]]:
    """Indices of `lengths`, the longest first, in batches; of equal lengths where padding shows."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        unlike = not supports_segments and batch and lengths[i] != lengths[batch[0]]
        if len(batch) == batch_size or unlike:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) that end together and their `segments`, None where no row is padded."""
    longest = max(len(row) for row in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    segments = torch.full_like(inputs, PADDING)
    for b, row in enumerate(rows):
        inputs[b, longest - len(row) :] = torch.tensor(row)
        segments[b, longest - len(row) :] = 0
    return inputs, None if bool((segments == 0).all()) else segments


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`; the word that stands for the end of a line is one."""
    text = tokenizer.decode(ids)
    if tokenizer.unknown is None:  # no word-level tokeniser
        return text
    return text.replace(f" {END_OF_LINE} ", "\n").replace(END_OF_LINE, "\n")


def _before(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text
