"""The Cauldron, Idefics2's data: 50 sets, a folder of parquet with the images inside for each (HuggingFaceM4/the_cauldron).

Rows are as the data set's page on the hub rounds them, to three digits.
"""

from deepstack_jax.config import SetConfig

ROWS = {
    "ai2d": 2_430, "aokvqa": 16_500, "chart2text": 27_000, "chartqa": 18_300, "clevr": 70_000, "clevr_math": 70_000,
    "cocoqa": 46_300, "datikz": 48_000, "diagram_image_to_text": 300, "docvqa": 10_200, "dvqa": 200_000, "figureqa": 100_000,
    "finqa": 5_280, "geomverse": 9_300, "hateful_memes": 8_500, "hitab": 2_500, "iam": 5_660, "iconqa": 27_300,
    "infographic_vqa": 2_120, "intergps": 1_280, "localized_narratives": 200_000, "mapqa": 37_400, "mimic_cgd": 70_900,
    "multihiertt": 7_620, "nlvr2": 50_400, "ocrvqa": 166_000, "okvqa": 9_010, "plotqa": 157_000, "raven": 42_000,
    "rendered_text": 10_000, "robut_sqa": 8_510, "robut_wikisql": 75_000, "robut_wtq": 38_200, "scienceqa": 4_980,
    "screen2words": 15_700, "spot_the_diff": 8_570, "st_vqa": 17_200, "tabmwp": 22_700, "tallyqa": 98_700, "tat_qa": 2_200,
    "textcaps": 22_000, "textvqa": 22_000, "tqa": 1_490, "vistext": 9_970, "visual7w": 14_400, "visualmrc": 3_030,
    "vqarad": 313, "vqav2": 82_800, "vsr": 2_160, "websight": 10_000,
}  # fmt: skip

SETS = {
    name: SetConfig(
        file=f"the_cauldron/{name}",
        rows=rows,
        exact=False,
        file_from=(
            f"hf download HuggingFaceM4/the_cauldron --include '{name}/*' --repo-type dataset --local-dir $ROOT/the_cauldron"
        ),
        licence="every set's own; the prompts CC BY 4.0",
    )
    for name, rows in ROWS.items()
}
