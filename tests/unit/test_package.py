import ast
import copy
import json
import pickle
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import fvae_dist
from fvae_dist.adapter import FVAELoraConfig, FVAELoraModel, registration
from tests.models import ARCHITECTURES, randomise, tiny_adapter, tiny_model, token_ids

PACKAGE = Path(fvae_dist.__file__).parent
# launch -> {benchmarking, comparison, evaluation, planning, training} -> adapter -> kernels. The top-level files may
# import any.
LAYERS = ({"kernels"}, {"adapter"}, {"benchmarking", "comparison", "evaluation", "planning", "training"}, {"cli"})
FRESH_PROCESS = """
import json, pickle, sys
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)  # the first thing that happens: unpickling must register the method by itself
import fvae_dist
members = dict(fvae_dist.adapter.registration.PeftType.__members__)
modules = set(sys.modules)
for name in [name for name in sys.modules if name.startswith("fvae_dist")]:
    del sys.modules[name]
import fvae_dist  # a second, complete import
import torch
print(json.dumps({
    "config": [config.peft_type.value, config.r, config.kl_weight],
    "modules": sorted(modules & {"deepspeed", "trl", "fvae_dist.training", "transformers.trainer"}),
    "cuda": torch.cuda.is_initialized(),
    "once": dict(fvae_dist.adapter.registration.PeftType.__members__) == members,
}))
"""


def imported_packages(path: Path) -> set[str]:
    """The sub-packages of fvae_dist that a source file imports anywhere, but for those it only names as types."""
    names = set()
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(child) for node in typing_only for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("fvae_dist.")}


def test_import_finds_imports(tmp_path):
    source = tmp_path / "source.py"
    source.write_text("import fvae_dist.a.b\ndef f():\n    from fvae_dist import c\n    from fvae_dist.d import e\n")
    assert imported_packages(source) == {"a", "c", "d"}


def package_imports() -> dict[str, set[str]]:
    """Sub-package -> the other sub-packages it imports."""
    surface = dict.fromkeys(("FVAELoraConfig", "FVAELoraModel", "side_loss"), "adapter") | {"__version__": None}
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*/*.py"):
        package = path.relative_to(PACKAGE).parts[0]
        found = {surface.get(name, name) for name in imported_packages(path)}
        graph.setdefault(package, set()).update(found - {package, None})
    return graph


def test_imports_go_one_way():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    graph = package_imports()
    assert {"adapter", "training"} <= set(graph)
    upward = {(a, b) for a, names in graph.items() for b in names if level[a] < level[b]}
    assert upward == set()
    list(TopologicalSorter(graph).static_order())  # raises CycleError for siblings that import each other


def test_adapter_knows_no_trainer():
    for path in (PACKAGE / "adapter").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not {str(name).split(".")[0] for name in modules} & {"deepspeed", "trl", "datasets", "accelerate"}


def test_fresh_import_is_light_repeatable_and_unpickles(tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(tiny_adapter(r=5, kl_weight=2.0)))
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "config.pickle")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {"config": ["FVAE_LORA", 5, 2.0], "modules": [], "cuda": False, "once": True}


def test_public_names_exist():
    assert {name for name in fvae_dist.__all__ if not hasattr(fvae_dist, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'FVAETrainer'"):
        fvae_dist.FVAETrainer  # noqa: B018


def test_method_is_registered_with_peft_once():
    member = PeftType("FVAE_LORA")
    assert member is PeftType.FVAE_LORA is PeftType["FVAE_LORA"] is registration.add_peft_type()
    assert member == "FVAE_LORA" and member.name == member.value == "FVAE_LORA" and isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1 and "FVAE_LORA" in PeftType.__members__
    registration.register(FVAELoraConfig, FVAELoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is FVAELoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is FVAELoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "fvae_"
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member


def test_config_survives_pickle_and_deepcopy():
    config = tiny_adapter(target_modules=["q_proj"], kl_weight=3.0)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapted_model_survives_deepcopy(name):
    model = randomise(get_peft_model(tiny_model(name), tiny_adapter()))
    twin = copy.deepcopy(model)
    ids = token_ids()
    expected = model(ids).logits
    assert torch.equal(twin(ids).logits, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, expected)


def test_import_is_free_and_registers_once_peft_comes():
    program = (
        "import sys, fvae_dist\n"
        "early = sorted({'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules))\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING\n"
        "print(early, 'FVAE_LORA' in list(PEFT_TYPE_TO_TUNER_MAPPING))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split("\n")[0] == "[] True"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FVAELora'"):
        _ = fvae_dist.FVAELora
