"""Predictions in the form of the official Charades scorer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msq.errors import MsqError, UsageError
from msq.head import metrics
from msq.head.export import (
    export_charades_run,
    read_charades_submission,
    write_charades_submission,
)


def example(n: int = 1863) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, 157, generator=generator)
    labels = (torch.rand(n, 157, generator=generator) < 0.05).long()
    labels[:49] = 0
    return [f"V{k:04d}" for k in range(n)], scores, labels


def test_a_submission_has_one_line_a_video_and_comes_back_bit_for_bit(tmp_path):
    ids, scores, labels = example()
    file = tmp_path / "submission.txt"
    write_charades_submission(file, ids, scores)
    lines = file.read_text().splitlines()
    assert len(lines) == 1863
    assert {len(line.split(" ")) for line in lines} == {158}
    assert lines[0].startswith("V0000 ")
    back = read_charades_submission(file, ids)
    assert torch.equal(back.float(), scores)
    assert metrics.charades_map(back, labels) == metrics.charades_map(scores, labels)
    # The order of the lines is of no matter, and tabs are as good as blanks.
    file.write_text("\n".join(line.replace(" ", "\t") for line in reversed(lines)))
    assert torch.equal(read_charades_submission(file, ids), back)


def test_a_missing_video_is_ranked_last_and_warned_of(tmp_path):
    ids, scores, labels = example()
    file = tmp_path / "submission.txt"
    write_charades_submission(file, [*ids[:1800], "other"], scores[:1801])
    with (
        pytest.warns(UserWarning, match="63 videos without a line, ranked last"),
        pytest.warns(UserWarning, match="1 videos not asked for: .'other'"),
    ):
        back = read_charades_submission(file, ids)
    assert bool((back[1800:] == -torch.inf).all())
    assert float(metrics.charades_map(back, labels)) == pytest.approx(
        float(metrics.charades_map(scores.masked_fill((torch.arange(1863) >= 1800)[:, None],
                                                      -torch.inf), labels))
    )  # fmt: skip
    write_charades_submission(file, ids[:5], scores[:5])
    with pytest.warns(UserWarning, match="5 videos, the official test set has 1863"):
        read_charades_submission(file, ids[:5])


def test_a_run_is_exported_from_its_predictions(tmp_path):
    ids, scores, _ = example()
    np.savez(tmp_path / "predictions.npz", ids=np.array(ids), logits=scores.numpy())
    assert export_charades_run(tmp_path, tmp_path / "s.txt") == 1863
    assert torch.equal(read_charades_submission(tmp_path / "s.txt", ids).float(), scores)
    with pytest.raises(UsageError, match=r"predictions\.npz: expected the predictions"):
        export_charades_run(tmp_path / "none", tmp_path / "s.txt")


def test_what_cannot_be_a_submission_is_refused(tmp_path):
    ids, scores, _ = example(3)
    file = tmp_path / "s.txt"
    with pytest.raises(UsageError, match=r"scores \[N, K\] of 2 ids, found \[3, 157\]"):
        write_charades_submission(file, ids[:2], scores)
    with pytest.raises(UsageError, match="without blanks, found"):
        write_charades_submission(file, ["a b", "c", "d"], scores)
    with pytest.raises(UsageError, match="some twice"):
        write_charades_submission(file, ["a", "a", "d"], scores)
    with pytest.raises(MsqError, match="NaN"):
        write_charades_submission(file, ids, scores * torch.nan)
    assert not file.exists()
    with pytest.raises(UsageError, match="found nothing there"):
        read_charades_submission(file, ids)
    for text, words in (
        ("V0000 1 2 3\n", "line 1: expected an id and 157 scores, found 3"),
        ("V0000 1 high\n", "line 1: could not convert"),
        (f"V0000{' 1' * 157}\n\nV0000{' 1' * 157}\n", "line 3: the id 'V0000' stands twice"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_charades_submission(file, ids)
