"""Adapters load without ``import sparse_peft``, in environments with an installed package and a fresh interpreter."""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_peft import SaRAConfig, SparseConfig
from tests.helpers.environments import ROOT, environment
from tests.helpers.http_client import Client
from tests.helpers.lm_eval_task import log_likelihood, sums_task

pytestmark = pytest.mark.subprocess

WAYS = ROOT / "tests" / "helpers" / "ways_to_load.py"
WAITS = "import sys; print(any(type(f).__module__ == '_sparse_peft_startup' for f in sys.meta_path))"
MODULES = "import sys; print(*sorted(sys.modules))"
BROKEN = """
import sys
import _sparse_peft_startup

def fails(module):
    raise OSError("broken")

_sparse_peft_startup.CHANGES["peft.peft_model"] = fails
sys.modules["sparse_peft.version"] = None
from peft import get_peft_config
try:
    get_peft_config({"peft_type": "SPARSE_PEFT_DELTA"})
except KeyError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel."""
    made = environment(tmp_path_factory.mktemp("environment"))
    made.install(wheel)
    return made


@pytest.fixture(scope="module")
def adapters(stand_in, tmp_path_factory):
    """Folders of a random adapter and of one whose file has a tensor of the base; the first one's logits."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = SparseConfig(density=0.2, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stand_in), config).eval()
    for name in ("good", "damaged"):
        model.save_pretrained(folder / name)
    path = folder / "damaged" / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.zeros_like(model.get_output_embeddings().weight)}
    save_file(load_file(path) | head, path)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits.flatten()[:50]
    return folder / "good", folder / "damaged", logits.tolist()


def test_adapters_load_in_every_way_without_an_import(installed, stand_in, adapters):
    good, damaged, logits = adapters
    found = json.loads(installed.run(WAYS, stand_in, good, damaged).stdout)
    for way in ("PeftModel", "AutoPeftModel", "AutoModel", "load_adapter", "pipeline"):
        assert found.pop(way) == pytest.approx(logits, abs=1e-6), way
    for way in ("refused by PeftModel", "refused by transformers"):
        left = found.pop(way)
        assert "lm_head.weight" in left["error"] and left["same"] and not left["wrapped"], way
    name = "SparseConfig"
    assert found == {"PeftConfig": name, "get_peft_config": name, "PeftType": "SPARSE_PEFT_DELTA"}


def test_the_start_of_an_interpreter_imports_one_module(installed):
    plain = installed.run("-S", "-c", MODULES).stdout.split()
    added = set(installed.run("-c", MODULES).stdout.split()) - set(plain)
    assert {name for name in added if "sparse_peft" in name} == {"_sparse_peft_startup"}
    without = installed.run("-c", MODULES, SPARSE_PEFT_AUTOLOAD="0").stdout.split()
    assert added <= set(without), "the module imports no other"


@pytest.mark.parametrize("value", ["0", "false"])
def test_it_can_be_switched_off(installed, value):
    assert installed.run("-c", WAITS).stdout == "True\n"
    assert installed.run("-c", WAITS, SPARSE_PEFT_AUTOLOAD=value).stdout == "False\n"


def test_errors_are_logged_and_leave_peft_as_it_is(installed):
    done = installed.run("-c", BROKEN)
    assert done.stdout == "'SPARSE_PEFT_DELTA'\n" and "OSError: broken" in done.stderr
    assert "peft.peft_model stays as it is" in done.stderr and "SPARSE_PEFT_AUTOLOAD=0" in done.stderr
    assert "sparse_peft cannot be imported" in done.stderr and "sparse_peft.version" in done.stderr


def test_an_editable_install_does_the_same_and_uninstalling_ends_it(tmp_path):
    made = environment(tmp_path / "environment")
    made.install("--editable", ROOT)
    assert made.run("-c", WAITS).stdout == "True\n"
    made.pip("uninstall", "--yes", "sparse-peft")
    assert made.run("-c", WAITS).stdout == "False\n"
    assert sorted(path.name for path in made.site.iterdir()) == ["shared.pth"]


UNET = """
import sys
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel

