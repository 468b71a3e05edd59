#!/bin/sh
# Does a head find actions that it was never trained on?
#
#   sh examples/zero_shot.sh                  on a small world, a minute
#   sh examples/zero_shot.sh STORE            on yours
#
# Classes are divided at random into seen ones, which are trained, and unseen ones; twice, for a
# mean and a standard deviation. In the table `unseen only` ranks the unseen classes alone, and
# `general.` all classes at once, as it is when nobody says what to look for; CLIP without training
# and chance stand beside them. Random queries (`vanilla`) know nothing of an unseen class, and are
# at chance: words find it. What comes out: `zero-shot/table.md`, `table.csv`, `per_class.csv` and a
# head for each split. For a paper: --seen 50,75 --splits 10, and nothing behind --queries.
set -eu

store=${1:-small-world/store.zarr}
if [ $# -eq 0 ]; then
    python "$(dirname "$0")/small_world.py"
fi

msq zero-shot "$store" --out zero-shot --seen 75 --splits 2 --queries vanilla,multimodal \
    head.layers=2 head.heads=4 head.ffn=256 optim.lr=2e-3 --epochs 6
