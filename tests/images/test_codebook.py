"""Codes are the nearest vectors; a codebook in training follows what it stands for."""

import torch

from uni_x.images import codebook as codebook_module
from uni_x.images.codebook import CodebookLearner, k_means, nearest_codes


def test_codes_are_the_nearest_vectors_in_chunks_of_any_size(monkeypatch):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(101, 5), torch.randn(17, 5)
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(dim=1)
    for budget in (1, 40, 2**20):
        monkeypatch.setattr(codebook_module, "DISTANCES_AT_ONCE", budget)
        assert torch.equal(nearest_codes(vectors, codebook), expected)


def test_k_means_finds_each_of_a_few_distinct_vectors():
    torch.manual_seed(0)
    distinct = torch.randn(9, 4)
    often = distinct[torch.cat([torch.arange(9), torch.zeros(500, dtype=torch.int64)])]  # one of them very common
    centres = k_means(often, 12)
    assert torch.cdist(distinct, centres).min(dim=1).values.max() < 1e-5


def test_a_code_moves_to_the_mean_of_its_vectors():
    codebook = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    vectors = torch.tensor([[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]])
    learner = CodebookLearner(codebook, decay=0.5)
    learner.start(codebook, vectors)
    for _ in range(40):
        learner.update(codebook, vectors, nearest_codes(vectors, codebook))
    expected = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
    assert torch.cdist(expected, codebook).min(dim=1).values.max() < 1e-4


def test_an_idle_code_restarts_where_the_error_is():
    codebook = torch.tensor([[0.0, 0.0], [50.0, 50.0]])
    vectors = torch.cat([torch.zeros(30, 2), torch.full((1, 2), 3.0)])
    codes = nearest_codes(vectors, codebook)
    learner = CodebookLearner(codebook, decay=0.5)
    for _ in range(20):
        learner.update(codebook, torch.zeros(30, 2), torch.zeros(30, dtype=torch.int64))
    assert learner.restart(codebook, vectors, codes) == 1
    assert codebook[1].tolist() == [3.0, 3.0]


def test_idle_codes_stay_where_every_vector_has_its_code():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]])
    vectors = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    learner = CodebookLearner(codebook, decay=0.5)
    for _ in range(20):
        learner.update(codebook, vectors, torch.tensor([0, 1]))
    assert learner.restart(codebook, vectors, torch.tensor([0, 1])) == 0
