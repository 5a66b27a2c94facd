"""The harness' tasks over local data: its prompts, filters and metrics where it has such a task, plain ones where it has none.

Every name ends in `_local`, so that a score is never mistaken for the official one. Where data is complete and the harness' own
configuration is used as it is (GSM8K), the name says only where the data came from.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

from kvfold.lab.eval import data, sandbox, synthetic
from kvfold.lab.eval.data import Doc
from kvfold.lab.quality import rouge_l

_HARNESS = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class Making:
    """What tasks are made with: the model's tokenizer, lengths of contexts in tokens, and the seed."""

    tokenizer: PreTrainedTokenizerBase
    lengths: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class LocalTask:
    """A task over local data.

    Attributes:
        about: what it is, in a line, and how it differs from the official one.
        official: the harness' task for machines that reach the hub; empty where there is none.
        make: builds it. FileError as in `kvfold.models.packages.fetch`.
    """

    name: str
    about: str
    official: str
    make: Callable[[Making], Task]


def _task(name: str, docs: Sequence[Doc], config: dict[str, Any]) -> Task:
    """A task of the harness over our documents."""
    own = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
        "test_split": "test",
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "dataset_path": None,
        "dataset_name": None,
    }
    left_out = ("tag", "group")
    return ConfigurableTask(config={k: v for k, v in config.items() if k not in left_out} | own)


def _harness_config(path: str) -> dict[str, Any]:
    config: dict[str, Any] = load_yaml(_HARNESS / path)
    return config


def _mean_of(metric: str, higher_is_better: bool = True) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better}]


# -- the harness' own prompts ------------------------------------------------------------------------------------------------


def _gsm8k(making: Making) -> Task:
    return _task("kvfold_gsm8k_local", data.gsm8k(), _harness_config("gsm8k/gsm8k-cot.yaml"))


def _hellaswag(making: Making) -> Task:
    return _task("kvfold_hellaswag_local", data.hellaswag(), _harness_config("hellaswag/hellaswag.yaml"))


def _shots(folder: str) -> list[tuple[dict[str, Any], list[dict[str, str]]]]:
    """For each subject of a chain-of-thought task its configuration and its worked examples."""
    configs = [_harness_config(f"{folder}/{path.name}") for path in sorted((_HARNESS / folder).glob("[!_]*.yaml"))]
    return [(config, config["fewshot_config"]["samples"]) for config in configs]


_ANSWER = re.compile(r"the answer is (.*?)\.?\s*$", re.DOTALL | re.IGNORECASE)


def _left_out(folder: str, field: str, cue: str, last_cue: str) -> list[Doc]:
    """Each worked example as a question, the other ones of its subject before it; subjects take turns.

    Args:
        field: of the question in a worked example.
        cue: between a question and its worked answer.
        last_cue: what the model is to go on from.
    """
    docs: list[tuple[int, Doc]] = []
    for config, shots in _shots(folder):
        for i, asked in enumerate(shots):
            answer = _ANSWER.search(asked["target"])
            if answer is None:
                continue
            others = [f"Q: {shot[field].strip()}\n{cue}{shot['target']}" for j, shot in enumerate(shots) if j != i]
            start = config["description"].strip()
            prompt = "\n\n".join([start, *others, f"Q: {asked[field].strip()}\n{last_cue}"])
            letters = [f"Q: {shot[field].strip()}\nA: {_letter(shot)}" for j, shot in enumerate(shots) if j != i]
            plain = "\n\n".join([start, *letters, f"Q: {asked[field].strip()}\nA:"])
            docs.append((i, {"prompt": prompt, "plain": plain, "target": answer[1].strip(), "subject": config["task"]}))
    return [doc for _, doc in sorted(docs, key=lambda pair: pair[0])]


def _letter(shot: dict[str, str]) -> str:
    found = _ANSWER.search(shot["target"])
    return found[1].strip() if found else ""


def _mmlu_docs() -> list[Doc]:
    return _left_out("mmlu/flan_cot_fewshot", "question", "A: ", "A: Let's think step by step.")


def _mmlu_cot(making: Making) -> Task:
    config = _harness_config("mmlu/flan_cot_fewshot/mmlu_anatomy.yaml")
    for key in ("description", "fewshot_config"):
        config.pop(key)
    config |= {"doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}", "num_fewshot": 0}
    return _task("kvfold_mmlu_cot_local", _mmlu_docs(), config)


def _mmlu(making: Making) -> Task:
    letters = ["(A)", "(B)", "(C)", "(D)"]
    docs = [d for d in _mmlu_docs() if d["target"] in letters]
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{plain}}",
        "doc_to_choice": letters,
        "doc_to_target": lambda doc: letters.index(doc["target"]),
        "metric_list": _mean_of("acc"),
        "metadata": {"version": 1.0},
    }
    return _task("kvfold_mmlu_local", docs, config)


def _bbh(making: Making) -> Task:
    config = _harness_config("bbh/cot_fewshot/boolean_expressions.yaml")
    for key in ("description", "fewshot_config"):
        config.pop(key)
    config |= {"doc_to_text": "{{prompt}}", "num_fewshot": 0}
    cue = "A: Let's think step by step.\n"
    return _task("kvfold_bbh_cot_local", _left_out("bbh/cot_fewshot", "input", cue, cue), config)


