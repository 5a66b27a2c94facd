"""What `kvfold eval` is asked for, and how far it is."""

from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import KvfoldError


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated.

    Attributes:
        plans: names in tables and the texts of their plans; `full` is added where it is missing.
        model: what `kvfold.load` takes.
        tasks: names, and how many items of each (None: all).
        out: the results folder.
        lengths: of the contexts of tasks that are made here, in tokens.
        chat_template: puts prompts through the model's chat template.
        divergence: measures KL and top-1, at the price of about a second prefill.
        again: puts an older results folder aside instead of going on with it.

    Raises:
        KvfoldError: a number that makes no sense.
    """

    plans: dict[str, str]
    model: str
    tasks: dict[str, int | None]
    out: Path
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    chunk: int = 512
    answer_chunk: int = 32
    batch_size: int = 1
    lengths: tuple[int, ...] = (512, 1024, 2048)
    chat_template: bool = False
    truncate: bool = False
    divergence: bool = True
    again: bool = False

    def __post_init__(self) -> None:
        least = {
            "--limit": min((n for n in self.tasks.values() if n is not None), default=1),
            "--batch-size": self.batch_size,
            "--chunk": self.chunk,
            "--answer-chunk": self.answer_chunk,
            "--threads": 1 if self.threads is None else self.threads,
            "--lengths": min(self.lengths, default=0),
        }
        for option, value in least.items():
            if value < 1:
                raise KvfoldError(f"{option} must be 1 or more")


@dataclass(frozen=True)
class EvalUpdate:
    """How far a run is: the share of the work that is done, the estimated seconds left, and a line about the last answer."""

    share: float
    left_s: float | None
    text: str
