"""Makes a model's calibration from text: coordinates in which codes lose least.

For each head, C is the covariance of keys or values around the mean of each 64 tokens, as offsets are taken off, and F says
what an error costs: the expected KL divergence of the predictions from an error e is e^T F e / 2 to second order, F the Fisher
information. Of F^{1/2} C F^{1/2} = U Λ U^T come the coordinates x F^{1/2} U, in which errors count alike and which are
uncorrelated, with variances Λ.

The Fisher information is the covariance of the gradient of log p(y), y drawn from the model's own predictions. Taking the
errors of tokens as independent, with p the probabilities, dp their gradients and D the output's gradient,

    F_v = Σ_q (Σ_t p_qt²) D_q D_q^T             F_k = Σ_q (Σ_t ds_qt²) q q^T,  ds_qt = p_qt (dp_qt - Σ_u p_qu dp_qu)

summed over the query heads of a group. That is far less noisy than the covariance of the gradients of keys and values
themselves, which a handful of tokens makes up (docs/log.md).

Texts are shorter than the contexts that a model takes, and RoPE goes on turning keys: coordinates of the first 1500 positions
are useless at the 4000th (docs/log.md). As positions change keys and queries by that rotation alone, C and F are also known
where no text was read, R^T C R and R^T F R, and the coordinates are made of their means over the whole context.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvfold.calibration import Calibration
from kvfold.errors import ModelError
from kvfold.lab.text import wikipedia_articles
from kvfold.models.adapter import check_model, sliding_windows
from kvfold.models.layer import ModelLayer

_NAME = "kvfold-calibration"
_RECENT = 32
"""Tokens so near to a query mostly wait in full precision: their errors don't count."""
_SINKS = 4
_BLOCK = 64
_REGULAR = 1e-2
"""Of F's mean diagonal, added to its diagonal: F is estimated, and what it did not see may still matter."""


TITLES = ("Anatomy", "Albert Einstein", "Alkane", "Alaska", "Arthur Schopenhauer", "Asphalt", "Algorithm", "Anarchism")
"""Wikipedia articles to calibrate on. Plans are judged by others (the longest one, in tests and demo)."""
NUM_TOKENS = 1536
_LONGEST = 8192
"""The context of a model that does not say."""
_NUM_SHIFTS = 64
_SHORTEST_SHIFT = 64


def default_texts(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The beginnings of the articles `TITLES`, `[T] long` each. FileError when they can't be fetched."""
    by_title = {article.title: article.text for article in wikipedia_articles()}
    return [tokenizer(by_title[title], return_tensors="pt").input_ids[0, :NUM_TOKENS] for title in TITLES]


@dataclass
class _Sums:
    """Sums over texts for K or V of one layer, `[Hkv, ...] float64`."""

    num: int
    x: torch.Tensor
    within: torch.Tensor
    loss: torch.Tensor


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[torch.Tensor],
    seed: int = 0,
    on_text: Callable[[float], None] | None = None,
) -> Calibration:
    """Reads texts, forwards and backwards, and finds the coordinates.

    Args:
        model: in float32; it is used as it is and left as it was.
        texts: ids, `[T] long` each, of 256 tokens or more; not those that plans will be judged by. Eight of 1500 are plenty.
        seed: of the tokens that are drawn from the model's predictions.
        on_text: called after each text with the share that is done.

    Returns:
        For the layers that kvfold serves (no sliding windows), in order.

    Raises:
        ModelError: the model's attention can't be served.
        ValueError: a text is too short.
    """
    if any(len(ids) < 4 * _BLOCK for ids in texts) or not texts:
        raise ValueError(f"calibration takes texts of at least {4 * _BLOCK} tokens")
    check_model(model)
    windows = sliding_windows(model.config.get_text_config(decoder=True))
    served = [i for i, window in enumerate(windows) if window is None]
    generator = torch.Generator(model.device).manual_seed(seed)
    sums: dict[tuple[int, str], _Sums] = {}
    for done, ids in enumerate(texts, 1):
        for index, layer in _gradients(model, ids, generator).items():
            if index in served:
                _add(sums, index, layer)
        if on_text:
            on_text(done / len(texts))
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _LONGEST
    for index in served:
        sums[index, "k"] = _over_positions(sums[index, "k"], ModelLayer(model, index), longest)
    sides = {name: [_coordinates(sums[i, name]) for i in served] for name in ("k", "v")}
    named = {"positions": torch.tensor([longest])}
    for name, layers in sides.items():
        for part, tensors in zip(("origin", "basis", "loss"), zip(*layers, strict=True), strict=True):
            named[f"{name}_{part}"] = torch.stack(tensors).float()
    return Calibration(**named)


