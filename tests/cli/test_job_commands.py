"""What the words of a command come to on the wire, and which say nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.exits import ExitCode
from tests.cli.here import forgetd_here
from tests.cli.processes import UNKNOWN_JOB
from tests.cli.scripted import Answer, ScriptedServer


class TestDownload:
    @staticmethod
    def link(store: ScriptedServer, content: bytes) -> Answer:
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        return Answer(307, b"", {"Location": store.url, "Repr-Digest": f"sha-256=:{digest}:"})

    @pytest.mark.parametrize("published", [["tamed.safetensors", "report.json"], ["tamed.safetensors", "pipeline.tar"]])
    def test_the_tamed_model_comes_in_every_form_that_it_has(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, published: list[str]
    ) -> None:
        content, forms = b"weights", [name for name in published if not name.endswith(".json")]
        facts = {"media_type": "application/x-tar", "bytes": 7, "sha256": hashlib.sha256(content).hexdigest()}
        listed = {"items": [{"name": name, **facts} for name in published]}
        link = self.link(make_server(Answer(200, content)), content)
        server = make_server(link, Answer(200, json.dumps(listed).encode()), link)

        done = forgetd_here("jobs", "download", UNKNOWN_JOB, "--url", server.url, "--key", "k", cwd=tmp_path)

        assert (done.code, done.out.split()) == (ExitCode.OK, forms), done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(forms)


class TestJobRequests:
    """What the words of a command come to on the wire."""

    JUDGE, SETS = f"clf_{'0' * 32}", "smiling=imgs_1,other=imgs_2"

    def sent(
        self, make_server: Callable[..., ScriptedServer], folder: Path, *words: str
    ) -> tuple[str, dict[str, object]]:
        server = make_server(Answer(202, json.dumps({"id": UNKNOWN_JOB, "status": "queued"}).encode()))

        done = forgetd_here("jobs", *words, "--url", server.url, "--key", "k", cwd=folder)

        assert (done.code, done.out) == (ExitCode.OK, f"{UNKNOWN_JOB}\n"), done.err
        return server.received[0].path, json.loads(server.received[0].body)

    @pytest.mark.parametrize(
        ("words", "target"),
        [
            (["imgs_1"], {"images": "imgs_1"}),
            (
                ["--attribute", f"{JUDGE}:smiling<=0.1"],
                {"attributes": [{"classifier": JUDGE, "class": "smiling", "at_most": 0.1}]},
            ),
            (
                ["--attribute", f"{SETS}:big smile >= .5", "--attribute", f"{JUDGE}:a<=1e-2"],
                {
                    "attributes": [
                        {"sets": {"smiling": "imgs_1", "other": "imgs_2"}, "class": "big smile", "at_least": 0.5},
                        {"classifier": JUDGE, "class": "a", "at_most": 0.01},
                    ]
                },
            ),
            (["--class-label", "0"], {"class_label": 0}),
            (["--class-label", "3", "--where", "prior"], {"class_label": 3, "where": "prior"}),
            (["imgs_1", "--class-label", "3"], {"class_label": 3, "images": "imgs_1"}),
            (["--concept", "zero"], {"concept": "zero"}),
            (["--concept", "a, b=c", "--alias", "d", "--alias", "e"], {"concept": "a, b=c", "aliases": ["d", "e"]}),
        ],
    )
    def test_forget(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, words: list[str], target: dict[str, object]
    ) -> None:
        path, body = self.sent(make_server, tmp_path, "forget", "ckpt_1", *words)

        assert (path, body["target"]) == ("/jobs/forget", target)

    @pytest.mark.parametrize(
        ("words", "members"),
        [
            ([], {}),
            (["--replace-with", "noise", "--judge", JUDGE], {"replace_with": "noise", "judge": {"classifier": JUDGE}}),
            (
                ["--replace-with", "1", "--at-most", "0.1", "--replaced-at-least", ".8", "--others-within", "0.03"],
                {
                    "replace_with": {"class_label": 1},
                    "criteria": {"forgotten_at_most": 0.1, "replaced_at_least": 0.8, "others_within": 0.03},
                },
            ),
            (
                ["--replace-with", "imgs_1", "--judge", "0=imgs_2,1=imgs_3", "--at-most", "0.1", "--release-always"],
                {
                    "replace_with": {"images": "imgs_1"},
                    "judge": {"sets": {"0": "imgs_2", "1": "imgs_3"}},
                    "criteria": {"forgotten_at_most": 0.1, "release_weights": "always"},
                },
            ),
        ],
    )
    def test_forget_a_class_of_a_vae(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, words: list[str], members: dict[str, object]
    ) -> None:
        _, body = self.sent(make_server, tmp_path, "forget", "ckpt_1", "--class-label", "0", *words)

        said = {name: body[name] for name in ("replace_with", "judge", "criteria") if name in body}
        assert said == {"criteria": {}} | members

    @pytest.mark.parametrize(
        ("words", "members"),
        [
            (["--replace-with", "others"], {"replace_with": "others"}),
            (["--replace-with-concept", "one"], {"replace_with": {"concept": "one"}}),
            (["--remember-concept", "one", "--remember-concept", "2"], {"remember": {"concepts": ["one", "2"]}}),
            (
                ["--remember-concept", "one", "--remember-generated", "100"],
                {"remember": {"concepts": ["one"], "generated": 100}},
            ),
            (
                ["--remember-set", "one=imgs_1", "--remember-set", "a=b=imgs_2"],
                {"remember": {"sets": {"one": "imgs_1", "a=b": "imgs_2"}}},
            ),
            (
                ["--judge", JUDGE, "--shows", "zero=0", "--shows", "one=class 1"],
                {"judge": {"classifier": JUDGE, "shows": {"zero": "0", "one": "class 1"}}},
            ),
            (
                ["--guidance-scale", "2.5", "--sampling-steps", "20", "-p", "scope=cross-attention"],
                {"parameters": {"guidance_scale": 2.5, "sampling_steps": 20, "scope": "cross-attention"}},
            ),
        ],
    )
    def test_forget_a_concept(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, words: list[str], members: dict[str, object]
    ) -> None:
        _, body = self.sent(make_server, tmp_path, "forget", "ckpt_1", "--concept", "zero", *words)

        said = {name: body[name] for name in ("replace_with", "judge", "remember", "parameters") if name in body}
        assert said == {"parameters": {}} | members

    @pytest.mark.parametrize(
        ("words", "condition", "replacements"),
        [
            (
                ["--condition-class", "0", "--replacement", "a=1", "--replacement", "b=2"],
                {"class_label": 0},
                {"a": {"class_label": 1}, "b": {"class_label": 2}},
            ),
            (
                [
                    "--condition-concept",
                    "a doctor",
                    "--alias",
                    "GP",
                    "--replacement",
                    "a=x y",
                    "--replacement",
                    "b=2",
                ],
                {"concept": "a doctor", "aliases": ["GP"]},
                {"a": {"concept": "x y"}, "b": {"concept": "2"}},
            ),
        ],
    )
    def test_debias_a_condition(
        self,
        make_server: Callable[..., ScriptedServer],
        tmp_path: Path,
        words: list[str],
        condition: dict[str, object],
        replacements: dict[str, object],
    ) -> None:
        shares = ["--target", "a=.5", "--target", "b=.5", "--others-within", "0.1", "--guidance-scale", "3"]

        _, body = self.sent(make_server, tmp_path, "debias", "ckpt_1", self.JUDGE, *shares, *words)

        assert (body["condition"], body["replacements"]) == (condition, replacements)
        assert (body["criteria"], body["parameters"]) == ({"others_within": 0.1}, {"guidance_scale": 3})

    @pytest.mark.parametrize(
        ("judge", "attribute"),
        [
            (JUDGE, {"classifier": JUDGE}),
            (SETS, {"sets": {"smiling": "imgs_1", "other": "imgs_2"}}),
            ("own-classes", {"classes": True}),
        ],
    )
    def test_debias(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, judge: str, attribute: dict[str, object]
    ) -> None:
        shares = ["--target", "a=0.25", "--target", "b=c=0.75"]

        path, body = self.sent(make_server, tmp_path, "debias", "ckpt_1", judge, *shares, "--tolerance", "0.05")

        assert path == "/jobs/debias"
        assert body["attribute"] == attribute
        assert body["target_distribution"] == {"a": 0.25, "b=c": 0.75}
        assert body["tolerance"] == 0.05
        assert "confidence" not in body

    @pytest.mark.parametrize(
        "words",
        [
            ["forget", "ckpt_1"],
            ["forget", "ckpt_1", "--attribute", "smiling<=0.1"],
            ["forget", "ckpt_1", "--attribute", f"{JUDGE}:smiling=0.1"],
            ["forget", "ckpt_1", "--attribute", "smiling=imgs_1:smiling<=0.1"],
            ["forget", "ckpt_1", "--attribute", f"{JUDGE}:smiling<=--1"],
            ["forget", "ckpt_1", "--class-label", "0", "--replace-with", "nothing"],
            ["forget", "ckpt_1", "--class-label", "0", "--replace-with=-1"],
            ["forget", "ckpt_1", "--class-label", "0", "--judge", "a=imgs_1"],
            ["forget", "ckpt_1", "--concept", "a", "--replace-with", "one"],
            ["forget", "ckpt_1", "--concept", "a", "--replace-with", "noise", "--replace-with-concept", "b"],
            ["forget", "ckpt_1", "--concept", "a", "--shows", "a=0"],
            ["forget", "ckpt_1", "--concept", "a", "--judge", JUDGE, "--shows", "a"],
            ["forget", "ckpt_1", "--concept", "a", "--remember-set", "b"],
            ["forget", "ckpt_1", "--concept", "a", "--remember-set", "b=imgs_1", "--remember-set", "b=imgs_2"],
            ["forget", "ckpt_1", "--concept", "a", "--remember-set", "b=imgs_1", "--remember-concept", "c"],
            ["debias", "ckpt_1", JUDGE, "--target", "a=1", "--condition-class", "0", "--condition-concept", "b"],
            ["debias", "ckpt_1", JUDGE, "--target", "a=1", "--condition-class", "0", "--replacement", "a=b"],
            ["debias", "ckpt_1", JUDGE, "--target", "a=1", "--condition-class", "0", "--alias", "b"],
            ["debias", "ckpt_1", JUDGE],
            ["debias", "ckpt_1", JUDGE, "--target", "half"],
            ["debias", "ckpt_1", JUDGE, "--target", "a=half"],
            ["debias", "ckpt_1", "a=imgs_1,b", "--target", "a=1"],
        ],
    )
    def test_words_that_say_nothing_are_wrong_usage(self, tmp_path: Path, words: list[str]) -> None:
        done = forgetd_here("jobs", *words, "--url", "http://127.0.0.1:9", "--key", "k", cwd=tmp_path)

        assert done.code == ExitCode.USAGE
