"""The commands against a real service: what they print, where, and how they end."""

from __future__ import annotations

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
from tests.cli.here import forgetd_here
from tests.cli.processes import ROOT, UNKNOWN_JOB, Up, environment, forgetd
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
    ["tenants", "list"],
    ["tenants", "limit"],
]


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

        done = forgetd_here(
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
        made = json.loads(forgetd_here("keys", "create", "--tenant", "acme", "--json", cwd=up.folder).out)
        caller = {"FORGETD_URL": up.profile["url"], "FORGETD_KEY": made["secret"]}

        before = forgetd_here("jobs", "list", cwd=tmp_path, env=caller)
        revoked = forgetd_here("keys", "revoke", made["id"], cwd=up.folder)
        after = forgetd_here("jobs", "list", cwd=tmp_path, env=caller)

        assert [before.code, revoked.code, after.code] == [ExitCode.OK, ExitCode.OK, ExitCode.REFUSED]
        assert made["secret"] not in forgetd_here("keys", "list", cwd=up.folder).out

    def test_a_script_gets_the_secret_alone(self, up: Up) -> None:
        done = forgetd_here("keys", "create", "--tenant", "acme", cwd=up.folder)

        assert done.out.startswith("fgt_")
        assert len(done.out.split()) == 1

    def test_without_a_database_it_says_how_to_name_one(self, tmp_path: Path) -> None:
        done = forgetd_here("keys", "list", cwd=tmp_path)

        assert done.code == ExitCode.FAILURE
        assert "FORGETD_DATABASE_URL" in done.err

    def test_migrating_what_is_migrated_changes_nothing(self, up: Up) -> None:
        assert forgetd("migrate", cwd=up.folder).code == ExitCode.OK


class TestUploads:
    def test_a_script_gets_the_id_alone(self, up: Up, photo: Path) -> None:
        done = forgetd_here("images", "push", str(photo), cwd=up.folder)

        assert done.out.startswith("imgs_")
        assert len(done.out.split()) == 1
        assert "1 image" in done.err

    def test_json_is_what_the_service_sent(self, up: Up, photo: Path) -> None:
        done = forgetd_here("images", "push", str(photo.parent), "--json", cwd=up.folder)

        sent = json.loads(done.out)
        with Client(up.profile["url"], up.profile["key"]) as client:
            assert client.erase_images(sent["id"]).erased_at is not None
        assert sent["count"] == 1

    def test_a_file_that_is_no_image_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "notes.png").write_bytes(b"no picture")

        done = forgetd_here("images", "push", str(tmp_path / "notes.png"), cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert done.out == ""

    def test_a_folder_without_images_is_wrong_usage(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()

        assert forgetd_here("images", "push", str(tmp_path / "empty"), cwd=up.folder).code == ExitCode.USAGE

    def test_a_file_that_is_no_model_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(os.urandom(4096))

        done = forgetd_here("checkpoints", "push", str(tmp_path / "model.pt"), cwd=up.folder)

        assert done.code == ExitCode.REFUSED

    def test_a_classifier_is_uploaded_listed_shown_and_deleted(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "smiles.onnx").write_bytes(classifier())
        cwd = up.folder

        made = forgetd_here(
            "classifiers", "upload", str(tmp_path / "smiles.onnx"), "--classes", "other,smiling", cwd=cwd
        )
        name = made.out.strip()
        listed = forgetd_here("classifiers", "list", cwd=cwd)
        shown = forgetd_here("classifiers", "show", name, cwd=cwd)
        deleted = forgetd_here("classifiers", "delete", name, cwd=cwd)

        assert made.code == ExitCode.OK, made.err
        assert "8 x 8 pixels, 1 channels" in made.err
        assert f"{name}\tsmiles.onnx\tother, smiling" in listed.out
        assert "logits, threshold 0.5" in shown.out
        assert deleted.code == ExitCode.OK
        assert name not in forgetd_here("classifiers", "list", cwd=cwd).out

    def test_a_file_that_is_no_classifier_is_refused(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "smiles.onnx").write_bytes(classifier(3))

        done = forgetd_here("classifiers", "upload", str(tmp_path / "smiles.onnx"), "--classes", "a,b", cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "classes: The output has shape (N, 3), and 2 classes were named" in done.err

    def test_a_debias_request_names_what_is_wrong(self, up: Up) -> None:
        words = ("jobs", "debias", f"ckpt_{'0' * 32}", f"clf_{'0' * 32}", "--target", "a=0.5", "--target", "b=0.4")

        done = forgetd_here(*words, cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "/target_distribution: the fractions sum to 0.9; they must sum to 1" in done.err

    def test_a_forget_request_names_what_is_wrong(self, up: Up, photo: Path) -> None:
        images = forgetd_here("images", "push", str(photo), cwd=up.folder).out.strip()

        done = forgetd_here("jobs", "forget", f"ckpt_{'0' * 32}", images, cwd=up.folder)

        assert done.code == ExitCode.REFUSED
        assert "POST /checkpoints" in done.err
