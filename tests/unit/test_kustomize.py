"""The renderer of the project's kustomizations makes what kubectl makes, and refuses what it does not know."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lifl_knative.kustomize import InvalidKustomization, image_name, key_of, render
from lifl_knative.platform_manifests import COMPONENTS, NAMESPACES, manifests_directory
from ruamel.yaml import YAML

KUSTOMIZATION = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
COMPONENT = "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\n"
DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: here}
spec:
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - {name: web, image: example/web, args: [a], env: [{name: A, value: "1"}, {name: B, value: "2"}]}
        - {name: other, image: example/other}
"""


def write(directory: Path, **files: str) -> Path:
    """Write files whose names have `_` for the dot, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


def by_key(objects: list[Any]) -> dict[Any, Any]:
    return {key_of(obj): obj for obj in objects}


def kubectl(directory: Path) -> list[Any]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(YAML(typ="safe", pure=True).load_all(done.stdout))


@pytest.mark.parametrize("overlay", NAMESPACES)
def test_each_overlay_is_rendered_as_kubectl_does_it(overlay: str) -> None:
    directory = manifests_directory() / "overlays" / overlay
    assert by_key(render(directory)) == by_key(kubectl(directory))


def test_components_are_rendered_as_kubectl_does_it(tmp_path: Path) -> None:
    root = manifests_directory()
    copy = tmp_path / "manifests"  # kubectl takes relative paths only
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("lifl_knative"))
    listed = "".join(f"  - ../manifests/components/{name}\n" for name in COMPONENTS)
    whole = f"{KUSTOMIZATION}resources:\n  - ../manifests/overlays/production\ncomponents:\n{listed}"
    directory = write(tmp_path / "whole", kustomization_yaml=whole)
    made = render(root / "overlays" / "production", [root / "components" / name for name in COMPONENTS])
    assert by_key(made) == by_key(render(directory)) == by_key(kubectl(directory))


def test_patches_labels_and_images_are_applied_as_kubectl_does_it(tmp_path: Path) -> None:
    patch = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: here, annotations: {note: "yes"}}
spec:
  replicas: 2
  template:
    spec:
      containers:
        - {name: other, args: [b], env: [{name: C, value: "3"}]}
        - {name: web, args: [c, d], image: null, env: [{name: B, value: "9"}]}
"""
    rest = "resources: [web.yaml]\npatches: [{path: patch.yaml}]\n"
    rest += "labels: [{pairs: {part: x}, includeTemplates: true}, {pairs: {only: top}}]\n"
    rest += "images: [{name: example/other, newName: registry.test:5000/other, newTag: '2'}]\n"
    patch = patch.replace(", image: null", "")
    directory = write(tmp_path, kustomization_yaml=KUSTOMIZATION + rest, web_yaml=DEPLOYMENT, patch_yaml=patch)
    made = render(directory)
    containers = made[0]["spec"]["template"]["spec"]["containers"]
    assert [c["image"] for c in containers] == ["registry.test:5000/other:2", "example/web"]
    assert by_key(made) == by_key(kubectl(directory))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("namespace: there\n", "Kustomization has namespace, which func cannot render"),
        ("resources: [none.yaml]\n", "none.yaml: No such file or directory"),
        ("resources: [web.yaml, web.yaml]\n", "Deployment web is there twice"),
        (
            "resources: [web.yaml]\nlabels: [{pairs: {a: b}, includeSelectors: true}]\n",
            "labels has includeSelectors",
        ),
        (
            "resources: [web.yaml]\npatches: [{patch: '[]', target: {kind: Deployment}}]\n",
            "patches has patch, target",
        ),
        ("resources: [web.yaml]\npatches: [{path: other.yaml}]\n", "there is no Deployment other to patch"),
        ("resources: [web.yaml]\npatches: [{path: directive.yaml}]\n", "$patch is a directive"),
        ("resources: [web.yaml]\npatches: [{path: list.yaml}]\n", "no rule for patching the list topology"),
        ("resources: [plain.yaml]\n", "a document in it is no object with apiVersion, kind and name"),
        ("resources: [broken.yaml]\n", "broken.yaml"),
        ("configMapGenerator: [{name: a, files: [web.yaml]}]\n", "needs disableNameSuffixHash: true"),
    ],
)
def test_what_the_renderer_does_not_know_is_an_error_that_names_it(
    tmp_path: Path, text: str, complaint: str
) -> None:
    head = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: here}\n"
    directory = write(
        tmp_path,
        kustomization_yaml=KUSTOMIZATION + text,
        web_yaml=DEPLOYMENT,
        other_yaml=head.replace("name: web", "name: other"),
        directive_yaml=head + "spec: {$patch: delete}\n",
        list_yaml=head + "spec: {topology: [a]}\n",
        plain_yaml="just text\n",
        broken_yaml="a: [\n",
    )
    with pytest.raises(InvalidKustomization) as caught:
        render(directory)
    assert complaint in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_kustomization_without_its_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidKustomization, match="kind has to be one of"):
        render(write(tmp_path, kustomization_yaml="resources: []\n"))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("lifl-node", "lifl-node"),
        ("lifl-node:1", "lifl-node"),
        ("registry.test:5000/lifl-node", "registry.test:5000/lifl-node"),
        ("registry.test:5000/lifl-node:1@sha256:0", "registry.test:5000/lifl-node"),
    ],
)
def test_an_images_name_is_what_stands_before_tag_and_digest(image: str, name: str) -> None:
    assert image_name(image) == name
