"""FineVision: 185 sets, 24 million rows, 5 TB; a folder of parquet with the images inside for each (HuggingFaceM4/FineVision).

Every turn is rated 1 to 5 in four ways: `min_relevance`, `min_image_correspondence`, `min_visual_dependency` and
`min_formatting` leave out rows whose worst turn has less. Set names are the folders' without their brackets; `of` gives those
of a category. No published number of rows per set was found, so none is expected.
"""

import re

from deepstack_jax.config import SetConfig

CATEGORIES = {
    "Captioning & Knowledge": """
        coco_colors densefusion_1m face_emotion google_landmarks image_textualization(filtered) laion_gpt4v localized_narratives
        sharegpt4o sharegpt4v(coco) sharegpt4v(knowledge) sharegpt4v(llava) sharegpt4v(sam) textcaps""",
    "Chart & Table": """
        chart2text chartqa CoSyn_400k_chart CoSyn_400k_table dvqa figureqa figureqa(mathv360k) finqa hitab lrv_chart
        mmc_instruct multihiertt plotqa robut_sqa robut_wikisql robut_wtq SynthChartNet tabmwp tabmwp(mathv360k) tat_dqa
        tat_qa Unichart vistext vqaonbd""",
    "General VQA": """
        alfworldgpt allava_laion allava_vflan cambrian(filtered)_processed chinesememe cocoqa CoSyn_400k_graphic datik datikz
        drivelm hateful_memes iconqa iconqa(mathv360k) idk indoor_qa LLaVA_Instruct_150K llavar_gpt4_20k lnqa
        lrv_normal(filtered) lvis_instruct4v mimic_cgd mmevol mmra nlvr2 sketchyvqa spark spatialsense spot_the_diff
        vision_flan(filtered) visual7w vizwiz(mathv360k) vqav2 vsr websight wildvision yesbut""",
    "Grounding & Counting": "aguvis-stage-1 groundui objects365_qa oodvqa tallyqa",
    "Mathematics": """
        clevr clevr_math clevr_math(mathv360k) CoSyn_400k_math geo170k(align) geo170k(qa) geo3k geometry3k(mathv360k) geomverse
        geoqa+(mathv360k) geos(mathv360k) intergps mavis_math_metagen mavis_math_rule_geo raven super_clevr(mathv360k)
        unigeo(mathv360k)""",
    "Naive OCR": """
        art captcha chrome_writting cocotext ctw funsd hme100k hw_squad iam iiit5k imgur5k k12_printing latex_handwritten
        latexformulas maptext mathwriting-google memotion orand_car_a rendered_text sroie svrd SynthCodeNet synthdog
        SynthFormulaNet tal_ocr_eng wordart olmOCR-mix-0225-documents olmOCR-mix-0225-books""",
    "OCR QA": """
        a_okvqa aokvqa arxivqa bentham blockdiagramcomputerized blockdiagramhandwritten CoSyn_400k_diagram CoSyn_400k_document
        CoSyn_400k_music CoSyn_400k_nutrition diagram_image_to_text DoclingMatix docvqa est_vqa handwriting_forms
        infographic_vqa infographic_vqa_llava_format infographic(gpt4v) invoices_receipts mapqa mapqa(mathv360k) mmsoc_memotion
        ocrvqa pdfvqa screen2words screenqa slidevqa st_vqa sujet_finance textocr(gpt4v) textvqa ureader_cap ureader_ie
        ureader_kg_processed ureader_qa_processed visualmrc""",
    "Science": """
        ai2d_merged CoSyn_400k_chemical CoSyn_400k_circuit pathvqa pmc_vqa(mathv360k) scienceqa scienceqa(nona_context) tqa
        visualwebinstruct(filtered) vqarad""",
    "Text-only": """
        text_code_feedback text_codefeedback_filtered_instruction text_infinitymath text_mathinstruct text_mathqa
        text_mathstepdpo10k text_numinamath_cot text_openhermes_2_5 text_openorca text_orcamath text_pythoncode25k
        text_pythoncodealpaca text_ruozhiba text_theoremqa text_wizardlm_evol text_OpenMathInstruct-2""",
}


def of(category: str) -> dict[str, SetConfig]:
    """The sets of a category, by name."""
    return {
        re.sub(r"\W+", "_", folder).strip("_"): SetConfig(
            file=f"FineVision/{folder}",
            file_from=(
                f"hf download HuggingFaceM4/FineVision --include '{folder}/*' --repo-type dataset --local-dir $ROOT/FineVision"
            ),
            licence="every set's own, see the data set's card",
        )
        for folder in CATEGORIES[category].split()
    }


SETS = {name: entry for category in CATEGORIES for name, entry in of(category).items()}
