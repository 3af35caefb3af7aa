"""WordPiece by the `tokenizers` library: training one, or opening one that exists."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUING = "##"
_OTHER_NAMES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
_ALPHABET_LIMIT = 1000


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; ordinary words have ids in `ordinary[0]` to `ordinary[1] - 1`."""

    pad: int
    cls: int
    sep: int
    mask: int
    ordinary: tuple[int, int]


def train_tokenizer(
    texts: Callable[[], Iterator[str]], vocab_size: int, *, lowercase: bool, strip_accents: bool, ascii_only: bool
) -> Tokenizer:
    """A WordPiece tokenizer of at most `vocab_size` entries; the same texts give the same one, id for id.

    texts: called for each pass over the text (one, or two where letters outside ASCII stay).
    The special tokens have the ids 0 to 4 in the order of SPECIAL_TOKENS.
    """
    normalizer = _normalizer(lowercase, strip_accents, ascii_only)
    counts: Counter[str] = Counter()
    if not ascii_only:
        for text in texts():
            counts.update(normalizer.normalize_str(text))
    # Each letter takes two entries; half of the vocabulary is left for longer ones.
    alphabet = _alphabet(counts, lowercase, min(_ALPHABET_LIMIT, vocab_size // 4))
    # The trainer numbers continuation letters in the order of a hash table that differs from run to run, and breaks
    # ties by number. Given as special tokens they have fixed numbers; below they become ordinary entries again. As
    # the initial alphabet they leave no room for other letters, such as control characters.
    fixed = [*SPECIAL_TOKENS, *alphabet, *(f"{_CONTINUING}{letter}" for letter in alphabet)]
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.normalizer = normalizer
    draft.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(fixed)),
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(texts(), trainer)

    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    frame_texts(tokenizer)
    return tokenizer


def frame_texts(tokenizer: Tokenizer) -> None:
    """Have the tokenizer put [CLS] and [SEP] (or <s> and </s>) around a text, and another [SEP] after a second one."""
    special = special_ids(tokenizer)
    cls, sep = tokenizer.id_to_token(special.cls), tokenizer.id_to_token(special.sep)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, special.cls), (sep, special.sep)],
    )


def _normalizer(lowercase: bool, strip_accents: bool, ascii_only: bool) -> normalizers.Normalizer:
    steps = []
    if lowercase:
        steps.append(normalizers.Lowercase())
    if strip_accents:
        steps += [normalizers.NFD(), normalizers.StripAccents()]
    # Control characters go in any case: no word piece would match a word with one in it.
    unwanted = r"[^\t\n\r -~]+" if ascii_only else r"[\p{Cc}&&[^\t\n\r]]+"
    steps.append(normalizers.Replace(Regex(unwanted), ""))
    return normalizers.Sequence(steps)


def _alphabet(counts: Counter, lowercase: bool, limit: int) -> list[str]:
    """Printable ASCII, then the most frequent other letters of the text, `limit` in all."""
    ascii_letters = [chr(code) for code in range(33, 127)]
    if lowercase:
        ascii_letters = [letter for letter in ascii_letters if not letter.isupper()]
    others = [letter for letter in counts if not letter.isascii() and not letter.isspace()]
    others = sorted(others, key=lambda letter: (-counts[letter], letter))[: max(0, limit - len(ascii_letters))]
    return ascii_letters + others


def bert_tokenizer(vocabulary: Path, settings: dict) -> Tokenizer:
    """The tokenizer of BERT's old files: vocab.txt, an entry a line, and what tokenizer_config.json says.

    Raises UserError when the vocabulary cannot be read or lacks a special token.
    """
    try:
        entries = vocabulary.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{vocabulary}: damaged or unreadable: {error}") from error
    numbers = {entry.rstrip("\r"): number for number, entry in enumerate(entries[:-1] if not entries[-1] else entries)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special_ids(tokenizer, str(vocabulary))
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in numbers])
    frame_texts(tokenizer)
    return tokenizer


def open_tokenizer(path: Path, flag: str = "--tokenizer ") -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError when it is missing, broken or lacks a special token.

    flag: what an error names before the path.
    """
    if not path.is_file():
        raise UserError(f"{flag}{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{flag}{path}: not a tokenizer.json: {error}") from error
    # Lengths are this project's to decide; a saved truncation would silently drop text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_ids(tokenizer, str(path))
    return tokenizer


def special_ids(tokenizer: Tokenizer, name: str = "tokenizer") -> SpecialIds:
    """Ids of the special tokens, under BERT's names or RoBERTa's; some may lie first in the vocabulary, some last.

    Raises UserError when one is missing.
    """
    ids = {token: tokenizer.token_to_id(own) for token, own in special_tokens(tokenizer, name).items()}
    size = tokenizer.get_vocab_size()
    first = max((i + 1 for i in ids.values() if i < size // 2), default=0)
    end = min((i for i in ids.values() if i >= size // 2), default=size)
    return SpecialIds(ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], (first, end))


def special_tokens(tokenizer: Tokenizer, name: str = "tokenizer") -> dict[str, str]:
    """What this tokenizer calls each of SPECIAL_TOKENS. Raises UserError when one is missing."""
    names = {}
    for token in SPECIAL_TOKENS:
        known = [own for own in (token, _OTHER_NAMES[token]) if tokenizer.token_to_id(own) is not None]
        if not known:
            raise UserError(f"{name}: has neither {token} nor {_OTHER_NAMES[token]}")
        names[token] = known[0]
    return names


def continuing_ids(tokenizer: Tokenizer) -> list[bool]:
    """For every id of the vocabulary, whether it continues a word, as WordPiece's `##ing` does."""
    tokens = (tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size()))
    return [token is not None and token.startswith(_CONTINUING) for token in tokens]
