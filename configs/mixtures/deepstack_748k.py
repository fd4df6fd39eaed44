"""Stage 2 of DeepStack-HD: the 748k instructions of the paper's table 9, which nobody published as such. Two ways to them.

`SETS` rebuilds the list: the 665k without TextCaps, and the seven new sets, each a file of its own. The subsets that the
authors drew were not released: draw as many rows, as LLaVA JSON whose image paths start at `data.root`.

`PUBLISHED` takes what LLaVA-NeXT's authors released (lmms-lab/LLaVA-NeXT-Data, as JSON with image folders), and the text-only
rows, which that JSON leaves out, from the 665k: 779,278 rows. That is 32 thousand more than the paper's 747: SynthDoG-EN +20,
ChartQA +11, DVQA +4, AI2D +1, LAION-GPT4V -3, ShareGPT4V and COCO together -3. LLaVA's 15k demo conversations are in neither.
`repeat` brings single sets down to the paper's numbers, e.g. --config.data.sets.synthdog_en.repeat=0.5.

`PARQUET` is the same release as parquet files with the images inside: all of it, as its rows do not say which set they are
of. Others found one value of data_source, "llava-next-instruct", in all 779,289 rows; a copy with other values stops the
run, and the message lists them for `keep_sources`.

Row numbers of the release are as others measured them.
"""

import dataclasses
import runpy
from pathlib import Path

from deepstack_jax.config import SetConfig

LLAVA_665K = runpy.run_path(str(Path(__file__).with_name("llava_665k.py")))["SETS"]
PAPER = {"gqa": 72_000, "ocr_vqa": 80_000, "vg": 86_000, "sharegpt": 40_000}


def kept(name: str, paper: int) -> SetConfig:
    """A set of the 665k, in a mixture that leaves TextCaps out by intention."""
    return dataclasses.replace(LLAVA_665K[name], drop_images=("textvqa/",), paper=paper)


def new(file: str, thousands: int, origin: str, licence: str) -> SetConfig:
    """One of the seven new sets, of which the paper gives thousands of rows."""
    rows, origin = 1000 * thousands, f"made from {origin}, see docs/datasets.md"
    return SetConfig(file=file, rows=rows, exact=False, paper=rows, file_from=origin, images_from=origin, licence=licence)


SETS = {
    "coco": kept("coco", 364_000),
    **{name: kept(name, paper) for name, paper in PAPER.items()},
    "sharegpt4v": new("sharegpt4v_39k.json", 39, "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V", "CC BY-NC 4.0"),
    "laion_gpt4v": new("laion_gpt4v_11k.json", 11, "https://huggingface.co/datasets/laion/gpt4v-dataset", "see its card"),
    "chartqa": new("chartqa_7k.json", 7, "https://github.com/vis-nlp/ChartQA", "GPL-3.0"),
    "dvqa": new("dvqa_16k.json", 16, "https://github.com/kushalkafle/DVQA_dataset", "CC BY-NC 4.0"),
    "docvqa": new("docvqa_10k.json", 10, "https://rrc.cvc.uab.es/?ch=17 (registration)", "see there"),
    "ai2d": new("ai2d_2k.json", 2, "https://ai2-website.s3.amazonaws.com/data/ai2d-all.zip", "research only"),
    "synthdog_en": new("synthdog_en_20k.json", 20, "https://huggingface.co/datasets/naver-clova-ix/synthdog-en", "MIT"),
}

RELEASE = "LLaVA-NeXT-Data/llava_next_raw_format"
FETCH = "hf download lmms-lab/LLaVA-NeXT-Data --include '{}/*' --repo-type dataset --local-dir $ROOT/LLaVA-NeXT-Data"
UNPACK = f"(cd $ROOT/{RELEASE} && for a in *.tar.gz; do tar xzf $a; done)"
RELEASE_FROM = f"{FETCH.format('llava_next_raw_format')} && {UNPACK}"


def released(folder: str, rows: int, paper: int = 0) -> SetConfig:
    """The rows of the release whose image lies in this folder."""
    return SetConfig(
        file=f"{RELEASE}/llava_next_raw_format_processed.json",
        images=RELEASE,
        rows=rows,
        paper=paper,
        keep_images=(folder,),
        file_from=RELEASE_FROM,
        images_from=RELEASE_FROM,
        licence="Apache 2.0 as a collection; every set's own beside it",
    )


PUBLISHED = {
    "coco": released("coco/", 391_219, 403_000),  # the paper's number includes ShareGPT4V's 39, which is spread over three
    "lcs558k": released("llava_pretrain_lcs558k/", 6_989),
    "sharegpt4v": released("sharegpt4v/", 1_926),
    "gqa": released("gqa/", 72_140, 72_000),
    "ocr_vqa": released("ocr_vqa/", 80_000, 80_000),
    "vg": released("vg/", 86_417, 86_000),
    "laion_gpt4v": released("laion-gpt4v-20231128/", 8_048, 11_000),
    "chartqa": released("chartqa/", 18_317, 7_000),
    "dvqa": released("dvqa/", 20_000, 16_000),
    "docvqa": released("docvqa/", 10_194, 10_000),
    "ai2d": released("ai2d/", 3_247, 2_000),
    "synthdog_en": released("synthdog-en/", 40_093, 20_000),
    "sharegpt": dataclasses.replace(
        LLAVA_665K["sharegpt"],
        # The images of the 665k are not wanted here, and need not be there.
        drop_images=("coco/", "gqa/", "ocr_vqa/", "textvqa/", "vg/"),
        paper=40_000,
    ),
}

PARQUET = {
    "llava_next": SetConfig(
        file="LLaVA-NeXT-Data",
        rows=779_289,
        paper=747_000,
        keep_sources=("llava-next-instruct",),
        file_from=FETCH.format("data"),
        licence="Apache 2.0 as a collection; every set's own beside it",
    ),
}
