"""The weights of a GGUF file in the form that they have there: its blocks become tiles without a second rounding.

A block has 32 weights of a row: Q4_1 a scale and a minimum, Q4_0 a scale whose code 8 is zero, Q8_0 a scale and signed bytes,
all scales in half precision (ggml's block_q4_0, block_q4_1 and block_q8_0). Rows may be in another order than transformers'
(llama's queries and keys are). Nothing is assumed about it: a tensor is taken over where its numbers equal, one by one, those
that transformers has read from the file. Tensors of other types, and those that equal in no known order, stay plain numbers.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kvfold.models.weights import Codes, PackedLinear, check_replaced, linears, replace

log = logging.getLogger(__name__)

FAST_TYPES = ("Q4_0", "Q4_1", "Q8_0")
_HALF = 2


def take_over(model: PreTrainedModel, path: Path) -> None:
    """Replaces the linear layers of a model by those of the .gguf file that it was read from.

    Raises:
        ModelError: no tensor of the file has a form that is fast here.
    """
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    names = _names(model)
    modules = {id(module): name for name, module in model.named_modules()}
    for parent, name, linear in linears(model):
        full = f"{modules[id(parent)]}.{name}".lstrip(".")
        tensor = tensors.get(names(full))
        if tensor is None and linear is model.get_output_embeddings():  # tied, and not written twice
            tensor = tensors.get("token_embd.weight")
        if tensor is None or tensor.tensor_type.name not in FAST_TYPES:
            log.info("%s stays as it is: %s", full, tensor.tensor_type.name if tensor is not None else "it is not in the file")
            continue
        codes = _in_order(codes_of(tensor.data, tensor.tensor_type.name), linear, _head_dim(model))
        if codes is None:
            log.warning("%s stays as it is: the file's rows are in an order that is not known", full)
            continue
        replace(model, parent, name, PackedLinear(codes, linear.bias))
    check_replaced(model, "native")


def codes_of(blocks: np.ndarray, kind: str) -> Codes:
    """Blocks of a kind of FAST_TYPES, `[R, bytes] uint8`, as codes."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    held = torch.from_numpy(np.array(blocks)).unflatten(1, (-1, size))  # [R, groups, bytes]
    scale = _half(held, 0)
    if kind == "Q8_0":
        return Codes(held[..., _HALF:].contiguous().view(torch.int8).flatten(1), scale, None)
    least, start = (_half(held, _HALF), 2 * _HALF) if kind == "Q4_1" else (-8 * scale, _HALF)
    pairs = held[..., start:]
    return Codes(torch.cat([pairs & 15, pairs >> 4], -1).flatten(1), scale, least)


def _half(held: torch.Tensor, at: int) -> torch.Tensor:
    return held[..., at : at + _HALF].contiguous().view(torch.float16).squeeze(-1)


def _names(model: PreTrainedModel):  # type: ignore[no-untyped-def]
    """From a module's name to its tensor's in the file."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config.get_text_config(decoder=True)
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    kind = config.model_type.removesuffix("_text").replace("_", "")
    found = get_tensor_name_map(known.get(kind, MODEL_ARCH.LLAMA), config.num_hidden_layers)
    return lambda module: f"{found.get_name(module)}.weight"


def _in_order(codes: Codes, linear: nn.Linear, head_dim: int) -> Codes | None:
    """The codes with their rows as in the layer, or None."""
    weight = linear.weight.detach().cpu()
    if codes.codes.shape != weight.shape:
        return None
    rows = len(weight)
    orders = [torch.arange(rows)]
    if rows % head_dim == 0:  # llama.cpp turns neighbouring channels, transformers the two halves of a head
        orders.append(orders[0].view(-1, head_dim // 2, 2).transpose(1, 2).flatten())
    for order in orders:
        turned = Codes(codes.codes[order], codes.scale[order], None if codes.least is None else codes.least[order])
        if torch.equal(turned.dense().to(weight.dtype), weight):
            return turned
    return None


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
