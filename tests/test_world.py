"""The generated world: seeded, balanced, honest about what one frame can tell."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from msq.errors import DatasetError
from msq.world import (
    ACTIONS,
    CLASSES,
    GROUPS,
    KINDS,
    World,
    caption,
    film_frames,
    frame_times,
    generate_world,
    plan_world,
    render,
    sample_scene,
    told_by,
)
from msq.world.captions import EXTRA_WORDS, PROMPTS
from msq.world.combos import combos


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return generate_world(
        tmp_path_factory.mktemp("world"), train=8, val=2, test=4, seed=3, workers=1
    )


def _rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_there_are_enough_kinds_actions_and_pairs() -> None:
    assert len(KINDS) >= 5
    assert len(ACTIONS) >= 24
    assert len(CLASSES) >= 60
    assert len({row.name for row in CLASSES}) == len(CLASSES)
    assert {told_by(row.name) for row in CLASSES} == {"looks", "motion"}
    assert all(told_by(row.name) == told_by(row.action) for row in CLASSES)


def test_every_motion_action_stands_in_a_group_and_no_looks_action_does() -> None:
    grouped = {action for group in GROUPS for action in group if action}
    assert grouped == {action for action in ACTIONS if told_by(action) == "motion"}


def test_every_pair_can_be_filmed_and_is_then_labelled() -> None:
    for row in CLASSES:
        scene = sample_scene(np.random.default_rng(1), target=(row.kind, row.action))
        assert row.name in scene.pairs
        assert 1 <= len(scene.pairs) <= 4
        assert 1 <= len(scene.actors) <= 2


def test_the_same_seed_gives_the_same_scenes_and_frames() -> None:
    first = plan_world(train=12, test=6, seed=5)
    again = plan_world(train=12, test=6, seed=5)
    other = plan_world(train=12, test=6, seed=6)
    assert first == again
    assert first != other
    assert np.array_equal(film_frames(first[7]), film_frames(again[7]))


def test_the_test_split_does_not_depend_on_the_size_of_the_training_split() -> None:
    few, many = plan_world(train=4, test=6, seed=5), plan_world(train=40, test=6, seed=5)
    assert [f for f in few if f.split == "test"] == [f for f in many if f.split == "test"]


def test_every_class_has_positives_in_every_split_of_the_demo_size() -> None:
    films = plan_world(train=500, test=300, seed=0)
    for split, least in (("train", 8), ("test", 4)):
        counts = Counter(p for f in films if f.split == split for p in f.scene.pairs)
        assert set(counts) == {row.name for row in CLASSES}
        assert min(counts.values()) >= least
        actors = [len(f.scene.actors) for f in films if f.split == split]
        assert {1, 2} == set(actors)


def test_sizes_rates_lengths_and_containers_vary() -> None:
    films = plan_world(train=300, test=0, seed=1)
    assert len({(f.width, f.height) for f in films}) >= 8
    assert len({f.rate for f in films}) == 7
    assert len({f.length for f in films}) > 20
    assert {f.path.rsplit(".", 1)[1] for f in films} == {"mp4", "mkv", "avi"}
    assert all(f.width % 2 == 0 and f.height % 2 == 0 for f in films)


def test_the_manifests_agree_with_the_films(world: World) -> None:
    films = plan_world(train=8, val=2, test=4, seed=3)
    pairs, actions = _rows(world.manifest), _rows(world.actions_manifest)
    assert [r["id"] for r in pairs] == [r["id"] for r in actions] == [f.id for f in films]
    assert Counter(r["split"] for r in pairs) == {"train": 8, "val": 2, "test": 4}
    for film, pair, action in zip(films, pairs, actions, strict=True):
        assert tuple(pair["labels"].split(";")) == film.scene.pairs
        assert tuple(action["labels"].split(";")) == film.scene.actions
        assert (world.root / pair["path"]).is_file()
    assert tuple(world.classes_file.read_text().splitlines()) == world.classes
    assert tuple(world.actions_file.read_text().splitlines()) == world.actions
    assert set(world.told_by) == set(world.classes) | set(world.actions)
    assert json.loads((world.root / "world.json").read_text())["told_by"] == world.told_by


def test_the_videos_decode_to_the_planned_frames(world: World) -> None:
    for film in plan_world(train=8, val=2, test=4, seed=3):
        with av.open(str(world.root / film.path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == pytest.approx(film.rate, rel=0.02)
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(frames) == film.length
        assert frames[0].shape == (film.height, film.width, 3)
        drawn = film_frames(film)[[0, -1]].astype(float)
        assert np.abs(drawn - np.stack([frames[0], frames[-1]])).mean() < 12


def test_an_interrupted_world_is_finished_and_a_whole_one_left_alone(
    world: World, tmp_path: Path
) -> None:
    first = generate_world(tmp_path / "w", train=3, test=2, seed=3, workers=1)
    files = sorted((first.root / "videos").iterdir())
    lost, kept = files[0].read_bytes(), files[1].stat().st_mtime_ns
    files[0].unlink()
    first.manifest.unlink()
    (first.root / "videos" / ".train-00000.part.mp4").write_bytes(b"half")
    again = generate_world(tmp_path / "w", train=3, test=2, seed=3, workers=1)
    assert again == first
    assert sorted((first.root / "videos").iterdir()) == files
    assert files[0].read_bytes() == lost
    assert files[1].stat().st_mtime_ns == kept


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    one = generate_world(tmp_path / "one", train=3, test=2, seed=4, workers=1)
    two = generate_world(tmp_path / "two", train=3, test=2, seed=4, workers=2)
    for file in sorted((one.root / "videos").iterdir()):
        assert file.read_bytes() == (two.root / "videos" / file.name).read_bytes()


def test_a_world_of_another_seed_is_refused(world: World) -> None:
    with pytest.raises(DatasetError, match="expected seed 4, found 3"):
        generate_world(world.root, train=8, val=2, test=4, seed=4, workers=1)


def test_progress_is_reported_once_per_video(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate_world(
        tmp_path / "w", train=2, test=1, seed=1, workers=1, progress=lambda *x: seen.append(x)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_scene_looks_the_same_at_every_size() -> None:
    scene = sample_scene(np.random.default_rng(8))
    times = frame_times(range(2), 2)
    small, large = render(scene, times, 48, 48), render(scene, times, 96, 96)
    reduced = large.reshape(2, 48, 2, 48, 2, 3).mean((2, 4))
    assert np.abs(small - reduced).mean() < 4
    wide = render(scene, times, 80, 48)
    assert np.abs(wide[:, :, 16:64].astype(float) - small).mean() < 4


def test_captions_name_only_what_is_to_be_seen() -> None:
    rng = np.random.default_rng(0)
    words = {w for row in CLASSES for w in row.name.split()} | set(EXTRA_WORDS)
    words |= {w for p in PROMPTS for w in p.replace("{}", "").split()}
    for index in range(50):
        scene = sample_scene(np.random.default_rng(index))
        text = caption(scene, rng)
        assert set(text.split()) <= words
        assert all(actor.kind in text for actor in scene.actors)
        named = [a for a in ACTIONS if f" {a} " in f" {text} "]
        assert named
        assert set(named) <= set(scene.actions)


def test_no_actor_does_two_things_that_exclude_each_other() -> None:
    exclusive = (
        {"walking", "running", "backing", "jumping", "bouncing", "sitting", "sleeping", "crawling"},
        {"turning left", "turning right", "rising", "sinking"},
        {"flying", "gliding", "walking", "sleeping"},
        {"swimming", "drifting", "sleeping"},
    )
    for kind in KINDS:
        for actions in combos(kind):
            assert all(len(group & set(actions)) <= 1 for group in exclusive)


def _film_of(kind: str, action: str, index: int, other: str) -> tuple[np.ndarray, np.ndarray]:
    """Eight frames each of one scene with `action` and of the same scene with `other` instead."""
    rng = np.random.default_rng([21, index])
    scene = sample_scene(rng, target=(kind, action), clutter=0.0, two=0.0)
    actor = scene.actors[0]
    swapped = tuple(sorted({other if a == action else a for a in actor.actions} - {""}))
    drift = actor.drift
    if action in ("rising", "sinking"):
        drift = (drift[0], -drift[1])
    facing = -actor.facing if action.startswith("turning") else actor.facing
    twin = replace(actor, actions=swapped, drift=drift, facing=facing)
    times = frame_times(range(8), 8)
    return render(scene, times, 48, 48), render(replace(scene, actors=(twin,)), times, 48, 48)


@pytest.mark.parametrize(
    ("kind", "action", "other"),
    [
        ("human", "walking", "running"),
        ("dog", "walking", "backing"),
        ("human", "jumping", "bouncing"),
        ("human", "waving", "pointing"),
        ("human", "dancing", "posing"),
        ("dog", "wagging", ""),
        ("bird", "flying", "gliding"),
        ("fish", "swimming", "drifting"),
        ("fish", "rising", "sinking"),
        ("snake", "slithering", "resting"),
        ("snake", "coiling", "uncoiling"),
        ("human", "turning left", "turning right"),
    ],
)
def test_one_frame_does_not_tell_motion_actions_apart_but_their_order_does(
    kind: str, action: str, other: str
) -> None:
    """Twins that differ in the action alone: same single frames over many clips, another film."""
    films = [_film_of(kind, action, k, other) for k in range(40)]
    # One frame from each clip, at any time: the mean picture of both actions must agree ...
    ours = np.stack([a[k % 8] for k, (a, _) in enumerate(films)]).astype(float)
    theirs = np.stack([b[(3 * k + 1) % 8] for k, (_, b) in enumerate(films)]).astype(float)
    own = np.stack([a[(3 * k + 1) % 8] for k, (a, _) in enumerate(films)]).astype(float)
    between = np.abs(ours.mean(0) - theirs.mean(0)).mean()
    within = np.abs(ours.mean(0) - own.mean(0)).mean()
    assert between < 1.6 * within + 0.5
    # ... while the films themselves differ, frame by frame.
    assert np.mean([np.abs(a.astype(float) - b).mean() for a, b in films]) > 0.5


def test_the_table_in_the_documentation_is_the_table_in_the_code() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "world.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "| " in line]
    documented = {
        (f"{kind} {cell[0]}", cell[1])
        for cell in cells
        if cell[0] in ACTIONS
        for kind in cell[2].split(", ")
    }
    assert documented == {(row.name, row.told_by) for row in CLASSES}
