from dataclasses import replace

import pytest
import torch

from uni_x.errors import InputError
from uni_x.generation.engine import Engine, Request
from uni_x.generation.sampling import Sampling
from uni_x.model import UniXConfig, UniXForCausalLM

TEXT, CODES, MARKER = 60, 32, 50
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> UniXForCausalLM:
    torch.manual_seed(0)
    config = UniXConfig(
        vocab_size=TEXT + CODES + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
        preset="uni-x",
        preset_arguments={"first": 1, "last": 1},
        image_token_offset=TEXT,
        image_codebook_size=CODES,
        vision_start_token_id=MARKER,
    )
    return UniXForCausalLM(config).eval()


def greedy_by_hand(
    model: UniXForCausalLM, prompt: list[int], count: int, ids: range, other: list[int] | None = None, scale: float = 1
) -> list[int]:
    """The most likely tokens, by a full forward for each."""
    chosen: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + chosen])).logits[0, -1]
            if other is not None:
                base = model(torch.tensor([other + chosen])).logits[0, -1]
                logits = base + (logits - base) * scale
        chosen.append(ids.start + int(logits[ids.start : ids.stop].argmax()))
    return chosen


def test_codes_are_the_most_likely_ones_and_only_codes(model: UniXForCausalLM) -> None:
    prompts = [[3, 4, MARKER], [9, 8, 7, 6, MARKER]]
    completions = Engine(model).generate([Request(prompt, 9, image=True, sampling=GREEDY) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.ids == greedy_by_hand(model, prompt, 9, range(TEXT, TEXT + CODES))
        assert completion.finished


def test_guidance_runs_both_prompts_with_the_same_codes(model: UniXForCausalLM) -> None:
    prompts, other = [[3, 4, MARKER], [9, 8, 7, 6, MARKER]], [2, MARKER]
    sampling = Sampling(temperature=0.0, guidance_scale=2.5)
    requests = [Request(prompt, 7, True, sampling, other) for prompt in prompts]
    requests.append(Request(prompts[0], 7, True, GREEDY))
    completions = Engine(model).generate(requests)
    codes = range(TEXT, TEXT + CODES)
    for prompt, completion in zip(prompts, completions, strict=False):
        assert completion.ids == greedy_by_hand(model, prompt, 7, codes, other, 2.5)
    assert completions[2].ids == greedy_by_hand(model, prompts[0], 7, codes)


def test_text_stops_at_a_stop_id_and_others_go_on(model: UniXForCausalLM) -> None:
    prompts = [[3, 4, 5], [9, 8, MARKER, TEXT + 3, 7], [1]]
    plain = [greedy_by_hand(model, prompt, 8, range(TEXT)) for prompt in prompts]
    stop = plain[1][2]
    completions = Engine(model).generate(
        [Request(prompt, 8, sampling=GREEDY, stop_ids=frozenset({stop})) for prompt in prompts]
    )
    for expected, completion in zip(plain, completions, strict=True):
        cut = expected.index(stop) if stop in expected else 8
        assert completion.ids == expected[:cut]
        assert completion.finished == (stop in expected)


def test_a_request_draws_the_same_in_any_batch(model: UniXForCausalLM) -> None:
    sampling = Sampling(temperature=1.3, top_k=20, guidance_scale=1.5, seed=7)
    request = Request([3, 4, MARKER], 6, True, sampling, [2, MARKER])
    others = [replace(request, sampling=replace(sampling, seed=seed), prompt=[seed, MARKER]) for seed in range(9)]
    text = [Request([5, 6], 4, sampling=Sampling(seed=seed)) for seed in range(3)]
    alone = Engine(model).generate([request])[0]
    assert Engine(model).generate([*others, request, *text])[9] == alone
    assert Engine(model, max_rows=2).generate([*text, *others, request])[-1] == alone


def test_likelihoods_are_those_of_a_full_forward(model: UniXForCausalLM) -> None:
    pairs = [([3, 4], [5, 6, 7]), ([9, 8, MARKER, TEXT], [TEXT + 1]), ([1], [2, 3])]
    for (prompt, continuation), value in zip(pairs, Engine(model, max_rows=2).log_likelihoods(pairs), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(continuation))
        assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), "the prompt is empty"),
        (Request([1], 0), "max_new_tokens is 1 or more"),
        (Request([1], 1, True, Sampling(guidance_scale=2)), "guidance needs an unconditional prompt"),
        (Request([TEXT + CODES + 4], 1), "vocab_size is 96"),
    ],
)
def test_wrong_requests_are_named(model: UniXForCausalLM, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(model).generate([request_])


def test_separators_are_put_between_codes(model: UniXForCausalLM) -> None:
    separator, prompts = 51, [[3, 4, MARKER], [9, 8, 7, 6, MARKER]]
    engine = Engine(model, separator=(separator, 3))
    completions = engine.generate([Request(prompt, 7, image=True, sampling=GREEDY) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        by_hand: list[int] = []
        for lead in (3, 3, 1):
            codes = greedy_by_hand(model, prompt, lead, range(TEXT, TEXT + CODES))
            by_hand, prompt = by_hand + codes, [*prompt, *codes, separator]
        assert completion.ids == by_hand
    text = Request([3, 4], 7, sampling=GREEDY)
    assert engine.generate([text]) == Engine(model).generate([text])
