"""The ten real clips through base-size encoders with random weights, without any download."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msq import open_store
from msq.cli import main

encoders = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py"))))


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


@pytest.mark.slow
def test_extract_train_and_predict_on_real_clips_at_base_size(shared, tmp_path, capsys):
    clips = sorted(p for p in (shared / "clips").iterdir() if p.suffix != ".md")
    assert len(clips) == 10
    encoders.write_timesformer_folder(tmp_path / "timesformer")
    encoders.write_clip_folder(tmp_path / "clip")
    labels = ("people", "pool", "people", "animal")
    lines = [
        f"{p},{labels[k % 4]},{'test' if k % 3 == 0 else 'train'}" for k, p in enumerate(clips)
    ]
    manifest = tmp_path / "clips.csv"
    manifest.write_text("path,labels,split\n" + "\n".join(lines) + "\n", encoding="utf-8")
    # Where the processor has bf16 products, they are several times faster than float32.
    precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    code = run(
        "extract", "--manifest", manifest, "--out", tmp_path / "s.zarr", "--frames", 16,
        "--video-encoder", f"local-dir:{tmp_path / 'timesformer'}",
        "--image-encoder", f"local-dir:{tmp_path / 'clip'}",
        "--precision", precision, "--batch", 2, "--json",
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert (code, result["done"], result["failed"]) == (0, 10, 0)
    assert result["degraded"] == []

    store = open_store(tmp_path / "s.zarr")
    assert store.tokens(range(10)).shape == (10, 17, 768)
    assert store.image(range(10)).shape == (10, 512)
    assert torch.isfinite(store.tokens(range(10)).float()).all()
    small = ("head.layers=1", "head.width=64", "head.heads=4", "--epochs", 1)
    assert run("train-head", tmp_path / "s.zarr", "--out", tmp_path / "run", "-q",
               "--classifier", "text", *small) == 0  # fmt: skip
    capsys.readouterr()
    code = run(
        "predict", clips[0], "--run", tmp_path / "run", "--labels", "hugging,a boy", "--json"
    )
    (item,) = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {p["label"] for p in item["predictions"]} == {"hugging", "a boy"}
    assert all(0 < p["score"] < 1 for p in item["predictions"])
