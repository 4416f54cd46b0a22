"""Language modelling: a text under both protocols, beside the unigram model, and samples.

A model is always read with the tokeniser it was trained with, whatever text it is scored on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluation.ar_hits import earlier_places
from evaluation.limits import check_length
from evaluation.perplexity import TextScore, rates
from evaluation.progress import Advance, Show
from evaluation.protocols import score_carried, score_windowed
from evaluation.settings import ProtocolName, Settings
from models.generation import generate
from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.base import Document, Split
from tasks.text.corpus import Corpus, count_words, pieces
from tasks.text.task import LanguageModelling
from tasks.text.tokenizers import Tokenizer
from tasks.text.unigram import unigram_nll


@dataclass(frozen=True)
class Text:
    """The documents of a split as the model's tokeniser encodes them.

    `oov_rate` is the share of tokens that stand for words outside the vocabulary, `unigram` the
    nats of every document under the token frequencies of the model's training split, `earlier` the
    rare pairs that come up again (evaluation/ar_hits.py), where these are asked for.
    """

    documents: Sequence[Document]
    unigram: np.ndarray
    oov_rate: float
    official_words: int | None
    earlier: Sequence[np.ndarray] | None = None

    def facts(self) -> dict[str, Any]:
        """Sizes, and a hash by which two evaluations know that they scored the same tokens."""
        ids = hashlib.sha256()
        for document in self.documents:
            ids.update(np.asarray(document.ids, "<i8").tobytes())
        return {
            "documents": len(self.documents),
            "tokens": sum(len(document.ids) - 1 for document in self.documents),
            "words": sum(document.words for document in self.documents),
            "official_words": self.official_words,
            "bytes": sum(document.bytes for document in self.documents),
            "oov_rate": self.oov_rate,
            "ids_sha256": ids.hexdigest(),
        }


def read_text(
    task: LanguageModelling,
    split: Split,
    trained_on: LanguageModelling,
    ar_hits: int | None = None,
) -> Text:
    """The documents of `task`, encoded by the tokeniser of `trained_on`, which is prepared.

    Only the split that is scored is read of a task the model was not trained on.

    Raises:
        ConfigError: the text is not there.
    """
    if task is trained_on:
        documents = list(task.documents(split))
        oov_rate = task.store.facts[split]["oov_rate"]
    else:
        documents, oov_rate = _encode(task.corpus, split, trained_on.store.tokenizer)
    train = trained_on.store["train"]
    vocab_size = trained_on.vocab_size
    unigram = unigram_nll(train, documents, vocab_size)  # type: ignore[arg-type]
    earlier = ar_hits and earlier_places(documents, train.tokens, vocab_size, ar_hits)
    return Text(
        documents, unigram, oov_rate, task.corpus.official_words.get(split), earlier or None
    )


def score_text(
    model: TokenModel,
    text: Text,
    settings: Settings,
    train_length: int,
    show: Show,
) -> dict[str, Any]:
    """Every protocol that is asked for, and the unigram model, over the same documents."""
    facts = text.facts()
    scores = {}
    for protocol in settings.protocols:
        with show(f"{protocol} perplexity", facts["tokens"]) as progress:
            scores[protocol] = _score(model, text, protocol, settings, train_length, progress)
    nll = float(text.unigram.sum())
    return {
        "text": facts,
        "protocols": {name: score.summary() for name, score in scores.items()},
        "unigram": {
            "nll": nll,
            **rates(nll, facts["tokens"], facts["words"], facts["bytes"]),
        },
        "documents": [
            {
                "title": document.title,
                "tokens": len(document.ids) - 1,
                "words": document.words,
                "bytes": document.bytes,
                "scored_tokens": {
                    name: score.documents[d].tokens for name, score in scores.items()
                },
                "nll": {name: score.documents[d].nll for name, score in scores.items()},
                "unigram_nll": float(text.unigram[d]),
            }
            for d, document in enumerate(text.documents)
        ],
    }


def sample(model: TokenModel, tokenizer: Tokenizer, settings: Settings) -> list[str]:
    """Continuations of the prompt; greedy ones are all the same, so that there is one."""
    if settings.samples == 0:
        return []
    prompt = np.array([tokenizer.bos])
    text = prompt_text(settings)
    if text:
        prompt = np.append(prompt, tokenizer.encode_batch([text])[0])
    check_length(model, len(prompt) + settings.max_new_tokens, "eval.prompt and its continuation")
    rows = settings.samples if settings.temperature > 0 else 1
    device = model.head_weight.device
    new = generate(
        model,
        torch.from_numpy(prompt).to(device).expand(rows, -1),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_token=tokenizer.bos,  # the next document would begin
        generator=torch.Generator(device).manual_seed(settings.seed),
    )
    return [tokenizer.decode(row) for row in new.cpu().numpy()]


def prompt_text(settings: Settings) -> str:
    """The prompt, shown `num_passes` times; a question stands behind it, and before it if repeated.

    Of a document D and a question Q that is D Q, or Q D D Q as in JRT-Prompt.
    """
    document, question = settings.prompt or "", settings.question
    if question is None:
        return "\n".join([document] * settings.num_passes)
    if settings.num_passes == 1:
        return f"{document} {question}"
    return f"{question} " + "\n".join([document] * settings.num_passes) + f" {question}"


def _score(
    model: TokenModel,
    text: Text,
    protocol: ProtocolName,
    settings: Settings,
    train_length: int,
    progress: Advance,
) -> TextScore:
    shared = {
        "batch_size": settings.batch_size,
        "earlier": text.earlier,
        "progress": progress,
    }
    if protocol == "carried":
        return score_carried(model, text.documents, chunk=settings.chunk, **shared)
    window = settings.window
    size = {"train": train_length, "document": None}[window] if isinstance(window, str) else window
    prefix = settings.prefix or 0
    longest = max(len(document.ids) - 1 for document in text.documents)
    places = longest if size is None else size
    if prefix >= min(places, longest):
        raise ConfigError(
            f"eval.prefix={prefix}: allowed: less than eval.window={window} ({places} places) and "
            f"than the longest document ({longest})"
        )
    if settings.stride is not None and settings.stride > places - prefix:
        raise ConfigError(
            f"eval.stride={settings.stride}: allowed: up to {places - prefix}, "
            f"eval.window={window} less eval.prefix={prefix}"
        )
    return score_windowed(
        model, text.documents, window=size, stride=settings.stride, prefix=prefix, **shared
    )


def _encode(corpus: Corpus, split: Split, tokenizer: Tokenizer) -> tuple[list[Document], float]:
    """The documents of a split, and the share of their tokens that stand for unknown words."""
    name, unknown = tokenizer.unknown or ("", -1)
    documents: list[Document] = []
    oov = 0
    for piece in pieces(corpus.read(split)):
        (ids,) = tokenizer.encode_batch([piece.text])
        if piece.title is not None:
            documents.append(Document(np.array([tokenizer.bos]), 0, 0, piece.title))
        # What the text itself marks as unknown is in the vocabulary.
        oov += int((ids == unknown).sum()) - (piece.text.split().count(name) if name else 0)
        last = documents[-1]
        documents[-1] = Document(
            np.concatenate([last.ids, ids]),
            last.words + count_words(piece.text),
            last.bytes + len(piece.text.encode()),
            last.title,
        )
    return documents, oov / max(1, sum(len(d.ids) - 1 for d in documents))
