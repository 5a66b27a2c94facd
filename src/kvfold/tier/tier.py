"""Where blocks live: `tier(device=4096, host=16384, disk)`.

The newest blocks of every sequence stay on the device; when there are more than its budget allows, the oldest ones move as they
are, bit by bit, to the host's memory, and from there to a file. Attention reads all of them, wherever they are: those that are
not on the device come through a small staging buffer, part by part, while a thread fetches the next part (kvfold.tier.stage).
With a read stage in the plan, only the blocks that it chooses come.

A budget is what each sequence may hold in a place, of all that a layer holds for it: in tokens (per KV head), as a share of
the context, or in bytes of the whole cache. A bare `host` or `disk` takes whatever is left. Blocks are whole, and the one that
is being written stays on the device; while a chunk is read, it is there as well. Sheng et al., FlexGen (arXiv 2303.06865),
section 4, is the model of such a hierarchy.

Files lie below the system's folder for temporary files; where that is in memory, set TMPDIR to a folder on a disk.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from kvfold.budget import Budget, Room
from kvfold.errors import PlanError
from kvfold.registry import register


@register("tier", "tier")
@dataclass(frozen=True)
class Tier:
    """Device, host, disk, with a budget each."""

    name: ClassVar[str]
    device: Budget
    host: Room = field(default_factory=Room)
    disk: Room = field(default_factory=Room)

    def check(self) -> None:
        if not (self.host.used or self.disk.used):
            raise PlanError(f"tier: nothing below the device; write tier(device={self.device}, host) or tier(…, disk)")
