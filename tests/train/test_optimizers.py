import torch
from torch import nn

from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.train.optimizers import MuonWithAdamW, orthogonalise


def tiny() -> UniXForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return UniXForCausalLM(UniXConfig(**sizes, num_attention_heads=2))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonalise(matrices).flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.95


def test_an_update_agrees_with_torchs_own_muon() -> None:
    ours, theirs = tiny(), tiny()
    matrices = [weight for weight in theirs.model.layers.parameters() if weight.ndim == 2]
    reference = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
    optimizer = MuonWithAdamW(ours, muon_lr=0.02, weight_decay=0.1)
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, step in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            step.step()
    start = tiny().model.layers[0].mlp.up_proj.weight
    moved = ours.model.layers[0].mlp.up_proj.weight - start
    expected = theirs.model.layers[0].mlp.up_proj.weight - start
    # torch's iterates in bfloat16, and the other weights have not moved in it
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97
    assert 0.9 < moved.norm() / expected.norm() < 1.1


def test_matrices_of_layers_go_to_muon_and_the_rest_to_adamw() -> None:
    model = tiny()
    groups = {group["kind"]: set(map(id, group["params"])) for group in MuonWithAdamW(model).param_groups}
    for name, weight in model.named_parameters():
        kind = "muon" if "proj" in name else "adamw"
        assert id(weight) in groups[kind], name


def test_frozen_parameters_are_left_alone() -> None:
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = MuonWithAdamW(model)
    ids = torch.randint(20, (2, 9))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert "lm_head.weight" not in moved
    assert "model.layers.0.self_attn.q_proj.weight" in moved


def test_the_state_is_saved_and_restored() -> None:
    models = [tiny(), tiny()]
    optimizers = [MuonWithAdamW(model) for model in models]
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    train(models[0], optimizers[0], 4)
    train(models[1], optimizers[1], 2)
    fresh = MuonWithAdamW(models[1])
    fresh.load_state_dict(optimizers[1].state_dict())
    train(models[1], fresh, 2)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