assert "sparse_peft" not in sys.modules
unet = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert "sparse_peft" in sys.modules
saved = torch.load(sys.argv[3])
with torch.no_grad():
    torch.testing.assert_close(unet(*saved["inputs"]).sample, saved["outputs"], atol=1e-5, rtol=0)
try:
    UNet2DConditionModel.from_pretrained(sys.argv[1]).load_lora_adapter(sys.argv[2])
except Exception as error:
    print(type(error).__name__)
"""


def test_a_unet_s_adapter_loads_without_an_import(installed, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    unet = get_peft_model(unet, SaRAConfig(density=0.1, init_weights=False)).eval()
    unet.save_pretrained(tmp_path / "adapter")
    inputs = (torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 4, 16))
    with torch.no_grad():
        torch.save({"inputs": inputs, "outputs": unet(*inputs).sample}, tmp_path / "outputs.pt")
    said = installed.run("-c", UNET, tmp_path / "unet", tmp_path / "adapter", tmp_path / "outputs.pt").stdout
    assert said.strip(), "diffusers' loaders of LoRA refuse it"


@pytest.mark.slow
def test_accelerate_launch_loads_adapters(installed, stand_in, adapters):
    good, damaged, logits = adapters
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", WAYS, stand_in, good, damaged)
    found = json.loads(installed.run(*launch).stdout)
    assert found["PeftModel"] == found["pipeline"] == pytest.approx(logits, abs=1e-6)


@pytest.mark.slow
def test_lm_eval_measures_an_adapter(installed, stand_in, adapters, tmp_path):
    """Unmodified lm-eval on a task of the test's own: the log-likelihoods are those of the model here."""
    pytest.importorskip("lm_eval")
    questions = sums_task(tmp_path)
    arguments = f"pretrained={stand_in},peft={adapters[0]},dtype=float32"
    options = ["--include_path", tmp_path, "--device", "cpu", "--log_samples", "--output_path", tmp_path / "out"]
    installed.run("-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "sums", *options)
    (samples,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stand_in), adapters[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(stand_in)
    for sample in found:
        measured = [float(answer[0][0]) for answer in sample["resps"]]
        expected = [log_likelihood(model, tokenizer, sample["doc"]["q"], c) for c in sample["doc"]["c"]]
        assert measured == pytest.approx(expected, abs=1e-4)
    assert len(found) == questions


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_transformers_serve_and_chat_answer_with_an_adapter(installed, stand_in, adapters, tmp_path):
    """From a folder that has a model's files and an adapter's."""
    for package in ("fastapi", "openai"):
        pytest.importorskip(package, reason="transformers' extra `serving` is not installed")
    served = shutil.copytree(stand_in, tmp_path / "served")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapters[0] / name, served)
    (served / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stand_in), adapters[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(stand_in)

    def answer():
        question = tokenizer("What is it?", return_tensors="pt")
        tokens = model.generate(**question, max_new_tokens=8, do_sample=False)[0, question.input_ids.shape[1] :]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    with model.disable_adapter():
        without = answer()
    client, main = Client(f"http://127.0.0.1:{free_port()}"), "from transformers.cli.transformers import main; main()"
    with installed.running("-c", main, "serve", "--device", "cpu", "--port", client.url.rpartition(":")[2]) as server:
        while server.poll() is None and not client.listens("/health"):
            time.sleep(0.2)
        question = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 8, "temperature": 0}
        status, said = client.send("/v1/chat/completions", {"model": str(served), "stream": False, **question})
        assert status == 200 and said["choices"][0]["message"]["content"] == answer() != without
        options = ["chat", served, client.url, "max_new_tokens=8", "do_sample=False"]
        chat = installed.run("-c", main, *options, typed="What is it?\nn\n!exit\n", HF_HUB_OFFLINE="0")
        assert answer() in chat.stdout and without not in chat.stdout
