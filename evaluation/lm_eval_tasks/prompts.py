"""Our prompts of the real recall tasks: cut to the part with the answer, shown once or twice.

"Just read twice" (Arora et al. 2024, appendix A) shows a document once, D Q, or twice, Q D D Q.
Both arms see the same part of it, cut before it is repeated.

Differs from the paper, which counts tokens: the part is measured in words, so that models of
different tokenisers read the same text. Figures are not those of the harness's own tasks fda, swde
and squad_completion, which show the stored text once and do not cut it around the answer.
"""

import re
from collections.abc import Sequence
from typing import Any

WORDS = 600  # of a document; about 1000 tokens of GPT-2's, the paper's budget


def crop(text: str, anchors: Sequence[str], words: int = WORDS) -> str:
    """`words` words of `text`, in the middle of which the first of `anchors` to occur stands."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if len(spans) <= words:
        return text
    found = [text.lower().find(anchor.lower()) for anchor in anchors if anchor]
    place = min((at for at in found if at >= 0), default=0)
    middle = sum(end <= place for _, end in spans)
    first = min(max(0, middle - words // 2), len(spans) - words)
    return text[spans[first][0] : spans[first + words - 1][1]]


def with_answers(docs: Any) -> Any:
    """Documents whose answer is longer than a character, as the paper's."""
    return docs.filter(lambda doc: len(doc["value"].strip()) > 1)


def pair_once(doc: dict[str, Any]) -> str:
    """A document, then the key whose value is asked for."""
    return f"{_document(doc)} {_key(doc)}:"


def pair_twice(doc: dict[str, Any]) -> str:
    """The key, the document twice, and the key again."""
    document = _document(doc)
    return f"Information about {_key(doc)}. {document}\n{document} {_key(doc)}:"


def cloze_once(doc: dict[str, Any]) -> str:
    """The stored text: a passage and a sentence whose end is the answer."""
    return doc["text"].strip()


def cloze_twice(doc: dict[str, Any]) -> str:
    """The question, the passage, and the stored text."""
    return f"{doc['question'].strip()} {doc['context'].strip()}\n{doc['text'].strip()}"


def contains(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer stands in what was generated, in whatever case."""
    return {"contains": float(doc["value"].strip().lower() in results[0].lower())}


def _key(doc: dict[str, Any]) -> str:
    key = doc["key"].strip()
    return key[:1].upper() + key[1:]


def _document(doc: dict[str, Any]) -> str:
    """The cut text with one period at its end; a copy of the question there is left out."""
    text = doc["text"].strip()
    question = f"{doc['key'].strip()}:"
    if text.lower().endswith(question.lower()):
        text = text[: -len(question)]
    # SWDE's documents end in a list that gives the answers away.
    text = text.split("Summary of information above")[0]
    return crop(text, (doc["key"].strip(), doc["value"].strip())).rstrip("\n .") + "."
