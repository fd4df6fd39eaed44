"""Stage 1: LLaVA's 558k captioned images of LAION, CC and SBU (LCS-558K), 181 MB of JSON and 27 GB of images."""

from deepstack_jax.config import SetConfig

FETCH = "hf download liuhaotian/LLaVA-Pretrain {} --repo-type dataset --local-dir $ROOT"

SETS = {
    "lcs558k": SetConfig(
        file="blip_laion_cc_sbu_558k.json",
        images="images",
        rows=558_128,
        file_from=FETCH.format("blip_laion_cc_sbu_558k.json"),
        images_from=f"{FETCH.format('images.zip')} && unzip -q $ROOT/images.zip -d $ROOT/images",
        licence="other: those of CC-3M and BLIP, see the data set's card",
    ),
}
