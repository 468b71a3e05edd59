"""Datasets: annotation files to a Dataset of Clips, one adapter a file."""

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.folder import read_folder
from msq.extract.datasets.manifest import read_classes, read_manifest

__all__ = ["Clip", "Dataset", "read_classes", "read_folder", "read_manifest"]
