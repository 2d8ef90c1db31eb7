"""Point-cloud completion: shapes, geometry, metrics, wiring, PCN."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnbench import Pattern
from attnbench.errors import UsageError
from attnbench.tasks import controls
from attnbench.tasks.cab import _clouds, _scans, pcc, pcc_probe
from attnbench.tasks.cab._pointr import Dimensions, Probe, distances, farthest, neighbours, pick
from attnbench.tasks.data import shapes
from attnbench.tasks.run import run_task

DIALS = shapes.Shapes(train=24, test=16, points=96)


def small(preset: pcc.PCCPreset, **changes: object) -> pcc.PCCPreset:
    """A preset that takes milliseconds."""
    dims = Dimensions(width=32, queries=8, stages=((24, 16), (12, 32)), fold=2, global_width=32, graph=4)
    workload = replace(preset.shape.workload, batch=4, heads=2, kv_heads=2, head_dim=16)
    return replace(
        preset,
        shape=replace(preset.shape, workload=workload, n=8, m=12),
        recipe=replace(preset.recipe, steps=2, warmup=1),
        dims=dims,
        clouds=_scans.Clouds(48, DIALS),
        encoder_layers=2,
        decoder_layers=2,
        **changes,
    )


def softmax_in(preset: pcc.PCCPreset, pattern: Pattern, name: str = "softmax"):
    def build(layer, shape=None):
        seen = preset.shape if shape is None else shape
        w = seen.workload
        return controls.build_attention(name, w.width, w.heads, pattern=pattern, n=seen.n, m=seen.m)

    return build


# ---- data ----------------------------------------------------------------------------------------------


def test_shapes_are_determined_by_their_dials_and_parts_differ():
    train, families = shapes.clouds(DIALS, "train")
    again, _ = shapes.clouds(DIALS, "train")
    test, _ = shapes.clouds(DIALS, "test")
    assert torch.equal(train, again)
    assert families[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert not (train[:16] == test).flatten(1).all(1).any()
    norms = train.norm(dim=2).amax(1)
    torch.testing.assert_close(norms, torch.full_like(norms, shapes.RADIUS))


def test_points_lie_on_the_surfaces_that_they_are_said_to():
    draw = np.random.default_rng(0)
    made = {family.__name__: family(draw, 400) for family in shapes.FAMILIES}
    assert all(points.shape == (400, 3) for points in made.values())
    radius = {name: np.linalg.norm(points[:, :2], axis=1) for name, points in made.items()}
    np.testing.assert_allclose(np.linalg.norm(made["_sphere"], axis=1), 1.0)
    np.testing.assert_allclose(np.abs(made["_box"]).max(1), 1.0)
    side = np.isclose(radius["_cylinder"], 1.0)
    assert (side | (np.abs(made["_cylinder"][:, 2]) == 1.0)).all()
    mantle = np.isclose(radius["_cone"], (1.0 - made["_cone"][:, 2]) / 2.0)
    assert (mantle | (made["_cone"][:, 2] == -1.0)).all()
    tube = np.hypot(radius["_torus"] - 1.0, made["_torus"][:, 2])
    np.testing.assert_allclose(tube, tube[0])
    assert ((made["_lamp"][:, 2] == 1.0) | np.isclose(radius["_lamp"], 0.1)).all()
    assert (np.abs(radius["_helix"] - 1.0) < 0.081).all()
    assert (made["_bracket"][:, [0, 2]].min(1) < -0.69).all()


def test_a_scan_keeps_the_points_that_are_farthest_from_the_viewpoint():
    points = torch.randn(3, 20, 3)
    view = torch.nn.functional.normalize(torch.randn(3, 3), dim=1)
    found = shapes.partial(points, view, 7)
    for cloud, viewpoint, kept in zip(points, view, found, strict=True):
        order = sorted(cloud.tolist(), key=lambda p: -math.dist(p, viewpoint.tolist()))
        assert sorted(kept.tolist()) == sorted(order[:7])


def test_batches_depend_on_the_seed_alone_and_views_change():
    scans = _scans.ShapeScans(48, DIALS, "cpu")
    draw, again, other = scans.batches(8, 0), scans.batches(8, 0), scans.batches(8, 1)
    first = [draw() for _ in range(6)]
    repeated = [again() for _ in range(6)]
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, repeated, strict=True)
    )
    assert not torch.equal(first[0][0], other()[0])
    scan, whole = first[0]
    assert scan.shape == (8, 48, 3)
    assert (distances(scan, whole).amin(2) == 0.0).all()
    seen = [{tuple(map(tuple, c.tolist())) for _, w in epoch for c in w} for epoch in (first[:3], first[3:])]
    assert seen[0] == seen[1]  # an epoch visits every cloud
    assert len(list(scans.test())) == 16


def test_clouds_with_few_points_are_filled_with_zeros():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(5, 3)).astype(np.float32)
    filled = _scans.resampled(points, 8, draw)
    assert filled.shape == (8, 3)
    assert sorted(filled[:5].tolist()) == sorted(points.tolist())
    assert (filled[5:] == 0.0).all()
    fewer = _scans.resampled(points, 3, draw)
    assert all(row in points.tolist() for row in fewer.tolist())


def test_pcn_is_read_resampled_and_mirrored(tmp_path, monkeypatch):
    points = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    listed = [{"taxonomy_id": t, "train": ["a"], "val": ["b"], "test": ["c"]} for t in ("02", "01")]
    (tmp_path / "pcn").mkdir()
    (tmp_path / "pcn/PCN.json").write_text(json.dumps(listed))
    for taxonomy in ("01", "02"):
        for part, name, views in (("train", "a", 8), ("val", "b", 1), ("test", "c", 1)):
            home = tmp_path / "pcn" / part
            (home / "complete" / taxonomy).mkdir(parents=True, exist_ok=True)
            np.save(home / "complete" / taxonomy / f"{name}.npy", points)
            (home / "partial" / taxonomy / name).mkdir(parents=True, exist_ok=True)
            for view in range(views):
                np.save(home / "partial" / taxonomy / name / f"{view:02d}.npy", points[:6])
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    with pytest.raises(UsageError, match="28,974"):
        _scans.load(_scans.Clouds(8, None), "cpu")
    monkeypatch.setattr(_scans.PCN, "published", {"train": 2, "val": 2, "test": 2})
    scans = _scans.load(_scans.Clouds(8, None), "cpu")
    assert scans.corpus.origin == "real"
    draw, again = scans.batches(2, 3), scans.batches(2, 3)
    signs = set()
    for _ in range(12):
        scan, whole = draw()
        repeated = again()
        assert torch.equal(scan, repeated[0])
        assert torch.equal(whole, repeated[1])
        assert scan.shape == (2, 8, 3)
        ratio = whole / torch.from_numpy(points)
        assert (ratio == ratio[:, :1]).all()
        signs |= {tuple(r) for r in ratio[:, 0].tolist()}
        assert (distances(scan[:, :6], whole).amin(2) == 0.0).all()
    assert signs == {(x, 1.0, z) for x in (-1.0, 1.0) for z in (-1.0, 1.0)}
    tested = list(scans.test())
    assert [category for _, _, category in tested] == [1, 0]
    assert tested[0][0].shape == (1, 8, 3)


# ---- geometry and metrics ------------------------------------------------------------------------------


def test_farthest_points_are_those_of_the_definition():
    points = torch.randn(2, 30, 3)
    found = farthest(points, 9)
    for cloud, index in zip(points, found.tolist(), strict=True):
        chosen = [0]
        while len(chosen) < 9:
            distance = torch.cdist(cloud, cloud[chosen]).amin(1)
            chosen.append(int(distance.argmax()))
        assert index == chosen


def test_neighbours_are_the_nearest_and_pick_gathers_rows():
    of, among = torch.randn(2, 5, 3), torch.randn(2, 11, 3)
    index = neighbours(of, among, 4)
    expected = (of[:, :, None] - among[:, None]).square().sum(-1).argsort(-1)[..., :4]
    assert torch.equal(index.sort(-1).values, expected.sort(-1).values)
    features = torch.randn(2, 11, 6)
    gathered = pick(features, index)
    assert gathered.shape == (2, 5, 4, 6)
    assert torch.equal(gathered[1, 2, 3], features[1, index[1, 2, 3]])


def test_the_loss_is_the_chamfer_distance_with_a_finite_gradient(monkeypatch):
    p, g = torch.randn(3, 7, 3, requires_grad=True), torch.randn(3, 9, 3)
    distance = (p[:, :, None] - g[:, None]).square().sum(-1).sqrt()
    expected = 0.5 * (distance.amin(2).mean() + distance.amin(1).mean())
    found = _clouds.chamfer_loss(p, g)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, p, retain_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, p)[0])
    monkeypatch.setattr(_clouds, "PAIRS_AT_ONCE", 2 * 7 * 9)  # two clouds, then the third
    torch.testing.assert_close(_clouds.chamfer_loss(p, g), expected)
    same = g.clone().requires_grad_()
    _clouds.chamfer_loss(same, g).backward()
    assert (same.grad == 0.0).all()


def test_scores_of_hand_made_clouds():
    one, other = np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, 0.1, 0.0]])
    found = _clouds.scores(one, other)
    assert found["cd_l1"] == pytest.approx(100.0)
    assert found["cd_l2"] == pytest.approx(20.0)
    assert found["f_score@r=0.01"] == found["f_score@r=0.05"] == 0.0
    assert _clouds.scores(one, one) == {
        "cd_l1": 0.0,
        "cd_l2": 0.0,
        "f_score@r=0.01": 1.0,
        "f_score@r=0.05": 1.0,
    }
    padded = np.concatenate([one, np.zeros((4, 3))])
    assert _clouds.scores(padded, one)["cd_l1"] == 0.0
    two = np.array([[1.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    half = _clouds.scores(one, two)  # every predicted point is right, half of the surface is found
    assert half["f_score@r=0.01"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert half["cd_l1"] == pytest.approx(1000 * 0.5 * (0.0 + 2.0))


def test_a_prediction_that_is_not_finite_scores_the_worst():
    found = _clouds.scores(np.array([[np.nan, 0.0, 1.0]]), np.ones((2, 3)))
    assert found["cd_l1"] == math.inf
    assert found["f_score@r=0.01"] == 0.0


def test_scores_are_averaged_within_categories_first():
    scored = [(0, {"s": 1.0}), (0, {"s": 3.0}), (1, {"s": 10.0})]
    assert _clouds.by_category(scored) == {"s": 6.0}


# ---- wiring --------------------------------------------------------------------------------------------


def test_the_scan_reaches_the_probe_through_cross_attention_alone():
    preset = small(pcc_probe.TINY)
    scans = torch.randn(2, 48, 3)
    for name, reached in (("softmax", True), ("no_mixing", False)):
        model = pcc.network(preset, Pattern.NC, softmax_in(preset, Pattern.NC, name)).eval()
        with torch.no_grad():
            _, dense = model(scans)
        assert dense.shape == (2, 8 * 4, 3)
        assert torch.equal(dense[0], dense[1]) is not reached


def test_the_published_wiring_bypasses_cross_attention_and_keeps_the_scan():
    preset = small(pcc.TINY)
    model = pcc.network(preset, Pattern.NC, softmax_in(preset, Pattern.NC, "no_mixing")).eval()
    scans = torch.randn(2, 48, 3)
    with torch.no_grad():
        coarse, dense = model(scans)
    assert coarse.shape == (2, 16, 3)
    assert dense.shape == (2, 8 * 4 + 48, 3)
    assert torch.equal(dense[:, 32:], scans)
    assert not torch.allclose(dense[0, :32], dense[1, :32])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Pattern.NC, [(4, 8, 12), (5, 8, 12)]),
        (Pattern.NS, [(0, 12, 12), (1, 12, 12), (2, 8, 8), (3, 8, 8)]),
    ],
)
def test_the_layers_of_one_pattern_are_under_test(pattern, expected):
    preset = small(pcc.TINY)
    asked = []
    build = softmax_in(preset, pattern)

    def attention(layer, shape=None):
        asked.append((layer, shape.n, shape.m))
        return build(layer, shape)

    pcc.network(preset, pattern, attention)
    assert asked == expected
    assert pcc.TASK.workload("tiny", Pattern.NC).n == pcc.TINY.dims.queries
    assert pcc.TASK.workload("tiny", Pattern.NS).n == pcc.TINY.dims.stages[-1][0]


def test_sizes_of_the_presets_agree():
    for task in (pcc.TASK, pcc_probe.TASK):
        for preset in task.presets.values():
            assert preset.shape.workload.width == preset.dims.width
            assert preset.shape.n == preset.dims.queries
            assert preset.shape.m == preset.dims.stages[-1][0]
    paper = pcc.PAPER
    assert paper.dims.queries * paper.dims.fold**2 + paper.clouds.scanned == 16_384


def test_the_paper_preset_builds_and_its_layers_run_on_fewer_points():
    paper = pcc.PAPER
    with torch.device("meta"):
        model = pcc.network(paper, Pattern.NC, softmax_in(paper, Pattern.NC))
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 60e6
    reduced = replace(
        paper,
        shape=replace(paper.shape, n=16, m=24),
        dims=replace(paper.dims, queries=16, stages=((64, 32), (24, 64), (24, 64), (24, 128))),
        encoder_layers=2,
        decoder_layers=2,
    )
    model = pcc.network(reduced, Pattern.NC, softmax_in(reduced, Pattern.NC))
    coarse, dense = model(torch.randn(2, 64, 3))
    assert dense.shape == (2, 16 * 4 + 64, 3)
    (
        _clouds.chamfer_loss(coarse, dense.detach()) + _clouds.chamfer_loss(dense, torch.randn(2, 96, 3))
    ).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "k_proj.bias" not in name)


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
@pytest.mark.parametrize(("task", "pattern"), [("pcc", "NC"), ("pcc", "NS"), ("pcc_probe", "NC")])
def test_every_pattern_takes_two_steps(monkeypatch, task, pattern, mechanism):
    module = importlib.import_module(f"attnbench.tasks.cab.{task}")
    preset = small(module.TASK.presets["tiny"])
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": preset}))
    row = run_task(task, mechanism, pattern=pattern)
    assert row["steps"] == 2
    assert 0.0 < row["metric_value"] < 1000.0
    assert row["data"] == "synthetic: 8 families of analytic shapes"
    assert set(json.loads(row["metrics"])) == {"cd_l1", "cd_l2", "f_score@r=0.01", "f_score@r=0.05"}


def test_a_perfect_model_scores_zero():
    preset = small(pcc_probe.TINY)
    session = pcc.PCCSession(preset, Pattern.NC, "cpu")
    truths = iter([whole for _, whole, _ in session.scans.test()])

    class Oracle(torch.nn.Module):
        def forward(self, scan):
            return scan, next(truths)[None]

    found = session.evaluate(Oracle())
    assert found["cd_l1"] == found["cd_l2"] == 0.0
    assert found["f_score@r=0.01"] == 1.0


def test_without_scipy_the_task_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("attnbench.tasks.data.extras.importlib.import_module", absent)
    with pytest.raises(UsageError, match=r"no SciPy here .* pip install 'attnbench\[tasks\]'"):
        pcc.TASK.open("tiny", Pattern.NC, "cpu")


def test_without_pcn_the_paper_preset_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ATTNBENCH_DATA", raising=False)
    with pytest.raises(UsageError, match=r"data set pcn .* Register at shapenet\.org"):
        pcc.TASK.open("paper", Pattern.NC, "cpu")


def test_the_probe_is_the_same_task_with_other_wiring():
    assert pcc_probe.TINY.wiring is Probe
    assert pcc_probe.PAPER.dims == pcc.PAPER.dims
