"""The engineering around the package: what is installed, pinned, linked, and imported when."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import setuptools
import yaml

from nslightning import configs

HEAVY = {"torch", "torchvision", "lightning", "timm", "matplotlib", "pandas", "wandb"}


@pytest.fixture(scope="module")
def pyproject(repo_root):
    return tomllib.loads((repo_root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tracked(repo_root):
    """Mode of every committed file, by its path; a source archive has no git to ask."""
    if not (repo_root / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-sz"], cwd=repo_root, capture_output=True, text=True, check=True)
    entries = (entry.split("\t") for entry in listing.stdout.rstrip("\0").split("\0"))
    return {name: about.split()[0] for about, name in entries}


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_every_package_is_listed(repo_root, pyproject):
    packages = setuptools.find_packages(str(repo_root), include=["nslightning*"])  # follows the two links
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(packages)
    assert {"nslightning.callbacks", "nslightning.configs"} <= set(packages)


def test_no_module_lies_outside_a_package(repo_root):
    folders = {
        file.parent for top in ("nslightning", "callbacks", "configs") for file in (repo_root / top).rglob("*.py")
    }
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_links_are_committed_as_links(tracked, repo_root):
    for name in ("callbacks", "configs"):
        assert tracked[f"nslightning/{name}"] == "120000"
        assert (repo_root / "nslightning" / name / "__init__.py").samefile(repo_root / name / "__init__.py")


@pytest.mark.parametrize(
    "name", ["LICENSE", "CITATION.cff", "CHANGELOG.md", "nslightning/py.typed", "requirements.lock"]
)
def test_committed(tracked, name):
    assert name in tracked


def test_ci_script_is_executable(tracked):
    assert tracked[".ci/run"] == "100755"


def test_one_version_everywhere(repo_root, pyproject):
    project = pyproject["project"]
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text())
    assert version("nslightning") == project["version"] == str(citation["version"])
    assert citation["license"] == project["license"]
    assert f"## {project['version']}" in (repo_root / "CHANGELOG.md").read_text()


def test_citation_names_the_four_papers(repo_root):
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text())
    cited = {entry["value"] for paper in citation["references"] for entry in paper["identifiers"]}
    assert cited == {f"arXiv:{number}" for number in ("2106.12915", "2401.02736", "2206.01730", "2410.05871")}


def test_lock_pins_and_hashes_everything_and_names_no_address(repo_root):
    lock = (repo_root / "requirements.lock").read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links| @ |file:", lock)
    requirements = re.findall(r"^[^\s#].*(?:\n    --hash.*)*", lock, flags=re.MULTILINE)
    assert len(requirements) > 50
    pinned = re.compile(r"[a-z0-9-]+==[^ ]+( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n?)+")
    assert [r.splitlines()[0] for r in requirements if not pinned.fullmatch(r)] == []


def test_pre_commit_runs_the_locked_ruff(repo_root):
    repos = yaml.safe_load((repo_root / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = (repo["rev"] for repo in repos if repo["repo"].endswith("/ruff-pre-commit"))
    assert f"\nruff=={rev.removeprefix('v')} " in (repo_root / "requirements.lock").read_text()


def test_make_help_explains_every_target(repo_root):
    makefile = (repo_root / "Makefile").read_text()
    targets = [
        target for names in re.findall(r"^\.PHONY:(.*)", makefile, flags=re.MULTILINE) for target in names.split()
    ]
    assert {"setup", "demo", "test", "test-slow", "lint", "type", "lock", "lock-check", "wheel-check"} <= set(targets)
    unexplained = [t for t in targets if not re.search(rf"^{t}:.*## \S", makefile, flags=re.MULTILINE)]
    assert unexplained == []


def test_top_level_callbacks_is_refused(repo_root):
    result = python("import callbacks", cwd=repo_root)
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert "Write `from nslightning.callbacks import" in result.stderr


@pytest.mark.parametrize("module", ["nslightning", "nslightning.configs"])
def test_import_is_cheap(module, tmp_path):
    result = python(f"import sys, {module}; print(*sorted({HEAVY} & set(sys.modules)))", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_wheel_holds_every_committed_file(tracked, repo_root, tmp_path):
    source = tmp_path / "source"
    for name in tracked:
        if (repo_root / name).exists():  # a deletion may be waiting for its commit
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo_root / name, source / name, follow_symlinks=False)
    build = "from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    compiled = {
        name
        for name in held
        if name.startswith(("nslightning/ops/kernels/_cpu.", "nslightning/arithmetic/_sequential."))
    }
    assert len(compiled) == 2 * bool(shutil.which("gcc") or compiled)  # without a compiler it is left out
    expected = {
        name if name.startswith("nslightning/") else f"nslightning/{name}"
        for name, mode in tracked.items()
        if name.startswith(("nslightning/", "callbacks/", "configs/"))
        and mode != "120000"
        and (not name.endswith(".cpp") or name.endswith("nodes.cpp"))  # those that serve to build the wheel
        and (repo_root / name).exists()
    }
    assert held - compiled == expected


CONFIGS = Path(configs.__file__).parent
PACKAGED = sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", PACKAGED)
def test_configuration_is_found_by_name_from_any_folder(name, repo_root):
    for spelling in (name, f"{name}.yaml", f"configs/{name}.yaml", f"./configs/{name}.yaml"):
        assert configs.path(spelling).samefile(repo_root / "configs" / f"{name}.yaml")


def test_unknown_configuration_is_refused_with_what_there_is(tmp_path, monkeypatch):
    (tmp_path / "resnet_imagenet.yaml").touch()
    (tmp_path / "quickstart.yaml").touch()
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"no packaged config of that name; did you mean 'quickstart'\?"):
        configs.path("configs/quikstart.yml")
    with pytest.raises(FileNotFoundError) as refusal:
        configs.path("/elsewhere/configs/quickstart.yaml")
    assert "--config ./mine.yaml" in str(refusal.value)
