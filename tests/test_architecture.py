"""The shape of the project: who may import whom, launch files, presets, what a wheel holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from fastddpm.config import PRESETS, Config, differences, from_dict, preset, to_dict
from fastddpm.errors import ConfigError

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "fastddpm").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").glob("*.yaml"))


# The mathematics on images, and the layers.
KERNEL_USERS = {
    *("augment", "blocks", "bound", "compiling", "diffusion", "editing", "explain", "likelihood", "objectives"),
    "samplers",
}


def imports(path: Path) -> set[str]:
    """Top-level names of the modules a file imports anywhere; "." for its own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def test_kernels_stand_alone():
    for path in KERNELS:
        assert imports(path) <= {".", "torch", "triton", "numpy"} | set(sys.stdlib_module_names), path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("fastddpm_kernels", KERNEL_USERS),
        ("accelerate", {"trainer", "step", "machine", "cli"}),
        ("diffusers", set()),
        ("benchmarks", set()),
        ("tests", set()),
        ("launch", set()),
        ("pickle", set()),
    ],
)
def test_arrows_of_the_library(package, allowed):
    assert {path.stem for path in LIBRARY if package in imports(path)} <= allowed


def test_the_library_does_not_import_its_commands():
    commands = {"cli", "__main__", "sampling", "dryrun", "edit", "evaluation", "explain", "plan"}
    for path in LIBRARY:
        if path.stem in commands:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.module or "") not in commands, path


def test_kernels_is_a_source_root():
    """An __init__.py there would shadow Hugging Face's `kernels`, which diffusers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_package_is_light():
    """Names are loaded when first used: `import fastddpm` alone does not wait for torch."""
    code = "import sys, fastddpm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.stem)
def test_launch_files_load_in_accelerate_and_hold_machine_facts_only(path):
    keys = yaml.safe_load(path.read_text()).keys()
    machine = {
        *("compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank", "gpu_ids"),
        *("use_cpu", "main_process_ip", "main_process_port"),
    }
    assert keys <= machine
    config = load_config_from_file(str(path))
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "-m", "fastddpm", "train", "--run", "r"]
    )
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    assert arguments.training_script_args == ["train", "--run", "r"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_survive_json(name):
    config = preset(name)
    assert config.preset == name
    if config.data.source:
        config.check()
    else:
        with pytest.raises(ConfigError, match=r"data\.source is not set"):
            config.check()
        preset(name, data={"source": "folder:x"}).check()
    assert from_dict(Config, to_dict(config)) == config
    assert differences(config, from_dict(Config, to_dict(config))) == []


def test_unknown_fields_name_the_valid_ones():
    with pytest.raises(ConfigError, match=r"unknown field optim\.learning: valid are name, lr"):
        preset("digits", optim={"learning": 1})
    with pytest.raises(ConfigError, match=r"unknown field data\.sauce: valid are source"):
        from_dict(Config, {"data": {"sauce": 1}})
    with pytest.raises(ConfigError, match="unknown preset 'x': valid are digits"):
        preset("x")


def test_runtime_fields_are_no_difference():
    a = preset("digits")
    assert differences(a, preset("digits", steps=9, log_every=1, keep=1, data={"workers": 5})) == []
    assert differences(a, preset("digits", precision="bf16")) == ["precision: 'fp32' -> 'bf16'"]
