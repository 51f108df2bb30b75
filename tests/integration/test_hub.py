"""push_to_hub and back, by the real client library, against a stand-in for the Hub on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from _sparse_peft_startup.install import install_command
from tests.integration.hub_client import BASE, METHOD_REPOS
from tests.integration.hub_stand_in import TOKEN, running_hub

pytestmark = pytest.mark.subprocess
pytest.importorskip("trl")
pytest.importorskip("typer")
ROOT = Path(__file__).parents[2]
PUSHES = ("push_config", "push_hostile", "push_trained", "push_by_command")


def environment(hub, home, token=TOKEN):
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def client(hub, folder, home, *actions):
    command = [sys.executable, "-m", "tests.integration.hub_client", str(folder), *actions]
    env = environment(hub, folder / home)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """``(hub, folder)`` after everything was pushed."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        done = client(hub, folder, "pushing", "push_every_method", *PUSHES)
        assert done.returncode == 0, done.stderr[-3000:]
        yield hub, folder


@pytest.fixture(scope="module")
def loaded(pushed):
    """What was asked for by a process that reads everything back."""
    hub, folder = pushed
    asked = len(hub.requests)
    done = client(hub, folder, "loading", "load_all", "run_example", "plan")
    assert done.returncode == 0, done.stderr[-3000:]
    return hub.requests[asked:]


def test_what_was_pushed_comes_back_in_a_fresh_process(loaded):
    fetched = [path for method, path in loaded if method == "GET" and path.startswith("/lfs/")]
    assert len(fetched) >= len(METHOD_REPOS), "the weights came from the stand-in and from no cache"


@pytest.mark.parametrize("method", METHOD_REPOS)
def test_a_pushed_model_has_its_files_and_a_card_that_explains_it(pushed, method):
    hub, _ = pushed
    files = hub.files(METHOD_REPOS[method])
    assert files["adapter_model.safetensors"].lfs and not files["adapter_config.json"].lfs
    card = hub.card(METHOD_REPOS[method])
    assert card.data.base_model == BASE and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"sparse-peft", "mine", f"base_model:adapter:{BASE}"} <= set(card.data.tags)
    assert card.text.count(install_command()) == 1 and "import sparse_peft" in card.text
    assert "[More Information Needed]" not in card.text and "## What it trains" in card.text
    assert hub.repos[METHOD_REPOS[method]].private is (method == "sora")
    assert f"an adapter of {method}" in hub.repos[METHOD_REPOS[method]].messages


def test_a_plan_of_a_model_on_the_hub(loaded, pushed):
    _, folder = pushed
    assert json.loads((folder / "plan-0.json").read_text())["architecture"] == "LlamaForCausalLM"
    message = json.loads((folder / "plan-2.json").read_text())["error"]["message"]
    assert "the Hub has no such model" in message


def test_a_second_push_changes_nothing_and_a_branch_is_its_own(pushed):
    hub, _ = pushed
    repo = hub.repos[METHOD_REPOS["sparse"]]
    first = next(files for files in repo.commits.values() if "adapter_config.json" in files)
    assert {path: file.oid for path, file in first.items()} == {
        path: file.oid for path, file in hub.files(METHOD_REPOS["sparse"]).items()
    }
    assert set(repo.branches) == {"main", "other"}


def test_a_config_alone(pushed):
    hub, _ = pushed
    assert set(hub.files("tester/config-only")) == {".gitattributes", "README.md", "adapter_config.json"}
    card = hub.card("tester/config-only")
    assert card.data.base_model == BASE and "sparse-peft" in card.data.tags and "import sparse_peft" in card.text


def test_metrics_and_plots_are_on_the_card(pushed):
    hub, folder = pushed
    files, card = hub.files("tester/with-results"), hub.card("tester/with-results")
    assert {"turnover.png", "supports.png", "sparsity_history.json"} <= set(files) and files["supports.png"].lfs
    (result,) = card.data.eval_results
    wanted = torch.load(folder / "trained.pt")["metrics"]["eval_loss"]
    assert (result.metric_type, result.metric_value) == ("eval_loss", wanted)
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("text-generation", "foxes", "train")
    assert f"| eval_loss | {wanted:.6g} | foxes (train) |" in card.text
    assert "](turnover.png)" in card.text and "](supports.png)" in card.text
    assert card.data.base_model == BASE and card.text.count("import sparse_peft") == 1
    assert len(hub.repos["tester/with-results"].messages) >= 2, "the model was pushed once more, and kept the results"


def test_the_trainer_pushes_a_card_that_explains_the_adapter(pushed):
    hub, _ = pushed
    card = hub.card("tester/by-trainer")
    assert card.data.base_model == BASE and card.data.library_name == "peft" and "sparse-peft" in card.data.tags
    assert card.text.count("import sparse_peft") == 1
    assert "## Training procedure" in card.text, "the trainer's own part is there too"
    assert hub.files("tester/by-trainer")["adapter_model.safetensors"].lfs


def test_the_command_pushes_an_adapter_with_its_own_card(pushed):
    hub, _ = pushed
    files, card = hub.files("tester/by-command"), hub.card("tester/by-command")
    assert {"adapter_model.safetensors", "supports.png", "tokenizer.json"} <= set(files)
    assert card.data.base_model == BASE and {"sparse-peft", "trl", "sft"} <= set(card.data.tags)
    assert 'adapter = "tester/by-command"' in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("train_loss", "data"), "no path of this machine"
    assert "pipeline(" not in card.text, "TRL's card has an example for a whole model"


STRANGER = """
from huggingface_hub import create_repo, hf_hub_download, upload_file
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
for attempt, error in (
    (lambda: create_repo("tester/new"), HfHubHTTPError),
    (lambda: upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="tester/sparse-adapter"), HfHubHTTPError),
    (lambda: hf_hub_download("tester/sora-adapter", "adapter_config.json"), RepositoryNotFoundError),
):
    try:
        attempt()
    except error:
        continue
    raise SystemExit("it was let in")
print(hf_hub_download("tester/sparse-adapter", "adapter_config.json"))
"""


def test_without_the_right_token_nothing_is_written_and_nothing_private_read(pushed):
    hub, folder = pushed
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    env = environment(hub, folder / "stranger", token="hf_wrong")
    done = subprocess.run([sys.executable, "-c", STRANGER], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "adapter_config.json" in done.stdout, done.stderr[-2000:]
    assert before == {name: list(repo.commits) for name, repo in hub.repos.items()}


def test_requests_stayed_on_the_loopback_interface(pushed):
    hub, _ = pushed
    kinds = {method for method, _ in hub.requests}
    assert kinds == {"GET", "HEAD", "POST", "PUT"} and hub.url.startswith("http://127.0.0.1:")
