"""An embedding and a head with one weight: one support, both uses' gradients, and a tie that stays."""

import copy
import io
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    Qwen2Config,
    T5Config,
)

from sparse_peft import SaRAConfig, SparseConfig, SparsityController, select_support
from sparse_peft.adapters import AdapterPool, compose, extract, save_as_lora, soup
from sparse_peft.adapters.export import save_merged
from sparse_peft.sync import Publisher, Receiver
from tests.helpers.embedding_models import (
    COLS,
    IDS,
    ROWS,
    Words,
    adapted,
    backward,
    hooked,
    layers,
    scaled,
    wanted_gradients,
    with_deltas,
)
from tests.helpers.language_models import llama, small_llama

NAMES = [["emb"], ["head"], ["emb", "head"]]


KINDS = {
    "plain": lambda: Words(tied=True),
    "bias": lambda: Words(tied=True, bias=True),
    "padding": lambda: Words(tied=True, padding_idx=2),
    "hooked embedding": lambda: hooked(Words(tied=True), "emb"),
    "hooked head": lambda: hooked(Words(tied=True), "head"),
    "scaled": lambda: scaled(Words(tied=True)),
}


def tied_llama():
    return llama(tie_word_embeddings=True)


def values_of(model, adapter="default"):
    (layer,) = layers(model).values()
    return layer.deltas[adapter].values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("resident", [True, False])
def test_the_gradient_is_autograds_of_the_tied_weight(kind, names, resident):
    model, reference = adapted(KINDS[kind]().double(), names, resident=resident)
    assert list(layers(model)) == ["emb"]
    dense = with_deltas(reference, model)
    torch.testing.assert_close(backward(model), backward(dense))
    torch.testing.assert_close(values_of(model).grad, wanted_gradients(dense, model)["emb"], rtol=1e-12, atol=1e-12)
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 1


def test_all_names_give_the_same_adapter(tmp_path):
    models = []
    for names in (["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]):
        config = SparseConfig(target_modules=[*names, "q_proj"], density=0.1, init_weights=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*tie_word_embeddings")  # PEFT warns of tied targets
            models.append(get_peft_model(tied_llama(), config))
    files = []
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        files.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    positions = [name for name in files[0] if not name.endswith("values")]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    assert not [name for name in files[0] if "lm_head" in name or name.endswith("weight")]
    assert all(torch.equal(files[0][name], other[name]) for name in positions for other in files[1:])


def test_the_head_alone_where_it_is_not_tied():
    base = llama(tie_word_embeddings=False).double()
    model, reference = adapted(base, ["lm_head"])
    dense = with_deltas(reference, model)
    for one in (model, dense):
        one(IDS, labels=IDS).loss.backward()
    ((name, wanted),) = wanted_gradients(dense, model).items()
    assert name == "lm_head"
    torch.testing.assert_close(values_of(model).grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", NAMES, ids=str)
def test_merging_switching_and_deleting_keep_the_bits_and_the_tie(dtype, names):
    model, reference = adapted(Words(tied=True).to(dtype), names)
    other = SparseConfig(target_modules=["head"], density=0.2, init_weights=False, scale=1.0, seed=3)
    model.add_adapter("other", other)
    model.eval()
    outputs = {name: with_deltas(reference, model, [name])(IDS) for name in ("default", "other")}
    both = with_deltas(reference, model, ["default", "other"])(IDS)
    base = model.base_model.model
    for _ in range(2):
        for name, wanted in outputs.items():
            model.set_adapter(name)
            assert torch.equal(model(IDS), wanted)
            with model.disable_adapter():
                assert torch.equal(model(IDS), reference(IDS))
            model.merge_adapter()
            assert torch.equal(model(IDS), wanted) and base.head.base_layer.weight is base.emb.base_layer.weight
            model.unmerge_adapter()
            assert torch.equal(base.emb.base_layer.weight, reference.emb.weight)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(IDS), both)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(model(IDS), outputs["other"])
    twin = copy.deepcopy(model)
    plain = model.unload()
    assert plain.head.weight is plain.emb.weight and torch.equal(plain.emb.weight, reference.emb.weight)
    assert type(plain.head) is nn.Linear and type(plain.emb) is nn.Embedding
    merged = twin.merge_and_unload()
    assert merged.head.weight is merged.emb.weight and torch.equal(merged(IDS), outputs["other"])


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches(kind):
    model, _ = adapted(KINDS[kind]().double())
    model.add_adapter(
        "other", SparseConfig(target_modules=["emb"], density=0.2, init_weights=False, scale=1.0, seed=3)
    )
    model.eval()
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["other", "__base__", "default"])
        for number, name in ((0, "other"), (2, "default")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[number], model(IDS)[number])
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1], model(IDS)[1])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_load_and_the_merged_model_is_saved_tied(tmp_path, low_cpu_mem_usage):
    config = SparseConfig(target_modules=["lm_head", "q_proj"], density=0.1, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tied_llama(), config).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tied_llama(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again(IDS).logits, expected)
    plain = tied_llama().eval()
    plain.load_adapter(tmp_path / "adapter")
    assert torch.equal(plain(IDS).logits, expected)
    save_merged(model, tmp_path / "merged")
    exported = type(tied_llama()).from_pretrained(tmp_path / "merged").eval()
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert torch.equal(exported(IDS).logits, expected)
    merged = again.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(merged).from_pretrained(tmp_path / "plain").eval()(IDS).logits, expected)


