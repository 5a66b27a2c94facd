"""Real text to measure on: Wikipedia articles, or a file of the user's."""

import bz2
import html
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from kvfold.errors import FileError
from kvfold.files import cache_folder, explain, replacing
from kvfold.models.packages import PackageFile, fetch

WIKIPEDIA = PackageFile(
    package="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
"""The first articles of English Wikipedia of 2015, CC BY-SA 3.0."""

_MARKUP_VERSION = 1
"""Part of the cached file's name: raise it whenever `plain_text` changes."""


@dataclass(frozen=True)
class Article:
    """A Wikipedia article as plain text, headings on lines of their own."""

    title: str
    text: str


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. FileError when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a text file in UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise explain(error, Path(path), "read") from error


def wikipedia_articles() -> list[Article]:
    """106 articles in the order of the dump, fetched and stripped of markup at the first call. FileError as in `fetch`."""
    path = cache_folder() / f"wikipedia-{_MARKUP_VERSION}.json"
    try:
        return [Article(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or damaged: it is made again
    articles = read_dump(fetch(WIKIPEDIA))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(article) for article in articles], ensure_ascii=False), encoding="utf-8")
    return articles


def read_dump(path: Path) -> list[Article]:
    """The articles of a MediaWiki dump (.xml.bz2) without redirects and pages of other namespaces."""
    articles = []
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                text = plain_text(page.findtext("{*}revision/{*}text") or "")
                if text:
                    articles.append(Article(page.findtext("{*}title") or "", text))
            page.clear()
    return articles


# -- wiki markup -------------------------------------------------------------------------------------------------------------

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# What is no prose, with all that is in it.
_BLOCK = re.compile(
    r"<(ref|math|gallery|timeline|imagemap|score|hiero|syntaxhighlight|source|chem|ce|graph|mapframe)\b"
    r"(?:[^<>]*/>|[^>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{((?:[^{}]|(?<!\{)\{(?!\{)|(?<!\})\}(?!\}))*)\}\}")
_TABLE = re.compile(r"^[ \t:]*\{\|(?:(?!^[ \t:]*\{\|).)*?^[ \t]*\|\}", re.DOTALL | re.MULTILINE)
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*(?:[ \t]+([^\[\]]*))?\]")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_UNPAIRED = re.compile(r"\[\[|\]\]|'{2,5}")
_MAGIC = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
_SPACES = re.compile(r"[ \t\u00a0\u2009\u202f]+")
# What templates and references leave behind.
_EMPTY_BRACKETS = re.compile(r"\(\s*(?:[;,:–-]\s*)*\)|\[\s*\]")
_BRACKET_START = re.compile(r"\((?:\s+|\s*[;,]\s*)+")
_SPACE_BEFORE = re.compile(r" +([,.;:!?)])(?=\s|$)")

_NO_PAGES = {"file", "image", "category", "media", "template", "wikipedia", "portal", "help", "user", "special"}
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?|simple")
_LISTS_OF_TITLES = {
    *("references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes", "sources"),
    *("citations", "notes and references", "references and notes", "works cited", "literature", "gallery"),
}


def plain_text(markup: str) -> str:
    """Wiki markup to plain text.

    Links become their text, headings plain lines. Templates, references, tables, formulas, pictures and the closing sections
    that only list titles go.
    """
    text = _BLOCK.sub("", _COMMENT.sub("", markup))
    text = _inside_out(_TEMPLATE, _template_text, text)
    text = _inside_out(_TABLE, lambda _: "", text)
    text = _WEB_LINK.sub(lambda match: match[1] or "", text)
    text = _inside_out(_LINK, _link_text, text)
    text = _TAG.sub("", _BREAK.sub(" ", text))
    text = html.unescape(html.unescape(text))
    text = _MAGIC.sub("", _UNPAIRED.sub("", text))
    text = _EMPTY_BRACKETS.sub("", _BRACKET_START.sub("(", text))
    return _lines(text)


def _inside_out(pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str], text: str) -> str:
    """Substitutes until nothing is left to substitute: what is nested goes innermost first."""
    while True:
        text, count = pattern.subn(replacement, text)
        if not count:
            return text


def _template_text(match: re.Match[str]) -> str:
    """The few templates whose arguments are part of a sentence; nothing for all others."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    plain = [a for a in arguments if "=" not in a]
    name = name.lower().replace("_", " ")
    if name in ("convert", "cvt") and len(plain) >= 2:
        if plain[1] in ("-", "–", "to", "and", "by", "x") and len(plain) >= 4:
            return f"{plain[0]} {plain[1]} {plain[2]} {plain[3]}"
        return f"{plain[0]} {plain[1]}"
    if (name == "lang" or name.startswith(("lang-", "transl"))) and plain:
        return plain[-1]
    if name in ("nowrap", "nobr", "quote", "cquote", "blockquote", "small", "smallcaps", "sc", "abbr", "mvar", "var") and plain:
        return plain[0]
    return ""


def _link_text(match: re.Match[str]) -> str:
    target, _, label = match[1].partition("|")
    space = target.partition(":")[0].strip().lower() if ":" in target else ""
    if space in _NO_PAGES or (_LANGUAGE.fullmatch(space) and not label):
        return ""
    return label or target.lstrip(":")


def _lines(text: str) -> str:
    """Trims lines, drops empty sections and those that only list titles."""
    kept: list[str] = []
    headings: list[tuple[int, str]] = []  # seen, but nothing below them yet
    skipped_level = 0
    for raw in text.splitlines():
        line = raw.strip()
        if match := _HEADING.match(line):
            level, title = len(match[1]), match[2]
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if title.lower() in _LISTS_OF_TITLES else 0
            headings = [h for h in headings if h[0] < level]
            if not skipped_level and title:
                headings.append((level, title))
            continue
        line = _SPACE_BEFORE.sub(r"\1", _SPACES.sub(" ", line.lstrip("*#:; ").strip()))
        if skipped_level or not any(c.isalnum() for c in line):
            continue
        for _, title in headings:
            kept.append(title)
        headings = []
        kept.append(line)
    return "\n\n".join(kept)
