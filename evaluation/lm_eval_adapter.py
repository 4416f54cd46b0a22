"""A model of ours as one of lm-evaluation-harness, and the command that runs its tasks.

Contexts begin with the begin-of-document id, as every document did in training. Prompts of
unlike length are batched by padding on the left, which `segments` keeps out of every state;
decoding goes on from the states.

B rows, T time, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.continuations import batches, continue_tokens, pad_left, text_of
from evaluation.limits import check_length
from evaluation.protocols import score_carried
from models.generation import evaluation_mode
from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.base import IGNORED, Document
from tasks.text.tokenizers import Tokenizer

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
        """See continuations.text_of."""
        return text_of(self.codec, ids)

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
            for batch in self._batches([len(prompts[i]) for i in members]):
                rows = [members[place] for place in batch]
                texts = continue_tokens(
                    self.model,
                    self.codec,
                    [prompts[i] for i in rows],
                    max_new_tokens=options.max_new_tokens,
                    until=options.until,
                    temperature=options.temperature,
                )
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
            for members in self._batches([len(row.inputs) for row in rows]):
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

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return batches(lengths, self.batch_size, self.model.supports_segments)

    def _cut(self, row: _Scored) -> _Scored:
        """A row of at most `max_length` inputs."""
        if self.max_length is None or len(row.inputs) <= self.max_length:
            return row
        self.truncated += 1
        return _Scored(row.inputs[-self.max_length :], row.targets[-self.max_length :])


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
        # do_sample alone samples at temperature 1; a temperature of 0 is greedy whatever it says
        default = 1.0 if options.get("do_sample", False) else 0.0
        temperature = float(options.get("temperature", default))
        return cls(until, int(options.get("max_gen_toks", MAX_NEW_TOKENS)), temperature)


def _to(segments: Tensor | None, device: torch.device) -> Tensor | None:
    return None if segments is None else segments.to(device)
