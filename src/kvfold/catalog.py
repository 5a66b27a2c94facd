"""The strategies that have a name: what `kvfold strategies` lists, and what `kvfold bench` compares."""

from dataclasses import dataclass
from typing import Literal

from kvfold.errors import PlanError
from kvfold.plan import Plan
from kvfold.registry import STAGES, methods, nearest

Changes = Literal[
    "nothing",
    "which tokens stay",
    "how tokens are held",
    "both",
    "what is read",
    "which layers hold tokens",
    "where tokens are",
]


@dataclass(frozen=True)
class Strategy:
    """A named plan.

    Attributes:
        name: what commands and tables call it.
        plan: the plan's text.
        summary: one line.
        paper: title and link of its source; empty for what has none.
        demo: whether `make demo` runs it.
        also: other names that it goes by.
        finding: what was measured against it here, in a few words; empty for most. docs/findings.md has the numbers.
    """

    name: str
    plan: str
    summary: str
    paper: str = ""
    demo: bool = True
    also: tuple[str, ...] = ()
    finding: str = ""

    @property
    def changes(self) -> Changes:
        plan = Plan.parse(self.plan)
        if plan.tier:
            return "where tokens are"
        if plan.share:
            return "which layers hold tokens"
        if plan.read:
            return "what is read"
        if plan.keep:
            return "both" if plan.store.name != "dense" else "which tokens stay"
        return "how tokens are held" if plan.store.name != "dense" else "nothing"


_STREAMING = "StreamingLLM, arxiv.org/abs/2309.17453"
_KIVI = "KIVI, arxiv.org/abs/2402.02750"
_H2O = "H2O, arxiv.org/abs/2306.14048"
_SNAPKV = "SnapKV, arxiv.org/abs/2404.14469"
_PYRAMID = "PyramidKV, arxiv.org/abs/2406.02069"
_ADA = "Ada-KV, arxiv.org/abs/2407.11550"
_SCISSORHANDS = "Scissorhands, arxiv.org/abs/2305.17118"
_EXPECTED = "Expected Attention, arxiv.org/abs/2510.00636"
_KVZIP = "KVzip, arxiv.org/abs/2505.23416"
_SIEVE = "SIEVE (NSDI 2024), usenix.org/conference/nsdi24/presentation/zhang-yazhuo"
_QUEST = "Quest, arxiv.org/abs/2406.10774"
_INFLLM = "InfLLM, arxiv.org/abs/2402.04617"
_MINICACHE = "MiniCache, arxiv.org/abs/2405.14366"
_CLA = "Cross-Layer Attention, arxiv.org/abs/2405.12981"
_FLEXGEN = "FlexGen, arxiv.org/abs/2303.06865"
_KVTC = "KVTC, arxiv.org/abs/2511.01815"
_QUAROT = "QuaRot, arxiv.org/abs/2404.00456"

_TURBOQUANT = "TurboQuant, arxiv.org/abs/2504.19874"
_KVQUANT = "KVQuant, arxiv.org/abs/2401.18079"
_GEAR = "GEAR, arxiv.org/abs/2403.05527"
_SHADOWKV = "ShadowKV, arxiv.org/abs/2410.21465"
_LORC = "LoRC, arxiv.org/abs/2410.03111"

