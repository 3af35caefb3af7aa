"""The folder kernels/ is cramfast.kernels however the project is used, and the imports keep the floors apart.

Each way of use runs in a process of its own, without this one's PYTHON* settings.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import cramfast.kernels

ROOT = Path(__file__).parents[1]

USE = """
import torch, cramfast, cramfast.kernels
from cramfast.kernels import layer_norm
from cramfast.layers import FusedLayerNorm
x = torch.randn(3, 8)
assert torch.equal(layer_norm(x, torch.ones(8)), FusedLayerNorm(8)(x))
print(cramfast.__file__)
print(cramfast.kernels.__file__)
"""


def run(*command, cwd, **environment):
    """What the command prints; its errors are shown when it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd):
    # Nothing here may need the network.
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd, PIP_NO_INDEX=1)


def origins(cwd, python=sys.executable, **environment):
    """Resolved files of cramfast and cramfast.kernels, as a process in `cwd` finds and uses them."""
    return [Path(line).resolve() for line in run(python, "-c", USE, cwd=cwd, **environment).splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git tracks or would track, so that no build touches the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git says which files belong to the project")
    folder = tmp_path_factory.mktemp("clone").resolve()
    listed = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy of its own: a build leaves build/ and *.egg-info behind.
    source = shutil.copytree(clone, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("cramfast-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed").resolve()
    pip("install", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_every_module_and_kernels_only_inside_cramfast(wheel, clone):
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    own = {path.relative_to(clone).as_posix() for path in clone.glob("cramfast/**/*.py")}
    operators = {f"cramfast/{path.relative_to(clone).as_posix()}" for path in clone.glob("kernels/**/*.py")}
    assert "cramfast/kernels/layer_norm.py" in operators
    assert {name for name in packed if name.endswith(".py")} == own | operators
    assert {name.split("/")[0] for name in packed} == {"cramfast"}


@pytest.mark.slow
def test_an_installed_wheel_used_elsewhere(installed, tmp_path):
    package, operators = origins(tmp_path, PYTHONPATH=installed)
    assert package == installed / "cramfast" / "__init__.py"
    assert operators == installed / "cramfast" / "kernels" / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("path", [{}, {"PYTHONPATH": "."}], ids=["cwd", "PYTHONPATH"])
def test_a_bare_clone(clone, path):
    package, operators = origins(clone, **path)
    assert package == clone / "cramfast" / "__init__.py"
    assert operators == clone / "kernels" / "__init__.py"


@pytest.mark.slow
def test_a_bare_clone_used_elsewhere(clone, tmp_path):
    package, operators = origins(tmp_path, PYTHONPATH=clone)
    assert package == clone / "cramfast" / "__init__.py"
    assert operators == clone / "kernels" / "__init__.py"


@pytest.mark.slow
def test_an_installed_wheel_shadowed_by_the_clone(installed, clone):
    package, operators = origins(clone, PYTHONPATH=installed)
    # Both from the clone: one version of the package never runs on the operators of another.
    assert package == clone / "cramfast" / "__init__.py"
    assert operators == clone / "kernels" / "__init__.py"


@pytest.mark.slow
def test_an_editable_install(clone, tmp_path):
    source = shutil.copytree(clone, tmp_path / "source").resolve()
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # torch and setuptools come from where they are now; a .pth file found there is not followed.
    Path(site_packages, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", source, cwd=tmp_path)
    for cwd in (elsewhere, source):
        package, operators = origins(cwd, python)
        assert package == source / "cramfast" / "__init__.py"
        assert operators == source / "kernels" / "__init__.py"


@pytest.mark.slow
def test_transformers_works_in_the_root_of_the_repository():
    run(
        sys.executable,
        "-c",
        "import sys, transformers\n"
        "from transformers import BertForMaskedLM, ModernBertForMaskedLM\n"
        "import cramfast.kernels\n"
        "loaded = [name for name in sys.modules if name.startswith('kernels.')]\n"
        "assert not loaded, loaded",
        cwd=ROOT,
    )


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import cramfast.kernels\n"])
def test_operators_have_no_second_name(before):
    run(
        sys.executable,
        "-c",
        before + "import kernels\n"
        "assert kernels.__version__ == '0'\n"
        "names = [name for name in vars(kernels) if not name.startswith('__')]\n"
        "assert not names, names",
        cwd=ROOT,
    )


def imports(path):
    """(module, names) of every import in a file of the package, relative ones resolved to where they are installed."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    package = ["cramfast", *package] if package[0] == "kernels" else package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module, {alias.name for alias in node.names}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


# Asked for when attention is handed over, and done without where it is not installed.
OPTIONAL = {"long_attention": {"flash_attn"}}


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.stem)
def test_operators_import_torch_triton_and_each_other_alone(path):
    known = {"torch", "triton", *sys.stdlib_module_names, *OPTIONAL.get(path.stem, ())}
    for module, names in imports(path):
        inside = f"{module}.".startswith("cramfast.kernels.")
        assert inside or module.split(".")[0] in known, (module, names)


@pytest.mark.parametrize("path", sources("cramfast"), ids=lambda path: path.relative_to(ROOT / "cramfast").as_posix())
def test_cramfast_reaches_the_operators_by_their_public_names(path):
    public = set(cramfast.kernels.__all__)
    for module, names in imports(path):
        assert module.split(".")[0] != "kernels"
        # The names say what is used; a module under another name would not.
        assert "kernels" not in (names or ()), module
        if f"{module}.".startswith("cramfast.kernels."):
            assert module == "cramfast.kernels", module
            assert names is not None and names <= public, names


def test_every_operator_and_its_reference_are_public():
    # Muon is two functions, before and after `orthogonalise`.
    operators = {*cramfast.kernels.OPERATORS, "muon_direction", "muon_update"} - {"muon"}
    names = {*operators, *(f"{name}_reference" for name in operators)}
    assert names <= set(cramfast.kernels.__all__)
    assert all(callable(getattr(cramfast.kernels, name)) for name in names)


@pytest.mark.slow
def test_without_triton_the_references_work():
    run(
        sys.executable,
        "-c",
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from cramfast.kernels import OPERATORS, choose\n"
        "from cramfast.layers import FusedGEGLU, FusedLayerNorm\n"
        "y = FusedGEGLU()(FusedLayerNorm(8)(torch.randn(3, 8)))\n"
        "assert y.shape == (3, 4)\n"
        "reasons = {choose(name, torch.device('cuda')).reason for name in OPERATORS}\n"
        "assert reasons == {'triton is not installed'}, reasons",
        cwd=ROOT,
    )


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["triton.experimental.gluon", "triton.experimental.gluon.language.nvidia.hopper"])
def test_without_gluon_the_other_kernels_work(missing):
    """Gluon is experimental: a later Triton may have another, or none."""
    run(
        sys.executable,
        "-c",
        "import sys\n"
        f"sys.modules['{missing}'] = None\n"
        "import torch\n"
        "from cramfast.kernels import attention_settings, every_launch\n"
        "assert attention_settings.tile_for(64, 128, False, False, 90) == 0\n"
        "names = {launch.kernel.__name__ for launch in every_launch(torch.bfloat16, 90)}\n"
        "assert 'forward_blocks' in names and not any('hopper' in name for name in names), names",
        cwd=ROOT,
    )
