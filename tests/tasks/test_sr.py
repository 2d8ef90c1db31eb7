"""Super-resolution: images, diffusion, the U-Net, the mosaic."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attnbench import Pattern
from attnbench.errors import UsageError
from attnbench.tasks import controls
from attnbench.tasks.cab import _sr_data, sr, sr_probe
from attnbench.tasks.cab._diffusion import Diffusion
from attnbench.tasks.cab._unet import SpatialAttention, UNetDimensions
from attnbench.tasks.data import pictures
from attnbench.tasks.run import run_task

DRAW = np.random.default_rng(0)


def build(name: str = "softmax"):
    def attention(layer, shape):
        w = shape.workload
        return controls.build_attention(name, w.width, w.heads, pattern="NS", n=shape.n, m=shape.m)

    return attention


# ---- images --------------------------------------------------------------------------------------------


def test_images_survive_the_way_to_numbers_and_back():
    images = [DRAW.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    numbers = _sr_data.to_tensor(images)
    assert numbers.shape == (3, 3, 8, 8)
    assert numbers.abs().max() <= 1.0
    np.testing.assert_array_equal(_sr_data.to_pixels(numbers), np.stack(images))
    assert _sr_data.to_pixels(torch.full((1, 3, 2, 2), 7.0)).max() == 255


def test_metrics_of_hand_made_images():
    truth = DRAW.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    found = pictures.psnr_ssim(truth + np.uint8(1), truth)
    assert found["psnr_db"] == pytest.approx(20.0 * math.log10(255.0))
    assert 0.99 < found["ssim"] < 1.0
    noise = pictures.psnr_ssim(DRAW.integers(0, 255, (32, 32, 3), dtype=np.uint8), truth)
    assert noise["psnr_db"] < 10.0
    assert abs(noise["ssim"]) < 0.1


def test_reduction_takes_means_and_tiles_cover_without_overlap():
    image = DRAW.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    half = pictures.reduced(image, 2)
    assert half.shape == (4, 6, 3)
    assert half[1, 2, 0] == round(float(image[2:4, 4:6, 0].mean()))
    tiles = pictures.tiles(image, 4)
    assert len(tiles) == 2 * 3
    np.testing.assert_array_equal(tiles[4], image[4:8, 4:8])


def test_photos_give_reproducible_pairs_and_hold_two_of_them_out():
    wanted = _sr_data.Pictures("photos", high=32, low=8, tested=10)
    photos = _sr_data.Photos(wanted)
    draw, again, other = photos.batches(4, 0), photos.batches(4, 0), photos.batches(4, 1)
    condition, sharp = draw()
    assert condition.shape == sharp.shape == (4, 3, 32, 32)
    assert torch.equal(condition, again()[0])
    assert not torch.equal(condition, other()[0])
    small = torch.nn.functional.avg_pool2d(condition - sharp, 32)
    assert small.abs().max() < 0.05  # the same picture, without its details
    assert len(photos.test()) == 10
    blurred, tile = photos.test()[3]
    np.testing.assert_array_equal(blurred, _sr_data.bicubic(tile, 8))
    assert not any((tile == part[:32, :32]).all() for part in photos.train_part)
    assert len(pictures.TRAIN_PHOTOS) * 4 == len(photos.train_part)
    assert not set(pictures.TRAIN_PHOTOS) & set(pictures.TEST_PHOTOS)


def test_faces_are_read_from_both_sets(tmp_path, monkeypatch):
    from PIL import Image

    for name in ("ffhq", "celebahq"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = DRAW.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    wanted = _sr_data.Pictures("faces", high=16, low=4, tested=2)
    with pytest.raises(UsageError, match="70,000"):
        _sr_data.load(wanted)
    monkeypatch.setattr(_sr_data.FFHQ, "published", {"images": 3})
    faces = _sr_data.load(wanted)
    draw, again = faces.batches(2, 5), faces.batches(2, 5)
    for _ in range(4):
        found, repeated = draw(), again()
        assert found[0].shape == found[1].shape == (2, 3, 16, 16)
        assert torch.equal(found[0], repeated[0])
    assert [sharp.shape for _, sharp in faces.test()] == [(16, 16, 3)] * 2
    assert faces.corpus.label == "real: ffhq, celebahq"


# ---- diffusion -----------------------------------------------------------------------------------------

SCHEDULE = Diffusion(steps=20, first=1e-4, last=0.5, sampled=20)


def test_levels_fall_from_one_and_are_those_of_the_variances():
    levels = SCHEDULE.levels()
    assert len(levels) == 21
    assert levels[0] == 1.0
    assert (levels.diff() < 0.0).all()
    assert levels[2] ** 2 == pytest.approx((1 - 1e-4) * (1 - 1e-4 - (0.5 - 1e-4) / 19))
    for preset in (sr.PAPER, sr.SMALL):
        assert preset.diffusion.levels()[-1] < 0.02  # what is left of the image at the end


def test_noised_images_have_the_level_that_is_told():
    x, noise = torch.ones(500, 1, 4, 4), torch.zeros(500, 1, 4, 4)
    noisy, level = SCHEDULE.noised(x, noise, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy[:, 0, 0, 0], level)
    assert 0.0 < level.min() < 0.1
    assert level.max() < 1.0
    noisy, level = SCHEDULE.noised(noise, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy[:, 0, 0, 0].square() + level.square(), torch.ones(500))


@pytest.mark.parametrize("sampled", [1, 7, 20])
def test_sampling_with_the_true_noise_gives_the_image(sampled):
    truth = torch.rand(2, 3, 4, 4) * 2.0 - 1.0
    visited = []

    def oracle(x, level):
        visited.append(float(level[0]))
        shaped = level.view(-1, 1, 1, 1)
        return (x - shaped * truth) / (1.0 - shaped.square()).sqrt()

    draw = torch.Generator().manual_seed(0)
    found = replace(SCHEDULE, sampled=sampled).sample(oracle, torch.randn(2, 3, 4, 4), draw)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
    assert len(visited) == sampled
    assert visited == sorted(visited)
    assert visited[0] == pytest.approx(float(SCHEDULE.levels()[-1]))


def test_a_step_has_the_mean_and_variance_of_the_posterior():
    from attnbench.tasks.cab import _diffusion

    before, here, x, clean = 0.9, 0.6, 0.3, -0.2
    beta = 1.0 - here**2 / before**2
    mean = before * beta / (1 - here**2) * clean + math.sqrt(1 - beta) * (1 - before**2) / (1 - here**2) * x
    noise = (x - here * clean) / math.sqrt(1 - here**2)
    start = torch.full((1, 1, 200, 200), x)
    draw = torch.Generator().manual_seed(0)
    found = _diffusion._step(start, lambda x, level: torch.full_like(x, noise), before, here, draw)
    assert found.mean().item() == pytest.approx(mean, abs=0.01)
    assert found.var().item() == pytest.approx((1 - before**2) / (1 - here**2) * beta, rel=0.03)


# ---- the U-Net -----------------------------------------------------------------------------------------


def maps_of(model: nn.Module) -> list[SpatialAttention]:
    return [module for module in model.modules() if isinstance(module, SpatialAttention)]


def test_the_paper_preset_has_the_blocks_of_sr3_and_attention_at_five_resolutions():
    asked = []

    def attention(layer, shape):
        asked.append((layer, shape.grid, shape.workload.width))
        return build()(layer, shape)

    with torch.device("meta"):
        model = sr.network(sr.PAPER, attention)
    assert [layer for layer, _, _ in asked] == list(range(21))
    sides = [grid[0] for _, grid, _ in asked]
    assert (
        sides == [128] * 2 + [64] * 2 + [32] * 2 + [16] * 2 + [8] + [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3
    )
    assert {side: width for _, (side, _), width in asked} == {128: 64, 64: 128, 32: 256, 16: 512, 8: 512}
    assert 80e6 < sum(p.numel() for p in model.parameters()) < 120e6
    assert sr.PAPER.shape.n == 128 * 128
    assert sr.PAPER.shape.grid == (128, 128)


def test_the_network_of_the_paper_takes_a_step_at_fewer_pixels():
    dims = UNetDimensions(16, 8, (1, 2, 4, 8, 8), attended=(2, 4, 8, 16), blocks=2, groups=8, dropout=0.2)
    preset = replace(sr.PAPER, dims=dims, diffusion=Diffusion(2000, 1e-6, 1e-2, sampled=3))
    model = sr.network(preset, build())
    assert len(maps_of(model)) == 21
    noisy, level = preset.diffusion.noised(torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16))
    out = model(torch.cat([noisy, noisy], 1), level)
    assert out.shape == (2, 3, 16, 16)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_gets_the_pixels_row_by_row_with_their_grid():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, context=None, *, grid=None, key_padding_mask=None):
            seen.append((x, grid))
            return torch.zeros_like(x)

    block = SpatialAttention(8, 4, Spy())
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(block(x), x)
    tokens, grid = seen[0]
    assert grid == (3, 5)
    assert torch.equal(tokens[1, 1 * 5 + 2], block.norm(x)[1, :, 1, 2])


def test_an_untrained_one_step_model_is_bicubic_enlargement():
    session = sr.SRSession(replace(sr.TINY, pictures=replace(sr.TINY.pictures, tested=6)), "cpu")
    found = session.evaluate(session.model(build()).eval())
    assert found["psnr"] == found["bicubic_psnr"]
    assert found["ssim"] == found["bicubic_ssim"]
    assert 18.0 < found["psnr"] < 40.0


def test_a_model_that_knows_the_answer_scores_best():
    session = sr.SRSession(replace(sr.TINY, pictures=replace(sr.TINY.pictures, tested=6)), "cpu")
    pairs = session.pairs.test()
    blurred, sharp = (_sr_data.to_tensor(list(images)) for images in zip(*pairs, strict=True))

    class Nearly(nn.Module):
        def forward(self, x):
            return sharp - blurred + 1.0 / 127.5

    assert session.evaluate(Nearly())["psnr"] == pytest.approx(20.0 * math.log10(255.0), abs=0.3)


def short_sr(preset: sr.SRPreset) -> sr.SRPreset:
    dims = UNetDimensions(
        16, 8, (1, 2), attended=(8,), blocks=1, groups=4, noise_level=preset.dims.noise_level
    )
    workload = replace(preset.shape.workload, batch=2, head_dim=16)
    return replace(
        preset,
        shape=replace(preset.shape, workload=workload, n=64, m=64, grid=(8, 8)),
        recipe=replace(preset.recipe, steps=2, warmup=1),
        dims=dims,
        pictures=replace(preset.pictures, high=16, low=4, tested=3),
        diffusion=replace(preset.diffusion, sampled=2) if preset.diffusion else None,
    )


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing", "swin_window_attention"])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_one_step_and_diffusion_take_two_steps(monkeypatch, preset, mechanism):
    short = short_sr(sr.TASK.presets[preset])
    monkeypatch.setattr(sr, "TASK", replace(sr.TASK, presets={preset: short}))
    row = run_task("sr", mechanism, preset=preset)
    assert row["steps"] == 2
    assert 0.0 < row["metric_value"] < 50.0
    assert row["geometry"] == ("native" if mechanism == "swin_window_attention" else None)
    assert set(json.loads(row["metrics"])) == {"psnr", "ssim", "bicubic_psnr", "bicubic_ssim"}


def test_without_the_library_the_task_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("attnbench.tasks.data.extras.importlib.import_module", absent)
    for task, library in ((sr.TASK, "scikit-image"), (sr_probe.TASK, "scikit-learn")):
        with pytest.raises(UsageError, match=rf"no {library} here .* pip install 'attnbench\[tasks\]'"):
            task.open("tiny", Pattern.NS, "cpu")


# ---- the mosaic ----------------------------------------------------------------------------------------


def test_a_mosaic_has_one_sharp_copy_and_blurred_others():
    digits = torch.rand(3, 8, 8)
    sharp = torch.tensor([0, 3, 1])
    pixels, truth = sr_probe.mosaic(digits, sharp, 2)
    assert pixels.shape == (3, 256, sr_probe.CHANNELS)
    for index in range(3):
        for y in range(16):
            for x in range(16):
                copy, cell = (y // 8) * 2 + x // 8, digits[index]
                value, mask = pixels[index, 16 * y + x, :2].tolist()
                expected = cell[y % 8, x % 8].item()
                assert truth[index, 16 * y + x].item() == expected
                if copy == sharp[index]:
                    assert (value, mask) == (expected, 1.0)
                else:
                    top, left = (y % 8) // 4 * 4, (x % 8) // 4 * 4
                    assert value == pytest.approx(
                        cell[top : top + 4, left : left + 4].mean().item(), abs=1e-6
                    )
                    assert mask == 0.0


def test_positions_tell_the_pixels_of_a_copy_apart_and_repeat_in_the_next():
    place = sr_probe._positions(16, torch.device("cpu")).view(16, 16, -1)
    torch.testing.assert_close(place[:8, :8], place[8:, 8:], atol=1e-5, rtol=0.0)
    flat = place[:8, :8].flatten(0, 1)
    assert (torch.cdist(flat, flat) + 9.0 * torch.eye(64)).min() > 0.5


def test_without_mixing_a_pixel_depends_on_itself_alone():
    pixels, _ = sr_probe.mosaic(torch.rand(1, 8, 8), torch.tensor([0]), 2)
    changed = pixels.clone()
    changed[:, 40] += 1.0
    for name, mixes in (("no_mixing", False), ("softmax", True)):
        attention = build(name)(0, sr_probe.TINY.shape)
        model = sr_probe.PixelModel(16, [attention]).eval()
        with torch.no_grad():
            differs = (model(pixels) != model(changed))[0]
        assert differs[40]
        others = torch.cat([differs[:40], differs[41:]])
        assert bool(others.any()) is mixes


def test_scores_of_models_that_know_all_and_nothing():
    session = sr_probe.MosaicSession(sr_probe.TINY, "cpu")

    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros(x.shape[:2])

    found = session.evaluate(Nothing())
    assert found["psnr"] == found["blurred_psnr"]
    assert 8.0 < found["psnr"] < 18.0
    parts = iter(session.test_part.split(64))

    class Everything(nn.Module):
        def forward(self, x):
            return next(parts).repeat(1, 2, 2).flatten(1) - x[..., 0]

    assert session.evaluate(Everything())["psnr"] > 100.0


def test_mosaics_depend_on_the_seed_alone_and_are_of_training_digits():
    session = sr_probe.MosaicSession(sr_probe.TINY, "cpu")
    assert len(session.train_part) == 1500
    assert len(session.test_part) == 297
    draw, again, other = session.batches(0), session.batches(0), session.batches(1)
    pixels, truth = draw()
    assert torch.equal(pixels, again()[0])
    assert not torch.equal(pixels, other()[0])
    digit = truth[0].view(16, 16)[:8, :8]
    assert (session.train_part == digit).flatten(1).all(1).any()
    assert session.corpus.origin == "embedded"


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing", "swin_window_attention"])
def test_the_mosaic_takes_two_steps(monkeypatch, mechanism):
    tiny = replace(sr_probe.TINY, recipe=replace(sr_probe.TINY.recipe, steps=2, warmup=1))
    monkeypatch.setattr(sr_probe, "TASK", replace(sr_probe.TASK, presets={"tiny": tiny}))
    row = run_task("sr_probe", mechanism)
    assert row["steps"] == 2
    assert -10.0 < row["metric_value"] < 20.0
    assert row["data"] == "embedded: digits of scikit-learn"


@pytest.mark.parametrize("task", ["sr", "sr_probe"])
def test_small_presets_build_on_the_meta_device(task):
    module = importlib.import_module(f"attnbench.tasks.cab.{task}")
    with torch.device("meta"):
        if task == "sr":
            model = module.network(module.SMALL, build())
        else:
            model = module.PixelModel(64, [build()(layer, module.SMALL.shape) for layer in range(2)])
            assert model(torch.zeros(1, 64 * 64, module.CHANNELS)).shape == (1, 64 * 64)
    assert sum(p.numel() for p in model.parameters()) > 10_000