_ALL = (
    Strategy("full", "full", "every token, in the model's own type", also=("baseline",)),
    Strategy("transformers", "transformers", "the same in transformers' own cache, with the model's own attention"),
    Strategy(
        "window",
        "window(25%)",
        "the last quarter of the context",
        "Longformer, arxiv.org/abs/2004.05150",
        also=("sliding_window",),
        finding="loses to random: without sinks attention collapses",
    ),
    Strategy(
        "sink_window",
        "sink_window(sink=4, window=25%)",
        "4 sinks and the last quarter, re-indexed",
        _STREAMING,
        also=("attention_sink",),
        finding="loses to random in questions about an article",
    ),
    Strategy(
        "sink_window_fixed",
        "sink_window(sink=4, window=25%, reindex=false)",
        "the same, positions as they were",
        _STREAMING,
        demo=False,
    ),
    Strategy("selective_int8", "protect(sink=16, window=32) | int8", "int8, but the first 16 and last 32 tokens dense"),
    Strategy("selective_int4", "protect(sink=16, window=32) | int4", "int4, but the first 16 and last 32 tokens dense"),
    Strategy("int8", "int8", "8-bit integers, K per channel, V per token", _KIVI, also=("quantization_8bit",)),
    Strategy(
        "int4",
        "int4",
        "4-bit integers, K per channel, V rotated and per token",
        f"{_KIVI}; {_QUAROT}",
        also=("quantization_4bit",),
    ),
    Strategy("int2", "int2", "2-bit integers, the same way", f"{_KIVI}; {_QUAROT}"),
    Strategy("int4_token", "int4(k_axis=token, rotate=none, sink=0)", "4-bit integers, K and V per token", demo=False),
    Strategy("int4_rotated", "int4(k_axis=token, rotate=kv)", "4-bit integers, rotated, per token", _QUAROT, demo=False),
    Strategy("k8v4", "mixed(k=int8, v=int4)", "8 bits for K, 4 for V", "KVTuner, arxiv.org/abs/2502.04420", demo=False),
    Strategy("kivi4", "kivi(int4)", "KIVI as published, 4 bits", _KIVI, demo=False),
    Strategy("kivi2", "kivi(int2)", "KIVI as published, 2 bits", _KIVI, demo=False),
    Strategy("fp8", "fp8(e4m3)", "8-bit floats, a scale a token", "FP8 formats, arxiv.org/abs/2209.05433"),
    Strategy("fp8_e5m2", "fp8(e5m2)", "8-bit floats of wider range", "FP8 formats, arxiv.org/abs/2209.05433", demo=False),
    Strategy("banded", "banded(2.5)", "about 2 bits: normal levels by channel, a few entries mended", _KVTC, demo=False),
    Strategy("nf4", "nf4", "4-bit codes at quantiles of a normal distribution", "QLoRA, arxiv.org/abs/2305.14314", demo=False),
    Strategy("fp4", "fp4", "4-bit floats", "OCP Microscaling Formats 1.0", demo=False),
    Strategy("turboquant4", "turboquant(4)", "rotated at random, Lloyd-Max levels, 4 bits", _TURBOQUANT, demo=False),
    Strategy("turboquant3", "turboquant(3)", "the same, 3 bits", _TURBOQUANT, demo=False),
    Strategy("turboquant2", "turboquant(2)", "the same, 2 bits", _TURBOQUANT, demo=False),
    Strategy("kvquant", "kvquant(3)", "3-bit levels fitted to each block, sparse outliers", _KVQUANT, demo=False),
    Strategy("gear", "gear(int4, rank=4, outliers=1%)", "int4, its outliers and a low rank of its errors", _GEAR, demo=False),
    Strategy("gear_h2o", "h2o(50%) | gear(int4)", "half of the tokens, then GEAR", f"{_H2O}; {_GEAR}", demo=False),
    Strategy("lowrank", "lowrank(50%)", "the prompt's own principal directions", _SHADOWKV, demo=False),
    Strategy("lorc", "lorc", "subspaces of the projections, fewer dimensions in late layers", _LORC, demo=False),
    Strategy("lorc_fp16", "lorc(codes=half)", "the same, coordinates in half precision", _LORC, demo=False),
    Strategy("lorc_8bit", "lorc(codes=int8)", "the same, coordinates in 8 bits", _LORC, demo=False),
    Strategy("hybrid", "hybrid(edge=2, edge_store=int8) | int4", "int4, but int8 in the first and last two layers"),
    Strategy("h2o", "h2o(25%)", "heavy hitters and recent tokens, a quarter in all", _H2O),
    Strategy("h2o_int4", "h2o(50%) | int4", "half of the tokens, in int4", f"{_H2O}; {_KIVI}", demo=False),
    Strategy("tova", "tova(25%)", "what the newest token looks at", "TOVA, arxiv.org/abs/2401.06104", demo=False),
    Strategy(
        "snapkv",
        "snapkv(25%)",
        "4 sinks and what the last 32 tokens look at",
        _SNAPKV,
        finding="beats random in KL, loses to it in needles and questions",
    ),
    Strategy(
        "pyramidkv",
        "snapkv(25%, window=8, layers=pyramid)",
        "snapkv, more of it in low layers",
        _PYRAMID,
        demo=False,
        finding="beats random in KL, loses to it in needles and questions",
    ),
    Strategy(
        "adakv",
        "snapkv(25%, heads=ada)",
        "snapkv, heads of a layer share its budget",
        _ADA,
        demo=False,
        finding="beats random in KL, loses to it in needles and questions",
    ),
    Strategy(
        "adakv_int4",
        "snapkv(50%, heads=ada) | int4",
        "half of the tokens, shared by heads, in int4",
        f"{_ADA}; {_KIVI}",
        demo=False,
    ),
    Strategy(
        "pyramidkv_int4",
        "snapkv(50%, window=8, layers=pyramid) | int4",
        "the same, shared by layers",
        f"{_PYRAMID}; {_KIVI}",
        demo=False,
    ),
    Strategy("scissorhands", "scissorhands(25%)", "what most queries give their share to", _SCISSORHANDS, demo=False),
    Strategy(
        "expected_attention",
        "expected(25%)",
        "what future queries should look at",
        _EXPECTED,
        demo=False,
        finding="loses to random in needles and questions",
    ),
    Strategy("kvzip", "kvzip(25%)", "what is looked at when the context is repeated", _KVZIP, demo=False),
    Strategy(
        "keydiff",
        "keydiff(25%)",
        "keys far from the mean key",
        "KeyDiff, arxiv.org/abs/2504.15364",
        demo=False,
        finding="loses in KL to random that keeps recent tokens, beats it in needles",
    ),
    Strategy(
        "lagkv",
        "lagkv(25%)",
        "what stands out from the tokens after it",
        "LagKV, arxiv.org/abs/2504.04704",
        demo=False,
        finding="loses to random in questions at 25%",
    ),
    Strategy(
        "sieve",
        "sieve(25%)",
        "SIEVE's hand and visited bit, over attention",
        _SIEVE,
        demo=False,
        finding="loses to random in needles at 25%, in questions at 12.5%, by little",
    ),
    Strategy(
        "l2norm",
        "l2norm(25%)",
        "keys of small norm; all tokens in the first two layers",
        "L2 norm, arxiv.org/abs/2406.11430",
        also=("l2_norm",),
        finding="loses to random that keeps sinks in everything",
    ),
    Strategy("random", "random(25%)", "tokens at random beside pinned ones: what eviction must beat"),
    Strategy("quest", "quest(25%)", "all tokens; a step reads the quarter that bounds of keys point to", _QUEST, demo=False),
    Strategy("quest_int4", "quest(25%) | int4", "the same, in int4", _QUEST, demo=False),
    Strategy(
        "infllm", "infllm(25%)", "all tokens; a step reads the quarter that representatives point to", _INFLLM, demo=False
    ),
    Strategy(
        "minicache",
        "minicache(start=50%)",
        "upper layers in pairs: one direction, two magnitudes; SmolLM2's layers are too unlike",
        _MINICACHE,
        demo=False,
    ),
    Strategy(
        "minicache_int8",
        "protect(sink=16, window=32) | int8 | minicache(start=50%)",
        "the same, directions in int8",
        _MINICACHE,
        demo=False,
    ),
    Strategy(
        "layer_sharing",
        "share(start=50%)",
        "every second upper layer uses its neighbour's tokens; for models trained so",
        _CLA,
        demo=False,
    ),
    Strategy(
        "hierarchical",
        "int4 | tier(device=25%, host=25%, disk)",
        "int4; a quarter on the device, a quarter in host memory, the rest on disk",
        _FLEXGEN,
        demo=False,
    ),
    Strategy(
        "retrieval",
        "quest(25%) | int4 | tier(device=25%, host)",
        "int4; a quarter on the device, and what a step needs comes from the host",
        f"{_QUEST}; {_FLEXGEN}",
        demo=False,
    ),
)

STRATEGIES: dict[str, Strategy] = {s.name: s for s in _ALL}
_BY_ANY_NAME = STRATEGIES | {name: s for s in _ALL for name in s.also}


def resolve(text: str) -> Plan:
    """The plan of a strategy's name, or of a plan's text. PlanError when it is neither, with the nearest known word."""
    name = text.strip()
    if name in _BY_ANY_NAME:
        return Plan.parse(_BY_ANY_NAME[name].plan)
    known = {*_BY_ANY_NAME, *(name for stage in STAGES for name in methods(stage))}
    if name.replace("_", "").isalnum() and name not in known:
        raise PlanError(f"unknown strategy or plan '{name}'{nearest(name, known)} ('kvfold strategies' lists all)")
    return Plan.parse(name)
