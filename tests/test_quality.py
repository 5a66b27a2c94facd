"""What the default codecs cost on a real model and real text: the floors that no change may fall below."""

import pytest
import torch

import kvfold
from kvfold.lab.quality import reference_of, stream_quality
from kvfold.lab.text import wikipedia_articles

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def setting():
    """SmolLM2 in float32 and 4096 tokens of a Wikipedia article: 2048 prefilled, 2048 streamed by 32."""
    model, tokenizer = kvfold.load("smollm2-135m", dtype="float32")
    longest = max(wikipedia_articles(), key=lambda article: len(article.text))
    ids = tokenizer(longest.text, return_tensors="pt").input_ids[:, :4096]
    assert ids.shape[1] == 4096
    return model, ids, reference_of(model, ids, 2048, 32)


@pytest.mark.parametrize(("plan", "most_kl"), [("full", 1e-9), ("int8", 0.0001), ("int4", 0.0040)])
def test_kl(setting, plan, most_kl):
    model, ids, reference = setting
    quality = stream_quality(model, ids, plan, reference)
    assert quality.kl <= most_kl
    assert quality.perplexity == pytest.approx(reference.perplexity, rel=0.01)


@pytest.mark.parametrize(("plan", "most_bits", "most_share"), [("int8", 8.5, 0.54), ("int4", 4.5, 0.29)])
def test_bytes_of_4096_tokens(plan, most_bits, most_share):
    """Everything counted, in the type that the model is used in."""
    model, _ = kvfold.load("smollm2-135m", dtype="bfloat16")
    cache = kvfold.cache(model, plan)
    ids = torch.randint(0, 40000, (1, 4096), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in ids.split(512, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
    elements = 4096 * 30 * 2 * 3 * 64
    assert 8 * cache.nbytes / elements <= most_bits
    assert cache.nbytes / (2 * elements) <= most_share
