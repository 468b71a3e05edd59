#!/bin/sh
# Animal Kingdom with real encoders: rare classes, and what helps them.
#
#   sh examples/animal_kingdom.sh ROOT [OUT]      ROOT: AR_metadata.xlsx, df_action.xlsx, video/
#
# Needs a GPU, the videos, `pip install 'msq[xlsx]'` for the workbooks, and a network for the
# weights (or their folders as local-dir:DIR). Of the 140 classes 94 are rare ("tail"): every result
# has map_head, map_middle and map_tail. Compared are two numbers of frames (Table 5 of the paper)
# and three losses. Run it again after a crash: what is done is not done again. What comes out, in
# OUT: a store for each number of frames, six heads, table.tex and page.html.
set -eu

root=${1:?expected the folder of Animal Kingdom: sh examples/animal_kingdom.sh ROOT [OUT]}
out=${2:-animal-kingdom}
timesformer=hf-hub:facebook/timesformer-base-finetuned-k400
clip=ViT-B-16/openai
mkdir -p "$out"

# Exit code 3: finished, and some videos could not be read; they are listed.
finished() { "$@" || [ $? -eq 3 ]; }

msq datasets check animal-kingdom --root "$root"

for frames in 8 16; do
    # Two augmented views beside the clean one: heads are trained on all, and scored on clean clips.
    finished msq extract --dataset animal-kingdom --root "$root" --out "$out/$frames.zarr" \
        --frames "$frames" --views 2 --precision bf16 \
        --video-encoder "$timesformer" --image-encoder "$clip"
    for loss in bce asymmetric focal; do
        msq train-head "$out/$frames.zarr" --queries multimodal --loss "$loss" \
            --out "$out/$frames-$loss" features.train_views=all
    done
done
msq report "$out/8-bce" "$out/8-asymmetric" "$out/8-focal" \
    "$out/16-bce" "$out/16-asymmetric" "$out/16-focal" \
    --metric map --metric map_head --metric map_middle --metric map_tail --out "$out/table.tex"
# Curves, and the average precision of each class beside its number of clips.
msq report "$out/16-bce" "$out/16-asymmetric" "$out/16-focal" --out "$out/page.html"
