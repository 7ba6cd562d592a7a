"""The commands against a real service: what they print, where, and how they end."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cli import Client
from cli.exits import ExitCode
from tests.cli.processes import ROOT, Up, environment, forgetd
from tests.cli.scripted import Answer, ScriptedServer
from tests.onnx_files import classifier

COMMANDS = [
    ["up"],
    ["demo"],
    ["migrate"],
    ["checkpoints", "push"],
    ["checkpoints", "list"],
    ["checkpoints", "show"],
    ["classifiers", "upload"],
    ["classifiers", "list"],
    ["classifiers", "show"],
    ["classifiers", "delete"],
    ["images", "push"],
    ["images", "erase"],
    ["jobs", "forget"],
    ["jobs", "debias"],
    ["jobs", "list"],
    ["jobs", "show"],
    ["jobs", "watch"],
    ["jobs", "cancel"],
    ["jobs", "download"],
    ["jobs", "report"],
    ["keys", "create"],
    ["keys", "list"],
    ["keys", "revoke"],
]
UNKNOWN_JOB = f"job_{'0' * 32}"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small picture."""
    path = tmp_path / "anna-example.png"
    Image.effect_noise((32, 32), 60).save(path)
    return path


class TestHelp:
    def test_it_is_fast_because_it_loads_nothing_heavy(self) -> None:
        heavy = ("httpx", "sqlalchemy", "alembic", "fastapi", "uvicorn", "celery", "boto3", "psycopg", "torch", "numpy")
        code = f"import sys, cli.main; sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"

        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )

        assert done.stderr == ""
        assert done.returncode == 0

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_every_command_teaches_with_an_example(self, command: list[str]) -> None:
        from typer.testing import CliRunner

        from cli.main import app

        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"}, prog_name="forgetd")

        assert shown.exit_code == 0
        assert f"Example: {'FORGETD_DATABASE_URL=' if command == ['migrate'] else 'forgetd ' + ' '.join(command)}" in (
            shown.output
        )