def test_copies_moves_and_checkpoints():
    model, reference = adapted(Words(tied=True))
    wanted = with_deltas(reference, model)
    model.eval()(IDS)
    twin = copy.deepcopy(model)
    assert twin.base_model.model.head.base_layer.weight is twin.base_model.model.emb.base_layer.weight
    with torch.no_grad():
        values_of(twin).zero_()
    assert torch.equal(twin(IDS), reference(IDS)) and torch.equal(model(IDS), wanted(IDS))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IDS), wanted(IDS))
    other, _ = adapted(Words(tied=True), seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), wanted(IDS))
    model.merge_adapter()
    model.double()
    torch.testing.assert_close(model(IDS).float(), wanted(IDS))
    model.unmerge_adapter()
    plain = model.unload()
    assert plain.head.weight is plain.emb.weight and torch.equal(plain.emb.weight, reference.emb.weight.double())


def test_compiled_passes():
    model, reference = adapted(Words(tied=True).double())
    dense = with_deltas(reference, model)
    wanted = backward(dense)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(compiled), wanted)
    torch.testing.assert_close(values_of(model).grad, wanted_gradients(dense, model)["emb"])


def test_positions_from_data_see_both_gradients():
    base = Words(tied=True)
    dense = copy.deepcopy(base)
    backward(dense)
    for selection in ("gradient", "fisher"):
        config = SparseConfig(target_modules=["head"], selection=selection, num_params=9)
        by_data = select_support(base, config, [IDS], loss_fn=lambda model, ids: model(ids).square().sum())
        best = dense.emb.weight.grad.abs().view(-1).topk(9).indices.sort().values
        assert torch.equal(by_data.supports["emb"].indices.long(), best)
        assert layers(get_peft_model(copy.deepcopy(base), by_data))["emb"].support("default").nnz == 9
    wanda = SparseConfig(target_modules=["emb"], selection="wanda", num_params=9)
    with pytest.raises(ValueError, match=r"selection='wanda' scores a weight by the norms of its inputs.* emb .*head"):
        select_support(base, wanda, [IDS], loss_fn=lambda model, ids: model(ids))


@pytest.mark.parametrize("selection", ["rigl", "accumulated_gradient"])
@pytest.mark.parametrize("tied", [True, False])
def test_reselection_grows_where_the_sum_of_the_gradients_is_largest(selection, tied):
    config = SparseConfig(
        target_modules=["emb"], selection=selection, num_params=12, reselect_every=1, accumulate=1, scale=1.0,
        replace_rate=0.5, first_replace_rate=0.5, candidates=20.0, schedule="constant",
    )  # fmt: skip
    base = Words(tied=tied)
    model = get_peft_model(base, config)
    reference = copy.deepcopy(model.base_model.model)
    layer = layers(model)["emb"]
    optimizer = torch.optim.SGD([values_of(model)], lr=1e-3)
    controller = SparsityController(model, optimizer, total_steps=4)
    before = layer.support("default").indices.long()
    dense = Words(tied=tied)
    dense.emb.weight.data.copy_(reference.emb.base_layer.weight)
    backward(dense)
    backward(model)
    optimizer.step()
    controller.step()
    after = layer.support("default").indices.long()
    grown = after[~torch.isin(after, before)]
    gradient = dense.emb.weight.grad.abs().view(-1).clone()
    gradient[before] = -1
    assert len(grown) == 6 and set(grown.tolist()) == set(gradient.topk(6).indices.tolist())


