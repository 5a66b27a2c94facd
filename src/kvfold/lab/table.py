"""The columns of a results table, for the terminal, Markdown and HTML alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfold.lab.results import Record

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: with the unit.
        value: of a record; None where it was not measured.
        form: how a number is written.
        better: "less", "more", or empty where neither is.
        meaning: one line for those who ask.
    """

    title: str
    value: Callable[[Record], str | float | None]
    form: str = ""
    better: str = ""
    meaning: str = ""

    def text(self, record: Record) -> str:
        value = self.value(record)
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(value, self.form)


def _mib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / MIB


_STRATEGY = Column("strategy", lambda r: r.strategy, meaning="its name in the catalog, or its plan")
_CONTEXT = Column("context", lambda r: r.context, "d", meaning="tokens of each sequence before generation")
_BATCH = Column("batch", lambda r: r.batch, "d", meaning="sequences at once; quality is measured on one")
PLAN = Column("plan", lambda r: r.plan, meaning="which tokens stay, how they are held")
_KERNEL = Column("kernel", lambda r: r.kernel, meaning="what attends to the compressed tokens")
_MEASURED = (
    Column(
        "KV MiB", lambda r: _mib(r.kv_bytes), ".2f", "less", "the cache's bytes, all of them: codes, scales, slots, idle room"
    ),
    Column("× smaller", lambda r: r.compression, ".2f", "more", "than K and V of all tokens seen in 16 bits"),
    Column("KL", lambda r: r.kl, ".5f", "less", "mean KL divergence of the next token from the full cache's, nats a token"),
    Column(
        "top-1 %", lambda r: None if r.top1 is None else 100 * r.top1, ".1f", "more", "share with the full cache's top token"
    ),
    Column("perplexity", lambda r: r.perplexity, ".2f", "less", "of the streamed text; alone it can fool"),
    Column("ROUGE-L", lambda r: r.rouge_l_full, ".2f", "more", "of the greedy continuation against the full cache's"),
    Column("TTFT ms", lambda r: r.ttft_ms, ".0f", "less", "time to first token: prefill in chunks and the first choice"),
    Column("ms/token", lambda r: r.ms_per_token_p50, ".1f", "less", "median time of a decode step"),
    Column("tok/s", lambda r: r.tokens_per_s, ".1f", "more", "decoded a second, all sequences together"),
    Column("peak MiB", lambda r: _mib(r.peak_bytes), ".0f", "less", "most memory in use beyond the loaded model"),
)


def columns(records: Sequence[Record]) -> list[Column]:
    """The columns that these records fill; context and batch only where they differ."""
    chosen = [_STRATEGY]
    if any(r.plan != r.strategy for r in records):
        chosen.append(PLAN)
    for column in (_CONTEXT, _BATCH):
        if len({column.value(r) for r in records}) > 1:
            chosen.append(column)
    return [*chosen, *(c for c in _MEASURED if any(c.value(r) is not None for r in records)), _KERNEL]


def ordered(records: Sequence[Record]) -> list[Record]:
    """By context and batch, then by bytes, the largest first."""
    return sorted(records, key=lambda r: (r.context, r.batch, -(r.kv_bytes or 0), r.strategy))


def markdown(records: Sequence[Record]) -> str:
    """A Markdown table, with the setting below it."""
    chosen = columns(records)
    lines = ["| " + " | ".join(c.title for c in chosen) + " |"]
    lines.append("|" + "|".join(" --: " if c.form else " :-- " for c in chosen) + "|")
    for record in ordered(records):
        cells = [
            f"`{text}`".replace("|", "\\|") if c is PLAN else text.replace("|", "\\|") for c, text in _texts(chosen, record)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *settings(records)]) + "\n"


def settings(records: Sequence[Record]) -> list[str]:
    """One line for each setting that records were measured in: what numbers must not be quoted without."""
    return list(dict.fromkeys(setting_of(r) for r in records))


def setting_of(r: Record) -> str:
    """What the numbers of a record depend on besides its strategy, context and batch size."""
    parts = [f"{r.model} ({r.model_source})", f"weights {r.weights}", f"text: {r.text} ({r.text_sha256[:8]})"]
    if r.repeats:
        parts.append(
            f"speed and bytes in {r.dtype} on {r.device} with {_count(r.threads, 'thread')}, "
            f"{r.new_tokens} new tokens, prefilled by {r.chunk}, {_count(r.repeats, 'repeat')}, {r.how}"
        )
    else:
        parts.append("bytes with dense tokens in 16 bits, speed not measured")
    if r.kl is not None:
        parts.append(f"quality in {r.quality_dtype}, half of the context prefilled and half streamed by {r.quality_chunk}")
    parts.append(f"seed {r.seed}")
    parts.append(", ".join(f"{name} {version}" for name, version in r.versions.items()) + f", source {r.code[:8]}")
    parts.append(", ".join(r.machine.values()))
    return "; ".join(parts) + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _texts(chosen: Sequence[Column], record: Record) -> list[tuple[Column, str]]:
    return [(column, column.text(record)) for column in chosen]
