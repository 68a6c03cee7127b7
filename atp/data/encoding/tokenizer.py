"""Tokenizers: loading one so that it follows its own files, and what it holds and adds besides text.

transformers picks a class by the names in the configs, and a class may put rules of its own in place of those that
``tokenizer.json`` holds. Everything that needs a tokenizer loads it here: where the two differ, the file wins. Sits
under :mod:`atp.data.encoding.encoder` and under the commands, runs and exports. It knows nothing of records or models.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
PROBE = (
    "It's 12 o'clock; they'LL pay $3,450.75 (net) by 2031-05-06.",
    "room 123 125 and 117, 1234567890 ½ ² ٣٤",
    "  two  spaces,\ttabs\t\tand\r\nlines\n\n\n   ends here   ",
    "na\u00efve caf\u00e9 cafe\u0301 stra\u00dfe \ufb01n \u212b \u00a0 \u200b\u200d \u3000wide",
    "東京都へ行く。你好\uff0c世界\uff01 안녕하세요 สวัสดี नमस्ते שלום مرحبا",
    "🙂 👩\u200d👩\u200d👧 🇪🇺 ✂️ \U0001d4b3",
    'def f(x: int) -> str:\n    return f"{x!r}"  # a_b.c/d\\e\n\tif (a&&b||!c) { i+=1; }',
    "ALLCAPS camelCase snake_case x1y2 http://a.b/c?d=e&f#g <b>bold</b>",
    "\x01\x07\x1b[0m\x7f",
    " ",
    "a",
)
"""Texts on which tokenizers are compared: what their rules differ on."""

_AS_TEXT: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
_RULES = ("normalizer", "pre_tokenizer", "model", "decoder")


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; no code of its repository is run.

    Where the class that transformers picks would change what ``tokenizer.json`` says, the file's own rules are taken
    and a line says so. Bases that have only a SentencePiece model go by it.

    Args:
        source: A directory or a hub id.
        revision: Which of the hub's.
        local_files_only: Whether to stay off the network.

    Raises:
        OSError: There is none, or no access.
        ValueError: Its files cannot be read, or do not belong together.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    file = _tokenizer_file(str(source), where)
    try:
        raw = None if file is None else _from_file(file)
        try:
            found: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **where)
        except (ValueError, ImportError):
            if raw is None:
                raise
            found = None
        if raw is None and found.get_vocab().keys() <= control_tokens(found).keys():
            raise UserError(_unreadable(source, None, "none of its files is there"))  # a class makes do without
        if raw is None or (
            found is not None and _same_rules(found, raw) and not _adds_tokens(found, raw, source, where)
        ):
            return _from_sentencepiece(found, source, where) if file is None else found
        own = PreTrainedTokenizerFast.from_pretrained(str(source), **where)
    except (OSError, UserError):
        raise
    except Exception as error:  # the tokenizers library raises plain Exception, missing libraries ImportError
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(_unreadable(source, file, reason)) from error
    check_texts(own, source, PROBE, raw)
    _tell(found, own, source)
    return own


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, source: str | Path) -> None:
    """Refuse a tokenizer that has ids beyond a model's embeddings, whether or not they occur.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the model's embeddings.
        source: Where both come from, for the message.

    Raises:
        ValueError: There is such an id; names both numbers and the way out.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if not beyond:
        return
    named = ", ".join(f"{token!r} = {index}" for index, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    raise UserError(
        f"{source}: the tokenizer has {max(vocabulary.values()) + 1} ids, the model {rows} embeddings, so there is "
        f"none for {named}; resize the embeddings (model.resize_token_embeddings, then save_pretrained), or remove "
        f"{'the token' if len(beyond) == 1 else 'these tokens'} from tokenizer.json and tokenizer_config.json"
    )


def check_texts(
    tokenizer: PreTrainedTokenizerBase, source: str | Path, texts: Iterable[str], raw: Tokenizer | None = None
) -> None:
    """Refuse a tokenizer that gives other ids than the ``tokenizer.json`` of the directory it was loaded from.

    Args:
        tokenizer: The tokenizer.
        source: Its directory; where there is no such file, nothing is compared.
        texts: What to compare on.
        raw: The file, if it is loaded already.

    Raises:
        ValueError: The ids differ; shows on what.
    """
    file = Path(source) / TOKENIZER_FILE
    if raw is None and not file.is_file():
        return
    raw = _from_file(file) if raw is None else raw
    if text := _difference(tokenizer, raw, texts):
        raise UserError(
            f"{source}: {type(tokenizer).__name__} reads {text[:60]!r} as other ids than {TOKENIZER_FILE} does; write "
            f"the file anew from the tokenizer that the model was trained with"
        )


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers follow the same rules and read the probe texts as the same ids."""
    backend = getattr(other, "backend_tokenizer", None)
    alike = one.get_vocab() == other.get_vocab() and (backend is None or _same_rules(one, backend))
    return alike and all(one(text)["input_ids"] == other(text)["input_ids"] for text in PROBE)


def surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer itself puts before and after a text, such as those of BOS and EOS."""
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    bos = tokenizer.bos_token_id
    return [] if bos is None else [int(bos)], []


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return names and ids of the tokens that are no text: the named special ones, and those marked as special."""
    found = dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=False))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return found | {str(token): int(index) for index, token in added.items() if getattr(token, "special", False)}


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds the names of control tokens in a text; it finds nothing where there are none."""
    names = sorted(filter(None, control_tokens(tokenizer)), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _tokenizer_file(source: str, where: dict[str, Any]) -> Path | None:
    if Path(source).is_dir():
        file = Path(source) / TOKENIZER_FILE
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(source, TOKENIZER_FILE, **where, **quiet)
    return None if found is None else Path(found)


def _unreadable(source: str | Path, file: Path | None, reason: str) -> str:
    """What is wrong with tokenizer files, and the way out."""
    if file is not None:
        return f"{file}: cannot be read as a tokenizer ({reason}); copy the base's tokenizer files anew"
    if (Path(source) / SENTENCEPIECE_FILE).is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            reason = "the library sentencepiece is not installed"
        return (
            f"{source}: has only {SENTENCEPIECE_FILE}, which cannot be read ({reason}); pip install sentencepiece, or "
            f"put the {TOKENIZER_FILE} that belongs to it there"
        )
    return f"{source}: holds no tokenizer that can be read ({reason}); put the base's {TOKENIZER_FILE} there"


def _from_sentencepiece(found: PreTrainedTokenizerBase, source: str | Path, where: dict[str, Any]) -> Any:
    """The tokenizer of a base that has only a SentencePiece model, which the class may rewrite as well."""
    from transformers import PreTrainedTokenizerFast

    file = Path(source) / SENTENCEPIECE_FILE
    if not file.is_file() or importlib.util.find_spec("sentencepiece") is None:
        return found
    sentencepiece = importlib.import_module("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def other(tokenizer: PreTrainedTokenizerBase) -> str:
        texts = (text for text in PROBE if text == text.strip())  # outer spaces are read otherwise on purpose
        return next((t for t in texts if tokenizer(t, **_AS_TEXT)["input_ids"] != model.encode(t)), "")

    if not other(found):
        return found
    own = PreTrainedTokenizerFast.from_pretrained(str(source), **where)
    if text := other(own):
        raise UserError(
            f"{source}: transformers reads {text[:40]!r} as other ids than {SENTENCEPIECE_FILE} does; put a "
            f"{TOKENIZER_FILE} there that gives the ids the model was trained on"
        )
    log.warning("%s: the rules of its %s are used, not those of %s", source, file.name, type(found).__name__)
    return own


def _from_file(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    raw.no_padding()
    raw.no_truncation()
    raw.encode_special_tokens = True
    return raw


def _same_rules(tokenizer: PreTrainedTokenizerBase, raw: Tokenizer) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and all(_state(getattr(backend, rule)) == _state(getattr(raw, rule)) for rule in _RULES)


def _state(rule: Any) -> bytes | None:
    return None if rule is None else bytes(rule.__getstate__())


def _adds_tokens(found: Any, raw: Tokenizer, source: str | Path, where: dict[str, Any]) -> bool:
    """Whether a class adds tokens that neither ``tokenizer.json`` nor ``tokenizer_config.json`` names."""
    from transformers import PreTrainedTokenizerFast

    if (
        type(found) is PreTrainedTokenizerFast
        or found.get_vocab().keys() <= raw.get_vocab(with_added_tokens=True).keys()
    ):
        return False
    own = PreTrainedTokenizerFast.from_pretrained(str(source), **where)
    return bool(found.get_vocab().keys() - own.get_vocab().keys())


def _difference(tokenizer: PreTrainedTokenizerBase, raw: Tokenizer, texts: Iterable[str]) -> str:
    """The first of the texts that is read as other ids; empty if there is none."""
    more = [re.escape(token) for token in tokenizer.get_added_vocab() if raw.token_to_id(token) is None and token]
    unknown = re.compile("|".join(more) or r"(?!)")  # tokens that only tokenizer_config.json adds
    for text in texts:
        if (
            not unknown.search(text)
            and tokenizer(text, **_AS_TEXT)["input_ids"] != raw.encode(text, add_special_tokens=False).ids
        ):
            return text
    return ""


def _tell(found: PreTrainedTokenizerBase | None, own: PreTrainedTokenizerBase, source: str | Path) -> None:
    """Say that the file's rules are taken: a warning where they read text otherwise than the class."""
    if found is None:
        log.warning("%s: the tokenizer's class is not known here; the rules of its %s are used", source, TOKENIZER_FILE)
        return
    for text in PROBE:
        theirs, ours = (list(one(text, add_special_tokens=False, verbose=False)["input_ids"]) for one in (found, own))
        if theirs != ours:
            log.warning(
                "%s: %s of transformers would read text otherwise than %s does (%r: %d tokens instead of %d); the "
                "file's own rules are used, here and in the export",
                *(source, type(found).__name__, TOKENIZER_FILE, text[:30], len(theirs), len(ours)),
            )
            return
    log.info("%s: the tokenizer goes by its %s, not by %s", source, TOKENIZER_FILE, type(found).__name__)