def train(model, optimizer, controller, steps):
    for step in steps:
        torch.manual_seed(step)
        model(torch.randint(0, ROWS, (2, 5))).square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("selection", ["accumulated_gradient", "rigl", "momentum", "set"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tied, selection):
    config = SparseConfig(
        target_modules=["emb", "head"],
        selection=selection,
        density=0.1,
        reselect_every=3,
        accumulate={"set": 0, "rigl": 1}.get(selection, 2),
    )
    model = get_peft_model(Words(tied=tied), config)
    first = {name: layer.support("default").indices.clone() for name, layer in layers(model).items()}

    def going_on(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return optimizer, SparsityController(model, optimizer, total_steps=9)

    optimizer, controller = going_on(model)
    train(model, optimizer, controller, range(5))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = PeftModel.from_pretrained(Words(tied=tied), tmp_path, is_trainable=True)
    other, again = going_on(resumed)
    other.load_state_dict(state)
    for one in ((model, optimizer, controller), (resumed, other, again)):
        train(*one, range(5, 8))
    for name, layer in layers(model).items():
        twin = layers(resumed)[name]
        assert torch.equal(layer.support("default").indices, twin.support("default").indices)
        assert torch.equal(layer.deltas["default"].values, twin.deltas["default"].values)
        assert not torch.equal(layer.support("default").indices, first[name])


def test_sara_trains_tied_weights():
    model = get_peft_model(Words(tied=True), SaRAConfig(target_modules=["head"], num_params=8))
    backward(model)
    assert list(layers(model)) == ["emb"] and values_of(model).grad.abs().sum() > 0


def test_three_layers_of_one_weight():
    class Three(Words):
        def __init__(self):
            super().__init__(tied=True)
            self.decoder = nn.Embedding(ROWS, COLS)
            self.decoder.weight = self.emb.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.emb(ids) * self.decoder(ids.flip(0))))

    model, reference = adapted(Three().double(), ["decoder"])
    dense = with_deltas(reference, model)
    torch.testing.assert_close(backward(model), backward(dense))
    torch.testing.assert_close(values_of(model).grad, wanted_gradients(dense, model)["emb"])
    plain = model.unload()
    assert plain.head.weight is plain.emb.weight is plain.decoder.weight


