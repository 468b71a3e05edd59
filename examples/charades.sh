#!/bin/sh
# Charades with real encoders: the commands behind the paper's Tables 1 and 3, and a file of scores
# for the official scorer.
#
#   sh examples/charades.sh ROOT [OUT]      ROOT: Charades_v1_train.csv, …, Charades_v1_480/
#
# Needs a GPU, the videos, and a network for the weights (or their folders as local-dir:DIR).
# Encoding is slow, and is done once: --dry-run says how slow. Run it again after a crash: what is
# done is not done again. What comes out, in OUT: two stores, four heads, table1.tex, scores.txt and
# the sweep zero-shot/.
#
# Two protocols, see docs/protocols.md: `paper` (the equations; `map` is comparable with other work)
# and `official` (what the authors' code does; `map_official` is the number of their tables).
set -eu

root=${1:?expected the folder of Charades: sh examples/charades.sh ROOT [OUT]}
out=${2:-charades}
timesformer=hf-hub:facebook/timesformer-base-finetuned-k400
clip=ViT-B-16/openai
mkdir -p "$out"

# Exit code 3: finished, and some videos could not be read; they are listed.
finished() { "$@" || [ $? -eq 3 ]; }

# What is there, beside what is published. It needs the annotation files only.
msq datasets check charades --root "$root"

# Stage one, once for each protocol.
finished msq extract --dataset charades --root "$root" --out "$out/paper.zarr" --frames 16 \
    --video-encoder "$timesformer" --image-encoder "$clip" --precision bf16 --dry-run
finished msq extract --dataset charades --root "$root" --out "$out/paper.zarr" --frames 16 \
    --video-encoder "$timesformer" --image-encoder "$clip" --precision bf16
finished msq extract --dataset charades --root "$root" --out "$out/official.zarr" --frames 16 \
    --video-encoder "$timesformer" --image-encoder "$clip" --precision bf16 --protocol official

# Stage two, Table 1: without and with the video in the queries.
for protocol in paper official; do
    for queries in text multimodal; do
        msq train-head "$out/$protocol.zarr" --protocol "$protocol" --queries "$queries" \
            --out "$out/$protocol-$queries"
    done
done
msq report "$out/paper-text" "$out/paper-multimodal" "$out/official-text" \
    "$out/official-multimodal" --metric map --metric map_official --out "$out/table1.tex"

# A line for each test video, as Charades_v1_classify.m reads it.
msq eval "$out/paper-multimodal" "$out/paper.zarr" --export "$out/scores.txt"

# Table 3: classes that were never trained.
msq zero-shot "$out/paper.zarr" --out "$out/zero-shot" --seen 50,75 --splits 10 --queries all
