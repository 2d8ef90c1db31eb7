"""Loaders: a miniature of every layout is written and read back; what is absent or damaged is named."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attnbench.errors import UsageError
from attnbench.tasks.data import caches, sources
from attnbench.tasks.data.catalogue import CATALOGUE
from attnbench.tasks.data.loaders import clouds, images, speech, tables
from attnbench.tasks.data.sources import DataDamaged, DataMissing, find

DRAW = np.random.default_rng(0)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels(*shape: int) -> np.ndarray:
    return DRAW.integers(0, 256, shape, dtype=np.uint8)


# ---- finding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_missing_data_set_says_where_what_and_how(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataMissing) as raised:
        find(name)
    text, entry = str(raised.value), CATALOGUE[name]
    assert raised.value.exit_code == 2
    for words in (
        str(tmp_path / "shared" / name),
        str(tmp_path / ".cache" / "attnbench" / name),
        entry.layout[0],
        entry.size,
        entry.licence,
        entry.home,
        entry.command or entry.by_hand,
    ):
        assert words in text
    assert sources.layout(name).splitlines() == list(entry.layout)


def test_the_search_goes_from_the_argument_to_the_variable_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path / "shared"))
    text = "date,x\n"
    cache = write(tmp_path / ".cache/attnbench/ett/ETTh1.csv", text)
    assert find("ett").root == cache.parent
    shared = write(tmp_path / "shared/ett/ETT-small/ETTh1.csv", text)
    assert find("ett").root == shared.parent
    given = write(tmp_path / "given/ett/ETTh2.csv", text)
    assert find("ett", tmp_path / "given").root == given.parent
    assert find("ett", given.parent).root == given.parent
    with pytest.raises(DataMissing, match="nowhere"):
        find("ett", tmp_path / "nowhere")


def test_an_unknown_data_set_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean ljspeech"):
        find("ljspeach")


def test_finding_data_imports_no_torch():
    code = (
        "import sys\nfrom attnbench.tasks.data import sources, prepare\n"
        "[sources.loader(name) for name in sources.CATALOGUE]\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_states_list_every_data_set_and_say_what_is_wrong(tmp_path):
    write(tmp_path / "ett/ETTh1.csv", "date,a\n2016-07-01 00:00:00,1\n")
    found = {state.data_set.name: state for state in sources.states(tmp_path, verify=True)}
    assert list(found) == list(CATALOGUE)
    assert found["pg19"].summary == "missing"
    assert "ETTh1.csv" in found["ett"].summary
    assert next(s for s in sources.states(tmp_path) if s.data_set.name == "ett").summary == "found"


# ---- text ----------------------------------------------------------------------------------------------


def test_pg19_from_text_files(tmp_path):
    for part, names in (("train", "12"), ("validation", "3"), ("test", "4")):
        for name in names:
            write(tmp_path / part / f"{name}.txt", f"Book {name}:\r\nça va\n")
    write(tmp_path / "metadata.csv", '1,"Title, the first",1850,http://a\n2,Second,1851,http://b\n')
    found = find("pg19", tmp_path)
    books = list(found.books("train"))
    assert [book.title for book in books] == ["Title, the first", "Second"]
    assert books[0].text == "Book 1:\r\nça va\n"
    assert [(c.part, c.observed) for c in found.verify()] == [("train", 2), ("validation", 1), ("test", 1)]
    with pytest.raises(UsageError, match=r"2 in train \(published: 28,602\)"):
        found.require_complete()
    write(tmp_path / "test/4.txt", b"\xff\xfe")
    with pytest.raises(DataDamaged, match=r"4\.txt: observed no UTF-8 at byte 0"):
        found.verify()
    write(tmp_path / "metadata.csv", "1,2\n")
    with pytest.raises(DataDamaged, match=r"metadata\.csv: observed 2 columns in line 1"):
        found.sample("train")


def test_pg19_from_parquet(tmp_path):
    for part in ("train", "validation", "test"):
        for number in range(2):
            parquet(
                tmp_path / part / f"{number:05d}.parquet",
                text=[f"{part} {number}"],
                short_book_title=["T"],
                publication_date=[1850],
            )
    found = find("pg19", tmp_path)
    assert [book.text for book in found.books("test")] == ["test 0", "test 1"]
    assert [c.observed for c in found.verify()] == [2, 2, 2]


def test_a_parquet_file_with_other_columns_or_bytes_is_named(tmp_path):
    parquet(tmp_path / "test/00000.parquet", content=["x"])
    with pytest.raises(DataDamaged, match=r"00000\.parquet: observed columns content"):
        next(find("pg19", tmp_path).books("test"))
    write(tmp_path / "test/00000.parquet", b"PAR1 and no more")
    with pytest.raises(DataDamaged, match=r"00000\.parquet"):
        find("pg19", tmp_path).count("test")
    with pytest.raises(DataMissing, match="observed no train"):
        next(find("pg19", tmp_path).books("train"))


def test_multi_news_from_lines_and_from_parquet(tmp_path):
    for stem in ("train", "val", "test"):
        write(
            tmp_path / f"lines/{stem}.src.cleaned", "First. NEWLINE_CHAR More. ||||| Second.\nOther. |||||\n"
        )
        write(tmp_path / f"lines/{stem}.tgt", "– A summary.\nB\n")
    for part in ("train", "validation", "test"):
        parquet(
            tmp_path / f"hub/{part}/00000.parquet",
            document=["First. \n More. ||||| Second.", "Other. |||||"],
            summary=["– A summary.", "B"],
        )
    lines, hub = find("multi_news", tmp_path / "lines"), find("multi_news", tmp_path / "hub")
    assert list(lines.examples("validation")) == list(hub.examples("validation"))
    first = lines.sample("train")
    assert first.articles == ("First. \n More.", "Second.")
    assert first.summary == "– A summary."
    assert [c.observed for c in lines.verify()] == [c.observed for c in hub.verify()] == [2, 2, 2]
    write(tmp_path / "lines/val.tgt", "A\n")
    with pytest.raises(DataDamaged, match=r"val\.src\.cleaned: observed 2 and 1 lines"):
        list(lines.examples("validation"))


def test_imdb_from_files_and_from_parquet(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / f"a/aclImdb/{part}/pos/0_9.txt", "good")
        write(tmp_path / f"a/aclImdb/{part}/neg/0_2.txt", "bad")
        parquet(tmp_path / f"b/plain_text/{part}/0000.parquet", text=["bad", "good"], label=[0, 1])
    for folder in ("a", "b"):
        found = find("imdb", tmp_path / folder)
        assert list(found.reviews("test")) == [("bad", 0), ("good", 1)]
        assert [c.observed for c in found.verify()] == [2, 2]


def test_the_tokeniser_of_gpt2(tmp_path):
    path = write(tmp_path / "tokenizer.json", json.dumps({"model": {"vocab": {"b": 1, "a": 0}}}))
    found = find("gpt2", tmp_path)
    assert (found.path, found.sample("tokens")) == (path, "a")
    with pytest.raises(UsageError, match=r"2 in tokens \(published: 50,257\)"):
        found.require_complete()
    for content in ("{", "[]", '{"model": {"vocab": []}}'):
        write(path, content)
        with pytest.raises(DataDamaged, match=r"tokenizer\.json: observed no vocabulary"):
            found.verify()


# ---- speech --------------------------------------------------------------------------------------------


def recording(path: Path, samples: np.ndarray, rate: int = 22_050) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_ljspeech(tmp_path):
    root = tmp_path / "LJSpeech-1.1"
    ids = ("LJ001-0001", "LJ003-0001", "LJ004-0001")
    write(root / "metadata.csv", "".join(f'{i}|He said "1"|He said "one"\n' for i in ids))
    samples = np.array([0, 16_384, -32_768, 32_767])
    for name in ids:
        recording(root / "wavs" / f"{name}.wav", samples)
    found = find("ljspeech", tmp_path)
    assert {part: [c.id for c in found.clips(part)] for part in found.published} == {
        "train": ["LJ004-0001"],
        "dev": ["LJ003-0001"],
        "test": ["LJ001-0001"],
    }
    clip, heard = found.sample("test")
    assert clip.normalised == 'He said "one"'
    assert heard.dtype == np.float32
    assert heard.tolist() == [0.0, 0.5, -1.0, 32_767 / 32_768]
    assert [c.observed for c in found.verify()] == [1, 1, 1]
    recording(root / "wavs/LJ001-0001.wav", samples, rate=16_000)
    with pytest.raises(DataDamaged, match=r"LJ001-0001\.wav: observed 16000 Hz"):
        found.sample("test")
    write(root / "wavs/LJ001-0001.wav", b"RIFF")
    with pytest.raises(DataDamaged, match=r"LJ001-0001\.wav"):
        found.sample("test")
    (root / "wavs/LJ001-0001.wav").unlink()
    with pytest.raises(DataMissing, match=r"wavs/LJ001-0001\.wav"):
        found.sample("test")
    write(root / "metadata.csv", "a|b\n")
    with pytest.raises(DataDamaged, match=r"metadata\.csv: observed 2 fields in line 1"):
        find("ljspeech", tmp_path).clips("test")


LONG_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = "say ""hi"" 7"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.21
            text = "HH"
        intervals [2]:
            xmin = 0.21
            xmax = 0.5
            text = ""
"""
SHORT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.5
<exists>
1
"IntervalTier"
"phones"
0
0.5
2
0
0.21
"HH"
0.21
0.5
""
"""


@pytest.mark.parametrize("content", [LONG_GRID, SHORT_GRID])
@pytest.mark.parametrize("packed", [True, False])
def test_alignments_from_the_archive_and_from_files(tmp_path, content, packed):
    if packed:
        with zipfile.ZipFile(tmp_path / "ljspeech_mfa.zip", "w") as file:
            file.writestr("LJSpeech/LJ001-0001.TextGrid", content)
    else:
        write(tmp_path / "LJSpeech/LJ001-0001.TextGrid", content)
    found = find("ljspeech-mfa", tmp_path)
    assert found.ids() == ("LJ001-0001",)
    assert found.phones("LJ001-0001") == (speech.Interval(0.0, 0.21, "HH"), speech.Interval(0.21, 0.5, ""))
    assert found.verify()[0].complete
    with pytest.raises(DataMissing, match="LJ009-0009"):
        found.phones("LJ009-0009")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello", "no TextGrid header"),
        (LONG_GRID.replace("phones", "tones"), "tiers words, tones"),
        (LONG_GRID[:-60], "1 of 2 entries in tier 'phones'"),
        (LONG_GRID.replace('"IntervalTier"', '"Other"'), "tier 1 of kind 'Other'"),
        (SHORT_GRID.replace('"HH"', "3"), "an entry 0.0, 0.21, 3.0"),
    ],
)
def test_damaged_textgrids_are_named(tmp_path, content, words):
    path = write(tmp_path / "x.TextGrid", content)
    with pytest.raises(DataDamaged, match=r"x\.TextGrid: observed") as raised:
        speech.parse_textgrid(content, path)
    assert words in str(raised.value)


def test_a_damaged_archive_is_named(tmp_path):
    write(tmp_path / "ljspeech_mfa.zip", b"no zip")
    with pytest.raises(DataDamaged, match=r"ljspeech_mfa\.zip"):
        find("ljspeech-mfa", tmp_path).ids()


# ---- tables --------------------------------------------------------------------------------------------

ETT_HEAD = "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT\n"


def ett_rows(count: int) -> str:
    hours = np.datetime64("2016-07-01T00") + np.arange(count)
    return ETT_HEAD + "".join(
        f"{str(h).replace('T', ' ')}:00:00,{','.join(str(10 * i + c) for c in range(7))}\n"
        for i, h in enumerate(hours)
    )


def test_ett(tmp_path):
    for name in ("ETTh1", "ETTh2", "ETTm1"):
        write(tmp_path / f"{name}.csv", ett_rows(40))
    found = find("ett", tmp_path)
    table = found.table("ETTh1")
    assert table.channels == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    assert table.values.shape == (40, 7)
    assert table.values[3].tolist() == [30, 31, 32, 33, 34, 35, 36]
    assert table.times[1] - table.times[0] == np.timedelta64(1, "h")
    assert [(c.part, c.observed, c.complete) for c in found.verify()] == [
        ("ETTh1", 40, False),
        ("ETTh2", 40, False),
        ("ETTm1", 40, False),
    ]
    assert found.split("ETTh1", 17_420) == tables.Split((0, 8640), (8640, 11_520), (11_520, 14_400))
    assert found.split("ETTm1", 69_680).test == (46_080, 57_600)


def test_the_target_comes_last_and_other_tables_split_70_10_20(tmp_path):
    names = ["WetBulbCelsius", *(f"c{i}" for i in range(11))]
    rows = "".join(f"2010-01-01 0{h}:00:00,{','.join(['1.5'] * 12)}\n" for h in range(3))
    write(tmp_path / "wth/WTH.csv", f"date,{','.join(names)}\n{rows}")
    columns = [f"MT_{i:03d}" for i in range(321)]
    write(
        tmp_path / "ecl/ECL.csv",
        f"date,{','.join(columns)}\n2012-01-01 00:00:00,{','.join(map(str, range(321)))}\n",
    )
    weather, power = find("wth", tmp_path), find("ecl", tmp_path)
    assert weather.table("WTH").channels[-1] == "WetBulbCelsius"
    assert power.table("ECL").channels[-1] == "MT_320"
    assert power.table("ECL").values[0, -1] == 320.0
    assert weather.split("WTH", 1000) == tables.Split((0, 700), (700, 800), (800, 1000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("time,a\n1,2\n", "2 columns time, a"),
        (ETT_HEAD + "2016-07-01,1,2,3,4,5,6\n", "no number in row 1, column OT"),
        (ETT_HEAD + "2016-07-01,1,2,3,4,5,6,x\n", "expected numbers"),
        (ETT_HEAD + "someday,1,2,3,4,5,6,7\n", "expected a date"),
        ("", "expected comma-separated values"),
    ],
)
def test_damaged_tables_are_named(tmp_path, content, words):
    write(tmp_path / "ETTh1.csv", content)
    with pytest.raises(DataDamaged, match=r"ETTh1\.csv: observed") as raised:
        find("ett", tmp_path).table("ETTh1")
    assert words in str(raised.value)


def test_normalisation_uses_the_training_rows_only():
    values = np.stack([DRAW.normal(3.0, 2.0, 100), np.full(100, 7.0)], 1)
    changed = values.copy()
    changed[60:] += 1000.0
    before, after = tables.normalised(values, (0, 60)), tables.normalised(changed, (0, 60))
    np.testing.assert_array_equal(before[:60], after[:60])
    np.testing.assert_allclose(before[:60].mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(before[:60].std(0), [1.0, 0.0], atol=1e-6)


def test_time_features_are_those_of_the_calendar():
    times = np.array(["2016-07-01T05", "2017-12-31T23", "2018-01-01T00"], "datetime64[s]")
    found = (tables.time_features(times) + 0.5) * [23, 6, 30, 365]
    expected = [
        [5, 4, 0, 182],
        [23, 6, 30, 364],
        [0, 0, 0, 0],
    ]  # hour, Friday Sunday Monday, day, day of year
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- point clouds --------------------------------------------------------------------------------------

CLOUD = DRAW.normal(size=(5, 3)).astype(np.float32)


def pcd(points: np.ndarray, kind: str, extra: bool = False) -> bytes:
    fields, size = ("x y z rgb", 4) if extra else ("x y z", 3)
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE{' 4' * size}\nTYPE{' F' * size}\n"
        f"COUNT{' 1' * size}\nWIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA {kind}\n"
    ).encode()
    rows = [(*p, 9.0) if extra else tuple(p) for p in points.tolist()]
    if kind == "ascii":
        return head + "\n".join(" ".join(repr(v) for v in row) for row in rows).encode() + b"\n"
    return head + b"".join(struct.pack(f"<{size}f", *row) for row in rows)


def ply(points: np.ndarray) -> str:
    head = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\nproperty float y\nproperty float x\n"
    body = "\n".join(f"{y!r} {x!r} {z!r}" for x, y, z in points.tolist())
    return f"{head}property float z\nelement face 0\nend_header\n{body}\n"


def npy(points: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, points)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pcd", pcd(CLOUD, "ascii")),
        ("b.pcd", pcd(CLOUD, "binary")),
        ("c.pcd", pcd(CLOUD, "binary", extra=True)),
        ("d.pcd", pcd(CLOUD, "ascii", extra=True)),
        ("e.npy", npy(CLOUD)),
        ("f.ply", ply(CLOUD)),
        ("g.xyz", "\n".join(" ".join(map(repr, row)) for row in CLOUD.tolist())),
    ],
)
def test_every_format_of_a_cloud_reads_the_same(tmp_path, name, content):
    np.testing.assert_array_equal(clouds.read_points(write(tmp_path / name, content)), CLOUD)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pcd", b"VERSION 0.7\n", "no line DATA"),
        ("b.pcd", pcd(CLOUD, "binary")[:-5], "4 points"),
        ("c.pcd", pcd(CLOUD, "ascii").replace(b"POINTS 5", b"POINTS 6"), "5 points"),
        ("d.pcd", pcd(CLOUD, "binary").replace(b"x y z", b"a b c"), "fields a b c"),
        ("e.pcd", pcd(CLOUD, "binary_compressed"), "DATA binary_compressed"),
        ("f.pcd", pcd(CLOUD, "binary").replace(b"SIZE 4 4 4\n", b""), "POINTS, SIZE and TYPE"),
        ("g.npy", npy(CLOUD)[:-3], "an array of numbers"),
        ("h.npy", npy(np.zeros((3, 2), np.float32)), "shape (3, 2)"),
        ("i.npy", npy(np.full((3, 3), np.nan, np.float32)), "no finite number"),
        ("j.ply", "solid x", "no header"),
        ("k.ply", ply(CLOUD).replace("ascii", "binary_little_endian"), "format binary_little_endian"),
        ("l.ply", ply(CLOUD).replace("vertex 5", "vertex 9"), "5 points"),
        ("m.xyz", "1 2 3\n4 5\n", "'4 5' as point 2"),
        ("n.obj", "v 1 2 3", "suffix '.obj'"),
    ],
)
def test_damaged_clouds_are_named(tmp_path, name, content, words):
    with pytest.raises(DataDamaged) as raised:
        clouds.read_points(write(tmp_path / name, content))
    assert f"{name}: observed" in str(raised.value)
    assert words in str(raised.value)


def test_pcn(tmp_path):
    listed = [
        {"taxonomy_id": "02691156", "taxonomy_name": "airplane", "train": ["a"], "val": ["b"], "test": ["c"]}
    ]
    write(tmp_path / "PCN.json", json.dumps(listed))
    for part, name, views in (("train", "a", 8), ("val", "b", 1), ("test", "c", 1)):
        write(tmp_path / part / "complete/02691156" / f"{name}.pcd", pcd(CLOUD, "binary"))
        for view in range(views):
            scan = pcd(CLOUD[:3] + view, "ascii")
            write(tmp_path / part / "partial/02691156" / name / f"{view:02d}.pcd", scan)
    found = find("pcn", tmp_path)
    (model,) = found.models("train")
    assert model.category == "airplane"
    np.testing.assert_array_equal(found.complete(model), CLOUD)
    np.testing.assert_allclose(found.partial(model, 7), CLOUD[:3] + 7)
    assert [c.observed for c in found.verify()] == [1, 1, 1]
    assert len(list(found.files())) == 1 + 3 + 10
    with pytest.raises(DataMissing, match=r"train/partial/02691156/a/08\.pcd"):
        found.partial(model, 8)
    write(tmp_path / "PCN.json", '[{"taxonomy_id": "1"}]')
    with pytest.raises(DataDamaged, match=r"PCN\.json: observed KeyError"):
        find("pcn", tmp_path).models("train")


def test_shapenet55(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / f"ShapeNet-55/{part}.txt", f"0269-{part}.npy\n")
        write(tmp_path / f"shapenet_pc/0269-{part}.npy", npy(CLOUD))
    found = find("shapenet55", tmp_path)
    np.testing.assert_array_equal(found.points(found.models("test")[0]), CLOUD)
    assert [c.observed for c in found.verify()] == [1, 1]
    (tmp_path / "shapenet_pc/0269-test.npy").unlink()
    with pytest.raises(DataMissing, match=r"shapenet_pc/0269-test\.npy"):
        found.verify()
    write(tmp_path / "ShapeNet-55/test.txt", "nonsense\n")
    with pytest.raises(DataDamaged, match=r"test\.txt: observed a line 'nonsense'"):
        found.models("test")


# ---- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffhq", "celebahq"])
def test_faces_from_a_tree_and_from_prepared_folders(tmp_path, name):
    picture = pixels(40, 60, 3)
    png(tmp_path / "tree/00000/00001.png", picture)
    tree = find(name, tmp_path / "tree")
    np.testing.assert_array_equal(tree.image(0), picture)
    sharp, blurred = tree.pair(0, 32, 8)
    assert sharp.shape == blurred.shape == (32, 32, 3)
    np.testing.assert_array_equal(blurred, images.resized(images.resized(sharp, 8), 32))
    high, condition = pixels(32, 32, 3), pixels(32, 32, 3)
    png(tmp_path / "ready/hr_32/00001.png", high)
    png(tmp_path / "ready/sr_8_32/00001.png", condition)
    png(tmp_path / "ready/lr_8/00001.png", pixels(8, 8, 3))
    ready = find(name, tmp_path / "ready")
    assert ready.count("images") == 1
    for given, expected in zip(ready.pair(0, 32, 8), (high, condition), strict=True):
        np.testing.assert_array_equal(given, expected)
    png(tmp_path / "ready/sr_8_32/00001.png", pixels(16, 32, 3))
    with pytest.raises(DataDamaged, match=r"sr_8_32/00001\.png: observed 32 × 16 pixels"):
        ready.pair(0, 32, 8)
    write(tmp_path / "tree/00000/00001.png", b"\x89PNG")
    with pytest.raises(DataDamaged, match=r"00001\.png"):
        tree.verify()


def test_resizing_keeps_the_centre():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    assert images.resized(picture, 10).shape == (10, 10, 3)
    assert images.resized(picture, 10)[:, 1:9].min() > 250


def test_cifar10_from_batches_and_from_parquet(tmp_path):
    pictures, labels = pixels(12, 32, 32, 3), np.arange(12) % 10
    records = np.concatenate(
        [labels[:, None].astype(np.uint8), pictures.transpose(0, 3, 1, 2).reshape(12, -1)], 1
    )
    for number in range(5):
        write(
            tmp_path / f"a/cifar-10-batches-bin/data_batch_{number + 1}.bin",
            records[2 * number :][:2].tobytes(),
        )
    test = write(tmp_path / "a/cifar-10-batches-bin/test_batch.bin", records[10:].tobytes())
    for part, rows in (("train", range(10)), ("test", range(10, 12))):
        encoded = [{"bytes": png(tmp_path / "x.png", pictures[i]).read_bytes(), "path": None} for i in rows]
        parquet(
            tmp_path / f"b/plain_text/{part}/0000.parquet", img=encoded, label=[int(labels[i]) for i in rows]
        )
    for folder in ("a", "b"):
        found = find("cifar10", tmp_path / folder)
        read, given = found.arrays("train")
        np.testing.assert_array_equal(read, pictures[:10])
        np.testing.assert_array_equal(given, labels[:10])
        assert [c.observed for c in found.verify()] == [10, 2]
    write(test, records.tobytes()[:-1])
    with pytest.raises(DataDamaged, match=r"test_batch\.bin: observed \d+ bytes"):
        find("cifar10", tmp_path / "a").arrays("test")


# ---- long range arena ----------------------------------------------------------------------------------


@pytest.fixture
def arena(tmp_path):
    root = tmp_path / "lra_release"
    for split in ("train", "val", "test"):
        write(root / f"listops-1000/basic_{split}.tsv", "Source\tTarget\n( ( [MAX 1 ) ] )\t1\n2\t2\n")
    for split in ("train", "eval", "test"):
        write(
            root / f"tsv_data/new_aan_pairs.{split}.tsv",
            f'1.0\tA1\tA2\tthe "{split}\r\ttwo\n0.0\tA1\tA3\tx\ty\n',
        )
    for resolution in (32, 64, 128, 256):
        home = root / f"pathfinder{resolution}/curv_contour_length_14"
        for batch in (0, 10, 2):
            png(home / f"imgs/{batch}/sample_0.png", np.full((resolution, resolution), batch, np.uint8))
            write(home / f"metadata/{batch}.npy", f"imgs/{batch} sample_0.png 0 {int(batch == 2)} 1.8 6\n")
    return tmp_path


def test_listops_and_retrieval(arena):
    found = find("lra", arena)
    assert list(found.listops("val")) == [("( ( [MAX 1 ) ] )", 1), ("2", 2)]
    assert list(found.retrieval("val")) == [('the "eval\r', "two", 1), ("x", "y", 0)]
    assert {c.part: c.observed for c in found.verify()} == {
        **{f"{task}_{split}": 2 for task in ("listops", "retrieval") for split in ("train", "val", "test")},
        **{f"pathfinder{r}": 3 for r in (32, 64, 128, 256)},
    }
    assert len(found.verify(["listops_test"])) == 1


def test_pathfinder_is_in_numeric_order_cached_and_without_empty_files(arena, monkeypatch):
    monkeypatch.setenv("HOME", str(arena))
    home = arena / "lra_release/pathfinder32/curv_contour_length_14"
    write(home / "imgs/0/sample_0.png", b"")
    pictures, labels = find("lra", arena).pathfinder(32)
    assert pictures.shape == (2, 32, 32)
    assert pictures[:, 0, 0].tolist() == [2, 10]
    assert labels.tolist() == [1, 0]
    (kept,) = caches.folder().glob("lra-pathfinder32-*.npz")
    monkeypatch.setattr("attnbench.tasks.data.loaders.arena.LongRangeArena._gray", None)
    again = find("lra", arena).pathfinder(32)
    np.testing.assert_array_equal(again[0], pictures)
    write(kept, b"broken")
    with pytest.raises(TypeError):  # decoded anew, by the decoder that the test took away
        find("lra", arena).pathfinder(32)
    with pytest.raises(UsageError, match="unknown resolution"):
        find("lra", arena).pathfinder(48)


@pytest.mark.parametrize(
    ("path", "content", "read", "words"),
    [
        ("listops-1000/basic_val.tsv", "A\tB\n", lambda s: list(s.listops("val")), "a header ['A', 'B']"),
        (
            "listops-1000/basic_val.tsv",
            "Source\tTarget\n1\tx\n",
            lambda s: list(s.listops("val")),
            "in line 2",
        ),
        (
            "tsv_data/new_aan_pairs.test.tsv",
            "1.0\tx\n",
            lambda s: list(s.retrieval("test")),
            "2 fields in line 1",
        ),
        (
            "pathfinder32/curv_contour_length_14/metadata/0.npy",
            "imgs/0\n",
            lambda s: s.pathfinder_list(32),
            "'imgs/0' in line 1",
        ),
        (
            "pathfinder32/curv_contour_length_14/metadata/0.npy",
            "imgs/0 gone.png 0 1\n",
            lambda s: s.pathfinder_list(32),
            "gone.png",
        ),
    ],
)
def test_damaged_arena_files_are_named(arena, path, content, read, words):
    write(arena / "lra_release" / path, content)
    with pytest.raises(UsageError) as raised:
        read(find("lra", arena))
    assert words in str(raised.value)


def test_an_absent_split_of_the_arena_is_named(arena):
    (arena / "lra_release/listops-1000/basic_test.tsv").unlink()
    with pytest.raises(DataMissing, match=r"listops-1000/basic_test\.tsv"):
        find("lra", arena).verify(["listops_test"])
    with pytest.raises(UsageError, match="unknown part of data set lra 'listops_dev'"):
        list(find("lra", arena).listops("dev"))


# ---- identity ------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_of_small_and_sizes_of_large_sets(tmp_path, monkeypatch):
    path = write(tmp_path / "ETTh1.csv", ett_rows(3))
    found = find("ett", tmp_path)
    first = found.fingerprint()
    assert found.corpus("ETTh1").label == "real: ett ETTh1"
    assert found.corpus().fingerprint == first == find("ett", tmp_path).fingerprint()
    same_size = write(path, ett_rows(3).replace("26", "99"))
    assert found.fingerprint() != first
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    large = found.fingerprint()
    write(same_size, ett_rows(3))
    assert found.fingerprint() == large
    write(same_size, ett_rows(4))
    assert found.fingerprint() != large
