"""A model of ours as one of lm-evaluation-harness, and the command that runs its tasks.

Contexts begin with the begin-of-document id, as every document did in training. Prompts of
unlike length are batched by padding on the left, which `segments` keeps out of every state;
decoding goes on from the states.

B rows, T time, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.limits import check_length
from evaluation.protocols import score_carried
from models.generation import evaluation_mode, generate
from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.base import IGNORED, PADDING, Document
from tasks.text.tokenizers import END_OF_LINE, Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ConfigError(
        'lm_eval.tasks: the package lm-eval is not installed; pip install "seqmix[eval]"'
    ) from error

MAX_NEW_TOKENS = 256  # where a task does not say: the harness's own default


class _Scored(NamedTuple):
    """Tokens to read, of which the last `count` targets are scored."""

    inputs: list[int]
    targets: list[int]  # as many as are scored


class SeqmixLM(TemplateLM):
    """loglikelihood, loglikelihood_rolling and generate_until of a TokenModel.

    Args:
        model: stays as it is; is in evaluation mode during calls.
        tokenizer: that it was trained with.
        batch_size: rows side by side.
        max_length: tokens of context at most. A longer prompt loses its beginning, as in the
            harness, and a text is scored in the harness's windows. None cuts nothing: a text is
            read once from its beginning, the states handed on, so that every token has all of the
            text before it, as under eval.protocol=carried.
        chunk: tokens that are read at once where nothing is cut.
    """

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        chunk: int = 512,
    ) -> None:
        super().__init__()
        if model.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"the model has a vocabulary of {model.vocab_size} ids, "
                f"the tokeniser of {tokenizer.vocab_size}: expected the same"
            )
        if max_length is not None:
            check_length(model, max_length, f"lm_eval.max_length={max_length}")
        self.model, self.codec = model, tokenizer
        self.batch_size, self.max_length, self.chunk = batch_size, max_length, chunk
        self.truncated = 0  # prompts that lost their beginning

    @property
    def eot_token_id(self) -> int:
        """The begin-of-document id: the next document would begin."""
        return self.codec.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, behind the begin-of-document id unless add_special_tokens=False."""
        ids = self.codec.encode_batch([string])[0].tolist()
        return ids if add_special_tokens is False else [self.codec.bos, *ids]

    def tok_decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the word that stands for the end of a line is one."""
        text = self.codec.decode(ids)
        if self.codec.unknown is None:  # no word-level tokeniser
            return text
        return text.replace(f" {END_OF_LINE} ", "\n").replace(END_OF_LINE, "\n")

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of every (texts, context, continuation): nats, and whether greedy decoding gives it."""
        rows = []
        for (_, text), context, continuation in requests:
            if not context or not continuation:
                raise ConfigError(f"lm_eval: {text!r} has no tokens of its own after its context")
            rows.append(_Scored([*context, *continuation[:-1]], continuation))
        return self._score([self._cut(row) for row in rows])

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts; see `max_length`."""
        texts = [request.args[0] for request in requests]
        encoded = self.codec.encode_batch(texts)
        if self.max_length is None:
            return self._whole([[self.codec.bos, *ids.tolist()] for ids in encoded])
        rows, owners = [], []
        for i, ids in enumerate(encoded):
            windows = get_rolling_token_windows(ids.tolist(), self.codec.bos, self.max_length, 1)
            for inputs, targets in windows:
                rows.append(_Scored(inputs, targets))
                owners.append(i)
        totals = [0.0] * len(texts)
        for owner, (nats, _) in zip(owners, self._score(rows), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the strings in `until`, or `max_gen_toks` tokens.

        Raises:
            ConfigError: generation options that a task asks for and this adapter does not have.
        """
        made: dict[int, str] = {}
        groups: dict[_Generation, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_Generation.of(request.args[1]), []).append(i)
        for options, members in groups.items():
            prompts = {i: self._prompt(requests[i].args[0], options) for i in members}
            for rows in self._batches(members, lambda i, of=prompts: len(of[i])):
                texts = self._continue([prompts[i] for i in rows], options)
                made |= dict(zip(rows, texts, strict=True))
        return [made[i] for i in range(len(requests))]

    def _whole(self, texts: list[list[int]]) -> list[float]:
        """Nats of texts that are read once, from their beginning."""
        documents = [Document(torch.tensor(ids).numpy(), 0, 0, "") for ids in texts if len(ids) > 1]
        check_length(
            self.model, max((len(d.ids) - 1 for d in documents), default=0), "the longest text"
        )
        if not documents:
            return [0.0] * len(texts)
        score = score_carried(
            self.model, documents, chunk=self.chunk, batch_size=self.batch_size
        ).documents
        scores = iter(score)
        return [-next(scores).nll if len(ids) > 1 else 0.0 for ids in texts]

    def _score(self, rows: list[_Scored]) -> list[tuple[float, bool]]:
        """Nats of the targets of every row, and whether each was the most likely token."""
        check_length(
            self.model, max((len(row.inputs) for row in rows), default=0), "the longest request"
        )
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        device = self.model.head_weight.device
        with evaluation_mode(self.model):
            for members in self._batches(range(len(rows)), lambda i: len(rows[i].inputs)):
                inputs, segments = pad_left([rows[i].inputs for i in members])
                targets = torch.full_like(inputs, IGNORED)
                for b, i in enumerate(members):
                    targets[b, -len(rows[i].targets) :] = torch.tensor(rows[i].targets)
                h, _ = self.model.hidden(inputs.to(device), segments=_to(segments, device))
                targets = targets.to(device)
                for b, i in enumerate(members):
                    results[i] = self._judge(h[b], targets[b])
        return results

    def _judge(self, h: Tensor, targets: Tensor) -> tuple[float, bool]:
        """(T, D) and (T,): summed log-likelihood in fp64, and whether all are most likely."""
        asked = targets != IGNORED
        logits = nn.functional.linear(h[asked], self.model.head_weight)
        wanted = targets[asked]
        losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        return -float(losses.double().sum()), bool((logits.argmax(-1) == wanted).all())

    def _continue(self, prompts: list[list[int]], options: "_Generation") -> list[str]:
        inputs, segments = pad_left(prompts)
        device = self.model.head_weight.device
        until = options.until

        def stop(new: Tensor) -> Tensor:
            texts = [self.tok_decode(row) for row in new.tolist()]
            return torch.tensor([any(end in text for end in until) for text in texts])

        new = generate(
            self.model,
            inputs.to(device),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            stop_token=self.codec.bos,
            stop=stop if until else None,
            segments=_to(segments, device),
        )
        return [_before(self.tok_decode(row), until) for row in new.tolist()]

    def _prompt(self, context: str, options: "_Generation") -> list[int]:
        """Ids of a prompt that leaves room for what is generated."""
        ids = self.tok_encode(context)
        if self.max_length is not None:
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"lm_eval.max_length={self.max_length}: expected more than the "
                    f"{options.max_new_tokens} tokens that are to be generated"
                )
            self.truncated += len(ids) > room
            ids = ids[-room:]
        check_length(self.model, len(ids) + options.max_new_tokens, "a prompt and its continuation")
        return ids

    def _cut(self, row: _Scored) -> _Scored:
        """A row of at most `max_length` inputs."""
        if self.max_length is None or len(row.inputs) <= self.max_length:
            return row
        self.truncated += 1
        return _Scored(row.inputs[-self.max_length :], row.targets[-self.max_length :])

    def _batches(self, members: Sequence[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Rows of like length side by side, of equal length where padding would be seen."""
        alike = not self.model.supports_segments
        batch: list[int] = []
        for i in sorted(members, key=lambda i: -length(i)):
            full = len(batch) == self.batch_size
            if batch and (full or (alike and length(i) != length(batch[0]))):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


@dataclass(frozen=True)
class _Generation:
    """What a task says of generation."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float

    @classmethod
    def of(cls, options: dict[str, Any]) -> "_Generation":
        known = {"until", "max_gen_toks", "max_length", "temperature", "do_sample"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"generation_kwargs.{unknown[0]}: unknown; allowed: {', '.join(sorted(known))}"
            )
        until = options.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        warm = options.get("do_sample", False) or float(options.get("temperature") or 0) > 0
        temperature = float(options.get("temperature") or 1.0) if warm else 0.0
        return cls(until, int(options.get("max_gen_toks", MAX_NEW_TOKENS)), temperature)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) that end together and their `segments`, None where no row is padded."""
    longest = max(len(row) for row in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    segments = torch.full_like(inputs, PADDING)
    for b, row in enumerate(rows):
        inputs[b, longest - len(row) :] = torch.tensor(row)
        segments[b, longest - len(row) :] = 0
    return inputs, None if bool((segments == 0).all()) else segments


def _to(segments: Tensor | None, device: torch.device) -> Tensor | None:
    return None if segments is None else segments.to(device)


def _before(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text
