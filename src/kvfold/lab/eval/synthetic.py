"""Questions about long contexts that are made here: a needle in a haystack, and four of RULER's tasks.

A context has a wanted length in the model's own tokens, question included. Everything follows from the seed.

- Needle: Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack: one sentence at a depth of a text, here Wikipedia.
- RULER: Hsieh et al. 2024, arxiv.org/abs/2404.06654: retrieval with one needle in repeated noise, with other keys around it,
  with several values of one key; and variable tracking, chains of assignments.

Differs from RULER in its words (keys are names of places, not of a word list), in the smaller model's plain prompts without
a template, and in lengths that leave room for the answer.
"""

import itertools
import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from kvfold.errors import KvfoldError
from kvfold.lab.eval.data import Doc
from kvfold.lab.text import wikipedia_articles

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PLACES = (
    *("Lisbon", "Oslo", "Nairobi", "Kyoto", "Quito", "Dublin", "Riga", "Perth", "Cusco", "Tunis", "Hanoi", "Bergen", "Lagos"),
    *("Turin", "Minsk", "Accra", "Izmir", "Leeds", "Davos", "Osaka", "Porto", "Sofia", "Malmo", "Busan"),
)
_CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer's mean on English prose."""
_LONGEST_SENTENCE = 300
_KINDS = ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking")


class Haystack:
    """Sentences to hide needles in, and the room that a number of tokens leaves for them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]):
        self.sentences = sentences
        self._count: Callable[[str], int] = lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def fill(self, make: Callable[[list[str]], str], num_tokens: int) -> str:
        """The longest `make(first n sentences)` of at most `num_tokens` tokens. KvfoldError where none fits."""
        low, high = 0, len(self.sentences)
        if self._count(make([])) > num_tokens:
            raise KvfoldError(f"a context of {num_tokens} tokens is too short for this task: choose longer --lengths")
        while low < high:
            middle = (low + high + 1) // 2
            if self._count(make(list(self.sentences[:middle]))) <= num_tokens:
                low = middle
            else:
                high = middle - 1
        return make(list(self.sentences[:low]))


def needles(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int) -> list[Doc]:
    """One question for each length and depth, in an order that the seed shuffles: prompt, answers, facts (length, depth)."""
    docs = []
    for length in lengths:
        for depth in DEPTHS:
            rng = random.Random(f"{seed}, {length}, {depth}")
            place, number = rng.choice(PLACES), str(rng.randint(1_000_000, 9_999_999))
            needle = f"The special magic number of {place} is {number}."
            question = (
                f"\n\nQuestion: What is the special magic number of {place}?\nAnswer: The special magic number of {place} is"
            )

            def make(hay: list[str], needle: str = needle, question: str = question, depth: float = depth) -> str:
                at = round(depth * len(hay))
                return " ".join([*hay[:at], needle, *hay[at:]]) + question

            prompt = Haystack(tokenizer, _prose(rng, length)).fill(make, length)
            docs.append({"prompt": prompt, "answers": [number], "facts": {"length": length, "depth": depth}})
    random.Random(seed).shuffle(docs)
    return docs


def ruler(kind: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int, per_length: int = 20) -> list[Doc]:
    """`per_length` questions of a kind at each length, lengths taking turns: prompt, answers, facts (length)."""
    if kind not in _KINDS:
        raise ValueError(f"RULER's {kind} is not made here, only {', '.join(_KINDS)}")
    docs = []
    for number in range(per_length):
        for length in lengths:
            rng = random.Random(f"{seed}, {kind}, {length}, {number}")
            needles, question, answers = _variables(rng) if kind == "variable_tracking" else _numbers(kind, rng)
            places = sorted(rng.random() for _ in needles)
            hay = _prose(rng, length) if kind in ("niah_multikey", "niah_multivalue") else [NOISE] * (length // 12)

            def make(
                hay: list[str],
                needles: list[str] = needles,
                places: list[float] = places,
                question: str = question,
            ) -> str:
                mixed, start = [], 0
                for needle, place in zip(needles, places, strict=True):
                    at = round(place * len(hay))
                    mixed += [*hay[start:at], needle]
                    start = at
                return " ".join([*mixed, *hay[start:]]) + question

            prompt = Haystack(tokenizer, hay).fill(make, length)
            docs.append({"prompt": prompt, "answers": answers, "facts": {"length": length}})
    return docs


def recall(text: str, answers: Sequence[str]) -> float:
    """The share of answers that occur in a text, without case: RULER's `string_match_all`."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _numbers(kind: str, rng: random.Random) -> tuple[list[str], str, list[str]]:
    """Needles, question and answers of the three kinds of retrieval."""
    num_keys, num_values = {"niah_single": (1, 1), "niah_multikey": (4, 1), "niah_multivalue": (1, 4)}[kind]
    keys = rng.sample(PLACES, num_keys)
    values = {key: [str(rng.randint(1_000_000, 9_999_999)) for _ in range(num_values)] for key in keys}
    needles = [f"One of the special magic numbers for {key} is: {value}." for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.choice(keys)
    if num_values == 1:
        question = f"What is the special magic number for {asked} mentioned in the provided text?"
        start = f"The special magic number for {asked} mentioned in the provided text is"
    else:
        question = f"What are all the special magic numbers for {asked} mentioned in the provided text?"
        start = f"The special magic numbers for {asked} mentioned in the provided text are"
    return needles, f"\n\n{question} {start}", values[asked]


def _variables(rng: random.Random, num_hops: int = 4) -> tuple[list[str], str, list[str]]:
    """A chain of assignments: a value, and the variables that have it in the end."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) <= num_hops:
        name = "".join(rng.choices(letters, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    needles = [f"VAR {names[0]} = {value}."]
    needles += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
    question = (
        f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned "
        f"the value {value}, they are:"
    )
    return needles, question, names


def _prose(rng: random.Random, num_tokens: int) -> list[str]:
    """Wikipedia's sentences from a random article on, enough for so many tokens; very long ones, mostly lists, left out."""
    articles = wikipedia_articles()
    start = rng.randrange(len(articles))
    sentences: list[str] = []
    num_characters = 0
    for article in articles[start:] + articles[:start]:
        for sentence in article.text.replace("\n", " ").replace(". ", ".\n").split("\n"):
            if 20 < len(sentence) < _LONGEST_SENTENCE:
                sentences.append(sentence.strip())
                num_characters += len(sentence)
        if num_characters > _CHARACTERS_PER_TOKEN * num_tokens:
            break
    return sentences
