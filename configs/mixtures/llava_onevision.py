"""LLaVA-OneVision's single images (lmms-lab/LLaVA-OneVision-Data): a folder of parquet for each set, in LLaVA's own form.

Set names are the folders' without their brackets. Rows of the first 39 are as the data set's page on the hub rounds them, to
three digits; of the others as the training recipe's names of JSON files tell them (`mathqa_29837.json`), at times a few more
than were released. Four that neither tells (`sharegpt4o`, `sharegpt4v(sam)`, `ureader_cap`, `ureader_ie`) are as FineVision has
them, which took them from here; `tqa` is 0, told by nobody. `ureader_kg` and `ureader_qa` are released as JSON and archives.
"""

import re

from deepstack_jax.config import SetConfig

ROWS = {
    "CLEVR-Math(MathV360K)": 5_280, "FigureQA(MathV360K)": 17_600, "GEOS(MathV360K)": 498, "GeoQA+(MathV360K)": 17_200,
    "Geometry3K(MathV360K)": 9_720, "IconQA(MathV360K)": 22_600, "MapQA(MathV360K)": 5_230, "PMC-VQA(MathV360K)": 35_900,
    "Super-CLEVR(MathV360K)": 8_640, "TabMWP(MathV360K)": 22_500, "UniGeo(MathV360K)": 11_900,
    "VisualWebInstruct(filtered)": 264_000, "VizWiz(MathV360K)": 6_600, "ai2d(cauldron,llava_format)": 2_430,
    "ai2d(gpt4v)": 4_860, "ai2d(internvl)": 12_400, "allava_instruct_laion4v": 50_000, "allava_instruct_vflan4v": 20_000,
    "aokvqa(cauldron,llava_format)": 16_500, "chart2text(cauldron)": 27_000, "chartqa(cauldron,llava_format)": 18_300,
    "chrome_writting": 8_830, "clevr(cauldron,llava_format)": 70_000, "diagram_image_to_text(cauldron)": 295,
    "dvqa(cauldron,llava_format)": 200_000, "figureqa(cauldron,llava_format)": 100_000, "geo170k(align)": 60_200,
    "geo170k(qa)": 67_800, "geo3k": 2_090, "geomverse(cauldron)": 9_300, "hateful_memes(cauldron,llava_format)": 8_500,
    "hitab(cauldron,llava_format)": 2_500, "hme100k": 74_500, "iam(cauldron)": 5_660, "iconqa(cauldron,llava_format)": 27_300,
    "iiit5k": 1_990, "image_textualization(filtered)": 99_600, "infographic(gpt4v)": 1_980, "infographic_vqa": 4_390,
    "infographic_vqa_llava_format": 2_118, "intergps(cauldron,llava_format)": 1_280, "k12_printing": 256_646,
    "llavar_gpt4_20k": 20_000, "lrv_chart": 1_787, "lrv_normal(filtered)": 10_500, "magpie_pro(l3_80b_mt)": 299_998,
    "magpie_pro(l3_80b_st)": 300_000, "magpie_pro(qwen2_72b_st)": 299_992, "mapqa(cauldron,llava_format)": 37_417,
    "mathqa": 29_837, "mavis_math_metagen": 87_358, "mavis_math_rule_geo": 100_000, "multihiertt(cauldron)": 7_619,
    "orand_car_a": 2_009, "raven(cauldron)": 42_000, "rendered_text(cauldron)": 10_000, "robut_sqa(cauldron)": 8_514,
    "robut_wikisql(cauldron)": 74_989, "robut_wtq(cauldron,llava_format)": 38_246, "scienceqa(cauldron,llava_format)": 4_976,
    "scienceqa(nona_context)": 19_218, "screen2words(cauldron)": 15_730, "sharegpt4o": 57_284, "sharegpt4v(coco)": 50_000,
    "sharegpt4v(knowledge)": 2_000, "sharegpt4v(llava)": 30_000, "sharegpt4v(sam)": 8_990, "sroie": 33_626,
    "st_vqa(cauldron,llava_format)": 17_247, "tabmwp(cauldron)": 22_722, "tallyqa(cauldron,llava_format)": 98_680,
    "textcaps": 21_952, "textocr(gpt4v)": 25_114, "tqa(cauldron,llava_format)": 0, "ureader_cap": 91_215, "ureader_ie": 17_320,
    "vision_flan(filtered)": 186_070, "vistext(cauldron)": 9_969, "visual7w(cauldron,llava_format)": 14_366,
    "visualmrc(cauldron)": 3_027, "vqarad(cauldron,llava_format)": 313, "vsr(cauldron,llava_format)": 2_157,
    "websight(cauldron)": 10_000,
}  # fmt: skip
FOLDER = "LLaVA-OneVision-Data"

SETS = {
    re.sub(r"\W+", "_", folder).strip("_"): SetConfig(
        file=f"{FOLDER}/{folder}",
        rows=rows,
        exact=False,
        file_from=f"hf download lmms-lab/{FOLDER} --include '{folder}/*' --repo-type dataset --local-dir $ROOT/{FOLDER}",
        licence="Apache 2.0 as a collection, for research and education; every set's own beside it",
    )
    for folder, rows in ROWS.items()
}
