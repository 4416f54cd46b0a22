"""Pieces of a text: nothing lost, no word cut, the same however the text was read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import ConfigError
from tasks.text.corpus import Chunk, count_words, data_root, pieces, read_blocks

TEXT = st.text(st.sampled_from("ab \n\t\r\u00a0é"), max_size=60)


def chunked(documents: list[str], size: int) -> list[Chunk]:
    """Documents as a reader would give them, `size` characters at a time."""
    chunks = []
    for i, text in enumerate(documents):
        parts = [text[j : j + size] for j in range(0, len(text), size)] or [""]
        chunks += [Chunk(part, f"d{i}" if j == 0 else None) for j, part in enumerate(parts)]
    return chunks


def texts_of(cut: list[Chunk]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    title = ""
    for piece in cut:
        title = title if piece.title is None else piece.title
        found.setdefault(title, []).append(piece.text)
    return found


@given(st.lists(TEXT, max_size=4), st.integers(1, 20), st.integers(1, 70))
def test_pieces_are_the_text_and_depend_on_it_alone(documents, size, read_size):
    cut = list(pieces(chunked(documents, read_size), size))
    assert cut == list(pieces(chunked(documents, 1000), size))
    found = texts_of(cut)
    assert {k: "".join(v) for k, v in found.items()} == {
        f"d{i}": text for i, text in enumerate(documents) if text
    }
    for i, text in enumerate(documents):
        parts = found.get(f"d{i}", [])
        assert sum(map(count_words, parts)) == count_words(text)
        assert all(len(part) <= size or not part[:-1].count("\n") for part in parts)


def test_cut_after_the_last_end_of_line_else_white_space_else_not_at_all():
    def cut(text, size):
        return [piece.text for piece in pieces([Chunk(text, "d")], size)]

    assert cut("ab\ncd\nef gh", 8) == ["ab\ncd\n", "ef gh"]
    assert cut("ab cd ef", 5) == ["ab ", "cd ef"]
    assert cut("abcdefgh ij", 3) == ["abcdefgh ", "ij"]
    assert cut("abcdefgh", 3) == ["abcdefgh"]
    assert cut("abc", 3) == ["abc"]


def test_documents_without_text_are_left_out():
    assert list(pieces([Chunk("", "a"), Chunk("x", "b"), Chunk("", None), Chunk("", "c")])) == [
        Chunk("x", "b")
    ]


def test_words_are_counted_with_ends_of_lines():
    assert count_words(" = A = \n \n b c\n") == 5 + 3
    assert count_words("a b") == 2
    assert count_words("") == 0


def test_blocks_keep_carriage_returns_and_reject_what_is_not_utf8(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("a\r\nb\rcé".encode())
    assert "".join(read_blocks(file, 2)).encode() == file.read_bytes()
    file.write_bytes(b"caf\xe9 noir")
    with pytest.raises(ConfigError, match=r"a\.txt: not UTF-8 text"):
        list(read_blocks(file))


def test_data_root_is_the_option_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMIX_DATA", str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    assert data_root(None) == tmp_path
    assert data_root(str(other)) == other
    monkeypatch.setenv("SEQMIX_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"SEQMIX_DATA=.*gone: no such folder"):
        data_root(None)
    with pytest.raises(ConfigError, match=r"data\.root=nowhere: no such folder"):
        data_root("nowhere")
    monkeypatch.delenv("SEQMIX_DATA")
    assert data_root(None) is None
