import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cramfast.data.tokenizer import (
    SPECIAL_TOKENS,
    SpecialIds,
    continuing_ids,
    open_tokenizer,
    special_ids,
    train_tokenizer,
)
from cramfast.errors import UserError

ASCII = "abcdefghijklmnop"
EUROPEAN = "abcdeàéèüßñøłджя"
CONTROL = "abcdef\x00\x01\x02\x03\x04\x7f\x85"
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))


def random_texts(letters: str, words: int = 4000) -> list[str]:
    rng = random.Random(0)
    return [" ".join("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(10)) for _ in range(words // 10)]


def train(texts, vocab_size=400, lowercase=True, strip_accents=True, ascii_only=True) -> Tokenizer:
    return train_tokenizer(
        lambda: iter(texts), vocab_size, lowercase=lowercase, strip_accents=strip_accents, ascii_only=ascii_only
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the quick brown fox jumps over the lazy dog"] * 10, vocab_size=256)


# Training


def test_special_tokens_come_first(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert special_ids(tokenizer) == SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, tokenizer.get_vocab_size()))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("strip_accents", [True, False])
@pytest.mark.parametrize(
    ("letters", "vocab_size"),
    [(ASCII, 400), (EUROPEAN, 400), (CONTROL, 400), (IDEOGRAPHS, 4000)],
    ids=["ascii", "european", "control", "ideographs"],
)
def test_training_again_gives_the_same_tokenizer(letters, vocab_size, strip_accents, ascii_only):
    texts = random_texts(letters)
    first, *others = (
        train(texts, vocab_size, strip_accents=strip_accents, ascii_only=ascii_only).to_str() for _ in range(4)
    )
    assert others == [first] * 3


@pytest.mark.parametrize("vocab_size", [256, 300, 1000])
@pytest.mark.parametrize("letters", [ASCII, EUROPEAN, IDEOGRAPHS], ids=["ascii", "european", "ideographs"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("lowercase", [True, False])
def test_vocabulary_is_no_larger_than_asked_for_and_without_holes(vocab_size, letters, lowercase, ascii_only):
    tokenizer = train(random_texts(letters), vocab_size, lowercase=lowercase, ascii_only=ascii_only)
    assert tokenizer.get_vocab_size() <= vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_vocabulary_is_filled_from_enough_text():
    assert train(random_texts(ASCII), 1000).get_vocab_size() == 1000


def test_the_most_frequent_letters_are_kept():
    texts = ["é" * 5] * 50 + ["ł"] + random_texts(IDEOGRAPHS)
    tokenizer = train(texts, 400, strip_accents=False, ascii_only=False)
    assert tokenizer.token_to_id("é") is not None
    assert tokenizer.token_to_id("ł") is None


def test_frequent_words_become_entries(tokenizer):
    assert tokenizer.encode("the quick fox", add_special_tokens=False).tokens == ["the", "quick", "fox"]


def test_every_printable_ascii_word_has_a_spelling(tokenizer):
    text = " ".join(f"{chr(code)} x{chr(code)}" for code in range(33, 127))
    assert "[UNK]" not in tokenizer.encode(text).tokens


def test_letters_not_in_the_vocabulary_are_unknown():
    tokenizer = train(random_texts(ASCII), ascii_only=False)
    assert tokenizer.encode("a ж", add_special_tokens=False).tokens == ["a", "[UNK]"]


def test_no_text_at_all_gives_the_alphabet():
    assert train([]).encode("ab", add_special_tokens=False).tokens == ["a", "##b"]


@pytest.mark.parametrize(("ascii_only", "passes"), [(True, 1), (False, 2)])
def test_passes_over_the_text(ascii_only, passes):
    started = []

    def texts():
        started.append(True)
        return iter(["some text"])

    train_tokenizer(texts, 256, lowercase=True, strip_accents=True, ascii_only=ascii_only)
    assert len(started) == passes


# Normalisation


@pytest.mark.parametrize(
    ("lowercase", "strip_accents", "ascii_only", "expected"),
    [
        (True, True, True, "uber, i go to krakow "),
        (True, True, False, "uber, i go to krakow 東"),
        (True, False, True, "ber, i go to krakw "),
        (True, False, False, "über, i go to kraków 東"),
        (False, True, True, "Uber, I go to Krakow "),
        (False, True, False, "Uber, I go to Krakow 東"),
        (False, False, True, "ber, I go to Krakw "),
        (False, False, False, "Über, I go to Kraków 東"),
    ],
)
def test_normalisation_options(lowercase, strip_accents, ascii_only, expected):
    texts = ["Über, I go to Kraków 東"] * 10
    tokenizer = train(texts, lowercase=lowercase, strip_accents=strip_accents, ascii_only=ascii_only)
    assert tokenizer.normalizer.normalize_str(texts[0]) == expected
    encoding = tokenizer.encode(texts[0])
    assert "[UNK]" not in encoding.tokens
    assert tokenizer.decode(encoding.ids).replace(" ,", ",") == expected.strip()


def test_lower_case_vocabulary_has_no_capitals():
    assert not any(entry.isupper() for entry in train(["ALL CAPITALS Here"]).get_vocab() if entry[0] != "[")


# Encoding


def test_special_tokens_around_a_text(tokenizer):
    encoding = tokenizer.encode("the fox")
    assert encoding.tokens == ["[CLS]", "the", "fox", "[SEP]"]
    assert encoding.special_tokens_mask == [1, 0, 0, 1]


def test_special_tokens_around_a_pair(tokenizer):
    encoding = tokenizer.encode("the fox", "lazy dog")
    assert encoding.tokens == ["[CLS]", "the", "fox", "[SEP]", "lazy", "dog", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1, 1]


def test_decoding_joins_the_parts_of_words(tokenizer):
    assert tokenizer.decode(tokenizer.encode("unheard words").ids) == "unheard words"


# Opening


def byte_pairs(special_tokens) -> Tokenizer:
    """A small tokenizer of another kind, with `special_tokens` first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(random_texts(ASCII), trainer)
    return tokenizer


def save(tokenizer, folder):
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def error(path) -> str:
    with pytest.raises(UserError) as caught:
        open_tokenizer(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def test_a_saved_tokenizer_opens_as_it_was(tokenizer, tmp_path):
    assert open_tokenizer(save(tokenizer, tmp_path)).to_str() == tokenizer.to_str()


def test_roberta_names_with_the_mask_last(tmp_path):
    tokenizer = byte_pairs(["<s>", "<pad>", "</s>", "<unk>"])
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<mask>"])
    opened = open_tokenizer(save(tokenizer, tmp_path))
    assert special_ids(opened) == SpecialIds(pad=1, cls=0, sep=2, mask=size, ordinary=(4, size))


def test_special_tokens_at_the_end(tmp_path):
    tokenizer = byte_pairs([])
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    opened = open_tokenizer(save(tokenizer, tmp_path))
    assert special_ids(opened) == SpecialIds(pad=size, cls=size + 2, sep=size + 3, mask=size + 4, ordinary=(0, size))


def test_bert_names_win_over_roberta_names():
    tokenizer = byte_pairs(["<pad>", "<s>", "</s>", "<mask>", *SPECIAL_TOKENS])
    assert special_ids(tokenizer) == SpecialIds(pad=4, cls=6, sep=7, mask=8, ordinary=(9, 100))


def test_pieces_that_continue_a_word_are_known(tokenizer):
    continues = continuing_ids(tokenizer)
    assert len(continues) == tokenizer.get_vocab_size()
    assert not any(continues[:5])  # the special tokens
    encoded = tokenizer.encode("a quick fox, quicker#", add_special_tokens=False)
    assert any(token.startswith("##") for token in encoded.tokens)
    first = [True, *(a != b for a, b in pairwise(encoded.word_ids))]
    assert [continues[token] for token in encoded.ids] == [not opens for opens in first]


def test_byte_pairs_continue_no_word_by_name():
    assert not any(continuing_ids(byte_pairs(list(SPECIAL_TOKENS))))


def test_saved_truncation_and_padding_are_dropped(tokenizer, tmp_path):
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    opened = open_tokenizer(save(limited, tmp_path))
    assert opened.encode("the quick brown fox").ids == tokenizer.encode("the quick brown fox").ids


@pytest.mark.parametrize("missing", SPECIAL_TOKENS)
def test_tokenizer_without_a_special_token(tmp_path, missing):
    tokenizer = byte_pairs([token for token in SPECIAL_TOKENS if token != missing])
    assert missing in error(save(tokenizer, tmp_path))


def test_missing_tokenizer(tmp_path):
    assert "no such file" in error(tmp_path / "tokenizer.json")


def test_a_folder_is_no_tokenizer(tmp_path):
    assert "no such file" in error(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not json", b"{}", b'{"version": "1.0",\n "model": 5}', b"\xff\xfe\x00", b"[]"]
)
def test_broken_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert "not a tokenizer.json" in error(path)


def test_tokenizer_cut_short(tokenizer, tmp_path):
    path = save(tokenizer, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a tokenizer.json" in error(path)
