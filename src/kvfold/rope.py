"""Rotary position embedding, as far as a cache needs it: turning a query by a number of positions."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """RoFormer's rotation (arXiv 2104.09864, equation 34) in the layout of transformers: channel i pairs with i +
    rotary_dim / 2.

    Rotations add up, R(a) R(b) = R(a + b), so a query that already stands at position p is moved to p + shift by R(shift).

    Attributes:
        inv_freq: `[rotary_dim / 2] float32`, radians a position. Channels from rotary_dim on are left alone.
    """

    inv_freq: torch.Tensor

    def rotate(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """`x [..., D]` moved by `shift [...]` positions (broadcast against x without its last axis)."""
        angle = shift[..., None].double() * self.inv_freq.double().to(x.device)
        return self._turn(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))

    def rotate_mean(self, x: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """The mean of x moved by each of `count` shifts from `first` on: `x [..., D]`, `first [...]` as in `rotate`."""
        inv_freq = self.inv_freq.double().to(x.device)
        angle = (first[..., None, None] + torch.arange(count, device=x.device)[:, None]) * inv_freq
        cos, sin = angle.cos().mean(-2).to(x.dtype), angle.sin().mean(-2).to(x.dtype)
        return self._turn(x, cos, sin)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = self.inv_freq.shape[0]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