# ---------------------------------------------------------------------- architectures of transformers

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
ENCODER_DECODER = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
    "max_position_embeddings": 32, "scale_embedding": True,
}  # fmt: skip
GPT2 = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
ARCHITECTURES = {
    "gemma3": (AutoModelForCausalLM, Gemma3TextConfig(**SIZES), ["embed_tokens"], 1),
    "qwen2": (AutoModelForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True), ["lm_head"], 1),
    "gpt2": (AutoModelForCausalLM, GPT2Config(**GPT2), ["wte", "wpe", "c_attn"], 3),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5), ["lm_head", "relative_attention_bias"], 3),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(**ENCODER_DECODER), ["shared", "embed_positions"], 3),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers(name):
    kind, settings, names, count = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = kind.from_config(settings).double().eval()
    if name == "t5" and base.shared is base.encoder.embed_tokens:
        pytest.skip("transformers 4 has one module under several names, which is refused")
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    model, reference = adapted(base, names)
    model.eval()  # get_peft_model keeps the mode, but dropout must be off in both
    dense = with_deltas(reference, model).eval()
    assert len(layers(model)) == count
    ids = torch.tensor([[1, 5, 5, 9], [3, 2, 8, 0]])
    losses = [one(input_ids=ids, labels=ids).loss for one in (model, dense)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for layer, wanted in wanted_gradients(dense, model).items():
        torch.testing.assert_close(layers(model)[layer].deltas["default"].values.grad, wanted, rtol=1e-9, atol=1e-12)
    plain = model.unload()
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


# ---------------------------------------------------------------------- adapters after training


@pytest.fixture
def saved(tmp_path):
    """``(base, folders of two adapters, models that have them)``."""
    base = tied_llama().eval()
    folders, models = [], []
    for seed in range(2):
        config = SparseConfig(
            target_modules=["lm_head", "q_proj"], density=0.1, init_weights=False, scale=1.0, seed=seed
        )
        models.append(get_peft_model(copy.deepcopy(base), config).eval())
        folders.append(tmp_path / str(seed))
        models[-1].save_pretrained(folders[-1])
    return base, folders, models


def delta_of(folder, base):
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return layers(model)["model.embed_tokens"].get_delta_weight("default")


def test_composing_averaging_and_adding(saved, tmp_path):
    base, folders, models = saved
    one, other = (delta_of(folder, base) for folder in folders)
    compose(folders, tmp_path / "sum", weights=[0.5, 2.0])
    torch.testing.assert_close(delta_of(tmp_path / "sum", base), 0.5 * one + 2 * other)
    soup([folders[0], folders[0]], tmp_path / "soup")
    torch.testing.assert_close(delta_of(tmp_path / "soup", base), one)
    models[0].load_adapter(folders[1], "other")
    models[0].base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both")
    both = layers(models[0])["model.embed_tokens"].get_delta_weight("both")
    torch.testing.assert_close(both, 0.5 * one + 2 * other)


def test_extracting_from_a_tied_model(saved, tmp_path):
    base, _, models = saved
    expected = models[0](IDS).logits
    merged = models[0].merge_and_unload()
    found = extract(base, merged, tmp_path, density=1.0, target_modules=["embed_tokens", "q_proj"])
    assert not found.others
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(IDS).logits, expected)


def test_pools_and_lora(saved, tmp_path):
    base, folders, models = saved
    pool = AdapterPool(copy.deepcopy(base))
    for name, folder in zip("ab", folders, strict=True):
        pool.add(name, folder)
    for name, model in zip("ab", models, strict=True):
        with pool.use(name) as served:
            assert torch.equal(served(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"layer model\.embed_tokens: an embedding's delta is not converted to LoRA"):
        save_as_lora(models[0], tmp_path / "lora")


def test_published_entries_reach_both_layers(saved):
    base, _, models = saved
    engine = copy.deepcopy(base)
    receiver = Receiver(engine)
    receiver.apply_(Publisher(models[0]).publish())
    assert torch.equal(engine(IDS).logits, models[0](IDS).logits)
    receiver.restore_()
    assert torch.equal(engine(IDS).logits, base(IDS).logits)


# ---------------------------------------------------------------------- refusals


def test_naming_one_and_leaving_out_the_other_is_refused():
    with pytest.raises(ValueError, match=r"exclude_modules=.* leaves out emb, whose weight is that of head in target"):
        get_peft_model(Words(tied=True), SparseConfig(target_modules=["head"], exclude_modules=["emb"], density=0.1))


@pytest.mark.parametrize("field", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}])
def test_a_tied_weight_that_trains_in_two_ways_is_refused(field):
    config = SparseConfig(target_modules=["embed_tokens", "q_proj"], density=0.1, **field)
    with pytest.raises(ValueError, match=rf"{next(iter(field))}.*(tied weights|embed_tokens)"):
        get_peft_model(tied_llama(), config)


def test_a_weight_that_is_untied_later_is_noticed():
    model, _ = adapted(Words(tied=True))
    head = model.base_model.model.head
    head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"layer head: its weight was tied to that of emb"):
        model(IDS)


def test_nothing_is_left_of_a_refused_adapter():
    model = Words(tied=True)
    with pytest.raises(ValueError):
        get_peft_model(model, SparseConfig(target_modules=["emb"], num_params=10**6))
    assert type(model.emb) is nn.Embedding and type(model.head) is nn.Linear


def test_a_model_without_a_tie_config_still_generates():
    config = SparseConfig(target_modules=["lm_head"], density=0.05, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(small_llama(tie_word_embeddings=True), config).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
