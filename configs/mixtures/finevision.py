"""FineVision: 185 sets, 24 million rows, 5 TB; a folder of parquet with the images inside for each (HuggingFaceM4/FineVision).

Every turn is rated 1 to 5 in four ways: `min_relevance`, `min_image_correspondence`, `min_visual_dependency` and
`min_formatting` leave out rows whose worst turn has less. Set names are the folders' without their brackets; `of` gives those
of a category. Rows are as others counted them (github.com/pmadinei/Interlace).
"""

import re

from deepstack_jax.config import SetConfig

CATEGORIES = {
    "Captioning & Knowledge": {
        "coco_colors": 118_287, "densefusion_1m": 1_058_751, "face_emotion": 797, "google_landmarks": 299_993,
        "image_textualization(filtered)": 99_573, "laion_gpt4v": 9_301, "localized_narratives": 199_998, "sharegpt4o": 57_284,
        "sharegpt4v(coco)": 50_017, "sharegpt4v(knowledge)": 1_988, "sharegpt4v(llava)": 29_986, "sharegpt4v(sam)": 8_990,
        "textcaps": 21_906,
    },
    "Chart & Table": {
        "chart2text": 26_961, "chartqa": 18_265, "CoSyn_400k_chart": 116_814, "CoSyn_400k_table": 46_518, "dvqa": 200_000,
        "figureqa": 100_000, "figureqa(mathv360k)": 17_587, "finqa": 5_276, "hitab": 2_500, "lrv_chart": 1_776,
        "mmc_instruct": 168_178, "multihiertt": 7_619, "plotqa": 157_070, "robut_sqa": 8_514, "robut_wikisql": 74_989,
        "robut_wtq": 38_246, "SynthChartNet": 500_000, "tabmwp": 22_722, "tabmwp(mathv360k)": 22_452, "tat_dqa": 2_207,
        "tat_qa": 2_199, "Unichart": 611_925, "vistext": 9_969, "vqaonbd": 39_986,
    },
    "General VQA": {
        "alfworldgpt": 45_073, "allava_laion": 468_664, "allava_vflan": 177_078, "cambrian(filtered)_processed": 83_123,
        "chinesememe": 54_212, "cocoqa": 46_287, "CoSyn_400k_graphic": 26_968, "datik": 220_537, "datikz": 47_441,
        "drivelm": 4_072, "hateful_memes": 8_500, "iconqa": 27_307, "iconqa(mathv360k)": 22_589, "idk": 11_123,
        "indoor_qa": 3_350, "LLaVA_Instruct_150K": 157_710, "llavar_gpt4_20k": 19_790, "lnqa": 302_780,
        "lrv_normal(filtered)": 10_489, "lvis_instruct4v": 222_711, "mimic_cgd": 70_939, "mmevol": 160_215, "mmra": 1_024,
        "nlvr2": 50_426, "sketchyvqa": 8_000, "spark": 3_904, "spatialsense": 10_440, "spot_the_diff": 8_566,
        "vision_flan(filtered)": 175_964, "visual7w": 14_366, "vizwiz(mathv360k)": 6_604, "vqav2": 82_772, "vsr": 2_157,
        "websight": 10_000, "wildvision": 333, "yesbut": 4_318,
    },
    "Grounding & Counting": {
        "aguvis-stage-1": 458_957, "groundui": 13_531, "objects365_qa": 1_665_847, "oodvqa": 8_488, "tallyqa": 98_680,
    },
    "Mathematics": {
        "clevr": 70_000, "clevr_math": 70_000, "clevr_math(mathv360k)": 5_280, "CoSyn_400k_math": 66_714,
        "geo170k(align)": 35_297, "geo170k(qa)": 12_101, "geo3k": 2_091, "geometry3k(mathv360k)": 9_724, "geomverse": 9_303,
        "geoqa+(mathv360k)": 17_162, "geos(mathv360k)": 498, "intergps": 1_280, "mavis_math_metagen": 87_348,
        "mavis_math_rule_geo": 99_986, "raven": 42_000, "super_clevr(mathv360k)": 8_642, "unigeo(mathv360k)": 11_949,
    },
    "Naive OCR": {
        "art": 5_492, "captcha": 113_062, "chrome_writting": 8_825, "cocotext": 16_169, "ctw": 24_290, "funsd": 194,
        "hme100k": 74_492, "hw_squad": 20_457, "iam": 5_663, "iiit5k": 1_990, "imgur5k": 5_934, "k12_printing": 256_636,
        "latex_handwritten": 39_583, "latexformulas": 552_340, "maptext": 200, "mathwriting-google": 300_000, "memotion": 6_991,
        "orand_car_a": 1_999, "rendered_text": 10_000, "sroie": 33_616, "svrd": 4_396, "SynthCodeNet": 499_983,
        "synthdog": 500_000, "SynthFormulaNet": 499_997, "tal_ocr_eng": 256_646, "wordart": 4_804,
        "olmOCR-mix-0225-documents": 228_858, "olmOCR-mix-0225-books": 15_194,
    },
    "OCR QA": {
        "a_okvqa": 54_602, "aokvqa": 16_539, "arxivqa": 100_000, "bentham": 10_843, "blockdiagramcomputerized": 502,
        "blockdiagramhandwritten": 1_029, "CoSyn_400k_diagram": 34_963, "CoSyn_400k_document": 71_282,
        "CoSyn_400k_music": 11_969, "CoSyn_400k_nutrition": 6_931, "diagram_image_to_text": 300, "DoclingMatix": 1_270_910,
        "docvqa": 10_189, "est_vqa": 19_358, "handwriting_forms": 1_400, "infographic_vqa": 4_394,
        "infographic_vqa_llava_format": 2_113, "infographic(gpt4v)": 1_982, "invoices_receipts": 3_013, "mapqa": 37_417,
        "mapqa(mathv360k)": 5_225, "mmsoc_memotion": 6_991, "ocrvqa": 165_746, "pdfvqa": 8_593, "screen2words": 15_730,
        "screenqa": 80_761, "slidevqa": 1_919, "st_vqa": 17_247, "sujet_finance": 9_801, "textocr(gpt4v)": 25_060,
        "textvqa": 21_943, "ureader_cap": 91_215, "ureader_ie": 17_320, "ureader_kg_processed": 37_550,
        "ureader_qa_processed": 252_953, "visualmrc": 3_027,
    },
    "Science": {
        "ai2d_merged": 4_858, "CoSyn_400k_chemical": 8_942, "CoSyn_400k_circuit": 10_470, "pathvqa": 32_632,
        "pmc_vqa(mathv360k)": 35_948, "scienceqa": 4_976, "scienceqa(nona_context)": 19_208, "tqa": 2_749,
        "visualwebinstruct(filtered)": 263_581, "vqarad": 313,
    },
    "Text-only": {
        "text_code_feedback": 66_383, "text_codefeedback_filtered_instruction": 156_525, "text_infinitymath": 101_380,
        "text_mathinstruct": 262_039, "text_mathqa": 394_996, "text_mathstepdpo10k": 10_795, "text_numinamath_cot": 859_494,
        "text_openhermes_2_5": 1_001_551, "text_openorca": 4_233_853, "text_orcamath": 200_035, "text_pythoncode25k": 49_626,
        "text_pythoncodealpaca": 18_612, "text_ruozhiba": 1_496, "text_theoremqa": 800, "text_wizardlm_evol": 69_999,
        "text_OpenMathInstruct-2": 1_000_000,
    },
}  # fmt: skip


def of(category: str) -> dict[str, SetConfig]:
    """The sets of a category, by name."""
    return {
        re.sub(r"\W+", "_", folder).strip("_"): SetConfig(
            file=f"FineVision/{folder}",
            rows=rows,
            file_from=(
                f"hf download HuggingFaceM4/FineVision --include '{folder}/*' --repo-type dataset --local-dir $ROOT/FineVision"
            ),
            licence="every set's own, see the data set's card",
        )
        for folder, rows in CATEGORIES[category].items()
    }


SETS = {name: entry for category in CATEGORIES for name, entry in of(category).items()}
