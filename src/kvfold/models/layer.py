"""What methods may ask of one attention layer of a transformers model: its rotation, its projections."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.calibration import Calibration, load_calibration
from kvfold.errors import ModelError
from kvfold.files import cache_folder
from kvfold.models.weights import PackedLinear
from kvfold.rope import Rope
from kvfold.site import Projections

_FIXED = "keys and queries of this model can't be turned to other positions"
_HINT = "(where the method takes it, add reindex=false)"


@dataclass(frozen=True)
class ModelLayer:
    """The layer `index` of a model, counted over all of its layers."""

    model: PreTrainedModel
    index: int

    def rope(self) -> Rope:
        """The rotation of the layer's queries and keys, tried against the model's own."""
        decoder = self.model.get_decoder()
        config = self.model.config.get_text_config(decoder=True)
        embedding = getattr(decoder, "rotary_emb", None)
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        inv_freq = getattr(embedding, f"{types[self.index]}_inv_freq", getattr(embedding, "inv_freq", None))
        rotate = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
        if inv_freq is None or rotate is None:
            raise ModelError(f"{_FIXED}: it has no rotary embedding {_HINT}")
        kind = str(getattr(embedding, "rope_type", ""))
        if "dynamic" in kind or "longrope" in kind:
            raise ModelError(f"{_FIXED}: its RoPE changes with the length {_HINT}")
        rope = Rope(inv_freq.detach().float().cpu())
        angle = torch.cat([7 * rope.inv_freq] * 2)[None, None]
        x = torch.randn(1, 1, 1, head_dim_of(config), generator=torch.Generator().manual_seed(0))
        theirs = rotate(x, x, angle.cos(), angle.sin())[0]
        if not torch.allclose(theirs, rope.rotate(x, torch.tensor(7)), atol=1e-4):
            raise ModelError(f"{_FIXED}: it pairs its rotary channels in another way {_HINT}")
        return rope

    def projections(self) -> Projections:
        """The weights of k_proj and v_proj, by KV head."""
        k, v = (self._projection(name) for name in ("k_proj", "v_proj"))
        return Projections(k[0], v[0], k[1], v[1], k_normed=getattr(self._attention(), "k_norm", None) is not None)

    def calibration(self) -> Calibration:
        """What `kvfold calibrate` found out of the whole model. ModelError when it has not been run."""
        path = calibration_path(self.model)
        if not path.exists():
            raise ModelError("this plan needs a calibration of the model: run 'kvfold calibrate' once")
        return load_calibration(path)

    def _projection(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.model.config.get_text_config(decoder=True)
        linear = getattr(self._attention(), name, None)
        weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
        if isinstance(linear, PackedLinear):
            weight = linear.dense()
        if not isinstance(weight, torch.Tensor):
            raise ModelError(f"this plan needs the weights of {name}, and {type(self.model).__name__} has none of that name")
        by_head = (config.num_key_value_heads, head_dim_of(config))
        return weight.detach().view(*by_head, -1), None if bias is None else bias.detach().view(by_head)

    def _attention(self) -> Any:
        """The layer's attention module, or None where it goes by another name."""
        layers: Any = getattr(self.model.get_decoder(), "layers", ())
        return getattr(layers[self.index], "self_attn", None) if layers else None


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def calibration_path(model: PreTrainedModel) -> Path:
    """Where the calibration of a model lies, made or not.

    Its name has a hash of 16 numbers of every weight, rounded to bfloat16, so that it is the same in each type that the model
    is loaded in.
    """
    samples = [
        p.detach().flatten()[:: max(1, p.numel() // 16)][:16].bfloat16().float() for p in model.parameters() if p.numel()
    ]
    mark = hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:16]
    return cache_folder() / f"calibration-{mark}.safetensors"
