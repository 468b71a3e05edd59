"""A feature store without msq: plain xarray, and a linear probe in scikit-learn.

    pip install xarray scikit-learn
    python examples/read_with_xarray.py             # on a small world, a minute
    python examples/read_with_xarray.py STORE       # on yours

A store is Zarr v3: whatever reads Zarr reads it. Mind one thing: rows that were not extracted, or
failed, are zeros to every Zarr library. `status` tells: 1 and 3 are rows to read, 0 and 2 are not.
What comes out: the store as xarray shows it, and the mAP of logistic regression on the averaged
tokens, which anything larger has to beat.
"""

import sys

import numpy as np
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

if sys.argv[1:]:
    path = sys.argv[1]
else:
    from small_world import small_store

    path = small_store()

store = xr.open_datatree(path, engine="zarr", consolidated=False)
print(store)

CLEAN = 0  # view 0; augmented ones, where there are any, follow
encoder = next(iter(store["tokens"].data_vars))
good = store["status"][encoder].isel(view=CLEAN).isin([1, 3])
rows = np.flatnonzero(good)
print(f"{len(rows)} of {good.size} clips have tokens of {encoder}")

clips = store["tokens"][encoder].isel(view=CLEAN, clip=rows)
features = clips.mean(f"{encoder}_token", dtype="float32").values  # [clips, channels]
labels = store["label"].isel(clip=rows).values
split = store["split"].isel(clip=rows).values

train, test = split == "train", split == "test"
learned = labels[train].any(0)  # a class without a training clip cannot be learned
probe = make_pipeline(
    StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=1000))
)
probe.fit(features[train], labels[train][:, learned])
scores = np.full(labels[test].shape, -1.0)
scores[:, learned] = probe.predict_proba(features[test])

scored = labels[test].any(0)
shown = labels[test].any(1)  # clips without any label are not ranked, as in msq's `map`
truth, scores = labels[test][shown][:, scored], scores[shown][:, scored]
chance = average_precision_score(truth, np.random.default_rng(0).random(truth.shape))
found = average_precision_score(truth, scores)
print(f"mAP {found:.3f} over {scored.sum()} classes ({chance:.3f} by chance)")
