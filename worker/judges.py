"""What judges a job's samples, as the runner is told it: classifiers of the store and labelled image sets, as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from services.request_names import escaped
from services.tables import Classifier

__all__ = ["Judges"]

Images = Callable[[str, str, str], list[str]]
File = Callable[[str, str, str], Classifier]


class Judges:
    """Gathers the judges of one job; a classifier or a set that two of them share is named, and fetched, once.

    Args:
        images: brings an image set (its id, the folder, its place in the request) and gives the paths of its images.
        classifier: brings a classifier (its id, its place in the request, the path its file goes to).
        channels: of the checkpoint's images, where its manifest says.
    """

    def __init__(self, images: Images, classifier: File, *, channels: int | None) -> None:
        self._bring_images, self._bring_classifier, self._channels = images, classifier, channels
        self._sets: dict[str, list[str]] = {}
        self._classifiers: dict[str, dict[str, Any]] = {}

    def told(self, judge: Mapping[str, Any], pointer: str) -> dict[str, Any]:
        """One judge of a request, as ``job.json`` has it."""
        if "classifier" in judge:
            return self._classifier(judge["classifier"], f"{pointer}/classifier")
        if "sets" in judge:
            return {
                "sets": {
                    name: self._images(it, f"{pointer}/sets/{escaped(name)}") for name, it in judge["sets"].items()
                }
            }
        return {"classes": True}

    def target(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """What a job is to forget, without the images of it."""
        if "attributes" in target:
            return {
                "attributes": [
                    {
                        "judge": self.told(wanted, f"/target/attributes/{number}"),
                        "class": wanted["class"],
                        "at_most": wanted.get("at_most"),
                        "at_least": wanted.get("at_least"),
                    }
                    for number, wanted in enumerate(target["attributes"])
                ]
            }
        if "class_label" in target:
            return {"class_label": target["class_label"], "where": target["where"]}
        return {"images": True}

    def of_labels(self, judge: Mapping[str, Any] | None, pointer: str) -> dict[str, Any] | None:
        """A judge whose classes are the labels of the model, in their order, where the request names one."""
        if judge is None or "sets" not in judge:
            return None if judge is None else self.told(judge, pointer)
        # The database keeps the members of an object in an order of its own.
        return self.told({"sets": {name: judge["sets"][name] for name in sorted(judge["sets"], key=int)}}, pointer)

    def of_concepts(self, judge: Mapping[str, Any] | None, pointer: str) -> dict[str, Any] | None:
        """A judge whose classes show concepts, with the class of each, where the request names one."""
        if judge is None:
            return None
        shows = judge.get("shows") or {}
        return {**self.told(judge, pointer), "shows": {concept: shows[concept] for concept in sorted(shows)}}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the classifiers' files, by a name for each."""
        return {f"classifier_{number}": told["sha256"] for number, told in enumerate(self._classifiers.values())}

    def _images(self, image_set_id: str, pointer: str) -> list[str]:
        if image_set_id not in self._sets:
            self._sets[image_set_id] = self._bring_images(image_set_id, f"inputs/sets/{len(self._sets)}", pointer)
        return self._sets[image_set_id]

    def _classifier(self, classifier_id: str, pointer: str) -> dict[str, Any]:
        if classifier_id not in self._classifiers:
            path = f"inputs/classifiers/{len(self._classifiers)}.onnx"
            self._classifiers[classifier_id] = self._facts(self._bring_classifier(classifier_id, pointer, path), path)
        return self._classifiers[classifier_id]

    def _facts(self, row: Classifier, path: str) -> dict[str, Any]:
        return {
            "onnx": path,
            "classes": row.classes,
            "output": row.output,
            "threshold": row.threshold,
            "scale": self._scale(row.scale),
            "name": row.name,
            "sha256": row.sha256,
        }

    def _scale(self, scale: dict[str, Any] | None) -> Any:
        """A value for each channel: one that stands for all is repeated."""
        if scale is None:
            return "unit"
        times = self._channels if self._channels and len(scale["mean"]) == 1 else 1
        return {name: values * times for name, values in scale.items()}