@dataclass
class _Layer:
    """Of one layer and text: `q [Hq, T, D]`, `k, v [Hkv, T, D]`, the output's gradient `[Hq, T, D]` and the scale of scores."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    scaling: float

    @property
    def gradient(self) -> torch.Tensor:
        assert self.out.grad is not None
        return self.out.grad[0].transpose(0, 1)


def _gradients(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> dict[int, _Layer]:
    """One pass over a text, forwards and backwards."""
    layers: dict[int, _Layer] = {}

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling)
        out = out.transpose(1, 2)
        if not out.requires_grad:  # weights have no gradients, so the first layer's output starts the graph
            out.requires_grad_()
        else:
            out.retain_grad()
        layers[module.layer_idx] = _Layer(q.detach()[0], k.detach()[0], v.detach()[0], out, scaling)
        return out, None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    previous, wanted = model.config._attn_implementation, [p.requires_grad for p in model.parameters()]
    model.set_attn_implementation(_NAME)
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            log_probs = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            log_probs.gather(1, drawn).sum().backward()
    finally:
        model.set_attn_implementation(previous)
        for p, was in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(was)
    if not layers:
        raise ModelError(f"{type(model).__name__} can't be calibrated: its attention is not transformers' interface")
    return layers


@torch.no_grad()
def _add(sums: dict[tuple[int, str], _Sums], index: int, layer: _Layer) -> None:
    k_loss, v_loss = _losses(layer)
    for name, x, loss in (("k", layer.k, k_loss), ("v", layer.v, v_loss)):
        num = (x.shape[1] - _SINKS) // _BLOCK * _BLOCK
        x = x[:, _SINKS : _SINKS + num].double()
        inside = (x.unflatten(1, (-1, _BLOCK)) - x.unflatten(1, (-1, _BLOCK)).mean(2, keepdim=True)).flatten(1, 2)
        new = _Sums(num, x.sum(1), inside.mT @ inside, loss.double())
        if old := sums.get((index, name)):
            new = _Sums(old.num + new.num, old.x + new.x, old.within + new.within, old.loss + new.loss)
        sums[index, name] = new


def _losses(layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """F of K and of V, summed over the tokens that errors are made in, `[Hkv, D, D]`."""
    num_tokens = layer.q.shape[1]
    place = torch.arange(num_tokens, device=layer.q.device)
    encoded = (place[None] <= place[:, None] - _RECENT) & (place >= _SINKS)
    later = place[None] > place[:, None]
    heads, groups = len(layer.k), len(layer.q) // len(layer.k)
    k_loss, v_loss = (layer.k.new_zeros(heads, *layer.k.shape[2:] * 2) for _ in range(2))
    for query_head, (q, gradient) in enumerate(zip(layer.q, layer.gradient, strict=True)):
        head = query_head // groups
        p = (layer.scaling * (q @ layer.k[head].mT)).masked_fill(later, -math.inf).softmax(-1)
        dp = gradient @ layer.v[head].mT
        ds = layer.scaling * p * (dp - (p * dp).sum(-1, keepdim=True))
        k_loss[head] += (q * (ds * encoded).square().sum(-1, keepdim=True)).mT @ q
        v_loss[head] += (gradient * (p * encoded).square().sum(-1, keepdim=True)).mT @ gradient
    return k_loss, v_loss


def shifts(longest: int) -> torch.Tensor:
    """Where texts might begin, `[S] long`: evenly on a logarithmic scale, as contexts of all lengths matter alike."""
    ends = math.log2(_SHORTEST_SHIFT), math.log2(max(longest, _SHORTEST_SHIFT))
    return torch.logspace(*ends, _NUM_SHIFTS, base=2, dtype=torch.float64).round().long()


def _over_positions(sums: _Sums, layer: ModelLayer, longest: int) -> _Sums:
    """Means over texts that begin at other positions; where the model's rotation is not known, what was read."""
    try:
        rope = layer.rope()
    except ModelError:
        return sums
    eye = torch.eye(sums.x.shape[-1], dtype=torch.float64)
    r = rope.rotate(eye.expand(_NUM_SHIFTS, -1, -1), shifts(longest)[:, None]).to(sums.x.device)  # x turned is x @ r

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("sij,hik,skl->hjl", r, x, r) / _NUM_SHIFTS

    return _Sums(sums.num, sums.x @ r.mean(0), turned(sums.within), turned(sums.loss))


def _coordinates(sums: _Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Origin `[Hkv, D]`, basis `[Hkv, D, D]` and loss `[D]` of K or V of a layer."""
    origin = sums.x / sums.num
    covariance = sums.within / sums.num
    fisher = sums.loss / sums.num
    eye = torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device)
    fisher = fisher + _REGULAR * fisher.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30) * eye
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    covariance = covariance + 1e-7 * size * eye
    values, vectors = torch.linalg.eigh(fisher)
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    variance, turned = torch.linalg.eigh(root @ covariance @ root)
    variance, turned = variance.flip(-1).clamp_min(1e-30), turned.flip(-1)
    basis = root @ turned / variance.sqrt()[:, None]
    return origin.cpu(), basis.cpu(), variance.sum(0).cpu() / 2
