"""The tokenizer's losses against hand-made values, and what each of them trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scd_sf.losses.reconstruction import (
    GanConfig,
    ReconstructionConfig,
    TokenizerObjective,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_error,
    judge,
    pixel_loss,
)
from scd_sf.models.tokenizers.training import (
    Components,
    DiscriminatorConfig,
    TokenizerConfig,
    build_discriminator,
    build_tokenizer,
)

CFG = TokenizerConfig((16, 16), (1, 1), (1, 1), res_stages=2, channels=8)


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixel_loss_is_the_weighted_sum_of_its_parts() -> None:
    made, real = images(0), images(1)
    cfg = ReconstructionConfig(l1=2.0, mse=3.0, gradient=5.0, scales=2, perceptual=7.0)
    total, logs = pixel_loss(made, real, cfg, lambda a, b: (a - b).abs().amax())
    edges = []
    for a, b in ((made, real), (functional.avg_pool2d(made, 2), functional.avg_pool2d(real, 2))):
        across, down = a[..., 1:] - a[..., :-1], a[:, :, 1:] - a[:, :, :-1]
        other_across, other_down = b[..., 1:] - b[..., :-1], b[:, :, 1:] - b[:, :, :-1]
        edges.append(
            functional.l1_loss(across, other_across) + functional.l1_loss(down, other_down)
        )
    parts = {
        "l1": functional.l1_loss(made, real),
        "mse": functional.mse_loss(made, real),
        "gradient": (edges[0] + edges[1]) / 2,
        "perceptual": (made - real).abs().max(),
    }
    assert logs == pytest.approx({name: float(value) for name, value in parts.items()}, rel=1e-5)
    weighted = 2 * parts["l1"] + 3 * parts["mse"] + 5 * parts["gradient"] + 7 * parts["perceptual"]
    torch.testing.assert_close(total, weighted)
    assert set(pixel_loss(made, real, ReconstructionConfig())[1]) == {"l1"}


def test_gradient_error_ignores_what_is_even_and_stops_at_small_pictures() -> None:
    assert float(gradient_error(torch.full((1, 3, 8, 8), 0.7), 3)) == pytest.approx(0.0, abs=1e-6)
    error = torch.zeros(1, 1, 2, 2)
    error[..., 1] = 1.0
    assert float(gradient_error(error, 5)) == pytest.approx(1.0)


def test_hinge() -> None:
    real, made = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert float(discriminator_loss(real, made)) == pytest.approx(0.5 * ((0 + 1) / 2 + (0 + 2) / 2))
    assert float(generator_loss(made)) == pytest.approx(1.0)


def test_adaptive_weight_makes_both_pull_equally() -> None:
    last = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    first, second = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.1])).sum()
    weight = adaptive_weight(first, second, last)
    assert float(weight) == pytest.approx(5.0 / (0.1 + 1e-4)) and not weight.requires_grad
    assert float(adaptive_weight(first, 0.0 * second, last)) == 1e4
    assert last.grad is None


def objective(
    adversarial: bool, *, freeze: bool = True
) -> tuple[dict[str, float], dict[str, bool], bool]:
    """Logs, which parameters of the model got a gradient, and whether the discriminator did."""
    model, critic = build_tokenizer(CFG, 0), build_discriminator(DiscriminatorConfig(8, 1), 0)
    components = Components(
        torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(2)), torch.zeros(8)
    )
    cfg, gan = ReconstructionConfig(anchor=0.5, noise=0.1), GanConfig(0.5, 0, freeze)
    loss, made, logs = TokenizerObjective(cfg, gan, components, None, critic)(
        model, images(0), torch.zeros(2, 8, 8, 8), adversarial
    )
    loss.backward()
    assert made.shape == (2, 3, 16, 16) and not made.requires_grad
    if not adversarial:
        assert float(loss.detach()) == pytest.approx(logs["l1"] + 0.5 * logs["anchor"], rel=1e-5)
    got = {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in model.named_parameters()
    }
    return logs, got, any(p.grad is not None for p in critic.parameters())


def test_what_is_trained() -> None:
    logs, got, critic = objective(False)
    assert set(logs) == {"l1", "anchor"} and all(got.values()) and not critic
    logs, got, critic = objective(True)
    assert set(logs) == {"l1", "gan", "gan_balance"} and not critic
    assert all(there == name.startswith("decoder.") for name, there in got.items())
    logs, got, critic = objective(True, freeze=False)
    assert set(logs) == {"l1", "gan", "gan_balance", "anchor"} and all(got.values()) and not critic


def test_noise_reaches_the_decoder_and_not_the_anchor() -> None:
    model = build_tokenizer(CFG, 0)
    components = Components(torch.zeros(8, 3, 2, 2), torch.zeros(8))
    ask = TokenizerObjective(ReconstructionConfig(anchor=1.0, noise=0.5), GanConfig(), components)
    plain, noisy = (
        ask(model, images(0), scale * torch.ones(2, 8, 8, 8), False)[2] for scale in (0.0, 1.0)
    )
    assert plain["anchor"] == noisy["anchor"] and plain["l1"] != noisy["l1"]
    with torch.no_grad():
        made = model.decoder(model.encoder(images(0)) + 0.5)
    assert noisy["l1"] == pytest.approx(float((made - images(0)).abs().mean()), rel=1e-5)


def test_judge_trains_the_discriminator() -> None:
    critic = build_discriminator(DiscriminatorConfig(8, 1), 0)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    first = float(judge(critic, images(0), images(1)).detach())
    for _ in range(30):
        loss = judge(critic, images(0), images(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * first


def test_when_the_gan_begins() -> None:
    assert [GanConfig(0.5, 2).on(step) for step in (1, 2, 3)] == [False, False, True]
    assert not GanConfig(0.0, 0).on(1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"l1": -1.0}, "l1 is -1"),
        ({"scales": 0}, "scales is 0"),
        ({"anchor_floor": 0.0}, "anchor_floor is 0"),
        ({"l1": 0.0}, "both 0"),
    ],
)
def test_weights_that_make_no_sense(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReconstructionConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight and start"):
        GanConfig(weight=-1)
