"""The published data sets that tasks can read: layout, size, licence, and where each comes from.

Checksums are those that the distributors or the loaders of common libraries publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Download:
    """One file to fetch: where it goes below the folder of the data set, how large it is, its digest.

    ``digest`` is ``algorithm:hex`` or empty where none is published; ``unpack`` archives are unpacked in
    place and removed.
    """

    url: str
    path: str
    digest: str = ""
    size_bytes: int | None = None
    unpack: bool = False


@dataclass(frozen=True)
class HubParquet:
    """The Parquet copy of a data set on the Hugging Face hub: ``<split>/<number>.parquet`` of one config."""

    repository: str
    config: str


@dataclass(frozen=True)
class DataSet:
    """What a user must know of a data set; ``loader`` is ``module:class`` in ``tasks/data/loaders``.

    ``layout`` lists the files below the root. Without ``downloads`` a person has to get it, ``by_hand`` says
    how.
    """

    name: str
    title: str
    layout: tuple[str, ...]
    size: str
    licence: str
    home: str
    loader: str
    downloads: tuple[Download | HubParquet, ...] = ()
    by_hand: str = ""

    @property
    def command(self) -> str:
        """The command that gets it, empty where a person has to."""
        return f"attnbench data prepare {self.name}" if self.downloads else ""


_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_INFORMER = "https://github.com/zhouhaoyi/Informer2020"

_ALL = (
    DataSet(
        name="pg19",
        title="PG-19, books before 1919",
        layout=(
            "{train,validation,test}/<book_id>.txt with metadata.csv (book_id, title, date, url)",
            "or {train,validation,test}/<number>.parquet (text, short_book_title, publication_date, url)",
        ),
        size="11.5 GB",
        licence="Apache-2.0 (texts in the public domain in the US)",
        home="https://huggingface.co/datasets/deepmind/pg19",
        loader="texts:PG19",
        downloads=(HubParquet("deepmind/pg19", "default"),),
    ),
    DataSet(
        name="multi_news",
        title="Multi-News, summaries of several articles",
        layout=(
            "{train,val,test}.src (or .src.cleaned) and .tgt, one example a line, articles parted by |||||",
            "or {train,validation,test}/<number>.parquet (document, summary)",
        ),
        size="about 0.8 GB",
        licence="research and education only, no commercial use",
        home="https://huggingface.co/datasets/alexfabbri/multi_news",
        loader="texts:MultiNews",
        downloads=(HubParquet("alexfabbri/multi_news", "default"),),
    ),
    DataSet(
        name="imdb",
        title="IMDB film reviews",
        layout=(
            "{train,test}/{pos,neg}/<id>_<stars>.txt (in aclImdb/ or not)",
            "or {train,test}/<number>.parquet (text, label)",
        ),
        size="84 MB packed",
        licence="not stated by its authors; cite Maas et al. (2011)",
        home="https://ai.stanford.edu/~amaas/data/sentiment/",
        loader="texts:IMDB",
        downloads=(
            Download(
                "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                "aclImdb_v1.tar.gz",
                "md5:7c2ac02c03563afcf9b574c7e56c153a",
                unpack=True,
            ),
        ),
    ),
    DataSet(
        name="gpt2",
        title="Byte pairs of GPT-2",
        layout=("tokenizer.json (as the library tokenizers writes it)",),
        size="1.4 MB",
        licence="MIT",
        home="https://huggingface.co/openai-community/gpt2",
        loader="texts:GPT2",
        downloads=(
            Download(
                "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json", "tokenizer.json"
            ),
        ),
    ),
    DataSet(
        name="ljspeech",
        title="LJ Speech 1.1, one reader's 24 hours",
        layout=(
            "metadata.csv (id|text|normalised text, no header; in LJSpeech-1.1/ or not)",
            "wavs/<id>.wav (22,050 Hz, mono, 16 bit)",
        ),
        size="2.7 GB packed",
        licence="public domain",
        home="https://keithito.com/LJ-Speech-Dataset/",
        loader="speech:LJSpeech",
        downloads=(
            Download(
                "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2",
                "LJSpeech-1.1.tar.bz2",
                "sha256:be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5",
                2_748_572_632,
                unpack=True,
            ),
        ),
    ),
    DataSet(
        name="ljspeech-mfa",
        title="Phone alignments of LJ Speech",
        layout=("ljspeech_mfa.zip, or <id>.TextGrid files in any folders (tier of phones)",),
        size="tens of MB packed",
        licence="not stated; published with fairseq",
        home="https://dl.fbaipublicfiles.com/fairseq/s2/ljspeech_mfa.zip",
        loader="speech:Alignments",
        downloads=(
            Download("https://dl.fbaipublicfiles.com/fairseq/s2/ljspeech_mfa.zip", "ljspeech_mfa.zip"),
        ),
    ),
    DataSet(
        name="ett",
        title="Electricity transformer temperature",
        layout=("ETTh1.csv, ETTh2.csv, ETTm1.csv (date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT)",),
        size="15 MB",
        licence="CC BY-ND 4.0",
        home="https://github.com/zhouhaoyi/ETDataset",
        loader="tables:ETT",
        downloads=(
            Download(
                f"{_ETT}/ETTh1.csv",
                "ETTh1.csv",
                "sha256:f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
                2_589_657,
            ),
            Download(
                f"{_ETT}/ETTh2.csv",
                "ETTh2.csv",
                "sha256:a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
                2_417_960,
            ),
            Download(
                f"{_ETT}/ETTm1.csv",
                "ETTm1.csv",
                "sha256:6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
                10_360_719,
            ),
        ),
    ),
    DataSet(
        name="ecl",
        title="Electricity consumption of 321 clients",
        layout=("ECL.csv (date and 321 columns, target MT_320)",),
        size="about 95 MB",
        licence="CC BY 4.0 (UCI ElectricityLoadDiagrams20112014)",
        home=_INFORMER,
        loader="tables:ECL",
        by_hand="Take ECL.csv from the shared folder that the README of Informer links to",
    ),
    DataSet(
        name="wth",
        title="Weather of a US station",
        layout=("WTH.csv (date and 12 columns, target WetBulbCelsius)",),
        size="about 3 MB",
        licence="US government work (NOAA)",
        home=_INFORMER,
        loader="tables:WTH",
        by_hand="Take WTH.csv from the shared folder that the README of Informer links to",
    ),
    DataSet(
        name="pcn",
        title="PCN, partial scans of ShapeNet models",
        layout=(
            "PCN.json (taxonomy_id, taxonomy_name, train, val, test)",
            "{train,val,test}/complete/<taxonomy>/<model>.pcd (or .npy, .ply, .xyz)",
            "{train,val,test}/partial/<taxonomy>/<model>/<00..07>.pcd",
        ),
        size="about 12 GB unpacked",
        licence="ShapeNet terms: research only, after registration",
        home="https://gateway.infinitescript.com/s/ShapeNetCompletion",
        loader="clouds:PCN",
        by_hand="Register at shapenet.org and get the ShapeNetCompletion archive of the authors of GRNet",
    ),
    DataSet(
        name="shapenet55",
        title="ShapeNet-55, complete clouds of 55 categories",
        layout=(
            "ShapeNet-55/{train,test}.txt (one <taxonomy>-<model>.npy a line)",
            "shapenet_pc/<taxonomy>-<model>.npy (8,192 × 3)",
        ),
        size="5.2 GB",
        licence="ShapeNet terms: research only, after registration",
        home="https://github.com/yuxumin/PoinTr/blob/master/DATASET.md",
        loader="clouds:ShapeNet55",
        by_hand="Register at shapenet.org and get the archive that PoinTr's data page links to",
    ),
    DataSet(
        name="ffhq",
        title="Flickr-Faces-HQ",
        layout=(
            "any tree of .png or .jpg images",
            "or hr_<r>/, sr_<l>_<r>/ and lr_<l>/ with the same <id>.png in each",
        ),
        size="2 GB (128 px) to 90 GB (1024 px)",
        licence="CC BY-NC-SA 4.0 (images: licences of their photographers)",
        home="https://github.com/NVlabs/ffhq-dataset",
        loader="images:FFHQ",
        by_hand="Get thumbnails128x128 or images1024x1024 with the script of its authors",
    ),
    DataSet(
        name="celebahq",
        title="CelebA-HQ, 30,000 faces",
        layout=(
            "any tree of .png or .jpg images",
            "or hr_<r>/, sr_<l>_<r>/ and lr_<l>/ with the same <id>.png in each",
        ),
        size="about 3 GB (256 px)",
        licence="non-commercial research only (CelebA agreement)",
        home="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        loader="images:CelebAHQ",
        by_hand="Accept the CelebA agreement and get the CelebA-HQ images",
    ),
    DataSet(
        name="cifar10",
        title="CIFAR-10",
        layout=(
            "data_batch_{1..5}.bin and test_batch.bin (in cifar-10-batches-bin/ or not)",
            "or {train,test}/<number>.parquet (img, label)",
        ),
        size="170 MB packed",
        licence="not stated by its authors; cite Krizhevsky (2009)",
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        loader="images:CIFAR10",
        downloads=(
            Download(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "cifar-10-binary.tar.gz",
                "md5:c32a1d4ab5d03f1284b67883e8d87530",
                170_052_171,
                unpack=True,
            ),
        ),
    ),
    DataSet(
        name="lra",
        title="Long Range Arena: ListOps, AAN pairs, Pathfinder",
        layout=(
            "listops-1000/basic_{train,val,test}.tsv (Source, Target; in lra_release/ or not)",
            "tsv_data/new_aan_pairs.{train,eval,test}.tsv (label, id1, id2, text1, text2, no header)",
            "pathfinder{32,64,128,256}/curv_contour_length_14/{imgs,metadata}/",
        ),
        size="7.7 GB packed",
        licence="Apache-2.0 (AAN texts: ACL Anthology terms)",
        home="https://github.com/google-research/long-range-arena",
        loader="arena:LongRangeArena",
        downloads=(
            Download(
                "https://storage.googleapis.com/long-range-arena/lra_release.gz",
                "lra_release.tar.gz",
                unpack=True,
            ),
        ),
    ),
)

CATALOGUE: Mapping[str, DataSet] = {entry.name: entry for entry in _ALL}
"""All data sets by name."""
