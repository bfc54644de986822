"""Similarity, components and attention mass against naive formulas, on every family; a probe leaves
no trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from scd_sf.diffusion.samplers import Euler, FewStepSampler
from scd_sf.models.blocks import BlocksConfig, set_blocks
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.attention_mass import AttentionProbe, attention_mass, frame_mass
from scd_sf.probes.pca import PcaProbe, components, pca
from scd_sf.probes.result import ProbeResult, rounded
from scd_sf.probes.similarity import MEASURES, SimilarityProbe, evenly_spaced, similarity
from scd_sf.probes.store import FeatureStore
from scd_sf.probes.subject import Subject
from scd_sf.probes.watch import Place, watch_attention, watch_features
from scd_sf.types import Conditioning, UserError, VideoShape

FRAMES, STEPS = 6, 4
VARIANTS = {
    "causal": tiny.Variant("causal", 1),
    "causal-3": tiny.Variant("causal", 3),
    "diagonal": tiny.DIAGONAL,
    "scd": tiny.Variant("scd", 1, "paper", "temporal"),
    "scd-delta": tiny.Variant("scd", 1, "delta"),
    "scd-3": tiny.Variant("scd", 3, "junction", "identical", "cached"),
    "dit": tiny.Variant("causal", 1, backbone="dit"),
    "dit-scd": tiny.Variant("scd", 1, "paper", "temporal", "full", "dit"),
}
FAMILIES = ["wan", *VARIANTS]


def subject(family: str, steps: int = STEPS, clips: int = 2) -> Subject:
    if family == "wan":
        model: nn.Module = Wan(tiny.CFG)
        tiny.redraw(model, 0, torch.float32)
    else:
        model = tiny.student(VARIANTS[family], 0, torch.float32)
    text = torch.randn(clips, tiny.TEXT_LENGTH, tiny.TEXT, generator=tiny.generator(1))
    cond = Conditioning(text)
    if family.startswith("dit"):
        cond = Conditioning.of_frames(
            clips, torch.zeros(clips, FRAMES, dtype=torch.long), torch.zeros(clips).long()
        )
    shape = VideoShape(FRAMES, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
    return Subject(family, model, shape, cond, Euler(steps, 5.0), tuple(range(clips)))  # type: ignore[arg-type]


def everything(found: Subject) -> dict[tuple[int, int, int], Tensor]:
    """(chunk, step, block) -> the whole chunk's tokens, fp64."""
    kept: dict[tuple[int, int, int], Tensor] = {}

    def keep(place: Place, block: int, x_BLE: Tensor) -> None:
        assert place.step is not None
        kept[place.chunk, place.step, block] = x_BLE.double().clone()

    watch_features(found, list(range(len(found.step_blocks))), keep)
    return kept


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_leaves_no_trace(family: str) -> None:
    """The probed rollout is the plain one, and the model is what it was; also when the probe fails
    half-way."""
    one = subject(family)
    before, weights = one.sample(), {k: v.clone() for k, v in one.model.state_dict().items()}
    assert torch.equal(watch_features(one, [0], lambda *_: None), before)
    assert torch.equal(watch_attention(one, lambda *_: None), before)

    def fail(place: Place, block: int, *_: Tensor) -> None:
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        watch_features(one, [0], fail)
    with pytest.raises(RuntimeError, match="full disk"):
        watch_attention(one, fail)
    assert hooks(one.model) == 0 and torch.equal(one.sample(), before)
    assert all(torch.equal(v, weights[k]) for k, v in one.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_those_of_the_formulas(family: str) -> None:
    one, frame = subject(family), 4
    kept = everything(one)
    found = similarity(one, SimilarityProbe((frame,), tokens=0)).data
    chunk, at = divmod(frame, one.chunk)
    span = slice(at * one.tokens, (at + 1) * one.tokens)
    for block in range(len(one.step_blocks)):
        # (S, B, T, E)
        f = torch.stack([kept[chunk, step, block][:, span] for step in range(STEPS)])
        g = f - f.mean(2, keepdim=True)
        for s in range(STEPS):
            for r in range(STEPS):
                wanted = {
                    "cosine": torch.cosine_similarity(f[s], f[r], dim=-1).mean(),
                    "centred": torch.cosine_similarity(g[s], g[r], dim=-1).mean(),
                    "mse": (f[s] - f[r]).square().mean(),
                    "relative": (f[s] - f[r]).norm()
                    / ((f[s].square().sum() + f[r].square().sum()) / 2).sqrt(),
                }
                for measure in MEASURES:
                    got = found["matrices"][str(block)][measure][s][r]  # type: ignore[index]
                    assert got == pytest.approx(float(wanted[measure]), rel=2e-6, abs=1e-6), (
                        block,
                        s,
                        r,
                        measure,
                    )
        share = float(f.mean(2).square().sum() * one.tokens / f.square().sum())
        assert found["common_share"][block] == pytest.approx(share, abs=1e-5)  # type: ignore[index]


def test_fewer_tokens_and_more_frames_are_averages() -> None:
    one = subject("causal")
    both = similarity(one, SimilarityProbe((2, -1), tokens=0)).data["mean"]
    each = [similarity(one, SimilarityProbe((frame,), tokens=0)).data["mean"] for frame in (2, 5)]
    for measure in MEASURES:
        wanted = [(a + b) / 2 for a, b in zip(each[0][measure], each[1][measure], strict=True)]  # type: ignore[index]
        assert both[measure] == pytest.approx(wanted, abs=2e-6)  # type: ignore[index]
    assert similarity(one, SimilarityProbe(tokens=2)).data["tokens"] == 2
    assert (
        evenly_spaced(10, 3) == [0, 4, 9]
        and evenly_spaced(3, 7) == [0, 1, 2]
        and evenly_spaced(5, 1) == [0]
    )


def test_memory_of_the_store(tmp_path: Path) -> None:
    """Slices are no larger than one step's features, and together they are all of them."""
    x = torch.randn(5, 2, 17, 3, generator=tiny.generator(0))
    with FeatureStore(tmp_path, 5) as store:
        for step in (3, 0, 4, 1, 2):
            store.write(7, 1, step, x[step])
        parts = list(store.tokens(7, 1))
        assert max(part.numel() for part in parts) <= x[0].numel() and store.frames() == [(7, 1)]
        assert torch.equal(torch.cat(parts, 2), x.transpose(0, 1).double())
        assert torch.equal(store.step(7, 1, 3), x[3].double())


def test_one_basis_over_all_steps(tmp_path: Path) -> None:
    """Against an SVD of all rows; signs are fixed; equal features have equal colours."""
    x = torch.randn(3, 1, 40, 6, generator=tiny.generator(0)) * torch.tensor(
        [9.0, 4.0, 2.0, 0.3, 0.2, 0.1]
    )
    x[2] = x[0]
    with FeatureStore(tmp_path, 3) as store:
        for step in range(3):
            store.write(0, 0, step, x[step])
        mean, basis, shares = components(store, 0, 0)
    rows = x[:, 0].reshape(-1, 6).double()
    torch.testing.assert_close(mean, rows.mean(0))
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(
        (basis.T @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(shares, values[:3].square() / values.square().sum())
    assert all(basis[basis[:, i].abs().argmax(), i] > 0 for i in range(3))
    found = pca(subject("wan"), PcaProbe(blocks=(1, 4)))
    assert found.data["frame"] == FRAMES - 1 and set(found.data["variance_share"]) == {"1", "4"}  # type: ignore[call-overload]


def test_mass_by_frame() -> None:
    """In pieces of queries as in one softmax."""
    q, k = (torch.randn(2, 3, length, 8, generator=tiny.generator(length)) for length in (10, 24))
    wanted = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1).unflatten(-1, (4, 6)).sum(-1)
    torch.testing.assert_close(frame_mass(q, k, 6, rows=3), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_attention_is_the_baseline(family: str) -> None:
    """With queries of zero every visible token gets the same; what is visible is what the family
    says."""
    one = subject(family)
    seen: dict[int, int] = {}
    for block in one.history_blocks:
        attention = block.attn if family.startswith("dit") else block.attn1
        for parameter in attention.to_q.parameters():  # type: ignore[union-attr]
            torch.nn.init.zeros_(parameter)

    def count(place: Place, block: int, q: Tensor, k: Tensor) -> None:
        history = max(0, k.shape[2] // one.tokens - one.chunk)
        assert not history or block < len(one.history_blocks) - diagonal
        seen[place.chunk] = max(seen.get(place.chunk, 0), history + one.chunk)

    diagonal = VARIANTS[family].blocks.frame_diagonal if family in VARIANTS else 0
    watch_attention(one, count)
    chunks = FRAMES // one.chunk
    assert seen == {chunk: (chunk + 1) * one.chunk for chunk in range(chunks)}
    found: Any = attention_mass(one, AttentionProbe(queries=3)).data
    whole, total = len(one.history_blocks) - diagonal, len(one.history_blocks)
    for number in range(total):
        wanted = found["uniform_by_distance"] if number < whole else [1.0] + [0.0] * (FRAMES - 1)
        assert found["by_distance"][number] == pytest.approx(wanted, abs=1e-5)
        earlier = found["uniform_earlier_chunks"] if number < whole else 0.0
        assert found["earlier_chunks"][number] == pytest.approx(earlier, abs=1e-5)
    shares = {"wan": 0.0, "causal-3": 0.5, "scd-3": 0.5}  # the later of two chunks sees both
    every_frame = sum(frame / (frame + 1) for frame in range(1, FRAMES)) / (FRAMES - 1)
    assert found["uniform_earlier_chunks"] == pytest.approx(shares.get(family, every_frame))
    assert len(found["by_distance"]) == total


def test_mass_of_a_rollout_is_that_of_its_own_softmax() -> None:
    """Causal, block by block and step by step, distance by distance, without the code under
    test."""
    one = subject("causal", clips=1)
    sums = torch.zeros(len(one.history_blocks), 2, STEPS, FRAMES)

    def add(place: Place, block: int, q: Tensor, k: Tensor) -> None:
        assert place.step is not None
        if place.chunk >= 2:
            weights = torch.softmax((q[0] @ k[0].mT) / q.shape[-1] ** 0.5, -1).mean(1)  # (N, keys)
            for frame in range(place.chunk + 1):
                mass = weights[:, frame * one.tokens : (frame + 1) * one.tokens].sum(-1)
                sums[block, :, place.step, place.chunk - frame] += mass / (FRAMES - 2)

    watch_attention(one, add)
    found = attention_mass(one, AttentionProbe(queries=0, first_frame=2)).data
    torch.testing.assert_close(
        torch.tensor(found["by_distance"]), sums.mean((1, 2)), atol=1e-5, rtol=1e-4
    )
    other = 1 - sums[..., 0]
    torch.testing.assert_close(
        torch.tensor(found["other_frames_by_step"]), other.mean(1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(found["other_frames_by_head"]), other.mean(2), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(found["by_block_head_step_distance"]), sums, atol=1e-4, rtol=1e-3
    )
    assert found["earlier_chunks"] == found["other_frames"]


def test_mass_within_a_chunk_is_not_the_past() -> None:
    """Chunks of three: one softmax over all keys, split at the chunk's own frames."""
    one = subject("causal-3", clips=1)
    sums = torch.zeros(len(one.history_blocks), STEPS)

    def add(place: Place, block: int, q: Tensor, k: Tensor) -> None:
        assert place.step is not None
        if place.chunk == 1:
            weights = torch.softmax((q[0] @ k[0].mT) / q.shape[-1] ** 0.5, -1)
            sums[block, place.step] = weights[..., : 3 * one.tokens].sum(-1).mean()

    watch_attention(one, add)
    result = attention_mass(one, AttentionProbe(queries=0))
    found: Any = result.data
    torch.testing.assert_close(
        torch.tensor(found["earlier_chunks"]), sums.mean(1), atol=1e-5, rtol=1e-4
    )
    assert (
        "Mass on earlier chunks" in result.text
        and found["earlier_chunks"][0] < found["other_frames"][0]
    )


def test_blocks_that_do_not_run_at_every_step_are_refused() -> None:
    """Their steps would be zeros on disk, and their mass on other frames 1."""
    model = tiny.student(tiny.SKIPPING, dtype=torch.float32)
    one = replace(subject("causal"), model=model)
    ways: list[Callable[[], object]] = [
        lambda: similarity(one, SimilarityProbe()),
        lambda: pca(one, PcaProbe()),
        lambda: attention_mass(one, AttentionProbe()),
        lambda: watch_features(one, [0], lambda *_: None),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"blocks 2\.\.3 do not run at every step.*whole=true"):
            way()
    set_blocks(model, BlocksConfig())
    assert similarity(one, SimilarityProbe()).data["steps"] == STEPS


def test_a_full_disk_is_told_before_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"the features take .* GB.*TMPDIR"):
        similarity(subject("causal"), SimilarityProbe())


def test_files_and_errors(tmp_path: Path) -> None:
    """A few-step student too; figures are pictures; wrong choices are named."""
    one = subject("scd").with_sampler(FewStepSampler())
    for result in (
        similarity(one, SimilarityProbe()),
        pca(one, PcaProbe(steps=2)),
        attention_mass(one, AttentionProbe()),
    ):
        drawn = result.write(tmp_path)
        assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in drawn) and drawn
        written = json.loads((tmp_path / f"{result.name}.json").read_text())
        assert written["figures"] == [path.name for path in drawn]
        assert all(
            written[name] == json.loads(json.dumps(value)) for name, value in result.data.items()
        )
    row = torch.tensor([[0.1, 1 / 3], [2e-7, -5.0]])
    ProbeResult("rows", "", "", {"rows": rounded(row), "text": "[ 1, 2 ]"}).write(tmp_path)
    text = (tmp_path / "rows.json").read_text()
    assert "[0.1, 0.333333]" in text and "[2e-07, -5.0]" in text and '"[ 1, 2 ]"' in text
    with pytest.raises(UserError, match=r"frames is \[9\].*0..5"):
        similarity(one, SimilarityProbe((9,)))
    with pytest.raises(UserError, match=r"pca.blocks: \[44\].*0..3"):
        pca(one, PcaProbe(blocks=(44,)))
    with pytest.raises(UserError, match="first_frame is 6"):
        attention_mass(one, AttentionProbe(first_frame=6))
    with pytest.raises(UserError, match=r"similarity.shown: \[-1\].*0..3"):
        similarity(one, SimilarityProbe(shown=(-1,)))
    with pytest.raises(UserError, match="NaN or infinite"):
        ProbeResult("x", "", "", {"a": [float("nan")]}).write(tmp_path)
    with pytest.raises(UserError, match="two latent frames"):
        attention_mass(
            replace(one, shape=VideoShape(1, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)),
            AttentionProbe(),
        )
