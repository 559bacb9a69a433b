import pytest
import torch

from uni_x.errors import InputError
from uni_x.generation.sampling import Sampling, draw, filtered_probabilities, guide


def test_each_row_has_its_own_settings() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]]).repeat(3, 1)
    probabilities = filtered_probabilities(
        logits, torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 2, 0]), torch.tensor([1.0, 1.0, 0.5])
    )
    assert probabilities[0].tolist() == [0, 0, 1]
    torch.testing.assert_close(probabilities[1], torch.tensor([0.0, 1.0, torch.e]) / (1 + torch.e))
    assert probabilities[2].tolist() == [0, 0, 1]


def test_a_draw_inverts_the_distribution_and_takes_no_impossible_token() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).repeat(5, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999999])
    assert draw(probabilities, uniform).tolist() == [1, 1, 2, 2, 2]


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = draw(probabilities.expand(20_000, 3), uniform).bincount(minlength=3)
    torch.testing.assert_close(counts / 20_000, probabilities, rtol=0, atol=0.02)


def test_guidance_moves_away_from_the_unconditional_logits() -> None:
    guided = guide(torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([3.0, 1.0]))
    assert guided.tolist() == [[4.0], [2.0]]


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**settings)
