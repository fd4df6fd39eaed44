"""Stage 2: LLaVA-1.5's 665k instructions, one JSON file whose rows are told apart by the folder of their image.

Five sets lie over COCO and cannot be told apart: LLaVA-Instruct 157,712, VQAv2 82,783, RefCOCO 48,447, A-OKVQA 66,160 and
OKVQA 8,998 rows. The numbers are LLaVA's own (github.com/haotian-liu/LLaVA, issues 657 and 702).
"""

from deepstack_jax.config import SetConfig

FILE = "llava_v1_5_mix665k.json"
FILE_FROM = f"hf download liuhaotian/LLaVA-Instruct-150K {FILE} --repo-type dataset --local-dir $ROOT"
UNZIP = "wget -P $ROOT/{0} {1} && unzip -q $ROOT/{0}/\\*.zip -d $ROOT/{0}"
VISUAL_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"
ANSWERS = "CC BY 4.0 and OpenAI's terms of use"


def images(*folders: str, rows: int, images_from: str, licence: str) -> SetConfig:
    """The rows whose image lies in one of these folders."""
    return SetConfig(file=FILE, rows=rows, keep_images=folders, file_from=FILE_FROM, images_from=images_from, licence=licence)


SETS = {
    "coco": images(
        "coco/train2017/",
        rows=364_100,
        images_from=UNZIP.format("coco", "http://images.cocodataset.org/zips/train2017.zip"),
        licence=f"{ANSWERS}; images: Flickr's terms of use",
    ),
    "gqa": images(
        "gqa/images/",
        rows=72_140,
        images_from=UNZIP.format("gqa", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
        licence="CC BY 4.0",
    ),
    "ocr_vqa": images(
        "ocr_vqa/images/",
        rows=80_000,
        images_from="hf download ej2/llava-ocr-vqa --repo-type dataset --local-dir $ROOT/ocr_vqa",
        licence="none given; book covers, for research",
    ),
    "textcaps": images(
        "textvqa/train_images/",
        rows=21_953,
        images_from=UNZIP.format("textvqa", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
        licence="CC BY 4.0",
    ),
    "vg": images(
        "vg/VG_100K/",
        "vg/VG_100K_2/",
        rows=86_417,
        images_from=UNZIP.format("vg", f"{VISUAL_GENOME}/images.zip {VISUAL_GENOME}/images2.zip"),
        licence="CC BY 4.0",
    ),
    "sharegpt": SetConfig(
        file=FILE,
        rows=40_688,
        keep_images=("<text>",),
        file_from=FILE_FROM,
        licence="OpenAI's terms of use",
    ),
}