class TestExitCodes:
    def test_0_the_service_here_is_found(self, up: Up) -> None:
        done = forgetd("jobs", "list", cwd=up.folder)

        assert (done.code, done.out, done.err) == (ExitCode.OK, "", "")

    def test_2_wrong_usage(self, tmp_path: Path) -> None:
        done = forgetd("jobs", "list", "--colour", cwd=tmp_path)

        assert done.code == ExitCode.USAGE
        assert "No such option" in done.err

    def test_3_refused(self, up: Up) -> None:
        done = forgetd("jobs", "show", UNKNOWN_JOB, cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert done.out == ""
        assert UNKNOWN_JOB in done.err

    def test_3_a_wrong_key_says_what_to_do(self, up: Up) -> None:
        done = forgetd("jobs", "list", cwd=up.folder, env={"FORGETD_URL": up.profile["url"], "FORGETD_KEY": "wrong"})

        assert done.code == ExitCode.REFUSED
        assert "forgetd keys create" in done.err

    def test_4_no_service_is_known(self, tmp_path: Path) -> None:
        done = forgetd("jobs", "list", cwd=tmp_path)

        assert done.code == ExitCode.UNREACHABLE
        assert "forgetd up" in done.err

    @pytest.mark.parametrize(
        ("members", "code"),
        [
            ({"status": "succeeded"}, ExitCode.OK),
            ({"status": "failed", "reason": "internal"}, ExitCode.JOB_FAILED),
            ({"status": "cancelled"}, ExitCode.JOB_FAILED),
            ({"status": "failed", "reason": "criteria_not_met"}, ExitCode.CRITERIA_NOT_MET),
            ({"status": "running"}, ExitCode.STILL_RUNNING),
        ],
    )
    def test_watching_ends_as_the_job_ends(
        self, make_server: Callable[..., ScriptedServer], tmp_path: Path, members: dict[str, str], code: ExitCode
    ) -> None:
        server = make_server(Answer(200, json.dumps({"id": UNKNOWN_JOB, **members}).encode()))

        done = forgetd(
            "jobs", "watch", UNKNOWN_JOB, "--timeout", "0.5", "--url", server.url, "--key", "k", cwd=tmp_path
        )

        assert done.code == code
        assert done.out == ""


class TestProfile:
    def test_its_key_goes_to_its_service_alone(self, up: Up, make_server: Callable[..., ScriptedServer]) -> None:
        other = make_server(Answer(200, b'{"items": [], "next_cursor": null}'))

        forgetd("jobs", "list", "--url", other.url, cwd=up.folder)

        assert up.profile["key"] not in str(other.received)
        assert "authorization" not in other.received[0].headers

    def test_one_that_others_can_read_is_not_trusted(self, up: Up) -> None:
        path = up.folder / ".forgetd" / "profile.json"
        path.chmod(0o644)
        try:
            done = forgetd("jobs", "list", cwd=up.folder)
        finally:
            path.chmod(0o600)

        assert done.code == ExitCode.FAILURE
        assert "0600" in done.err

    def test_it_is_found_by_its_folder_from_anywhere(self, up: Up, tmp_path: Path) -> None:
        folder = str(up.folder / ".forgetd")

        assert forgetd("jobs", "list", cwd=tmp_path, env={"FORGETD_DATA_DIR": folder}).code == ExitCode.OK


class TestKeys:
    def test_a_key_works_until_it_is_revoked(self, up: Up, tmp_path: Path) -> None:
        made = json.loads(forgetd("keys", "create", "--tenant", "acme", "--json", cwd=up.folder).out)
        caller = {"FORGETD_URL": up.profile["url"], "FORGETD_KEY": made["secret"]}

        before = forgetd("jobs", "list", cwd=tmp_path, env=caller)
        revoked = forgetd("keys", "revoke", made["id"], cwd=up.folder)
        after = forgetd("jobs", "list", cwd=tmp_path, env=caller)

        assert [before.code, revoked.code, after.code] == [ExitCode.OK, ExitCode.OK, ExitCode.REFUSED]
        assert made["secret"] not in forgetd("keys", "list", cwd=up.folder).out

    def test_a_script_gets_the_secret_alone(self, up: Up) -> None:
        done = forgetd("keys", "create", "--tenant", "acme", cwd=up.folder)

        assert done.out.startswith("fgt_")
        assert len(done.out.split()) == 1

    def test_without_a_database_it_says_how_to_name_one(self, tmp_path: Path) -> None:
        done = forgetd("keys", "list", cwd=tmp_path)

        assert done.code == ExitCode.FAILURE
        assert "FORGETD_DATABASE_URL" in done.err

    def test_migrating_what_is_migrated_changes_nothing(self, up: Up) -> None:
        assert forgetd("migrate", cwd=up.folder).code == ExitCode.OK


class TestUploads:
    def test_a_script_gets_the_id_alone(self, up: Up, photo: Path) -> None:
        done = forgetd("images", "push", str(photo), cwd=up.folder)

        assert done.out.startswith("imgs_")
        assert len(done.out.split()) == 1
        assert "1 image" in done.err

    def test_json_is_what_the_service_sent(self, up: Up, photo: Path) -> None:
        done = forgetd("images", "push", str(photo.parent), "--json", cwd=up.folder)

        sent = json.loads(done.out)
        with Client(up.profile["url"], up.profile["key"]) as client:
            assert client.erase_images(sent["id"]).erased_at is not None
        assert sent["count"] == 1

    def test_a_file_that_is_no_image_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "notes.png").write_bytes(b"no picture")

        done = forgetd("images", "push", str(tmp_path / "notes.png"), cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert done.out == ""

    def test_a_folder_without_images_is_wrong_usage(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()

        assert forgetd("images", "push", str(tmp_path / "empty"), cwd=up.folder).code == ExitCode.USAGE

    def test_a_file_that_is_no_model_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(os.urandom(4096))

        done = forgetd("checkpoints", "push", str(tmp_path / "model.pt"), cwd=up.folder)

        assert done.code == ExitCode.REFUSED

    def test_a_classifier_is_uploaded_listed_shown_and_deleted(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "smiles.onnx").write_bytes(classifier())
        cwd = up.folder

        made = forgetd("classifiers", "upload", str(tmp_path / "smiles.onnx"), "--classes", "other,smiling", cwd=cwd)
        name = made.out.strip()
        listed = forgetd("classifiers", "list", cwd=cwd)
        shown = forgetd("classifiers", "show", name, cwd=cwd)
        deleted = forgetd("classifiers", "delete", name, cwd=cwd)

        assert made.code == ExitCode.OK, made.err
        assert "8 x 8 pixels, 1 channels" in made.err
        assert f"{name}\tsmiles.onnx\tother, smiling" in listed.out
        assert "logits, threshold 0.5" in shown.out
        assert deleted.code == ExitCode.OK
        assert name not in forgetd("classifiers", "list", cwd=cwd).out

    def test_a_file_that_is_no_classifier_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "smiles.onnx").write_bytes(classifier(3))

        done = forgetd("classifiers", "upload", str(tmp_path / "smiles.onnx"), "--classes", "a,b", cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "classes: The output has shape (N, 3), and 2 classes were named" in done.err

    def test_a_debias_request_names_what_is_wrong(self, up: Up) -> None:
        words = ("jobs", "debias", f"ckpt_{'0' * 32}", f"clf_{'0' * 32}", "--target", "a=0.5", "--target", "b=0.4")

        done = forgetd(*words, cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "/target_distribution: the fractions sum to 0.9; they must sum to 1" in done.err

    def test_a_forget_request_names_what_is_wrong(self, up: Up, photo: Path) -> None:
        images = forgetd("images", "push", str(photo), cwd=up.folder).out.strip()

        done = forgetd("jobs", "forget", f"ckpt_{'0' * 32}", images, cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "POST /checkpoints" in done.err


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

        done = forgetd("jobs", "download", UNKNOWN_JOB, "--url", server.url, "--key", "k", cwd=tmp_path)

        assert (done.code, done.out.split()) == (ExitCode.OK, forms), done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(forms)


class TestJobRequests:
    """What the words of a command come to on the wire."""

    JUDGE, SETS = f"clf_{'0' * 32}", "smiling=imgs_1,other=imgs_2"

    def sent(
        self, make_server: Callable[..., ScriptedServer], folder: Path, *words: str
    ) -> tuple[str, dict[str, object]]:
        server = make_server(Answer(202, json.dumps({"id": UNKNOWN_JOB, "status": "queued"}).encode()))

        done = forgetd("jobs", *words, "--url", server.url, "--key", "k", cwd=folder)

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
        done = forgetd("jobs", *words, "--url", "http://127.0.0.1:9", "--key", "k", cwd=tmp_path)

        assert done.code == ExitCode.USAGE
