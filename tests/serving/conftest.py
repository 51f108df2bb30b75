"""A small base with adapters in folders, an engine, and a server on a free port."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_peft import SparseConfig
from sparse_peft.serving import AdapterFolders, Engine, HttpServer, ServerLimits, build_app
from tests.helpers.http_client import Client

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


class Served:
    """The base's folder and those of its adapters, and what each answers alone."""

    def __init__(self, base, folder):
        self.base, self.folder, self._alone = base, folder, {}
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.names = ("a", "b", "c")
        for seed, name in enumerate(self.names):
            self.save(name, seed)

    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def save(self, name, seed, **fields):
        settings = {"target_modules": ["q_proj", "down_proj"], "density": 0.1 + 0.02 * seed, "seed": seed, **fields}
        torch.manual_seed(seed)
        config = SparseConfig(task_type="CAUSAL_LM", init_weights=False, **settings)
        get_peft_model(self.model(), config).save_pretrained(self.folder / name, save_embedding_layers=False)
        return self.folder / name

    def alone(self, name):
        """A model with this adapter alone, loaded once."""
        if name not in self._alone:
            base = self.model()
            self._alone[name] = base if name is None else PeftModel.from_pretrained(base, self.folder / name).eval()
        return self._alone[name]

    def answer(self, name, prompt, tokens):
        """``model.generate``'s greedy answer, and its number of tokens."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        made = self.alone(name).generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = self.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text, len(made)

    def engine(self, **options):
        engine = Engine(self.model(), self.tokenizer, "base", **options)
        for name in self.names:
            engine.add(name, self.folder / name)
        return engine


@pytest.fixture(scope="session")
def served(stand_in, tmp_path_factory):
    made = Served(stand_in, tmp_path_factory.mktemp("adapters"))
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture
def engine(served):
    made = served.engine()
    yield made
    made.close()


@pytest.fixture
def client(served):
    """Of a server that may load adapters from the folder of all adapters."""
    pytest.importorskip("starlette", reason="the server's packages are in the extra 'serve'")
    pytest.importorskip("uvicorn", reason="the server's packages are in the extra 'serve'")
    engine = served.engine(batch_wait=0.02)
    app = build_app(engine, AdapterFolders([served.folder]), ServerLimits(body_bytes=20_000, max_tokens=32))
    with HttpServer(app) as server:
        yield Client(server.url)
    assert not engine.is_ready
