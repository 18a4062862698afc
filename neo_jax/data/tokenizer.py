"""The checkpoint's tokenizer: Qwen2's byte-level BPE with NEO's tokens after it.

It is read from `tokenizer.json`, or else built from the files of a slow tokenizer: `vocab.json`,
`merges.txt`, `added_tokens.json` and the two configs. Both give the same ids.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from neo_jax.errors import InputError

# Qwen2's splitting: contractions, words, single digits, punctuation, line ends, other space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

IMAGE_CONTEXT, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

# The tokens that NEO adds to Qwen3's tokenizer, in the order of their ids.
NEO_TOKENS = (
    *(IMAGE_CONTEXT, IMAGE_START, IMAGE_END, "<quad>", "</quad>", "<ref>", "</ref>"),
    *("<box>", "</box>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
)


class NeoTokenizer:
    """Encodes and decodes text, and names the special ids.

    Attributes:
      image_context_id, image_start_id, image_end_id: of <IMG_CONTEXT>, <img>, </img>.
      turn_end_id: of <|im_end|>, the end of an answer.
      vocab_size: one more than the highest id.
    """

    def __init__(self, tokenizer: Tokenizer, name: str):
        self._tokenizer = tokenizer
        wanted = (IMAGE_CONTEXT, IMAGE_START, IMAGE_END, TURN_START, TURN_END)
        found = {token: tokenizer.token_to_id(token) for token in wanted}
        ids = {token: number for token, number in found.items() if number is not None}
        if missing := [token for token in wanted if token not in ids]:
            raise InputError(f"{name}: the tokenizer lacks {', '.join(missing)}: not NEO's")
        self.image_context_id = ids[IMAGE_CONTEXT]
        self.image_start_id = ids[IMAGE_START]
        self.image_end_id = ids[IMAGE_END]
        self.turn_end_id = ids[TURN_END]
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_directory(cls, directory: str | Path) -> "NeoTokenizer":
        """Reads the tokenizer files of a checkpoint; InputError names the file that is wrong."""
        return cls(_read(Path(directory)), str(directory))

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def add_neo_tokens(directory: str | Path) -> int:
    """Adds NEO's tokens to the Qwen3 tokenizer in a directory, in all its files.

    Returns:
      The new number of ids.
    """
    directory = Path(directory)
    tokenizer = _read(directory)
    known = tokenizer.get_vocab(with_added_tokens=True)
    new = [token for token in NEO_TOKENS if token not in known]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in new}

    def change(name: str, edit: Callable[[dict], None]) -> None:
        path = directory / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        edit(content)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    def name_special(content: dict) -> None:
        content.setdefault("additional_special_tokens", []).extend(new)

    def add_decoders(content: dict) -> None:
        name_special(content)
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        decoder = content.setdefault("added_tokens_decoder", {})
        for token, number in ids.items():
            decoder[str(number)] = {"content": token, **flags, "special": True}

    change("tokenizer_config.json", add_decoders)
    change("special_tokens_map.json", name_special)
    if (directory / "vocab.json").exists():
        change("added_tokens.json", lambda content: content.update(ids))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _read(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        return _from_slow_files(directory)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer: {error}") from error


def _from_slow_files(directory: Path) -> Tokenizer:
    def read(name: str, required: bool = True) -> dict:
        path = directory / name
        if not path.exists():
            if required:
                raise InputError(f"{directory}: neither tokenizer.json nor {name} is there")
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    read("vocab.json")
    merges = directory / "merges.txt"
    if not merges.exists():
        raise InputError(f"{directory}: neither tokenizer.json nor merges.txt is there")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{directory}: vocab.json and merges.txt: {error}") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = _added_tokens(
        read("added_tokens.json", required=False),
        read("tokenizer_config.json", required=False),
        read("special_tokens_map.json", required=False),
    )
    for number, token in sorted(added.items()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        got = tokenizer.token_to_id(token.content)
        if got != number:
            raise InputError(
                f"{directory}: added token {token.content} should have id {number}, not {got}: "
                "ids must follow vocab.json without a gap"
            )
    return tokenizer


def _added_tokens(added: dict, config: dict, special_map: dict) -> dict[int, AddedToken]:
    """Added tokens by id. The config says which are special, or else the special map does."""
    special = {config.get("eos_token"), config.get("pad_token")}
    for value in special_map.values():
        for token in value if isinstance(value, list) else [value]:
            special.add(token["content"] if isinstance(token, dict) else token)
    tokens = {
        number: AddedToken(content, special=content in special, normalized=False)
        for content, number in added.items()
    }
    for number, fields in config.get("added_tokens_decoder", {}).items():
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {name: bool(fields.get(name, False)) for name in names}
        tokens[int(number)] = AddedToken(fields["content"], **flags)
    return tokens