# -- plain prompts -----------------------------------------------------------------------------------------------------------


def _wikipedia(making: Making) -> Task:
    def process(doc: Doc, results: Sequence[float]) -> dict[str, Any]:
        (log_likelihood,) = results
        num_words, num_bytes = len(doc["page"].split()), len(doc["page"].encode())
        return {
            "word_perplexity": (log_likelihood, num_words),
            "byte_perplexity": (log_likelihood, num_bytes),
            "bits_per_byte": (log_likelihood, num_bytes),
        }

    config = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda doc: doc["page"],
        "process_results": process,
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "metadata": {"version": 1.0},
    }
    return _task("kvfold_wikipedia_local", data.wikipedia(), config)


def _generation(name: str, docs: Sequence[Doc], metric: str, score: Callable[[Doc, str], float], **config: Any) -> Task:
    """A task whose generated text is scored by a function of ours."""
    own = {
        "output_type": "generate_until",
        "process_results": lambda doc, results: {metric: score(doc, results[0])},
        "metric_list": _mean_of(metric),
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    return _task(name, docs, own | config)


def _humaneval(making: Making) -> Task:
    def passes(doc: Doc, text: str) -> float:
        program = f"{doc['prompt']}{text}\n{doc['test']}\ncheck({doc['entry_point']})\n"
        return float(sandbox.run(program).passed)

    return _generation(
        "kvfold_humaneval_local",
        data.humaneval(),
        "pass@1",
        passes,
        doc_to_text="{{prompt}}",
        doc_to_target="{{canonical_solution}}",
        generation_kwargs={
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 512,
            "do_sample": False,
        },
    )


def _aclsum(making: Making) -> Task:
    return _generation(
        "kvfold_aclsum_local",
        data.aclsum(),
        "rouge_l",
        lambda doc, text: rouge_l(text, doc["summary"]),
        doc_to_text="{{title}}\n\n{{paper}}\n\nChallenge, approach and outcome, in three sentences: In this paper, the authors",
        doc_to_target="{{summary}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 96, "do_sample": False},
    )


def _recalled(name: str, docs: Sequence[Doc], max_gen_toks: int) -> Task:
    return _generation(
        name,
        docs,
        "recall",
        lambda doc, text: synthetic.recall(text, doc["answers"]),
        doc_to_text=lambda doc: doc["prompt"],
        doc_to_target=lambda doc: ", ".join(doc["answers"]),
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": max_gen_toks, "do_sample": False},
    )


def _needle(making: Making) -> Task:
    return _recalled("kvfold_needle_local", synthetic.needles(making.tokenizer, making.lengths, making.seed), 16)


def _ruler(kind: str, max_gen_toks: int) -> Callable[[Making], Task]:
    def make(making: Making) -> Task:
        docs = synthetic.ruler(kind, making.tokenizer, making.lengths, making.seed)
        return _recalled(f"kvfold_ruler_{kind}_local", docs, max_gen_toks)

    return make


LOCAL_TASKS = {
    task.name: task
    for task in (
        LocalTask(
            "kvfold_wikipedia_local", "perplexity of Wikipedia articles, the first 8,000 characters", "wikitext", _wikipedia
        ),
        LocalTask("kvfold_hellaswag_local", "100 questions of HellaSwag's validation set", "hellaswag", _hellaswag),
        LocalTask("kvfold_mmlu_local", "MMLU's 285 shots, each after the others of its subject, letters", "mmlu", _mmlu),
        LocalTask("kvfold_mmlu_cot_local", "the same with chains of thought", "mmlu_flan_cot_fewshot", _mmlu_cot),
        LocalTask("kvfold_bbh_cot_local", "BBH's 81 shots, each after the others of its subject", "bbh_cot_fewshot", _bbh),
        LocalTask("kvfold_gsm8k_local", "GSM8K's test set, 8 shots with chains of thought", "gsm8k_cot", _gsm8k),
        LocalTask("kvfold_humaneval_local", "HumanEval, pass@1, at most 512 tokens, run in a sandbox", "humaneval", _humaneval),
        LocalTask("kvfold_aclsum_local", "summaries of 100 papers, ROUGE-L", "", _aclsum),
        LocalTask("kvfold_needle_local", "a needle in Wikipedia, lengths × 5 depths", "", _needle),
        LocalTask(
            "kvfold_ruler_niah_single_local", "RULER's single needle in noise", "niah_single_1", _ruler("niah_single", 32)
        ),
        LocalTask("kvfold_ruler_niah_multikey_local", "four keys, one asked", "niah_multikey_1", _ruler("niah_multikey", 32)),
        LocalTask("kvfold_ruler_niah_multivalue_local", "four values", "niah_multivalue", _ruler("niah_multivalue", 64)),
        LocalTask(
            "kvfold_ruler_variable_tracking_local", "RULER's variable tracking", "ruler_vt", _ruler("variable_tracking", 48)
        ),
    )
}
