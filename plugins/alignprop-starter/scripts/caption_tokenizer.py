"""Builds the tokenizer: a CLIPTokenizer with one token per caption word; other text is split into letters."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from alignprop_starter.vocabulary import WORDS

#: Maximum number of tokens, start and end tokens included; longer prompts are truncated. A low limit keeps
#: cross-attention cheap.
LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """Return the 256 printable characters that CLIP uses for byte values, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    missing = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(missing))]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent pair first, until each word is a single symbol."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(p) > 1 for p in pieces.values()):
        pairs = Counter(pair for p in pieces.values() for pair in pairwise(p))
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for word, p in pieces.items():
            joined: list[str] = []
            for symbol in p:
                # A symbol that was merged in this pass is not merged again.
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            pieces[word] = joined
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer. Ids: 512 byte symbols, the merges, the start token, the end token (also padding)."""
    merges = learn_merges(WORDS)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
