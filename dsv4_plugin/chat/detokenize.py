"""Token ids -> text, incrementally: a character split over tokens appears when it is whole."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Any

from .encoder import load_tokenizer

_DECODER = getincrementaldecoder("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """The bytes of each token id, looked up when first wanted. Share one per tokenizer.

    `tokenizer` is anything `Encoder` takes. Unknown ids have no bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = load_tokenizer(tokenizer)

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            found = b""
        else:
            try:
                found = bytes([_BYTES[letter] for letter in token])
            except KeyError:
                found = token.encode()
        self[token_id] = found
        return found


class Detokenizer:
    """One stream of ids; the text equals `tokenizers`' decoding of them all at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)
        self._decoder = _DECODER(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        table = self._bytes
        return self._decoder.decode(b"".join([table[token_id] for token_id in ids]))

    def finish(self) -> str:
        """What an unfinished character decodes to."""
        return self._decoder.decode(b"", final=True)
