"""The end of a training run: the test clips are scored once, and the files of the run written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msq import config as configuration
from msq.head.checkpoint import save_head, save_predictions
from msq.head.evaluate import measure, probabilities
from msq.head.json_file import write_json as write_result
from msq.head.run import RunDirectory
from msq.head.training import Training


def conclude(
    training: Training, directory: RunDirectory, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Score the test clips, write the files of a finished run, `result.json` last.

    Args:
        training: with the chosen weights.
        directory: of the run.
        more: entries of the result beside those of every run.
    """
    f, config, model = training.features, training.config, training.model
    split = next((name for name in ("test", "val", "train") if f.rows(name).numel()), "train")
    rows = f.rows(split)
    logits = training.scored(rows)
    epochs, best = len(training.history), training.best
    result: dict[str, Any] = {
        "run": None if directory.path is None else str(directory.path),
        "protocol": config.train.protocol,
        **measure(logits, f, rows),
        "split": split,
        "partition": f.partition,
        "views": f.view_name,
        "train_views": [f.view_name] if f.train_views is None else list(f.train_views.names),
        "epochs": epochs,
        "seconds": training.seconds,
        "seconds_per_epoch": training.seconds / max(epochs, 1),
        "selected": config.train.select if best is not None else "last",
        "weights": "averaged" if training.average is not None else "raw",
        "best_epoch": None if best is None else best["epoch"],
        "best_val_map": None if best is None else best["val_map"],
        "selected_by": config.train.select_by,
        "best_val_score": None if best is None else best["value"],
        "protocol_changes": configuration.protocol_changes(config),
        "dataset": f.name,
        "variant": f.variant,
        "task": f.task,
        "queries": config.head.queries,
        "classifier": config.head.classifier,
        "loss": training.loss,
        "step": training.choice.to_dict(),
        "seed": config.train.seed,
        "clips": len(rows),
        "clips_by_split": {
            "train": training.clips,
            "val": len(training.val_rows),
            "test": len(f.rows("test")),
            "train_unlabelled": int((f.labels[training.train_rows] == 0).all(1).sum()),
        },
        "coverage": f.coverage(),
        "left_out": dict(f.left_out),
        "degraded": list(f.degraded),
        "parameters": sum(p.numel() for p in training.parameters),
        "fingerprint": configuration.fingerprint(config),
        **(more or {}),
    }
    if directory.path is not None:
        save_head(directory.path / "head.safetensors", model, f, config.train.protocol)
        ids = [f.ids[row] for row in rows.tolist()]
        known = None if f.known is None else f.known[rows]
        save_predictions(directory.path / "predictions.npz", ids, logits,
                         probabilities(logits, f.task), f.labels[rows], f.classes,
                         known)  # fmt: skip
        directory.log(f"done after {epochs} epochs: {split} mAP {result['metrics']['map']:.4f}")
        directory.write_scores(result)
        write_result(directory.path / "result.json", result)
    return result
