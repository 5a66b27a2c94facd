"""The text of a bench, as tokens: sequences of any length and number from one text."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.errors import KvfoldError
from kvfold.lab.text import read_text, wikipedia_articles

_CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer manages on prose: how much text is enough to cut a number of tokens from."""


@dataclass(frozen=True)
class Passages:
    """A text and its first tokens.

    Attributes:
        name: for tables.
        text: all of it.
        tokens: of its beginning, or of all of it where it is short.
        prefix: what the tokenizer puts before every text, as the beginning-of-sequence token.
    """

    name: str
    text: str
    tokens: list[int]
    prefix: list[int]
    tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def read(path: Path | None, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> "Passages":
        """A file, or Wikipedia articles, the longest first; at least the first `num_tokens` tokens, if there are so many."""
        if path is not None:
            name, text = path.name, read_text(path)
        else:
            articles = sorted(wikipedia_articles(), key=lambda article: -len(article.text))
            name = f"Wikipedia, {articles[0].title} and on"
            text = "\n\n".join(f"{article.title}\n\n{article.text}" for article in articles)
        start = text[: _CHARACTERS_PER_TOKEN * num_tokens]
        tokens = tokenizer(start, add_special_tokens=False, verbose=False).input_ids
        return Passages(name, text, tokens, tokenizer("").input_ids, tokenizer)

    def check(self, contexts: tuple[int, ...], num_new: int, model: PreTrainedModel) -> None:
        """Raises KvfoldError where a context is longer than the text, or than the model takes."""
        longest = max(contexts)
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and longest + num_new > limit:
            raise KvfoldError(
                f"a context of {longest} and {num_new} new tokens are more than the {limit} tokens that the model takes: "
                f"ask for a context of {limit - num_new} at most"
            )
        room = len(self.prefix) + len(self.tokens) - num_new
        if longest > room:
            raise KvfoldError(
                f"{self.name} has {len(self.tokens)} tokens, too few for a context of {longest} and {num_new} new ones: "
                f"ask for a context of {max(0, room)} at most, or give a longer --text"
            )

    def rows(self, context: int, batch: int) -> list[list[int]]:
        """`[batch, context]` tokens, one passage after the other; from the start again where the text ends."""
        body = context - len(self.prefix)
        last = len(self.tokens) - body
        starts = [row * body % (last + 1) for row in range(batch)]
        return [self.prefix + self.tokens[start : start + body] for start in starts]

    def after(self, context: int, num_tokens: int) -> str:
        """How the text goes on after the first passage of `context` tokens."""
        start = context - len(self.prefix)
        return self.decode(list(itertools.islice(self.tokens, start, start + num_tokens)))

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
